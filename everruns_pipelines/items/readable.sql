-- PostgreSQL: the item outputs of readable spans, each joined to its object by hash.
SELECT
    span.id AS span,
    span.trace_id,
    span.span_id,
    span.ended_ns,
    span.whole,
    project.project_id,
    project.organization_id,
    output.position::integer AS position,
    CASE
        WHEN jsonb_typeof(output.value -> 'attributes' -> 'dedupe_key') = 'string'
            THEN output.value -> 'attributes' ->> 'dedupe_key'
    END AS key_hint,
    NULL AS session_hint,
    false AS fetched,
    object.uri,
    CASE
        WHEN object.is_offloaded THEN 'offloaded'
        WHEN object.value IS NULL THEN 'object_missing'
    END AS reason,
    NULL AS detail,
    object.value
FROM staged_spans AS span
JOIN staged_projects AS project ON project.name = span.project
-- OFFSET 0 is a fence: each attribute is parsed once, not once per output, and each value is
-- looked up once, not once per field.
CROSS JOIN LATERAL (
    SELECT span.outputs::jsonb AS outputs, span.objects::jsonb AS objects OFFSET 0
) AS parsed
CROSS JOIN LATERAL jsonb_array_elements(
    CASE WHEN jsonb_typeof(parsed.outputs) = 'array' THEN parsed.outputs ELSE '[]' END
) WITH ORDINALITY AS output (value, position)
CROSS JOIN LATERAL (
    SELECT
        kept.is_offloaded,
        CASE
            WHEN kept.is_offloaded AND jsonb_typeof(kept.object -> 'uri') = 'string'
                THEN kept.object ->> 'uri'
        END AS uri,
        CASE WHEN kept.is_offloaded IS NOT TRUE THEN kept.object -> 'value' END AS value
    FROM (
        SELECT named.object, named.object -> 'type' = '"uri"' AS is_offloaded
        FROM (
            SELECT CASE
                WHEN jsonb_typeof(output.value -> 'hash') = 'string'
                    THEN parsed.objects -> (output.value ->> 'hash')
            END AS object
            OFFSET 0
        ) AS named
    ) AS kept
    OFFSET 0
) AS object
WHERE span.state = 'readable' AND output.value -> 'name' = '"item"'
