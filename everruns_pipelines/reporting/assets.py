"""The fact assets, one partition per UTC day, and their checks: both made from the catalog.

See https://docs.dagster.io/guides/build/assets and
https://docs.dagster.io/guides/test/asset-checks.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from time import monotonic
from typing import TYPE_CHECKING
from uuid import UUID

import dagster as dg
from pydantic import Field

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.orchestration.asset_keys import asset_key
from everruns_pipelines.orchestration.failures import RETRIES, told_plainly
from everruns_pipelines.orchestration.partitions import day_partitions
from everruns_pipelines.orchestration.timetable import FAILED_AFTER, STALE_AFTER
from everruns_pipelines.reporting.catalog import FACTS, SOURCES, Column, Fact
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.reporting.reconcile import DayReport, DayState

OWNERS = ["team:everruns"]
_CHECKS = {
    "no_missing_rows": "Every row that the day's sources make is there.",
    "no_stale_rows": "Every row has the values that its source makes, and a source that makes it.",
    "no_orphaned_rows": "Every row has a source, or one in the archive.",
}
_DAYS_SCHEMA = dg.TableSchema([dg.TableColumn("day", "date"), dg.TableColumn("rows", "integer")])


class FactConfig(dg.Config):
    """What to do about facts whose source is gone."""

    remove_orphans: bool = Field(
        False, description="Remove facts whose source is gone. They are only counted otherwise."
    )
    session_id: str | None = Field(
        None, description="Remove the orphans of this session only; null for those of all."
    )


def source_assets(settings: Settings) -> list[dg.AssetSpec]:
    """The platform's tables that facts are made from: shown in the lineage, never written."""
    return [
        dg.AssetSpec(
            asset_key(settings, source.table),
            group_name="platform",
            description=f"The platform's table {source.table}: read, never written.",
            kinds={"postgres"},
            owners=OWNERS,
            metadata={"dagster/column_schema": _schema(SOURCE_COLUMNS[source.table])},
        )
        for source in SOURCES
    ]


def fact_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """One asset per fact of the catalog."""
    return [_asset(fact, settings) for fact in FACTS]


def fact_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """For each fact: is a row missing, stale or orphaned?"""
    return [_checks(fact, settings) for fact in FACTS]


def _asset(fact: Fact, settings: Settings) -> dg.AssetsDefinition:
    partitions = day_partitions(settings)

    @dg.asset(
        key=asset_key(settings, fact.table),
        group_name="reporting",
        description=fact.description,
        kinds={"postgres", "sql"},
        owners=OWNERS,
        deps=[asset_key(settings, source.table) for source in fact.sources],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        code_version=fact.version,
        pool="postgres",
        retry_policy=RETRIES,
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=FAILED_AFTER, warn_window=STALE_AFTER
        ),
        metadata={
            "dagster/column_schema": _schema(fact.columns),
            "dagster/relation_identifier": fact.table,
        },
    )
    def materialize(
        context: dg.AssetExecutionContext,
        config: FactConfig,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
    ) -> None:
        from everruns_pipelines.reporting.database import prepare
        from everruns_pipelines.reporting.reconcile import materialize_day, stage_days

        with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
            days = _days(context, partitions)
            session_id = _session_id(config)
            prepare(connection)
            context.log.info(f"Finding the sources of {len(days)} days")
            stage_days(connection, fact, days[0], days[-1])
            for number, day in enumerate(days, start=1):
                started = monotonic()
                report = materialize_day(
                    connection,
                    fact,
                    day,
                    remove_orphans=config.remove_orphans,
                    session_id=session_id,
                )
                context.add_asset_metadata(
                    _metadata(report, monotonic() - started), partition_key=day.isoformat()
                )
                context.log.info(f"{day}: {_summary(report)}; {len(days) - number} days remain")

    return materialize


def _schema(columns: Sequence[Column]) -> dg.TableSchema:
    return dg.TableSchema(
        [dg.TableColumn(column.name, column.type, column.description) for column in columns]
    )


def _days(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext,
    partitions: dg.DailyPartitionsDefinition,
) -> list[date]:
    """The days of the run. Dagster checks a single one, but not the ends of a range."""
    asked = context.partition_key_range
    for key in (asked.start, asked.end):
        if not partitions.has_partition_key(key):
            first, last = partitions.get_first_partition_key(), partitions.get_last_partition_key()
            raise Refusal(f"partition: expected a day from {first} to {last}, got {key[:40]}")
    return [date.fromisoformat(key) for key in partitions.get_partition_keys_in_range(asked)]


def _session_id(config: FactConfig) -> str | None:
    """The session in the one form that PostgreSQL reads, too: Python takes more than it does."""
    if config.session_id is None:
        return None
    try:
        return str(UUID(config.session_id))
    except ValueError:
        expected = "expected a UUID, or null for all sessions"
        raise Refusal(
            f"session_id: {expected}", errors=(FieldError(("session_id",), expected),)
        ) from None


def _summary(report: "DayReport") -> str:
    from everruns_pipelines.reporting.projector import COUNTS

    return ", ".join(f"{report.counts[name]} {name}" for name in (*COUNTS, "orphaned"))


def _metadata(report: "DayReport", seconds: float) -> dict[str, int | float | dg.MetadataValue]:
    from everruns_pipelines.reporting.projector import COUNTS

    counts = {name: report.counts[name] for name in (*COUNTS, "orphaned")}
    metadata: dict[str, int | float | dg.MetadataValue] = dict(counts)
    metadata["dagster/partition_row_count"] = (
        counts["inserted"] + counts["refreshed"] + counts["unchanged"]
    )
    metadata["rows_per_second"] = round(counts["read"] / seconds, 1) if seconds else 0.0
    metadata["unstorable"] = len(report.failures)
    if report.failures:
        metadata["unstorable_sources"] = dg.MetadataValue.table(
            [
                dg.TableRecord(
                    {"org_id": failed.org_id, "source": failed.source_id, "reason": failed.reason}
                )
                for failed in report.failures[:20]
            ]
        )
    return metadata


def _checks(fact: Fact, settings: Settings) -> dg.AssetChecksDefinition:
    partitions = day_partitions(settings)

    @dg.multi_asset_check(
        name=f"{fact.table}_checks",
        specs=[
            dg.AssetCheckSpec(
                name,
                asset=asset_key(settings, fact.table),
                description=description,
                partitions_def=partitions,
            )
            for name, description in _CHECKS.items()
        ],
        can_subset=True,
        pool="postgres",
    )
    def check(
        context: dg.AssetCheckExecutionContext,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
    ) -> Iterator[dg.AssetCheckResult]:
        from everruns_pipelines.reporting.database import prepare
        from everruns_pipelines.reporting.reconcile import compare_day, stage_days

        with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
            days = _days(context, partitions)
            prepare(connection)
            stage_days(connection, fact, days[0], days[-1])
            states = {day: compare_day(connection, fact, day) for day in days}
        for key in context.selected_asset_check_keys:
            yield _judge(key.name, states)

    return check


def _judge(name: str, states: "Mapping[date, DayState]") -> dg.AssetCheckResult:
    wrong = {day: _wrong_rows(name, state) for day, state in states.items()}
    found = {day: rows for day, rows in wrong.items() if rows}
    return dg.AssetCheckResult(
        check_name=name,
        passed=not found,
        # An orphan may be wanted: whoever deleted the session decides.
        severity=(
            dg.AssetCheckSeverity.WARN
            if name == "no_orphaned_rows"
            else dg.AssetCheckSeverity.ERROR
        ),
        description=(
            f"{sum(found.values())} rows in {len(found)} of {len(states)} days: "
            "materialize these days to repair them"
            if found
            else None
        ),
        metadata={
            "rows": sum(found.values()),
            "expected_rows": sum(state.expected for state in states.values()),
            "days": dg.MetadataValue.table(
                [
                    dg.TableRecord({"day": day.isoformat(), "rows": rows})
                    for day, rows in sorted(found.items())[:100]
                ],
                schema=_DAYS_SCHEMA,
            ),
        },
    )


def _wrong_rows(name: str, state: "DayState") -> int:
    match name:
        case "no_missing_rows":
            return state.missing
        case "no_stale_rows":
            return state.stale + state.superseded
        case _:
            return state.orphaned
