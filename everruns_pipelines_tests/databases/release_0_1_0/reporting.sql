-- What reporting needs of its own in PostgreSQL. Idempotent; the platform's tables are not touched.

CREATE SCHEMA IF NOT EXISTS everruns_pipelines;

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
-- the same source, removed once there is nothing to say. No payload.
CREATE TABLE IF NOT EXISTS everruns_pipelines.fact_rejections (
    fact text NOT NULL,
    org_id bigint NOT NULL,
    source_key text NOT NULL,
    reason text NOT NULL,
    written boolean NOT NULL,
    rejected_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (fact, org_id, source_key)
);

-- The batches that projectors are working on. A projector holds the advisory lock `lock_key`
-- while it lives: a claim whose lock is free was left behind by one that died.
CREATE TABLE IF NOT EXISTS everruns_pipelines.outbox_claims (
    claimed_at timestamptz PRIMARY KEY,
    lock_key bigint NOT NULL
);

-- Which keys a session and its events make: `keys` has, fact by fact, the xor of their hashes, and
-- `inputs` is that of what they were made of, so that it is known whether they still would be; `seed`
-- is the seed of both. See docs/backfill.md. A row that is lost is made anew.
CREATE TABLE IF NOT EXISTS everruns_pipelines.key_digests (
    session_id uuid PRIMARY KEY,
    seed bigint NOT NULL,
    inputs bigint NOT NULL,
    keys bigint[] NOT NULL
);

-- What earlier versions kept instead.
DROP TABLE IF EXISTS everruns_pipelines.session_digests, everruns_pipelines.event_digests;
