"""Alerts as a receiver gets them over HTTP: each once, and once when it is over."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import dagster as dg
import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus

from everruns_pipelines.commands import main
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.automation import reporting_healing_sensor
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import failed_a_moment_ago
from everruns_pipelines_tests.receiver import Receiver
from everruns_pipelines_tests.reporting.world import drain_all

SECRET = "hunter2"
AWAY = f"postgresql://nobody:{SECRET}@127.0.0.1:1/nowhere"
UI = "https://pipelines.example.com/data"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver.listening(SECRET) as receiver:
        yield receiver


class Watch:
    """Ticks of the sensor, one after the other."""

    def __init__(
        self, instance: DagsterInstance, environment: dict[str, str], **changes: Any
    ) -> None:
        self.instance = instance
        settings = Settings.from_environment(environment)
        self.definitions = build_definitions(settings.model_copy(update=changes))
        self.cursor: str | None = None

    def tick(self) -> None:
        repository = self.definitions.get_repository_def()
        sensor = repository.get_sensor_def("alert_sensor")
        resources = {
            key: cast("Any", resource).create_resource(dg.build_init_resource_context())
            for key, resource in (self.definitions.resources or {}).items()
            if isinstance(resource, dg.ConfigurableResource)
        }
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            repository_def=repository,
            resources=resources,
        ) as context:
            self.cursor = sensor.evaluate_tick(context).cursor
        assert self.cursor is not None
        assert SECRET not in self.cursor

    def away(self) -> list[str]:
        """The variables whose databases it could not reach."""
        return list(json.loads(self.cursor or "")["away"])

    def remember(self, **changes: Any) -> None:
        self.cursor = json.dumps({**json.loads(self.cursor or ""), **changes})


@pytest.fixture
def environment(postgres_url: str, home: Path, receiver: Receiver) -> dict[str, str]:
    return {
        "EVERRUNS_POSTGRES_URL": postgres_url,
        "EVERRUNS_HOME": str(home),
        "EVERRUNS_ALERT_URLS": receiver.url,
        "EVERRUNS_PUBLIC_URL": UI,
        "EVERRUNS_PARTS": "reporting",
    }


@pytest.fixture
def watch(instance: DagsterInstance, environment: dict[str, str], connection: Connection) -> Watch:
    database.prepare(connection)
    watch = Watch(instance, environment)
    watch.tick()
    return watch


def _enqueue(connection: Connection, status: str, due: str, error: str = "") -> None:
    connection.execute(
        "WITH one AS (INSERT INTO organizations (public_id, name) VALUES"
        " ('org_' || md5(random()::text), 'o') RETURNING org_id)"
        " INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, status,"
        " next_attempt_at, last_error)"
        " SELECT org_id, 'event', gen_random_uuid(), 'event_projection', %s, %s, %s FROM one",
        [status, due, error],
    )


def test_parked_rows_are_told_once_and_once_when_they_are_gone(
    watch: Watch, receiver: Receiver, connection: Connection
) -> None:
    assert receiver.news() == []
    _enqueue(connection, "failed", "infinity", error=f"payload {SECRET}")
    for _ in range(3):
        watch.tick()
    [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: outbox rows are parked"
    assert "1 rows of the outbox" in told["message"]
    assert "everruns-pipelines unpark" in told["message"]
    assert f"{UI}/assets/pipeline_health" in told["message"]
    assert told["type"] == "warning"
    assert SECRET not in json.dumps(told)
    connection.execute("DELETE FROM reporting_outbox")
    for _ in range(3):
        watch.tick()
    [over] = receiver.news()
    assert (over["title"], over["type"]) == (
        "everruns_pipelines: over: outbox rows are parked",
        "success",
    )


def test_in_a_project_of_others_links_lead_to_the_asset_as_it_is_called_there(
    instance: DagsterInstance,
    environment: dict[str, str],
    receiver: Receiver,
    connection: Connection,
) -> None:
    database.prepare(connection)
    _enqueue(connection, "failed", "infinity")
    Watch(instance, environment, asset_prefix=("ours",)).tick()
    [told] = receiver.news()
    assert f"{UI}/assets/ours/pipeline_health" in told["message"]


def test_rows_that_wait_for_a_quarter_of_an_hour_are_told(
    watch: Watch, receiver: Receiver, connection: Connection
) -> None:
    _enqueue(connection, "pending", "now")
    watch.tick()
    assert receiver.news() == []
    connection.execute("UPDATE reporting_outbox SET next_attempt_at = now() - interval '42 min'")
    watch.tick()
    [told] = receiver.news()
    assert "waits for 42 minutes" in told["message"]


def test_a_run_that_failed_for_good_is_told_until_one_succeeds(
    watch: Watch, receiver: Receiver, instance: DagsterInstance
) -> None:
    def end(status: DagsterRunStatus, **tags: str) -> DagsterRun:
        run = instance.add_run(
            DagsterRun("project_reporting", status=DagsterRunStatus.STARTED, tags=tags)
        )
        if status == DagsterRunStatus.FAILURE:
            instance.report_run_failed(run, f"it failed on payload {SECRET}")
        else:
            instance.report_dagster_event(
                dg.DagsterEvent(
                    dg.DagsterEventType.RUN_SUCCESS.value, "project_reporting", message="done"
                ),
                run.run_id,
            )
        return run

    end(DagsterRunStatus.FAILURE, **{"dagster/will_retry": "true"})
    watch.tick()
    assert receiver.news() == []
    end(DagsterRunStatus.FAILURE)
    end(DagsterRunStatus.FAILURE)
    watch.tick()
    watch.tick()
    [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: project_reporting failed"
    assert f"{UI}/runs/" in told["message"]
    assert SECRET not in json.dumps(told)
    end(DagsterRunStatus.SUCCESS)
    watch.tick()
    [over] = receiver.news()
    assert over["title"] == "everruns_pipelines: over: project_reporting failed"


def test_a_failed_run_is_told_once_it_is_decided_that_it_is_not_tried_again(
    receiver: Receiver, environment: dict[str, str], connection: Connection
) -> None:
    database.prepare(connection)
    with dg.instance_for_test(overrides={"run_retries": {"enabled": True}}) as instance:
        watch = Watch(instance, environment)
        watch.tick()
        run = failed_a_moment_ago(instance, "project_reporting")
        watch.tick()
        assert receiver.news() == []
        instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
        watch.tick()
        [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: project_reporting failed"


def test_a_failed_check_is_told_with_what_repairs_it(
    watch: Watch, receiver: Receiver, instance: DagsterInstance
) -> None:
    def evaluate(*, passed: bool) -> None:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey("fact_turn"),
                check_name="no_missing_rows",
                passed=passed,
                description="138 missing rows in 2 days. Materialize these days.",
            )
        )

    evaluate(passed=False)
    watch.tick()
    evaluate(passed=False)
    watch.tick()
    [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: fact_turn: no_missing_rows failed"
    assert "138 missing rows" in told["message"]
    assert f"{UI}/assets/fact_turn?view=checks" in told["message"]
    evaluate(passed=True)
    watch.tick()
    [over] = receiver.news()
    assert over["type"] == "success"


def test_damage_that_heals_between_two_measurements_is_told_with_what_heals_it(
    watch: Watch,
    receiver: Receiver,
    instance: DagsterInstance,
    postgres: PostgresDatabase,
    connection: Connection,
) -> None:
    def look() -> dg.SensorResult:
        with dg.build_sensor_context(
            instance=instance, resources={"everruns_postgres": postgres}
        ) as context:
            result = cast("dg.SensorResult", reporting_healing_sensor(context))
        for event in result.asset_events or []:  # as Dagster's daemon does
            instance.report_runless_asset_event(event)
        return result

    def heal() -> str:
        [request] = look().run_requests or []
        job = watch.definitions.resolve_job_def("backfill_reporting")
        result = job.execute_in_process(run_config=request.run_config, instance=instance)
        assert look().skip_reason is not None, "everything is healed"
        return result.run_id

    load_sample_data(connection, events=60, enqueued_share=0)
    enqueue(connection, BackfillRequest(limit=10_000))
    drain_all(connection)
    connection.execute("UPDATE sessions SET title = 'x'")
    heal()
    watch.tick()
    assert receiver.news() == [], "sessions change, and nobody enqueues them: that is usual"

    connection.execute("DELETE FROM fact_turn WHERE ctid IN (SELECT ctid FROM fact_turn LIMIT 3)")
    run_id = heal()
    watch.tick()
    [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: pipeline_health: no_damaged_rows failed"
    assert "3 sources had lost facts" in told["message"]
    assert told["message"].count(f"un {run_id} ") == 2
    assert f"{UI}/assets/pipeline_health?view=checks" in told["message"]
    watch.tick()
    [over] = receiver.news()
    assert over["title"] == "everruns_pipelines: over: pipeline_health: no_damaged_rows failed"
    watch.tick()
    assert receiver.news() == []


def test_a_database_is_told_once_it_has_been_away_for_ten_minutes(
    instance: DagsterInstance, environment: dict[str, str], receiver: Receiver
) -> None:
    watch = Watch(instance, {**environment, "EVERRUNS_POSTGRES_URL": AWAY})
    watch.tick()
    watch.tick()
    assert receiver.news() == []
    [variable] = watch.away()
    watch.remember(away={variable: 1_800_000_000.0 - 10**9})
    watch.tick()
    watch.tick()
    [told] = receiver.news()
    assert told["title"] == "everruns_pipelines: the database of EVERRUNS_POSTGRES_URL is away"
    assert "everruns-pipelines doctor" in told["message"]
    assert SECRET not in json.dumps(told)
    back = Watch(instance, environment)
    back.cursor = watch.cursor
    back.tick()
    [over] = receiver.news()
    assert over["type"] == "success"


def test_while_a_database_is_away_nothing_of_it_is_over(
    watch: Watch,
    instance: DagsterInstance,
    environment: dict[str, str],
    receiver: Receiver,
    connection: Connection,
) -> None:
    _enqueue(connection, "failed", "infinity")
    watch.tick()
    assert len(receiver.news()) == 1
    away = Watch(instance, {**environment, "EVERRUNS_POSTGRES_URL": AWAY})
    away.cursor = watch.cursor
    away.tick()
    assert receiver.news() == []
    watch.cursor = away.cursor
    watch.tick()
    assert receiver.news() == []


def test_who_could_not_be_told_is_told_later_and_nobody_twice(
    instance: DagsterInstance,
    environment: dict[str, str],
    receiver: Receiver,
    connection: Connection,
) -> None:
    database.prepare(connection)
    with Receiver.listening() as other:
        urls = f"{receiver.url} {other.url}"
        watch = Watch(instance, {**environment, "EVERRUNS_ALERT_URLS": urls})
        other.status = 500
        _enqueue(connection, "failed", "infinity")
        watch.tick()
        watch.tick()
        assert (len(receiver.news()), len(other.news())) == (1, 0)
        other.status = 200
        watch.tick()
        watch.tick()
        assert (len(receiver.news()), len(other.news())) == (0, 1)


def test_the_command_tells_everybody_and_says_who_could_not_be_told(
    environment: dict[str, str],
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert main.run(["alert-test"]) == 0
    assert json.loads(capfd.readouterr().out) == {"told": 1}
    [told] = receiver.news()
    assert "arrive here" in told["message"]
    monkeypatch.setenv("EVERRUNS_ALERT_URLS", f"{receiver.url} nothing://{SECRET}")
    assert main.run(["alert-test"]) == 1
    printed = capfd.readouterr()
    assert "1 of 2 receivers were told" in printed.err
    assert SECRET not in printed.err + printed.out + caplog.text
    monkeypatch.delenv("EVERRUNS_ALERT_URLS")
    assert main.run(["alert-test"]) == 2


def test_without_receivers_there_is_no_sensor() -> None:
    repository = build_definitions(Settings.from_environment({})).get_repository_def()
    assert "alert_sensor" not in {sensor.name for sensor in repository.sensor_defs}
