-- What was found and is not stored is told, one row each.

-- name: refused
-- What was found and is not stored, one row per envelope or unreadable span. An envelope
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

-- name: forget
-- Rows of earlier rebuilds about spans that were read again and are fine now.
DELETE FROM everruns_pipelines.item_rejections AS rejection
USING staged_spans AS span, staged_projects AS project
WHERE
    span.whole
    AND project.name = span.project
    AND rejection.project_id = project.project_id
    AND rejection.trace_id = span.trace_id
    AND rejection.span_id = span.span_id
    AND NOT EXISTS (SELECT FROM refused WHERE refused.id = rejection.id)

-- name: reject
-- Tell what was not stored, in place of what an earlier rebuild told about the same.
INSERT INTO everruns_pipelines.item_rejections (
    id, project_id, dedupe_key, trace_id, span_id, reason, detail, run_id
)
SELECT id, project_id, dedupe_key, trace_id, span_id, reason, detail, run_id
FROM refused
ORDER BY id
ON CONFLICT (id) DO UPDATE SET
    trace_id = excluded.trace_id,
    span_id = excluded.span_id,
    reason = excluded.reason,
    detail = excluded.detail,
    run_id = excluded.run_id,
    rejected_at = now()
