"""The environment: a wrong value is one line that names the variable and never tells the value."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from everruns_pipelines.errors import SettingsError
from everruns_pipelines.settings import Settings

TOMORROW = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
POSTGRES = "postgresql://user:password@host:port/database"
WRONG = {
    ("EVERRUNS_POSTGRES_URL", POSTGRES): (
        "secret",
        "mysql://user:secret@host/db",
        "postgresql://",
        "host=localhost password=secret",
        "postgresql://user:sec%zzret@host/db",
        "postgresql://user:sec/ret@host/db",
        "postgresql://user:sec@ret@host/db",
        "postgresql://user:123/ret@host/db",
        "postgresql://user:123,sec/ret@host/db",
        "postgresql://host:secret/db",
        "postgresql://host:5432,host:secret/db",
        "postgresql://host/db?secret",
        "postgresql://host/db?secret=1",
        "postgresql://host/db?connect_timeout=secret",
    ),
    ("EVERRUNS_ITEMS_POSTGRES_URL", POSTGRES): ("secret", "postgresql://u:sec%zzret@host/db"),
    ("EVERRUNS_PARTS", "reporting, items, or both: reporting,items"): (
        "secret",
        ",",
        "reporting,",
        "items secret",
        "Items",
    ),
    ("EVERRUNS_DAGSTER_POSTGRES_URL", POSTGRES): ("secret", "postgresql://u:sec%zzret@host/db"),
    (
        "EVERRUNS_CLICKHOUSE_DSN",
        "clickhouse[s]://user:password@host:port/database, or chdb:///path",
    ): (
        "secret",
        "http://user:secret@host",
        "clickhouse://",
        "clickhouse://user:secret@",
        "clickhouse://user:secret@:8123/db",
        "clickhouse://user:sec@ret@host/db",
        "clickhouse://user:sec/ret@host/db",
        "clickhouse://user:12/secret@host/db",
        "clickhouse://user:sec#ret@host/db",
        "clickhouse://user:12#secret@host/db",
        "clickhouse://user:sec?ret@host/db",
        "clickhouse://user:sec[ret@host/db",
        "clickhouses://user:secret@host:port/db",
        "clickhouses://user:secret@host:0/db",
        "clickhouses://user:secret@host:99999/db",
        "clickhouse://user:secret@ho st/db",
        "clickhouse://user:secret@host/db\n",
        "clickhouse://user:secret@host/db/more",
        "clickhouse://host/db?password=secret",
        "clickhouse://host/db#secret",
    ),
    ("EVERRUNS_OBJECT_STORE_URL", "a URL prefix such as s3://bucket/prefix"): (
        "secret",
        "/secret/path",
        "s3://",
    ),
    (
        "EVERRUNS_SPANS_TABLE",
        "a table name, optionally with its database: otel_traces or otel.otel_traces",
    ): ("secret; DROP TABLE x", "a.b.secret", "1secret", "secret-table", "secret\n"),
    ("EVERRUNS_HOME", "a directory that may be created"): (__file__, f"{__file__}/below"),
    ("EVERRUNS_REPORTING_START", "a day not in the future, YYYY-MM-DD"): (
        "secret",
        "2026-02-30",
        "20260101",
        "2026-W01-1",
        "2026-01-01T00:00:00",
        TOMORROW,
    ),
    ("EVERRUNS_REPORTING_MAX_ATTEMPTS", "a whole number from 1 to 1000"): (
        "secret",
        "0",
        "-1",
        "1001",
        "1.5",
    ),
    ("EVERRUNS_API_TOKENS", "a file of lines that `everruns-pipelines token` printed"): ("/",),
    ("EVERRUNS_ALLOWED_HOSTS", "host names without ports, separated by commas"): (
        "secret host",
        "https://secret",
        "secret:3000",
        "secret,",
        "*",
    ),
    ("EVERRUNS_PUBLIC_URL", "where people see the UI, such as https://pipelines.example.com"): (
        "secret",
        "ftp://secret",
        "https://user:secret@host",
        "https://host/?token=secret",
        "https://",
    ),
    ("EVERRUNS_NIGHTLY_AT", "a UTC time of day, HH:MM"): ("secret", "24:00", "3:00", "03:60"),
    ("EVERRUNS_PURGE_AT", "a UTC time of day, HH:MM"): ("secret", "24:00", "03"),
    ("EVERRUNS_WEEKLY_AT", "a weekday and a UTC time of day, such as Sun 02:00"): (
        "secret",
        "02:00",
        "Sunday 02:00",
        "sun 02:00",
    ),
    ("EVERRUNS_OUTBOX_KEEP_DAYS", "a whole number of days from 1 to 3650"): ("secret", "0", "3651"),
    ("EVERRUNS_RUNS_KEEP_DAYS", "a whole number of days from 1 to 3650"): ("secret", "0", "3651"),
    ("EVERRUNS_LINGER_SECONDS", "a whole number of seconds from 0 to 3600"): (
        "secret",
        "-1",
        "3601",
    ),
    ("EVERRUNS_HEAL_SECONDS", "a whole number of seconds from 60 to 86400"): (
        "secret",
        "59",
        "86401",
    ),
    (
        "EVERRUNS_ALERT_URLS",
        "Apprise URLs, separated by white space: json://host/path mailto://...",
    ): ("secret", "json://host secret"),
    ("EVERRUNS_MAX_PARTITIONS_PER_RUN", "a whole number of days from 1 to 3650"): (
        "secret",
        "0",
        "3651",
    ),
}


@pytest.mark.parametrize(
    ("name", "expected", "value"),
    [(name, expected, value) for (name, expected), values in WRONG.items() for value in values],
)
def test_a_wrong_value_is_one_line_that_names_it_and_what_is_expected(
    name: str, expected: str, value: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment({name: value})

    # Nothing of the value: neither in the message nor in an error that comes with it.
    assert str(refused.value) == f"{name}: expected {expected}"
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_every_variable_of_the_interface_has_a_wrong_value_above() -> None:
    of_other_tests = {"EVERRUNS_GRAPHQL_HEADERS"}
    fields = Settings.model_fields.values()
    aliases = {field.alias for field in fields if field.alias is not None}
    assert {name for name, _ in WRONG} == aliases - of_other_tests


def test_nothing_configured_means_embedded_databases_under_the_working_directory() -> None:
    settings = Settings.from_environment({})

    assert settings.postgres_url is None
    assert settings.clickhouse_dsn is None
    assert settings.object_store_url is None
    assert settings.dagster_postgres_url is None
    assert settings.spans_table == "otel_traces"
    assert settings.home == Path(".everruns")
    assert settings.reporting_max_attempts == 12


def test_the_first_partition_is_a_year_back_fixed_to_the_first_of_a_month() -> None:
    today = datetime.now(UTC).date()

    start = Settings.from_environment({}).reporting_start

    assert start.day == 1
    assert timedelta(days=364) <= today - start <= timedelta(days=397)


def test_what_is_set_is_what_counts() -> None:
    settings = Settings.from_environment(
        {
            "EVERRUNS_POSTGRES_URL": "postgres://u:p%40ss@host:5433/db?sslmode=require",
            "EVERRUNS_CLICKHOUSE_DSN": "chdb:///data",
            "EVERRUNS_REPORTING_START": "2024-02-29",
            "EVERRUNS_REPORTING_MAX_ATTEMPTS": "3",
            "EVERRUNS_SPANS_TABLE": "otel.spans",
        }
    )

    assert settings.postgres_url is not None
    assert settings.postgres_url.get_secret_value().startswith("postgres://u:p%40ss@host:5433/db")
    assert settings.reporting_start == date(2024, 2, 29)
    assert (settings.reporting_max_attempts, settings.spans_table) == (3, "otel.spans")


@pytest.mark.parametrize("variable", ["EVERRUNS_POSTGRES_URL", "EVERRUNS_DAGSTER_POSTGRES_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:password@h1:5432,h2:5433/db?target_session_attrs=read-write",
        "postgresql://user:password@h1,h2/db",
        "postgresql://user@h1:5432,h2/db",
        "postgresql:///db?host=/run/postgresql&port=5432",
    ],
)
def test_a_server_may_have_several_hosts_and_be_named_in_any_way_libpq_knows(
    variable: str, url: str
) -> None:
    settings = Settings.from_environment({variable: url})
    assert url in (
        named.get_secret_value()
        for named in (settings.postgres_url, settings.dagster_postgres_url)
        if named is not None
    )


@pytest.mark.parametrize(
    "dsn",
    [
        "clickhouse://host",
        "clickhouse://host/",
        "clickhouses://u:p%40s%2Fs%23%3F@host.example.org:9440/my-db",
        "clickhouse://u:p:q@[::1]:8123/db",
        "clickhouse://under_score/db",
        "chdb:///data/x",
    ],
)
def test_every_form_of_the_clickhouse_dsn_is_taken_as_it_is(dsn: str) -> None:
    settings = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": dsn})

    assert settings.clickhouse_dsn is not None
    assert settings.clickhouse_dsn.get_secret_value() == dsn


def test_an_empty_variable_counts_as_unset() -> None:
    assert Settings.from_environment({"EVERRUNS_POSTGRES_URL": ""}).postgres_url is None


def test_settings_never_print_a_password() -> None:
    settings = Settings.from_environment(
        {
            "EVERRUNS_POSTGRES_URL": "postgresql://u:hunter2@host/db",
            "EVERRUNS_CLICKHOUSE_DSN": "clickhouse://u:hunter2@host/db",
            "EVERRUNS_DAGSTER_POSTGRES_URL": "postgresql://u:hunter2@host/db",
        }
    )

    assert "hunter2" not in f"{settings!r} {settings}"
    assert "hunter2" not in settings.model_dump_json()
