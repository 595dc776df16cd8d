-- Every statement of the outbox's life, by name: the queue can be read here without reading Python.

-- name: return_lost
-- Rows of projectors that died are pending again, and parked if their attempts are used up, unless
-- they have been enqueued again since. One of ours holds an advisory lock while it lives, so its
-- death shows at once; a foreign one is taken for dead after 15 minutes. One that did not say when
-- it claimed a row did so when the row was last changed.
WITH abandoned AS (
    DELETE FROM everruns_pipelines.outbox_claims
    WHERE claimed_at IN (
        SELECT claimed_at
        FROM everruns_pipelines.outbox_claims
        WHERE lock_key <> %(lock_key)s AND pg_try_advisory_xact_lock(lock_key)
        FOR UPDATE SKIP LOCKED
    )
    RETURNING claimed_at
)
UPDATE reporting_outbox AS outbox
SET status = CASE WHEN is_last THEN 'failed' ELSE 'pending' END,
    next_attempt_at = CASE WHEN is_last THEN 'infinity' ELSE next_attempt_at END,
    last_error = CASE
        WHEN is_last THEN 'its projector died while working on it' ELSE last_error
    END,
    updated_at = now()
FROM (
    SELECT
        id AS lost_id,
        attempts >= %(max_attempts)s AND next_attempt_at <= claimed_at AS is_last
    FROM reporting_outbox
    WHERE status = 'processing'
        AND (
            coalesce(claimed_at, updated_at) < now() - interval '15 minutes'
            OR claimed_at IN (SELECT claimed_at FROM abandoned)
        )
    FOR UPDATE SKIP LOCKED
) AS lost
WHERE id = lost_id

-- name: make_batch
-- The rows that this projector has claimed, as they stood then: a later change of `next_attempt_at`
-- tells of an enqueue that the batch may not have seen.
CREATE TEMPORARY TABLE IF NOT EXISTS batch (
    id uuid NOT NULL,
    org_id bigint NOT NULL,
    source_type text NOT NULL,
    source_id uuid,
    next_attempt_at timestamptz NOT NULL,
    error text
)

-- name: claim
-- Up to `size` due rows, in equal shares per organization that has any, the oldest first, into the
-- batch. One whose source id is malformed fails.
--
-- ANY is no detour: so the order by org_id is one that only the index on (org_id, status,
-- next_attempt_at) has. By the other one, a scan for one organization passes over everybody's rows.
WITH waiting AS MATERIALIZED (
    SELECT organization.org_id
    FROM organizations AS organization
    CROSS JOIN LATERAL (
        (
            SELECT FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[organization.org_id])
                AND status = 'pending' AND next_attempt_at <= now()
            ORDER BY org_id, next_attempt_at
            LIMIT 1
        )
        UNION ALL
        (
            SELECT FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[organization.org_id])
                AND status = 'failed' AND next_attempt_at <= now()
            ORDER BY org_id, next_attempt_at
            LIMIT 1
        )
        LIMIT 1
    ) AS due
    WHERE %(org_id)s::bigint IS NULL OR organization.org_id = %(org_id)s
),
share AS MATERIALIZED (
    SELECT ceil(%(size)s::numeric / nullif(count(*), 0))::bigint AS size FROM waiting
),
due AS (
    SELECT
        id,
        next_attempt_at,
        row_number() OVER (
            PARTITION BY waiting.org_id ORDER BY next_attempt_at, oldest.created_at
        ) AS place
    FROM waiting
    CROSS JOIN LATERAL (
        SELECT * FROM (
            SELECT id, next_attempt_at, created_at
            FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[waiting.org_id])
                AND status = 'pending' AND next_attempt_at <= now()
            ORDER BY org_id, next_attempt_at
            LIMIT (SELECT size FROM share)
            FOR UPDATE SKIP LOCKED
        ) AS pending
        UNION ALL
        SELECT * FROM (
            SELECT id, next_attempt_at, created_at
            FROM reporting_outbox
            WHERE org_id = ANY (ARRAY[waiting.org_id])
                AND status = 'failed' AND next_attempt_at <= now()
            ORDER BY org_id, next_attempt_at
            LIMIT (SELECT size FROM share)
            FOR UPDATE SKIP LOCKED
        ) AS failed
    ) AS oldest
),
claimed AS (
    UPDATE reporting_outbox
    SET status = 'processing',
        attempts = attempts + 1,
        claimed_at = now(),
        updated_at = now()
    WHERE id = ANY (
        ARRAY(
            SELECT id FROM due
            WHERE place <= (SELECT size FROM share)
            ORDER BY place, next_attempt_at
            LIMIT %(size)s
        )
    )
    RETURNING *
)
INSERT INTO pg_temp.batch (id, org_id, source_type, source_id, next_attempt_at, error)
SELECT
    id,
    org_id,
    source_type,
    CASE WHEN is_uuid THEN source_id::uuid END,
    next_attempt_at,
    CASE WHEN NOT is_uuid AND source_type = ANY (%(source_types)s) THEN 'the source id is no UUID' END
FROM claimed
CROSS JOIN LATERAL (SELECT pg_input_is_valid(source_id, 'uuid') AS is_uuid) AS checked

-- name: remember_claim
INSERT INTO everruns_pipelines.outbox_claims (claimed_at, lock_key)
VALUES (now(), %(lock_key)s)
RETURNING claimed_at

-- name: forget_claim
DELETE FROM everruns_pipelines.outbox_claims WHERE claimed_at = %(claimed_at)s

-- name: note_failures
UPDATE pg_temp.batch
SET error = left(failed.reason, 2000)
FROM unnest(%(org_ids)s::bigint[], %(source_ids)s::uuid[], %(reasons)s::text[])
    AS failed (org_id, source_id, reason)
WHERE batch.source_type = %(source_type)s
    AND batch.org_id = failed.org_id
    AND batch.source_id = failed.source_id

-- name: finish
-- Completes what was projected: the rows of sessions, or all others. Fenced: a row that somebody
-- else has claimed since is not ours to finish. One that was enqueued again since it was taken is
-- pending again.
WITH finished AS (
    UPDATE reporting_outbox AS outbox
    SET status = CASE
            WHEN outbox.next_attempt_at <> batch.next_attempt_at THEN 'pending'
            WHEN batch.error IS NULL THEN 'completed'
            ELSE 'failed'
        END,
        next_attempt_at = CASE
            WHEN outbox.next_attempt_at <> batch.next_attempt_at OR batch.error IS NULL
                THEN outbox.next_attempt_at
            WHEN outbox.attempts >= %(max_attempts)s THEN 'infinity'
            ELSE now() + make_interval(
                secs => least(2 ^ least(greatest(outbox.attempts, 1), 8) * 30, 3600)
            )
        END,
        last_error = batch.error,
        updated_at = now()
    FROM pg_temp.batch
    WHERE (batch.source_type = 'session') = %(of_sessions)s
        AND outbox.id = batch.id
        -- Looked up by id, never by status: statistics know of no row that is processing, and a
        -- join planned for one row takes minutes for thousands. CASE keeps them out of it.
        AND outbox.id = ANY (ARRAY(SELECT id FROM pg_temp.batch))
        AND CASE WHEN outbox.status = 'processing' THEN outbox.claimed_at = %(claimed_at)s END
    RETURNING outbox.status, outbox.next_attempt_at
)
SELECT
    count(*) FILTER (WHERE status = 'completed') AS completed,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    count(*) FILTER (WHERE status = 'failed' AND next_attempt_at = 'infinity') AS parked
FROM finished

-- name: release
-- Undoes a claim whose batch could not be worked on, through no fault of its rows.
UPDATE reporting_outbox
SET status = 'pending', attempts = greatest(attempts - 1, 0), updated_at = now()
WHERE status = 'processing' AND claimed_at = %(claimed_at)s

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
