-- What is asked of ClickHouse. What one generation of the span table says otherwise than another
-- stands as $name, and is filled in by span_table.py.

-- name: spans
-- The spans of a selection that may carry items, one row each, as COPY reads them.
--
-- `readable` attributes go as they are: PostgreSQL parses them. What a strict parser refuses goes
-- as base64 of its bytes, for envelope.py. `selection` picks spans by an index, `whole` says whether
-- every item of the span is meant or only those whose envelope names the session.
WITH
    SpanAttributes['dreadnode.outputs'] AS outputs,
    SpanAttributes['dreadnode.objects'] AS objects,
    SpanAttributes['dreadnode.project'] AS project,
    -- As in projects.sql: what looks like a UUID may be spelled in capitals.
    if(match(project, '^[0-9A-Fa-f-]{32,36}$$'), lower(project), project) AS project_name,
    multiIf(
        length(outputs) + length(objects) > {longest:UInt64}, 'too_large',
        isValidJSON(outputs) AND isValidJSON(objects)
        -- Valid JSON, and yet no PostgreSQL text.
        AND position(outputs, '\\u0000') = 0 AND position(objects, '\\u0000') = 0,
        if(JSONType(outputs) = 'Array', 'readable', 'no_array'),
        'damaged'
    ) AS state
SELECT
    replaceAll(toValidUTF8(TraceId), '\0', '') AS trace_id,
    replaceAll(toValidUTF8(SpanId), '\0', '') AS span_id,
    replaceAll(toValidUTF8(SpanAttributes['dreadnode.run.id']), '\0', '') AS run_id,
    replaceAll(toValidUTF8(project_name), '\0', '') AS project_text,
    least(
        toInt128(toUnixTimestamp64Nano(Timestamp)) + Duration, toInt128(9223372036854775807)
    ) AS ended_ns,
    $whole AS whole,
    state,
    multiIf(state = 'readable', outputs, state = 'damaged', base64Encode(outputs), '') AS outputs_text,
    multiIf(state = 'readable', objects, state = 'damaged', base64Encode(objects), '') AS objects_text,
    -- Last: a line that was cut lacks it, and COPY refuses the line.
    true AS complete
FROM {database:Identifier}.{spans:Identifier}
WHERE
    $selection
    AND SpanAttributes['logfire.span_type'] != 'pending_span'
    AND outputs NOT IN ('', '[]')
    AND (
        position(outputs, '"item"') > 0
        OR position(outputs, '\\u') > 0
        OR NOT isValidJSON(outputs)
    )

-- name: traces
-- The traces in which a session occurs, in the order of their time.
-- `has` over the map's values is what its bloom filter answers; the key is compared after that.
SELECT TraceId
FROM {database:Identifier}.{spans:Identifier}
WHERE
    hasAny(mapValues(SpanAttributes), {sessions:Array(String)})
    AND SpanAttributes['dreadnode.session.id'] IN {sessions:Array(String)}
GROUP BY TraceId
ORDER BY min(Timestamp), TraceId

-- name: bounds
-- Between which seconds the spans of some traces start, and of how many it is known.
SELECT
    toUnixTimestamp(min(Start)),
    -- The older generation cuts to seconds.
    toUnixTimestamp(max(End)) + 1,
    uniqExact(TraceId)
FROM {database:Identifier}.{times:Identifier}
WHERE TraceId IN {traces:Array(String)}

-- name: reported
-- The items that spans reported which ended in a window, by key: no payload is read.
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
        -- As in projects.sql.
        if(match(name, '^[0-9A-Fa-f-]{32,36}$$'), lower(name), name) AS project_name,
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
    match(trace_id, '^[0-9a-f]{32}$$')
    -- Keys and names that could not stand in a table of tab-separated text exist nowhere else.
    AND match(key, '^[[:print:]]{1,64}$$')
    AND match(project_name, '^[^[:cntrl:]]{1,255}$$')
GROUP BY trace_id, project_name, key
ORDER BY first_ended, trace_id, key
LIMIT {most:UInt64}
