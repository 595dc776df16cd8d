-- One envelope per dedupe key and one item per ref; from there into `items`, batch by batch.

-- name: refuse
-- A report that the platform refused stands in its span all the same, and the agent reported it again
-- under another key. Where a span carries several, which one was refused cannot be told.
UPDATE candidates AS candidate
SET
    state = 'rejected',
    reason = 'refused_by_platform',
    detail = 'the platform refused the report, and the tool told the agent so'
FROM (
    SELECT reported.span
    FROM candidates AS reported
    JOIN staged_spans AS span ON span.id = reported.span
    WHERE span.refused
    GROUP BY reported.span
    HAVING count(*) = 1
) AS alone
WHERE
    candidate.span = alone.span
    AND candidate.state = 'valid'
    AND NOT EXISTS (
        SELECT
        FROM items
        WHERE
            items.project_id = candidate.project_id
            AND items.dedupe_key = candidate.dedupe_key
    )

-- name: choose
-- Of the valid envelopes with one dedupe key the earliest by span end counts, in one span the first.
-- Hardly any key is there twice: only those are sorted, and only their spans looked up.
WITH repeated AS MATERIALIZED (
    SELECT hashtextextended(dedupe_key, 0) AS hash
    FROM candidates
    WHERE state = 'valid'
    GROUP BY hash
    HAVING count(*) > 1
)

INSERT INTO chosen (candidate, project_id, dedupe_key, ref, ended_ns)
SELECT id, project_id, dedupe_key, ref, ended_ns
FROM candidates
WHERE state = 'valid' AND hashtextextended(dedupe_key, 0) NOT IN (SELECT hash FROM repeated)
UNION ALL
(
    SELECT DISTINCT ON (candidate.dedupe_key COLLATE "C", candidate.project_id)
        candidate.id, candidate.project_id, candidate.dedupe_key, candidate.ref, candidate.ended_ns
    FROM repeated
    JOIN candidates AS candidate ON hashtextextended(candidate.dedupe_key, 0) = repeated.hash
    JOIN staged_spans AS span ON span.id = candidate.span
    WHERE candidate.state = 'valid'
    ORDER BY
        candidate.dedupe_key COLLATE "C", candidate.project_id, candidate.ended_ns,
        span.trace_id COLLATE "C", span.span_id COLLATE "C", candidate.position, candidate.id
)

-- name: leave
-- What is not stored, but reported so lately that its POST may be under way.
DELETE FROM chosen
WHERE
    ended_ns > extract(epoch FROM now() - %(grace)s::interval) * 1000000000
    AND NOT EXISTS (
        SELECT
        FROM items
        WHERE items.project_id = chosen.project_id AND items.dedupe_key = chosen.dedupe_key
    )

-- name: refs
-- One ref, one item. Whoever holds it in the table keeps it, else the earliest envelope.
-- An item that was given another ref in an earlier round holds its old one no longer.
-- Hardly any ref is claimed twice, or held by another item: only those are sorted and looked into.
WITH disputed AS MATERIALIZED (
    SELECT hashtextextended(ref, 0) AS hash
    FROM chosen
    WHERE ref IS NOT NULL
    GROUP BY hash
    HAVING count(*) > 1
    UNION ALL
    SELECT hashtextextended(chosen.ref, 0)
    FROM chosen
    JOIN items AS holder ON holder.project_id = chosen.project_id AND holder.ref = chosen.ref
    WHERE chosen.round = %(round)s AND holder.dedupe_key IS DISTINCT FROM chosen.dedupe_key
),

claims AS (
    SELECT
        chosen.candidate,
        coalesce(holder.dedupe_key = chosen.dedupe_key, false) AS is_held,
        taken.candidate IS NOT NULL OR (holder.id IS NOT NULL AND given.candidate IS NULL)
            AS is_taken,
        row_number() OVER (
            PARTITION BY chosen.ref COLLATE "C", chosen.project_id
            ORDER BY chosen.ended_ns, chosen.dedupe_key COLLATE "C"
        ) > 1 AS is_later
    FROM chosen
    LEFT JOIN items AS holder
        ON holder.project_id = chosen.project_id AND holder.ref = chosen.ref
    LEFT JOIN chosen AS given
        ON given.round < %(round)s
        AND given.project_id = holder.project_id
        AND given.dedupe_key = holder.dedupe_key
        AND given.ref IS DISTINCT FROM holder.ref
    LEFT JOIN chosen AS taken
        ON taken.round < %(round)s
        AND taken.project_id = chosen.project_id
        AND taken.ref = chosen.ref
    WHERE
        chosen.round = %(round)s
        AND hashtextextended(chosen.ref, 0) IN (SELECT hash FROM disputed)
),

lost AS (
    DELETE FROM chosen USING claims
    WHERE
        chosen.candidate = claims.candidate
        AND NOT claims.is_held
        AND (claims.is_taken OR claims.is_later)
    RETURNING chosen.candidate
)

UPDATE candidates
SET state = 'rejected', reason = 'ref_conflict', detail = 'another item of the project has this ref'
FROM lost
WHERE candidates.id = lost.candidate

-- name: revive
-- The next round: envelopes that lost their ref to an item which was given another one.
-- A dry run has given nothing yet, so what is to be given counts.
WITH revived AS (
    UPDATE candidates AS candidate
    SET state = 'valid', reason = NULL, detail = NULL
    WHERE
        candidate.state = 'rejected'
        AND candidate.reason = 'ref_conflict'
        AND NOT EXISTS (
            SELECT
            FROM items AS holder
            LEFT JOIN chosen AS given
                ON given.project_id = holder.project_id
                AND given.dedupe_key = holder.dedupe_key
                AND given.ref IS DISTINCT FROM holder.ref
            WHERE
                holder.project_id = candidate.project_id
                AND holder.ref = candidate.ref
                AND given.candidate IS NULL
        )
        AND NOT EXISTS (
            SELECT
            FROM chosen AS taken
            WHERE taken.project_id = candidate.project_id AND taken.ref = candidate.ref
        )
    RETURNING candidate.*
)

INSERT INTO chosen (candidate, round, project_id, dedupe_key, ref, ended_ns)
SELECT id, %(round)s, project_id, dedupe_key, ref, ended_ns
FROM revived

-- name: plan
-- What is to happen to each item of a batch. `record_image_eq` compares to the last
-- digit: as jsonb 1 equals 1.0. MATERIALIZED: compared once, not for the action and for keeps_data.
WITH compared AS MATERIALIZED (
    SELECT
        candidate.id AS candidate,
        item.id AS item_id,
        -- Told one by one only of items that differ.
        CASE WHEN item.id IS NOT NULL AND (
            item.organization_id, item.item_type, item.title, nullif(item.ref, ''),
            item.session_id, item.trace_id, item.span_id, item.capability,
            item.capability_version, item.schema_ref
        ) IS DISTINCT FROM (
            candidate.organization_id, candidate.item_type, candidate.title, candidate.ref,
            candidate.session_id, candidate.trace_id, candidate.span_id, candidate.capability,
            candidate.capability_version, candidate.schema_ref
        ) THEN array_remove(
            ARRAY[
                CASE
                    WHEN item.organization_id IS DISTINCT FROM candidate.organization_id
                        THEN 'organization_id'
                END,
                CASE WHEN item.item_type IS DISTINCT FROM candidate.item_type THEN 'item_type' END,
                CASE WHEN item.title IS DISTINCT FROM candidate.title THEN 'title' END,
                -- An empty ref is none.
                CASE WHEN nullif(item.ref, '') IS DISTINCT FROM candidate.ref THEN 'ref' END,
                CASE
                    WHEN item.session_id IS DISTINCT FROM candidate.session_id THEN 'session_id'
                END,
                CASE WHEN item.trace_id IS DISTINCT FROM candidate.trace_id THEN 'trace_id' END,
                CASE WHEN item.span_id IS DISTINCT FROM candidate.span_id THEN 'span_id' END,
                CASE
                    WHEN item.capability IS DISTINCT FROM candidate.capability THEN 'capability'
                END,
                CASE
                    WHEN item.capability_version IS DISTINCT FROM candidate.capability_version
                        THEN 'capability_version'
                END,
                CASE
                    WHEN item.schema_ref IS DISTINCT FROM candidate.schema_ref THEN 'schema_ref'
                END
            ],
            NULL
        ) ELSE '{}' END AS columns,
        CASE
            WHEN item.id IS NULL THEN false
            WHEN record_image_eq(ROW(item.data), ROW(candidate.data)) THEN true
            -- An empty path: fetched and decompressed once, not at every use in there.
            ELSE pg_temp.same_but_for_list_order(item.data #> '{}', candidate.data #> '{}')
        END AS same_data
    FROM chosen
    JOIN candidates AS candidate ON candidate.id = chosen.candidate
    LEFT JOIN items AS item
        ON item.project_id = chosen.project_id AND item.dedupe_key = chosen.dedupe_key
    -- Of both, or a batch would read every candidate.
    WHERE
        chosen.round = %(round)s
        AND chosen.candidate BETWEEN %(first)s AND %(last)s
        AND candidate.id BETWEEN %(first)s AND %(last)s
)

INSERT INTO planned (candidate, item_id, action, keeps_data, fields)
SELECT
    candidate,
    item_id,
    CASE
        WHEN item_id IS NULL THEN 'insert'
        WHEN columns = '{}' AND same_data THEN 'unchanged'
        ELSE 'refresh'
    END,
    same_data,
    CASE WHEN same_data THEN columns ELSE columns || 'data'::text END
FROM compared

-- name: insert
-- The items of a batch that the table does not have. Of its columns only `id` is sure to
-- have a default.
INSERT INTO items (
    organization_id, project_id, item_type, title, ref, data, disposition, source, session_id,
    trace_id, span_id, capability, capability_version, schema_ref, dedupe_key, created_at,
    updated_at
)
SELECT
    organization_id, project_id, item_type, title, ref, data, disposition, 'extracted', session_id,
    trace_id, span_id, capability, capability_version, schema_ref, dedupe_key,
    timestamptz 'epoch' + floor(ended_ns / 1000.0) * interval '1 microsecond',
    now()
FROM planned
JOIN candidates ON candidates.id = planned.candidate
WHERE planned.action = 'insert'
ORDER BY planned.candidate

-- name: refresh
-- The items of a batch that differ from what their span says. What people decided and
-- where the row came from stays: id, source, created_by, created_at, disposition.
UPDATE items
SET
    organization_id = candidate.organization_id,
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

-- name: stored
-- An item that is stored is rejected no longer.
DELETE FROM everruns_pipelines.item_rejections AS rejection
USING chosen
WHERE
    chosen.round = %(round)s
    AND chosen.candidate BETWEEN %(first)s AND %(last)s
    AND rejection.project_id = chosen.project_id
    AND rejection.dedupe_key = chosen.dedupe_key

-- name: taken_back
-- What the items of a batch get back from their spans: whose, and which fields. No values.
SELECT item_id::text, fields
FROM planned
WHERE action = 'refresh'
ORDER BY item_id
LIMIT %(most)s
