"""The tests leave alone what belongs to whoever runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everruns_pipelines_tests.deployment import ROOT

# They run jobs in this process, over the command line, and load the definitions.
_SOME = (
    "commands/test_main.py::test_project_prints_its_counts",
    "test_parts.py::test_every_command_works_or_is_refused_in_one_line",
    "test_definitions.py",
)


@pytest.mark.deploy
def test_the_users_instance_home_and_databases_are_not_touched(tmp_path: Path) -> None:
    theirs = {name: tmp_path / name for name in ("DAGSTER_HOME", "EVERRUNS_HOME", "HOME")}
    for directory in theirs.values():
        directory.mkdir()
    (theirs["DAGSTER_HOME"] / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    before = _listed(tmp_path, ROOT / ".everruns")

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"),
            *(f"everruns_pipelines_tests/{some}" for some in _SOME),
        ],
        cwd=ROOT,
        env={
            **{name: text for name, text in os.environ.items() if "PYTEST" not in name},
            **{name: str(directory) for name, directory in theirs.items()},
            "EVERRUNS_POSTGRES_URL": "postgresql://theirs:secret@127.0.0.1:1/theirs",
        },
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert _listed(tmp_path, ROOT / ".everruns") == before


def _listed(*directories: Path) -> set[tuple[Path, int]]:
    return {
        (path, path.stat().st_mtime_ns)
        for directory in directories
        for path in (directory, *directory.rglob("*"))
        if path.is_file()
    }
