"""Runs the benchmarks named on the command line, or all of them: `python -m benchmarks projection`.

Each prints a table of ratios measured in one run; absolute times say more about the machine.
"""

import sys
from importlib import import_module
from pathlib import Path

ALL = sorted(path.stem for path in Path(__file__).parent.iterdir() if not path.stem.startswith("_"))

if __name__ == "__main__":
    for name in sys.argv[1:] or ALL:
        import_module(f"benchmarks.{name}").main()
