-- PostgreSQL: the values cut out of damaged spans or fetched, in the form of readable.sql.
SELECT
    span.id AS span,
    span.trace_id,
    span.span_id,
    span.ended_ns,
    span.whole,
    project.project_id,
    project.organization_id,
    staged.position,
    staged.key_hint,
    staged.session_hint,
    staged.fetched,
    staged.uri,
    CASE
        WHEN staged.reason IS NOT NULL THEN staged.reason
        WHEN flaw.sql_error_code = '22P05' THEN 'unstorable_text'
        WHEN flaw.sql_error_code IS NOT NULL THEN 'invalid_json'
    END AS reason,
    coalesce(staged.detail, flaw.message) AS detail,
    -- CASE: a value is cast only after it was tried.
    CASE WHEN flaw.sql_error_code IS NULL THEN staged.value::jsonb END AS value
FROM staged_values AS staged
JOIN staged_spans AS span ON span.id = staged.span
JOIN staged_projects AS project ON project.name = span.project
CROSS JOIN LATERAL pg_input_error_info(staged.value, 'jsonb') AS flaw
