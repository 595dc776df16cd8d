"""Loading the definitions, which every run and every code server begins with."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Generator

from benchmarks.operations._table import Row, show

LOADS = 7

_DAGSTER = "import dagster"
_DEFINITIONS = "from everruns_pipelines.definitions import defs; defs.get_repository_def()"


def main() -> None:
    """Measure, and print beside the target."""
    show("Loading the definitions", load())


def load() -> Generator[Row]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        alone, ours = [float("inf")], [float("inf")]
        for _ in range(LOADS):
            alone.append(python_seconds(_DAGSTER, home))
            ours.append(python_seconds(_DEFINITIONS, home))
    ratio = min(ours) / min(alone)
    told = f"{min(ours):.2f} s / {min(alone):.2f} s = {ratio:.2f}"
    yield "definitions, import to resolved, against `import dagster`", told, "< 1.3"


def python_seconds(code: str, home: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, env={"EVERRUNS_HOME": home}
    )
    return time.perf_counter() - started
