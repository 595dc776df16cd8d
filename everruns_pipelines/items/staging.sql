-- PostgreSQL: where a rebuild works before it touches a table. Temporary: gone with the connection.

-- Of this connection alone. What is staged is passed over several times: rather from memory than
-- from files. Memoize would keep copies of every payload and never use one again.
SET temp_buffers = '256MB';
SET work_mem = '64MB';
SET enable_memoize = off;

-- Of what is staged: that keys and refs hardly repeat is seen in a few thousand of them.
SET default_statistics_target = 10;

-- Filled by COPY from ClickHouse.
CREATE TEMP TABLE staged_spans (
    id bigint GENERATED ALWAYS AS IDENTITY,
    trace_id text NOT NULL,
    span_id text NOT NULL,
    run_id text NOT NULL,
    project_name text NOT NULL,
    -- As in projects.sql: what looks like a UUID may be spelled in capitals. Hardly any is, which is
    -- found out at less cost than what it looks like.
    project text GENERATED ALWAYS AS (
        CASE
            WHEN project_name <> lower(project_name COLLATE "C")
                AND char_length(project_name) BETWEEN 32 AND 36
                AND project_name ~ '^[0-9A-Fa-f-]+$'
                THEN lower(project_name)
            ELSE project_name
        END
    ) STORED,
    ended_ns bigint NOT NULL,
    whole boolean NOT NULL,
    -- The platform answered a report of this span that it does not take it.
    refused boolean NOT NULL,
    state text NOT NULL,
    outputs text STORAGE EXTERNAL NOT NULL,
    objects text STORAGE EXTERNAL NOT NULL,
    complete boolean NOT NULL CHECK (complete)
);

-- Most are readable, and not refused: the others are found without passing over all.
CREATE INDEX ON staged_spans (state) WHERE state <> 'readable';
CREATE INDEX ON staged_spans (id) WHERE refused;

-- Values that did not come along in a readable span: cut out of a damaged one, or fetched.
CREATE TEMP TABLE staged_values (
    span bigint NOT NULL,
    position integer NOT NULL,
    key_hint text,
    session_hint text,
    fetched boolean NOT NULL,
    uri text,
    size numeric,
    reason text,
    detail text,
    value text STORAGE EXTERNAL
);

-- Every item output, judged.
CREATE TEMP TABLE candidates (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    span bigint NOT NULL,
    position integer NOT NULL,
    state text NOT NULL, -- valid | rejected | offloaded | out_of_scope
    reason text,
    detail text,
    organization_id uuid NOT NULL,
    project_id uuid NOT NULL,
    dedupe_key text,
    ended_ns bigint NOT NULL,
    uri text,
    size numeric,
    item_type text,
    title text,
    ref text,
    session_id uuid,
    trace_id text,
    span_id text,
    capability text,
    capability_version text,
    schema_ref text,
    disposition jsonb,
    links jsonb,
    data jsonb STORAGE EXTERNAL
);

-- Most are valid and name no links, likewise.
CREATE INDEX ON candidates (state) WHERE state <> 'valid';
CREATE INDEX ON candidates (id) WHERE links IS NOT NULL;

-- One candidate per dedupe key. A later round holds those whose ref an earlier one set free.
CREATE TEMP TABLE chosen (
    candidate bigint NOT NULL,
    round integer NOT NULL DEFAULT 0,
    project_id uuid NOT NULL,
    dedupe_key text NOT NULL,
    ref text,
    ended_ns bigint NOT NULL
);

-- What is to happen to the items of one batch.
CREATE TEMP TABLE planned (
    candidate bigint NOT NULL,
    item_id uuid,
    action text NOT NULL, -- insert | refresh | unchanged
    keeps_data boolean NOT NULL,
    fields text[] NOT NULL -- those that differ
);

CREATE TEMP TABLE planned_links (
    project_id uuid NOT NULL,
    source_key text NOT NULL,
    source_id uuid,
    target_id uuid,
    relationship text,
    state text NOT NULL -- create | present | unresolved
);

-- Whether two payloads are the same but for the order of their lists, which the SDK sorts on the
-- way into a span. Goes down only where the two differ. Nested too deeply to tell = not the same.
CREATE FUNCTION pg_temp.same_but_for_list_order(a jsonb, b jsonb, depth integer DEFAULT 0)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF record_image_eq(ROW(a), ROW(b)) THEN
        RETURN true;
    ELSIF depth > 100 OR jsonb_typeof(a) <> jsonb_typeof(b) THEN
        RETURN false;
    ELSIF jsonb_typeof(a) = 'object' THEN
        RETURN NOT EXISTS (
            SELECT
            -- Side by side: jsonb keeps its keys in one order.
            FROM ROWS FROM (jsonb_each(a), jsonb_each(b)) AS pair (a_key, a_value, b_key, b_value)
            WHERE
                a_key IS DISTINCT FROM b_key
                OR NOT pg_temp.same_but_for_list_order(a_value, b_value, depth + 1)
        );
    ELSIF jsonb_typeof(a) = 'array' THEN
        RETURN jsonb_array_length(a) = jsonb_array_length(b)
            AND record_image_eq(
                ROW(pg_temp.lists_sorted(a, depth)), ROW(pg_temp.lists_sorted(b, depth))
            );
    END IF;
    RETURN false;
END
$$;

CREATE FUNCTION pg_temp.lists_sorted(a jsonb, depth integer) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF depth > 100 THEN
        RETURN a;
    ELSIF jsonb_typeof(a) = 'object' THEN
        RETURN (
            SELECT coalesce(jsonb_object_agg(key, pg_temp.lists_sorted(value, depth + 1)), '{}')
            FROM jsonb_each(a)
        );
    ELSIF jsonb_typeof(a) = 'array' THEN
        RETURN (
            -- Not ordered by its text, in which 1e131071 is 131,072 digits long. Of numbers that jsonb
            -- takes for equal, 1 and 1.0, the scale tells which is which.
            SELECT coalesce(
                jsonb_agg(
                    value
                    ORDER BY
                        value, CASE WHEN jsonb_typeof(value) = 'number' THEN scale(value::numeric) END
                ),
                '[]'
            )
            FROM (
                -- OFFSET 0: sorted once, not once for the result and once for its place.
                SELECT pg_temp.lists_sorted(value, depth + 1) AS value
                FROM jsonb_array_elements(a)
                OFFSET 0
            )
        );
    END IF;
    RETURN a;
END
$$;
