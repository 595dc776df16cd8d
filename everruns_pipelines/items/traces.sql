-- ClickHouse: the traces in which a session occurs, in the order of their time.
-- `has` over the map's values is what its bloom filter answers; the key is compared after that.
SELECT TraceId
FROM {database:Identifier}.{spans:Identifier}
WHERE
    hasAny(mapValues(SpanAttributes), {sessions:Array(String)})
    AND SpanAttributes['dreadnode.session.id'] IN {sessions:Array(String)}
GROUP BY TraceId
ORDER BY min(Timestamp), TraceId
