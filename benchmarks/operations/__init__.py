"""What operating costs, a module per measure: `python -m benchmarks operations.serve` runs one."""

from importlib import import_module
from pathlib import Path

MEASURES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def main() -> None:
    """Measure everything, one after the other."""
    for name in MEASURES:
        import_module(f"{__name__}.{name}").main()
