"""The catalog: every fact table, described once.

A fact is a table, its columns, and the projections that make its rows. The projector, the
comparison of facts with their sources, the backfill, the assets and their checks all follow from
what stands here: a seventh fact is one more `.sql` file and one more entry. (Columns of sources
that none has read before stand in `source_columns.py`.)
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import LiteralString

from everruns_pipelines.databases.sql_files import read_sql


@dataclass(frozen=True)
class Column:
    """A column of a fact table.

    Args:
        type: PostgreSQL's name of the type.
        dimension: where it comes from unless the projection provides it: an expression over the
            fact's `session`, `agent` and `harness`. None: the projection always provides it.
    """

    name: str
    type: LiteralString
    description: str
    dimension: LiteralString | None = None


@dataclass(frozen=True)
class Source:
    """A canonical table whose rows are projected, and how the outbox speaks of them.

    Args:
        type: `source_type` in the outbox, and what a fact's `source_key` begins with.
        reason: `reason` in the outbox.
        counted_as: its key in the result of a backfill.
        time: the column whose UTC day is the partition of the facts.
        org_from_session: the table has no `org_id`; its session's counts.
        archive: the table that its rows move to, with the same columns: a row is a row wherever it
            lies, as long as its session stands.
    """

    type: str
    table: str
    reason: str
    counted_as: str
    time: str
    org_from_session: bool = False
    archive: str | None = None

    @property
    def tables(self) -> tuple[str, ...]:
        """Where its rows lie, each in one of them."""
        return (self.table,) if self.archive is None else (self.table, self.archive)


@dataclass(frozen=True)
class Projection:
    """A SELECT over `selected`, rows of one source with their `org_id`.

    What else it reads of events stands in `all_events`, archived ones included. Its columns are the
    fact's; the dimensions that it leaves out come from the session. Two more are not stored:
    `rejected` says why a row is skipped, `reported` what is odd about one that is written.

    Args:
        name: the `.sql` file in `projections/`.
        event_types: which events it reads, for events.
        provides: dimensions that it does not leave to the session.
        rejects: it has the column `rejected`.
        reports: it has the column `reported`.
        aggregates: it reads many rows for one that it makes: it is not read twice.
        supersedes: for a projection of sessions: which of the fact's rows a session had, by the
            `org_id` and `source_id` of `source`: rows that it no longer has are removed.
        key: the `source_key` of its row, over `source`: given if it makes at most one of a source,
            so that the backfill can read the events once for all projections.
        only: which sources it makes that row of, over `source`; all of them by default.
        tracks: columns by whose values a fact of a source that changes tells that it is stale.
    """

    name: str
    source: Source
    event_types: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    rejects: bool = False
    reports: bool = False
    aggregates: bool = False
    supersedes: LiteralString | None = None
    key: LiteralString | None = None
    only: LiteralString = "true"
    tracks: tuple[str, ...] = ()

    @cached_property
    def sql(self) -> LiteralString:
        """The text of the SELECT."""
        return _text(f"{self.name}.sql")

    @cached_property
    def inputs(self) -> LiteralString:
        """What the keys of its rows follow from: needed of a projection of sessions if its fact
        has rows of events too.

        A SELECT over `selected`: `org_id`, `session_id`, and `inputs`, a record of all else that
        the keys of that session's rows are made of.
        """
        return _text(f"{self.name}.inputs.sql")


def _text(name: str) -> LiteralString:
    return read_sql("everruns_pipelines.reporting", f"projections/{name}")


@dataclass(frozen=True)
class Fact:
    """A fact table: primary key (org_id, source_key), one partition per `time_bucket_day`.

    Args:
        changed: the column that tells when its source last changed.
    """

    table: str
    description: str
    own_columns: tuple[Column, ...]
    projections: tuple[Projection, ...]
    has_turn: bool = True
    changed: str = "created_at"

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Every column but `projected_at`, which says when the values last changed."""
        turn = (_TURN_ID,) if self.has_turn else ()
        return (*_KEY, *turn, *DIMENSIONS, *_TIME, *self.own_columns)

    @cached_property
    def version(self) -> str:
        """Changes when the rows that the projections make may have changed."""
        text = repr([(p, p.sql) for p in self.projections]) + repr(self.columns)
        return sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The source tables that its projections read, each once."""
        return tuple(dict.fromkeys(projection.source for projection in self.projections))


_KEY = (
    Column("org_id", "bigint", "Organization that the source row belongs to."),
    Column("source_key", "text", "The source row, and which of its rows this is."),
    Column("session_id", "uuid", "Session, if the source row has one."),
)
_TURN_ID = Column("turn_id", "text", "Turn of the session, as the agent named it.")
DIMENSIONS = (
    Column("user_id", "uuid", "User who owns it.", "session.resolved_owner_user_id"),
    Column("principal_id", "uuid", "Principal that owns it.", "session.owner_principal_id"),
    Column("agent_id", "uuid", "Agent.", "session.agent_id"),
    Column("agent_name_snapshot", "text", "Name of the agent when projected.", "agent.name"),
    Column("harness_id", "uuid", "Harness.", "session.harness_id"),
    Column("harness_name_snapshot", "text", "Name of the harness when projected.", "harness.name"),
    Column("app_id", "uuid", "App that started the session.", "session.app_id"),
    Column("blueprint_id", "text", "Blueprint of the session.", "session.blueprint_id"),
)
_TIME = (
    Column("created_at", "timestamptz", "When it happened."),
    Column(
        "time_bucket_day",
        "date",
        "UTC day of created_at: the partition.",
        "(projected.created_at AT TIME ZONE 'UTC')::date",
    ),
)
_TOKENS = (
    Column("input_tokens", "bigint", "Tokens read by the model."),
    Column("output_tokens", "bigint", "Tokens written by the model."),
    Column("cache_read_tokens", "bigint", "Tokens read from the provider's cache."),
    Column("cache_creation_tokens", "bigint", "Tokens written to the provider's cache."),
)
_ALL_TOKENS = Column("total_tokens", "bigint", "Tokens of all four kinds.")

EVENT = Source(
    "event",
    "events",
    "event_projection",
    "events",
    "ts",
    org_from_session=True,
    archive="archived_events",
)
SESSION = Source("session", "sessions", "session_snapshot", "sessions", "created_at")
LLM_GENERATION = Source(
    "llm_generation",
    "llm_generations",
    "llm_generation_projection",
    "llm_generations",
    "created_at",
)
USAGE_LEDGER = Source(
    "usage_ledger", "usage_ledger", "budget_posting_projection", "usage_ledger", "created_at"
)
SOURCES = (EVENT, LLM_GENERATION, SESSION, USAGE_LEDGER)

FACTS = (
    Fact(
        "fact_llm_generation",
        "Every generation of a model: tokens, duration, how it finished.",
        (
            Column("model", "text", "Model."),
            Column("provider", "text", "Provider of the model."),
            Column("finish_reason", "text", "Why the model stopped."),
            *_TOKENS,
            _ALL_TOKENS,
            Column("duration_ms", "bigint", "Duration in milliseconds; 0 if unknown."),
            Column("time_to_first_token_ms", "bigint", "Always 0: the source does not say."),
            Column("success_count", "bigint", "Always 1."),
            Column("error_count", "bigint", "Always 0."),
        ),
        (
            Projection(
                "llm_generation",
                LLM_GENERATION,
                tracks=(
                    "session_id",
                    "turn_id",
                    "model",
                    "provider",
                    "finish_reason",
                    *(column.name for column in _TOKENS),
                    "duration_ms",
                ),
            ),
        ),
    ),
    Fact(
        "fact_tool_call",
        "Every completed tool call: which tool, how it ended, how long it took.",
        (
            Column("tool_call_id", "text", "Id of the call, as the model gave it."),
            Column("tool_name", "text", "Tool."),
            Column("tool_display_name_snapshot", "text", "Name shown to people when projected."),
            Column("tool_status", "text", "How it ended: success, error, timeout, cancelled."),
            Column("capability_id", "text", "Capability that the tool belongs to."),
            Column("capability_name_snapshot", "text", "Name of the capability at the call."),
            Column("call_count", "bigint", "Always 1."),
            Column("success_count", "bigint", "1 if it succeeded."),
            Column("error_count", "bigint", "1 if it failed."),
            Column("timeout_count", "bigint", "1 if it timed out."),
            Column("cancelled_count", "bigint", "1 if it was cancelled."),
            Column("duration_ms", "bigint", "Duration in milliseconds; 0 if unknown."),
        ),
        (
            Projection(
                "tool_call", EVENT, ("tool.completed",), reports=True, key="'event:' || source.id"
            ),
        ),
    ),
    Fact(
        "fact_turn",
        "Every turn that ended: how, with how many tokens, iterations and tool calls.",
        (
            Column("turn_status", "text", "How it ended: completed, failed, cancelled."),
            Column("turn_count", "bigint", "Always 1."),
            Column("duration_ms", "bigint", "Duration in milliseconds; 0 if unknown."),
            Column("iterations", "bigint", "Rounds between model and tools."),
            *_TOKENS,
            Column("total_tokens", "bigint", "Input and output tokens."),
            Column("tool_call_count", "bigint", "Tool calls completed in the turn."),
            Column("success_count", "bigint", "1 if it completed."),
            Column("error_count", "bigint", "1 if it failed or was cancelled."),
        ),
        (
            Projection(
                "turn",
                EVENT,
                ("turn.completed", "turn.failed", "turn.cancelled"),
                reports=True,
                aggregates=True,
                key="'event:' || source.id",
            ),
        ),
    ),
    Fact(
        "fact_session",
        "Every session: its state, duration and totals.",
        (
            Column("session_status", "text", "Status of the session."),
            Column("started_at", "timestamptz", "When it started."),
            Column("finished_at", "timestamptz", "When it finished."),
            Column("last_active_at", "timestamptz", "When its row last changed."),
            Column("session_count", "bigint", "Always 1."),
            Column("duration_ms", "bigint", "Start to finish in milliseconds; 0 if unfinished."),
            Column("turn_count", "bigint", "Turns that ended."),
            *_TOKENS,
            _ALL_TOKENS,
            Column("tool_call_count", "bigint", "Tool calls completed."),
        ),
        (Projection("session", SESSION, tracks=("last_active_at",)),),
        has_turn=False,
        changed="last_active_at",
    ),
    Fact(
        "fact_budget_posting",
        "Every posting of the usage ledger: what was charged to which budget.",
        (
            Column("budget_id", "uuid", "Budget."),
            Column("budget_subject_type", "text", "What the budget limits: session, agent, ..."),
            Column("budget_subject_id", "text", "Which one it limits."),
            Column("currency", "text", "Currency of the amount."),
            Column("meter_source", "text", "Meter that measured the usage."),
            Column("ref_type", "text", "What the posting refers to."),
            Column("amount", "double precision", "Amount; positive is a debit."),
            Column("debit_count", "bigint", "1 for a debit."),
            Column("credit_count", "bigint", "1 for a credit."),
        ),
        (
            Projection(
                "budget_posting",
                USAGE_LEDGER,
                provides=("user_id", "principal_id", "agent_id", "harness_id"),
                tracks=(
                    "session_id",
                    "user_id",
                    "principal_id",
                    "agent_id",
                    "harness_id",
                    "budget_id",
                    "budget_subject_type",
                    "budget_subject_id",
                    "currency",
                    "meter_source",
                    "ref_type",
                    "amount",
                ),
            ),
        ),
        has_turn=False,
    ),
    Fact(
        "fact_capability_usage",
        "Every use of a capability: configured, resolved, exposed, invoked, or taking effect.",
        (
            Column("capability_id", "text", "Capability."),
            Column("capability_name_snapshot", "text", "Name of the capability when projected."),
            Column(
                "capability_usage_kind",
                "text",
                "Kind of use: configured, resolved, exposed, invoked, effect_ran.",
            ),
            Column("tool_name", "text", "Tool through which it was used."),
            Column("usage_count", "bigint", "How often it was used."),
            Column("duration_ms", "bigint", "Duration in milliseconds; 0 if unknown."),
        ),
        (
            Projection(
                "capability_invoked",
                EVENT,
                ("tool.completed",),
                rejects=True,
                reports=True,
                key="'event:' || source.id || ':invoked'",
                only="source.data ->> 'capability_id' IS NOT NULL",
            ),
            Projection(
                "capability_reported", EVENT, ("capability.usage",), rejects=True, reports=True
            ),
            Projection(
                "capability_effect",
                EVENT,
                ("output.message.replaced",),
                rejects=True,
                key="'event:' || source.id || ':effect_ran'",
                only="source.data ->> 'guardrail_capability_id' IS NOT NULL",
            ),
            Projection(
                "capability_configured",
                SESSION,
                supersedes="fact.org_id = source.org_id"
                " AND fact.session_id = ANY (ARRAY[source.source_id])"
                " AND fact.capability_usage_kind = 'configured'"
                " AND starts_with(fact.source_key, 'session:' || source.source_id || ':')",
            ),
        ),
    ),
)
