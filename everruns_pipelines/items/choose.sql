-- PostgreSQL: of the valid envelopes with one dedupe key the earliest by span end counts.
INSERT INTO chosen (candidate, project_id, dedupe_key, ref, ended_ns)
SELECT DISTINCT ON (dedupe_key COLLATE "C", project_id)
    id, project_id, dedupe_key, ref, ended_ns
FROM candidates
WHERE state = 'valid'
ORDER BY
    -- The key first: it tells rows apart, the project hardly ever.
    dedupe_key COLLATE "C", project_id, ended_ns, trace_id COLLATE "C", span_id COLLATE "C",
    position, id
