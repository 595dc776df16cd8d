-- Spans on their way from ClickHouse into `staged_spans`.

-- name: copy
COPY staged_spans (
    trace_id, span_id, run_id, project_name, ended_ns, whole, refused, state, outputs, objects,
    complete
) FROM STDIN

-- name: drop_repeats
-- Of spans that were delivered more than once one is left, the same one every time.
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

-- name: by_project
-- How many spans there are of each project, and whether any may be a repeat of another.
SELECT project_id::text, sum(spans)::bigint, bool_or(are_repeated)
FROM (
    SELECT project, sum(spans) AS spans, bool_or(spans > 1) AS are_repeated
    FROM (
        SELECT project, count(*) AS spans
        FROM staged_spans
        GROUP BY project, hashtextextended(span_id, hashtextextended(trace_id, 0))
    ) AS alike
    GROUP BY project
) AS counted
LEFT JOIN staged_projects ON name = project
GROUP BY project_id
