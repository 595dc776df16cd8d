-- PostgreSQL: what was found and is not stored, one row per envelope or unreadable span. An envelope
-- whose key is stored by another of its copies is not among them.
CREATE TEMP TABLE refused AS
SELECT DISTINCT ON (id) *
FROM (
    SELECT
        md5(concat_ws(
            chr(31),
            candidate.project_id,
            CASE
                WHEN candidate.dedupe_key IS NOT NULL THEN 'key ' || candidate.dedupe_key
                ELSE concat_ws(chr(31), span.trace_id, span.span_id, candidate.position)
            END
        ))::uuid AS id,
        candidate.project_id,
        candidate.dedupe_key,
        span.trace_id,
        span.span_id,
        candidate.reason,
        candidate.detail,
        nullif(span.run_id, '') AS run_id,
        candidate.ended_ns
    FROM candidates AS candidate
    JOIN staged_spans AS span ON span.id = candidate.span
    WHERE
        candidate.state IN ('rejected', 'offloaded')
        AND NOT EXISTS (
            SELECT
            FROM chosen
            WHERE
                chosen.project_id = candidate.project_id
                AND chosen.dedupe_key = candidate.dedupe_key
        )
)
ORDER BY id, ended_ns, trace_id COLLATE "C", span_id COLLATE "C"
