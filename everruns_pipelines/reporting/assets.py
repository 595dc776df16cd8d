"""The fact assets, one partition per UTC day, and their checks: both made from the catalog.

See https://docs.dagster.io/guides/build/assets and
https://docs.dagster.io/guides/test/asset-checks.
"""

from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.asset_keys import asset_key
from everruns_pipelines.orchestration.checks import (
    CheckConfig,
    check_op,
    check_results,
    check_specs,
    days_to_check,
)
from everruns_pipelines.orchestration.failures import told_plainly
from everruns_pipelines.orchestration.partitions import (
    backfill_policy,
    day_partitions,
    days_to_materialize,
)
from everruns_pipelines.orchestration.timetable import FAILED_AFTER, STALE_AFTER
from everruns_pipelines.reporting.catalog import FACTS, Column, Fact
from everruns_pipelines.reporting.lineage import columns_of, tables_of
from everruns_pipelines.reporting.source_columns import SOURCE_COLUMNS
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.reporting.reconcile import DayReport, DayState

OWNERS = ["team:everruns"]
_PROMISES = {
    "missing": "Every row that the days' sources make is there.",
    "stale": "Every row has the values that its source makes, and a source that makes it.",
    "orphaned": "Every row has a source, or one in the archive.",
}


class FactConfig(dg.Config):
    """What to do about facts whose source is gone."""

    remove_orphans: bool = Field(
        False, description="Remove facts whose source is gone. They are only counted otherwise."
    )
    session_id: str | None = Field(
        None, description="Remove the orphans of this session only; null for those of all."
    )


def source_assets(settings: Settings) -> list[dg.AssetSpec]:
    """The platform's tables that facts are made of: shown in the lineage, never written."""
    made_of = {table for fact in FACTS for table in tables_of(fact)}
    return [
        dg.AssetSpec(
            asset_key(settings, table),
            group_name="platform",
            description=f"The platform's table {table}: read, never written.",
            kinds={"postgres"},
            owners=OWNERS,
            metadata={
                "dagster/column_schema": _schema(columns),
                "dagster/table_name": f"public.{table}",
            },
            tags={"domain": "reporting"},
        )
        for table, columns in SOURCE_COLUMNS.items()
        if table in made_of
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
        deps=[asset_key(settings, table) for table in tables_of(fact)],
        partitions_def=partitions,
        backfill_policy=backfill_policy(settings),
        code_version=fact.version,
        pool="postgres",
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=FAILED_AFTER, warn_window=STALE_AFTER
        ),
        metadata={
            "dagster/column_schema": _schema(fact.columns),
            "dagster/column_lineage": _lineage(fact, settings),
            "dagster/table_name": f"public.{fact.table}",
        },
        tags={"domain": "reporting"},
    )
    def materialize(
        context: dg.AssetExecutionContext,
        config: FactConfig,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
    ) -> None:
        from everruns_pipelines.reporting.database import prepare
        from everruns_pipelines.reporting.erasure import check_session_id
        from everruns_pipelines.reporting.reconcile import materialize_days

        with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
            days = days_to_materialize(context.run, partitions)
            given = config.session_id
            session_id = None if given is None else check_session_id(given)
            prepare(connection)
            context.log.info(f"Comparing {len(days)} days with their sources")
            started = monotonic()
            reports = materialize_days(
                connection,
                fact,
                days[0],
                days[-1],
                remove_orphans=config.remove_orphans,
                session_id=session_id,
                on_step=partial(_tell_what_remains, context),
            )
            for number, (day, report) in enumerate(reports, start=1):
                context.add_asset_metadata(
                    _metadata(report, monotonic() - started), partition_key=day.isoformat()
                )
                context.log.info(f"{day}: {_summary(report)}; {len(days) - number} days remain")
                started = monotonic()

    return materialize


def _tell_what_remains(context: dg.AssetExecutionContext, done: int, total: int) -> None:
    if done < total:
        context.log.info(f"{done:,} of {total:,} sources of the day are compared")


def _schema(columns: Sequence[Column]) -> dg.TableSchema:
    return dg.TableSchema(
        [dg.TableColumn(column.name, column.type, column.description) for column in columns]
    )


def _lineage(fact: Fact, settings: Settings) -> dg.TableColumnLineage:
    return dg.TableColumnLineage(
        {
            name: [dg.TableColumnDep(asset_key(settings, table), column) for table, column in of]
            for name, of in columns_of(fact).items()
        }
    )


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
    metadata["materialized"] = dg.MetadataValue.text("the whole day")
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
    @dg.multi_asset_check(
        name=check_op(fact.table),
        specs=check_specs(asset_key(settings, fact.table), _PROMISES),
        can_subset=True,
        pool="postgres",
    )
    def check(
        context: dg.AssetCheckExecutionContext,
        config: CheckConfig,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
    ) -> Iterator[dg.AssetCheckResult]:
        from everruns_pipelines.reporting.database import prepare
        from everruns_pipelines.reporting.reconcile import GRACE, compare_days, stretches

        with told_plainly(Refusal.as_problem_details), everruns_postgres.connect() as connection:
            prepare(connection)
            days = days_to_check(context, settings, config, partial(_missing, connection, fact))
            states: dict[date, DayState] = {}
            for first, last in stretches(days):
                context.log.info(f"Comparing {fact.table} with its sources, {first} to {last}")
                states |= compare_days(connection, fact, first, last, GRACE)
        yield from check_results(
            context,
            days,
            sum(state.expected for state in states.values()),
            {
                "missing": {day: state.missing for day, state in states.items()},
                "stale": {day: state.stale + state.superseded for day, state in states.items()},
                "orphaned": {day: state.orphaned for day, state in states.items()},
            },
            underway=sum(state.underway for state in states.values()),
        )

    return check


def _missing(connection: Connection, fact: Fact) -> Iterator[date]:
    """Days of any age on which sources of the fact lack one of theirs."""
    from everruns_pipelines.reporting.backfill import look

    found = look(connection, sources=fact.sources)
    return (day for source in fact.sources for day in found[source.type].days)
