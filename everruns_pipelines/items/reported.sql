-- ClickHouse: the items that spans reported which ended in a window, by key: no payload is read.
-- Spans of more than a day are left to the days' own rebuilds, so that few partitions are touched.
WITH
    SpanAttributes['dreadnode.outputs'] AS outputs,
    SpanAttributes['dreadnode.project'] AS name,
    toInt128(toUnixTimestamp64Nano(Timestamp)) + Duration AS ended_ns
SELECT
    trace_id,
    project_name,
    key,
    toInt64(min(ended)) AS first_ended
FROM (
    SELECT
        lower(TraceId) AS trace_id,
        -- As in known_projects.sql.
        if(match(name, '^[0-9A-Fa-f-]{32,36}$'), lower(name), name) AS project_name,
        arrayJoin(arrayMap(
            output -> JSONExtractString(output, 'attributes', 'dedupe_key'),
            arrayFilter(
                output -> JSONExtractString(output, 'name') = 'item', JSONExtractArrayRaw(outputs)
            )
        )) AS key,
        intDiv(ended_ns, 1000000000) AS ended
    FROM {database:Identifier}.{spans:Identifier}
    WHERE
        Timestamp >= fromUnixTimestamp64Milli(({since:Int64} - 86400) * 1000, 'UTC')
        AND Timestamp <= fromUnixTimestamp64Milli({until:Int64} * 1000, 'UTC')
        AND ended_ns > toInt128({since:Int64}) * 1000000000
        AND ended_ns <= toInt128({until:Int64}) * 1000000000
        AND has(mapKeys(SpanAttributes), 'dreadnode.outputs')
        AND SpanAttributes['logfire.span_type'] != 'pending_span'
        AND position(outputs, '"item"') > 0
)
WHERE
    match(trace_id, '^[0-9a-f]{32}$')
    -- Keys and names that could not stand in a table of tab-separated text exist nowhere else.
    AND match(key, '^[[:print:]]{1,64}$')
    AND match(project_name, '^[^[:cntrl:]]{1,255}$')
GROUP BY trace_id, project_name, key
ORDER BY first_ended, trace_id, key
LIMIT {most:UInt64}
