-- One row per generation, background inference without a session included.
SELECT
    org_id,
    'llm_generation:' || id AS source_key,
    session_id,
    turn_id::text AS turn_id,
    created_at,
    model,
    provider,
    finish_reason,
    input_tokens,
    output_tokens,
    cache_read_tokens,
    cache_creation_tokens,
    input_tokens::numeric + output_tokens + cache_read_tokens + cache_creation_tokens
        AS total_tokens,
    coalesce(duration_ms, 0) AS duration_ms,
    0 AS time_to_first_token_ms,
    1 AS success_count,
    0 AS error_count
FROM selected
