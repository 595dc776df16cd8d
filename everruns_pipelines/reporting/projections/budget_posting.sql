-- One row per ledger posting. Who and what it concerns stands in the ledger, not in the session.
SELECT
    selected.org_id,
    'usage_ledger:' || selected.id AS source_key,
    selected.session_id,
    selected.user_id,
    selected.principal_id,
    selected.agent_id,
    selected.harness_id,
    selected.created_at,
    selected.budget_id,
    budget.subject_type AS budget_subject_type,
    budget.subject_id AS budget_subject_id,
    selected.currency,
    selected.meter_source,
    selected.ref_type,
    selected.amount,
    CASE WHEN selected.amount >= 0 THEN 1 ELSE 0 END AS debit_count,
    CASE WHEN selected.amount >= 0 THEN 0 ELSE 1 END AS credit_count
FROM selected
LEFT JOIN budgets AS budget
    ON budget.id = selected.budget_id AND (budget.org_id = selected.org_id) IS TRUE
