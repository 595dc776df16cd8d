"""Source rows that are allowed and nasty: whatever the platform's tables let in, made from a seed.

Every row of `load_adversarial_sources` can be projected, however odd it is. The rows that cannot
come apart, from `load_unstorable_sources`, since of those one has to know which they are.
"""

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from psycopg import sql

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines_tests.reporting.recompute import Json, Number, Source, json_text

_T = TypeVar("_T")
_Row: TypeAlias = dict[str, Any]
_RowMaker: TypeAlias = Callable[[], _Row]
_Value: TypeAlias = "Json | _Absent"
"""What a key of an object has, if the object has the key."""
_Members: TypeAlias = dict[str, _Value]


class _Absent:
    """In place of a value: the object does not have the key."""


ABSENT = _Absent()
ORGANIZATIONS = 3

FIRST_DAY = datetime(2026, 3, 1, tzinfo=UTC)
"""Most rows are of this day and the four after it."""

_BIGGEST, _TOO_BIG = "9223372036854775807", "9223372036854775808"
_THIRTY_DIGITS = "123456789012345678901234567890"

_NASTY_TEXTS = (
    "plain",
    "",
    " ",
    "null",
    "NULL",
    "turn_id",
    "capability_id",
    "o'clock",
    '"quoted"',
    "back\\slash",
    "%s {} %(name)s",
    "tab\tand\nline",
    "\x01\x7f",
    "été 日本語 🙂",
    "e\u0301 \u202eright to left",
    "event:x:invoked",
    "'; DROP TABLE events; --",
    "\\N",
)
_CAPABILITY_OF_THE_LONGEST = "declarative:" + "c" * 59
"""71 characters."""
_LONG_TEXTS = ("x" * 20_000, "ab" * 3_000, "día " * 2_000)
"""Longer than an index takes, but they compress well."""

# Each number is counted by its text: see which of them are digits only.
_COUNTS: tuple[_Value, ...] = (
    *map(Number, ("0", "7", "250", "1e3", "1E+2", "1.5e1", "-0")),
    *map(Number, ("-3", "1.0", "1.5", "0.000", "-0.0", "1e-3", "1e400", _TOO_BIG, _THIRTY_DIGITS)),
    *("12", "007", "0" * 30 + "7", "+5", "-5", "1.0", "1e3", "0x10", "1_000", "", " 12", "12 "),
    *(
        "12\n",
        "\n12",
        "1 2",
        "٣٤",
        "\uff11\uff12",
        "²",
        "true",
        _TOO_BIG,
        _THIRTY_DIGITS,
        "9" * 6_000,
    ),
    *(True, False, None, ABSENT, ABSENT),
    *([], [Number("5")], ["5"], {}, {"value": Number("5")}),
)
_BIGGEST_COUNTS: tuple[_Value, ...] = (Number(_BIGGEST), _BIGGEST, "0" + _BIGGEST)

_STATUSES: tuple[_Value, ...] = (
    *("success", "error", "timeout", "cancelled"),
    *("canceled", "SUCCESS", "Error ", "timed_out", "", "true", "взлёт"),
    *(None, ABSENT, ABSENT, True, False, Number("1"), Number("1.0")),
    *({"status": "error"}, ["error"], [], {}),
)
_SUCCESSES: tuple[_Value, ...] = (
    *(True, False, "true", "false", "TRUE", "False", " true", "true\n", "t", "yes", "1", ""),
    *(None, ABSENT, ABSENT, Number("1"), Number("0"), ["true"], {"true": True}),
)
_KINDS: tuple[_Value, ...] = (
    *("configured", "resolved", "exposed", "invoked", "effect_ran") * 3,
    *("INVOKED", " invoked", "used", "", None, ABSENT, True, Number("5"), ["invoked"], {}),
)
_TURNS: tuple[_Value, ...] = (
    *("turn-1", "turn-1", "turn-2", "turn-2", "TURN-1", "5", "", "null", "true"),
    *(Number("5"), Number("5.0"), True, None, None, ABSENT, ABSENT, ABSENT),
    *(["turn-1"], {"turn_id": "turn-1"}),
)
_PROJECTED_TYPES = (
    *("tool.completed", "capability.usage") * 4,
    *("output.message.replaced", "turn.completed", "turn.failed", "turn.cancelled") * 2,
)
_OTHER_TYPES = (
    *("tool.started", "turn.started", "input.message", "output.message.completed", ""),
    *("TOOL.COMPLETED", "tool.completed ", "tool_completed", "turn.completed.v2", "capability"),
)
_AMOUNTS = (
    *(0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, -5e-324, 1.7976931348623157e308),
    *(12.5, -12.5, 0.1 + 0.2, 1e15 + 0.3),
)
_TOKENS = (0, 0, 1, 42, 10**12, 2**60, -1)
# In microseconds; the halves tell rounding half up from half to even.
_DURATIONS = (
    *(0, 1, 499, 500, 501, 1_499, 1_500, 2_499, 2_500, 3_500, 999_999_500, 86_400_000_000),
    *(-1, -499, -500, -501, -1_500, -86_400_000_000, 50 * 366 * 86_400_000_000 + 500),
)


def load_adversarial_sources(
    connection: Connection, *, seed: int, sessions: int = 40, events_per_session: int = 30
) -> None:
    """Add organizations with sources of every kind, in one transaction.

    Another seed can be loaded beside it. Every fifth session has no events.
    """
    with transaction(connection):
        world = _World(connection, Random(f"adversarial {seed}"))
        session_rows = [world.session() for _ in range(sessions)]
        _copy(connection, "sessions", session_rows)
        busy = [row for number, row in enumerate(session_rows) if number % 5]
        events = [
            world.event(session["id"], sequence)
            for session in busy
            for sequence in range(1, events_per_session + 1)
        ]
        world.random.shuffle(events)
        _copy(connection, "events", events)
        archived = [world.event(session["id"], events_per_session + 1) for session in busy[::2]]
        # Of sessions that are gone.
        archived += [world.event(world.stranger(), 1) for _ in range(2)]
        _copy(connection, "archived_events", archived)
        _copy(
            connection,
            "llm_generations",
            [world.generation(session_rows) for _ in range(3 * sessions)],
        )
        journal, postings = zip(
            *(world.posting(session_rows) for _ in range(3 * sessions)), strict=True
        )
        _copy(connection, "usage_journal", journal)
        _copy(connection, "usage_ledger", postings)


def load_unstorable_sources(connection: Connection, seed: int) -> list[Source]:
    """Add sources that cannot be stored among ones that can, in one transaction.

    Returns:
        The source type and the id of each row that must fail; every other row must not, some of
        which are as large where no index minds.
    """
    with transaction(connection):
        world = _World(connection, Random(f"unstorable {seed}"))
        healthy, overflowing, overlong, roomy = (world.session() for _ in range(4))
        healthy["capabilities"] = '["plain"]'
        overflowing |= {"total_input_tokens": 2**63 - 1, "total_cache_creation_tokens": 1}
        overflowing |= {"total_output_tokens": 0, "total_cache_read_tokens": 0}
        overlong["capabilities"] = json_text(["plain", {"ref": world.incompressible()}])
        roomy |= {"blueprint_id": world.incompressible(), "capabilities": '["plain"]'}
        _copy(connection, "sessions", [healthy, overflowing, overlong, roomy])
        failing = [("session", str(row["id"])) for row in (overflowing, overlong)]

        good, bad = _storable_and_unstorable_events(world, healthy["id"])
        _copy(connection, "events", [row for pair in zip(good, bad, strict=True) for row in pair])
        failing += [("event", str(row["id"])) for row in bad]

        generations = [world.generation([healthy]) for _ in range(5)]
        generations[0] |= {"model": world.incompressible()}
        generations[1] |= {"provider": world.incompressible()}
        generations[2] |= {"output_tokens": 2**63 - 1, "cache_read_tokens": 1}
        generations[2] |= {"input_tokens": 0, "cache_creation_tokens": 0}
        generations[3] |= {"finish_reason": world.incompressible()}
        _copy(connection, "llm_generations", generations)
        failing += [("llm_generation", str(row["id"])) for row in generations[:3]]

        journal, posting = world.posting([healthy])
        posting |= {"ref_type": world.incompressible(), "meter_source": world.incompressible()}
        _copy(connection, "usage_journal", [journal])
        _copy(connection, "usage_ledger", [posting])
        return failing


def _storable_and_unstorable_events(
    world: "_World", session_id: UUID
) -> tuple[list[_Row], list[_Row]]:
    def record(capability_id: Json, **others: Json) -> Json:
        return {"capability_id": capability_id, "usage_kind": "exposed", **others}

    def overlong() -> str:
        return world.incompressible()

    unstorable: list[tuple[str, dict[str, Json]]] = [
        ("tool.completed", {"tool_name": overlong()}),
        ("tool.completed", {"status": overlong(), "capability_id": "plain"}),
        ("tool.completed", {"tool_name": "plain", "capability_id": overlong()}),
        ("tool.completed", {"tool_name": {"nested": overlong()}}),
        ("capability.usage", {"records": [record("a"), record(overlong()), record("b")]}),
        ("output.message.replaced", {"guardrail_capability_id": overlong()}),
    ]
    for type_ in ("turn.completed", "turn.failed", "turn.cancelled"):
        usage: Json = {"input_tokens": Number(_BIGGEST), "output_tokens": "1"}
        unstorable.append((type_, {"usage": usage}))
    storable: list[tuple[str, dict[str, Json]]] = [
        ("tool.completed", {"tool_call_id": overlong(), "display_name": overlong()}),
        ("tool.completed", {"capability_name": overlong(), "capability_id": "plain"}),
        ("tool.completed", {"turn_id": overlong(), "result": overlong()}),
        ("capability.usage", {"records": [record("a", tool_name=overlong())]}),
        ("capability.usage", {"records": [{"capability_id": overlong(), "usage_kind": "none"}]}),
        ("output.message.replaced", {"replacement": overlong()}),
        ("turn.completed", {"turn_id": overlong(), "usage": {"input_tokens": Number(_BIGGEST)}}),
        ("turn.failed", {"usage": {"input_tokens": Number(_BIGGEST), "output_tokens": _TOO_BIG}}),
        ("turn.cancelled", {}),
    ]

    def event(number: int, type_: str, data: Json) -> _Row:
        return world.event(session_id, number) | {
            "event_type": type_,
            "data": json_text(data),
            "context": "{}",
        }

    numbered = list(enumerate(storable + unstorable, start=1))
    rows = [event(number, type_, data) for number, (type_, data) in numbered]
    return rows[: len(storable)], rows[len(storable) :]


def _copy(connection: Connection, table: str, rows: Sequence[_Row]) -> None:
    """Insert rows of the same columns in one statement."""
    if not rows:
        return
    columns = list(rows[0])
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row([row[column] for column in columns])


@dataclass(frozen=True)
class _Owned:
    """An id and the organization that it belongs to."""

    id: UUID
    org_id: int


class _World:
    """A few organizations with what sessions refer to, and a maker of source rows in them.

    References go astray now and then: to another organization, or to nothing.
    """

    def __init__(self, connection: Connection, random: Random) -> None:
        self.random = random
        self._org_ids = [self._organization(connection) for _ in range(ORGANIZATIONS)]
        self._users = self._load_users(connection)
        self._principals = self._load(connection, "principals", 2, self._principal)
        self._workspaces = self._load(connection, "workspaces", 1, self._workspace)
        self._apps = self._load(connection, "apps", 2, dict)
        self._agents = self._load(connection, "agents", 5, self._agent)
        self._harnesses = self._load(connection, "harnesses", 4, self._harness)
        self._budgets = self._load(connection, "budgets", 3, self._budget)
        self._capability_ids = self._load_capabilities(connection)
        self._load_capability_lists(connection)

    # Chance.

    def _one(self, choices: Sequence[_T]) -> _T:
        return self.random.choice(choices)

    def _likely(self, percent: int) -> bool:
        return self.random.randrange(100) < percent

    def _uuid(self) -> UUID:
        return UUID(int=self.random.getrandbits(128), version=4)

    def _reference(self, owned: Sequence[_Owned], org_id: int) -> UUID:
        """Mostly of the same organization."""
        ours = [item for item in owned if item.org_id == org_id]
        return self._one(ours if self._likely(80) else owned).id

    def _optional_reference(self, owned: Sequence[_Owned], org_id: int) -> UUID | None:
        return self._reference(owned, org_id) if self._likely(80) else None

    def _moment(self) -> datetime:
        day = FIRST_DAY + timedelta(days=self.random.randrange(5))
        return self._one(
            (
                day,
                day + timedelta(microseconds=1),
                day - timedelta(microseconds=1),
                day + timedelta(hours=23, minutes=59, seconds=59, milliseconds=500),
                day + timedelta(seconds=self.random.randrange(86_400)),
                day + timedelta(milliseconds=self.random.randrange(86_400_000)),
                day + timedelta(microseconds=self.random.randrange(86_400_000_000)),
                day.replace(hour=1, tzinfo=timezone(timedelta(hours=14))),
                day.replace(hour=23, tzinfo=timezone(timedelta(hours=-12))),
                day.replace(hour=5, tzinfo=timezone(timedelta(hours=5, minutes=45))),
                datetime(1970, 1, 1, tzinfo=UTC),
                datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
                datetime(2024, 2, 29, 23, 30, tzinfo=UTC),
            )
        )

    def incompressible(self, length: int = 5_000) -> str:
        """A text that no index takes unless it is short."""
        return "".join(self.random.choices(string.ascii_letters + string.digits, k=length))

    def _text(self) -> str:
        """A text that any index takes."""
        if self._likely(94):
            return self._one(_NASTY_TEXTS)
        return self._one((*_LONG_TEXTS, self.incompressible(2_400)))

    def _json(self) -> Json:
        """Any value at all, its texts short."""
        deep: Json = "turn_id"
        for _ in range(100):
            deep = [deep] if self._likely(50) else {"turn_id": deep}
        return self._one(
            (
                *(None, True, False, "", "turn_id", "capability_id", "records"),
                *map(Number, ("0", "-1", "1e400", "1.50")),
                *([], {}, ["capability_id", "turn_id", "status"], [{"capability_id": "plain"}]),
                *({"bb": Number("1e2"), "a": [None, "é\n", True], "": {}}, deep),
            )
        )

    def _text_or_other(self) -> _Value:
        """What stands where a text belongs."""
        if self._likely(75):
            return self._text()
        return self._one((ABSENT, None, True, Number("7"), Number("1.0"), self._json()))

    def _count(self, *, biggest: bool = True) -> _Value:
        if self._likely(30):
            return Number(str(self.random.randrange(10**6)))
        return self._one((*_COUNTS, *_BIGGEST_COUNTS) if biggest else _COUNTS)

    def _object(self, members: _Members) -> Json:
        """Mostly the object; else something that is none, or has other keys."""
        if not self._likely(88):
            return self._json()
        items = [(key, value) for key, value in members.items() if not isinstance(value, _Absent)]
        if self._likely(20):
            items.append((self._one(_NASTY_TEXTS), self._json()))
        self.random.shuffle(items)
        return dict(items)

    # What sessions refer to.

    def _organization(self, connection: Connection) -> int:
        row = connection.execute(
            "INSERT INTO organizations (public_id, name) VALUES (%s, %s) RETURNING org_id",
            (f"org_{self._uuid().hex}", self._one(_NASTY_TEXTS)),
        ).fetchone()
        assert row is not None
        org_id: int = row[0]
        return org_id

    def _load_users(self, connection: Connection) -> list[UUID]:
        ids = [self._uuid() for _ in range(5)]
        _copy(
            connection,
            "users",
            [{"id": id_, "email": f"{id_}@example.org", "name": "User"} for id_ in ids],
        )
        return ids

    def _load(self, connection: Connection, table: str, each: int, row: _RowMaker) -> list[_Owned]:
        owned = [_Owned(self._uuid(), org_id) for org_id in self._org_ids for _ in range(each)]
        _copy(
            connection, table, [{"id": item.id, "org_id": item.org_id, **row()} for item in owned]
        )
        return owned

    def _name(self) -> _Row:
        """A name and a status; only the deleted may share a name."""
        name = self._one(_NASTY_TEXTS)
        if self._likely(10):
            name = "名" * 200
        if self._likely(20):
            return {"name": name, "status": "deleted"}
        return {
            "name": f"{name} {self.random.getrandbits(64):x}",
            "status": self._one(("active", "archived")),
        }

    def _principal(self) -> _Row:
        return {"public_id": f"principal_{self._uuid().hex}", "kind": "user"}

    def _workspace(self) -> _Row:
        return {"public_id": f"wsp_{self._uuid().hex}", "name": self._uuid().hex}

    def _agent(self) -> _Row:
        return {**self._name(), "display_name": "never shown", "system_prompt": "secret"}

    def _harness(self) -> _Row:
        return self._agent()

    def _budget(self) -> _Row:
        return {
            "subject_type": self._one(
                ("session", "agent", "user", "org", "agent_trigger", "app_channel")
            ),
            "subject_id": self._text(),
            "currency": "USD",
            "limit": 1.0,
            "balance": -1.0,
        }

    def _load_capabilities(self, connection: Connection) -> list[str]:
        """Load what capability ids refer to; the ids, some of which refer to nothing."""
        state = ("active", "disabled", "archived", "deleted")

        def server() -> _Row:
            return {"name": f"é {self._uuid().hex}", "url": "", "status": self._one(state)}

        def skill() -> _Row:
            public_id = f"skill_{self._uuid().hex}"
            name = f"s {self.random.getrandbits(64):x}"
            texts = dict.fromkeys(("description", "instructions"), "")
            return {"public_id": public_id, "name": name, "status": self._one(state), **texts}

        servers = self._load(connection, "mcp_servers", 2, server)
        skills = self._load(connection, "skills", 2, skill)
        # A name may be declared in one organization only, or in all, each time shown otherwise.
        names = ("a1", "shared-name", "with_underscore0")
        declared: list[_Row] = [
            {
                "org_id": org_id,
                "public_id": f"cap_{self._uuid().hex}",
                "name": name,
                "display_name": self._one((None, f"Shown {org_id}", "ça \\ va")),
                "description": "",
                "status": self._one(state),
            }
            for number, org_id in enumerate(self._org_ids)
            for name in (*names, f"only-{number}")
        ]
        _copy(connection, "declarative_capabilities", declared)
        references = [
            *(f"mcp:{item.id}" for item in servers),
            *(f"skill:{item.id}" for item in skills),
            *(f"declarative:{row['name']}" for row in declared),
        ]
        one = servers[0].id
        return [
            *references,
            *(f"skill:{one}", f"mcp:{skills[0].id}", f"declarative:{one}", f"{one}"),
            *(f"mcp:{self._uuid()}", f"skill:{self._uuid()}", "declarative:nobody"),
            *(f"mcp:{one}x", f" mcp:{one}", f"mcp:{one}\n", f"MCP:{one}", f"mcp::{one}"),
            *("mcp:", "skill:", "declarative:", "mcp:1234", "skill:not-a-uuid", "mcp:'"),
            *("web_search", "web_search", "способность", "a:b:c", "o'clock", "session:plain"),
        ]

    def _load_capability_lists(self, connection: Connection) -> None:
        fitting = sorted({id_ for id_ in self._capability_ids if len(id_) <= 50})
        for table, column, owners in (
            ("agent_capabilities", "agent_id", self._agents),
            ("harness_capabilities", "harness_id", self._harnesses),
        ):
            rows: list[_Row] = [
                {column: owner.id, "capability_id": capability_id}
                for owner in owners
                for capability_id in self.random.sample(fitting, self.random.randrange(5))
            ]
            _copy(connection, table, rows)

    # Source rows.

    def session(self) -> _Row:
        org_id = self._one(self._org_ids)
        started_at, finished_at = self._span()
        return {
            "id": self._uuid(),
            "org_id": org_id,
            "agent_id": self._optional_reference(self._agents, org_id),
            "harness_id": self._optional_reference(self._harnesses, org_id),
            "app_id": self._optional_reference(self._apps, org_id),
            "blueprint_id": self._one((None, *_NASTY_TEXTS)),
            "owner_principal_id": self._reference(self._principals, org_id),
            "resolved_owner_user_id": self._one((None, *self._users)),
            "workspace_id": self._reference(self._workspaces, org_id),
            "status": self._one(
                ("started", "idle", "waiting_for_tool_results", "resolving_tool_results", "paused")
            ),
            "capabilities": json_text(self._capability_list()),
            "created_at": self._moment(),
            "updated_at": self._moment(),
            "started_at": started_at,
            "finished_at": finished_at,
            "turn_count": self._one((0, 3, 2**62)),
            "tool_call_count": self._one((0, 5, 2**62)),
            "total_input_tokens": self._one(_TOKENS),
            "total_output_tokens": self._one(_TOKENS),
            "total_cache_read_tokens": self._one(_TOKENS),
            "total_cache_creation_tokens": self._one(_TOKENS),
        }

    def _span(self) -> tuple[datetime | None, datetime | None]:
        started_at = self._moment()
        finished_at = started_at + timedelta(microseconds=self._one(_DURATIONS))
        return self._one(
            (
                *[(started_at, finished_at)] * 5,
                (started_at, None),
                (None, finished_at),
                (None, None),
            )
        )

    def _capability_list(self) -> Json:
        if not self._likely(85):
            return self._one((None, True, "web_search", Number("5"), {"ref": "web_search"}, {}))
        elements = [self._capability_element() for _ in range(self.random.randrange(8))]
        return elements + (elements[::-1] if self._likely(30) else [])

    def _capability_element(self) -> Json:
        id_ = self._one(self._capability_ids)
        return self._one(
            (
                *(id_, id_, {"ref": id_}, {"ref": id_, "config": {"ref": "secret"}}),
                *(self._text(), {"ref": self._text()}, self._one(_LONG_TEXTS)),
                *(_CAPABILITY_OF_THE_LONGEST, {"ref": _CAPABILITY_OF_THE_LONGEST}),
                *("", {"ref": ""}, None, True, Number("5"), {"ref": None}, {"ref": Number("5")}),
                *({"ref": ["web_search"]}, {"ref": {"ref": id_}}, {"id": id_}, {"Ref": id_}),
                *([id_], [["ref", id_]], {}, []),
            )
        )

    def stranger(self) -> UUID:
        """The id of nothing."""
        return self._uuid()

    def event(self, session_id: UUID, sequence: int) -> _Row:
        type_ = self._one(_PROJECTED_TYPES if self._likely(90) else _OTHER_TYPES)
        return {
            "id": self._uuid(),
            "session_id": session_id,
            "sequence": sequence,
            "event_type": type_,
            "data": json_text(self._event_data(type_)),
            "context": json_text(self._object({"turn_id": self._turn_id()})),
            "ts": self._moment(),
            "created_at": self._moment(),
        }

    def _turn_id(self) -> _Value:
        if self._likely(97):
            return self._one(_TURNS)
        return self._one((*_LONG_TEXTS, self.incompressible(), self._json()))

    def _event_data(self, type_: str) -> Json:
        members: _Members = {"turn_id": self._turn_id(), "message": "secret"}
        if type_.startswith("turn."):
            members |= {
                "status": self._one(_STATUSES),
                "iterations": self._count(),
                "duration_ms": self._count(),
                "usage": self._object(
                    {
                        "input_tokens": self._count(biggest=False),
                        "output_tokens": self._count(biggest=False),
                        "cache_read_tokens": self._count(),
                        "cache_creation_tokens": self._count(),
                        "total_tokens": self._count(),
                    }
                ),
            }
        elif type_ == "capability.usage":
            members["records"] = self._records()
        elif type_ == "output.message.replaced":
            members["guardrail_capability_id"] = self._capability_id()
        else:
            members |= {
                "tool_call_id": self._text_or_other(),
                "tool_name": self._text_or_other(),
                "display_name": self._text_or_other(),
                "status": self._one(_STATUSES),
                "success": self._one(_SUCCESSES),
                "capability_id": self._capability_id(),
                "capability_name": self._text_or_other(),
                "duration_ms": self._count(),
            }
        return self._object(members)

    def _capability_id(self) -> _Value:
        if self._likely(40):
            return self._one(self._capability_ids)
        return self._text_or_other()

    def _records(self) -> _Value:
        if not self._likely(90):
            return self._one((ABSENT, self._record(), self._json()))
        return [self._record() for _ in range(self._one((0, 1, 3, 6, 40)))]

    def _record(self) -> Json:
        return self._object(
            {
                "capability_id": self._capability_id(),
                "capability_name": self._text_or_other(),
                "usage_kind": self._one(_KINDS),
                "tool_name": self._text_or_other(),
                "usage_count": self._count(),
                "duration_ms": self._count(),
            }
        )

    def _session_of(self, sessions: Sequence[_Row]) -> tuple[int, UUID | None]:
        """An organization, and mostly a session, mostly of it."""
        session = self._one(sessions)
        if self._likely(20):
            return session["org_id"], None
        return session["org_id"] if self._likely(75) else self._one(self._org_ids), session["id"]

    def generation(self, sessions: Sequence[_Row]) -> _Row:
        org_id, session_id = self._session_of(sessions)
        return {
            "id": self._uuid(),
            "org_id": org_id,
            "session_id": session_id,
            "turn_id": self._one((None, self._uuid())),
            "model": self._one((None, self._text())),
            "provider": self._one((None, *_NASTY_TEXTS)),
            "finish_reason": self._one((None, self._text())),
            "input_tokens": self._one(_TOKENS),
            "output_tokens": self._one(_TOKENS),
            "cache_read_tokens": self._one(_TOKENS),
            "cache_creation_tokens": self._one(_TOKENS),
            "duration_ms": self._one((None, 0, 1, -1, 2**31 - 1)),
            "created_at": self._moment(),
        }

    def posting(self, sessions: Sequence[_Row]) -> tuple[_Row, _Row]:
        """A posting, after the journal entry that it belongs to."""
        org_id, session_id = self._session_of(sessions)
        journal_id = self._uuid()
        journal: _Row = {"id": journal_id, "org_id": org_id, "kind": "generation"}
        posting: _Row = {
            "id": self._uuid(),
            "journal_id": journal_id,
            "budget_id": self._optional_reference(self._budgets, org_id),
            "org_id": org_id,
            "session_id": session_id,
            "user_id": self._one((None, *self._users)),
            "principal_id": self._optional_reference(self._principals, org_id),
            "agent_id": self._optional_reference(self._agents, org_id),
            "harness_id": self._optional_reference(self._harnesses, org_id),
            "currency": self._text(),
            "amount": self._one(_AMOUNTS),
            "meter_source": self._text(),
            "ref_type": self._one((None, self._text())),
            "created_at": self._moment(),
        }
        return journal, posting
