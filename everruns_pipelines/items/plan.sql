-- PostgreSQL: what is to happen to each item of a batch. `record_image_eq` compares to the last
-- digit: as jsonb 1 equals 1.0. MATERIALIZED: compared once, not for the action and for keeps_data.
WITH compared AS MATERIALIZED (
    SELECT
        candidate.id AS candidate,
        item.id AS item_id,
        (
            item.item_type, item.title, item.ref, item.session_id, item.trace_id, item.span_id,
            item.capability, item.capability_version, item.schema_ref
        ) IS NOT DISTINCT FROM (
            candidate.item_type, candidate.title, candidate.ref, candidate.session_id,
            candidate.trace_id, candidate.span_id, candidate.capability,
            candidate.capability_version, candidate.schema_ref
        ) AS same_columns,
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

INSERT INTO planned (candidate, item_id, action, keeps_data)
SELECT
    candidate,
    item_id,
    CASE
        WHEN item_id IS NULL THEN 'insert'
        WHEN same_columns AND same_data THEN 'unchanged'
        ELSE 'refresh'
    END,
    same_data
FROM compared
