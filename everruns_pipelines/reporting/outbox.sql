-- Every statement of the outbox's life, by name: the queue can be read here without reading Python.
--
-- The row lock is the claim. A projector takes due rows with FOR UPDATE SKIP LOCKED, projects them,
-- completes them and commits: one transaction. If it dies, nothing is left to return.

-- name: return_stale
-- Rows of foreign projectors, which mark what they claim as processing, and of our own earlier
-- releases. One that has not finished a row after 15 minutes is taken for dead, which is no failure
-- of the row. One that did not say when it claimed a row did so when the row was last changed.
UPDATE reporting_outbox
SET status = 'pending', attempts = greatest(attempts - 1, 0), updated_at = now()
WHERE id = ANY (
    ARRAY(
        SELECT id
        FROM reporting_outbox
        WHERE status = 'processing'
            AND coalesce(claimed_at, updated_at) < now() - interval '15 minutes'
        FOR UPDATE SKIP LOCKED
    )
)

-- name: due
-- Up to `size` rows that were due at the cutoff, in equal shares per organization that has any, the
-- oldest first. `is_new`: the source has no facts yet, unless somebody made the day right or deleted
-- outbox rows; then that is noticed. `is_apart`: it has failed before.
--
-- `reached`: by organization, up to when its pending rows have been taken. What lies before is mostly
-- held, or has just been completed: to pass over such a row takes as long as to take one.
--
-- ANY is no detour: so the order by org_id is one that only the index on (org_id, status,
-- next_attempt_at) has. By the other one, a scan for one organization passes over everybody's rows.
WITH set_aside AS MATERIALIZED (
    -- What is taken already, and what a projector may have died of: that is tried apart.
    SELECT outbox_id FROM pg_temp.selection
    UNION ALL
    SELECT outbox_id FROM everruns_pipelines.outbox_suspects
),
waiting AS MATERIALIZED (
    SELECT
        organization.org_id,
        reached.at,
        -- What is over goes to those whose rows have waited longest; and so does all, if there are
        -- more of them than rows to take.
        greatest(
            %(size)s / count(*) OVER () + (
                row_number() OVER (ORDER BY due.next_attempt_at) <= %(size)s %% count(*) OVER ()
            )::int,
            1
        ) AS share
    FROM organizations AS organization
    CROSS JOIN LATERAL (
        SELECT coalesce((%(reached)s::jsonb ->> org_id::text)::timestamptz, '-infinity') AS at
    ) AS reached
    CROSS JOIN LATERAL (
        (
            SELECT next_attempt_at FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[organization.org_id])
                AND status = 'pending' AND next_attempt_at BETWEEN reached.at AND %(cutoff)s
                AND id NOT IN (SELECT outbox_id FROM set_aside)
            ORDER BY org_id, next_attempt_at
            LIMIT 1
        )
        UNION ALL
        (
            SELECT next_attempt_at FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[organization.org_id])
                AND status = 'failed' AND next_attempt_at <= %(cutoff)s
                AND id NOT IN (SELECT outbox_id FROM set_aside)
            ORDER BY org_id, next_attempt_at
            LIMIT 1
        )
        ORDER BY next_attempt_at
        LIMIT 1
    ) AS due
    WHERE %(org_id)s::bigint IS NULL OR organization.org_id = %(org_id)s
)
SELECT due.*
FROM waiting
CROSS JOIN LATERAL (
    SELECT * FROM (
        SELECT
            ctid AS place,
            id,
            org_id,
            source_type,
            source_id,
            attempts = 0 AND claimed_at IS NULL AND source_version = source_id AS is_new,
            false AS is_apart,
            next_attempt_at
        FROM reporting_outbox
        WHERE org_id = ANY (ARRAY[waiting.org_id])
            AND status = 'pending' AND next_attempt_at BETWEEN waiting.at AND %(cutoff)s
            AND id NOT IN (SELECT outbox_id FROM set_aside)
        ORDER BY org_id, next_attempt_at
        LIMIT waiting.share
        FOR UPDATE SKIP LOCKED
    ) AS pending
    UNION ALL
    SELECT * FROM (
        SELECT
            ctid AS place,
            id,
            org_id,
            source_type,
            source_id,
            false AS is_new,
            true AS is_apart,
            next_attempt_at
        FROM reporting_outbox
        WHERE org_id = ANY (ARRAY[waiting.org_id])
            AND status = 'failed' AND next_attempt_at <= %(cutoff)s
            AND id NOT IN (SELECT outbox_id FROM set_aside)
        ORDER BY org_id, next_attempt_at
        LIMIT waiting.share
        FOR UPDATE SKIP LOCKED
    ) AS failed
    ORDER BY next_attempt_at
    LIMIT waiting.share
) AS due
-- One organization after the other: what comes behind the last row is not even locked.
LIMIT %(size)s

-- name: take
-- Rows that are due, into the selection, and of what kinds they are. One whose source id is malformed
-- fails. What is projected together is numbered together.
WITH taken AS (
    SELECT
        *,
        CASE WHEN pg_input_is_valid(source_id, 'uuid') THEN source_id::uuid END AS uuid,
        -- Not sorted: each kind has a range of its own, larger than any batch.
        %(taken)s + row_number() OVER () + 1000000 * (
            4 * array_position(%(source_types)s, source_type) + 2 * is_new::int + is_apart::int
        ) AS part
    FROM ({due}) AS due
),
selected AS (
    INSERT INTO pg_temp.selection (part, source_type, org_id, source_id, place, outbox_id, error)
    SELECT
        CASE WHEN uuid IS NOT NULL THEN part END,
        source_type,
        org_id,
        uuid,
        place,
        id,
        CASE WHEN uuid IS NULL AND part IS NOT NULL THEN 'the source id is no UUID' END
    FROM taken
),
kinds AS (
    SELECT
        org_id,
        source_type,
        is_new,
        is_apart,
        min(part) AS first,
        max(part) AS last,
        count(*) AS size,
        max(next_attempt_at) AS at
    FROM taken
    GROUP BY org_id, source_type, is_new, is_apart
)
SELECT
    source_type,
    is_new,
    min(first),
    max(last),
    sum(size)::integer,
    (SELECT jsonb_object_agg(org_id, at ORDER BY at) FROM kinds WHERE NOT is_apart)
FROM kinds
GROUP BY source_type, is_new, is_apart

-- name: leave
-- Rows of sessions stay due: another projector is at sessions.
DELETE FROM pg_temp.selection WHERE source_type = 'session'

-- name: complete
-- The only update of a row that succeeds. Whoever enqueues it meanwhile waits for this transaction
-- to end, finds it completed, and makes it pending again.
UPDATE reporting_outbox
SET status = 'completed',
    attempts = attempts + 1,
    claimed_at = now(),
    last_error = NULL,
    updated_at = now()
WHERE ctid = ANY (
    ARRAY(
        SELECT place
        FROM pg_temp.selection
        WHERE error IS NULL AND (source_type = 'session') = %(of_sessions)s
    )
)

-- name: fail
-- `attempts` are failures in a row then: one that was completed since it last failed has no error.
WITH failed AS (
    UPDATE reporting_outbox AS outbox
    SET status = 'failed',
        attempts = (outbox.last_error IS NOT NULL)::int * outbox.attempts + 1,
        claimed_at = now(),
        next_attempt_at = CASE
            WHEN (outbox.last_error IS NOT NULL)::int * outbox.attempts + 1 >= %(max_attempts)s
                THEN 'infinity'
            ELSE now() + make_interval(
                secs => least(
                    2 ^ least((outbox.last_error IS NOT NULL)::int * outbox.attempts + 1, 8) * 30,
                    3600
                )
            )
        END,
        last_error = selection.error,
        updated_at = now()
    FROM pg_temp.selection
    WHERE outbox.ctid = ANY (
            ARRAY(
                SELECT place
                FROM pg_temp.selection
                WHERE error IS NOT NULL AND (source_type = 'session') = %(of_sessions)s
            )
        )
        AND selection.place = outbox.ctid
    RETURNING outbox.next_attempt_at
)
SELECT count(*), count(*) FILTER (WHERE next_attempt_at = 'infinity') FROM failed

-- name: count_parked
SELECT source_type, count(*)
FROM reporting_outbox
WHERE status = 'failed'
    AND next_attempt_at = 'infinity'
    AND (%(org_id)s::bigint IS NULL OR org_id = %(org_id)s)
    AND (%(source_type)s::text IS NULL OR source_type = %(source_type)s)
GROUP BY 1

-- name: unpark
-- One more attempt: a row that fails again is parked again.
WITH unparked AS (
    UPDATE reporting_outbox
    SET next_attempt_at = now(), updated_at = now()
    WHERE status = 'failed'
        AND next_attempt_at = 'infinity'
        AND (%(org_id)s::bigint IS NULL OR org_id = %(org_id)s)
        AND (%(source_type)s::text IS NULL OR source_type = %(source_type)s)
    RETURNING source_type
)
SELECT source_type, count(*) FROM unparked GROUP BY 1

-- name: purge
-- Removes what was completed long ago, a bounded number of rows at a time.
DELETE FROM reporting_outbox
WHERE id = ANY (
    ARRAY(
        SELECT id
        FROM reporting_outbox
        WHERE status = 'completed'
            AND next_attempt_at < now() - %(age)s::interval
            AND updated_at < now() - %(age)s::interval
        LIMIT %(size)s
        FOR UPDATE SKIP LOCKED
    )
)
