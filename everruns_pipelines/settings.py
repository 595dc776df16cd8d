"""The environment, read once: every variable a user can set, its default, and its error.

Nothing else in the package reads a variable of ours from `os.environ`.
"""

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)

from everruns_pipelines.errors import SettingsError

_POSTGRES_URL = "postgresql://user:password@host:port/database"
_CLICKHOUSE_DSN = "clickhouse[s]://user:password@host:port/database, or chdb:///path"
_SPANS_TABLE = "a table name, optionally with its database: otel_traces or otel.otel_traces"

# Reporting and items are two platforms' needs: each half works without the other.
Part = Literal["reporting", "items"]
PARTS: tuple[Part, ...] = get_args(Part)

WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]"
_HOST = r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+)"


def _with_scheme(*schemes: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        scheme, separator, rest = value.get_secret_value().partition("://")
        if not (separator and rest and scheme in schemes):
            raise ValueError("not such a URL")
        return value

    return AfterValidator(check)


def _postgres_url(value: SecretStr) -> SecretStr:
    """What libpq would misread it quotes in its error, and that may be a piece of the password."""
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        parts = conninfo_to_dict(value.get_secret_value())
    except ProgrammingError:
        raise ValueError("not such a URL") from None
    # Of several hosts, each may have its port.
    numbers = f"{parts.get('port', '')},{parts.get('connect_timeout', '')}".split(",")
    if "@" in f"{parts.get('host')}{parts.get('dbname')}" or not all(
        number.isdecimal() for number in numbers if number
    ):
        raise ValueError("not such a URL")
    return value


def _clickhouse_dsn(value: SecretStr) -> SecretStr:
    """A piece of a password that is not encoded would be taken for a host, and hosts are told."""
    dsn = value.get_secret_value()
    if dsn.startswith("chdb://"):
        return value
    try:
        parts = urlsplit(dsn)
        has_port = parts.port != 0  # raises if it is no port
    except ValueError:
        raise ValueError("not such a URL") from None
    if not (
        has_port
        and dsn.isprintable()
        and not {"?", "#"} & set(dsn)
        and parts.netloc.count("@") <= 1
        and re.fullmatch(r"[\w.:-]+", parts.hostname or "")
        and re.fullmatch(r"(/[^/@]*)?", parts.path)
    ):
        raise ValueError("not such a URL")
    return value


def _directory(value: Path) -> Path:
    existing = next(path for path in (value, *value.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError("not a directory")
    return value


def _file(value: Path) -> Path:
    if value.is_dir():
        raise ValueError("a directory")
    return value


def _a_year_back() -> date:
    """The first of this month a year ago: it moves once a month, not with every reload."""
    today = datetime.now(UTC).date()
    return today.replace(year=today.year - 1, day=1)


def _iso_day(value: Any) -> Any:
    return datetime.strptime(value, "%Y-%m-%d").date() if isinstance(value, str) else value  # noqa: DTZ007


def _json_of_headers(value: SecretStr) -> SecretStr:
    headers = json.loads(value.get_secret_value())
    if not isinstance(headers, dict) or not all(
        isinstance(text, str) and text.isprintable()
        for text in cast("dict[str, Any]", headers).values()
    ):
        raise ValueError("not such an object")
    return value


def _parts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    named = [name.strip() for name in value.split(",")]
    if not set(named) <= set(PARTS):
        raise ValueError("no such part")
    return tuple(part for part in PARTS if part in named)


def _urls(value: SecretStr) -> SecretStr:
    """Whether each is one that Apprise knows, `alert-test` finds out: loading it takes a while."""
    urls = value.get_secret_value().split()
    if not urls or not all(re.match(r"[a-z][a-z0-9+.-]*://\S", url) for url in urls):
        raise ValueError("not such URLs")
    return value


def _not_in_the_future(value: date) -> date:
    if value > datetime.now(UTC).date():
        raise ValueError("in the future")
    return value


_PostgresUrl = Annotated[
    SecretStr, _with_scheme("postgresql", "postgres"), AfterValidator(_postgres_url)
]
_ClickHouseDsn = Annotated[
    SecretStr,
    _with_scheme("clickhouse", "clickhouses", "chdb"),
    AfterValidator(_clickhouse_dsn),
]


class Settings(BaseModel):
    """What the environment says. URLs are secrets: they never print."""

    model_config = ConfigDict(frozen=True)

    postgres_url: _PostgresUrl | None = Field(
        None, alias="EVERRUNS_POSTGRES_URL", description=_POSTGRES_URL
    )
    parts: Annotated[tuple[Part, ...], BeforeValidator(_parts)] = Field(
        PARTS, alias="EVERRUNS_PARTS", description="reporting, items, or both: reporting,items"
    )
    items_postgres_url: _PostgresUrl | None = Field(
        None, alias="EVERRUNS_ITEMS_POSTGRES_URL", description=_POSTGRES_URL
    )
    clickhouse_dsn: _ClickHouseDsn | None = Field(
        None, alias="EVERRUNS_CLICKHOUSE_DSN", description=_CLICKHOUSE_DSN
    )
    object_store_url: str | None = Field(
        None,
        alias="EVERRUNS_OBJECT_STORE_URL",
        pattern=r"^[a-z][a-z0-9+.-]*://.+",
        description="a URL prefix such as s3://bucket/prefix",
    )
    spans_table: str = Field(
        "otel_traces",
        alias="EVERRUNS_SPANS_TABLE",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?$",
        description=_SPANS_TABLE,
    )
    home: Annotated[Path, AfterValidator(_directory)] = Field(
        Path(".everruns"), alias="EVERRUNS_HOME", description="a directory that may be created"
    )
    reporting_start: Annotated[
        date, BeforeValidator(_iso_day), AfterValidator(_not_in_the_future)
    ] = Field(
        default_factory=_a_year_back,
        alias="EVERRUNS_REPORTING_START",
        description="a day not in the future, YYYY-MM-DD",
    )
    reporting_max_attempts: int = Field(
        12,
        alias="EVERRUNS_REPORTING_MAX_ATTEMPTS",
        ge=1,
        le=1000,
        description="a whole number from 1 to 1000",
    )
    dagster_postgres_url: _PostgresUrl | None = Field(
        None, alias="EVERRUNS_DAGSTER_POSTGRES_URL", description=_POSTGRES_URL
    )
    graphql_headers: Annotated[SecretStr, AfterValidator(_json_of_headers)] | None = Field(
        None,
        alias="EVERRUNS_GRAPHQL_HEADERS",
        description='a JSON object of strings, such as {"Authorization": "Bearer ..."}',
    )
    api_tokens: Annotated[Path, AfterValidator(_file)] | None = Field(
        None,
        alias="EVERRUNS_API_TOKENS",
        description="a file of lines that `everruns-pipelines token` printed",
    )
    allowed_hosts: str | None = Field(
        None,
        alias="EVERRUNS_ALLOWED_HOSTS",
        pattern=rf"^{_HOST}(\s*,\s*{_HOST})*$",
        description="host names without ports, separated by commas",
    )
    alert_urls: Annotated[SecretStr, AfterValidator(_urls)] | None = Field(
        None,
        alias="EVERRUNS_ALERT_URLS",
        description="Apprise URLs, separated by white space: json://host/path mailto://...",
    )
    public_url: str | None = Field(
        None,
        alias="EVERRUNS_PUBLIC_URL",
        pattern=rf"^https?://{_HOST}(:[0-9]{{1,5}})?(/[A-Za-z0-9._~/-]*)?$",
        description="where people see the UI, such as https://pipelines.example.com",
    )
    nightly_at: str = Field(
        "00:30",
        alias="EVERRUNS_NIGHTLY_AT",
        pattern=rf"^{_TIME}$",
        description="a UTC time of day, HH:MM",
    )
    weekly_at: str = Field(
        "Sun 02:00",
        alias="EVERRUNS_WEEKLY_AT",
        pattern=rf"^({'|'.join(WEEKDAYS)}) {_TIME}$",
        description="a weekday and a UTC time of day, such as Sun 02:00",
    )
    purge_at: str = Field(
        "04:00",
        alias="EVERRUNS_PURGE_AT",
        pattern=rf"^{_TIME}$",
        description="a UTC time of day, HH:MM",
    )
    linger_seconds: int = Field(
        600,
        alias="EVERRUNS_LINGER_SECONDS",
        ge=0,
        le=3600,
        description="a whole number of seconds from 0 to 3600",
    )
    heal_seconds: int = Field(
        300,
        alias="EVERRUNS_HEAL_SECONDS",
        ge=60,
        le=86400,
        description="a whole number of seconds from 60 to 86400",
    )
    outbox_keep_days: int = Field(
        14,
        alias="EVERRUNS_OUTBOX_KEEP_DAYS",
        ge=1,
        le=3650,
        description="a whole number of days from 1 to 3650",
    )
    max_partitions_per_run: int | None = Field(
        None,
        alias="EVERRUNS_MAX_PARTITIONS_PER_RUN",
        ge=1,
        le=3650,
        description="a whole number of days from 1 to 3650",
    )
    runs_keep_days: int = Field(
        30,
        alias="EVERRUNS_RUNS_KEEP_DAYS",
        ge=1,
        le=3650,
        description="a whole number of days from 1 to 3650",
    )

    def headers(self) -> dict[str, str]:
        """What to send to a deployment beside the request itself."""
        return (
            {}
            if self.graphql_headers is None
            else json.loads(self.graphql_headers.get_secret_value())
        )

    # No variables: `component` sets them in a project of others. What keys of assets begin with;
    # whether Dagster's run records are others', and not ours to remove.
    asset_prefix: tuple[str, ...] = ()
    is_guest: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the variables. An empty one counts as unset.

        Raises:
            SettingsError: a variable is set but wrong; names it and what is expected, and never
                repeats its value, which may hold a password.
        """
        names = [field.alias for field in cls.model_fields.values() if field.alias]
        return cls.of_variables(
            {name: environment[name] for name in names if environment.get(name)}
        )

    @classmethod
    def of_variables(cls, given: Mapping[str, Any]) -> Self:
        """The same of values by their variables' names.

        Raises:
            SettingsError: as above.
        """
        fields = {field.alias: field for field in cls.model_fields.values() if field.alias}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            name = str(error.errors(include_input=False)[0]["loc"][0])
            raise SettingsError(f"{name}: expected {fields[name].description}") from None
