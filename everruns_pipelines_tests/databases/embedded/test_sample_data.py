"""The sample data: what it promises, and that the data are as right as the platform's own."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import SampleData, load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal

UNTIL = datetime(2026, 3, 20, 15, 30, tzinfo=UTC)
REASONS = {
    "event": "event_projection",
    "session": "session_snapshot",
    "llm_generation": "llm_generation_projection",
    "usage_ledger": "budget_posting_projection",
}


TABLES = {
    *("organizations", "users", "principals", "workspaces", "apps", "agents", "harnesses"),
    *("agent_capabilities", "harness_capabilities", "mcp_servers", "skills"),
    *("declarative_capabilities", "sessions", "events", "llm_generations", "budgets"),
    *("usage_journal", "usage_ledger", "reporting_outbox"),
}


@pytest.fixture(scope="module")
def filled(home: Path) -> Iterator[Connection]:
    """A database of the module's own, for the tests that only read."""
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE sample_data TEMPLATE everruns STRATEGY FILE_COPY")
        url = embedded_postgres_url(home, "sample_data")
        with psycopg.connect(url, autocommit=True) as connection:
            yield connection
        admin.execute("DROP DATABASE sample_data WITH (FORCE)")


@pytest.fixture(scope="module")
def sample(filled: Connection) -> SampleData:
    return load_sample_data(filled, events=6_000, days=7, until=UNTIL)


def rows(connection: Connection, query: Any) -> list[tuple[Any, ...]]:
    return connection.execute(query).fetchall()


def value(connection: Connection, query: Any) -> Any:
    [(value,)] = rows(connection, query)
    return value


def everything(connection: Connection) -> dict[str, str]:
    """A fingerprint of each table that does not depend on the order of its rows."""
    fingerprint = "SELECT md5(string_agg(t::text, E'\n' ORDER BY t::text)) FROM {} AS t"
    return {
        table: value(connection, sql.SQL(fingerprint).format(sql.Identifier(table)))
        for table in TABLES
    }


def test_the_arguments_decide_every_row(connection: Connection) -> None:
    def loaded(seed: int) -> dict[str, str]:
        connection.execute("TRUNCATE organizations, users CASCADE")
        load_sample_data(connection, events=1_000, until=UNTIL, seed=seed)
        return everything(connection)

    first, again, other = loaded(7), loaded(7), loaded(8)

    assert again == first
    assert all(other[table] != first[table] for table in TABLES)


def test_counts_are_what_the_tables_hold(filled: Connection, sample: SampleData) -> None:
    counts = {
        table: value(filled, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table)))
        for table in TABLES
    }
    assert sample.rows == counts
    assert all(count > 0 for count in counts.values())
    assert 6_000 <= sample.rows["events"] <= 6_050
    assert sample.rows["sessions"] == 100


def test_every_reference_leads_somewhere(filled: Connection, sample: SampleData) -> None:
    """The load bypasses foreign keys; here PostgreSQL checks each of them on all rows."""
    keys = rows(
        filled,
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) "
        "FROM pg_constraint WHERE contype = 'f' AND conparentid = 0",
    )
    assert len(keys) > 30
    for table, name, definition in keys:
        again: Any = f"DROP CONSTRAINT {name}, ADD CONSTRAINT {name} {definition}"
        filled.execute(f"ALTER TABLE {table} " + again)


def test_references_stay_in_their_organization(filled: Connection, sample: SampleData) -> None:
    for table, key, referenced in [
        ("sessions", "agent_id", "agents"),
        ("sessions", "harness_id", "harnesses"),
        ("sessions", "app_id", "apps"),
        ("sessions", "workspace_id", "workspaces"),
        ("sessions", "owner_principal_id", "principals"),
        ("llm_generations", "session_id", "sessions"),
        ("usage_journal", "session_id", "sessions"),
        ("usage_ledger", "session_id", "sessions"),
        ("usage_ledger", "budget_id", "budgets"),
        ("usage_ledger", "journal_id", "usage_journal"),
    ]:
        homes = rows(
            filled,
            f"SELECT DISTINCT r.org_id = t.org_id FROM {table} AS t "
            f"JOIN {referenced} AS r ON r.id = t.{key}",
        )
        assert homes == [(True,)], (table, key)


def test_everything_happens_in_the_days_asked_for(filled: Connection, sample: SampleData) -> None:
    assert (sample.since, sample.until) == (UNTIL - timedelta(days=7), UNTIL)
    for table, column in [
        ("events", "ts"),
        ("events", "created_at"),
        ("sessions", "created_at"),
        ("sessions", "updated_at"),
        ("llm_generations", "created_at"),
        ("usage_ledger", "created_at"),
        ("reporting_outbox", "next_attempt_at"),
    ]:
        [(first, last)] = rows(filled, f"SELECT min({column}), max({column}) FROM {table}")
        assert sample.since <= first < last <= sample.until
    days = value(filled, "SELECT count(DISTINCT (ts AT TIME ZONE 'UTC')::date) FROM events")
    assert days == 8
    by_day, at_night = rows(
        filled,
        "SELECT count(*) FROM sessions GROUP BY extract(hour FROM created_at) BETWEEN 7 AND 18 "
        "ORDER BY 1 DESC",
    )
    assert by_day > at_night


def test_organizations_are_of_unequal_size(filled: Connection, sample: SampleData) -> None:
    sizes = rows(filled, "SELECT count(*) FROM sessions GROUP BY org_id ORDER BY org_id")
    assert len(sizes) == 3
    assert sizes[0] > sizes[1] > sizes[2]
    assert value(filled, "SELECT nextval('organizations_org_id_seq')") == 4


def test_every_type_of_event_occurs(filled: Connection, sample: SampleData) -> None:
    counts: dict[str, int] = dict(
        rows(filled, "SELECT event_type, count(*) FROM events GROUP BY 1")
    )
    projected = [
        "tool.completed",
        "turn.completed",
        "capability.usage",
        "turn.failed",
        "output.message.replaced",
        "turn.cancelled",
    ]
    assert max(counts, key=counts.__getitem__) == "tool.completed"
    assert all(counts[event_type] > 0 for event_type in projected)
    assert {"input.message", "output.message.completed", "llm.generation"} < counts.keys()
    share = sum(counts[event_type] for event_type in projected) / sample.rows["events"]
    assert share == pytest.approx(0.6, abs=0.02)
    assert sample.sources["event"] == sum(counts[event_type] for event_type in projected)


def test_payloads_are_as_the_contract_reads_them(filled: Connection, sample: SampleData) -> None:
    wrong = """
        SELECT event_type, data, context FROM events WHERE NOT CASE
            WHEN event_type = 'tool.completed' THEN
                context ? 'turn_id' AND data ?| '{status,success}'
                AND data ?& '{tool_call_id,tool_name,display_name,duration_ms}'
            WHEN event_type IN ('turn.completed', 'turn.failed', 'turn.cancelled') THEN
                data ?& '{turn_id,iterations,duration_ms,usage}'
            WHEN event_type = 'capability.usage' THEN
                jsonb_array_length(data -> 'records') BETWEEN 1 AND 4
            WHEN event_type = 'output.message.replaced' THEN data ? 'guardrail_capability_id'
            ELSE true
        END
    """
    assert rows(filled, wrong) == []
    with_capability = value(
        filled,
        "SELECT avg((data ? 'capability_id')::int)::float8 FROM events "
        "WHERE event_type = 'tool.completed'",
    )
    assert with_capability == pytest.approx(1 / 3, abs=0.05)


def test_sessions_configure_every_flavour_of_capability(
    filled: Connection, sample: SampleData
) -> None:
    forms = rows(
        filled,
        "SELECT DISTINCT jsonb_typeof(c), "
        "CASE WHEN ref LIKE '%:%' THEN split_part(ref, ':', 1) ELSE 'builtin' END "
        "FROM sessions, jsonb_array_elements(capabilities) AS c, "
        "LATERAL (SELECT coalesce(c->>'ref', c#>>'{}') AS ref) AS r",
    )
    assert set(forms) == {
        (form, flavour)
        for form in ("string", "object")
        for flavour in ("builtin", "mcp", "skill", "declarative")
    }
    unknown = value(
        filled,
        "SELECT count(*) FROM sessions AS s, jsonb_array_elements(capabilities) AS c, "
        "LATERAL (SELECT coalesce(c->>'ref', c#>>'{}') AS ref) AS r WHERE ref LIKE '%:%' "
        "AND NOT EXISTS (SELECT FROM mcp_servers AS m WHERE m.org_id = s.org_id "
        "  AND ref = 'mcp:' || m.id) "
        "AND NOT EXISTS (SELECT FROM skills AS k WHERE k.org_id = s.org_id "
        "  AND ref = 'skill:' || k.id) "
        "AND NOT EXISTS (SELECT FROM declarative_capabilities AS d WHERE d.org_id = s.org_id "
        "  AND ref = 'declarative:' || d.name)",
    )
    assert unknown == 0


def test_session_counters_agree_with_the_events(filled: Connection, sample: SampleData) -> None:
    wrong = value(
        filled,
        "SELECT count(*) FROM sessions AS s JOIN ("
        "  SELECT session_id, count(*) FILTER (WHERE event_type LIKE 'turn.%') AS turns,"
        "         count(*) FILTER (WHERE event_type = 'tool.completed') AS tool_calls,"
        "         max(sequence) FILTER (WHERE event_type LIKE 'turn.%') AS last"
        "  FROM events WHERE event_type <> 'turn.started' GROUP BY session_id"
        ") AS e ON e.session_id = s.id "
        "JOIN events AS t ON t.session_id = s.id AND t.sequence = e.last "
        "WHERE (s.turn_count, s.tool_call_count, s.last_turn_sequence, s.last_turn_at,"
        "       'turn.' || s.last_turn_status)"
        "  IS DISTINCT FROM (e.turns, e.tool_calls, e.last, t.ts, t.event_type)",
    )
    assert wrong == 0
    assert value(filled, "SELECT min(turn_count) FROM sessions") >= 1
    tokens = value(
        filled,
        "SELECT count(*) FROM sessions AS s JOIN (SELECT session_id, sum(input_tokens) AS input "
        "FROM llm_generations GROUP BY session_id) AS g ON g.session_id = s.id "
        "WHERE g.input <> s.total_input_tokens",
    )
    assert tokens == 0


def test_sessions_keep_the_time_of_their_last_change(
    filled: Connection, sample: SampleData
) -> None:
    assert value(
        filled,
        "SELECT bool_and(s.updated_at >= e.last AND s.updated_at < e.last + interval '1 s') "
        "FROM sessions AS s JOIN (SELECT session_id, max(ts) AS last FROM events GROUP BY 1) AS e "
        "ON e.session_id = s.id",
    )


def test_money_comes_back_and_inference_runs_in_the_background(
    filled: Connection, sample: SampleData
) -> None:
    credited = value(filled, "SELECT count(*) FROM usage_ledger WHERE amount < 0")
    assert 0 < credited < sample.rows["usage_ledger"] / 10
    background = value(filled, "SELECT count(*) FROM llm_generations WHERE session_id IS NULL")
    assert 0 < background < sample.rows["llm_generations"] / 5
    spent = value(
        filled,
        "SELECT bool_and(abs(b.limit - b.balance - l.spent) < 1e-6) FROM budgets AS b JOIN ("
        "SELECT budget_id, sum(amount) AS spent FROM usage_ledger GROUP BY 1"
        ") AS l ON l.budget_id = b.id",
    )
    assert spent


def test_the_outbox_lacks_a_tenth(filled: Connection, sample: SampleData) -> None:
    share = sample.rows["reporting_outbox"] / sum(sample.sources.values())
    assert share == pytest.approx(0.9, abs=0.02)
    queued = rows(
        filled,
        "SELECT source_type, reason, min(status), max(status), max(attempts) "
        "FROM reporting_outbox GROUP BY 1, 2",
    )
    assert set(queued) == {
        (source_type, reason, "pending", "pending", 0) for source_type, reason in REASONS.items()
    }
    lost = value(
        filled,
        "SELECT count(*) FROM reporting_outbox AS o WHERE NOT EXISTS ("
        "  SELECT FROM events AS e JOIN sessions AS s ON s.id = e.session_id"
        "  WHERE o.source_type = 'event' AND e.id = o.source_id::uuid AND s.org_id = o.org_id"
        ") AND NOT EXISTS (SELECT FROM sessions AS s WHERE o.source_type = 'session'"
        "  AND s.id = o.source_id::uuid AND s.org_id = o.org_id"
        ") AND NOT EXISTS (SELECT FROM llm_generations AS g WHERE o.source_type = 'llm_generation'"
        "  AND g.id = o.source_id::uuid AND g.org_id = o.org_id"
        ") AND NOT EXISTS (SELECT FROM usage_ledger AS l WHERE o.source_type = 'usage_ledger'"
        "  AND l.id = o.source_id::uuid AND l.org_id = o.org_id)",
    )
    assert lost == 0


def test_outbox_versions_are_those_of_the_application(
    filled: Connection, sample: SampleData
) -> None:
    assert value(
        filled,
        "SELECT bool_and(source_version = source_id) FROM reporting_outbox "
        "WHERE source_type <> 'session'",
    )
    versions: dict[str, datetime] = dict(
        rows(
            filled,
            "SELECT o.source_version, s.updated_at FROM reporting_outbox AS o JOIN sessions AS s "
            "ON o.source_type = 'session' AND o.source_id = s.id::text",
        )
    )
    for version, updated_at in versions.items():
        fraction = version.removesuffix("Z").partition(".")[2]
        assert version.endswith("Z")
        assert datetime.fromisoformat(version) == updated_at
        assert len(fraction) in (0, 3, 6)
        assert not fraction or fraction[-3:] != "000"
    assert {len(version) for version in versions} == {20, 24, 27}


def test_shares_are_as_asked(connection: Connection) -> None:
    for projected, enqueued in [(0.2, 0.0), (1.0, 1.0)]:
        connection.execute("TRUNCATE organizations, users CASCADE")
        sample = load_sample_data(
            connection, events=2_000, projected_share=projected, enqueued_share=enqueued
        )

        share = sample.sources["event"] / sample.rows["events"]
        assert share == pytest.approx(projected, abs=0.02)
        assert sample.rows.get("reporting_outbox", 0) == enqueued * sum(sample.sources.values())


def test_wrong_arguments_and_databases_in_use_are_refused(connection: Connection) -> None:
    wrong: list[dict[str, Any]] = [
        {"events": 0},
        {"days": 0},
        {"projected_share": 0.0},
        {"projected_share": 1.1},
        {"enqueued_share": -0.1},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="expected events and days from 1 on"):
            load_sample_data(connection, **arguments)

    one_turn = load_sample_data(connection, events=1, days=1)
    with pytest.raises(Refusal, match="needs an empty database"):
        load_sample_data(connection)

    assert one_turn.rows["sessions"] == 1
    assert value(connection, "SELECT count(*) FROM events") == one_turn.rows["events"]
    # Triggers work as ever after the load.
    connection.execute("UPDATE sessions SET title = 'x'")
    assert value(connection, "SELECT updated_at > now() - interval '1 min' FROM sessions")
