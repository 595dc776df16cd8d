"""Servers of 24.8 and 25.8: the same items, the failures sensor, and what the doctor says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.operations.doctor import examine
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.databases.older_engine import DATABASE
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.items import real, test_against_oracle
from everruns_pipelines_tests.items.test_automation import said, tick, traces
from everruns_pipelines_tests.items.test_reading import add_noise, shares_read
from everruns_pipelines_tests.items.world import Span, World, envelope

pytestmark = pytest.mark.deploy

# The release of chDB that holds a server's version, and the span tables that it can make.
_OLD = ("otel_traces_older.sql", "otel_traces.sql", "otel_traces_newest_bloom.sql")
SERVERS = {
    "24.8": ("chdb==2.1.1", _OLD),
    "25.8": ("chdb==3.7.2", (*_OLD, "otel_traces_json.sql")),
}
_UV = Path(sys.executable).with_name("uv")


@pytest.fixture(scope="module")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The interpreter of an environment for each server."""
    made: dict[str, Path] = {}
    for version, (release, _) in SERVERS.items():
        directory = tmp_path_factory.mktemp("environment") / "venv"
        made[version] = directory / "bin" / "python"
        for command in (
            ["venv", "--quiet", "--python", sys.executable, str(directory)],
            [
                "pip",
                "install",
                "--quiet",
                "--system-certs",
                "--python",
                str(made[version]),
                release,
            ],
        ):
            subprocess.run([_UV, *command], check=True)
    return made


@pytest.fixture(
    params=[(version, table) for version, (_, tables) in SERVERS.items() for table in tables],
    ids=lambda made: "-".join(made),
)
def server(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A server's version and the script of its span table."""
    return request.param


@pytest.fixture
def settings(
    postgres_url: str, home: Path, server: tuple[str, str], pythons: dict[str, Path], tmp_path: Path
) -> Iterator[Settings]:
    version, tables = server
    module = "everruns_pipelines_tests.databases.older_engine"
    with subprocess.Popen(
        [pythons[version], "-m", module, str(tmp_path / "spans")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        settings = Settings.from_environment(
            {
                "EVERRUNS_POSTGRES_URL": postgres_url,
                "EVERRUNS_CLICKHOUSE_DSN": "clickhouse://user@127.0.0.1:"
                f"{process.stdout.readline().strip()}/{DATABASE}",
                "EVERRUNS_HOME": str(home),
                "EVERRUNS_REPORTING_START": "2026-01-01",
            }
        )
        try:
            with ClickHouseDatabase(settings).connect() as clickhouse:
                for statement in span_tables(tables):
                    clickhouse.client.command(statement)
            yield settings
        finally:
            process.kill()


def test_everything_runs_on_an_older_server(world: World, server: tuple[str, str]) -> None:
    version, table = server
    world.log.append("the span table is empty")
    real.lay(world)
    before = world.items(real.REAL_PROJECT)
    real.check(world, before, real.rebuild_all(world))
    stored = world.items(real.REAL_PROJECT)
    for again in (
        real.rebuild_all(world, real.TRACES),
        real.rebuild_all(world, dry_run=True),
        world.rebuild_day(),
    ):
        assert (again.inserted, again.refreshed, again.processed) == (0, 0, len(stored))
    assert world.items(real.REAL_PROJECT) == stored

    lost = Span([envelope("lost")], start=datetime.now(UTC) - timedelta(minutes=5))
    world.add(lost)
    first = tick(world)
    assert traces(first) == {lost.trace_id}
    assert "1 lack their row, and were launched before" in said(tick(world, first.cursor))

    [finding] = [one for one in examine(world.clickhouse.settings) if one.name == "spans"]
    assert finding.ok
    assert f"on ClickHouse {version}." in finding.text
    assert "too old for text indexes" in finding.text
    assert ("too old for tables with JSON attributes" in finding.text) == (version == "24.8")
    assert ("JSON generation" in finding.text) == ("json" in table)


def test_a_day_of_adversarial_spans_row_by_row(world: World, server: tuple[str, str]) -> None:
    world.log.append("the span table is empty")
    version, table = server
    seed = 200 + 10 * list(SERVERS).index(version) + SERVERS[version][1].index(table)
    test_against_oracle.check(world, test_against_oracle.lay(world, seed))


def test_a_lookup_reads_a_part_of_the_table(world: World, server: tuple[str, str]) -> None:
    world.log.append("the span table is empty")
    world.add(Span([envelope("one")]))
    with world.clickhouse.connect() as clickhouse:
        add_noise(clickhouse, 1_000_000)
        read = shares_read(clickhouse)
    if "json" not in server[1]:
        assert max(read["session"], read["run"], read["trace"]) < 0.03
