-- PostgreSQL: of spans that were delivered more than once one is left, the same one every time.
DELETE FROM staged_spans USING (
    SELECT
        span.id,
        row_number() OVER (
            PARTITION BY project, trace_id, span_id
            ORDER BY
                whole DESC, state = 'readable' DESC, ended_ns,
                -- Of damaged ones the longer: the other may be cut.
                octet_length(outputs) + octet_length(objects) DESC, md5(outputs), md5(objects)
        ) AS number
    FROM staged_spans AS span
    -- Hardly any were, which is found out at less cost by a number than by three texts.
    JOIN (
        SELECT hashtextextended(span_id, hashtextextended(trace_id, 0)) AS hash
        FROM staged_spans
        GROUP BY hash
        HAVING count(*) > 1
    ) AS repeated ON hash = hashtextextended(span_id, hashtextextended(trace_id, 0))
) AS delivered
WHERE staged_spans.id = delivered.id AND delivered.number > 1
