-- How a backfill fills the outbox with the sources in pg_temp.missing.

-- name: choose
-- Up to `limit` of the missing sources that do not wait in the outbox already, or all of them: the
-- oldest of each type, the first of every type before the second of any, so that each type gets its
-- fair share of the limit or all that it misses.
CREATE TEMPORARY TABLE chosen AS
WITH changed_sessions AS (
    -- The version of a session is the time of its last change.
    SELECT
        missing.*,
        session.updated_at,
        CASE
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
    JOIN sessions AS session ON session.id = missing.source_id::uuid
    WHERE missing.source_type = 'session'
),
queueable_sessions AS (
    SELECT
        session.*,
        CASE WHEN newest.status = 'completed' THEN newest.source_version ELSE version END
            AS source_version,
        CASE WHEN newest.status = 'completed' THEN newest.id END AS outbox_id,
        newest.row_version
    FROM changed_sessions AS session
    LEFT JOIN LATERAL (
        SELECT
            outbox.*,
            outbox.xmin AS row_version,
            CASE
                WHEN pg_input_is_valid(outbox.source_version, 'timestamptz')
                    THEN outbox.source_version::timestamptz
            END AS version_time
        FROM reporting_outbox AS outbox
        WHERE outbox.org_id = session.org_id
            AND outbox.source_type = session.source_type
            AND outbox.source_id = session.source_id
            AND outbox.reason = session.reason
        ORDER BY version_time DESC NULLS LAST, outbox.created_at DESC, outbox.id DESC
        LIMIT 1
    ) AS newest ON true
    WHERE newest.status IS NULL
        OR newest.status = 'completed'
        -- Parked, but the session has changed since: that state has not been tried yet. A version
        -- that is no time tells of none; the row itself does.
        OR newest.status = 'failed'
            AND newest.next_attempt_at = 'infinity'
            AND coalesce(newest.version_time, newest.updated_at) < session.updated_at
),
queueable AS (
    SELECT source_type, reason, org_id, source_id, at, updated_at AS since, source_version, outbox_id,
        row_version
    FROM queueable_sessions
    UNION ALL
    -- Everything else has one version, its id.
    SELECT missing.*, missing.at, missing.source_id, outbox.id, outbox.xmin
    FROM pg_temp.missing
    LEFT JOIN reporting_outbox AS outbox
        ON outbox.org_id = missing.org_id
        AND outbox.source_type = missing.source_type
        AND outbox.source_id = missing.source_id
        AND outbox.source_version = missing.source_id
        AND outbox.reason = missing.reason
    WHERE missing.source_type <> 'session'
        AND (outbox.status IS NULL OR outbox.status = 'completed')
)
SELECT *
FROM (
    SELECT *
    FROM (
        SELECT
            queueable.*,
            row_number() OVER (PARTITION BY source_type ORDER BY at, source_id) AS place
        FROM queueable
    ) AS placed
    ORDER BY place, source_type
    LIMIT %(limit)s::bigint
) AS chosen
ORDER BY at, source_type, source_id

-- name: look
-- How many sources of each type were chosen, and since when the oldest is as it is: since its last
-- change, as far as is known; and the days on which they happened. In times that Python's calendar
-- has. And how many of them are damaged: their facts were there, or should be for long, so that
-- something else has happened to them than that a source changed and nobody has enqueued it yet.
SELECT
    source_type,
    count(*),
    count(*) FILTER (
        WHERE CASE
            WHEN source_type = 'session' THEN
                -- Else it lacks capabilities: its agent may have gained them just now.
                NOT EXISTS (
                    SELECT FROM fact_session AS fact
                    WHERE fact.org_id = chosen.org_id
                        AND fact.source_key = 'session:' || chosen.source_id
                        AND fact.last_active_at = chosen.since
                )
                AND (
                    since < now() - %(grace)s::interval
                    OR outbox_id IS NOT NULL AND NOT EXISTS (
                        SELECT FROM fact_session AS fact
                        WHERE fact.org_id = chosen.org_id
                            AND fact.source_key = 'session:' || chosen.source_id
                    )
                )
            ELSE
                (since < now() - %(grace)s::interval OR outbox_id IS NOT NULL)
                -- The late usage of a generation is enqueued as another version of it.
                AND (source_type <> 'llm_generation' OR NOT EXISTS (
                    SELECT FROM reporting_outbox AS outbox
                    WHERE outbox.org_id = chosen.org_id
                        AND outbox.source_type = chosen.source_type
                        AND outbox.source_id = chosen.source_id
                        AND outbox.status <> 'completed'
                ))
        END
    ),
    greatest('0001-01-02Z', least('9999-12-30Z', min(since))),
    coalesce(
        array_agg(DISTINCT (at AT TIME ZONE 'UTC')::date)
            FILTER (WHERE at BETWEEN '0001-01-02Z' AND '9999-12-30Z'),
        '{}'
    )
FROM pg_temp.chosen
GROUP BY source_type

-- name: enqueue
-- Whatever others have enqueued since it was looked up stays as it is and is not counted, even if
-- it has been completed again: its facts are there. Rows are written in the
-- order of `chosen`, which two backfills share, so that they seldom deadlock (then one is done
-- again). A row that was completed begins anew: attempts that succeeded do not count towards
-- parking it.
WITH renewed AS (
    UPDATE reporting_outbox AS outbox
    SET status = 'pending', attempts = 0, next_attempt_at = now(), updated_at = now()
    FROM pg_temp.chosen
    WHERE outbox.id = outbox_id
        AND outbox.xmin = chosen.row_version
        AND outbox.status = 'completed'
    RETURNING chosen.source_type
), added AS (
    INSERT INTO reporting_outbox (org_id, source_type, source_id, source_version, reason)
    SELECT org_id, source_type, source_id, source_version, reason
    FROM pg_temp.chosen
    WHERE outbox_id IS NULL
    ORDER BY at, source_type, source_id
    ON CONFLICT (org_id, source_type, source_id, source_version, reason) DO NOTHING
    RETURNING source_type
)
SELECT source_type, count(*)
FROM (SELECT * FROM renewed UNION ALL SELECT * FROM added) AS enqueued
GROUP BY source_type
