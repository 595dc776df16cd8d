"""`serve` as a process: it finds Dagster's configuration and workspace in any directory."""

import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copy

import pytest
import requests

from everruns_pipelines_tests.deployment import ROOT, free_port, until

pytestmark = pytest.mark.deploy


@contextmanager
def serving(directory: Path, environment: Mapping[str, str]) -> Generator[str]:
    """`serve`, started in a directory; its address, once it is ready."""
    port = free_port()
    command = Path(sys.executable).with_name("everruns-pipelines")
    inherited = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    process = subprocess.Popen(
        [str(command), "serve", "--port", str(port)],
        cwd=directory,
        env={**inherited, **environment},
    )

    def is_ready() -> bool:
        assert process.poll() is None
        try:
            return requests.get(f"http://127.0.0.1:{port}/readyz", timeout=10).ok
        except requests.ConnectionError:
            return False

    try:
        until(is_ready, "the server is ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def locations(url: str) -> list[str]:
    query = "{ workspaceOrError { ... on Workspace { locationEntries { name } } } }"
    told = requests.post(f"{url}/graphql", json={"query": query}, timeout=60).json()
    return [entry["name"] for entry in told["data"]["workspaceOrError"]["locationEntries"]]


def test_in_an_empty_directory_it_uses_the_configuration_that_dev_uses(
    postgres_url: str, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "EVERRUNS_HOME": str(tmp_path / "home"),
        "EVERRUNS_POSTGRES_URL": postgres_url,
        "EVERRUNS_DAGSTER_POSTGRES_URL": postgres_url,
    }
    with serving(elsewhere, environment) as url:
        assert locations(url) == ["everruns_pipelines"]
    assert list(elsewhere.iterdir()) == []
    assert (tmp_path / "home" / "dagster" / "workspace.yaml").exists()


def test_the_workspace_in_dagster_home_counts(postgres_url: str, tmp_path: Path) -> None:
    home = tmp_path / "dagster"
    home.mkdir()
    copy(ROOT / "dagster.yaml", home)
    workspace = (ROOT / "workspace.yaml").read_text()
    (home / "workspace.yaml").write_text(
        workspace.replace("location_name: everruns_pipelines", "location_name: theirs")
    )
    environment = {
        "DAGSTER_HOME": str(home),
        "EVERRUNS_POSTGRES_URL": postgres_url,
        "EVERRUNS_DAGSTER_POSTGRES_URL": postgres_url,
    }
    with serving(tmp_path, environment) as url:
        assert locations(url) == ["theirs"]
