-- What is asked of ClickHouse. $names are filled in by span_table.py: what one generation of the span
-- table says otherwise than another. They stand for raw columns: an alias that is shared by SELECT
-- and WHERE fails beside a text index on the attributes' keys. Servers of 24.8 see no WITH from
-- inside a subquery.

-- name: columns
SELECT name, type, default_kind, default_expression AS expression
FROM system.columns
WHERE database = {database:String} AND table = {spans:String}

-- name: table
SELECT engine, sorting_key AS sorted, ifNull(total_rows, 0) AS held
FROM system.tables
WHERE database = {database:String} AND name = {spans:String}

-- name: indexes
SELECT type, expr AS indexed
FROM system.data_skipping_indices
WHERE database = {database:String} AND table = {spans:String}

-- name: spans
-- The spans of a selection that may carry items, one row each, as COPY reads them.
--
-- `readable` attributes go as they are: PostgreSQL parses them. What a strict parser refuses goes
-- as the hex digits of its bytes, for envelope.py. `whole` says whether every item of the span is
-- meant or only those whose envelope names the session.
SELECT
    replaceAll(toValidUTF8(toString(TraceId)), '\0', '') AS trace_id,
    replaceAll(toValidUTF8(toString(SpanId)), '\0', '') AS span_id,
    replaceAll(toValidUTF8($run), '\0', '') AS run_id,
    replaceAll(toValidUTF8($project), '\0', '') AS project_name,
    least(
        toInt128(toUnixTimestamp64Nano(Timestamp)) + Duration, toInt128(9223372036854775807)
    ) AS ended_ns,
    $whole AS whole,
    position($tool_error, 'Item was not saved to the platform') > 0 AS refused,
    multiIf(
        length($outputs) + length($objects) > {longest:UInt64}, 'too_large',
        isValidJSON($outputs) AND isValidJSON($objects)
        -- Valid JSON, and yet no PostgreSQL text.
        AND position($outputs, '\\u0000') = 0 AND position($objects, '\\u0000') = 0
        AND NOT $is_lossy,
        if(JSONType($outputs) = 'Array', 'readable', 'no_array'),
        'damaged'
    ) AS state,
    if(state = 'readable', $outputs, hex(if(state = 'damaged', $outputs_bytes, ''))) AS outputs,
    if(state = 'readable', $objects, hex(if(state = 'damaged', $objects_bytes, ''))) AS objects,
    -- Last: a line that was cut lacks it, and COPY refuses the line.
    true AS complete
FROM {database:Identifier}.{spans:Identifier}
$sift
    $span_type != 'pending_span'
    AND $outputs NOT IN ('', '[]')
    AND (
        position($outputs, '"item"') > 0
        OR position($outputs, '\\u') > 0
        OR NOT isValidJSON($outputs)
    )

-- name: traces
-- The traces in which a session occurs, and between which times the spans start that name it.
SELECT
    TraceId AS trace,
    toUnixTimestamp64Nano(min(Timestamp)) AS first_ns,
    toUnixTimestamp64Nano(max(Timestamp)) AS last_ns
FROM {database:Identifier}.{spans:Identifier}
WHERE $having
GROUP BY TraceId
ORDER BY TraceId

-- name: reported
-- The items that spans reported which ended after a position and up to a time: no payload is read.
-- Spans of more than a day are left to the days' own rebuilds, so that few partitions are touched.
SELECT trace_id, project_name, dedupe_key, toInt64(min(ended)) AS ended_ns, true AS complete
FROM (
    SELECT
        lower(toString(TraceId)) AS trace_id,
        $project AS project_name,
        arrayJoin(arrayMap(
            output -> JSONExtractString(output, 'attributes', 'dedupe_key'),
            arrayFilter(
                output -> JSONExtractString(output, 'name') = 'item', JSONExtractArrayRaw($outputs)
            )
        )) AS dedupe_key,
        toInt128(toUnixTimestamp64Nano(Timestamp)) + Duration AS ended
    FROM {database:Identifier}.{spans:Identifier}
    $sift
        $has_outputs
        AND $span_type != 'pending_span'
        AND position($outputs, '"item"') > 0
)
WHERE
    match(trace_id, '^[0-9a-f]{32}$$')
    -- Keys and names that could not stand in a table of tab-separated text exist nowhere else.
    AND match(dedupe_key, '^[[:print:]]{1,64}$$')
    AND match(project_name, '^[^[:cntrl:]]{1,255}$$')
GROUP BY trace_id, project_name, dedupe_key
HAVING (ended_ns, trace_id, project_name, dedupe_key)
    > ({after:Int64}, {after_trace:String}, {after_project:String}, {after_key:String})
ORDER BY ended_ns, trace_id, project_name, dedupe_key
LIMIT {most:UInt64}
