-- PostgreSQL: the links of a batch that the table does not have.
INSERT INTO item_links (project_id, source_item_id, target_item_id, relationship)
SELECT project_id, source_id, target_id, relationship
FROM planned_links
WHERE state = 'create'
ON CONFLICT (source_item_id, target_item_id, relationship) DO NOTHING
