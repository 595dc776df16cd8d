"""Dagster's resources: what the UI shows of our databases, and what hands them out to ops.

An op is given the plain object, which knows nothing of Dagster. The keys begin with `everruns_`, so
that they collide with none of a project that takes our definitions in.
See https://docs.dagster.io/guides/build/external-resources/configuring-resources.
"""

from typing import Any, Self, cast

import dagster as dg
from pydantic import Field, SecretStr

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase, PostgresDatabase
from everruns_pipelines.settings import Settings

# The UI shows asterisks. In the launchpad, too: what it proposes is the whole config of a resource.
_SECRET: Any = {"dagster__is_secret": True}
_ASTERISKS = "********"


class PostgresResource(dg.ConfigurableResource[PostgresDatabase]):
    """PostgreSQL with the platform's tables, the outbox and the facts."""

    postgres_url: str | None = Field(
        None,
        description="EVERRUNS_POSTGRES_URL; null for the embedded server.",
        json_schema_extra=_SECRET,
    )
    home: str = Field(description="EVERRUNS_HOME: where the embedded server lives.")
    reporting_start: str = Field(description="EVERRUNS_REPORTING_START: the first day partition.")
    asset_prefix: list[str] = Field(description="What the keys of our assets begin with.")
    reporting_max_attempts: int = Field(
        description="EVERRUNS_REPORTING_MAX_ATTEMPTS: failures in a row, then a row is parked."
    )
    linger_seconds: int = Field(
        description="EVERRUNS_LINGER_SECONDS: how long a run of the outbox sensor stays for more."
    )
    heal_seconds: int = Field(
        description="EVERRUNS_HEAL_SECONDS: how often all history is looked at for what is missing."
    )
    outbox_keep_days: int = Field(
        description="EVERRUNS_OUTBOX_KEEP_DAYS: how long completed outbox rows are kept."
    )
    runs_keep_days: int = Field(
        description="EVERRUNS_RUNS_KEEP_DAYS: how long run records are kept."
    )

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The resource that the settings describe."""
        return cls(**_shown(settings, cls.model_fields))

    def create_resource(self, context: dg.InitResourceContext) -> PostgresDatabase:
        """What an op works with."""
        return PostgresDatabase(_settings(self, context))


class ItemsPostgresResource(dg.ConfigurableResource[ItemsPostgresDatabase]):
    """PostgreSQL with the items."""

    items_postgres_url: str | None = Field(
        None,
        description="EVERRUNS_ITEMS_POSTGRES_URL; null for the database of `postgres_url`.",
        json_schema_extra=_SECRET,
    )
    postgres_url: str | None = Field(
        None,
        description="EVERRUNS_POSTGRES_URL; null for the embedded server.",
        json_schema_extra=_SECRET,
    )
    home: str = Field(description="EVERRUNS_HOME: where the embedded server lives.")

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The resource that the settings describe."""
        return cls(**_shown(settings, cls.model_fields))

    def create_resource(self, context: dg.InitResourceContext) -> ItemsPostgresDatabase:
        """What an op works with."""
        return ItemsPostgresDatabase(_settings(self, context))


class ClickHouseResource(dg.ConfigurableResource[ClickHouseDatabase]):
    """ClickHouse with the spans, and the store of what was offloaded from them."""

    clickhouse_dsn: str | None = Field(
        None,
        description="EVERRUNS_CLICKHOUSE_DSN; null for the embedded chDB.",
        json_schema_extra=_SECRET,
    )
    home: str = Field(description="EVERRUNS_HOME: where the embedded chDB lives.")
    spans_table: str = Field(description="EVERRUNS_SPANS_TABLE: the span table.")
    object_store_url: str | None = Field(
        None, description="EVERRUNS_OBJECT_STORE_URL: where offloaded items may be read."
    )

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The resource that the settings describe."""
        return cls(**_shown(settings, cls.model_fields))

    def create_resource(self, context: dg.InitResourceContext) -> ClickHouseDatabase:
        """What an op works with."""
        return ClickHouseDatabase(_settings(self, context))


def resources(settings: Settings) -> dict[str, Any]:
    """Every resource of ours, by its key."""
    return {
        "everruns_postgres": PostgresResource.of(settings),
        "everruns_items_postgres": ItemsPostgresResource.of(settings),
        "everruns_clickhouse": ClickHouseResource.of(settings),
        # Between the ops of a run nothing needs to be kept on disk.
        "everruns_io_manager": dg.mem_io_manager,
    }


def _shown(settings: Settings, fields: Any) -> dict[str, Any]:
    """The settings of these names, as a resource's config holds them."""
    given = {name: getattr(settings, name) for name in fields if name in Settings.model_fields}
    return {
        name: value.get_secret_value()
        if isinstance(value, SecretStr)
        else list(cast("tuple[str, ...]", value))
        if isinstance(value, tuple)
        else value
        if value is None or isinstance(value, int)
        else str(value)
        for name, value in given.items()
    }


def _settings(resource: Any, context: dg.InitResourceContext) -> Settings:
    """The settings that a resource's config spells. Asterisks stand for what is configured.

    Raises:
        SettingsError: the config of a run is wrong; does not repeat it.
    """
    given = {name: getattr(resource, name, None) for name in Settings.model_fields}
    if _ASTERISKS in given.values():
        config: Any = context.resource_def.config_field
        configured: dict[str, Any] = config.default_value
        given = {
            name: configured.get(name) if value == _ASTERISKS else value
            for name, value in given.items()
        }
    return Settings.of_variables(
        {
            field.alias or name: given[name]
            for name, field in Settings.model_fields.items()
            if given[name] is not None
        }
    )
