-- ClickHouse: the spans of a selection that may carry items, one row each, as COPY reads them.
--
-- `readable` attributes go as they are: PostgreSQL parses them. What a strict parser refuses goes
-- as base64 of its bytes, for envelope.py. `selection` picks spans by an index, `whole` says whether
-- every item of the span is meant or only those whose envelope names the session.
WITH
    SpanAttributes['dreadnode.outputs'] AS outputs,
    SpanAttributes['dreadnode.objects'] AS objects,
    SpanAttributes['dreadnode.project'] AS project,
    -- As in known_projects.sql: what looks like a UUID may be spelled in capitals.
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
