-- One row per completed tool call.
SELECT
    org_id,
    'event:' || id AS source_key,
    session_id,
    coalesce(context ->> 'turn_id', data ->> 'turn_id') AS turn_id,
    ts AS created_at,
    data ->> 'tool_call_id' AS tool_call_id,
    data ->> 'tool_name' AS tool_name,
    data ->> 'display_name' AS tool_display_name_snapshot,
    coalesce(
        data ->> 'status',
        CASE WHEN data ->> 'success' = 'true' THEN 'success' ELSE 'error' END
    ) AS tool_status,
    data ->> 'capability_id' AS capability_id,
    data ->> 'capability_name' AS capability_name_snapshot,
    1 AS call_count,
    CASE WHEN data ->> 'status' = 'success' OR data ->> 'success' = 'true' THEN 1 ELSE 0 END
        AS success_count,
    CASE WHEN data ->> 'status' = 'error' OR data ->> 'success' = 'false' THEN 1 ELSE 0 END
        AS error_count,
    CASE WHEN data ->> 'status' = 'timeout' THEN 1 ELSE 0 END AS timeout_count,
    CASE WHEN data ->> 'status' = 'cancelled' THEN 1 ELSE 0 END AS cancelled_count,
    everruns_pipelines.digits(data ->> 'duration_ms', 0) AS duration_ms,
    everruns_pipelines.beyond_bigint(data ->> 'duration_ms') AS reported
FROM selected
