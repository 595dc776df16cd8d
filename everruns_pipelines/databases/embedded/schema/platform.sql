-- The platform's canonical tables: what agents write. Sources of every reporting fact.

CREATE TABLE users (
    id uuid NOT NULL DEFAULT uuidv7(),
    email text NOT NULL,
    name text NOT NULL,
    avatar_url text,
    roles jsonb NOT NULL DEFAULT '[]',
    password_hash text,
    email_verified boolean NOT NULL DEFAULT false,
    auth_provider text,
    auth_provider_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id)
);
CREATE INDEX ON users (auth_provider, auth_provider_id) WHERE auth_provider IS NOT NULL;
CREATE UNIQUE INDEX ON users (email);

CREATE TABLE organizations (
    org_id bigserial NOT NULL,
    public_id text NOT NULL,
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    created_by uuid,
    CHECK (public_id ~ '^org_[0-9a-f]{32}$'),
    FOREIGN KEY (created_by) REFERENCES users(id),
    PRIMARY KEY (org_id),
    UNIQUE (public_id)
);
CREATE INDEX ON organizations (public_id);

CREATE TABLE principals (
    id uuid NOT NULL DEFAULT uuidv7(),
    public_id text NOT NULL,
    org_id bigint NOT NULL,
    kind text NOT NULL,
    subject_id uuid,
    parent_principal_id uuid,
    resolved_user_id uuid,
    metadata jsonb NOT NULL DEFAULT '{}',
    status text NOT NULL DEFAULT 'active',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (kind IN ('user', 'agent_identity', 'virtual_user', 'system')),
    CHECK (public_id ~ '^principal_[0-9a-f]{32}$'),
    CHECK (status IN ('active', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id) ON DELETE CASCADE,
    FOREIGN KEY (parent_principal_id) REFERENCES principals(id) ON DELETE RESTRICT,
    FOREIGN KEY (resolved_user_id) REFERENCES users(id) ON DELETE RESTRICT,
    PRIMARY KEY (id),
    UNIQUE (public_id)
);
CREATE INDEX ON principals (org_id, kind, status);
CREATE INDEX ON principals (parent_principal_id);
CREATE INDEX ON principals (org_id, resolved_user_id);
CREATE UNIQUE INDEX ON principals (org_id, kind, subject_id);

CREATE TABLE workspaces (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    public_id text NOT NULL,
    name varchar(255) NOT NULL,
    description text,
    owner_principal_id text,
    resolved_owner_user_id uuid,
    status varchar(50) NOT NULL DEFAULT 'active',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (public_id ~ '^wsp_[0-9a-f]{32}$'),
    CHECK (status IN ('active', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON workspaces (org_id);
CREATE UNIQUE INDEX ON workspaces (org_id, name) WHERE status <> 'deleted';
CREATE UNIQUE INDEX ON workspaces (public_id);

CREATE TABLE apps (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    name text NOT NULL DEFAULT 'app',
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);

CREATE TABLE archived_events (
    id uuid NOT NULL,
    session_id uuid NOT NULL,
    sequence integer NOT NULL,
    event_type varchar(100) NOT NULL,
    data jsonb NOT NULL DEFAULT '{}',
    ts timestamptz NOT NULL,
    context jsonb NOT NULL DEFAULT '{}',
    metadata jsonb,
    tags text[],
    created_at timestamptz NOT NULL,
    archived_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id)
);
CREATE INDEX ON archived_events (session_id);
CREATE INDEX ON archived_events (ts);

CREATE TABLE agents (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    name varchar(255) NOT NULL,
    description text,
    system_prompt text NOT NULL,
    default_model_id uuid,
    tags text[] NOT NULL DEFAULT '{}',
    status varchar(50) NOT NULL DEFAULT 'active',
    total_input_tokens bigint NOT NULL DEFAULT 0,
    total_output_tokens bigint NOT NULL DEFAULT 0,
    total_cache_read_tokens bigint NOT NULL DEFAULT 0,
    total_cache_creation_tokens bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    max_iterations integer,
    network_access jsonb,
    display_name text,
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (status IN ('active', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON agents (org_id);
CREATE INDEX ON agents (status);
CREATE INDEX ON agents USING gin (tags);
CREATE UNIQUE INDEX ON agents (org_id, name) WHERE status <> 'deleted';

CREATE TABLE harnesses (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    name varchar(255) NOT NULL,
    description text,
    system_prompt text NOT NULL,
    default_model_id uuid,
    tags text[] NOT NULL DEFAULT '{}',
    status varchar(50) NOT NULL DEFAULT 'active',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    network_access jsonb,
    display_name text NOT NULL,
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (status IN ('active', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON harnesses (org_id);
CREATE UNIQUE INDEX ON harnesses (org_id, name) WHERE status <> 'deleted';

CREATE TABLE agent_capabilities (
    id uuid NOT NULL DEFAULT uuidv7(),
    agent_id uuid NOT NULL,
    capability_id varchar(50) NOT NULL,
    "position" integer NOT NULL DEFAULT 0,
    config jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (agent_id) REFERENCES agents(id) ON DELETE CASCADE,
    PRIMARY KEY (id),
    UNIQUE (agent_id, capability_id)
);
CREATE INDEX ON agent_capabilities (agent_id);
CREATE INDEX ON agent_capabilities (agent_id, "position");

CREATE TABLE harness_capabilities (
    id uuid NOT NULL DEFAULT uuidv7(),
    harness_id uuid NOT NULL,
    capability_id varchar(50) NOT NULL,
    "position" integer NOT NULL DEFAULT 0,
    config jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (harness_id) REFERENCES harnesses(id) ON DELETE CASCADE,
    PRIMARY KEY (id),
    UNIQUE (harness_id, capability_id)
);
CREATE INDEX ON harness_capabilities (harness_id);

CREATE TABLE mcp_servers (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    name varchar(255) NOT NULL,
    description text,
    url text NOT NULL,
    transport_type varchar(50) NOT NULL DEFAULT 'http',
    status varchar(50) NOT NULL DEFAULT 'active',
    api_key_encrypted bytea,
    api_key_set boolean NOT NULL DEFAULT false,
    headers jsonb NOT NULL DEFAULT '{}',
    settings jsonb NOT NULL DEFAULT '{}',
    cached_tools jsonb NOT NULL DEFAULT '[]',
    tools_cached_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    CHECK (transport_type = 'http'),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON mcp_servers (org_id);
CREATE INDEX ON mcp_servers (status);
CREATE UNIQUE INDEX ON mcp_servers (name);

CREATE TABLE skills (
    id uuid NOT NULL DEFAULT uuidv7(),
    public_id text NOT NULL,
    org_id bigint NOT NULL DEFAULT 1,
    name varchar(64) NOT NULL,
    description varchar(1024) NOT NULL,
    license text,
    compatibility varchar(500),
    metadata jsonb NOT NULL DEFAULT '{}',
    allowed_tools text,
    instructions text NOT NULL,
    source_type varchar(20) NOT NULL DEFAULT 'markdown',
    archive_data bytea,
    status varchar(50) NOT NULL DEFAULT 'active',
    version varchar(50) NOT NULL DEFAULT '1.0',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (public_id ~ '^skill_[0-9a-f]{32}$'),
    CHECK (source_type IN ('markdown', 'archive')),
    CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON skills (org_id);
CREATE INDEX ON skills (status);
CREATE UNIQUE INDEX ON skills (org_id, name);
CREATE UNIQUE INDEX ON skills (org_id, public_id);

CREATE TABLE declarative_capabilities (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    public_id text NOT NULL,
    name varchar(120) NOT NULL,
    display_name varchar(120),
    description text NOT NULL,
    status varchar(50) NOT NULL DEFAULT 'active',
    definition jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz,
    deleted_at timestamptz,
    CHECK (display_name IS NULL OR octet_length(display_name) <= 80),
    CHECK (name ~ '^[a-z][a-z0-9_-]*[a-z0-9]$'),
    CHECK (octet_length(name) <= 38),
    CHECK (public_id ~ '^cap_[0-9a-f]{32}$'),
    CHECK (status IN ('active', 'disabled', 'archived', 'deleted')),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id),
    UNIQUE (org_id, name),
    UNIQUE (org_id, public_id)
);
CREATE INDEX ON declarative_capabilities (org_id);
CREATE INDEX ON declarative_capabilities (status);

CREATE TABLE sessions (
    id uuid NOT NULL DEFAULT uuidv7(),
    agent_id uuid,
    org_id bigint NOT NULL DEFAULT 1,
    title varchar(255),
    tags text[] NOT NULL DEFAULT '{}',
    model_id uuid,
    status varchar(50) NOT NULL DEFAULT 'started',
    total_input_tokens bigint NOT NULL DEFAULT 0,
    total_output_tokens bigint NOT NULL DEFAULT 0,
    total_cache_read_tokens bigint NOT NULL DEFAULT 0,
    total_cache_creation_tokens bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    capabilities jsonb NOT NULL DEFAULT '[]',
    harness_id uuid,
    max_iterations integer,
    network_access jsonb,
    blueprint_id text,
    blueprint_config jsonb,
    owner_principal_id uuid NOT NULL,
    resolved_owner_user_id uuid,
    app_id uuid,
    workspace_id uuid NOT NULL,
    turn_count bigint NOT NULL DEFAULT 0,
    tool_call_count bigint NOT NULL DEFAULT 0,
    source text NOT NULL DEFAULT 'unknown',
    last_turn_status text,
    last_turn_at timestamptz,
    last_turn_sequence integer,
    total_actual_cost_usd double precision NOT NULL DEFAULT 0,
    total_estimated_cost_usd double precision NOT NULL DEFAULT 0,
    total_cost_usd double precision NOT NULL DEFAULT 0,
    archived_at timestamptz,
    CHECK (source IN (
        'chat', 'api', 'slack', 'ag_ui', 'fcp', 'schedule', 'webhook', 'a2a', 'eval',
        'subagent', 'unknown'
    )),
    CHECK (status IN (
        'started', 'active', 'idle', 'waiting_for_tool_results', 'resolving_tool_results',
        'paused'
    )),
    FOREIGN KEY (agent_id) REFERENCES agents(id) ON DELETE CASCADE,
    FOREIGN KEY (app_id) REFERENCES apps(id) ON DELETE SET NULL,
    FOREIGN KEY (harness_id) REFERENCES harnesses(id),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    FOREIGN KEY (owner_principal_id) REFERENCES principals(id),
    FOREIGN KEY (resolved_owner_user_id) REFERENCES users(id),
    FOREIGN KEY (workspace_id) REFERENCES workspaces(id),
    PRIMARY KEY (id)
);
CREATE INDEX ON sessions (agent_id);
CREATE INDEX ON sessions (app_id);
CREATE INDEX ON sessions (created_at DESC);
CREATE INDEX ON sessions (org_id, created_at DESC);
CREATE INDEX ON sessions (org_id);
CREATE INDEX ON sessions (org_id, resolved_owner_user_id, created_at DESC);
CREATE INDEX ON sessions (org_id, source, created_at DESC);
CREATE INDEX ON sessions (org_id, source, resolved_owner_user_id, updated_at DESC);
CREATE INDEX ON sessions (org_id, status, last_turn_status);
CREATE INDEX ON sessions (org_id, updated_at DESC);
CREATE INDEX ON sessions (owner_principal_id);
CREATE INDEX ON sessions (org_id, resolved_owner_user_id);
CREATE INDEX ON sessions (status);
CREATE INDEX ON sessions USING gin (tags);
CREATE INDEX ON sessions (workspace_id);

CREATE TABLE events (
    id uuid NOT NULL DEFAULT uuidv7(),
    session_id uuid NOT NULL,
    sequence integer NOT NULL,
    event_type varchar(100) NOT NULL,
    data jsonb NOT NULL DEFAULT '{}',
    ts timestamptz NOT NULL DEFAULT now(),
    context jsonb NOT NULL DEFAULT '{}',
    metadata jsonb,
    tags text[],
    created_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (session_id) REFERENCES sessions(id) ON DELETE CASCADE,
    PRIMARY KEY (id),
    UNIQUE (session_id, sequence)
);
CREATE INDEX ON events (event_type);
CREATE INDEX ON events (session_id, sequence)
WHERE event_type IN ('input.message', 'output.message.completed');
CREATE INDEX ON events (created_at, id)
WHERE event_type IN (
    'tool.completed', 'capability.usage', 'output.message.replaced', 'turn.completed',
    'turn.failed', 'turn.cancelled'
);
CREATE INDEX ON events (session_id);
CREATE INDEX ON events (session_id, sequence);
CREATE INDEX ON events USING gin (tags);
CREATE INDEX ON events (session_id, sequence) WHERE event_type IN ('tool.started', 'tool.completed');
CREATE INDEX ON events (session_id, sequence)
WHERE event_type IN (
    'turn.started', 'turn.completed', 'turn.failed'
);

CREATE TABLE llm_generations (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL DEFAULT 1,
    session_id uuid,
    turn_id uuid,
    event_id uuid,
    model text,
    provider text,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_creation_tokens bigint NOT NULL DEFAULT 0,
    duration_ms integer,
    finish_reason text,
    created_at timestamptz NOT NULL DEFAULT now(),
    actual_cost_usd double precision,
    estimated_cost_usd double precision,
    provider_response_id text,
    reconciled_at timestamptz,
    reconcile_after timestamptz,
    reconciliation_attempts integer NOT NULL DEFAULT 0,
    provider_session_id text,
    provider_config_id text,
    usage_pending boolean NOT NULL DEFAULT false,
    managed boolean NOT NULL DEFAULT false,
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    FOREIGN KEY (session_id) REFERENCES sessions(id) ON DELETE CASCADE,
    PRIMARY KEY (id)
);
CREATE INDEX ON llm_generations (created_at);
CREATE INDEX ON llm_generations (org_id, created_at);
CREATE INDEX ON llm_generations (org_id);
CREATE INDEX ON llm_generations (org_id, created_at) WHERE session_id IS NULL;
CREATE INDEX ON llm_generations (session_id);
CREATE INDEX ON llm_generations (turn_id) WHERE turn_id IS NOT NULL;
CREATE INDEX ON llm_generations (reconcile_after, created_at) WHERE usage_pending;
CREATE UNIQUE INDEX ON llm_generations (event_id) WHERE event_id IS NOT NULL;

CREATE TABLE usage_journal (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL,
    kind text NOT NULL,
    source_type text,
    source_id text,
    event_id uuid,
    session_id uuid,
    turn_id uuid,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    harness_id uuid,
    measures jsonb NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (agent_id) REFERENCES agents(id) ON DELETE SET NULL,
    FOREIGN KEY (event_id) REFERENCES events(id) ON DELETE SET NULL,
    FOREIGN KEY (harness_id) REFERENCES harnesses(id) ON DELETE SET NULL,
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    FOREIGN KEY (principal_id) REFERENCES principals(id) ON DELETE SET NULL,
    FOREIGN KEY (session_id) REFERENCES sessions(id) ON DELETE SET NULL,
    FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL,
    PRIMARY KEY (id)
);
CREATE INDEX ON usage_journal (kind, created_at DESC);
CREATE INDEX ON usage_journal (org_id, created_at DESC);
CREATE INDEX ON usage_journal (session_id, created_at DESC) WHERE session_id IS NOT NULL;
CREATE UNIQUE INDEX ON usage_journal (kind, event_id) WHERE event_id IS NOT NULL;
CREATE UNIQUE INDEX ON usage_journal (source_type, source_id) WHERE source_type IS NOT NULL AND source_id IS NOT NULL;

CREATE TABLE budgets (
    id uuid NOT NULL DEFAULT uuidv7(),
    org_id bigint NOT NULL,
    subject_type text NOT NULL,
    subject_id text NOT NULL,
    currency text NOT NULL,
    "limit" double precision NOT NULL,
    soft_limit double precision,
    balance double precision NOT NULL,
    period jsonb,
    metadata jsonb DEFAULT '{}',
    status text NOT NULL DEFAULT 'active',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    period_started_at timestamptz,
    CHECK (status IN ('active', 'paused', 'exhausted', 'disabled')),
    CHECK (subject_type IN (
        'session', 'agent', 'user', 'org', 'app', 'app_channel', 'agent_trigger', 'agent_channel'
    )),
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    PRIMARY KEY (id)
);
CREATE INDEX ON budgets (org_id, subject_type, subject_id) WHERE status = 'active';

CREATE TABLE usage_ledger (
    id uuid NOT NULL DEFAULT uuidv7(),
    journal_id uuid NOT NULL,
    budget_id uuid,
    org_id bigint NOT NULL,
    session_id uuid,
    user_id uuid,
    principal_id uuid,
    agent_id uuid,
    harness_id uuid,
    currency text NOT NULL,
    amount double precision NOT NULL,
    meter_source text NOT NULL,
    ref_type text,
    ref_id uuid,
    description text,
    rating_metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (agent_id) REFERENCES agents(id) ON DELETE SET NULL,
    FOREIGN KEY (budget_id) REFERENCES budgets(id) ON DELETE SET NULL,
    FOREIGN KEY (harness_id) REFERENCES harnesses(id) ON DELETE SET NULL,
    FOREIGN KEY (journal_id) REFERENCES usage_journal(id) ON DELETE CASCADE,
    FOREIGN KEY (org_id) REFERENCES organizations(org_id),
    FOREIGN KEY (principal_id) REFERENCES principals(id) ON DELETE SET NULL,
    FOREIGN KEY (session_id) REFERENCES sessions(id) ON DELETE SET NULL,
    FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE SET NULL,
    PRIMARY KEY (id)
);
CREATE INDEX ON usage_ledger (budget_id, created_at DESC) WHERE budget_id IS NOT NULL;
CREATE INDEX ON usage_ledger (journal_id, created_at DESC);
CREATE INDEX ON usage_ledger (org_id, created_at DESC);
CREATE INDEX ON usage_ledger (session_id, created_at DESC) WHERE session_id IS NOT NULL;
CREATE UNIQUE INDEX ON usage_ledger (journal_id, budget_id, currency);
