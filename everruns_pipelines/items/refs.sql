-- PostgreSQL: one ref, one item. Whoever holds it in the table keeps it, else the earliest envelope.
-- An item that was given another ref in an earlier round holds its old one no longer.
WITH claims AS (
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
    WHERE chosen.ref IS NOT NULL AND chosen.round = %(round)s
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
