"""The fact assets and their checks, materialized in this process on an ephemeral instance."""

import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.reporting.assets import fact_assets, fact_checks, source_assets
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.jobs import check_reporting
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    DAY,
    NOON,
    World,
    ephemeral,
    materialize,
    rows,
    versions,
)

TODAY = datetime.now(UTC).date()
LATER = TODAY + timedelta(days=5)
COUNTS = ("read", "inserted", "refreshed", "unchanged", "removed", "rejected")
TABLES = tuple(fact.table for fact in FACTS)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"reporting_start": DAY})


class Run:
    """A run over some of the facts and their checks."""

    def __init__(
        self,
        settings: Settings,
        tables: Sequence[str] = TABLES,
        *,
        first: str = DAY.isoformat(),
        last: str | None = None,
        **config: Any,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            definitions: list[Any] = [
                *source_assets(settings),
                *fact_assets(settings),
                *fact_checks(settings),
            ]
        ranged = {
            "dagster/asset_partition_range_start": first,
            "dagster/asset_partition_range_end": last,
        }
        self.result = dg.materialize(
            definitions,
            instance=ephemeral(),
            resources={"everruns_postgres": PostgresDatabase(settings)},
            selection=dg.AssetSelection.assets(*tables)
            | dg.AssetSelection.checks_for_assets(*tables),
            partition_key=first if last is None else None,
            tags={} if last is None else {name: str(day) for name, day in ranged.items()},
            run_config={"ops": {table: {"config": config} for table in tables}} if config else None,
            raise_on_error=False,
        )

    def metadata(self, table: str) -> dict[str | None, dict[str, Any]]:
        """What was told of each partition of a fact."""
        return {
            event.partition: {
                name: entry.value for name, entry in event.materialization.metadata.items()
            }
            for event in self.result.get_asset_materialization_events()
            if event.asset_key == dg.AssetKey(table)
        }

    def counts(self, table: str, partition: str = DAY.isoformat()) -> dict[str, Any]:
        """The counts of a partition that are not 0."""
        told = self.metadata(table)[partition]
        return {name: told[name] for name in (*COUNTS, "orphaned") if told[name]}

    def error(self) -> str:
        """Why the run failed."""
        [error] = [
            event.step_failure_data.error
            for event in self.result.all_node_events
            if event.is_step_failure
        ]
        assert error is not None
        return error.message

    def checks(self) -> dict[tuple[str, str], dg.AssetCheckEvaluation]:
        """How each check went, by fact and name."""
        return {
            (check.asset_key.to_user_string(), check.check_name): check
            for check in self.result.get_asset_check_evaluations()
        }


def test_materializing_a_day_makes_every_fact_of_it_right_and_its_checks_pass(
    connection: Connection, settings: Settings
) -> None:
    load_adversarial_sources(connection, seed=12, sessions=5, events_per_session=10)

    run = Run(settings)

    assert run.result.success
    wrong = [line for line in differences(connection, limit=999) if not line.endswith("missing")]
    assert wrong == []
    checks = run.checks()
    names = ("no_missing_rows", "no_stale_rows", "no_orphaned_rows")
    assert checks.keys() == {(table, name) for table in TABLES for name in names}
    assert all(check.passed for check in checks.values())
    for table in TABLES:
        [told] = run.metadata(table).values()
        stored = rows(
            connection,
            f"SELECT count(*) FROM {table} WHERE time_bucket_day = '2026-03-01'",  # pyright: ignore[reportArgumentType]
        )
        assert [(told["dagster/partition_row_count"],)] == stored
        assert told["read"] == told["inserted"] + told["rejected"]
        assert (told["rows_per_second"] > 0) == (told["read"] > 0)


def test_materializing_a_day_again_changes_nothing_and_says_so(
    world: World, settings: Settings
) -> None:
    world.event(world.session(world.org()))
    assert Run(settings, ["fact_tool_call"]).counts("fact_tool_call") == {"read": 1, "inserted": 1}
    before = versions(world.connection)

    run = Run(settings, ["fact_tool_call"])

    assert run.counts("fact_tool_call") == {"read": 1, "unchanged": 1}
    assert versions(world.connection) == before


def test_a_range_of_days_is_one_run_with_the_counts_of_each_day(
    world: World, settings: Settings
) -> None:
    session = world.session(world.org())
    for offset, events in ((0, 1), (2, 3)):
        for _ in range(events):
            world.event(session, ts=NOON + timedelta(days=offset))

    run = Run(settings, ["fact_tool_call"], first="2026-03-01", last="2026-03-03")

    assert run.result.success
    assert {day: told["inserted"] for day, told in run.metadata("fact_tool_call").items()} == {
        "2026-03-01": 1,
        "2026-03-02": 0,
        "2026-03-03": 3,
    }
    assert rows(
        world.connection,
        "SELECT time_bucket_day::text, count(*) FROM fact_tool_call GROUP BY 1 ORDER BY 1",
    ) == [("2026-03-01", 1), ("2026-03-03", 3)]


class Checks:
    """Looks at the checks of `fact_tool_call` again and again, on one instance."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.definitions = dg.Definitions(
                assets=[*source_assets(settings), *fact_assets(settings)],
                asset_checks=fact_checks(settings),
                jobs=[check_reporting],
                resources={"everruns_postgres": PostgresDatabase(settings)},
            )

    def look(self, days: int = 7, **tags: str) -> dict[str, dg.AssetCheckEvaluation]:
        result = self.definitions.resolve_job_def("check_reporting").execute_in_process(
            run_config={"days": days},
            tags={f"dagster/{name}": value for name, value in tags.items()},
            instance=self.instance,
        )
        return {
            check.check_name: check
            for check in result.get_asset_check_evaluations()
            if check.asset_key == dg.AssetKey("fact_tool_call")
        }


def test_checks_find_missing_stale_superseded_and_orphaned_rows(
    world: World, settings: Settings, instance: dg.DagsterInstance
) -> None:
    connection = world.connection
    org = world.org()
    kept, purged = world.session(org), world.session(org)
    missing, stale = (world.event(kept) for _ in range(2))
    world.event(purged)
    materialize(connection)
    connection.execute("DELETE FROM fact_tool_call WHERE source_key = %s", [f"event:{missing}"])
    connection.execute(
        "UPDATE fact_tool_call SET tool_name = 'x' WHERE source_key = %s", [f"event:{stale}"]
    )
    with connection.transaction():
        connection.execute("SET LOCAL app.session_purge = 'true'")
        connection.execute("DELETE FROM sessions WHERE id = %s", [purged])
    before = versions(connection)

    checks = Checks(settings, instance).look(partition="2026-03-01")

    found = {
        name: (check.passed, check.metadata[f"{name.split('_')[1]}_rows"].value, check.severity)
        for name, check in checks.items()
    }
    assert found == {
        "no_missing_rows": (False, 1, dg.AssetCheckSeverity.ERROR),
        "no_stale_rows": (False, 1, dg.AssetCheckSeverity.ERROR),
        "no_orphaned_rows": (False, 1, dg.AssetCheckSeverity.WARN),
    }
    assert versions(connection) == before


def test_a_check_looks_at_the_last_days_or_at_those_of_its_run(
    world: World, settings: Settings, instance: dg.DagsterInstance
) -> None:
    checks = Checks(settings, instance)
    session = world.session(world.org())
    world.event(session, ts=NOON)
    world.event(session, ts=datetime.now(UTC) - timedelta(days=1))

    def looked_at(**asked: Any) -> tuple[Any, Any]:
        metadata = checks.look(**asked)["no_missing_rows"].metadata
        return metadata["days_checked"].value, metadata["missing_rows"].value

    # Today, and the days of any age on which something is missing.
    assert looked_at(days=1) == (3, 2)
    materialize(world.connection)
    materialize(world.connection, TODAY - timedelta(days=1))
    # And again those that were wrong at the last look.
    assert looked_at() == (8, 0)
    assert looked_at() == (7, 0)
    ranged = {
        "asset_partition_range_start": "2026-03-01",
        "asset_partition_range_end": "2026-03-03",
    }
    assert looked_at(**ranged) == (3, 0)


def test_what_has_only_just_changed_or_is_queued_is_not_wrong_yet(
    world: World, settings: Settings, instance: dg.DagsterInstance
) -> None:
    org = world.org()
    session = world.session(org)
    now = datetime.now(UTC)
    _just, queued, _lost = (
        world.event(session, ts=now - timedelta(minutes=minutes)) for minutes in (1, 30, 31)
    )
    world.enqueue(org, "event", queued)

    check = Checks(settings, instance).look(days=2)["no_missing_rows"]

    assert check.metadata["missing_rows"].value == 1
    assert check.metadata["underway_rows"].value == 2


def test_a_check_stays_red_until_every_day_that_it_found_wrong_is_repaired(
    world: World, settings: Settings, instance: dg.DagsterInstance
) -> None:
    checks = Checks(settings, instance)
    session = world.session(world.org())
    for days in (1, 2):
        world.event(session, ts=datetime.now(UTC) - timedelta(days=days))
    yesterday = (TODAY - timedelta(days=1)).isoformat()
    assert checks.look()["no_missing_rows"].metadata["days_wrong"].value == 2

    materialize(world.connection, TODAY - timedelta(days=1))

    [wrong] = _wrong_days(checks.look(partition=yesterday)["no_missing_rows"])
    assert wrong == (TODAY - timedelta(days=2)).isoformat()
    materialize(world.connection, TODAY - timedelta(days=2))
    assert checks.look(partition=yesterday)["no_missing_rows"].passed
    assert checks.look(partition=yesterday)["no_missing_rows"].metadata["days_checked"].value == 1


def _wrong_days(check: dg.AssetCheckEvaluation) -> list[Any]:
    table: Any = check.metadata["days"].value
    return [record.data["day"] for record in table.records]


@pytest.mark.parametrize("days", [0, 367])
def test_a_check_of_too_many_days_or_none_is_refused(
    settings: Settings, instance: dg.DagsterInstance, days: int
) -> None:
    with pytest.raises(dg.Failure, match="days: expected a whole number from 1 to 366"):
        Checks(settings, instance).look(days=days)


def test_orphans_are_counted_by_default_and_removed_on_request(
    world: World, settings: Settings
) -> None:
    connection = world.connection
    session = world.session(world.org())
    world.event(session)
    materialize(connection)
    with connection.transaction():
        connection.execute("SET LOCAL app.session_purge = 'true'")
        connection.execute("DELETE FROM sessions")
    tables = ["fact_tool_call", "fact_session"]

    assert Run(settings, tables).counts("fact_tool_call") == {"orphaned": 1}
    assert len(versions(connection)) == 2
    other = Run(settings, tables, remove_orphans=True, session_id=str(world.session(world.org())))
    assert other.counts("fact_tool_call") == {"orphaned": 1}

    run = Run(settings, tables, remove_orphans=True, session_id=str(session))

    assert run.counts("fact_tool_call") == {"removed": 1}
    assert run.counts("fact_session") == {"unchanged": 1, "read": 1, "removed": 1}
    assert rows(connection, "SELECT FROM fact_tool_call") == []


def test_sources_that_cannot_be_stored_are_named_in_the_metadata_without_their_values(
    world: World, settings: Settings
) -> None:
    org = world.org()
    good = world.generation(org)
    beyond = world.generation(org, input_tokens=2**63 - 1, output_tokens=1)

    run = Run(settings, ["fact_llm_generation"])

    [told] = run.metadata("fact_llm_generation").values()
    assert told["unstorable"] == 1
    [record] = told["unstorable_sources"].records
    assert record.data == {
        "org_id": org,
        "source": str(beyond),
        "reason": "total_tokens is beyond bigint",
    }
    stored = rows(world.connection, "SELECT source_key FROM fact_llm_generation")
    assert stored == [(f"llm_generation:{good}",)]


@pytest.mark.parametrize("partition", ["2026-02-28", "2999-01-01", "yesterday"])
def test_a_partition_outside_the_range_is_refused_and_changes_nothing(
    world: World, settings: Settings, partition: str
) -> None:
    world.event(world.session(world.org()))

    with pytest.raises(dg.DagsterUnknownPartitionError):
        Run(settings, ["fact_tool_call"], first=partition)

    assert versions(world.connection) == set()


@pytest.mark.parametrize(
    ("first", "last"), [("2026-02-27", "2026-03-01"), (TODAY.isoformat(), LATER.isoformat())]
)
def test_a_range_that_leaves_the_partitions_is_refused_and_changes_nothing(
    world: World, settings: Settings, first: str, last: str
) -> None:
    world.event(world.session(world.org()))

    run = Run(settings, ["fact_tool_call"], first=first, last=last)

    assert "partition: expected a day from 2026-03-01 to " in run.error()
    assert versions(world.connection) == set()


def test_a_range_that_ends_before_it_begins_is_refused(world: World, settings: Settings) -> None:
    run = Run(settings, ["fact_tool_call"], first="2026-03-02", last="2026-03-01")

    assert "expected the first day of the range first, got 2026-03-02 to" in run.error()


def test_a_run_of_no_day_is_refused_and_changes_nothing(world: World, settings: Settings) -> None:
    world.event(world.session(world.org()))
    job = build_definitions(settings).resolve_job_def("materialize_reporting")

    result = job.execute_in_process(raise_on_error=False)

    errors = {
        event.step_failure_data.error.message
        for event in result.all_node_events
        if event.is_step_failure and event.step_failure_data.error
    }
    assert len(errors) == 1
    assert "partition: expected a day, or a range of days" in errors.pop()
    assert versions(world.connection) == set()


@pytest.mark.parametrize("spelling", ["urn:uuid:{}", "{{{}}}", "{0.hex}", "-{0.hex}-"])
def test_a_session_id_may_be_spelled_in_any_way_that_is_accepted(
    world: World, settings: Settings, spelling: str
) -> None:
    connection = world.connection
    org = world.org()
    sessions = [world.session(org) for _ in range(2)]
    kept, _ = (world.event(session) for session in sessions)
    materialize(connection)
    with connection.transaction():
        connection.execute("SET LOCAL app.session_purge = 'true'")
        connection.execute("DELETE FROM sessions")

    run = Run(
        settings,
        ["fact_tool_call"],
        remove_orphans=True,
        session_id=spelling.format(sessions[1]),
    )

    assert run.counts("fact_tool_call") == {"removed": 1, "orphaned": 1}
    assert rows(connection, "SELECT source_key FROM fact_tool_call") == [(f"event:{kept}",)]


@pytest.mark.parametrize("session_id", ["no uuid", ""])
def test_a_session_id_that_is_no_uuid_is_refused_with_the_field(
    world: World, settings: Settings, session_id: str
) -> None:
    world.event(world.session(world.org()))

    run = Run(settings, ["fact_tool_call"], remove_orphans=True, session_id=session_id)

    assert "session_id: expected the UUID of a session" in run.error()
    assert versions(world.connection) == set()


def test_every_fact_of_the_catalog_is_a_described_asset_with_its_columns(
    settings: Settings,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assets = fact_assets(settings)
    for fact, asset in zip(FACTS, assets, strict=True):
        [key] = asset.keys
        spec = asset.get_asset_spec(key)
        assert key == dg.AssetKey(fact.table)
        assert spec.group_name == "reporting"
        assert spec.description
        assert spec.owners
        assert {dep.asset_key.to_user_string() for dep in spec.deps} >= {
            table for source in fact.sources for table in source.tables
        }
        schema = spec.metadata["dagster/column_schema"]
        assert [column.name for column in schema.columns] == [
            column.name for column in fact.columns
        ]
        assert all(column.description for column in schema.columns)
