-- What is kept of sessions that are gone, and how it goes.

-- name: forget_digests
DELETE FROM everruns_pipelines.key_digests AS digest
WHERE NOT EXISTS (SELECT FROM sessions WHERE sessions.id = digest.session_id)
    AND (%(session_id)s::uuid IS NULL OR digest.session_id = %(session_id)s::uuid)

-- name: forget_rejections
DELETE FROM everruns_pipelines.fact_rejections AS known
WHERE NOT EXISTS (SELECT FROM sessions WHERE sessions.id = known.session_id)
    AND (known.session_id = %(session_id)s::uuid
        OR %(session_id)s::uuid IS NULL AND known.session_id IS NOT NULL)

-- name: remove_facts
DELETE FROM {fact} AS fact
USING pg_temp.traces AS trace
WHERE trace.table_name = {name}
    AND trace.org_id = fact.org_id
    AND trace.source_key = fact.source_key

-- name: remove_rejections
DELETE FROM everruns_pipelines.fact_rejections AS known
USING pg_temp.traces AS trace
WHERE trace.table_name = 'everruns_pipelines.fact_rejections'
    AND trace.fact = known.fact
    AND trace.org_id = known.org_id
    AND trace.source_key = known.source_key
