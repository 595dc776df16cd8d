-- PostgreSQL: the first and the last candidate of every batch.
SELECT min(candidate) AS first, max(candidate) AS last
FROM (
    SELECT candidate, (row_number() OVER (ORDER BY candidate) - 1) / %(size)s AS batch
    FROM chosen
    WHERE
        NOT %(linked)s
        OR candidate IN (SELECT id FROM candidates WHERE jsonb_array_length(links) > 0)
)
GROUP BY batch
ORDER BY batch
