"""The columns of the platform's tables that projections read: checked for, and shown in the UI."""

from everruns_pipelines.reporting.catalog import Column

_ID = Column("id", "uuid", "The row, by which its facts name it.")
_ORG = Column("org_id", "bigint", "Organization that it belongs to.")
_SESSION = Column("session_id", "uuid", "Session that it happened in, if any.")
_CREATED = Column("created_at", "timestamptz", "When it was written; its day in UTC is the fact's.")
_CAPABILITY = Column("capability_id", "varchar", "Capability, configured for all its sessions.")

_EVENT = (
    _ID,
    _SESSION,
    Column("event_type", "varchar", "What happened; six types are projected."),
    Column("ts", "timestamptz", "When it happened; its day in UTC is the fact's."),
    Column("context", "jsonb", "Where in the session it happened, such as the turn."),
    Column("data", "jsonb", "What happened in detail. Only declared members are read."),
)

SOURCE_COLUMNS: dict[str, tuple[Column, ...]] = {
    "events": _EVENT,
    "archived_events": _EVENT,
    "sessions": (
        _ID,
        _ORG,
        Column("status", "varchar", "Status of the session."),
        Column("agent_id", "uuid", "Agent."),
        Column("harness_id", "uuid", "Harness."),
        Column("app_id", "uuid", "App that started it."),
        Column("blueprint_id", "text", "Blueprint of it."),
        Column("owner_principal_id", "uuid", "Principal that owns it."),
        Column("resolved_owner_user_id", "uuid", "User who owns it."),
        Column("capabilities", "jsonb", "Capabilities configured for this session alone."),
        Column("turn_count", "bigint", "Turns that ended."),
        Column("tool_call_count", "bigint", "Tool calls completed."),
        Column("total_input_tokens", "bigint", "Tokens read by models."),
        Column("total_output_tokens", "bigint", "Tokens written by models."),
        Column("total_cache_read_tokens", "bigint", "Tokens read from providers' caches."),
        Column("total_cache_creation_tokens", "bigint", "Tokens written to providers' caches."),
        Column("started_at", "timestamptz", "When it started."),
        Column("finished_at", "timestamptz", "When it finished."),
        Column("updated_at", "timestamptz", "When its row last changed."),
        _CREATED,
    ),
    "llm_generations": (
        _ID,
        _ORG,
        _SESSION,
        Column("turn_id", "uuid", "Turn of the session."),
        Column("model", "text", "Model."),
        Column("provider", "text", "Provider of the model."),
        Column("finish_reason", "text", "Why the model stopped."),
        Column("input_tokens", "bigint", "Tokens read by the model."),
        Column("output_tokens", "bigint", "Tokens written by the model."),
        Column("cache_read_tokens", "bigint", "Tokens read from the provider's cache."),
        Column("cache_creation_tokens", "bigint", "Tokens written to the provider's cache."),
        Column("duration_ms", "integer", "Duration in milliseconds."),
        _CREATED,
    ),
    "usage_ledger": (
        _ID,
        _ORG,
        _SESSION,
        Column("budget_id", "uuid", "Budget that it is charged to."),
        Column("user_id", "uuid", "User who is charged."),
        Column("principal_id", "uuid", "Principal that is charged."),
        Column("agent_id", "uuid", "Agent that caused it."),
        Column("harness_id", "uuid", "Harness that caused it."),
        Column("currency", "text", "Currency of the amount."),
        Column("amount", "double precision", "Amount; positive is a debit."),
        Column("meter_source", "text", "Meter that measured the usage."),
        Column("ref_type", "text", "What the posting refers to."),
        _CREATED,
    ),
    "agents": (
        _ID,
        _ORG,
        Column("name", "varchar", "Name of the agent."),
    ),
    "harnesses": (
        _ID,
        _ORG,
        Column("name", "varchar", "Name of the harness."),
    ),
    "agent_capabilities": (
        Column("agent_id", "uuid", "Agent that has the capability."),
        _CAPABILITY,
    ),
    "harness_capabilities": (
        Column("harness_id", "uuid", "Harness that has the capability."),
        _CAPABILITY,
    ),
    "declarative_capabilities": (
        _ORG,
        Column("name", "varchar", "Name of the capability."),
        Column("display_name", "varchar", "Name shown to people, if it has one."),
    ),
    "mcp_servers": (
        _ID,
        _ORG,
        Column("name", "varchar", "Name of the server, and of the capability that it is."),
    ),
    "skills": (
        _ID,
        _ORG,
        Column("name", "varchar", "Name of the skill, and of the capability that it is."),
    ),
    "budgets": (
        _ID,
        _ORG,
        Column("subject_type", "text", "What it limits: session, agent, ..."),
        Column("subject_id", "text", "Which one it limits."),
    ),
}
