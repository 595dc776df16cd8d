-- The roles under which everruns_pipelines works. Run it with psql as whoever owns the platform's
-- tables and may make roles, in the platform's database; where items lie in a database of their own, in that
-- one too. It may be repeated.
--
--     psql -v ON_ERROR_STOP=1 -f deploy/postgres/roles.sql postgresql://admin@db.example/everruns
--
-- everruns_pipelines_owner   owns the schema everruns_pipelines, and runs `everruns-pipelines init`
-- everruns_pipelines_worker  EVERRUNS_POSTGRES_URL of everything that runs
-- everruns_pipelines_reader  dashboards: what is derived, and what was rejected
--
-- They have no passwords and so cannot log in yet: `\password everruns_pipelines_worker`, or grant
-- them to roles of your own. What is granted by column leaves the rest of a table closed: prompts,
-- instructions, secrets. `everruns-pipelines doctor` names every grant that is missing.

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY[
    'everruns_pipelines_owner', 'everruns_pipelines_worker', 'everruns_pipelines_reader'
]) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec

-- Batches and days are staged in temporary tables.
SELECT format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO everruns_pipelines_worker', current_database()),
    format(
        'GRANT CONNECT ON DATABASE %I TO everruns_pipelines_owner, everruns_pipelines_reader',
        current_database()
    )
\gexec

-- What is ours. What `init` makes in it later is granted by these defaults.
CREATE SCHEMA IF NOT EXISTS everruns_pipelines AUTHORIZATION everruns_pipelines_owner;
GRANT USAGE ON SCHEMA everruns_pipelines TO everruns_pipelines_worker, everruns_pipelines_reader;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA everruns_pipelines
TO everruns_pipelines_worker;
GRANT SELECT ON ALL TABLES IN SCHEMA everruns_pipelines TO everruns_pipelines_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE everruns_pipelines_owner IN SCHEMA everruns_pipelines
GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO everruns_pipelines_worker;
ALTER DEFAULT PRIVILEGES FOR ROLE everruns_pipelines_owner IN SCHEMA everruns_pipelines
GRANT SELECT ON TABLES TO everruns_pipelines_reader;

SELECT
    to_regclass('reporting_outbox') IS NOT NULL AS has_reporting,
    to_regclass('items') IS NOT NULL AS has_items
\gset

\if :has_reporting
-- Sources: read, by column.
GRANT SELECT (id, session_id, event_type, ts, context, data)
ON events, archived_events TO everruns_pipelines_worker;
-- Of when the newest is, for `pipeline_health`.
GRANT SELECT (created_at) ON events TO everruns_pipelines_worker;
GRANT SELECT (
    id, org_id, status, agent_id, harness_id, app_id, blueprint_id, owner_principal_id,
    resolved_owner_user_id, capabilities, turn_count, tool_call_count, total_input_tokens,
    total_output_tokens, total_cache_read_tokens, total_cache_creation_tokens, started_at,
    finished_at, updated_at, created_at
)
ON sessions TO everruns_pipelines_worker;
GRANT SELECT (
    id, org_id, session_id, turn_id, model, provider, finish_reason, input_tokens, output_tokens,
    cache_read_tokens, cache_creation_tokens, duration_ms, created_at
)
ON llm_generations TO everruns_pipelines_worker;
GRANT SELECT (
    id, org_id, session_id, budget_id, user_id, principal_id, agent_id, harness_id, currency,
    amount, meter_source, ref_type, created_at
)
ON usage_ledger TO everruns_pipelines_worker;
GRANT SELECT (agent_id, capability_id) ON agent_capabilities TO everruns_pipelines_worker;
GRANT SELECT (harness_id, capability_id) ON harness_capabilities TO everruns_pipelines_worker;
GRANT SELECT (id, org_id, name) ON agents, harnesses, mcp_servers, skills
TO everruns_pipelines_worker;
GRANT SELECT (org_id, name, display_name) ON declarative_capabilities
TO everruns_pipelines_worker;
GRANT SELECT (id, org_id, subject_type, subject_id) ON budgets TO everruns_pipelines_worker;
GRANT SELECT (org_id) ON organizations TO everruns_pipelines_worker;

-- The outbox and the facts: kept.
GRANT SELECT, INSERT, UPDATE, DELETE ON
    reporting_outbox, fact_llm_generation, fact_tool_call, fact_turn, fact_session,
    fact_budget_posting, fact_capability_usage
TO everruns_pipelines_worker;
GRANT SELECT ON
    fact_llm_generation, fact_tool_call, fact_turn, fact_session, fact_budget_posting,
    fact_capability_usage
TO everruns_pipelines_reader;
\endif

\if :has_items
-- Items: never deleted, and never what people decide about them (`disposition`) once it is there.
GRANT SELECT (id, slug) ON item_organizations TO everruns_pipelines_worker;
GRANT SELECT (id, organization_id, slug) ON item_workspaces TO everruns_pipelines_worker;
GRANT SELECT (id, workspace_id, slug) ON projects TO everruns_pipelines_worker;
GRANT
    SELECT (
        id, project_id, dedupe_key, organization_id, item_type, title, ref, data, session_id,
        trace_id, span_id, capability, capability_version, schema_ref
    ),
    INSERT (
        project_id, dedupe_key, disposition, source, created_at, updated_at, organization_id,
        item_type, title, ref, data, session_id, trace_id, span_id, capability,
        capability_version, schema_ref
    ),
    UPDATE (
        updated_at, organization_id, item_type, title, ref, data, session_id, trace_id, span_id,
        capability, capability_version, schema_ref
    )
ON items TO everruns_pipelines_worker;
GRANT
    SELECT (id, source_item_id, target_item_id, relationship),
    INSERT (id, project_id, source_item_id, target_item_id, relationship, created_at)
ON item_links TO everruns_pipelines_worker;
GRANT SELECT ON items, item_links, projects TO everruns_pipelines_reader;
\endif
