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
LEFT JOIN LATERAL (
    SELECT
        kept.is_offloaded,
        CASE
            WHEN
                kept.is_offloaded
                AND jsonb_typeof(parsed.objects #> ARRAY[kept.hash, 'uri']) = 'string'
                THEN parsed.objects #>> ARRAY[kept.hash, 'uri']
        END AS uri,
        CASE
            WHEN kept.is_offloaded IS NOT TRUE THEN parsed.objects #> ARRAY[kept.hash, 'value']
        END AS value
    FROM (
        SELECT
            named.hash,
            parsed.objects #> ARRAY[named.hash, 'type'] = '"uri"' AS is_offloaded
        FROM (
            SELECT CASE
                WHEN jsonb_typeof(output.value -> 'hash') = 'string' THEN output.value ->> 'hash'
            END AS hash
        ) AS named
        -- In an array a path would count: objects are no array.
        WHERE jsonb_typeof(parsed.objects) = 'object'
        OFFSET 0
    ) AS kept
    OFFSET 0
) AS object ON true
WHERE span.state = 'readable' AND output.value -> 'name' = '"item"'
