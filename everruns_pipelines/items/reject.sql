-- PostgreSQL: tell what was not stored, in place of what an earlier rebuild told about the same.
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
