-- How what is kept of sessions that are gone goes.

-- name: forget_digests
DELETE FROM everruns_pipelines.key_digests AS digest
WHERE NOT EXISTS (SELECT FROM sessions WHERE sessions.id = digest.session_id)
    AND (%(session_id)s::uuid IS NULL OR digest.session_id = %(session_id)s::uuid)

-- name: forget_rejections
DELETE FROM everruns_pipelines.fact_rejections AS known
WHERE NOT EXISTS (SELECT FROM sessions WHERE sessions.id = known.session_id)
    AND (known.session_id = %(session_id)s::uuid
        OR %(session_id)s::uuid IS NULL AND known.session_id IS NOT NULL)

-- name: erase
-- All in one statement: what names the session, and has lost its source. Events of a session that is
-- gone have lost it, archived or not.
WITH {facts},
"everruns_pipelines.fact_rejections" AS (
    DELETE FROM everruns_pipelines.fact_rejections
    WHERE (fact, org_id, source_key) IN (
        SELECT fact.fact, fact.org_id, fact.source_key
        FROM everruns_pipelines.fact_rejections AS fact
        {key}
        LEFT JOIN archived_events AS archived ON archived.id = key.id
        -- Earlier versions did not note the session. Whose it was cannot be told then: it goes, too.
        WHERE coalesce(fact.session_id, archived.session_id, %(session_id)s) = %(session_id)s
            AND NOT {stands}
    )
    RETURNING org_id, source_key
),
"everruns_pipelines.key_digests" AS (
    DELETE FROM everruns_pipelines.key_digests
    WHERE session_id = %(session_id)s AND {is_gone}
    RETURNING session_id
),
traces AS (
    {traces}
    UNION
    SELECT source_key FROM "everruns_pipelines.fact_rejections"
    UNION
    SELECT 'event:' || id FROM archived_events WHERE session_id = %(session_id)s AND {is_gone}
    UNION
    SELECT 'session:' || %(session_id)s::uuid WHERE {is_gone}
),
reporting_outbox AS (
    DELETE FROM reporting_outbox
    WHERE (source_type, source_id) IN (
        SELECT split_part(source_key, ':', 1), split_part(source_key, ':', 2) FROM traces
    )
    RETURNING id
)
{counts}

-- name: erase_facts
{fact} AS (
    DELETE FROM {fact}
    WHERE (org_id, source_key) IN (
        SELECT fact.org_id, fact.source_key
        FROM {fact} AS fact
        {key}
        WHERE fact.session_id = %(session_id)s AND NOT {stands}
    )
    RETURNING org_id, source_key
)

-- name: postings_that_name_it
-- Ledger rows outlive a session, and no longer name it: their facts are to follow.
SELECT fact.org_id, key.id AS source_id
FROM fact_budget_posting AS fact
{key}
WHERE fact.session_id = %(session_id)s AND {is_gone}
