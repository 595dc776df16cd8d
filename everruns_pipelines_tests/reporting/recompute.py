"""The oracle: every reporting fact, recomputed in plain Python from the source rows.

Written from the specification alone, so that it can contradict the projections: it shares
nothing with them. It is slow and obvious on purpose. Only one question goes back to PostgreSQL:
whether a row with a very long text or a number beyond bigint can be stored at all; an empty copy
of the fact table answers it, since how far a text compresses is the server's affair.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads

from everruns_pipelines.databases.postgres import Connection

FACT_TABLES = (
    "fact_llm_generation",
    "fact_tool_call",
    "fact_turn",
    "fact_session",
    "fact_budget_posting",
    "fact_capability_usage",
)
USAGE_KINDS = frozenset({"configured", "resolved", "exposed", "invoked", "effect_ran"})
TURN_STATUSES = {
    "turn.completed": "completed",
    "turn.failed": "failed",
    "turn.cancelled": "cancelled",
}

FactKey: TypeAlias = tuple[int, str]
FactRow: TypeAlias = dict[str, object]
Facts: TypeAlias = dict[str, dict[FactKey, FactRow]]
Source: TypeAlias = tuple[str, str]
"""A source type and the id of one of its rows."""

_Row: TypeAlias = dict[str, Any]
_BIGINT = range(-(2**63), 2**63)
_SHORT = 500
"""Bytes of a text that fits into any index beside any other such text."""


# What must be there, what is there, and how the two differ.


def expected_facts(connection: Connection, *, each_table_alone: bool = False) -> Facts:
    """The facts that the source rows call for, by table, organization and source key.

    A source row of which one fact cannot be stored has none, since its facts commit together.

    Args:
        each_table_alone: such a row lacks facts in the table that refuses it only, as when a day
            of each fact table is materialized by itself.
    """
    facts = list(_all_facts(_Sources.read(connection)))
    refused = {
        (fact.source, fact.table if each_table_alone else "")
        for fact in _refused(connection, facts)
    }
    expected: Facts = {table: {} for table in FACT_TABLES}
    for fact in facts:
        if (fact.source, fact.table if each_table_alone else "") not in refused:
            assert fact.key not in expected[fact.table], f"{fact.table} {fact.key} twice"
            expected[fact.table][fact.key] = fact.row
    return expected


def unstorable_sources(connection: Connection) -> set[Source]:
    """The source rows of which some fact cannot be stored: these must fail, and no others."""
    facts = list(_all_facts(_Sources.read(connection)))
    return {fact.source for fact in _refused(connection, facts)}


def actual_facts(connection: Connection) -> Facts:
    """The facts that are stored, in the form of `expected_facts`."""
    actual: Facts = {}
    for table in FACT_TABLES:
        rows = _read_table(connection, table)
        for row in rows:
            del row["projected_at"]
        actual[table] = {(row["org_id"], row["source_key"]): row for row in rows}
    return actual


def differences(
    connection: Connection,
    *,
    limit: int = 20,
    orphans: bool = False,
    each_table_alone: bool = False,
) -> list[str]:
    """What is missing, unexpected or wrong in the fact tables, a line each; empty if all is right.

    Args:
        limit: lines at most; one more says how many there are besides.
        orphans: facts whose source row is gone are allowed.
        each_table_alone: as for `expected_facts`.
    """
    expected = expected_facts(connection, each_table_alone=each_table_alone)
    actual = actual_facts(connection)
    allowed = _Origins.read(connection)
    lines: list[str] = []
    for table in FACT_TABLES:
        for key in sorted(expected[table].keys() | actual[table].keys()):
            wanted, found = expected[table].get(key), actual[table].get(key)
            name = f"{table} {key[0]} {_shortened(key[1])}"
            if found is None:
                lines.append(f"{name}: missing")
            elif wanted is None:
                if not allowed.tolerate(key[1], orphans=orphans):
                    lines.append(f"{name}: unexpected")
            else:
                lines.extend(f"{name}: {difference}" for difference in _compared(wanted, found))
    if len(lines) > limit:
        lines[limit:] = [f"... and {len(lines) - limit} more"]
    return lines


def _compared(wanted: FactRow, found: FactRow) -> Iterator[str]:
    absent = object()
    for column in sorted(wanted.keys() | found.keys()):
        value, other = wanted.get(column, absent), found.get(column, absent)
        if absent in (value, other):
            yield f"{column} is known to one side only"
        elif not _equal(value, other):
            yield f"{column} is {_shortened(other)}, not {_shortened(value)}"


def _equal(value: object, other: object) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return value == other or (math.isnan(value) and math.isnan(other))
    return type(value) is type(other) and value == other


def _shortened(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"


@dataclass(frozen=True)
class _Origins:
    """Which source rows there are, to judge facts that nothing calls for."""

    present: frozenset[str]

    @classmethod
    def read(cls, connection: Connection) -> "_Origins":
        sources = _Sources.read(connection)
        tables = {
            "event": sources.events,
            "session": sources.sessions.values(),
            "llm_generation": sources.generations,
            "usage_ledger": sources.postings,
        }
        return cls(
            frozenset(f"{prefix}:{row['id']}" for prefix, rows in tables.items() for row in rows)
        )

    def tolerate(self, source_key: str, *, orphans: bool) -> bool:
        return orphans and ":".join(source_key.split(":")[:2]) not in self.present


# JSON as PostgreSQL keeps it: numbers are decimal text, never floating point.


@dataclass(frozen=True)
class Number:
    """A JSON number, by the text PostgreSQL prints for it (`1e3` is stored as `1000`)."""

    text: str


Json: TypeAlias = "Number | str | bool | list[Json] | dict[str, Json] | None"


def parse_json(text: str | bytes) -> Json:
    """The value of a JSON text, its numbers kept as they are written."""
    value: Json = json.loads(text, parse_int=Number, parse_float=Number)
    return value


def json_text(value: Json) -> str:
    """A JSON text as PostgreSQL prints jsonb (the order of keys is the value's own)."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case Number():
            return value.text
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(json_text, value))}]"
        case dict():
            members = (f"{json_text(key)}: {json_text(item)}" for key, item in value.items())
            return f"{{{', '.join(members)}}}"


def member(value: Json, key: str) -> Json:
    """The member of an object; nothing in any other value has members."""
    return value.get(key) if isinstance(value, dict) else None


def text_of(value: Json, key: str) -> str | None:
    """The member as text, as `->>` gives it: a string as it is, null as no text."""
    found = member(value, key)
    if found is None or isinstance(found, str):
        return found
    return json_text(found)


def number_of(value: Json, key: str, otherwise: int = 0) -> int:
    """The member as a whole number: ASCII digits only, within bigint; else `otherwise`."""
    text = text_of(value, key)
    if text is None or re.fullmatch("[0-9]+", text) is None:
        return otherwise
    digits = text.lstrip("0") or "0"
    if len(digits) > 19 or int(digits) not in _BIGINT:
        return otherwise
    return int(digits)


# The source rows.


def _read_table(connection: Connection, table: str) -> list[_Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        set_json_loads(parse_json, cursor)
        return cursor.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))).fetchall()


def _by_id(rows: Iterable[_Row]) -> dict[UUID, _Row]:
    return {row["id"]: row for row in rows}


@dataclass(frozen=True)
class _Sources:
    """Every canonical row that a fact can depend on."""

    sessions: dict[UUID, _Row]
    events: list[_Row]
    """Of both tables, as far as their session stands."""
    archived_sessions: frozenset[UUID]
    """Sessions some of whose events are archived."""
    generations: list[_Row]
    postings: list[_Row]
    agents: dict[UUID, _Row]
    harnesses: dict[UUID, _Row]
    budgets: dict[UUID, _Row]
    agent_capabilities: list[_Row]
    harness_capabilities: list[_Row]
    capability_names: dict[FactKey, str]
    """The name of a capability that has one, by organization and capability id."""

    @classmethod
    def read(cls, connection: Connection) -> "_Sources":
        names: dict[FactKey, str] = {}
        for row in _read_table(connection, "mcp_servers"):
            names[row["org_id"], f"mcp:{row['id']}"] = row["name"]
        for row in _read_table(connection, "skills"):
            names[row["org_id"], f"skill:{row['id']}"] = row["name"]
        for row in _read_table(connection, "declarative_capabilities"):
            shown = row["name"] if row["display_name"] is None else row["display_name"]
            names[row["org_id"], f"declarative:{row['name']}"] = shown
        sessions = _by_id(_read_table(connection, "sessions"))
        archived = _read_table(connection, "archived_events")
        events = [
            row
            for row in (*_read_table(connection, "events"), *archived)
            if row["session_id"] in sessions
        ]
        return cls(
            sessions=sessions,
            events=events,
            archived_sessions=frozenset(row["session_id"] for row in archived),
            generations=_read_table(connection, "llm_generations"),
            postings=_read_table(connection, "usage_ledger"),
            agents=_by_id(_read_table(connection, "agents")),
            harnesses=_by_id(_read_table(connection, "harnesses")),
            budgets=_by_id(_read_table(connection, "budgets")),
            agent_capabilities=_read_table(connection, "agent_capabilities"),
            harness_capabilities=_read_table(connection, "harness_capabilities"),
            capability_names=names,
        )

    def session(self, org_id: int, id_: UUID | None) -> _Row:
        """The session if it is the organization's, else a row of which nothing is known."""
        return _of_org(self.sessions, org_id, id_)

    def names(self, org_id: int, agent_id: UUID | None, harness_id: UUID | None) -> FactRow:
        return {
            "agent_name_snapshot": _of_org(self.agents, org_id, agent_id).get("name"),
            "harness_name_snapshot": _of_org(self.harnesses, org_id, harness_id).get("name"),
        }

    def dimensions(self, org_id: int, session: _Row) -> FactRow:
        """What a fact takes over from its session."""
        agent_id, harness_id = session.get("agent_id"), session.get("harness_id")
        return {
            "user_id": session.get("resolved_owner_user_id"),
            "principal_id": session.get("owner_principal_id"),
            "agent_id": agent_id,
            "harness_id": harness_id,
            **self.names(org_id, agent_id, harness_id),
            "app_id": session.get("app_id"),
            "blueprint_id": session.get("blueprint_id"),
        }


def _of_org(rows: dict[UUID, _Row], org_id: int, id_: UUID | None) -> _Row:
    row = rows.get(id_) if id_ is not None else None
    return row if row is not None and row["org_id"] == org_id else {}


# The facts.


@dataclass(frozen=True)
class _Fact:
    table: str
    source: Source
    row: FactRow

    @property
    def key(self) -> FactKey:
        org_id, source_key = self.row["org_id"], self.row["source_key"]
        assert isinstance(org_id, int)
        assert isinstance(source_key, str)
        return org_id, source_key


def _all_facts(sources: _Sources) -> Iterator[_Fact]:
    yield from _session_facts(sources)
    yield from _event_facts(sources)
    yield from _generation_facts(sources)
    yield from _posting_facts(sources)


def _times(created_at: datetime) -> FactRow:
    return {"created_at": created_at, "time_bucket_day": created_at.astimezone(UTC).date()}


def _session_facts(sources: _Sources) -> Iterator[_Fact]:
    turns, tool_calls = (
        Counter(
            event["session_id"]
            for event in sources.events
            if event["session_id"] in sources.archived_sessions and event["event_type"] in types
        )
        for types in (TURN_STATUSES, ("tool.completed",))
    )
    for session in sources.sessions.values():
        source = ("session", str(session["id"]))
        org_id: int = session["org_id"]
        shared: FactRow = {
            "org_id": org_id,
            "session_id": session["id"],
            **sources.dimensions(org_id, session),
            **_times(session["created_at"]),
        }
        yield _Fact(
            "fact_session",
            source,
            shared
            | {
                "source_key": f"session:{session['id']}",
                "session_status": session["status"],
                "started_at": session["started_at"],
                "finished_at": session["finished_at"],
                "last_active_at": session["updated_at"],
                "session_count": 1,
                "duration_ms": _milliseconds(session["started_at"], session["finished_at"]),
                # Retention lowers the row's counters; what happened has happened.
                "turn_count": max(session["turn_count"], turns[session["id"]]),
                "tool_call_count": max(session["tool_call_count"], tool_calls[session["id"]]),
            }
            | _tokens(session, "total_"),
        )
        for scope, capability_id in _configured(sources, session):
            yield _Fact(
                "fact_capability_usage",
                source,
                shared
                | {
                    "source_key": f"session:{session['id']}:configured:{scope}:{capability_id}",
                    "turn_id": None,
                    "capability_id": capability_id,
                    "capability_name_snapshot": sources.capability_names.get(
                        (org_id, capability_id), capability_id
                    ),
                    "capability_usage_kind": "configured",
                    "tool_name": None,
                    "usage_count": 1,
                    "duration_ms": 0,
                },
            )


def _milliseconds(started_at: datetime | None, finished_at: datetime | None) -> int:
    if started_at is None or finished_at is None:
        return 0
    microseconds = (finished_at - started_at) // timedelta(microseconds=1)
    return max(0, (microseconds + 500) // 1000)


def _tokens(row: _Row, prefix: str = "") -> FactRow:
    """The four kinds of tokens and their sum, of a table that counts them."""
    kinds = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens")
    counts: dict[str, int] = {kind: row[f"{prefix}{kind}"] for kind in kinds}
    return {**counts, "total_tokens": sum(counts.values())}


def _configured(sources: _Sources, session: _Row) -> Iterator[tuple[str, str]]:
    """Scope and id of every capability of a session, once each."""
    for row in sources.agent_capabilities:
        if row["agent_id"] == session["agent_id"]:
            yield "agent", row["capability_id"]
    for row in sources.harness_capabilities:
        if row["harness_id"] == session["harness_id"]:
            yield "harness", row["capability_id"]
    own: Json = session["capabilities"]
    if isinstance(own, list):
        for capability_id in dict.fromkeys(map(_capability_reference, own)):
            if capability_id is not None:
                yield "session", capability_id


def _capability_reference(element: Json) -> str | None:
    """The capability that an element of `sessions.capabilities` names."""
    reference = member(element, "ref") if isinstance(element, dict) else element
    return reference if isinstance(reference, str) and reference else None


def _event_facts(sources: _Sources) -> Iterator[_Fact]:
    tool_calls = Counter(
        (event["session_id"], _tool_turn(event))
        for event in sources.events
        if event["event_type"] == "tool.completed"
    )
    for event in sources.events:
        session = sources.sessions[event["session_id"]]
        org_id: int = session["org_id"]
        shared: FactRow = {
            "org_id": org_id,
            "source_key": f"event:{event['id']}",
            "session_id": session["id"],
            **sources.dimensions(org_id, session),
            **_times(event["ts"]),
        }
        source = ("event", str(event["id"]))
        if event["event_type"] in TURN_STATUSES:
            turn_id = text_of(event["data"], "turn_id")
            if turn_id is None:
                turn_id = text_of(event["context"], "turn_id")
            calls = 0 if turn_id is None else tool_calls[event["session_id"], turn_id]
            yield _Fact("fact_turn", source, shared | _turn(event, turn_id, calls))
        if event["event_type"] == "tool.completed":
            yield _Fact("fact_tool_call", source, shared | _tool_call(event))
        for suffix, usage in _capability_usages(event):
            yield _Fact(
                "fact_capability_usage",
                source,
                shared
                | {"source_key": f"event:{event['id']}:{suffix}", "turn_id": _tool_turn(event)}
                | usage,
            )


def _tool_turn(event: _Row) -> str | None:
    """The turn of a tool or capability event: its context's, else its data's."""
    turn_id = text_of(event["context"], "turn_id")
    return text_of(event["data"], "turn_id") if turn_id is None else turn_id


def _turn(event: _Row, turn_id: str | None, tool_calls: int) -> FactRow:
    data: Json = event["data"]
    usage = member(data, "usage")
    status = TURN_STATUSES[event["event_type"]]
    input_tokens, output_tokens = (
        number_of(usage, "input_tokens"),
        number_of(usage, "output_tokens"),
    )
    return {
        "turn_id": turn_id,
        "turn_status": status,
        "turn_count": 1,
        "duration_ms": number_of(data, "duration_ms"),
        "iterations": number_of(data, "iterations"),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "cache_read_tokens": number_of(usage, "cache_read_tokens"),
        "cache_creation_tokens": number_of(usage, "cache_creation_tokens"),
        "total_tokens": input_tokens + output_tokens,
        "tool_call_count": tool_calls,
        "success_count": int(status == "completed"),
        "error_count": int(status != "completed"),
    }


def _tool_call(event: _Row) -> FactRow:
    data: Json = event["data"]
    status, success = text_of(data, "status"), text_of(data, "success")
    derived = "success" if success == "true" else "error"
    return {
        "turn_id": _tool_turn(event),
        "tool_call_id": text_of(data, "tool_call_id"),
        "tool_name": text_of(data, "tool_name"),
        "tool_display_name_snapshot": text_of(data, "display_name"),
        "tool_status": derived if status is None else status,
        "capability_id": text_of(data, "capability_id"),
        "capability_name_snapshot": text_of(data, "capability_name"),
        "call_count": 1,
        "success_count": int(status == "success" or success == "true"),
        "error_count": int(status == "error" or success == "false"),
        "timeout_count": int(status == "timeout"),
        "cancelled_count": int(status == "cancelled"),
        "duration_ms": number_of(data, "duration_ms"),
    }


def _capability_usages(event: _Row) -> Iterator[tuple[str, FactRow]]:
    """The capability facts of an event: the end of the source key, and the columns."""
    data: Json = event["data"]
    if event["event_type"] == "tool.completed":
        capability_id = text_of(data, "capability_id")
        if capability_id is not None:
            yield (
                "invoked",
                {
                    "capability_id": capability_id,
                    "capability_name_snapshot": text_of(data, "capability_name"),
                    "capability_usage_kind": "invoked",
                    "tool_name": text_of(data, "tool_name"),
                    "usage_count": 1,
                    "duration_ms": number_of(data, "duration_ms"),
                },
            )
    elif event["event_type"] == "output.message.replaced":
        capability_id = text_of(data, "guardrail_capability_id")
        if capability_id is not None:
            yield (
                "effect_ran",
                {
                    "capability_id": capability_id,
                    "capability_name_snapshot": capability_id,
                    "capability_usage_kind": "effect_ran",
                    "tool_name": None,
                    "usage_count": 1,
                    "duration_ms": 0,
                },
            )
    elif event["event_type"] == "capability.usage":
        records = member(data, "records")
        for position, record in enumerate(records if isinstance(records, list) else [], start=1):
            capability_id = text_of(record, "capability_id")
            kind = text_of(record, "usage_kind")
            if capability_id is not None and kind in USAGE_KINDS:
                yield (
                    f"capability_usage:{position}",
                    {
                        "capability_id": capability_id,
                        "capability_name_snapshot": text_of(record, "capability_name"),
                        "capability_usage_kind": kind,
                        "tool_name": text_of(record, "tool_name"),
                        "usage_count": number_of(record, "usage_count", otherwise=1),
                        "duration_ms": number_of(record, "duration_ms"),
                    },
                )


def _generation_facts(sources: _Sources) -> Iterator[_Fact]:
    for row in sources.generations:
        org_id: int = row["org_id"]
        session = sources.session(org_id, row["session_id"])
        yield _Fact(
            "fact_llm_generation",
            ("llm_generation", str(row["id"])),
            {
                "org_id": org_id,
                "source_key": f"llm_generation:{row['id']}",
                "session_id": row["session_id"],
                "turn_id": None if row["turn_id"] is None else str(row["turn_id"]),
                **sources.dimensions(org_id, session),
                **_times(row["created_at"]),
                "model": row["model"],
                "provider": row["provider"],
                "finish_reason": row["finish_reason"],
                **_tokens(row),
                "duration_ms": 0 if row["duration_ms"] is None else row["duration_ms"],
                "time_to_first_token_ms": 0,
                "success_count": 1,
                "error_count": 0,
            },
        )


def _posting_facts(sources: _Sources) -> Iterator[_Fact]:
    for row in sources.postings:
        org_id: int = row["org_id"]
        session = sources.session(org_id, row["session_id"])
        budget = _of_org(sources.budgets, org_id, row["budget_id"])
        # To PostgreSQL NaN is greater than every number, so it is no credit.
        debit = not row["amount"] < 0
        yield _Fact(
            "fact_budget_posting",
            ("usage_ledger", str(row["id"])),
            {
                "org_id": org_id,
                "source_key": f"usage_ledger:{row['id']}",
                "session_id": row["session_id"],
                "user_id": row["user_id"],
                "principal_id": row["principal_id"],
                "agent_id": row["agent_id"],
                "harness_id": row["harness_id"],
                **sources.names(org_id, row["agent_id"], row["harness_id"]),
                "app_id": session.get("app_id"),
                "blueprint_id": session.get("blueprint_id"),
                **_times(row["created_at"]),
                "budget_id": row["budget_id"],
                "budget_subject_type": budget.get("subject_type"),
                "budget_subject_id": budget.get("subject_id"),
                "currency": row["currency"],
                "meter_source": row["meter_source"],
                "ref_type": row["ref_type"],
                "amount": row["amount"],
                "debit_count": int(debit),
                "credit_count": int(not debit),
            },
        )


# What cannot be stored.


def _refused(connection: Connection, facts: Iterable[_Fact]) -> list[_Fact]:
    """The facts that their tables refuse; nothing stays written."""
    doubtful = [fact for fact in facts if _is_doubtful(fact.row)]
    if not doubtful:
        return []
    with connection.transaction(force_rollback=True):
        for table in {fact.table for fact in doubtful}:
            connection.execute(
                sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {} INCLUDING ALL)").format(
                    _twin(table), sql.Identifier(table)
                )
            )
        return [fact for fact in doubtful if not _is_stored(connection, fact)]


def _is_doubtful(row: FactRow) -> bool:
    return any(
        len(value.encode()) > _SHORT if isinstance(value, str) else value not in _BIGINT
        for value in row.values()
        if isinstance(value, str | int)
    )


def _is_stored(connection: Connection, fact: _Fact) -> bool:
    insert = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        _twin(fact.table),
        sql.SQL(", ").join(map(sql.Identifier, fact.row)),
        sql.SQL(", ").join(sql.Placeholder() for _ in fact.row),
    )
    try:
        with connection.transaction():
            connection.execute(insert, list(fact.row.values()))
    except (errors.ProgramLimitExceeded, errors.NumericValueOutOfRange):
        return False
    return True


def _twin(table: str) -> sql.Identifier:
    return sql.Identifier(f"oracle_{table}")
