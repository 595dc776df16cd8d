-- Envelopes that the SDK moved to an object store.

-- name: offloaded
-- Those that were not fetched yet, with the directories that are none of their project's.
SELECT
    candidate.span,
    candidate.position,
    candidate.dedupe_key,
    candidate.uri,
    candidate.size,
    (
        SELECT coalesce(array_agg(other.id::text), '{}')
        FROM (
            SELECT id FROM item_organizations WHERE id <> candidate.organization_id
            UNION ALL
            SELECT workspace.id
            FROM item_workspaces AS workspace
            WHERE NOT EXISTS (
                SELECT
                FROM projects
                WHERE
                    projects.id = candidate.project_id
                    AND projects.workspace_id = workspace.id
            )
        ) AS other
        WHERE other.id::text = ANY (string_to_array(lower(candidate.uri), '/'))
    ) AS others
FROM candidates AS candidate
WHERE candidate.state <> 'valid' AND candidate.reason = 'offloaded'
ORDER BY candidate.id

-- name: make_room
-- What was fetched, or was not for a reason, is judged anew.
DELETE FROM candidates
USING staged_values AS fetched
WHERE candidates.span = fetched.span AND candidates.position = fetched.position

-- name: tell_there_is_no_store
UPDATE candidates
SET detail = 'EVERRUNS_OBJECT_STORE_URL is not set'
WHERE state <> 'valid' AND reason = 'offloaded'
