-- One row per capability that a session has, once for each of the lists that name it.
SELECT
    configured.org_id,
    'session:' || session_id || ':configured:' || scope || ':' || capability_id AS source_key,
    session_id,
    NULL::text AS turn_id,
    configured.created_at,
    capability_id,
    -- Only who asks for the name pays for it: a comparison of keys does not.
    coalesce(
        CASE
            WHEN starts_with(capability_id, 'mcp:')
                AND pg_input_is_valid(substr(capability_id, 5), 'uuid')
                THEN (
                    SELECT name FROM mcp_servers
                    WHERE id = substr(capability_id, 5)::uuid
                        AND 'mcp:' || id = capability_id
                        AND (org_id = configured.org_id) IS TRUE
                )
            WHEN starts_with(capability_id, 'skill:')
                AND pg_input_is_valid(substr(capability_id, 7), 'uuid')
                THEN (
                    SELECT name FROM skills
                    WHERE id = substr(capability_id, 7)::uuid
                        AND 'skill:' || id = capability_id
                        AND (org_id = configured.org_id) IS TRUE
                )
            WHEN starts_with(capability_id, 'declarative:') THEN (
                SELECT coalesce(display_name, name) FROM declarative_capabilities
                WHERE org_id = configured.org_id AND name = substr(capability_id, 13)
            )
        END,
        capability_id
    ) AS capability_name_snapshot,
    'configured' AS capability_usage_kind,
    NULL::text AS tool_name,
    1 AS usage_count,
    0 AS duration_ms
FROM (
    SELECT selected.org_id, selected.id AS session_id, selected.created_at,
        'agent' AS scope, agent_capabilities.capability_id::text
    FROM selected
    JOIN agent_capabilities USING (agent_id)
    UNION ALL
    SELECT selected.org_id, selected.id, selected.created_at,
        'harness', harness_capabilities.capability_id
    FROM selected
    JOIN harness_capabilities USING (harness_id)
    UNION ALL
    SELECT selected.org_id, selected.id, selected.created_at, 'session', named.id
    FROM selected,
        LATERAL (
            SELECT DISTINCT CASE
                WHEN jsonb_typeof(capability) = 'string' THEN capability #>> '{}'
                WHEN jsonb_typeof(capability -> 'ref') = 'string' THEN capability ->> 'ref'
            END AS id
            FROM jsonb_array_elements(
                CASE WHEN jsonb_typeof(capabilities) = 'array' THEN capabilities ELSE '[]' END
            ) AS listed (capability)
        ) AS named
    WHERE named.id <> ''
) AS configured
