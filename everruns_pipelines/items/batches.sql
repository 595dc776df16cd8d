-- PostgreSQL: the first and the last candidate of every batch, of a round; without a round, of all
-- that name links. Candidates are numbered, so a batch has at most as many as its range of numbers.
SELECT %(round)s::integer AS round, min(candidate) AS first, max(candidate) AS last
FROM chosen
WHERE
    round = %(round)s
    OR (
        %(round)s::integer IS NULL
        AND candidate IN (
            SELECT id FROM candidates WHERE links IS NOT NULL AND jsonb_array_length(links) > 0
        )
    )
GROUP BY (candidate - 1) / %(size)s
ORDER BY first
