-- PostgreSQL: one ref, one item. Whoever holds it in the table keeps it, else the earliest envelope.
WITH claims AS (
    SELECT
        chosen.candidate,
        holder.id IS NOT NULL AND holder.dedupe_key IS DISTINCT FROM chosen.dedupe_key AS is_taken,
        row_number() OVER (
            PARTITION BY chosen.project_id, chosen.ref COLLATE "C"
            ORDER BY chosen.ended_ns, chosen.dedupe_key COLLATE "C"
        ) > 1 AND holder.id IS NULL AS is_later
    FROM chosen
    LEFT JOIN items AS holder
        ON holder.project_id = chosen.project_id AND holder.ref = chosen.ref
    WHERE chosen.ref IS NOT NULL
),

lost AS (
    DELETE FROM chosen USING claims
    WHERE chosen.candidate = claims.candidate AND (claims.is_taken OR claims.is_later)
    RETURNING chosen.candidate
)

UPDATE candidates
SET state = 'rejected', reason = 'ref_conflict', detail = 'another item of the project has this ref'
FROM lost
WHERE candidates.id = lost.candidate
