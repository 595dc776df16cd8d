"""A believable, seeded reporting data set of any size, for demos, tests and benchmarks.

Three organizations of unequal size, their agents and capabilities, and sessions of about 60 events
each. Sessions are told one after the other in the order they began, and copied a few hundred at a
time, so memory does not grow with the data.
"""

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from random import Random
from typing import Any

from psycopg import sql
from pydantic_core import to_json

from everruns_pipelines.databases.postgres import Connection, transaction
from everruns_pipelines.errors import Refusal

_EVENTS_PER_SESSION = 60
_EVENTS_PER_BATCH = 20_000
_ROWS_PER_PORTION = 200
_PROJECTED_TYPES = frozenset(
    {
        "tool.completed",
        "capability.usage",
        "output.message.replaced",
        "turn.completed",
        "turn.failed",
        "turn.cancelled",
    }
)
_REASONS = {
    "event": "event_projection",
    "session": "session_snapshot",
    "llm_generation": "llm_generation_projection",
    "usage_ledger": "budget_posting_projection",
}
# How busy each hour of a UTC day is, from midnight on.
_HOURS = (2, 1, 1, 1, 2, 3, 6, 12, 20, 26, 28, 26, 20, 24, 28, 28, 26, 22, 16, 12, 9, 7, 5, 3)
_WEEKEND = 0.35

_ORGANIZATIONS = ("Northwind", "Acme", "Lumen")
_SHARES = (62, 29, 9)  # of the sessions
_PEOPLE = 40  # of the largest organization
_FIRST_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Igor", "Jun")
_AGENTS = ("support", "research", "billing", "release-notes", "data-analyst", "onboarding")
_HARNESSES = ("generic", "coding", "chat")
_APPS = ("helpdesk", "handbook", "sales-room")
_BLUEPRINTS = ("ticket-triage", "weekly-report", "code-review")
_BUILTIN = {
    "web_search": "Web search",
    "session_file_system": "File system",
    "python": "Python",
    "memory": "Memory",
    "task_list": "Task list",
}
_MCP_SERVERS = ("github", "linear")
_SKILLS = ("pdf-forms", "release-checklist")
_DECLARATIVE = {"tone-of-voice": "Tone of voice", "refund-rules": None}
_GUARDRAILS = ("pii_guardrail", "prompt_injection_guardrail")
# Tool, what people see, its capability if it has one, its usual duration in ms.
_TOOLS = (
    ("read_file", "Read file", None, 15),
    ("write_file", "Write file", None, 25),
    ("bash", "Run command", None, 1900),
    ("grep", "Search files", None, 60),
    ("list_tickets", "List tickets", None, 320),
    ("send_message", "Send message", None, 210),
    ("web_search", "Search the web", "web_search", 840),
    ("web_fetch", "Fetch page", "web_search", 1300),
    ("python", "Run Python", "python", 2600),
)
_TOOL_CALLS_PER_TURN = (0, 1, 2, 3, 4, 5, 6, 8, 11, 20)
_TOOL_STATUSES = ("success",) * 92 + ("error",) * 5 + ("timeout",) * 2 + ("cancelled",)
_TURN_ENDS = ("completed",) * 92 + ("failed",) * 5 + ("cancelled",) * 3
_FINISH_REASONS = ("stop", "stop", "tool_calls", "length")
_MODELS = (
    ("claude-sonnet-4-5", "anthropic", 3.0, 15.0),  # US dollars per million tokens, in and out
    ("claude-haiku-4-5", "anthropic", 1.0, 5.0),
    ("gpt-5", "openai", 1.25, 10.0),
    ("gpt-5-mini", "openai", 0.25, 2.0),
)
_REQUESTS = (
    "Why was order 4711 charged twice?",
    "Summarize the open tickets of this week.",
    "The deploy of last night failed, please find out why.",
    "Draft an answer to the customer, friendly but short.",
    "Which invoices are overdue by more than 30 days?",
)
_ANSWERS = (
    "The second charge is a reservation; it is released within three days.",
    "Twelve tickets are open, four of them wait for the customer.",
    "The migration ran out of disk space; I freed some and it went through.",
    "I have put a draft into the conversation, please have a look.",
)
# What a turn says besides the events that project, the most telling first.
_CHATTER = ("input.message", "output.message.completed", "llm.generation", "turn.started")


@dataclass(frozen=True)
class SampleData:
    """What `load_sample_data` wrote.

    Attributes:
        rows: rows per table.
        sources: rows per source type of the outbox that need a projection. What the outbox lacks
            of them is for a backfill to find.
        since: no session, event, generation or posting is older.
        until: none is younger.
    """

    rows: dict[str, int]
    sources: dict[str, int]
    since: datetime
    until: datetime


def load_sample_data(
    connection: Connection,
    *,
    events: int = 20_000,
    days: int = 14,
    seed: int = 7,
    until: datetime | None = None,
    projected_share: float = 0.6,
    enqueued_share: float = 0.9,
) -> SampleData:
    """Fill the platform's tables of an empty database, in one transaction. Facts stay empty.

    The same arguments, `until` included, give the same rows, ids included.

    Args:
        connection: of a superuser: the load bypasses triggers and foreign keys.
        events: how many events. The last session finishes its turn, so it can be a few more.
        days: how many days before `until` the data spreads over.
        seed: another seed, another data set.
        until: the end of the data, with a time zone; now by default.
        projected_share: which share of the events projects to facts, above 0 and up to 1.
        enqueued_share: which share of what projects stands in the outbox, from 0 to 1.

    Raises:
        ValueError: an argument is out of its range.
        Refusal: the database already holds organizations.
        psycopg.errors.InsufficientPrivilege: the user is no superuser.
    """
    if events < 1 or days < 1 or not 0 < projected_share <= 1 or not 0 <= enqueued_share <= 1:
        raise ValueError(
            "expected events and days from 1 on, projected_share above 0 and up to 1, "
            "enqueued_share from 0 to 1"
        )
    until = (until or datetime.now(UTC)).astimezone(UTC)
    until = until.replace(microsecond=until.microsecond // 1000 * 1000)
    since = until - timedelta(days=days)
    dice = _Dice(seed)
    with transaction(connection):
        if connection.execute("SELECT true FROM organizations LIMIT 1").fetchone():
            raise Refusal("sample data needs an empty database; this one holds organizations")
        # The triggers would set every session's updated_at to now; the rows below carry the
        # counters that they keep.
        connection.execute("SET LOCAL session_replication_role = replica")
        load = _Load(connection, dice, enqueued_share)
        founded = since - timedelta(days=90)
        orgs = [_Organization(load, number, founded) for number in range(1, len(_SHARES) + 1)]
        connection.execute("SELECT setval('organizations_org_id_seq', %s)", [len(orgs)])
        sessions = max(1, round(events / _EVENTS_PER_SESSION))
        told = 0
        for number, begun in enumerate(_session_starts(dice, sessions, since, until), 1):
            [org] = dice.choices(orgs, _SHARES)
            # Sizes vary, their sum does not drift: each session tells events up to its quota.
            quota = events * (number + dice.uniform(-0.5, 0.5)) / sessions
            quota = int(min(quota, events)) if number < sessions else events
            told += _Session(load, org, begun, until).tell(quota - told, projected_share)
            load.copy_some()
        for org in orgs:
            org.close_budgets(until)
        load.finish()
    return SampleData(dict(load.rows), dict(load.sources), since, until)


class _Dice(Random):
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def uuid(self, at: datetime) -> str:
        """A UUIDv7: the time in ms, then chance."""
        ms = int(at.timestamp() * 1000)
        return self.sibling(f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7")

    def sibling(self, uuid: str) -> str:
        """Another UUIDv7 of the same time."""
        tail = f"{self.getrandbits(72):018x}"
        return f"{uuid[:15]}{tail[:3]}-8{tail[3:6]}-{tail[6:]}"

    def public_id(self, prefix: str) -> str:
        return f"{prefix}_{self.getrandbits(128):032x}"


class _Load:
    """Rows on their way to their tables, a batch at a time.

    While one batch is made, the one before it is copied in small portions, so that the server
    and this process work at the same time.
    """

    def __init__(self, connection: Connection, dice: _Dice, enqueued_share: float) -> None:
        self.dice = dice
        self.rows: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self._connection = connection
        self._enqueued_share = enqueued_share
        self._batch: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._portions: Iterator[None] = iter(())

    def add(self, table: str, /, **row: Any) -> None:
        """Every row of a table gives the same columns in the same order."""
        self._batch[table].append(row)

    def enqueue(
        self, source_type: str, org_id: int, source_id: str, at: str, version: str | None = None
    ) -> None:
        """What the application does on its hot path, and sometimes fails to do."""
        self.sources[source_type] += 1
        if not self.dice.chance(self._enqueued_share):
            return
        self.add(
            "reporting_outbox",
            id=self.dice.sibling(source_id),
            org_id=org_id,
            source_type=source_type,
            source_id=source_id,
            source_version=version or source_id,
            reason=_REASONS[source_type],
            next_attempt_at=at,
            created_at=at,
            updated_at=at,
        )

    def copy_some(self) -> None:
        """Copy a portion of the batch before; start with this batch if it is large enough."""
        next(self._portions, None)
        if len(self._batch["events"]) >= _EVENTS_PER_BATCH:
            self._drain()
            self._portions, self._batch = self._copy(self._batch), defaultdict(list)

    def finish(self) -> None:
        """Copy what is left, and let planners know the tables."""
        self._drain()
        self._portions = self._copy(self._batch)
        self._drain()
        names = sql.SQL(", ").join(map(sql.Identifier, self.rows))
        self._connection.execute(sql.SQL("ANALYZE {}").format(names))

    def _drain(self) -> None:
        for _ in self._portions:
            pass

    def _copy(self, batch: Mapping[str, list[dict[str, Any]]]) -> Iterator[None]:
        for table, rows in batch.items():
            statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
                sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, rows[0]))
            )
            with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
                for number, row in enumerate(rows, 1):
                    copy.write_row(tuple(row.values()))
                    if number % _ROWS_PER_PORTION == 0:
                        yield
            self.rows[table] += len(rows)


class _Organization:
    """An organization and what it had before its first session."""

    def __init__(self, load: _Load, number: int, founded: datetime) -> None:
        self._load = load
        self._dice = dice = load.dice
        self._founded = founded
        self._name = _ORGANIZATIONS[number - 1]
        self.id = number
        self.owners: list[tuple[str, str | None]] = []  # principal, and the user behind it
        self.capabilities = dict(_BUILTIN)  # every flavour, as sessions name it, and its name
        public_id = dice.public_id("org")
        dates = {"created_at": founded, "updated_at": founded}
        load.add("organizations", org_id=number, public_id=public_id, name=self._name, **dates)
        for person in range(_PEOPLE // number):
            self._add_person(person)
        self._add_principal("system", None, None)
        self.workspaces = [
            self._add("workspaces", public_id=dice.public_id("wsp"), name=f"Workspace {room}")
            for room in range(1, 6)
        ]
        self.apps = [dice.uuid(founded) for _ in _APPS]
        for app_id, name in zip(self.apps, _APPS, strict=True):
            load.add("apps", id=app_id, org_id=number, name=name)
        self._add_capabilities()
        self.agents = [
            self._add("agents", name=name, system_prompt=f"You are the {name} agent.")
            for name in _AGENTS
        ]
        self.harnesses = [
            self._add("harnesses", name=name, display_name=name.title(), system_prompt="Be brief.")
            for name in _HARNESSES
        ]
        self._configure("agent", self.agents)
        self._configure("harness", self.harnesses)
        subjects = [("org", public_id), *(("agent", agent) for agent in self.agents[:2])]
        self._budgets = {dice.uuid(founded): subject for subject in subjects}
        self.budgets = list(self._budgets)
        self.spent = dict.fromkeys(self.budgets, 0.0)

    def _add(self, table: str, /, **row: Any) -> str:
        row_id = self._dice.uuid(self._founded)
        dates = {"created_at": self._founded, "updated_at": self._founded}
        self._load.add(table, id=row_id, org_id=self.id, **row, **dates)
        return row_id

    def _add_person(self, number: int) -> None:
        user_id = self._dice.uuid(self._founded)
        name = f"{_FIRST_NAMES[number % len(_FIRST_NAMES)]} {number + 1}"
        email = f"{name.replace(' ', '.')}@{self._name}.example".lower()
        dates = {"created_at": self._founded, "updated_at": self._founded}
        self._load.add("users", id=user_id, email=email, name=name, **dates)
        principal_id = self._add_principal("user", user_id, user_id)
        if number % 5 == 0:  # some people lend their rights to an agent
            self._add_principal(
                "agent_identity", self._dice.uuid(self._founded), user_id, principal_id
            )

    def _add_principal(
        self, kind: str, subject_id: str | None, user_id: str | None, parent: str | None = None
    ) -> str:
        principal_id = self._add(
            "principals",
            public_id=self._dice.public_id("principal"),
            kind=kind,
            subject_id=subject_id,
            parent_principal_id=parent,
            resolved_user_id=user_id,
        )
        self.owners.append((principal_id, user_id))
        return principal_id

    def _add_capabilities(self) -> None:
        for kind in _MCP_SERVERS:
            name = f"{self._name.lower()}-{kind}"
            server_id = self._add("mcp_servers", name=name, url=f"https://{name}.example/mcp")
            self.capabilities[f"mcp:{server_id}"] = name
        for name in _SKILLS:
            skill_id = self._add(
                "skills",
                public_id=self._dice.public_id("skill"),
                name=name,
                description=f"How to deal with {name}.",
                instructions="Read the checklist first.",
            )
            self.capabilities[f"skill:{skill_id}"] = name
        for name, display_name in _DECLARATIVE.items():
            self._add(
                "declarative_capabilities",
                public_id=self._dice.public_id("cap"),
                name=name,
                display_name=display_name,
                description="Rules that every answer follows.",
            )
            self.capabilities[f"declarative:{name}"] = display_name or name

    def _configure(self, kind: str, ids: list[str]) -> None:
        """Three capabilities for each agent or harness."""
        for owner_id in ids:
            chosen = self._dice.sample(list(self.capabilities), 3)
            for position, capability_id in enumerate(chosen):
                self._load.add(
                    f"{kind}_capabilities",
                    id=self._dice.uuid(self._founded),
                    capability_id=capability_id,
                    position=position,
                    created_at=self._founded,
                    **{f"{kind}_id": owner_id},
                )

    def close_budgets(self, until: datetime) -> None:
        """Write the budgets as the postings left them."""
        for budget_id, (subject_type, subject_id) in self._budgets.items():
            self._load.add(
                "budgets",
                id=budget_id,
                org_id=self.id,
                subject_type=subject_type,
                subject_id=subject_id,
                currency="usd",
                limit=100_000,
                balance=100_000 - self.spent[budget_id],
                created_at=self._founded,
                updated_at=until,
            )


def _session_starts(
    dice: _Dice, sessions: int, since: datetime, until: datetime
) -> Iterator[datetime]:
    """When sessions begin, ascending: most of them by day, few on weekends, none in the last hour.

    The n-th start lies in the n-th of equal slices of all activity, so nothing has to be sorted.
    """
    hours = [since + timedelta(hours=hour) for hour in range((until - since).days * 24 - 1)]
    activity = [_HOURS[hour.hour] * (_WEEKEND if hour.weekday() >= 5 else 1) for hour in hours]
    reached = list(accumulate(activity))
    for number in range(sessions):
        place = reached[-1] * (number + dice.random()) / sessions
        hour = min(bisect(reached, place), len(hours) - 1)
        fraction = 1 - (reached[hour] - place) / activity[hour]
        yield hours[hour] + timedelta(milliseconds=int(fraction * 3_600_000))


class _Session:
    """One session: its turns event by event, and at the end its own row with their sums."""

    def __init__(self, load: _Load, org: _Organization, begun: datetime, until: datetime) -> None:
        self._load = load
        self._dice = dice = load.dice
        self._org = org
        self._until = until
        self._begun = self._now = begun
        self._now_text = str(begun)
        self._id = dice.uuid(begun)
        self._principal_id, self._user_id = dice.choice(org.owners)
        self._agent_id = dice.choice(org.agents) if dice.chance(0.93) else None
        self._harness_id = dice.choice(org.harnesses) if dice.chance(0.9) else None
        self._model = dice.choice(_MODELS)
        self._sequence = 0
        self._context = "{}"
        self._turn_count = 0
        self._tool_call_count = 0
        self._tokens = Counter[str]()
        self._cost = 0.0

    def tell(self, events: int, projected_share: float) -> int:
        """Take turns, one at least, until there are so many events or more. Answers how many."""
        if self._dice.chance(0.2):
            self._generate(None, is_told=False)
        while True:
            turn_end = self._take_turn(projected_share)
            if self._sequence >= events:
                break
            self._pass_time(self._dice.expovariate(1 / 90_000))
            # Now and then somebody comes back the next day.
            if self._dice.chance(0.005) and self._now + timedelta(hours=20) < self._until:
                self._pass_time(20 * 3_600_000)
        self._close(turn_end)
        return self._sequence

    def _take_turn(self, projected_share: float) -> str:
        dice = self._dice
        begun = self._now
        turn_id = dice.uuid(begun)
        self._context = _json({"turn_id": turn_id, "exec_id": dice.uuid(begun)})
        calls = dice.choice(_TOOL_CALLS_PER_TURN)
        reports_usage, is_guarded = dice.chance(0.4), dice.chance(0.05)

        # As much besides as the share asks for: first the messages, then starts, then deltas.
        projected = calls + reports_usage + is_guarded + 1
        besides = int(projected * (1 - projected_share) / projected_share + dice.random())
        chatter = _CHATTER[:besides]
        starts = min(besides - len(chatter), calls)
        deltas = besides - len(chatter) - starts

        if "input.message" in chatter:
            self._emit("input.message", {"text": dice.choice(_REQUESTS)}, after_ms=5)
        if "turn.started" in chatter:
            self._emit("turn.started", {"turn_id": turn_id}, after_ms=20)
        usage = self._generate(turn_id, is_told="llm.generation" in chatter)
        for call in range(calls):
            self._call_tool(is_told=call < starts)
        if reports_usage:
            self._emit("capability.usage", {"records": self._usage_records()}, after_ms=3)
        for _ in range(deltas):
            self._emit("output.message.delta", {"text": "..."}, after_ms=40)
        if "output.message.completed" in chatter:
            self._emit("output.message.completed", {"text": dice.choice(_ANSWERS)}, after_ms=900)
        if is_guarded:
            replaced = {"guardrail_capability_id": dice.choice(_GUARDRAILS), "reason": "policy"}
            self._emit("output.message.replaced", replaced, after_ms=30)
        end = dice.choice(_TURN_ENDS)
        duration_ms = (self._now - begun) // timedelta(milliseconds=1)
        ended = {"turn_id": turn_id, "iterations": calls + 1, "duration_ms": duration_ms}
        self._emit(f"turn.{end}", ended | {"usage": usage}, after_ms=0)
        self._turn_count += 1
        return end

    def _emit(self, event_type: str, data: dict[str, Any], *, after_ms: float) -> str:
        self._pass_time(after_ms)
        event_id = self._dice.uuid(self._now)
        self._sequence += 1
        self._load.add(
            "events",
            id=event_id,
            session_id=self._id,
            sequence=self._sequence,
            event_type=event_type,
            data=_json(data),
            ts=self._now_text,
            context=self._context,
            created_at=self._now_text,
        )
        if event_type in _PROJECTED_TYPES:
            self._load.enqueue("event", self._org.id, event_id, self._now_text)
        return event_id

    def _pass_time(self, milliseconds: float) -> None:
        """Events tell whole milliseconds, and never the future."""
        self._now = min(self._now + timedelta(milliseconds=int(milliseconds)), self._until)
        self._now_text = str(self._now)

    def _call_tool(self, *, is_told: bool) -> None:
        dice = self._dice
        tool, display_name, capability, usual_ms = dice.choice(_TOOLS)
        call = {"tool_call_id": f"call_{dice.getrandbits(64):016x}", "tool_name": tool}
        if is_told:
            self._emit("tool.started", call, after_ms=10)
        status = dice.choice(_TOOL_STATUSES)
        duration_ms = 30_000 if status == "timeout" else int(usual_ms * dice.uniform(0.4, 2.5)) + 1
        data: dict[str, Any] = {
            **call,
            "display_name": display_name,
            "success": status == "success",
            "duration_ms": duration_ms,
            "result": "ok" if status == "success" else f"{tool}: {status}",
        }
        if status != "success" or dice.chance(0.7):  # older tools tell success alone
            data["status"] = status
        if capability:
            data |= {"capability_id": capability, "capability_name": _BUILTIN[capability]}
        self._emit("tool.completed", data, after_ms=duration_ms)
        self._tool_call_count += 1

    def _usage_records(self) -> list[dict[str, Any]]:
        dice = self._dice
        records: list[dict[str, Any]] = []
        capabilities = list(self._org.capabilities.items())
        for capability, name in dice.sample(capabilities, dice.randint(1, 4)):
            kind = dice.choice(("resolved", "exposed", "exposed", "invoked"))
            record = {"capability_id": capability, "capability_name": name, "usage_kind": kind}
            if kind == "invoked":
                tool, duration_ms = dice.choice(_TOOLS)[0], dice.randint(5, 2000)
                record |= {"tool_name": tool, "usage_count": 1, "duration_ms": duration_ms}
            records.append(record)
        return records

    def _generate(self, turn_id: str | None, *, is_told: bool) -> dict[str, int]:
        """Infer, for a turn or in the background of no session (a title, say); the tokens."""
        dice = self._dice
        model, provider, in_price, out_price = self._model
        usage = {
            "input_tokens": dice.randint(200, 9_000),
            "output_tokens": dice.randint(20, 1_500),
            "cache_read_tokens": dice.randint(0, 40_000),
            "cache_creation_tokens": dice.randint(0, 3_000),
        }
        duration_ms = usage["output_tokens"] * 12 + dice.randint(200, 900)
        event_id = None
        if is_told:
            told = {"model": model, "duration_ms": duration_ms, "usage": usage}
            event_id = self._emit("llm.generation", told, after_ms=duration_ms)
        else:
            self._pass_time(duration_ms)
        cost = (usage["input_tokens"] * in_price + usage["output_tokens"] * out_price) / 1e6
        generation_id = dice.uuid(self._now)
        self._load.add(
            "llm_generations",
            id=generation_id,
            org_id=self._org.id,
            session_id=self._id if turn_id else None,
            turn_id=turn_id,
            event_id=event_id,
            model=model,
            provider=provider,
            **usage,
            duration_ms=duration_ms,
            finish_reason=dice.choice(_FINISH_REASONS),
            created_at=self._now_text,
            actual_cost_usd=cost,
        )
        self._load.enqueue("llm_generation", self._org.id, generation_id, self._now_text)
        if turn_id:
            self._tokens.update(usage)
            self._cost += cost
            if dice.chance(0.5):  # the other half runs on the customer's own keys
                self._post(generation_id, turn_id, usage, cost)
        return usage

    def _post(self, generation_id: str, turn_id: str, usage: dict[str, int], cost: float) -> None:
        """Charge a budget; now and then somebody is given the money back."""
        dice = self._dice
        amount, meter = (-cost, "credit") if dice.chance(0.03) else (cost, "llm_tokens")
        budget_id = dice.choice(self._org.budgets)
        self._org.spent[budget_id] += amount
        journal_id, ledger_id = dice.sibling(generation_id), dice.sibling(generation_id)
        whose: dict[str, Any] = {
            "org_id": self._org.id,
            "session_id": self._id,
            "user_id": self._user_id,
            "principal_id": self._principal_id,
            "agent_id": self._agent_id,
            "harness_id": self._harness_id,
            "created_at": self._now_text,
        }
        self._load.add(
            "usage_journal",
            id=journal_id,
            kind=meter,
            source_type="llm_generation",
            source_id=generation_id,
            turn_id=turn_id,
            measures=_json(usage),
            **whose,
        )
        self._load.add(
            "usage_ledger",
            id=ledger_id,
            journal_id=journal_id,
            budget_id=budget_id,
            currency="usd",
            amount=amount,
            meter_source=meter,
            ref_type="llm_generation",
            ref_id=generation_id,
            **whose,
        )
        self._load.enqueue("usage_ledger", self._org.id, ledger_id, self._now_text)

    def _close(self, turn_end: str) -> None:
        """Write the session as its events left it."""
        dice = self._dice
        is_finished = dice.chance(0.6)
        # Events tell milliseconds, the platform's clock microseconds; now and then it is sharp.
        touched = self._now + timedelta(microseconds=dice.choice((0, 412, 250_333)))
        if dice.chance(0.1):
            touched = self._now.replace(microsecond=0) + timedelta(seconds=1)
        touched = min(touched, self._until)
        self._load.add(
            "sessions",
            id=self._id,
            org_id=self._org.id,
            title=dice.choice(_REQUESTS),
            tags=dice.sample(("vip", "trial", "internal"), dice.randint(0, 2)),
            status="idle" if is_finished else dice.choice(("active", "idle", "paused")),
            source=dice.choice(("chat", "chat", "api", "slack", "schedule", "webhook")),
            capabilities=_json(self._configured()),
            agent_id=self._agent_id,
            harness_id=self._harness_id,
            blueprint_id=dice.choice(_BLUEPRINTS) if dice.chance(0.15) else None,
            app_id=dice.choice(self._org.apps) if dice.chance(0.4) else None,
            workspace_id=dice.choice(self._org.workspaces),
            owner_principal_id=self._principal_id,
            resolved_owner_user_id=self._user_id,
            created_at=self._begun,
            updated_at=touched,
            started_at=self._begun if is_finished or dice.chance(0.8) else None,
            finished_at=touched if is_finished else None,
            turn_count=self._turn_count,
            tool_call_count=self._tool_call_count,
            last_turn_status=turn_end,
            last_turn_at=self._now,
            last_turn_sequence=self._sequence,
            **{f"total_{kind}": count for kind, count in self._tokens.items()},
            total_actual_cost_usd=self._cost,
            total_cost_usd=self._cost,
        )
        version = _rfc3339(touched)
        self._load.enqueue("session", self._org.id, self._id, version, version)

    def _configured(self) -> list[str | dict[str, str]]:
        """The session's own capabilities, each in one of the two forms that clients send."""
        chosen = self._dice.sample(list(self._org.capabilities), self._dice.randint(0, 3))
        return [{"ref": item} if self._dice.chance(0.5) else item for item in chosen]


def _json(value: Any) -> str:
    return to_json(value).decode()


def _rfc3339(at: datetime) -> str:
    """UTC with `Z` and as many fraction digits as it takes: 0, 3 or 6."""
    digits = 6 if at.microsecond % 1000 else 3 if at.microsecond else 0
    precision = {0: "seconds", 3: "milliseconds", 6: "microseconds"}[digits]
    return at.isoformat(timespec=precision).replace("+00:00", "Z")
