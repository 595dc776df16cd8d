-- PostgreSQL: rows of earlier rebuilds about spans that were read again and are fine now.
DELETE FROM everruns_pipelines.item_rejections AS rejection
USING staged_spans AS span, staged_projects AS project
WHERE
    span.whole
    AND project.name = span.project
    AND rejection.project_id = project.project_id
    AND rejection.trace_id = span.trace_id
    AND rejection.span_id = span.span_id
    AND NOT EXISTS (SELECT FROM refused WHERE refused.id = rejection.id)
