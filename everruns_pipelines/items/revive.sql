-- PostgreSQL: the next round: envelopes that lost their ref to an item which was given another one.
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
