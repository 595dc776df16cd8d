"""The diagnosis, its tables, the asset that holds it, and the doctor."""

import base64
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dagster as dg
import psycopg
import pytest
from dagster import DagsterInstance
from pydantic import SecretStr

from everruns_pipelines.commands import main
from everruns_pipelines.commands.tables import show_diagnosis
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items.database import ensure_schema
from everruns_pipelines.operations.chart import Line, as_markdown
from everruns_pipelines.operations.diagnosis import Databases, Day, Diagnosis, diagnose
from everruns_pipelines.operations.doctor import Finding, examine
from everruns_pipelines.operations.sources import look_at_sources
from everruns_pipelines.reporting import database
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS, SOURCES
from everruns_pipelines.reporting.drain import drain
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.conftest import copy_database
from everruns_pipelines_tests.reporting.world import materialize

TODAY = datetime.now(UTC).date()


@pytest.fixture(scope="module")
def projected(home: Path, admin: Connection) -> str:
    """A day of sample data, all of it projected but for what was not enqueued."""
    copy_database(admin, "projected")
    with psycopg.connect(embedded_postgres_url(home, "projected"), autocommit=True) as connection:
        load_sample_data(connection, events=300, days=1, enqueued_share=0.9)
        database.prepare(connection)
        for _ in drain(connection, max_attempts=3):
            pass
    return "projected"


@pytest.fixture
def template(request: pytest.FixtureRequest, template: str) -> str:
    is_sample = "sample" in request.fixturenames
    return str(request.getfixturevalue("projected")) if is_sample else template


@pytest.fixture
def sample(connection: Connection) -> Connection:
    """A connection to a copy of that database."""
    return connection


def look(settings: Settings) -> Diagnosis:
    return diagnose(Databases.of(settings), 2, lambda _: None)


def findings(settings: Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(settings)}


def test_what_the_outbox_lacks_is_missing(settings: Settings, sample: Connection) -> None:
    diagnosis = look(settings)
    assert diagnosis.total("missing", "fact_tool_call", "fact_turn", "fact_session") > 0
    assert diagnosis.total("stale", "fact_session") == 0
    assert diagnosis.rows("completed") > 0
    assert diagnosis.oldest_due is None
    assert not diagnosis.failures
    assert diagnosis.unknown == ["items: no spans are stored yet"]


def test_lost_changed_and_orphaned_rows_are_told_apart(
    settings: Settings, sample: Connection
) -> None:
    before = look(settings)
    sample.execute("DELETE FROM fact_turn WHERE ctid IN (SELECT ctid FROM fact_turn LIMIT 3)")
    sample.execute(
        "UPDATE fact_tool_call SET tool_name = 'another' WHERE ctid = "
        "(SELECT min(ctid) FROM fact_tool_call)"
    )
    sample.execute(
        "UPDATE fact_session SET source_key = 'session:' || gen_random_uuid()"
        " WHERE ctid = (SELECT min(ctid) FROM fact_session)"
    )
    after = look(settings)
    assert after.total("missing", "fact_turn") == before.total("missing", "fact_turn") + 3
    assert after.total("stale", "fact_tool_call") == 1
    assert after.total("orphaned", "fact_session") == 1


def test_failures_backlog_and_lag_are_told(settings: Settings, sample: Connection) -> None:
    sample.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, status,"
        " next_attempt_at, last_error, attempts, created_at) VALUES"
        " (1, 'event', '1', 'a', 'pending', now() - interval '1 hour', NULL, 0, now()),"
        # Enqueued again, and failed just now.
        " (1, 'session', '2', 'a', 'failed', now() + interval '1 hour', 'why', 1,"
        " now() - interval '12 days'),"
        " (1, 'usage_ledger', '3', 'a', 'failed', 'infinity', 'why it is parked', 12, now())"
    )
    diagnosis = look(settings)
    assert (diagnosis.rows("pending"), diagnosis.rows("failed"), diagnosis.rows("parked")) == (
        1,
        1,
        1,
    )
    assert {one.last_error: one.status for one in diagnosis.failures} == {
        "why": "failed",
        "why it is parked": "parked",
    }
    assert diagnosis.lag_seconds["fact_turn"] == pytest.approx(3600, abs=60)
    assert diagnosis.lag_seconds["fact_session"] == 0
    assert diagnosis.lag_seconds["fact_budget_posting"] == 0
    assert diagnosis.oldest_due is not None


@pytest.mark.parametrize("due", ["-infinity", "0044-03-15 BC", "now", "12000-01-01", "infinity"])
def test_a_row_of_any_time_hides_nothing_from_the_diagnosis(
    settings: Settings,
    sample: Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    due: str,
) -> None:
    _environment(monkeypatch, settings)
    now = datetime.now(UTC)
    sample.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, status,"
        " next_attempt_at, last_error, created_at, updated_at)"
        " SELECT 1, 'event', status, 'a', status, %(due)s, 'why', %(due)s, %(due)s"
        " FROM unnest(ARRAY['pending', 'failed', 'processing']) AS status",
        {"due": due},
    )
    sample.execute("UPDATE sessions SET started_at = 'infinity', finished_at = 'infinity'")

    diagnosis = look(settings)

    assert diagnosis.rows("pending") == diagnosis.rows("processing") == 1
    assert diagnosis.rows("failed") + diagnosis.rows("parked") == 1
    assert [one.last_error for one in diagnosis.failures] == ["why"]
    assert (diagnosis.oldest_due is None) == (due in ("12000-01-01", "infinity"))
    longest = now.timestamp() if due in ("-infinity", "0044-03-15 BC") else 0
    assert diagnosis.lag_seconds["fact_turn"] == pytest.approx(longest, abs=60)
    # Changed just now: that is not stale yet.
    assert diagnosis.total("underway", "fact_session") > 0
    assert main.run(["diagnose", "--days", "1"]) == 1
    assert main.run(["diagnose", "--days", "1", "--json"]) == 1
    json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)


@pytest.mark.parametrize("days", [0, 367])
def test_a_number_of_days_out_of_range_is_refused(settings: Settings, days: int) -> None:
    with pytest.raises(Refusal, match="from 1 to 366"):
        diagnose(Databases.of(settings), days, lambda _: None)


def test_the_command_prints_tables_or_one_json_object(
    settings: Settings,
    sample: Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _environment(monkeypatch, settings)
    sample.execute("DELETE FROM fact_turn")
    assert main.run(["diagnose", "--days", "2", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert {day["table"] for day in told["days"]} >= {"fact_turn", "fact_session"}
    assert main.run(["diagnose", "--days", "2"]) == 1
    printed = capsys.readouterr().out
    assert "Outbox: nothing is due" in printed
    assert "Missing rows per day" in printed
    assert main.run(["diagnose", "--days", "0"]) == 2


def test_health_is_measured_and_drawn_over_time(
    instance: DagsterInstance, settings: Settings, sample: Connection
) -> None:
    job = build_definitions(settings).resolve_implicit_global_asset_job_def()
    for _ in range(2):
        result = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("pipeline_health")]
        )
    [event] = result.asset_materializations_for_node("pipeline_health")  # pyright: ignore[reportPossiblyUnboundVariable]
    metadata: Any = event.metadata
    assert metadata["backlog"].value == 0
    assert metadata["facts_missing"].value > 0
    assert len(metadata["days"].records) == 7 * 6
    assert _svg(metadata["over time"].value).count("<polyline") == 4


def test_health_is_red_while_a_fact_of_any_age_is_missing(
    instance: DagsterInstance, settings: Settings, sample: Connection
) -> None:
    database.prepare(sample)
    for _ in range(2):
        enqueue(sample, BackfillRequest(limit=10_000))
        for _ in drain(sample, max_attempts=3):
            pass
    assert _judged(settings, instance) == {
        "no_missing_rows": True,
        "no_stale_rows": True,
        "no_orphaned_rows": True,
        "no_damaged_rows": True,
        "no_parked_rows": True,
        "no_late_rows": True,
    }
    # With it, the capabilities that are configured in a session are a year old.
    sample.execute("UPDATE sessions SET created_at = created_at - interval '1 year'")
    sample.execute("DELETE FROM fact_session")
    sample.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, status,"
        " next_attempt_at, attempts) VALUES (1, 'event', '1', 'a', 'failed', 'infinity', 12),"
        " (1, 'event', '2', 'a', 'pending', now() - interval '1 hour', 0)"
    )
    judged = _judged(settings, instance)
    red = {name for name, passed in judged.items() if not passed}
    assert red == {
        "no_missing_rows",
        "no_stale_rows",
        "no_damaged_rows",
        "no_parked_rows",
        "no_late_rows",
    }


def test_what_a_backfill_does_not_see_is_to_be_materialized_beside_it(
    settings: Settings, sample: Connection
) -> None:
    sample.execute("DELETE FROM fact_turn")
    sample.execute("UPDATE fact_tool_call SET duration_ms = duration_ms + 1")

    backfill, materialize_facts = look(settings).remedies()

    assert backfill == "everruns-pipelines backfill --limit 10000"
    assert materialize_facts.startswith("materialize these days of the facts")


def test_health_is_red_while_items_cannot_be_looked_at(
    instance: DagsterInstance, settings: Settings, sample: Connection
) -> None:
    away = SecretStr("clickhouse://user:hunter2@127.0.0.1:1/default")
    settings = settings.model_copy(update={"clickhouse_dsn": away})
    database.prepare(sample)
    for _ in range(2):
        enqueue(sample, BackfillRequest(limit=10_000))
        for _ in drain(sample, max_attempts=3):
            pass

    judged = _judged(settings, instance)

    assert {name for name, passed in judged.items() if not passed} == {
        "no_missing_rows",
        "no_stale_rows",
    }
    [record] = instance.fetch_materializations(dg.AssetKey("pipeline_health"), limit=1).records
    assert record.asset_materialization is not None
    metadata = record.asset_materialization.metadata
    assert metadata["facts_missing"].value == 0
    assert "items_missing" not in metadata


def _judged(settings: Settings, instance: DagsterInstance) -> dict[str, bool]:
    result = (
        build_definitions(settings)
        .resolve_job_def("measure_health")
        .execute_in_process(instance=instance)
    )
    return {check.check_name: check.passed for check in result.get_asset_check_evaluations()}


def test_source_tables_are_observed(settings: Settings, sample: Connection) -> None:
    sample.execute("ANALYZE")
    seen = {one.table: one for one in look_at_sources(Databases.of(settings))}
    count = sample.execute("SELECT count(*), max(created_at) FROM sessions").fetchone()
    assert (seen["sessions"].rows, seen["sessions"].newest) == count
    assert seen["archived_events"].newest is None
    assert seen.keys() == {source for part in SOURCES for source in part.tables}


def test_check_prints_one_object_and_fails_if_anything_is_wrong(
    settings: Settings,
    sample: Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _environment(monkeypatch, settings)
    materialize(sample, TODAY - timedelta(days=2), TODAY)
    capsys.readouterr()
    assert main.run(["check"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    sample.execute("DELETE FROM fact_turn")
    assert main.run(["check", "--days", "1"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["missing"] == sum(day["missing"] for day in found["days"]["fact_turn"]) > 0
    assert found["remedies"] == ["everruns-pipelines backfill --limit 10000"]
    assert f"{found['missing']} missing; the oldest since " in told.err


def test_a_fact_that_is_missing_on_a_day_that_no_calendar_has_is_told_with_what_repairs_it(
    settings: Settings,
    sample: Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _environment(monkeypatch, settings)
    materialize(sample, TODAY - timedelta(days=2), TODAY)
    sample.execute(
        "WITH before AS (UPDATE llm_generations SET created_at = '0044-03-15 BC'"
        " WHERE ctid = (SELECT min(ctid) FROM llm_generations) RETURNING id)"
        " DELETE FROM fact_llm_generation USING before"
        " WHERE source_key = 'llm_generation:' || before.id"
    )
    capsys.readouterr()
    assert main.run(["check"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["missing"], found["days"]) == (1, {})
    assert found["remedies"] == ["everruns-pipelines backfill --limit 10000"]


def test_a_diagnosis_of_many_days_fits_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now = datetime.now(UTC)
    tables = [*(fact.table for fact in FACTS), "items"]
    days = [
        Day(table, (now - timedelta(days=ago)).date(), 9, 1234, 0, 0)
        for table in tables
        for ago in range(30)
    ]
    show_diagnosis(
        Diagnosis(now, ("reporting", "items"), [], None, [], {"fact_turn": 1.0}, {}, days, [])
    )
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 80
    assert sum(line.count("1,234") for line in printed) == 30 * len(tables)
    assert "Missing rows per day: 30 of 30 days" in "".join(printed)


def test_days_on_which_a_table_was_not_compared_do_not_count_as_right(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = datetime.now(UTC)
    days = [
        Day(table, (now - timedelta(days=ago)).date(), 9, 0, stale, 0)
        for table, compared, stale in (("fact_session", 7, 1), ("fact_turn", 30, 0))
        for ago in range(compared)
    ]
    show_diagnosis(Diagnosis(now, ("reporting",), [], None, [], {"fact_turn": 1.0}, {}, days, []))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stale rows per day: 7 of 7 days" in printed
    assert "No missing rows in 7 days" in printed


def test_a_chart_is_a_picture_of_its_numbers() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    picture = _svg(
        as_markdown([now, now + timedelta(hours=1)], [Line("Rows & more", "#000", [5, 1000])])
    )
    ElementTree.fromstring(picture)
    assert "Rows &amp; more: 1,000" in picture
    assert 'points="84.0,153.4 704.0,28.0"' in picture


def test_a_chart_of_one_time_is_drawn() -> None:
    ElementTree.fromstring(
        _svg(as_markdown([datetime(2026, 1, 1, tzinfo=UTC)], [Line("x", "#000", [0])]))
    )


def test_the_doctor_finds_nothing_wrong_with_the_embedded_servers(
    settings: Settings, sample: Connection
) -> None:
    database.create_indexes(sample)
    ensure_schema(sample)
    assert {finding.name for finding in examine(settings) if not finding.ok} == set()


def test_the_doctor_says_what_to_do(settings: Settings, connection: Connection) -> None:
    found = findings(settings)
    assert "everruns-pipelines init`" in found["our own tables for reporting"].text
    assert "init --indexes" in found["index on events"].text
    connection.execute("ALTER TABLE sessions DROP COLUMN blueprint_id CASCADE")
    connection.execute("DROP TABLE item_links")
    found = findings(settings)
    assert "sessions.blueprint_id" in found["reporting's tables"].text
    assert "item_links" in found["items' tables"].text


def test_the_doctor_looks_on_while_a_server_is_away(tmp_path: Path) -> None:
    away = "postgresql://me:secret@127.0.0.1:1/nowhere"
    settings = Settings.from_environment(
        {
            "EVERRUNS_POSTGRES_URL": away,
            "EVERRUNS_DAGSTER_POSTGRES_URL": away,
            "EVERRUNS_CLICKHOUSE_DSN": "clickhouse://me:secret@127.0.0.1:1/default",
            "EVERRUNS_HOME": str(tmp_path),
        }
    )
    found = findings(settings)
    wrong = {name for name, finding in found.items() if not finding.ok}
    assert wrong == {"PostgreSQL of reporting", "PostgreSQL of items", "Dagster's storage", "spans"}
    assert "secret" not in "".join(finding.text for finding in found.values())


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ("otel_traces_older.sql", "the exporter's older generation"),
        ("otel_traces.sql", "generation of 2024"),
        ("otel_traces_newest_bloom.sql", "newest generation with bloom filters"),
        ("otel_traces_newest_text.sql", "newest generation with text indexes"),
        ("otel_traces_json.sql", "JSON generation"),
    ],
)
def test_the_doctor_tells_generations_of_the_span_table(
    settings: Settings, tmp_path: Path, generation: str, said: str
) -> None:
    settings = settings.model_copy(update={"clickhouse_dsn": SecretStr(f"chdb://{tmp_path}/spans")})
    clickhouse = ClickHouseDatabase(settings)
    with clickhouse.connect() as opened:
        for statement in span_tables(generation):
            opened.client.command(statement)
    finding = findings(settings)["spans"]
    assert finding.ok
    assert said in finding.text


def test_the_doctor_misses_an_index_on_values(settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"clickhouse_dsn": SecretStr(f"chdb://{tmp_path}/spans")})
    with ClickHouseDatabase(settings).connect() as opened:
        for statement in span_tables():
            opened.client.command(statement)
        opened.client.command("ALTER TABLE otel_traces DROP INDEX idx_span_attr_value")
    assert "no index on mapValues(SpanAttributes)" in findings(settings)["spans"].text


def _svg(markdown: str) -> str:
    found = re.fullmatch(r"!\[[^]]*\]\(data:image/svg\+xml;base64,(\S+)\)", markdown)
    assert found is not None
    return base64.b64decode(found[1]).decode()


def _environment(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    assert settings.postgres_url is not None
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", settings.postgres_url.get_secret_value())
    monkeypatch.setenv("EVERRUNS_HOME", str(settings.home))
