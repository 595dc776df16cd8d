"""`init`: makes what is ours in the user's PostgreSQL."""

import argparse
from typing import Any

from everruns_pipelines.settings import Settings

HELP = "make our schema in your PostgreSQL; may be repeated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `init` takes."""
    parser.add_argument("--indexes", action="store_true", help="also make the recommended indexes")


def run(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Make the schema of each part that is on, and the indexes if asked to."""
    from everruns_pipelines.databases.postgres import ItemsPostgresDatabase, PostgresDatabase
    from everruns_pipelines.items import database as items_database
    from everruns_pipelines.reporting import database

    # All of the recommended indexes are on tables of reporting.
    indexes = options.indexes and "reporting" in settings.parts
    if "reporting" in settings.parts:
        with PostgresDatabase(settings).connect() as connection:
            # Whoever makes our schema need not be able to read the platform's tables.
            database.check_tables(connection)
            database.ensure_schema(connection)
            if indexes:
                database.create_indexes(connection)
    if "items" in settings.parts:
        with ItemsPostgresDatabase(settings).connect() as connection:
            items_database.check_tables(connection)
            items_database.ensure_schema(connection)
    return {"schema": "everruns_pipelines", "indexes": indexes}
