-- What the items name as their links, once all items of a rebuild are there.

-- name: plan
-- The links that the items of a batch name, and what is to happen to each.
-- A dry run has not inserted anything: what it would insert counts as there. Otherwise what is not
-- there was deleted since.
-- A relationship of more than 2,600 bytes is none: with its items' ids it may exceed the 2,704 that
-- an index holds in one entry, and `item_links` is unique on all three.
WITH named AS (
    SELECT
        link.position,
        chosen.project_id,
        chosen.dedupe_key AS source_key,
        source.id AS source_id,
        CASE
            WHEN jsonb_typeof(link.value -> 'relationship') <> 'string' THEN NULL
            WHEN octet_length(link.value ->> 'relationship') BETWEEN 1 AND 2600
                THEN link.value ->> 'relationship'
        END AS relationship,
        CASE
            WHEN jsonb_typeof(link.value -> 'target_ref') = 'string'
                THEN nullif(link.value ->> 'target_ref', '')
        END AS target_ref,
        CASE
            WHEN jsonb_typeof(link.value -> 'target_item_id') <> 'string' THEN NULL
            WHEN pg_input_is_valid(link.value ->> 'target_item_id', 'uuid')
                THEN (link.value ->> 'target_item_id')::uuid
        END AS target_id
    FROM chosen
    JOIN candidates AS candidate ON candidate.id = chosen.candidate
    LEFT JOIN items AS source
        ON source.project_id = chosen.project_id AND source.dedupe_key = chosen.dedupe_key
    CROSS JOIN LATERAL jsonb_array_elements(candidate.links)
        WITH ORDINALITY AS link (value, position)
    WHERE
        chosen.candidate BETWEEN %(first)s AND %(last)s
        AND candidate.id BETWEEN %(first)s AND %(last)s
        AND candidate.links IS NOT NULL
),

resolved AS (
    SELECT
        named.*,
        found.id AS found_id,
        -- Which item the target is, also when it has no id yet.
        CASE WHEN named.source_id IS NOT NULL OR %(dry_run)s
            THEN coalesce(found.id::text, 'key:' || to_come.dedupe_key)
        END AS target
    FROM named
    LEFT JOIN items AS by_id
        ON by_id.id = named.target_id AND by_id.project_id = named.project_id
    LEFT JOIN items AS by_ref
        ON by_ref.project_id = named.project_id AND by_ref.ref = named.target_ref
    -- In a dry run a ref is whose it would be: an item's that would get it, else no longer the
    -- item's that has it and would get another.
    LEFT JOIN chosen AS to_come
        ON %(dry_run)s
        AND to_come.project_id = named.project_id
        AND to_come.ref = named.target_ref
    LEFT JOIN items AS there
        ON %(dry_run)s
        AND there.project_id = to_come.project_id
        AND there.dedupe_key = to_come.dedupe_key
    LEFT JOIN chosen AS given
        ON %(dry_run)s
        AND given.project_id = by_ref.project_id
        AND given.dedupe_key = by_ref.dedupe_key
        AND given.ref IS DISTINCT FROM by_ref.ref
    CROSS JOIN LATERAL (
        SELECT coalesce(
            by_id.id,
            CASE
                WHEN to_come.candidate IS NOT NULL THEN there.id
                WHEN given.candidate IS NULL THEN by_ref.id
            END
        ) AS id
    ) AS found
),

told_apart AS (
    SELECT DISTINCT
        project_id, source_key, source_id, found_id, target, relationship,
        -- The same link twice is one link; a link to nowhere counts each time it is named.
        CASE WHEN target IS NULL OR relationship IS NULL THEN position END AS lost
    FROM resolved
)

INSERT INTO planned_links (project_id, source_key, source_id, target_id, relationship, state)
SELECT
    told_apart.project_id,
    told_apart.source_key,
    told_apart.source_id,
    told_apart.found_id,
    told_apart.relationship,
    CASE
        WHEN told_apart.target IS NULL OR told_apart.relationship IS NULL THEN 'unresolved'
        WHEN present.id IS NOT NULL THEN 'present'
        ELSE 'create'
    END
FROM told_apart
LEFT JOIN item_links AS present
    ON present.source_item_id = told_apart.source_id
    AND present.target_item_id = told_apart.found_id
    AND present.relationship = told_apart.relationship

-- name: create
-- The links of a batch that the table does not have. None of its columns is sure to have
-- a default.
INSERT INTO item_links (
    id, project_id, source_item_id, target_item_id, relationship, created_at
)
SELECT uuidv7(), project_id, source_id, target_id, relationship, now()
FROM planned_links
WHERE state = 'create'
ON CONFLICT (source_item_id, target_item_id, relationship) DO NOTHING
