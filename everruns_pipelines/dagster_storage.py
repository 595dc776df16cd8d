"""Dagster's own storage: the configured PostgreSQL, else a database of the embedded one.

dagster.yaml names the class below, since YAML knows neither conditions nor defaults.
"""

import os
from typing import Any, Self

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage
from sqlalchemy import URL

from everruns_pipelines.settings import Settings

# A run over a range of days writes its events together: one by one takes minutes for a year.
# Every process of Dagster imports this module, and dagster.yaml has no place for these.
os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "1000")
os.environ.setdefault("DAGSTER_EMIT_PARTITION_SUBSET_IN_PLANNED_EVENTS", "1")


class EverrunsDagsterStorage(DagsterPostgresStorage):
    """Runs, events and schedules in PostgreSQL, wherever the environment says it is."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Nothing to configure in dagster.yaml: EVERRUNS_DAGSTER_POSTGRES_URL says it all."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:  # noqa: ARG003
        """The storage that the environment asks for; `config_value` is empty."""
        return cls(
            postgres_url=_for_sqlalchemy(storage_url(Settings.from_environment())),
            should_autocreate_tables=True,
            inst_data=inst_data,
        )


def storage_url(settings: Settings) -> str:
    """The URL of the storage. Holds a password: never to be printed."""
    if settings.dagster_postgres_url is not None:
        return settings.dagster_postgres_url.get_secret_value()
    from everruns_pipelines.databases.embedded.servers import (
        DAGSTER_DATABASE,
        embedded_postgres_url,
    )

    return embedded_postgres_url(settings.home, DAGSTER_DATABASE)


def _for_sqlalchemy(url: str) -> str:
    """The same in SQLAlchemy's spelling: dagster-postgres speaks psycopg 2, and several hosts are a
    parameter.
    """
    from psycopg.conninfo import conninfo_to_dict

    rest = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    user, password, database = (rest.pop(name, None) for name in ("user", "password", "dbname"))
    spelled = URL.create("postgresql+psycopg2", user, password, database=database, query=rest)
    return spelled.render_as_string(hide_password=False)
