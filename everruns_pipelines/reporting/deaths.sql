-- Projectors that died, and the rows that are suspected of it.

-- name: register
INSERT INTO everruns_pipelines.outbox_projectors (lock_key) VALUES (%(lock_key)s)

-- name: unregister
DELETE FROM everruns_pipelines.outbox_projectors WHERE lock_key = %(lock_key)s

-- name: bury
-- Projectors that are registered, and whose lock nobody holds; what each was trying.
DELETE FROM everruns_pipelines.outbox_projectors
WHERE lock_key = ANY (
    ARRAY(
        SELECT lock_key
        FROM everruns_pipelines.outbox_projectors
        WHERE lock_key <> %(lock_key)s AND pg_try_advisory_xact_lock(lock_key)
        FOR UPDATE SKIP LOCKED
    )
)
RETURNING part

-- name: split
-- Of a part of several rows, half becomes another part.
UPDATE everruns_pipelines.outbox_suspects
SET part = %(new_part)s
WHERE outbox_id IN (
    SELECT outbox_id
    FROM everruns_pipelines.outbox_suspects
    WHERE part = %(part)s
    ORDER BY outbox_id
    LIMIT (
        SELECT count(*) / 2 FROM everruns_pipelines.outbox_suspects WHERE part = %(part)s
    )
)

-- name: convict
-- A row that was alone: once more than its projector died, and often enough that it is parked.
WITH alone AS (
    UPDATE everruns_pipelines.outbox_suspects
    SET deaths = deaths + 1
    WHERE part = %(part)s
    RETURNING outbox_id, deaths
)
UPDATE reporting_outbox
SET status = 'failed',
    next_attempt_at = 'infinity',
    last_error = 'every projector that worked on this row alone died',
    updated_at = now()
FROM alone
WHERE id = outbox_id AND deaths >= %(most)s AND status IN ('pending', 'failed')

-- name: forget
-- Suspects that others have completed, or that are gone.
DELETE FROM everruns_pipelines.outbox_suspects
WHERE NOT EXISTS (
    SELECT FROM reporting_outbox
    WHERE id = outbox_id AND status IN ('pending', 'failed')
)

-- name: name_batch
INSERT INTO everruns_pipelines.outbox_suspects (outbox_id, part)
SELECT outbox_id, %(part)s FROM pg_temp.selection
ON CONFLICT DO NOTHING

-- name: try_part
-- From now on, what is tried is known to whoever finds this projector dead.
UPDATE everruns_pipelines.outbox_projectors
SET part = %(part)s
WHERE lock_key = %(lock_key)s

-- name: choose_part
-- One that nobody is trying, and that has a row which is due; rows that killed before come last.
SELECT suspect.part
FROM everruns_pipelines.outbox_suspects AS suspect
JOIN reporting_outbox AS outbox ON outbox.id = suspect.outbox_id
WHERE outbox.status IN ('pending', 'failed')
    AND outbox.next_attempt_at <= %(cutoff)s
    AND (%(org_id)s::bigint IS NULL OR outbox.org_id = %(org_id)s)
    AND NOT EXISTS (
        SELECT FROM everruns_pipelines.outbox_projectors WHERE part = suspect.part
    )
ORDER BY suspect.deaths, suspect.part
LIMIT 1

-- name: due_of_part
-- As rows that have failed are: see `due` in outbox.sql.
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
WHERE id IN (
        SELECT outbox_id FROM everruns_pipelines.outbox_suspects WHERE part = %(part)s
    )
    AND status IN ('pending', 'failed')
    AND next_attempt_at <= %(cutoff)s
    AND (%(org_id)s::bigint IS NULL OR org_id = %(org_id)s)
LIMIT %(size)s
FOR UPDATE SKIP LOCKED

-- name: acquit
DELETE FROM everruns_pipelines.outbox_suspects
WHERE outbox_id IN (SELECT outbox_id FROM pg_temp.selection)
