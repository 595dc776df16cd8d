-- PostgreSQL: the names under which spans know projects. A UUID is the project's own; a slug counts
-- only if no other project has it, nor has it for its UUID. What looks like a UUID is compared in
-- small letters, as staging.sql does with the names that spans have.
-- %(project)s: that project alone, or all of them when it is null.
INSERT INTO staged_projects (name, project_id, organization_id)
WITH slugs AS (
    SELECT
        id,
        workspace_id,
        CASE
            WHEN char_length(slug) BETWEEN 32 AND 36 AND slug ~ '^[0-9A-Fa-f-]+$' THEN lower(slug)
            ELSE slug
        END AS name
    FROM projects
    WHERE slug <> ''
)

SELECT named.name, named.id, workspace.organization_id
FROM (
    SELECT id::text AS name, id, workspace_id
    FROM projects
    WHERE %(project)s::uuid IS NULL OR id = %(project)s
    UNION ALL
    SELECT mine.name, mine.id, mine.workspace_id
    FROM slugs AS mine
    WHERE
        (%(project)s::uuid IS NULL OR mine.id = %(project)s)
        AND NOT EXISTS (
            SELECT FROM slugs AS other WHERE other.name = mine.name AND other.id <> mine.id
        )
        AND NOT EXISTS (SELECT FROM projects AS other WHERE other.id::text = mine.name)
) AS named
JOIN item_workspaces AS workspace ON workspace.id = named.workspace_id
