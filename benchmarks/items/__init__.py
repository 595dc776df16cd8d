"""What items cost, a module per measure: `python -m benchmarks items.sensor` runs one."""

from benchmarks.items import rebuilding, sensor


def main() -> None:
    """Measure everything, one after the other."""
    rebuilding.main()
    sensor.main()
