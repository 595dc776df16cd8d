-- PostgreSQL: the links of a batch that the table does not have. None of its columns is sure to have
-- a default.
INSERT INTO item_links (
    id, project_id, source_item_id, target_item_id, relationship, created_at
)
SELECT uuidv7(), project_id, source_id, target_id, relationship, now()
FROM planned_links
WHERE state = 'create'
ON CONFLICT (source_item_id, target_item_id, relationship) DO NOTHING
