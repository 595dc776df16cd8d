"""SQL that follows from the catalog: the rows a fact must have, for any selection of sources."""

from collections.abc import Iterable
from typing import LiteralString

from psycopg import sql

from everruns_pipelines.reporting.catalog import EVENT, SESSION, Column, Fact, Projection, Source
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


def looked_up_rows(source: Source, event_types: Iterable[str]) -> sql.Composed:
    """The same of the selection, from number `first` to `last`, each once, looked up one by one.

    Of a source without `org_id`, the selection says whose a row is: `made_rows` has its session
    confirm it.
    """
    columns = columns_of(source)
    if source.org_from_session:
        columns = sql.SQL("selection.org_id, {}").format(columns)
    return sql.SQL(_LOOKED_UP).format(
        columns=columns,
        rows=rows_of(source),
        of_org=sql.SQL(
            "" if source.org_from_session else "AND (source.org_id = selection.org_id) IS TRUE"
        ),
        of_types=of_types("AND source.event_type", event_types),
    )


# LIMIT: in this order, whatever the statistics say of a table that grows, or of a selection. And an
# event that lies in both tables, as after a restore, is one: it would fail all that is projected
# with it.
_LOOKED_UP = """
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


def projected_rows(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    """The rows that `projection` makes of the selection: the fact's columns, in their order,
    then `rejected` and `reported`.
    """
    return made_rows(
        fact, projection, selected_rows(projection.source, projection.event_types, selection)
    )


def staged_rows(fact: Fact, projection: Projection) -> sql.Composed:
    """The same of what stands in the selection from number `first` to `last`."""
    source = projection.source
    return made_rows(
        fact, projection, looked_up_rows(source, projection.event_types), looked_up=True
    )


def made_rows(
    fact: Fact, projection: Projection, selected: sql.Composable, *, looked_up: bool = False
) -> sql.Composed:
    """The same of source rows of the event types that the projection reads.

    Args:
        looked_up: they were, one by one: so is what they are joined with. And if only the session
            says whose they are, those are left out whose session is not of their `org_id`.
    """
    is_unsure = looked_up and projection.source.org_from_session
    # No index knows a condition that IS TRUE. While a table is small, or has no statistics, the
    # planner would as soon read all that an organization has as look a row up by its id.
    of_org = sql.SQL(_OF_ORG_BY_ID if looked_up else _OF_ORG)
    agent_id, harness_id = (
        _value(column, projection)
        for column in fact.columns
        if column.name in ("agent_id", "harness_id")
    )
    return sql.SQL(
        "WITH selected AS NOT MATERIALIZED ({selected}),"
        " all_events AS NOT MATERIALIZED (SELECT * FROM {events} AS event)"
        " SELECT {columns}, {rejected} AS rejected, {reported} AS reported"
        " FROM ({projection}) AS projected"
        " {join} sessions AS session"
        " ON session.id = projected.session_id AND {session_of_org}"
        " LEFT JOIN agents AS agent ON agent.id = {agent_id} AND {agent_of_org}"
        " LEFT JOIN harnesses AS harness ON harness.id = {harness_id} AND {harness_of_org}"
    ).format(
        selected=selected,
        join=sql.SQL("JOIN" if is_unsure else "LEFT JOIN"),
        session_of_org=of_org.format(sql.Identifier("session")),
        agent_of_org=of_org.format(sql.Identifier("agent")),
        harness_of_org=of_org.format(sql.Identifier("harness")),
        events=rows_of(EVENT),
        columns=sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(_value(column, projection), sql.Identifier(column.name))
            for column in fact.columns
        ),
        rejected=sql.SQL("projected.rejected" if projection.rejects else "NULL::text"),
        reported=sql.SQL("projected.reported" if projection.reports else "NULL::text"),
        projection=sql.SQL(projection.sql),
        agent_id=agent_id,
        harness_id=harness_id,
    )


_OF_ORG = "{0}.org_id = projected.org_id"
_OF_ORG_BY_ID = "({0}.org_id = projected.org_id) IS TRUE"


def expected_rows(fact: Fact, projection: Projection, selection: sql.SQL) -> sql.Composed:
    """Of the rows that `projection` makes, those that are stored."""
    return sql.SQL("SELECT * FROM ({}) AS projected WHERE rejected IS NULL").format(
        projected_rows(fact, projection, selection)
    )


def _value(column: Column, projection: Projection) -> sql.Composable:
    if column.dimension is None or column.name in projection.provides:
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
