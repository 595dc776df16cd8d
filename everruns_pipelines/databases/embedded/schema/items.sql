-- The platform's tables of items: what agents report, the links between, and whose they are.

CREATE TABLE item_organizations (
    id uuid NOT NULL DEFAULT uuidv7(),
    slug text NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (slug)
);

CREATE TABLE item_workspaces (
    id uuid NOT NULL DEFAULT uuidv7(),
    organization_id uuid NOT NULL,
    slug text NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY (organization_id) REFERENCES item_organizations(id),
    UNIQUE (organization_id, slug)
);

CREATE TABLE projects (
    id uuid NOT NULL DEFAULT uuidv7(),
    workspace_id uuid NOT NULL,
    slug text NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY (workspace_id) REFERENCES item_workspaces(id),
    UNIQUE (workspace_id, slug)
);
CREATE INDEX ON projects (slug);

CREATE TABLE items (
    id uuid NOT NULL DEFAULT uuidv7(),
    organization_id uuid NOT NULL,
    project_id uuid NOT NULL,
    item_type text NOT NULL,
    title text,
    ref text,
    data jsonb NOT NULL,
    disposition jsonb,
    source text NOT NULL,
    session_id uuid,
    trace_id text,
    span_id text,
    capability text,
    capability_version text,
    schema_ref text,
    dedupe_key text,
    created_by uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CHECK (source IN ('api', 'runtime', 'extracted')),
    CHECK (jsonb_typeof(data) = 'object'),
    CHECK (jsonb_typeof(disposition) = 'object'),
    CHECK (ref <> ''),
    PRIMARY KEY (id),
    FOREIGN KEY (organization_id) REFERENCES item_organizations(id),
    FOREIGN KEY (project_id) REFERENCES projects(id),
    UNIQUE (project_id, dedupe_key)
);
CREATE UNIQUE INDEX items_project_id_ref_key ON items (project_id, ref) WHERE ref IS NOT NULL;
CREATE INDEX ON items (session_id) WHERE session_id IS NOT NULL;

CREATE TABLE item_links (
    id uuid NOT NULL DEFAULT uuidv7(),
    project_id uuid NOT NULL,
    source_item_id uuid NOT NULL,
    target_item_id uuid NOT NULL,
    relationship text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (id),
    FOREIGN KEY (project_id) REFERENCES projects(id),
    FOREIGN KEY (source_item_id) REFERENCES items(id) ON DELETE CASCADE,
    FOREIGN KEY (target_item_id) REFERENCES items(id) ON DELETE CASCADE,
    UNIQUE (source_item_id, target_item_id, relationship)
);
CREATE INDEX ON item_links (target_item_id);
