-- PostgreSQL: spans as a whole that cannot be read, one rejection each.
INSERT INTO candidates (
    span, position, state, reason, detail, organization_id, project_id, ended_ns
)
SELECT
    span.id,
    0,
    'rejected',
    CASE WHEN span.state = 'too_large' THEN 'too_large' ELSE 'unreadable_span' END,
    CASE
        WHEN span.state = 'too_large' THEN 'the attributes are longer than a rebuild reads'
        ELSE 'dreadnode.outputs is no array'
    END,
    project.organization_id,
    project.project_id,
    span.ended_ns
FROM staged_spans AS span
JOIN staged_projects AS project ON project.name = span.project
WHERE span.whole AND span.state IN ('too_large', 'no_array')
