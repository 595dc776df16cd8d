-- One row per output message that a guardrail capability replaced.
SELECT
    org_id,
    'event:' || id || ':effect_ran' AS source_key,
    session_id,
    coalesce(context ->> 'turn_id', data ->> 'turn_id') AS turn_id,
    ts AS created_at,
    data ->> 'guardrail_capability_id' AS capability_id,
    data ->> 'guardrail_capability_id' AS capability_name_snapshot,
    'effect_ran' AS capability_usage_kind,
    NULL::text AS tool_name,
    1 AS usage_count,
    0 AS duration_ms,
    CASE WHEN data ->> 'guardrail_capability_id' IS NULL THEN 'capability_id is null' END
        AS rejected
FROM selected
WHERE data ? 'guardrail_capability_id'
