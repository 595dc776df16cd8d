-- One row per completed tool call that names the capability it belongs to.
SELECT
    org_id,
    'event:' || id || ':invoked' AS source_key,
    session_id,
    coalesce(context ->> 'turn_id', data ->> 'turn_id') AS turn_id,
    ts AS created_at,
    data ->> 'capability_id' AS capability_id,
    data ->> 'capability_name' AS capability_name_snapshot,
    'invoked' AS capability_usage_kind,
    data ->> 'tool_name' AS tool_name,
    1 AS usage_count,
    everruns_pipelines.digits(data ->> 'duration_ms', 0) AS duration_ms,
    everruns_pipelines.beyond_bigint(data ->> 'duration_ms') AS reported,
    CASE WHEN data ->> 'capability_id' IS NULL THEN 'capability_id is null' END AS rejected
FROM selected
WHERE data ? 'capability_id'
