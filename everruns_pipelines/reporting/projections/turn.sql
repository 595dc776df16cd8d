-- One row per turn that ended, with the tool calls that its session made in it.
SELECT
    org_id,
    'event:' || id AS source_key,
    session_id,
    turn_id,
    ts AS created_at,
    split_part(event_type, '.', 2) AS turn_status,
    1 AS turn_count,
    everruns_pipelines.digits(data ->> 'duration_ms', 0) AS duration_ms,
    everruns_pipelines.digits(data ->> 'iterations', 0) AS iterations,
    everruns_pipelines.digits(usage ->> 'input_tokens', 0) AS input_tokens,
    everruns_pipelines.digits(usage ->> 'output_tokens', 0) AS output_tokens,
    everruns_pipelines.digits(usage ->> 'cache_read_tokens', 0) AS cache_read_tokens,
    everruns_pipelines.digits(usage ->> 'cache_creation_tokens', 0) AS cache_creation_tokens,
    everruns_pipelines.digits(usage ->> 'input_tokens', 0)::numeric
        + everruns_pipelines.digits(usage ->> 'output_tokens', 0) AS total_tokens,
    coalesce(tool_calls.count, 0) AS tool_call_count,
    CASE WHEN event_type = 'turn.completed' THEN 1 ELSE 0 END AS success_count,
    CASE WHEN event_type = 'turn.completed' THEN 0 ELSE 1 END AS error_count,
    coalesce(
        everruns_pipelines.beyond_bigint(data ->> 'duration_ms'),
        everruns_pipelines.beyond_bigint(data ->> 'iterations'),
        everruns_pipelines.beyond_bigint(usage ->> 'input_tokens'),
        everruns_pipelines.beyond_bigint(usage ->> 'output_tokens'),
        everruns_pipelines.beyond_bigint(usage ->> 'cache_read_tokens'),
        everruns_pipelines.beyond_bigint(usage ->> 'cache_creation_tokens')
    ) AS reported
FROM (
    SELECT
        *,
        coalesce(data ->> 'turn_id', context ->> 'turn_id') AS turn_id,
        data -> 'usage' AS usage
    FROM selected
) AS turns
-- Counted once per session of the batch: counting per turn is quadratic in a long session. So is a
-- join row by row, which a full join cannot be: and it stays one, whatever is joined to this.
FULL JOIN (
    SELECT
        session_id,
        coalesce(context ->> 'turn_id', data ->> 'turn_id') AS turn_id,
        count(*) AS count
    FROM all_events
    WHERE event_type = 'tool.completed' AND session_id IN (SELECT session_id FROM selected)
    GROUP BY 1, 2
) AS tool_calls USING (session_id, turn_id)
WHERE coalesce(event_type, '') <> ''
OFFSET 0
