-- PostgreSQL: the names under which spans know projects. A UUID is the project's own; a slug counts
-- only if no other project has it, nor has it for its UUID.
-- %(project)s: that project alone, or all of them when it is null.
INSERT INTO staged_projects (name, project_id, organization_id)
SELECT named.name, named.id, workspace.organization_id
FROM (
    SELECT id::text AS name, id, workspace_id
    FROM projects
    WHERE %(project)s::uuid IS NULL OR id = %(project)s
    UNION ALL
    SELECT mine.slug, mine.id, mine.workspace_id
    FROM projects AS mine
    WHERE
        (%(project)s::uuid IS NULL OR mine.id = %(project)s)
        AND mine.slug <> ''
        AND NOT EXISTS (
            SELECT FROM projects AS other WHERE other.slug = mine.slug AND other.id <> mine.id
        )
        AND NOT (
            pg_input_is_valid(mine.slug, 'uuid')
            AND EXISTS (SELECT FROM projects AS other WHERE other.id::text = lower(mine.slug))
        )
) AS named
JOIN item_workspaces AS workspace ON workspace.id = named.workspace_id
