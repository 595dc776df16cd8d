-- The ClickHouse user under which everruns_pipelines reads spans, and nothing else. Run it as who may make users;
-- it may be repeated. Name the tables as you have them (EVERRUNS_SPANS_TABLE):
--
--     clickhouse-client --multiquery < deploy/clickhouse/reader.sql
--
-- It cannot log in yet: no password has this hash. ALTER USER everruns_pipelines IDENTIFIED BY '...'.

-- Every query of ours asks for whole answers by SETTINGS, which readonly = 2 allows. readonly = 1 does as
-- well, as long as the profile cuts no answers: one that does is refused when connecting.
CREATE SETTINGS PROFILE IF NOT EXISTS everruns_pipelines SETTINGS readonly = 2;

CREATE USER IF NOT EXISTS everruns_pipelines
IDENTIFIED WITH sha256_hash BY '0000000000000000000000000000000000000000000000000000000000000000'
SETTINGS PROFILE 'everruns_pipelines';

-- The spans. The table that the exporter keeps beside them to find traces in time is not asked.
GRANT SELECT ON default.otel_traces TO everruns_pipelines;

-- What the span table is made of, where the server asks for such grants. They show only tables that the user
-- may read.
GRANT SELECT ON system.tables TO everruns_pipelines;
GRANT SELECT ON system.columns TO everruns_pipelines;
GRANT SELECT ON system.data_skipping_indices TO everruns_pipelines;
