"""What items need in PostgreSQL: the platform's tables, and what is ours beside them."""

from everruns_pipelines.databases.own_schema import OwnSchema
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.privileges import (
    Privilege,
    on_columns,
    owning,
    reading,
    require,
)
from everruns_pipelines.errors import Refusal

_PLATFORM_TABLES = ("item_organizations", "item_workspaces", "projects", "items", "item_links")

# What we do with them. Of an item everything but what people decide about it.
_DERIVED = (
    "organization_id item_type title ref data session_id trace_id span_id capability"
    " capability_version schema_ref"
)
_READ = {
    "item_organizations": "id slug",
    "item_workspaces": "id organization_id slug",
    "projects": "id workspace_id slug",
    "items": f"id project_id dedupe_key {_DERIVED}",
    "item_links": "id source_item_id target_item_id relationship",
}
_INSERTED = {
    "items": f"project_id dedupe_key disposition source created_at updated_at {_DERIVED}",
    "item_links": "id project_id source_item_id target_item_id relationship created_at",
}
_UPDATED = {"items": f"updated_at {_DERIVED}"}
OWN_TABLE = "everruns_pipelines.item_rejections"
OWN = OwnSchema("everruns_pipelines.items", OWN_TABLE, version=1, usable_from=1)


def needed_privileges() -> list[Privilege]:
    """What a role needs on the platform's tables, by column."""
    return [
        *reading(_columns(_READ)),
        *on_columns("INSERT", _columns(_INSERTED)),
        *on_columns("UPDATE", _columns(_UPDATED)),
    ]


def _columns(tables: dict[str, str]) -> dict[str, list[str]]:
    return {table: columns.split() for table, columns in tables.items()}


def check_platform(connection: Connection) -> None:
    """Check that we can work on the platform's tables of items.

    Raises:
        Refusal: one is not there, or the role lacks a privilege; names all that is missing.
    """
    check_tables(connection)
    require(connection, needed_privileges())


def check_own_tables(connection: Connection) -> None:
    """Raise a `Refusal` that names what the role lacks on the table that is ours."""
    require(connection, owning([OWN_TABLE]))


def check_tables(connection: Connection) -> None:
    """Raise a `Refusal` if the platform's tables of items are not there, whoever may read them."""
    rows = connection.execute(
        "SELECT name FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NULL",
        [list(_PLATFORM_TABLES)],
    )
    missing = [name for (name,) in rows]
    if missing:
        raise Refusal(
            "The database has no table of items: EVERRUNS_ITEMS_POSTGRES_URL must name the one "
            "that has them, or EVERRUNS_PARTS=reporting leaves items out"
            if len(missing) == len(_PLATFORM_TABLES)
            else f"The database lacks {', '.join(missing)}: it must be the platform's, "
            "with all migrations applied",
            code="incompatible_schema",
            status=503,
        )


def ensure_schema(connection: Connection) -> None:
    """Make what is ours in PostgreSQL, where it is missing.

    Raises:
        Refusal: it is missing and the role may not make it.
    """
    OWN.ensure(connection)
