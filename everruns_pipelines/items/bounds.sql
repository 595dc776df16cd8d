-- ClickHouse: between which seconds the spans of some traces start, and of how many it is known.
SELECT
    toUnixTimestamp(min(Start)),
    -- The older generation cuts to seconds.
    toUnixTimestamp(max(End)) + 1,
    uniqExact(TraceId)
FROM {database:Identifier}.{times:Identifier}
WHERE TraceId IN {traces:Array(String)}
