-- PostgreSQL: of the reported items, those that are neither stored nor told to be rejected.
SELECT
    workspace.organization_id::text,
    workspace.id::text,
    project.id::text,
    reported.trace_id,
    reported.dedupe_key,
    reported.ended
FROM unnest(%(traces)s::text[], %(projects)s::text[], %(keys)s::text[], %(ended)s::bigint[])
    WITH ORDINALITY AS reported (trace_id, project, dedupe_key, ended, position)
JOIN staged_projects AS known ON known.name = reported.project
JOIN projects AS project ON project.id = known.project_id
JOIN item_workspaces AS workspace ON workspace.id = project.workspace_id
WHERE
    NOT EXISTS (
        SELECT FROM items
        WHERE items.project_id = project.id AND items.dedupe_key = reported.dedupe_key
    )
    AND NOT EXISTS (
        SELECT FROM everruns_pipelines.item_rejections AS rejection
        WHERE rejection.project_id = project.id AND rejection.dedupe_key = reported.dedupe_key
    )
ORDER BY reported.position
