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

-- name: take_part
-- As rows that failed are taken: see `take` in outbox.sql.
WITH taken AS (
    SELECT
        *,
        CASE WHEN pg_input_is_valid(source_id, 'uuid') THEN source_id::uuid END AS uuid,
        row_number() OVER () + 1000000 * array_position(%(source_types)s, source_type) AS part
    FROM (
        SELECT ctid AS place, id, org_id, source_type, source_id
        FROM reporting_outbox
        WHERE id IN (
                SELECT outbox_id FROM everruns_pipelines.outbox_suspects WHERE part = %(part)s
            )
            AND status IN ('pending', 'failed')
            AND next_attempt_at <= %(cutoff)s
            AND (%(org_id)s::bigint IS NULL OR org_id = %(org_id)s)
        LIMIT %(size)s
        FOR UPDATE SKIP LOCKED
    ) AS due
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
)
SELECT source_type, false, min(part), max(part), count(*)
FROM taken
GROUP BY source_type

-- name: acquit
DELETE FROM everruns_pipelines.outbox_suspects
WHERE outbox_id IN (SELECT outbox_id FROM pg_temp.selection)
