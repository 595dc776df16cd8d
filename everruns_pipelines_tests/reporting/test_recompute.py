"""The oracle against rows and facts written by hand."""

import math
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from itertools import count
from pathlib import Path
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines_tests.reporting.adversarial import (
    load_adversarial_sources,
    load_unstorable_sources,
)
from everruns_pipelines_tests.reporting.recompute import (
    FACT_TABLES,
    USAGE_KINDS,
    FactRow,
    Json,
    Number,
    actual_facts,
    differences,
    expected_facts,
    json_text,
    number_of,
    parse_json,
    text_of,
    unstorable_sources,
)


def _uuid(number: int) -> UUID:
    return UUID(int=number)


USER, PRINCIPAL, WORKSPACE, APP, AGENT, HARNESS, SESSION = map(_uuid, range(0xA1, 0xA8))
FOREIGN_AGENT, FOREIGN_SESSION = _uuid(0xB1), _uuid(0xB2)
ROW = _uuid(0xC1)
DAY = date(2026, 3, 1)
LATE = datetime(2026, 3, 1, 23, 59, 59, 999999, tzinfo=UTC)

DIMENSIONS: FactRow = {
    "user_id": USER,
    "principal_id": PRINCIPAL,
    "agent_id": AGENT,
    "agent_name_snapshot": "Agnès",
    "harness_id": HARNESS,
    "harness_name_snapshot": "Harness",
    "app_id": APP,
    "blueprint_id": "blueprint",
}
TIMES: FactRow = {"created_at": LATE, "time_bucket_day": DAY}
NOTHING_KNOWN: FactRow = {**dict.fromkeys(DIMENSIONS)}

_WORLD: LiteralString = """
INSERT INTO organizations (org_id, public_id, name) VALUES
    (11, 'org_' || repeat('1', 32), 'Ours'), (12, 'org_' || repeat('2', 32), 'Theirs');
SELECT setval('organizations_org_id_seq', 12);
INSERT INTO users (id, email, name) VALUES ({user}, 'u@example.org', 'U');
INSERT INTO principals (id, public_id, org_id, kind)
VALUES ({principal}, 'principal_' || repeat('1', 32), 11, 'user');
INSERT INTO workspaces (id, org_id, public_id, name)
VALUES ({workspace}, 11, 'wsp_' || repeat('1', 32), 'W');
INSERT INTO apps (id, org_id) VALUES ({app}, 11);
INSERT INTO agents (id, org_id, name, system_prompt) VALUES
    ({agent}, 11, 'Agnès', ''), ({foreign_agent}, 12, 'Theirs', '');
INSERT INTO harnesses (id, org_id, name, display_name, system_prompt)
VALUES ({harness}, 11, 'Harness', 'Shown', '');
INSERT INTO sessions (id, org_id, agent_id, harness_id, app_id, blueprint_id, owner_principal_id,
    resolved_owner_user_id, workspace_id, created_at, updated_at)
VALUES ({session}, 11, {agent}, {harness}, {app}, 'blueprint', {principal},
    {user}, {workspace}, {late}, {late});
INSERT INTO sessions (id, org_id, agent_id, owner_principal_id, workspace_id)
VALUES ({foreign_session}, 12, {foreign_agent}, {principal}, {workspace});
"""


@pytest.fixture(scope="module")
def database(home: Path) -> Iterator[Connection]:
    """One database for all tests here, with two organizations and one session of each."""
    with psycopg.connect(embedded_postgres_url(home, "postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE recompute TEMPLATE everruns STRATEGY FILE_COPY")
    with psycopg.connect(embedded_postgres_url(home, "recompute"), autocommit=True) as connection:
        connection.execute(
            sql.SQL(_WORLD).format(
                user=USER,
                principal=PRINCIPAL,
                workspace=WORKSPACE,
                app=APP,
                agent=AGENT,
                foreign_agent=FOREIGN_AGENT,
                harness=HARNESS,
                session=SESSION,
                foreign_session=FOREIGN_SESSION,
                late=LATE,
            )
        )
        yield connection


@pytest.fixture
def world(database: Connection) -> Iterator[Connection]:
    """The database, as it was again after the test."""
    with database.transaction(force_rollback=True):
        yield database


@pytest.fixture
def event(world: Connection) -> Callable[..., None]:
    """Adds an event to our session: type, data, context, id."""
    sequence = count(1)

    def add(type_: str, data: str, context: str = "{}", id_: UUID = ROW) -> None:
        world.execute(
            "INSERT INTO events (id, session_id, sequence, event_type, data, context, ts)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            (id_, SESSION, next(sequence), type_, data, context, LATE),
        )

    return add


def _fact(connection: Connection, table: str, source_key: str, org_id: int = 11) -> FactRow:
    return expected_facts(connection)[table][org_id, source_key]


def _usages(connection: Connection) -> dict[str, tuple[object, object]]:
    """Source key -> capability and its name, of our organization."""
    facts = expected_facts(connection)["fact_capability_usage"]
    return {
        key: (row["capability_id"], row["capability_name_snapshot"])
        for (_, key), row in facts.items()
    }


@pytest.mark.parametrize(
    ("json", "text", "number"),
    [
        ('{"a": 12}', "12", 12),
        ('{"a": "12"}', "12", 12),
        ('{"a": "007"}', "007", 7),
        ('{"a": 9223372036854775807}', "9223372036854775807", 2**63 - 1),
        ('{"a": 9223372036854775808}', "9223372036854775808", 0),
        ('{"a": -3}', "-3", 0),
        ('{"a": 1.0}', "1.0", 0),
        ('{"a": "1e3"}', "1e3", 0),
        ('{"a": "12\\n"}', "12\n", 0),
        ('{"a": "١٢"}', "١٢", 0),
        ('{"a": ""}', "", 0),
        ('{"a": true}', "true", 0),
        ('{"a": null}', None, 0),
        ('{"a": {"b": [1, "x"]}}', '{"b": [1, "x"]}', 0),
        ('{"b": 1}', None, 0),
        ('["a"]', None, 0),
        ('"a"', None, 0),
        ("null", None, 0),
    ],
)
def test_text_and_number_of_a_member(json: str, text: str | None, number: int) -> None:
    assert text_of(parse_json(json), "a") == text
    assert number_of(parse_json(json), "a") == number


@pytest.mark.parametrize(
    "json",
    [
        "[1e3, 1.0, -0.0, 1.50, 1E-3, 1e40]",
        '{"b": {"a": "\\"\\\\\\u0001\\t\\u007f é 😀"}, "aa": [], "c": {}, "d": [null, true]}',
    ],
)
def test_json_is_printed_as_postgresql_prints_it(world: Connection, json: str) -> None:
    printed = world.execute("SELECT %s::jsonb::text", (json,)).fetchone()
    assert printed is not None
    assert json_text(parse_json(printed[0])) == printed[0]


def test_numbers_are_read_as_postgresql_keeps_them(
    world: Connection, event: Callable[..., None]
) -> None:
    event("tool.completed", '{"duration_ms": 1e3, "tool_name": 1.0}')
    fact = _fact(world, "fact_tool_call", f"event:{ROW}")
    assert (fact["duration_ms"], fact["tool_name"]) == (1000, "1.0")


def test_tool_call_and_its_capability(world: Connection, event: Callable[..., None]) -> None:
    event(
        "tool.completed",
        '{"turn_id": "data", "tool_call_id": "call", "tool_name": "search", "status": "timeout",'
        ' "display_name": "Search", "capability_id": "web", "capability_name": "Web",'
        ' "success": "false", "duration_ms": "250", "result": "secret"}',
        '{"turn_id": "context"}',
    )
    shared: FactRow = {
        "org_id": 11,
        "session_id": SESSION,
        "turn_id": "context",
        **DIMENSIONS,
        **TIMES,
        "tool_name": "search",
        "capability_id": "web",
        "capability_name_snapshot": "Web",
        "duration_ms": 250,
    }
    assert _fact(world, "fact_tool_call", f"event:{ROW}") == {
        **shared,
        "source_key": f"event:{ROW}",
        "tool_call_id": "call",
        "tool_display_name_snapshot": "Search",
        "tool_status": "timeout",
        "call_count": 1,
        "success_count": 0,
        "error_count": 1,
        "timeout_count": 1,
        "cancelled_count": 0,
    }
    assert _fact(world, "fact_capability_usage", f"event:{ROW}:invoked") == {
        **shared,
        "source_key": f"event:{ROW}:invoked",
        "capability_usage_kind": "invoked",
        "usage_count": 1,
    }


@pytest.mark.parametrize(
    ("data", "status", "success", "error", "cancelled"),
    [
        ("{}", "error", 0, 0, 0),
        ("[]", "error", 0, 0, 0),
        ('{"success": true}', "success", 1, 0, 0),
        ('{"success": "true"}', "success", 1, 0, 0),
        ('{"success": "TRUE"}', "error", 0, 0, 0),
        ('{"success": false}', "error", 0, 1, 0),
        ('{"status": null, "success": false}', "error", 0, 1, 0),
        ('{"status": "error", "success": true}', "error", 1, 1, 0),
        ('{"status": "success"}', "success", 1, 0, 0),
        ('{"status": "cancelled"}', "cancelled", 0, 0, 1),
        ('{"status": ""}', "", 0, 0, 0),
        ('{"status": 7}', "7", 0, 0, 0),
    ],
)
def test_status_of_a_tool_call(
    world: Connection,
    event: Callable[..., None],
    data: str,
    status: str,
    success: int,
    error: int,
    cancelled: int,
) -> None:
    event("tool.completed", data)
    fact = _fact(world, "fact_tool_call", f"event:{ROW}")
    columns = ("tool_status", "success_count", "error_count", "cancelled_count")
    assert tuple(fact[column] for column in columns) == (status, success, error, cancelled)
    assert not _usages(world)


def test_turn_counts_the_tool_calls_of_its_turn(
    world: Connection, event: Callable[..., None]
) -> None:
    event("tool.completed", '{"turn_id": "other"}', '{"turn_id": "7"}', _uuid(1))
    event("tool.completed", '{"turn_id": 7}', "[]", _uuid(2))
    event("tool.completed", '{"turn_id": "7"}', '{"turn_id": "other"}', _uuid(3))
    event("tool.completed", "{}", "{}", _uuid(4))
    event("tool.started", '{"turn_id": 7}', "{}", _uuid(5))
    event(
        "turn.failed",
        '{"turn_id": "7", "iterations": 3, "duration_ms": 40, "usage": {"input_tokens": 1,'
        ' "output_tokens": "20", "cache_read_tokens": 300, "cache_creation_tokens": 4000}}',
        '{"turn_id": "other"}',
    )
    event("turn.completed", '{"usage": [1]}', "{}", _uuid(6))
    assert _fact(world, "fact_turn", f"event:{ROW}") == {
        "org_id": 11,
        "source_key": f"event:{ROW}",
        "session_id": SESSION,
        "turn_id": "7",
        **DIMENSIONS,
        **TIMES,
        "turn_status": "failed",
        "turn_count": 1,
        "duration_ms": 40,
        "iterations": 3,
        "input_tokens": 1,
        "output_tokens": 20,
        "cache_read_tokens": 300,
        "cache_creation_tokens": 4000,
        "total_tokens": 21,
        "tool_call_count": 2,
        "success_count": 0,
        "error_count": 1,
    }
    no_turn = _fact(world, "fact_turn", f"event:{_uuid(6)}")
    assert (no_turn["turn_id"], no_turn["tool_call_count"]) == (None, 0)
    assert (no_turn["success_count"], no_turn["error_count"]) == (1, 0)
    assert len(expected_facts(world)["fact_tool_call"]) == 4


def test_capability_records_are_taken_one_by_one(
    world: Connection, event: Callable[..., None]
) -> None:
    event(
        "capability.usage",
        '{"records": [null, "capability_id", {"capability_id": "a", "usage_kind": "exposed",'
        ' "capability_name": "A", "tool_name": "t", "usage_count": 1.5, "duration_ms": 9},'
        ' {"capability_id": "a"}, {"usage_kind": "exposed"}, {"capability_id": null,'
        ' "usage_kind": "exposed"}, {"capability_id": "a", "usage_kind": "Exposed"},'
        ' {"capability_id": 5, "usage_kind": "resolved", "usage_count": "12"}]}',
    )
    event("capability.usage", '{"records": {"capability_id": "a"}}', id_=_uuid(1))
    event("output.message.replaced", '{"guardrail_capability_id": "g"}', id_=_uuid(2))
    event("output.message.replaced", '{"guardrail_capability_id": null}', id_=_uuid(3))
    event("tool.completed", '{"capability_id": null}', id_=_uuid(4))
    assert _usages(world) == {
        f"event:{ROW}:capability_usage:3": ("a", "A"),
        f"event:{ROW}:capability_usage:8": ("5", None),
        f"event:{_uuid(2)}:effect_ran": ("g", "g"),
    }
    third = _fact(world, "fact_capability_usage", f"event:{ROW}:capability_usage:3")
    assert (third["usage_count"], third["duration_ms"], third["tool_name"]) == (1, 9, "t")
    eighth = _fact(world, "fact_capability_usage", f"event:{ROW}:capability_usage:8")
    assert (eighth["usage_count"], eighth["capability_usage_kind"]) == (12, "resolved")


def test_configured_capabilities_and_their_names(world: Connection) -> None:
    mcp, foreign_mcp, skill = map(_uuid, (1, 2, 3))
    world.execute(
        "INSERT INTO mcp_servers (id, org_id, name, url, status) VALUES"
        " (%s, 11, 'Server', '', 'deleted'), (%s, 12, 'Their server', '', 'active')",
        (mcp, foreign_mcp),
    )
    world.execute(
        "INSERT INTO skills (id, org_id, public_id, name, description, instructions)"
        " VALUES (%s, 11, 'skill_' || repeat('1', 32), 'Skill', '', '')",
        (skill,),
    )
    world.execute(
        "INSERT INTO declarative_capabilities (org_id, public_id, name, display_name, description)"
        " VALUES (11, 'cap_' || repeat('1', 32), 'named', NULL, ''),"
        " (11, 'cap_' || repeat('2', 32), 'shown', 'Shown', ''),"
        " (12, 'cap_' || repeat('3', 32), 'theirs', 'Theirs', '')"
    )
    world.execute(
        "INSERT INTO agent_capabilities (agent_id, capability_id)"
        " VALUES (%s, 'web'), (%s, 'declarative:shown'), (%s, 'theirs')",
        (AGENT, AGENT, FOREIGN_AGENT),
    )
    world.execute(
        "INSERT INTO harness_capabilities (harness_id, capability_id) VALUES (%s, %s)",
        (HARNESS, f"skill:{skill}"),
    )
    world.execute("DELETE FROM sessions WHERE id = %s", (FOREIGN_SESSION,))
    own: Json = [
        *("web", "web", "", None, Number("5"), ["web"], {"ref": "web"}, {"ref": ""}, {"id": "x"}),
        *(f"mcp:{mcp}", {"ref": f"mcp:{foreign_mcp}"}, "mcp:nonsense"),
        *("declarative:named", "declarative:theirs"),
    ]
    world.execute("UPDATE sessions SET capabilities = %s", (json_text(own),))
    ours, theirs = f"session:{SESSION}:configured", f"mcp:{foreign_mcp}"
    assert _usages(world) == {
        f"{ours}:agent:web": ("web", "web"),
        f"{ours}:agent:declarative:shown": ("declarative:shown", "Shown"),
        f"{ours}:harness:skill:{skill}": (f"skill:{skill}", "Skill"),
        f"{ours}:session:web": ("web", "web"),
        f"{ours}:session:mcp:{mcp}": (f"mcp:{mcp}", "Server"),
        f"{ours}:session:{theirs}": (theirs, theirs),
        f"{ours}:session:mcp:nonsense": ("mcp:nonsense", "mcp:nonsense"),
        f"{ours}:session:declarative:named": ("declarative:named", "named"),
        f"{ours}:session:declarative:theirs": ("declarative:theirs", "declarative:theirs"),
    }
    assert _fact(world, "fact_capability_usage", f"{ours}:agent:web") == {
        "org_id": 11,
        "source_key": f"{ours}:agent:web",
        "session_id": SESSION,
        "turn_id": None,
        **DIMENSIONS,
        **TIMES,
        "capability_id": "web",
        "capability_name_snapshot": "web",
        "capability_usage_kind": "configured",
        "tool_name": None,
        "usage_count": 1,
        "duration_ms": 0,
    }


def test_session(world: Connection) -> None:
    world.execute(
        "UPDATE sessions SET status = 'idle', started_at = %s, finished_at = %s,"
        " total_input_tokens = 1, total_output_tokens = 20, total_cache_read_tokens = 300,"
        " total_cache_creation_tokens = 4000, turn_count = 5, tool_call_count = 6 WHERE id = %s",
        (LATE, LATE.replace(microsecond=999999, second=59), SESSION),
    )
    fact = _fact(world, "fact_session", f"session:{SESSION}")
    found = world.execute("SELECT updated_at FROM sessions WHERE id = %s", (SESSION,)).fetchone()
    assert found is not None
    assert fact == {
        "org_id": 11,
        "source_key": f"session:{SESSION}",
        "session_id": SESSION,
        **DIMENSIONS,
        **TIMES,
        "session_status": "idle",
        "started_at": LATE,
        "finished_at": LATE,
        "last_active_at": found[0],
        "session_count": 1,
        "duration_ms": 0,
        "turn_count": 5,
        "input_tokens": 1,
        "output_tokens": 20,
        "cache_read_tokens": 300,
        "cache_creation_tokens": 4000,
        "total_tokens": 4321,
        "tool_call_count": 6,
    }


@pytest.mark.parametrize(
    ("microseconds", "milliseconds"),
    [(0, 0), (499, 0), (500, 1), (1499, 1), (1500, 2), (2500, 3), (-500, 0), (-5000, 0)],
)
def test_duration_of_a_session_is_rounded_half_up(
    world: Connection, microseconds: int, milliseconds: int
) -> None:
    world.execute(
        "UPDATE sessions SET started_at = created_at,"
        " finished_at = created_at + %s * interval '1 microsecond'",
        (microseconds,),
    )
    assert _fact(world, "fact_session", f"session:{SESSION}")["duration_ms"] == milliseconds


def test_dimensions_come_from_the_same_organization(world: Connection) -> None:
    world.execute("UPDATE sessions SET agent_id = %s", (FOREIGN_AGENT,))
    fact = _fact(world, "fact_session", f"session:{SESSION}")
    assert (fact["agent_id"], fact["agent_name_snapshot"]) == (FOREIGN_AGENT, None)
    world.execute(
        "INSERT INTO llm_generations (id, org_id, session_id) VALUES"
        " (%s, 11, %s), (%s, 11, %s), (%s, 11, NULL)",
        (_uuid(1), SESSION, _uuid(2), FOREIGN_SESSION, _uuid(3)),
    )
    generations = expected_facts(world)["fact_llm_generation"]
    for number, session_id, dimensions in (
        (1, SESSION, DIMENSIONS | {"agent_id": FOREIGN_AGENT, "agent_name_snapshot": None}),
        (2, FOREIGN_SESSION, NOTHING_KNOWN),
        (3, None, NOTHING_KNOWN),
    ):
        row = generations[11, f"llm_generation:{_uuid(number)}"]
        assert row["session_id"] == session_id
        assert row | dimensions == row


def test_generation(world: Connection) -> None:
    world.execute(
        "INSERT INTO llm_generations (id, org_id, session_id, turn_id, model, provider,"
        " input_tokens, output_tokens, cache_read_tokens, cache_creation_tokens, finish_reason,"
        " created_at) VALUES (%s, 11, %s, %s, 'm', 'p', 1, 20, 300, 4000, 'stop', %s)",
        (ROW, SESSION, _uuid(7), LATE),
    )
    assert _fact(world, "fact_llm_generation", f"llm_generation:{ROW}") == {
        "org_id": 11,
        "source_key": f"llm_generation:{ROW}",
        "session_id": SESSION,
        "turn_id": "00000000-0000-0000-0000-000000000007",
        **DIMENSIONS,
        **TIMES,
        "model": "m",
        "provider": "p",
        "finish_reason": "stop",
        "input_tokens": 1,
        "output_tokens": 20,
        "cache_read_tokens": 300,
        "cache_creation_tokens": 4000,
        "total_tokens": 4321,
        "duration_ms": 0,
        "time_to_first_token_ms": 0,
        "success_count": 1,
        "error_count": 0,
    }


@pytest.mark.parametrize(
    ("amount", "debit"),
    [(2.5, 1), (0.0, 1), (-0.0, 1), (math.inf, 1), (math.nan, 1), (-5e-324, 0), (-math.inf, 0)],
)
def test_budget_posting(world: Connection, amount: float, debit: int) -> None:
    budget, foreign_budget, journal = map(_uuid, (1, 2, 3))
    world.execute(
        'INSERT INTO budgets (id, org_id, subject_type, subject_id, currency, "limit", balance)'
        " VALUES (%s, 11, 'agent', 'subject', 'USD', 1, 1), (%s, 12, 'org', 'theirs', 'USD', 1, 1)",
        (budget, foreign_budget),
    )
    world.execute("INSERT INTO usage_journal (id, org_id, kind) VALUES (%s, 11, 'k')", (journal,))
    posting = (
        "INSERT INTO usage_ledger (id, journal_id, budget_id, org_id, session_id, user_id,"
        " harness_id, currency, amount, meter_source, ref_type, created_at)"
        " VALUES (%s, %s, %s, 11, %s, %s, %s, 'USD', %s, 'meter', 'ref', %s)"
    )
    for id_, budget_id in ((ROW, budget), (_uuid(4), foreign_budget)):
        world.execute(posting, (id_, journal, budget_id, SESSION, USER, HARNESS, amount, LATE))
    fact = _fact(world, "fact_budget_posting", f"usage_ledger:{ROW}")
    assert repr(fact.pop("amount")) == repr(amount)
    assert fact == {
        "org_id": 11,
        "source_key": f"usage_ledger:{ROW}",
        "session_id": SESSION,
        **DIMENSIONS,
        "principal_id": None,
        "agent_id": None,
        "agent_name_snapshot": None,
        **TIMES,
        "budget_id": budget,
        "budget_subject_type": "agent",
        "budget_subject_id": "subject",
        "currency": "USD",
        "meter_source": "meter",
        "ref_type": "ref",
        "debit_count": debit,
        "credit_count": 1 - debit,
    }
    foreign = _fact(world, "fact_budget_posting", f"usage_ledger:{_uuid(4)}")
    assert (foreign["budget_id"], foreign["budget_subject_type"]) == (foreign_budget, None)


def test_every_column_of_every_fact_is_recomputed(
    world: Connection, event: Callable[..., None]
) -> None:
    event("tool.completed", '{"capability_id": "c"}')
    event("turn.cancelled", "{}", id_=_uuid(1))
    world.execute("INSERT INTO llm_generations (org_id) VALUES (11)")
    world.execute("INSERT INTO usage_journal (id, org_id, kind) VALUES (%s, 11, 'k')", (ROW,))
    world.execute(
        "INSERT INTO usage_ledger (journal_id, org_id, currency, amount, meter_source)"
        " VALUES (%s, 11, 'USD', 1, 'm')",
        (ROW,),
    )
    facts = expected_facts(world)
    for table in FACT_TABLES:
        columns = world.execute(
            "SELECT array_agg(column_name::text) FROM information_schema.columns"
            " WHERE table_name = %s AND column_name <> 'projected_at'",
            (table,),
        ).fetchone()
        assert columns is not None
        assert facts[table]
        for row in facts[table].values():
            assert sorted(row) == sorted(columns[0])


def test_differences_name_what_is_missing_wrong_and_unexpected(
    world: Connection, event: Callable[..., None]
) -> None:
    event("turn.completed", '{"turn_id": "t"}')
    event("turn.completed", "{}", id_=_uuid(1))
    assert len(differences(world)) == 4  # two sessions, two turns
    insert = (
        "INSERT INTO fact_turn (org_id, source_key, session_id, created_at, time_bucket_day)"
        " VALUES (%s, %s, %s, %s, %s)"
    )
    world.execute(insert, (11, f"event:{ROW}", SESSION, LATE, DAY))
    world.execute(insert, (12, f"event:{ROW}", SESSION, LATE, DAY))
    world.execute(insert, (11, f"event:{_uuid(9)}", SESSION, LATE, DAY))
    lines = "\n".join(differences(world))
    assert f"fact_turn 11 event:{_uuid(1)}: missing" in lines
    assert f"fact_turn 11 event:{ROW}: turn_status is None, not completed" in lines
    assert f"fact_turn 11 event:{_uuid(9)}: unexpected" in lines
    assert f"fact_turn 12 event:{ROW}: unexpected" in lines
    assert len(differences(world, limit=2)) == 3
    allowed = "\n".join(differences(world, orphans=True))
    assert f"fact_turn 11 event:{_uuid(9)}: unexpected" not in allowed
    assert f"fact_turn 12 event:{ROW}: unexpected" in allowed
    assert actual_facts(world)["fact_turn"].keys() == {
        (11, f"event:{ROW}"),
        (12, f"event:{ROW}"),
        (11, f"event:{_uuid(9)}"),
    }


def test_an_archived_event_is_an_event_as_long_as_its_session_stands(
    world: Connection, event: Callable[..., None]
) -> None:
    event("turn.completed", '{"turn_id": "t"}', id_=_uuid(1))
    archived = (
        "INSERT INTO archived_events (id, session_id, sequence, event_type, data, ts, created_at)"
        ' VALUES (%s, %s, 9, %s, \'{"turn_id": "t"}\', %s, %s)'
    )
    world.execute(archived, (ROW, SESSION, "tool.completed", LATE, LATE))
    world.execute(archived, (_uuid(2), _uuid(3), "tool.completed", LATE, LATE))
    facts = expected_facts(world)
    assert facts["fact_tool_call"].keys() == {(11, f"event:{ROW}")}
    assert facts["fact_turn"][11, f"event:{_uuid(1)}"]["tool_call_count"] == 1
    world.execute(
        "INSERT INTO fact_tool_call (org_id, source_key, created_at, time_bucket_day)"
        " VALUES (11, %s, %s, %s)",
        (f"event:{_uuid(2)}", LATE, DAY),
    )
    assert f"fact_tool_call 11 event:{_uuid(2)}: unexpected" in differences(world)
    assert not any("unexpected" in line for line in differences(world, orphans=True))


def test_a_session_with_archived_events_keeps_its_history(
    world: Connection, event: Callable[..., None]
) -> None:
    event("turn.failed", "{}", id_=_uuid(1))
    event("tool.completed", "{}", id_=_uuid(2))
    world.execute("UPDATE sessions SET turn_count = 0, tool_call_count = 5")
    of_session = (11, f"session:{SESSION}")
    counts = ("turn_count", "tool_call_count")
    fact = expected_facts(world)["fact_session"][of_session]
    assert [fact[name] for name in counts] == [0, 5]
    world.execute(
        "INSERT INTO archived_events (id, session_id, sequence, event_type, ts, created_at)"
        " VALUES (%s, %s, 9, 'turn.completed', %s, %s)",
        (ROW, SESSION, LATE, LATE),
    )
    fact = expected_facts(world)["fact_session"][of_session]
    assert [fact[name] for name in counts] == [2, 5]


def test_what_cannot_be_stored_has_no_fact(world: Connection, event: Callable[..., None]) -> None:
    incompressible = "".join(map(chr, range(0x4E00, 0x4E00 + 1700)))
    event("tool.completed", json_text({"tool_name": "x" * 20_000}))
    event("tool.completed", json_text({"tool_name": incompressible}), id_=_uuid(1))
    event("tool.completed", json_text({"capability_id": incompressible}), id_=_uuid(2))
    event("tool.completed", json_text({"display_name": incompressible}), id_=_uuid(3))
    event(
        "turn.completed",
        '{"usage": {"input_tokens": 9223372036854775807, "output_tokens": 1}}',
        id_=_uuid(4),
    )
    assert unstorable_sources(world) == {("event", str(_uuid(number))) for number in (1, 2, 4)}
    facts = expected_facts(world)
    assert not facts["fact_turn"]
    assert not facts["fact_capability_usage"]
    stored = {(11, f"event:{ROW}"), (11, f"event:{_uuid(3)}")}
    assert facts["fact_tool_call"].keys() == stored
    alone = expected_facts(world, each_table_alone=True)
    assert alone["fact_tool_call"].keys() == stored | {(11, f"event:{_uuid(2)}")}
    assert not alone["fact_capability_usage"]


def test_adversarial_sources_can_all_be_stored(world: Connection) -> None:
    load_adversarial_sources(world, seed=1)
    load_adversarial_sources(world, seed=2, sessions=5, events_per_session=5)
    assert not unstorable_sources(world)
    facts = expected_facts(world)
    assert len(facts["fact_session"]) == 2 + 40 + 5
    assert all(len(facts[table]) > 100 for table in facts if table != "fact_session")
    kinds = {row["capability_usage_kind"] for row in facts["fact_capability_usage"].values()}
    assert kinds == USAGE_KINDS
    assert any(row["tool_call_count"] == 2 for row in facts["fact_turn"].values())


def test_members_of_adversarial_events_are_read_as_postgresql_reads_them(
    world: Connection,
) -> None:
    load_adversarial_sources(world, seed=3)
    rows = world.execute(
        "SELECT data::text, key, data ->> key FROM events, unnest(%s::text[]) AS key",
        (["turn_id", "status", "capability_id", "records", "usage", "duration_ms", ""],),
    ).fetchall()
    assert len(rows) > 5_000
    for data, key, text in rows:
        assert json_text(parse_json(data)) == data
        assert text_of(parse_json(data), key) == text


def test_unstorable_sources_are_the_ones_named(world: Connection) -> None:
    load_adversarial_sources(world, seed=4, sessions=3, events_per_session=3)
    failing = load_unstorable_sources(world, seed=4)
    assert len(failing) == len(set(failing))
    assert unstorable_sources(world) == set(failing)
