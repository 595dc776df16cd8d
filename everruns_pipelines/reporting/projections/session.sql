-- One row per session, from the counters of its own row.
--
-- Retention lowers them when it takes events away. Of a session with archived events, its events are
-- counted; of any other, none is read.
SELECT
    org_id,
    'session:' || id AS source_key,
    id AS session_id,
    created_at,
    status AS session_status,
    started_at,
    finished_at,
    updated_at AS last_active_at,
    1 AS session_count,
    -- greatest() passes over a NULL: a session that has not both times lasts 0. Subtracted as
    -- numbers: times that are far apart have no interval, nor has infinity to itself. Then the
    -- number is NaN, which is greater than any, and beyond bigint as infinity is.
    round(
        greatest(extract(epoch FROM finished_at) - extract(epoch FROM started_at), 0) * 1000
    ) AS duration_ms,
    -- greatest() passes over a NULL: what was not counted.
    greatest(turn_count, counted[1]) AS turn_count,
    total_input_tokens AS input_tokens,
    total_output_tokens AS output_tokens,
    total_cache_read_tokens AS cache_read_tokens,
    total_cache_creation_tokens AS cache_creation_tokens,
    total_input_tokens::numeric + total_output_tokens
        + total_cache_read_tokens + total_cache_creation_tokens AS total_tokens,
    greatest(tool_call_count, counted[2]) AS tool_call_count
FROM selected
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN EXISTS (SELECT FROM archived_events WHERE archived_events.session_id = selected.id)
            THEN (
                SELECT ARRAY[
                    count(*) FILTER (WHERE event_type <> 'tool.completed'),
                    count(*) FILTER (WHERE event_type = 'tool.completed')
                ]
                FROM all_events
                WHERE all_events.session_id = selected.id
                    AND event_type IN (
                        'turn.completed', 'turn.failed', 'turn.cancelled', 'tool.completed'
                    )
            )
    END AS counted
    -- Evaluated once, not once for each use.
    OFFSET 0
) AS history
