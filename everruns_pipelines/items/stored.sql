-- PostgreSQL: an item that is stored is rejected no longer.
DELETE FROM everruns_pipelines.item_rejections AS rejection
USING chosen
WHERE
    chosen.round = %(round)s
    AND chosen.candidate BETWEEN %(first)s AND %(last)s
    AND rejection.project_id = chosen.project_id
    AND rejection.dedupe_key = chosen.dedupe_key
