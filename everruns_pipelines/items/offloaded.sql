-- PostgreSQL: envelopes that were offloaded, with the directories that are none of their project's.
SELECT
    candidate.span,
    candidate.position,
    candidate.dedupe_key,
    candidate.uri,
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
