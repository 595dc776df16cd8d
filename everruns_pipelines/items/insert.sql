-- PostgreSQL: the items of a batch that the table does not have. Of its columns only `id` is sure to
-- have a default.
INSERT INTO items (
    organization_id, project_id, item_type, title, ref, data, disposition, source, session_id,
    trace_id, span_id, capability, capability_version, schema_ref, dedupe_key, created_at,
    updated_at
)
SELECT
    organization_id, project_id, item_type, title, ref, data, disposition, 'extracted', session_id,
    trace_id, span_id, capability, capability_version, schema_ref, dedupe_key,
    timestamptz 'epoch' + (ended_ns / 1000) * interval '1 microsecond',
    now()
FROM planned
JOIN candidates ON candidates.id = planned.candidate
WHERE planned.action = 'insert'
ORDER BY planned.candidate
