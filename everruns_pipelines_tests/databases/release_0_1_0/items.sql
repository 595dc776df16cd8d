-- What a rebuild met and could not store: one row each, until a later rebuild stores the item.
-- No column holds payload.
CREATE SCHEMA IF NOT EXISTS everruns_pipelines;

CREATE TABLE IF NOT EXISTS everruns_pipelines.item_rejections (
    -- Made from project and dedupe key, or project, span and position: a rebuild replaces its own.
    id uuid NOT NULL,
    project_id uuid NOT NULL,
    dedupe_key text,
    trace_id text NOT NULL,
    span_id text NOT NULL,
    reason text NOT NULL,
    detail text,
    run_id text,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id)
);
CREATE INDEX IF NOT EXISTS item_rejections_project_id_dedupe_key_idx
ON everruns_pipelines.item_rejections (project_id, dedupe_key);
CREATE INDEX IF NOT EXISTS item_rejections_project_id_span_idx
ON everruns_pipelines.item_rejections (project_id, trace_id, span_id);
