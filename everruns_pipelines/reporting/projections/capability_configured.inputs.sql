-- What the keys of capability_configured.sql are made of.
SELECT
    org_id,
    id AS session_id,
    ROW (capabilities::text, agent.capability_ids, harness.capability_ids) AS inputs
FROM selected
LEFT JOIN (
    SELECT agent_id, array_agg(capability_id::text ORDER BY capability_id) AS capability_ids
    FROM agent_capabilities
    GROUP BY agent_id
) AS agent USING (agent_id)
LEFT JOIN (
    SELECT harness_id, array_agg(capability_id::text ORDER BY capability_id) AS capability_ids
    FROM harness_capabilities
    GROUP BY harness_id
) AS harness USING (harness_id)
