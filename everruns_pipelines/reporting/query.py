"""SQL that follows from the catalog: the rows a fact must have, for any selection of sources."""

from collections.abc import Collection, Iterable
from typing import LiteralString

from psycopg import sql

from everruns_pipelines.reporting.catalog import (
    DIMENSIONS,
    EVENT,
    SESSION,
    Column,
    Fact,
    Projection,
    Source,
)
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS

# What happened on a day from `first` to `last`. A join without columns, so that the condition can
# stand where joins do.
BETWEEN = sql.SQL(
    "JOIN (SELECT) AS days ON {time} >= %(first)s::date AND {time} < %(last)s::date + 1"
)
EVERYTHING = sql.SQL("")
# Joins to `fact` the source that its key names, as `key`.
KEY_OF_FACT = sql.SQL("""
CROSS JOIN LATERAL (
    SELECT
        split_part(fact.source_key, ':', 1) AS type,
        CASE
            WHEN pg_input_is_valid(split_part(fact.source_key, ':', 2), 'uuid')
                THEN split_part(fact.source_key, ':', 2)::uuid
        END AS id
) AS key
""")


def rows_of(source: Source) -> sql.Composed:
    """Every row of the source, wherever it lies: a relation.

    Without conditions of its own, so that the planner looks keys up in each table by its index.
    """
    columns = sql.SQL(", ").join(sql.Identifier(c.name) for c in SOURCE_COLUMNS[source.table])
    return sql.SQL("({})").format(
        sql.SQL(" UNION ALL ").join(
            sql.SQL("SELECT {} FROM {}").format(columns, sql.Identifier(table))
            for table in source.tables
        )
    )


def selected_rows(source: Source, event_types: Iterable[str], selection: sql.SQL) -> sql.Composed:
    """Rows of the source in the selection, each with its `org_id`."""
    org_id = sql.SQL("session.org_id" if source.org_from_session else "source.org_id")
    columns = columns_of(source)
    return sql.SQL("SELECT {columns} FROM {rows} AS source {session} {selection} {where}").format(
        columns=sql.SQL("{}, {}").format(org_id, columns) if source.org_from_session else columns,
        rows=rows_of(source),
        session=sql.SQL(
            "JOIN sessions AS session ON session.id = source.session_id"
            if source.org_from_session
            else ""
        ),
        selection=selection.format(
            org_id=org_id,
            session_id=sql.SQL("source.id" if source is SESSION else "source.session_id"),
            time=sql.Identifier("source", source.time),
        ),
        where=of_types("WHERE source.event_type", event_types),
    )


def looked_up(source: Source, event_types: Iterable[str]) -> sql.Composed:
    """What `rows_of_looked_up` reads, to stand behind WITH.

    `source_rows` are rows of the source in the selection from number `first` to `last`, each once,
    looked up one by one.

    Of a source without `org_id`, the selection says whose a row is, and its session must confirm
    it. `source_sessions` are those that do, with the dimensions that come from them: looked up once
    for all rows of a session.
    """
    columns = columns_of(source)
    if source.org_from_session:
        columns = sql.SQL("selection.org_id, {}").format(columns)
    return sql.SQL("{rows}{sessions}").format(
        rows=sql.SQL(_SOURCE_ROWS).format(
            columns=columns,
            rows=rows_of(source),
            of_org=sql.SQL(
                "" if source.org_from_session else "AND (source.org_id = selection.org_id) IS TRUE"
            ),
            of_types=of_types("AND source.event_type", event_types),
        ),
        sessions=sql.SQL(_SOURCE_SESSIONS if source.org_from_session else "").format(
            dimensions=sql.SQL(", ").join(
                sql.SQL("{} AS {}").format(_value(column), sql.Identifier(column.name))
                for column in DIMENSIONS
            ),
            joins=_joins("JOIN", _OF_ORG_BY_ID),
        ),
    )


# LIMIT: in this order, whatever the statistics say of a table that grows, or of a selection. And an
# event that lies in both tables, as after a restore, is one here: it would fail all that is
# projected with it.
_SOURCE_ROWS = """
source_rows AS MATERIALIZED (
    SELECT {columns}
    FROM (
        SELECT DISTINCT ON (org_id, source_id) org_id, source_id
        FROM pg_temp.selection
        WHERE part BETWEEN %(first)s AND %(last)s
    ) AS selection
    CROSS JOIN LATERAL (
        SELECT * FROM {rows} AS source
        WHERE source.id = selection.source_id {of_org} {of_types}
        LIMIT 1
    ) AS source
)
"""

_SOURCE_SESSIONS = """,
source_sessions AS (
    SELECT projected.org_id, session.id, {dimensions}
    FROM (SELECT DISTINCT org_id, session_id FROM source_rows) AS projected {joins}
)
"""


def columns_of(source: Source) -> sql.Composed:
    """The columns that are read of a source, and no others: the role may not see more."""
    return sql.SQL(", ").join(
        sql.Identifier("source", column.name) for column in SOURCE_COLUMNS[source.table]
    )


def of_types(column: LiteralString, event_types: Iterable[str]) -> sql.Composable:
    """A condition for the column, unless any type will do."""
    types = [sql.Literal(event_type) for event_type in event_types]
    if not types:
        return sql.SQL("")
    return sql.SQL(column + " IN ({})").format(sql.SQL(", ").join(types))


def projected_rows(
    fact: Fact, projection: Projection, selection: sql.SQL, *, by_id: bool = False
) -> sql.Composed:
    """The rows that `projection` makes of the selection: the fact's columns, in their order,
    then `rejected` and `reported`.

    Args:
        by_id: look what dimensions come from up by its id, and not by its organization.
    """
    return _made_rows(
        fact,
        projection,
        selected_rows(projection.source, projection.event_types, selection),
        _joins("LEFT JOIN", _OF_ORG_BY_ID if by_id else _OF_ORG, projection),
    )


def staged_rows(fact: Fact, projection: Projection) -> sql.Composed:
    """The same of what stands in the selection from number `first` to `last`."""
    return sql.SQL("WITH {} SELECT * FROM ({}) AS made").format(
        looked_up(projection.source, projection.event_types), rows_of_looked_up(fact, projection)
    )


def rows_of_looked_up(fact: Fact, projection: Projection) -> sql.Composed:
    """The same of what has been `looked_up`."""
    selected = sql.SQL("SELECT * FROM source_rows {}").format(
        of_types("WHERE event_type", projection.event_types)
    )
    if projection.source.org_from_session:
        return _made_rows(fact, projection, selected, sql.SQL(_OF_SOURCE_SESSIONS), DIMENSIONS)
    return _made_rows(fact, projection, selected, _joins("LEFT JOIN", _OF_ORG_BY_ID, projection))


def _made_rows(
    fact: Fact,
    projection: Projection,
    selected: sql.Composable,
    joins: sql.Composable,
    of_session: Collection[Column] = (),
) -> sql.Composed:
    """The rows of a projection over `selected`, with `joins` to what its dimensions come from.

    Args:
        of_session: columns of the fact that `session`, as it is joined, has ready.
    """
    return sql.SQL(
        "WITH selected AS NOT MATERIALIZED ({selected}),"
        " all_events AS NOT MATERIALIZED (SELECT * FROM {events} AS event)"
        " SELECT {columns}, {rejected} AS rejected, {reported} AS reported"
        " FROM ({projection}) AS projected {joins}"
    ).format(
        selected=selected,
        events=rows_of(EVENT),
        columns=sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(
                sql.Identifier("session", column.name)
                if column in of_session
                else _value(column, projection.provides),
                sql.Identifier(column.name),
            )
            for column in fact.columns
        ),
        rejected=sql.SQL("projected.rejected" if projection.rejects else "NULL::text"),
        reported=sql.SQL("projected.reported" if projection.reports else "NULL::text"),
        projection=sql.SQL(projection.sql),
        joins=joins,
    )


def _joins(
    join: LiteralString, of_org: LiteralString, projection: Projection | None = None
) -> sql.Composed:
    """Joins what the dimensions of `projected` come from, where its projection does not say."""
    provided = projection.provides if projection else ()
    names = ("agent_id", "harness_id")
    agent_id, harness_id = (
        sql.Identifier("projected" if name in provided else "session", name) for name in names
    )
    return sql.SQL(_JOINS).format(
        join=sql.SQL(join),
        agent_id=agent_id,
        harness_id=harness_id,
        session_of_org=sql.SQL(of_org).format(sql.Identifier("session")),
        agent_of_org=sql.SQL(of_org).format(sql.Identifier("agent")),
        harness_of_org=sql.SQL(of_org).format(sql.Identifier("harness")),
    )


_JOINS = """
{join} sessions AS session ON session.id = projected.session_id AND {session_of_org}
LEFT JOIN agents AS agent ON agent.id = {agent_id} AND {agent_of_org}
LEFT JOIN harnesses AS harness ON harness.id = {harness_id} AND {harness_of_org}
"""
_OF_ORG = "{0}.org_id = projected.org_id"
# No index knows a condition that IS TRUE. While a table is small, or has no statistics, the
# planner would as soon read all that an organization has as look a row up by its id.
_OF_ORG_BY_ID = "({0}.org_id = projected.org_id) IS TRUE"
# A full join cannot be done row by row: so it is hashed also where a connection hashes nothing that
# it need not. The planner may make no other join of it: num_nulls proves nothing of either side.
_OF_SOURCE_SESSIONS = """
FULL JOIN source_sessions AS session
    ON session.id = projected.session_id AND session.org_id = projected.org_id
WHERE num_nulls(projected.source_key, session.id) = 0
"""


def expected_rows(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    """Of the rows that `projection` makes, those that are stored."""
    return sql.SQL("SELECT * FROM ({}) AS projected WHERE rejected IS NULL").format(
        projected_rows(fact, projection, selection)
    )


def _value(column: Column, provided: Collection[str] = ()) -> sql.Composable:
    if column.dimension is None or column.name in provided:
        return sql.Identifier("projected", column.name)
    return sql.SQL(column.dimension)


def stands(sources: Iterable[Source], org_id: LiteralString) -> sql.Composed:
    """A condition: the source of `key` (type, id) is there, in the organization.

    Looked up one by one: meant for few.
    """
    return sql.SQL("(CASE key.type {} ELSE false END)").format(
        sql.SQL(" ").join(
            sql.SQL(
                "WHEN {} THEN EXISTS (SELECT FROM ({}) AS source"
                " WHERE source.id = key.id AND source.org_id = {} OFFSET 0)"
            ).format(
                sql.Literal(source.type),
                selected_rows(source, (), EVERYTHING),
                sql.SQL(org_id),
            )
            for source in sources
        )
    )
