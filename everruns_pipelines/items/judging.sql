-- Every item output of the spans that were read, judged into `candidates`.

-- name: judge
-- Judge every envelope by the contract's structure and limits, nothing else.
-- `found` is the statement `readable` or `values`. A value that is no object is no envelope and is ignored.
-- Only strings are asked for their text: that of 1e131071 is 131,072 digits long, and of a short
-- list of such numbers more than PostgreSQL can hold.
INSERT INTO candidates (
    span, position, state, reason, detail, organization_id, project_id, dedupe_key, ended_ns, uri,
    size, item_type, title, ref, session_id, trace_id, span_id, capability, capability_version,
    schema_ref, disposition, links, data
)
SELECT
    found.span,
    found.position,
    CASE
        WHEN NOT found.whole AND session.id IS DISTINCT FROM %(session)s THEN 'out_of_scope'
        WHEN found.reason = 'offloaded' THEN 'offloaded'
        WHEN coalesce(found.reason, verdict.flaw) IS NOT NULL THEN 'rejected'
        ELSE 'valid'
    END,
    coalesce(found.reason, CASE WHEN verdict.flaw IS NOT NULL THEN 'invalid_field' END),
    CASE WHEN found.reason IS NOT NULL THEN found.detail ELSE verdict.flaw END,
    found.organization_id,
    found.project_id,
    CASE
        -- What was fetched may be another item: whose it should be, the span says.
        WHEN key.is_sound AND NOT found.fetched THEN text.dedupe_key
        WHEN char_length(found.key_hint) BETWEEN 1 AND 64 THEN found.key_hint
    END,
    found.ended_ns,
    found.uri,
    found.size,
    text.item_type,
    text.title,
    nullif(text.ref, ''),
    session.id,
    coalesce(text.trace_id, found.trace_id),
    coalesce(text.span_id, found.span_id),
    text.capability,
    text.capability_version,
    text.schema_ref,
    CASE
        WHEN status.known IS NOT NULL OR text.notes <> ''
            THEN jsonb_build_object('status', status.known, 'notes', text.notes)
    END,
    CASE WHEN jsonb_typeof(sound.value -> 'links') = 'array' THEN sound.value -> 'links' END,
    CASE
        -- As the SDK does before its POST: the raw session goes into the metadata.
        WHEN session.raw IS NULL OR session.id IS NOT NULL THEN sound.value -> 'data'
        WHEN jsonb_typeof(sound.value -> 'data' -> 'metadata') = 'object'
            THEN jsonb_set(
                sound.value -> 'data', '{{metadata,session_ref}}', to_jsonb(session.raw)
            )
        WHEN NOT sound.value -> 'data' ? 'metadata'
            THEN (sound.value -> 'data')
            || jsonb_build_object('metadata', jsonb_build_object('session_ref', session.raw))
        ELSE sound.value -> 'data'
    END
FROM ({found}) AS found
-- Each field's type and text, taken once: all that follows asks several times.
CROSS JOIN LATERAL (
    SELECT
        jsonb_typeof(found.value -> 'dedupe_key') AS dedupe_key,
        jsonb_typeof(found.value -> 'item_type') AS item_type,
        jsonb_typeof(found.value -> 'title') AS title,
        jsonb_typeof(found.value -> 'ref') AS ref,
        jsonb_typeof(found.value -> 'session_id') AS session_id,
        jsonb_typeof(found.value -> 'trace_id') AS trace_id,
        jsonb_typeof(found.value -> 'span_id') AS span_id,
        jsonb_typeof(found.value -> 'capability') AS capability,
        jsonb_typeof(found.value -> 'capability_version') AS capability_version,
        jsonb_typeof(found.value -> 'schema_ref') AS schema_ref,
        jsonb_typeof(found.value -> 'status') AS status,
        jsonb_typeof(found.value -> 'notes') AS notes
    OFFSET 0
) AS type
CROSS JOIN LATERAL (
    SELECT
        CASE WHEN type.dedupe_key = 'string' THEN found.value ->> 'dedupe_key' END AS dedupe_key,
        CASE WHEN type.item_type = 'string' THEN found.value ->> 'item_type' END AS item_type,
        CASE WHEN type.title = 'string' THEN found.value ->> 'title' END AS title,
        CASE WHEN type.ref = 'string' THEN found.value ->> 'ref' END AS ref,
        CASE WHEN type.session_id = 'string' THEN found.value ->> 'session_id' END AS session_id,
        CASE WHEN type.trace_id = 'string' THEN found.value ->> 'trace_id' END AS trace_id,
        CASE WHEN type.span_id = 'string' THEN found.value ->> 'span_id' END AS span_id,
        CASE WHEN type.capability = 'string' THEN found.value ->> 'capability' END AS capability,
        CASE
            WHEN type.capability_version = 'string' THEN found.value ->> 'capability_version'
        END AS capability_version,
        CASE WHEN type.schema_ref = 'string' THEN found.value ->> 'schema_ref' END AS schema_ref,
        CASE WHEN type.status = 'string' THEN found.value ->> 'status' END AS status,
        CASE WHEN type.notes = 'string' THEN found.value ->> 'notes' END AS notes
    OFFSET 0
) AS text
CROSS JOIN LATERAL (
    SELECT
        CASE WHEN type.session_id = 'string' THEN text.session_id ELSE found.session_hint END AS raw
) AS named
-- A UUID as Python's `UUID` reads one, which is what the SDK asks: also in spellings that
-- PostgreSQL does not know.
CROSS JOIN LATERAL (
    SELECT
        named.raw,
        CASE
            WHEN pg_input_is_valid(named.raw, 'uuid') THEN named.raw::uuid
            WHEN pg_input_is_valid(bare.hex, 'uuid') THEN bare.hex::uuid
        END AS id
    FROM (
        SELECT translate(
            replace(replace(lower(named.raw), 'urn:', ''), 'uuid:', ''), '{{}}-', ''
        ) AS hex
    ) AS bare
    OFFSET 0
) AS session
CROSS JOIN LATERAL (
    SELECT
        type.dedupe_key = 'string'
        AND char_length(text.dedupe_key) BETWEEN 1 AND 64 AS is_sound
) AS key
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN key.is_sound IS NOT TRUE THEN 'dedupe_key must be a string of 1 to 64 characters'
        WHEN found.fetched AND text.dedupe_key IS DISTINCT FROM found.key_hint
            THEN 'the fetched object is another item than the span says'
        WHEN type.item_type IS DISTINCT FROM 'string'
            OR char_length(text.item_type) NOT BETWEEN 1 AND 64
            THEN 'item_type must be a string of 1 to 64 characters'
        WHEN jsonb_typeof(found.value -> 'data') IS DISTINCT FROM 'object'
            THEN 'data must be an object'
        WHEN type.title NOT IN ('string', 'null')
            OR char_length(text.title) > 512
            THEN 'title must be null or a string of at most 512 characters'
        WHEN type.ref NOT IN ('string', 'null')
            OR char_length(text.ref) > 128
            THEN 'ref must be null or a string of at most 128 characters'
        WHEN type.capability NOT IN ('string', 'null')
            OR char_length(text.capability) > 255
            THEN 'capability must be null or a string of at most 255 characters'
        WHEN type.capability_version NOT IN ('string', 'null')
            OR char_length(text.capability_version) > 64
            THEN 'capability_version must be null or a string of at most 64 characters'
        WHEN jsonb_typeof(found.value -> 'links') NOT IN ('array', 'null')
            THEN 'links must be null or an array'
        WHEN type.schema_ref NOT IN ('string', 'null')
            THEN 'schema_ref must be null or a string'
        WHEN type.session_id NOT IN ('string', 'null')
            THEN 'session_id must be null or a string'
        WHEN type.trace_id NOT IN ('string', 'null')
            THEN 'trace_id must be null or a string'
        WHEN type.span_id NOT IN ('string', 'null')
            THEN 'span_id must be null or a string'
        WHEN type.status NOT IN ('string', 'null')
            THEN 'status must be null or a string'
        WHEN type.notes NOT IN ('string', 'null')
            THEN 'notes must be null or a string'
    END AS flaw
    OFFSET 0
) AS verdict
CROSS JOIN LATERAL (
    SELECT CASE WHEN verdict.flaw IS NULL THEN found.value END AS value
) AS sound
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN text.status IN ('open', 'triaged', 'verified', 'resolved', 'dismissed')
            THEN text.status
    END AS known
) AS status
WHERE found.reason IS NOT NULL OR jsonb_typeof(found.value) = 'object'

-- name: readable
-- The item outputs of readable spans, each joined to its object by hash.
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
    object.size,
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
        CASE
            WHEN kept.is_offloaded AND jsonb_typeof(kept.object -> 'size') = 'number'
                THEN (kept.object -> 'size')::numeric
        END AS size,
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

-- name: values
-- The values cut out of damaged spans or fetched, in the form of `readable`.
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
    staged.size,
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

-- name: unreadable
-- Spans as a whole that cannot be read, one rejection each.
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

-- name: take_for_damaged
-- Spans whose attributes ClickHouse takes for JSON and PostgreSQL does not.
UPDATE staged_spans
SET
    state = 'damaged',
    outputs = encode(convert_to(outputs, 'UTF8'), 'hex'),
    objects = encode(convert_to(objects, 'UTF8'), 'hex')
WHERE
    state = 'readable'
    AND NOT (pg_input_is_valid(outputs, 'jsonb') AND pg_input_is_valid(objects, 'jsonb'))

-- name: stage_value
INSERT INTO staged_values (
    span, fetched, position, key_hint, session_hint, uri, size, reason, detail, value
) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
