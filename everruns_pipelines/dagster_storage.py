"""Dagster's own storage: the configured PostgreSQL, else a database of the embedded one.

dagster.yaml names the class below, since YAML knows neither conditions nor defaults.
"""

import os
from collections.abc import Callable
from typing import Any, Self

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage
from dagster_postgres.utils import DagsterPostgresException
from sqlalchemy import URL, event
from sqlalchemy.exc import DisconnectionError

from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings

# A run over a range of days writes its events together: one by one takes minutes for a year.
# Every process of Dagster imports this module, and dagster.yaml has no place for these.
os.environ.setdefault("DAGSTER_EVENT_BATCH_SIZE", "1000")
os.environ.setdefault("DAGSTER_EMIT_PARTITION_SUBSET_IN_PLANNED_EVENTS", "1")
# Which tables and columns there are: all, since they are made when the storage is opened. Dagster
# asks the system catalog at each look at a run, an asset or a sensor, which takes longer than that
# look.
_ASKED_ONCE = {
    "run_storage": ("has_run_stats_index_cols", "has_backfill_id_column"),
    "event_log_storage": (
        "has_asset_key_index_cols",
        "_has_asset_key_index_cols_on_connection",
    ),
    "schedule_storage": (
        "has_instigators_table",
        "_has_instigators_table",
        "has_secondary_index_table",
    ),
}


class EverrunsDagsterStorage(DagsterPostgresStorage):
    """Runs, events and schedules in PostgreSQL, wherever the environment says it is."""

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Nothing to configure in dagster.yaml: EVERRUNS_DAGSTER_POSTGRES_URL says it all."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Self:  # noqa: ARG003
        """The storage that the environment asks for; `config_value` is empty.

        Raises:
            Refusal: it cannot be reached.
        """
        url = _for_sqlalchemy(storage_url(Settings.from_environment()))
        try:
            storage = cls(postgres_url=url, should_autocreate_tables=True, inst_data=inst_data)
        except DagsterPostgresException:
            raise unreachable() from None
        for part, names in _ASKED_ONCE.items():
            of = getattr(storage, part)
            for name in names:
                setattr(of, name, _once(getattr(of, name)))
            of.optimize_for_webserver = _tried_before_use(of)
        return storage


def _once(ask: Callable[..., bool]) -> Callable[..., bool]:
    """The same question, asked the first time only; the answer does not depend on the arguments."""
    answers: list[bool] = []

    def answer(*arguments: Any) -> bool:
        if not answers:
            answers.append(ask(*arguments))
        return answers[0]

    return answer


def _tried_before_use(storage: Any) -> Callable[..., None]:
    """Its way to keep connections, as web servers do: one that has died meanwhile, as at a restart
    of PostgreSQL, is replaced before a request gets it.
    """
    optimize = storage.optimize_for_webserver

    def optimize_and_try(**bounds: int) -> None:
        optimize(**bounds)
        event.listen(storage._engine, "checkout", _try)  # noqa: SLF001

    return optimize_and_try


def _try(connection: Any, *_: object) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT")
    except connection.Error:
        raise DisconnectionError from None


def storage_url(settings: Settings) -> str:
    """The URL of the storage. Holds a password: never to be printed."""
    if settings.dagster_postgres_url is not None:
        return settings.dagster_postgres_url.get_secret_value()
    from everruns_pipelines.databases.embedded.servers import (
        DAGSTER_DATABASE,
        embedded_postgres_url,
    )

    return embedded_postgres_url(settings.home, DAGSTER_DATABASE)


def unreachable() -> Refusal:
    """What to raise about a storage that does not answer, or does not let us in."""
    return Refusal(
        "Dagster's storage cannot be used: `everruns-pipelines doctor` says why",
        code="unavailable",
        status=503,
    )


def _for_sqlalchemy(url: str) -> str:
    """The same in SQLAlchemy's spelling: dagster-postgres speaks psycopg 2, and several hosts are a
    parameter.
    """
    from psycopg.conninfo import conninfo_to_dict

    rest = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    user, password, database = (rest.pop(name, None) for name in ("user", "password", "dbname"))
    spelled = URL.create("postgresql+psycopg2", user, password, database=database, query=rest)
    return spelled.render_as_string(hide_password=False)
