-- How a backfill fills the outbox with the sources in pg_temp.missing.

-- name: choose
-- Up to `limit` of the missing sources that do not wait in the outbox already: the oldest of each
-- type, the first of every type before the second of any, so that each type gets its fair share
-- of the limit or all that it misses.
CREATE TEMPORARY TABLE chosen ON COMMIT DROP AS
WITH versioned AS (
    -- A session's version is the time of its last change; everything else has one version, its id.
    SELECT
        missing.*,
        session.updated_at,
        CASE
            WHEN session.id IS NULL THEN missing.source_id
            WHEN NOT isfinite(session.updated_at) THEN session.updated_at::text
            ELSE to_char(
                session.updated_at AT TIME ZONE 'UTC',
                'YYYY-MM-DD"T"HH24:MI:SS' || CASE
                    WHEN date_trunc('second', session.updated_at) = session.updated_at THEN ''
                    WHEN date_trunc('milliseconds', session.updated_at) = session.updated_at
                        THEN '.MS'
                    ELSE '.US'
                END || '"Z"'
            )
        END AS version
    FROM pg_temp.missing
    LEFT JOIN sessions AS session
        ON missing.source_type = 'session' AND session.id = missing.source_id::uuid
)
SELECT source_type, org_id, source_id, source_version, reason, at
FROM (
    SELECT
        versioned.*,
        CASE WHEN queued.status = 'completed' THEN queued.source_version ELSE version END
            AS source_version,
        row_number() OVER (PARTITION BY versioned.source_type ORDER BY at, versioned.source_id)
            AS place
    FROM versioned
    LEFT JOIN LATERAL (
        SELECT
            outbox.source_version,
            outbox.status,
            outbox.next_attempt_at,
            CASE
                WHEN pg_input_is_valid(outbox.source_version, 'timestamptz')
                    THEN outbox.source_version::timestamptz
            END AS version_time
        FROM reporting_outbox AS outbox
        WHERE outbox.org_id = versioned.org_id
            AND outbox.source_type = versioned.source_type
            AND outbox.source_id = versioned.source_id
            AND outbox.reason = versioned.reason
            AND (updated_at IS NOT NULL OR outbox.source_version = version)
        ORDER BY version_time DESC NULLS LAST, outbox.created_at DESC, outbox.id DESC
        LIMIT 1
    ) AS queued ON true
    WHERE queued.status IS NULL
        OR queued.status = 'completed'
        -- Parked, but the session has changed since: that state has not been tried yet.
        OR queued.status = 'failed'
            AND queued.next_attempt_at = 'infinity'
            AND queued.version_time < updated_at
) AS queueable
ORDER BY place, source_type
LIMIT %(limit)s

-- name: enqueue
-- Whatever others have enqueued meanwhile stays as it is and is not returned. Rows are written in
-- the same order by everybody, so that two backfills cannot wait for each other.
INSERT INTO reporting_outbox AS outbox (org_id, source_type, source_id, source_version, reason)
SELECT org_id, source_type, source_id, source_version, reason
FROM pg_temp.chosen
ORDER BY at, source_type, source_id
ON CONFLICT (org_id, source_type, source_id, source_version, reason) DO UPDATE
SET status = 'pending', next_attempt_at = now(), updated_at = now()
WHERE outbox.status = 'completed'
RETURNING source_type
