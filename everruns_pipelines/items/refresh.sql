-- PostgreSQL: the items of a batch that differ from what their span says. What people decided and
-- where the row came from stays: id, source, created_by, created_at, disposition.
UPDATE items
SET
    item_type = candidate.item_type,
    title = candidate.title,
    ref = candidate.ref,
    data = CASE WHEN planned.keeps_data THEN items.data ELSE candidate.data END,
    session_id = candidate.session_id,
    trace_id = candidate.trace_id,
    span_id = candidate.span_id,
    capability = candidate.capability,
    capability_version = candidate.capability_version,
    schema_ref = candidate.schema_ref,
    updated_at = now()
FROM planned
JOIN candidates AS candidate ON candidate.id = planned.candidate
WHERE planned.action = 'refresh' AND items.id = planned.item_id
