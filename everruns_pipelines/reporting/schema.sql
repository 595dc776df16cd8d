-- What reporting needs of its own in PostgreSQL. Idempotent; the platform's tables are not touched.

-- A number out of JSON: the value of text that is digits only and fits, else `otherwise`.
CREATE OR REPLACE FUNCTION everruns_pipelines.digits(value text, otherwise bigint)
RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE
    WHEN value ~ '^[0-9]+$' AND pg_input_is_valid(value, 'bigint') THEN value::bigint
    ELSE otherwise
END;

-- Says so if the value is digits only, but more than a bigint holds.
CREATE OR REPLACE FUNCTION everruns_pipelines.beyond_bigint(value text)
RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE
    WHEN length(value) >= 19 AND value ~ '^[0-9]+$' AND NOT pg_input_is_valid(value, 'bigint')
        THEN 'a number is beyond bigint'
END;

-- What a projection skipped, or wrote with a number replaced: replaced by the next projection of
-- the same source, removed once there is nothing to say, or the session is gone. No payload.
CREATE TABLE IF NOT EXISTS everruns_pipelines.fact_rejections (
    fact text NOT NULL,
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    reason text NOT NULL,
    written boolean NOT NULL,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    session_id uuid,
    PRIMARY KEY (fact, org_id, source_key)
);
ALTER TABLE everruns_pipelines.fact_rejections ADD COLUMN IF NOT EXISTS session_id uuid;

-- Projectors at work. Each holds the advisory lock `lock_key` while it lives: one whose lock is free
-- has died. `part`: which suspects it was trying; NULL if none.
CREATE TABLE IF NOT EXISTS everruns_pipelines.outbox_projectors (
    lock_key bigint PRIMARY KEY,
    part bigint UNIQUE
);

-- Rows of the outbox that a projector may have died of. Those of a part are tried together;
-- `deaths` is how many projectors died of the row alone.
CREATE TABLE IF NOT EXISTS everruns_pipelines.outbox_suspects (
    outbox_id uuid PRIMARY KEY,
    part bigint NOT NULL,
    deaths integer NOT NULL DEFAULT 0
);

-- What release 0.1.0 used, whose projectors may still run beside ours: its table, and the note by
-- which it knows that it need not make anything. The next release drops both.
CREATE TABLE IF NOT EXISTS everruns_pipelines.outbox_claims (
    claimed_at timestamptz PRIMARY KEY,
    lock_key bigint NOT NULL
);
COMMENT ON TABLE everruns_pipelines.fact_rejections IS 'cd051980d086f6a4';

-- Which keys a session and its events make: `keys` has, fact by fact, the xor of their hashes.
-- `inputs` is that of what they were made of, so that it is known whether they still would be, and
-- `archived` that of the archived events; `seed` is the seed of all. See docs/backfill.md. A row
-- that is lost is made anew.
CREATE TABLE IF NOT EXISTS everruns_pipelines.key_digests (
    session_id uuid PRIMARY KEY,
    seed bigint NOT NULL,
    inputs bigint NOT NULL,
    keys bigint[] NOT NULL
);
ALTER TABLE everruns_pipelines.key_digests ADD COLUMN IF NOT EXISTS archived bigint NOT NULL DEFAULT 0;

-- The archived events that these rows were made of, of all sessions together, in at most one row.
CREATE TABLE IF NOT EXISTS everruns_pipelines.archive_digest (
    seed bigint PRIMARY KEY,
    ids bigint NOT NULL
);

-- What earlier versions kept instead.
DROP TABLE IF EXISTS everruns_pipelines.session_digests, everruns_pipelines.event_digests;
