"""What items need in PostgreSQL: the platform's tables, and what is ours beside them."""

from everruns_pipelines.databases import own_schema
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.errors import Refusal

_PLATFORM_TABLES = ("item_organizations", "item_workspaces", "projects", "items", "item_links")


def check_platform(connection: Connection) -> None:
    """Raise a `Refusal` if the platform's tables of items are not there."""
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
    script = read_sql("everruns_pipelines.items", "schema.sql")
    own_schema.ensure(connection, "everruns_pipelines.item_rejections", script)
