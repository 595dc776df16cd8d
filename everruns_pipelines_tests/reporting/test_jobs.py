"""The jobs: what they answer, what they report, and what they refuse."""

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.snap.snap_to_yaml import default_values_yaml_from_type_snap
from dagster_shared.yaml_utils import load_run_config_yaml

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.resources import PostgresResource
from everruns_pipelines.reporting import database
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.reporting.adversarial import load_adversarial_sources
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    DAY,
    NOON,
    TIMES_BEYOND_PYTHON,
    World,
    enqueue_all,
    ephemeral,
    outbox,
    rows,
    value,
    versions,
)

ENQUEUED = {"enqueued", "events", "llm_generations", "sessions", "usage_ledger"}
PROJECTED = {"claimed", "completed", "failed", "parked"}
SECRET = "hunter2 is the password"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"reporting_start": DAY})


class Run:
    """A run in this process, and what the instance has recorded of it."""

    def __init__(self, settings: Settings, job: str, ops: dict[str, Any] | None = None) -> None:
        self.instance = ephemeral()
        config = {name: {"config": values} for name, values in (ops or {}).items()}
        self.result = (
            build_definitions(settings)
            .get_job_def(job)
            .execute_in_process(
                run_config={"ops": config}, instance=self.instance, raise_on_error=False
            )
        )

    def output(self, op: str) -> dict[str, Any]:
        """The metadata of an op's output, as GraphQL gives it back."""
        [metadata] = [
            event.step_output_data.metadata
            for event in self.result.events_for_node(op)
            if event.is_successful_output and event.step_output_data.metadata
        ]
        return {name: entry.value for name, entry in metadata.items()}

    def steps(self) -> set[str | None]:
        return {event.step_key for event in self.result.get_step_success_events()}

    def error(self) -> str:
        [error, *_] = [
            event.step_failure_data.error
            for event in self.result.all_node_events
            if event.is_step_failure
        ]
        assert error is not None
        return error.message

    def log(self) -> str:
        logged = self.instance.all_logs(self.result.run_id)
        return "\n".join(f"{entry!r} {entry.user_message}" for entry in logged)

    def materialized(self) -> dict[tuple[str, str | None], dict[str, Any]]:
        """Metadata of what was reported materialized, by fact and day."""
        return {
            (event.asset_key.to_user_string(), event.partition): {
                name: entry.value for name, entry in event.materialization.metadata.items()
            }
            for event in self.result.all_events
            if event.is_step_materialization and event.asset_key is not None
        }


def everything(connection: Connection) -> list[Any]:
    """What a refused request must leave as it is."""
    queue = rows(connection, "SELECT xmin::text, outbox FROM reporting_outbox AS outbox ORDER BY 2")
    schema = value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")
    return [queue, sorted(versions(connection)), schema]


def test_a_backfill_answers_exactly_the_keys_of_the_interface_and_drains_what_it_enqueued(
    connection: Connection, settings: Settings
) -> None:
    load_adversarial_sources(connection, seed=11, sessions=6, events_per_session=10)

    run = Run(settings, "backfill_reporting", {"enqueue": {"limit": 10_000}})

    assert run.result.success
    enqueued, projected = run.output("enqueue"), run.output("project")
    assert enqueued.keys() == ENQUEUED
    assert enqueued == run.result.output_for_node("enqueue", "result")
    assert enqueued["enqueued"] == sum(enqueued[key] for key in ENQUEUED - {"enqueued"}) > 0
    assert projected == run.result.output_for_node("project")
    assert projected == {
        "claimed": enqueued["enqueued"],
        "completed": enqueued["enqueued"],
        "failed": 0,
        "parked": 0,
    }
    assert differences(connection) == []


def test_a_dry_run_counts_writes_nothing_and_drains_nothing(
    world: World, settings: Settings
) -> None:
    world.tool_call(world.org())
    before = everything(world.connection)

    run = Run(settings, "backfill_reporting", {"enqueue": {"dry_run": True}})

    assert run.result.success
    assert run.output("enqueue") == {
        "enqueued": 1,
        "events": 0,
        "llm_generations": 0,
        "sessions": 1,
        "usage_ledger": 0,
    }
    assert run.steps() == {"enqueue"}
    assert everything(world.connection) == before


def test_a_backfill_with_max_rows_0_enqueues_only(world: World, settings: Settings) -> None:
    world.event(world.session(world.org()))

    run = Run(settings, "backfill_reporting", {"project": {"max_rows": 0}})

    assert run.output("enqueue")["enqueued"] == 2
    assert run.output("project") == dict.fromkeys(PROJECTED, 0)
    status = "SELECT status, count(*) FROM reporting_outbox GROUP BY 1"
    assert rows(world.connection, status) == [("pending", 2)]
    assert versions(world.connection) == set()


def test_a_row_that_is_parked_for_what_it_killed_is_told_whatever_the_most_rows_are(
    world: World, settings: Settings
) -> None:
    killer = world.tool_call(world.org())
    database.prepare(world.connection)
    world.connection.execute(
        "INSERT INTO everruns_pipelines.outbox_projectors (lock_key, part) VALUES (7, 8)"
    )
    world.connection.execute(
        "INSERT INTO everruns_pipelines.outbox_suspects (outbox_id, part, deaths)"
        " VALUES (%s, 8, 2)",
        [killer],
    )

    run = Run(settings, "project_reporting", {"project": {"max_rows": 0}})

    assert run.output("project") == {"claimed": 1, "completed": 0, "failed": 1, "parked": 1}


def test_projecting_answers_exactly_the_keys_of_the_interface(
    world: World, settings: Settings
) -> None:
    org = world.org()
    world.tool_call(org)
    world.enqueue(org, "event", "no uuid")
    world.enqueue(org, "event", "none either", attempts=11, last_error="the source id is no UUID")

    run = Run(settings, "project_reporting")

    assert run.output("project") == {"claimed": 3, "completed": 1, "failed": 2, "parked": 1}
    assert run.output("project").keys() == PROJECTED


def test_projecting_keeps_to_the_organization_and_the_number_of_rows(
    world: World, settings: Settings
) -> None:
    ours, theirs = world.org(), world.org()
    for org in (ours, ours, ours, theirs):
        world.tool_call(org)

    run = Run(
        settings, "project_reporting", {"project": {"org_id": ours, "max_rows": 2, "batch_size": 1}}
    )

    assert run.output("project")["completed"] == 2
    left = rows(
        world.connection,
        "SELECT org_id, count(*) FROM reporting_outbox WHERE status = 'pending' GROUP BY 1",
    )
    assert sorted(left) == [(ours, 1), (theirs, 1)]


def test_progress_tells_what_is_left_for_this_run_to_do(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.reporting.jobs._TELL_SECONDS", 0)
    ours, theirs = world.org(), world.org()
    for org in (ours, ours, ours, ours, theirs, theirs):
        world.tool_call(org)
    world.enqueue(ours, "event", "no uuid", status="failed")

    for max_rows, most in ((2, 2), (None, 3)):
        run = Run(
            settings,
            "project_reporting",
            {"project": {"org_id": ours, "max_rows": max_rows, "batch_size": 1}},
        )
        said = (entry.user_message for entry in run.instance.all_logs(run.result.run_id))
        told = re.findall(r"(\d+) rows claimed, \d failed; (\d+) remain", "\n".join(said))
        # What the other projector is working on is neither.
        assert all(int(claimed) + int(remain) <= most for claimed, remain in told)
        assert [int(claimed) for claimed, _ in told] == list(range(1, most + 1))
        assert told[-1][1] == "0"


def test_dagsters_own_command_line_runs_a_backfill(
    world: World, postgres_url: str, tmp_path: Path
) -> None:
    world.event(world.session(world.org()))
    config = tmp_path / "run.yaml"
    config.write_text("ops: {enqueue: {config: {limit: 10, source_types: [event]}}}")

    run = subprocess.run(
        [
            *(sys.executable, "-m", "dagster", "job", "execute"),
            *("-m", "everruns_pipelines.definitions", "-j", "backfill_reporting"),
            *("-c", str(config)),
        ],
        env={"PATH": os.environ["PATH"], "EVERRUNS_POSTGRES_URL": postgres_url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert run.returncode == 0, run.stderr
    assert value(world.connection, "SELECT count(*) FROM fact_tool_call") == 1


def test_each_fact_and_day_that_was_touched_is_reported_as_materialized(
    world: World, settings: Settings
) -> None:
    org = world.org()
    session = world.session(org)
    world.event(session, data={"capability_id": "c"})
    world.event(session, ts=NOON + timedelta(days=2))
    world.event(session, ts=NOON - timedelta(days=3))
    world.posting(org)
    enqueue_all(world.connection)

    run = Run(settings, "project_reporting")

    # The day before the first partition is not among them.
    assert run.materialized().keys() == {
        ("fact_session", "2026-03-01"),
        ("fact_tool_call", "2026-03-01"),
        ("fact_tool_call", "2026-03-03"),
        ("fact_capability_usage", "2026-03-01"),
        ("fact_budget_posting", "2026-03-01"),
    }
    assert run.materialized()["fact_tool_call", "2026-03-03"] == {
        "read": 1,
        "inserted": 1,
        "refreshed": 0,
        "unchanged": 0,
        "removed": 0,
        "rejected": 0,
        "materialized": "rows of the outbox",
        "dagster/partition_row_count": 1,
    }


def test_sources_of_a_time_that_is_no_partition_are_repaired_and_nothing_is_missing_then(
    world: World, settings: Settings
) -> None:
    org = world.org()
    for time in (NOON, *TIMES_BEYOND_PYTHON):
        session = world.session(org, created_at=time, capabilities='["c"]')
        world.event(session, ts=time)
        world.event(session, "turn.failed", ts=time)
        world.generation(org, session, created_at=time)
        world.posting(org, session, created_at=time)

    run = Run(settings, "backfill_reporting")

    assert run.result.success
    assert run.output("enqueue")["enqueued"] == run.output("project")["completed"] == 25
    assert {day for _, day in run.materialized()} == {DAY.isoformat()}
    assert len(versions(world.connection)) == 30
    again = Run(settings, "backfill_reporting")
    assert again.output("enqueue")["enqueued"] == 0


@pytest.mark.parametrize(
    ("op", "field", "bad"),
    [
        ("enqueue", "limit", 0),
        ("enqueue", "limit", -1),
        ("enqueue", "limit", 10_001),
        ("enqueue", "source_types", ["event", "unknown"]),
        ("enqueue", "source_types", []),
        ("enqueue", "org_id", 4_711),
        ("project", "org_id", 4_711),
        ("project", "batch_size", 0),
        ("project", "max_rows", -1),
    ],
)
def test_bad_config_is_one_clear_error_with_the_field_and_changes_nothing(
    connection: Connection, settings: Settings, op: str, field: str, bad: Any
) -> None:
    world = World(connection)
    org = world.org()
    due = world.enqueue(org, "event", world.event(world.session(org)))
    before = everything(connection)

    run = Run(settings, "backfill_reporting", {op: {field: bad}})

    assert not run.result.success
    assert f"Failure: {field}: expected " in run.error() or f"{field}: there is no" in run.error()
    assert everything(connection) == before
    assert outbox(connection, due, "status", "attempts") == ("pending", 0)


def test_a_value_of_the_wrong_type_is_refused_before_the_run(
    connection: Connection, settings: Settings
) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match="limit"):
        Run(settings, "backfill_reporting", {"enqueue": {"limit": "many"}})


def test_what_the_launchpad_proposes_works_though_it_masks_what_is_secret(
    world: World, settings: Settings
) -> None:
    world.event(world.session(world.org()))
    job = build_definitions(settings).resolve_job_def("backfill_reporting")
    schema = job.get_config_schema_snapshot()
    proposed: Any = load_run_config_yaml(
        default_values_yaml_from_type_snap(
            schema,
            schema.get_config_snap(job.get_job_snapshot().mode_def_snaps[0].root_config_key or ""),
        )
    )
    assert proposed["resources"]["everruns_postgres"]["config"]["postgres_url"] == "********"

    result = job.execute_in_process(run_config=proposed)

    assert result.output_for_node("project")["completed"] == 2


def test_a_wrong_database_in_the_launchpad_is_refused_and_not_repeated(settings: Settings) -> None:
    job = build_definitions(settings).resolve_job_def("project_reporting")
    given = PostgresResource.of(settings).model_dump() | {"postgres_url": f"mysql://me:{SECRET}@x"}

    with ephemeral() as instance:
        result = job.execute_in_process(
            run_config={"resources": {"everruns_postgres": {"config": given}}},
            instance=instance,
            raise_on_error=False,
        )
        told = "\n".join(repr(entry) for entry in instance.all_logs(result.run_id))

    assert not result.success
    assert "EVERRUNS_POSTGRES_URL: expected" in told
    assert SECRET not in told


@pytest.mark.parametrize("job", ["backfill_reporting", "project_reporting"])
def test_a_database_that_lacks_a_column_is_one_clear_error(
    connection: Connection, settings: Settings, job: str
) -> None:
    connection.execute("ALTER TABLE fact_turn RENAME iterations TO other")
    before = everything(connection)

    run = Run(settings, job)

    assert not run.result.success
    assert "The database lacks column fact_turn.iterations" in run.error()
    assert everything(connection) == before


def test_no_payload_and_no_password_is_in_any_event_of_a_run_that_fails(
    world: World, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    connection = world.connection
    org = world.org()
    session = world.session(org)
    world.event(session, data={"tool_name": SECRET, "arguments": SECRET, "capability_id": None})
    world.event(session, "turn.completed", data={"turn_id": SECRET, "duration_ms": "9" * 40})
    enqueue_all(connection)
    connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'writing is refused' USING DETAIL = NEW::text, HINT = NEW::text,"
        " ERRCODE = 'object_not_in_prerequisite_state'; END $$"
    )
    connection.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON fact_turn FOR EACH ROW EXECUTE FUNCTION refuse()"
    )

    run = Run(settings, "project_reporting")

    assert not run.result.success
    assert "PostgreSQL failed: writing is refused" in run.error()
    captured = capfd.readouterr()
    for text in (run.log(), captured.out, captured.err):
        assert SECRET not in text
    status = rows(connection, "SELECT DISTINCT status, attempts FROM reporting_outbox")
    assert status == [("pending", 0)]


def test_no_payload_is_in_any_event_of_a_run_whose_rows_fail(
    world: World, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    org = world.org()
    event = world.event(world.session(org), data={"tool_name": SECRET})
    id_ = world.enqueue(org, "event", event)
    world.enqueue(org, "event", SECRET)
    world.connection.execute(
        "ALTER TABLE fact_tool_call ADD CONSTRAINT never CHECK (tool_status = '') NOT VALID"
    )

    run = Run(settings, "project_reporting")

    assert run.output("project")["failed"] == 2
    assert outbox(world.connection, id_, "last_error") == ("CheckViolation: never",)
    captured = capfd.readouterr()
    for text in (run.log(), captured.out, captured.err):
        assert SECRET not in text


def test_a_database_that_cannot_be_reached_is_one_clear_error_without_the_password() -> None:
    settings = Settings.from_environment(
        {"EVERRUNS_POSTGRES_URL": "postgresql://user:hunter2@127.0.0.1:1/nothing"}
    )

    with pytest.raises(Refusal) as refused, PostgresDatabase(settings).connect():
        pass

    assert refused.value.code == "unavailable"
    assert "EVERRUNS_POSTGRES_URL" in refused.value.detail
    assert "hunter2" not in refused.value.detail
