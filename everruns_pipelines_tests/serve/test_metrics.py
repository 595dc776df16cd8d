"""What Prometheus is told, and the alert rules that rest on it."""

import re
import subprocess
import time
from pathlib import Path
from shutil import copytree
from uuid import uuid4

import pytest
from dagster import AssetKey, AssetMaterialization, MetadataValue, TableRecord
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    TickData,
    TickStatus,
)
from dagster_shared.error import SerializableErrorInfo
from prometheus_client.parser import text_string_to_metric_families

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines_tests.deploy.services import needs
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.serve.conftest import BACKFILL, LOCATION, Served
from everruns_pipelines_tests.serve.test_refusals import ASYNC

RULES = ROOT / "deploy" / "prometheus"


def scraped(served: Served) -> dict[str, dict[str, float]]:
    """By metric, by the values of its labels, joined by a comma."""
    text = served.ask("/metrics", method="GET").text
    return {
        family.name: {",".join(one.labels.values()): one.value for one in family.samples}
        for family in text_string_to_metric_families(text)
    }


def test_the_outbox_is_told_by_source_type(served: Served) -> None:
    with PostgresDatabase(served.settings).connect() as connection:
        connection.execute("UPDATE reporting_outbox SET status = 'completed'")
        connection.execute(
            "INSERT INTO reporting_outbox"
            " (org_id, source_type, source_id, reason, status, next_attempt_at)"
            " SELECT 1, type, 'metrics-' || number, 'x', status, now() - age"
            " FROM (VALUES ('event', 1, 'pending', interval '1 hour'),"
            " ('event', 2, 'failed', interval '1 minute'),"
            " ('event', 3, 'pending', interval '-1 hour'),"
            " ('session', 4, 'processing', interval '2 minutes'),"
            " ('usage_ledger', 5, 'failed', interval '-infinity'))"
            " AS row (type, number, status, age)"
        )
    told = scraped(served)
    assert told["everruns_outbox_backlog_rows"] == {
        "event": 2,
        "llm_generation": 0,
        "session": 1,
        "usage_ledger": 0,
    }
    assert 3600 <= told["everruns_outbox_oldest_due_seconds"]["event"] < 3700
    assert 3600 <= told["everruns_fact_lag_seconds"]["fact_turn"] < 3700
    assert 120 <= told["everruns_fact_lag_seconds"]["fact_session"] < 200
    assert told["everruns_fact_lag_seconds"]["fact_budget_posting"] == 0


def test_what_was_measured_is_told_with_its_age(served: Served) -> None:
    days = [
        TableRecord({"table": "fact_turn", "day": day, "missing": 2, "stale": 1, "orphaned": 0})
        for day in ("2026-01-01", "2026-01-02")
    ]
    served.instance.report_runless_asset_event(
        AssetMaterialization(
            AssetKey("pipeline_health"),
            metadata={"parked": 3, "backlog": 9, "days": MetadataValue.table(days)},
        )
    )
    told = scraped(served)
    assert told["everruns_health_missing_rows"] == {"fact_turn": 4}
    assert told["everruns_health_stale_rows"] == {"fact_turn": 2}
    assert told["everruns_health_orphaned_rows"] == {"fact_turn": 0}
    assert told["everruns_health_outbox_parked_rows"] == {"": 3}
    assert 0 <= told["everruns_health_age_seconds"][""] < 60


def test_runs_and_requests_are_told(served: Served) -> None:
    served.ask(BACKFILL, headers=ASYNC)
    told = scraped(served)
    assert told["everruns_queued_runs"] == {"": 1}
    assert told["everruns_runs"]["backfill_reporting,queued"] == 1
    assert told["everruns_api_requests"]["backfill,202"] >= 1
    assert set(told["everruns_scrape_failed"].values()) == {0}


def test_ticks_that_failed_are_told(served: Served) -> None:
    origin = f"origin-{uuid4()}"
    state = InstigatorState(
        RemoteInstigatorOrigin(repository_origin(), "a_sensor"),
        InstigatorType.SENSOR,
        InstigatorStatus.RUNNING,
    )
    served.instance.add_instigator_state(state)
    for ago in (60, 7200):
        served.instance.create_tick(
            TickData(
                origin,
                "a_sensor",
                InstigatorType.SENSOR,
                TickStatus.FAILURE,
                time.time() - ago,
                error=SerializableErrorInfo("it failed", [], None),
                selector_id=state.selector_id,
            )
        )
    assert scraped(served)["everruns_sensor_failed_ticks"]["a_sensor"] == 1


def repository_origin() -> RemoteRepositoryOrigin:
    return RemoteRepositoryOrigin(LOCATION, "__repository__")


def test_every_metric_of_the_rules_is_one_that_is_told(served: Served) -> None:
    test_what_was_measured_is_told_with_its_age(served)
    text = served.ask("/metrics", method="GET").text
    told = {*re.findall(r"^# TYPE (everruns_\w+)", text, re.MULTILINE)}
    told |= {f"{name}_total" for name in told}
    used = set(re.findall(r"everruns_\w+", (RULES / "alerts.yml").read_text()))
    assert used
    assert used <= told


@pytest.mark.deploy
@needs("promtool", "prometheus")
def test_the_rules_fire_and_stay_silent(tmp_path: Path) -> None:
    copytree(RULES, tmp_path / "rules")
    token = tmp_path / "everruns.token"
    token.write_text("evr_x")
    config = tmp_path / "rules" / "prometheus.yml"
    config.write_text(config.read_text().replace("/etc/prometheus/everruns.token", str(token)))
    for command in (["check", "config", str(config)], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command],
            cwd=tmp_path / "rules",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rules = re.findall(r"- alert: (\w+)", (RULES / "alerts.yml").read_text())
    tested = re.findall(r'alertname="(\w+)"', (RULES / "alerts_test.yml").read_text())
    assert sorted(tested) == sorted(rules * 2)
