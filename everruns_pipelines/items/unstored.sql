-- Which of the items that spans reported are stored.

-- name: stage
-- Temporary: gone with the connection.
CREATE TEMP TABLE reported (
    trace_id text NOT NULL,
    project_name text NOT NULL,
    dedupe_key text NOT NULL,
    ended_ns bigint NOT NULL,
    complete boolean NOT NULL CHECK (complete)
)

-- name: copy
COPY reported (trace_id, project_name, dedupe_key, ended_ns, complete) FROM STDIN

-- name: last
-- How many there are, and the last of them in their order.
SELECT (SELECT count(*) FROM reported), ended_ns, trace_id, project_name, dedupe_key
FROM reported
ORDER BY
    ended_ns DESC, trace_id COLLATE "C" DESC, project_name COLLATE "C" DESC,
    dedupe_key COLLATE "C" DESC
LIMIT 1

-- name: unstored
-- Those of known projects that are neither stored nor told to be rejected, in their order.
WITH named AS (
    SELECT
        project_name,
        -- As in projects.sql: what looks like a UUID may be spelled in capitals.
        CASE
            WHEN char_length(project_name) BETWEEN 32 AND 36 AND project_name ~ '^[0-9A-Fa-f-]+$'
                THEN lower(project_name)
            ELSE project_name
        END AS project
    FROM (SELECT DISTINCT project_name FROM reported) AS names
)

SELECT
    workspace.organization_id::text,
    workspace.id::text,
    project.id::text,
    reported.ended_ns,
    reported.trace_id,
    reported.project_name,
    reported.dedupe_key
FROM reported
JOIN named USING (project_name)
JOIN staged_projects AS known ON known.name = named.project
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
ORDER BY
    reported.ended_ns, reported.trace_id COLLATE "C", reported.project_name COLLATE "C",
    reported.dedupe_key COLLATE "C"
LIMIT %(most)s
