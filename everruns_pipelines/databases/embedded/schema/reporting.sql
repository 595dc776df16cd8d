-- The platform's reporting tables: the outbox and the six facts derived through it.

CREATE TABLE reporting_outbox (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL,
    source_type text NOT NULL,
    source_id text NOT NULL,
    source_version text NOT NULL DEFAULT '',
    reason text NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    last_error text,
    claimed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK (status IN ('pending', 'processing', 'completed', 'failed')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id),
    UNIQUE (org_id, source_type, source_id, source_version, reason)
);
CREATE INDEX ON reporting_outbox (org_id, status, next_attempt_at);
CREATE INDEX ON reporting_outbox (status, next_attempt_at, org_id, created_at);

CREATE TABLE reporting_event_repair_cursor (
    singleton boolean NOT NULL DEFAULT true,
    last_event_created_at timestamptz,
    last_event_id uuid,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK (
        (last_event_created_at IS NULL AND last_event_id IS NULL)
        OR (last_event_created_at IS NOT NULL AND last_event_id IS NOT NULL)
    ),
    CHECK (singleton),
    PRIMARY KEY (singleton)
);

CREATE TABLE fact_llm_generation (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    turn_id text,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    model text,
    provider text,
    finish_reason text,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    total_tokens bigint NOT NULL DEFAULT 0,
    duration_ms bigint NOT NULL DEFAULT 0,
    time_to_first_token_ms bigint NOT NULL DEFAULT 0,
    success_count bigint NOT NULL DEFAULT 1,
    error_count bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_llm_generation (org_id, model, provider, created_at);
CREATE INDEX ON fact_llm_generation (org_id, created_at);
CREATE INDEX ON fact_llm_generation (org_id, time_bucket_day);

CREATE TABLE fact_tool_call (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    turn_id text,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    tool_call_id text,
    tool_name text,
    tool_display_name_snapshot text,
    tool_status text,
    capability_id text,
    capability_name_snapshot text,
    call_count bigint NOT NULL DEFAULT 1,
    success_count bigint NOT NULL DEFAULT 0,
    error_count bigint NOT NULL DEFAULT 0,
    timeout_count bigint NOT NULL DEFAULT 0,
    cancelled_count bigint NOT NULL DEFAULT 0,
    duration_ms bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_tool_call (org_id, created_at);
CREATE INDEX ON fact_tool_call (org_id, time_bucket_day);
CREATE INDEX ON fact_tool_call (org_id, tool_name, tool_status, created_at);

CREATE TABLE fact_turn (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    turn_id text,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    turn_status text,
    turn_count bigint NOT NULL DEFAULT 1,
    duration_ms bigint NOT NULL DEFAULT 0,
    iterations bigint NOT NULL DEFAULT 0,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    total_tokens bigint NOT NULL DEFAULT 0,
    tool_call_count bigint NOT NULL DEFAULT 0,
    success_count bigint NOT NULL DEFAULT 0,
    error_count bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_turn (org_id, created_at);
CREATE INDEX ON fact_turn (org_id, time_bucket_day);
CREATE INDEX ON fact_turn (org_id, turn_status, created_at);

CREATE TABLE fact_session (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    session_status text,
    started_at timestamptz,
    finished_at timestamptz,
    last_active_at timestamptz,
    session_count bigint NOT NULL DEFAULT 1,
    duration_ms bigint NOT NULL DEFAULT 0,
    turn_count bigint NOT NULL DEFAULT 0,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    total_tokens bigint NOT NULL DEFAULT 0,
    tool_call_count bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_session (org_id, created_at);
CREATE INDEX ON fact_session (org_id, time_bucket_day);
CREATE INDEX ON fact_session (org_id, session_status, created_at);

CREATE TABLE fact_budget_posting (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    budget_id uuid,
    budget_subject_type text,
    budget_subject_id text,
    currency text,
    meter_source text,
    ref_type text,
    amount double precision NOT NULL DEFAULT 0,
    debit_count bigint NOT NULL DEFAULT 0,
    credit_count bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_budget_posting (org_id, budget_id, created_at);
CREATE INDEX ON fact_budget_posting (org_id, created_at);
CREATE INDEX ON fact_budget_posting (org_id, time_bucket_day);

CREATE TABLE fact_capability_usage (
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    session_id uuid,
    turn_id text,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    agent_name_snapshot text,
    harness_id uuid,
    harness_name_snapshot text,
    app_id uuid,
    blueprint_id text,
    created_at timestamptz NOT NULL,
    time_bucket_day date NOT NULL,
    capability_id text NOT NULL,
    capability_name_snapshot text,
    capability_usage_kind text NOT NULL,
    tool_name text,
    usage_count bigint NOT NULL DEFAULT 1,
    duration_ms bigint NOT NULL DEFAULT 0,
    projected_at timestamptz NOT NULL DEFAULT now(),
    CHECK (capability_usage_kind IN ('configured', 'resolved', 'exposed', 'invoked', 'effect_ran')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (org_id, source_key)
);
CREATE INDEX ON fact_capability_usage (org_id, capability_id, capability_usage_kind, created_at);
CREATE INDEX ON fact_capability_usage (org_id, created_at);
CREATE INDEX ON fact_capability_usage (org_id, time_bucket_day);
CREATE INDEX ON fact_capability_usage (org_id, session_id) WHERE capability_usage_kind = 'configured';
