-- One row per element of the records that a capability reported.
SELECT
    org_id,
    'event:' || id || ':capability_usage:' || position AS source_key,
    session_id,
    coalesce(context ->> 'turn_id', data ->> 'turn_id') AS turn_id,
    ts AS created_at,
    record ->> 'capability_id' AS capability_id,
    record ->> 'capability_name' AS capability_name_snapshot,
    record ->> 'usage_kind' AS capability_usage_kind,
    record ->> 'tool_name' AS tool_name,
    everruns_pipelines.digits(record ->> 'usage_count', 1) AS usage_count,
    everruns_pipelines.digits(record ->> 'duration_ms', 0) AS duration_ms,
    coalesce(
        everruns_pipelines.beyond_bigint(record ->> 'usage_count'),
        everruns_pipelines.beyond_bigint(record ->> 'duration_ms')
    ) AS reported,
    CASE
        WHEN record ->> 'capability_id' IS NULL THEN 'capability_id is null'
        WHEN (record ->> 'usage_kind') IN (
            'configured', 'resolved', 'exposed', 'invoked', 'effect_ran'
        ) THEN NULL
        ELSE 'usage_kind is unknown'
    END AS rejected
FROM
    selected,
    jsonb_array_elements(
        CASE WHEN jsonb_typeof(data -> 'records') = 'array' THEN data -> 'records' ELSE '[]' END
    ) WITH ORDINALITY AS records (record, position)
WHERE jsonb_typeof(record) = 'object' AND record ?& ARRAY['capability_id', 'usage_kind']
