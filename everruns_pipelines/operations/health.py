"""The asset `pipeline_health`: how the derived data fares, as numbers that Dagster plots, a table,
and a chart over time. Its schedule measures every hour.

See https://docs.dagster.io/guides/build/assets/metadata-and-tags.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase, PostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.operations.chart import Line, as_markdown
from everruns_pipelines.orchestration.asset_keys import HEALTH, asset_key
from everruns_pipelines.orchestration.checks import check_name, check_op, check_specs, severity
from everruns_pipelines.orchestration.damage import DAMAGED
from everruns_pipelines.orchestration.failures import told_plainly
from everruns_pipelines.orchestration.timetable import hourly_schedule
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.settings import Part, Settings

if TYPE_CHECKING:
    from everruns_pipelines.operations.diagnosis import Diagnosis
    from everruns_pipelines.operations.sources import Seen

_DAYS = 7
_HISTORY = 200
_ITEMS = "items"
_FACTS = tuple(fact.table for fact in FACTS)
_TABLES: Mapping[Part, Sequence[str]] = {"reporting": _FACTS, "items": (_ITEMS,)}
_WRONG = ("missing", "stale", "orphaned")
_OF_ITEMS = ("missing", "stale")
_LINES = (
    ("lag_seconds", "Lag in seconds", "#3455db"),
    ("backlog", "Backlog in rows", "#b25d12"),
    ("facts_missing", "Missing facts", "#ad1f1f"),
    ("items_missing", "Missing items", "#7a3db8"),
)
_DAYS_SCHEMA = dg.TableSchema(
    [
        dg.TableColumn("table", "string", "Derived table."),
        dg.TableColumn("day", "date", "UTC day."),
        dg.TableColumn("expected", "integer", "Rows that the sources make."),
        dg.TableColumn("missing", "integer", "Of those, rows that are not there."),
        dg.TableColumn("stale", "integer", "Rows with other values than their source makes."),
        dg.TableColumn("orphaned", "integer", "Rows whose source is gone."),
        dg.TableColumn("rejected", "integer", "Envelopes that cannot be stored; items only."),
    ]
)


_PROMISES = {
    "missing": f"No row of the last {_DAYS} days is missing, and no fact of any age.",
    "stale": f"No row of the last {_DAYS} days is stale, and no fact of any age "
    "whose source has changed.",
    "orphaned": f"Every row of the last {_DAYS} days has a source, or one in the archive.",
}
_OF_REPORTING = {
    DAMAGED: "No fact that was there, or that should be for long, is missing, or stale by what a "
    "backfill compares: looked at all history every few minutes, and healed by the run that the "
    "check names.",
    "parked": "No row of the outbox has failed so often that it is not tried any more.",
    "late": "No fact has a source that waits in the outbox for over 15 minutes.",
}


def pipeline_health(settings: Settings) -> dg.AssetsDefinition:
    """The asset, for the parts that are on."""

    @dg.asset(
        key=asset_key(settings, HEALTH),
        group_name="operations",
        description="The state of the derived data: the backlog and lag of the outbox; what is "
        f"missing, stale or orphaned in each of the last {_DAYS} days; and how much is missing or "
        "stale at any age. `everruns-pipelines diagnose` tells the same in a terminal.",
        kinds={"postgres"},
        owners=["team:everruns"],
        deps=[asset_key(settings, table) for part in settings.parts for table in _TABLES[part]],
        pool="postgres",
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=timedelta(hours=6), warn_window=timedelta(hours=2)
        ),
        code_version="2",
    )
    def pipeline_health(
        context: dg.AssetExecutionContext,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
        everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
        everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
    ) -> None:
        from everruns_pipelines.operations.diagnosis import Databases, diagnose
        from everruns_pipelines.operations.sources import look_at_sources

        databases = Databases(
            everruns_postgres, everruns_items_postgres, everruns_clickhouse, settings.parts
        )
        with told_plainly(Refusal.as_problem_details):
            diagnosis = diagnose(databases, _DAYS, context.log.info)
            for seen in look_at_sources(databases):
                context.log_event(_observation(asset_key(settings, seen.table), seen))
        numbers = _numbers(diagnosis)
        times, lines = _history(context, diagnosis, numbers)
        context.add_asset_metadata(
            {
                "over time": dg.MetadataValue.md(as_markdown(times, lines)),
                **numbers,
                "days": _days_table(diagnosis),
                "summary": dg.MetadataValue.json(diagnosis.summary()),
                "failures": dg.MetadataValue.json(diagnosis.as_json()["failures"]),
                "unknown": dg.MetadataValue.json(list(diagnosis.unknown)),
            }
        )

    return pipeline_health


def health_checks(settings: Settings) -> dg.AssetChecksDefinition:
    """What makes `pipeline_health` red. A run that measures is judged by what it measured; one of
    the checks alone measures by itself.
    """
    promises = {**_PROMISES, **(_OF_REPORTING if "reporting" in settings.parts else {})}

    @dg.multi_asset_check(
        name=check_op(HEALTH),
        specs=check_specs(asset_key(settings, HEALTH), promises),
        can_subset=True,
        pool="postgres",
    )
    def check(
        context: dg.AssetCheckExecutionContext,
        everruns_postgres: dg.ResourceParam[PostgresDatabase],
        everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
        everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
    ) -> Iterator[dg.AssetCheckResult]:
        from everruns_pipelines.operations.diagnosis import NO_SPANS, Databases, diagnose

        summary = _measured_in(context)
        if summary is None:
            databases = Databases(
                everruns_postgres, everruns_items_postgres, everruns_clickhouse, settings.parts
            )
            with told_plainly(Refusal.as_problem_details):
                summary = diagnose(databases, _DAYS, context.log.info).summary()
        unknown = [reason for reason in summary["unknown"] if reason != NO_SPANS]
        for key in context.selected_asset_check_keys:
            [what] = (what for what in promises if key.name == check_name(what))
            rows = summary[what]
            not_known = unknown if what in _OF_ITEMS else []
            told = {
                "since": summary["oldest_missing"]
                if what in ("missing", "stale", DAMAGED)
                else None,
                "to_repair": "; ".join(summary["remedies"]),
            }
            yield dg.AssetCheckResult(
                check_name=key.name,
                passed=not rows and not not_known,
                severity=severity(what),
                description=" ".join(
                    [
                        *([f"{rows:,} {what}."] if rows else []),
                        *(f"Not known of all: {reason}." for reason in not_known),
                    ]
                )
                or f"None is {what}.",
                metadata={
                    f"{what}_rows": rows,
                    **({name: text for name, text in told.items() if text} if rows else {}),
                },
            )

    return check


measure_health = dg.define_asset_job(  # pyright: ignore[reportUnknownMemberType]
    "measure_health",
    selection=dg.AssetSelection.groups("operations"),  # pyright: ignore[reportUnknownMemberType]
    description="Materialize pipeline_health, and judge it by its checks.",
    executor_def=dg.in_process_executor,
)

health_schedule = hourly_schedule(
    "hourly_health", measure_health, 15, "Measures pipeline_health every hour, and judges it."
)


def _measured_in(context: dg.AssetCheckExecutionContext) -> dict[str, Any] | None:
    """What the run of these checks has measured, if it materialized the asset, too."""
    [key] = {check.asset_key for check in context.selected_asset_check_keys}
    instance = context.op_execution_context.instance
    [record] = instance.fetch_materializations(key, limit=1).records or [None]
    if record is None or record.run_id != context.run.run_id:
        return None
    event = record.asset_materialization
    summary = event.metadata.get("summary") if event else None
    found: Any = summary.value if isinstance(summary, dg.JsonMetadataValue) else None
    return found


def _observation(key: dg.AssetKey, seen: "Seen") -> dg.AssetObservation:
    return dg.AssetObservation(
        key,
        metadata={
            "dagster/row_count": seen.rows,
            "rows_are_estimated": seen.rows_are_estimated,
            "newest_row": "none"
            if seen.newest is None
            else dg.MetadataValue.timestamp(seen.newest),
            "looked_at": dg.MetadataValue.timestamp(seen.at),
        },
        description="How many rows it holds, and when the newest was written.",
    )


def _numbers(diagnosis: "Diagnosis") -> dict[str, int | float]:
    numbers: dict[str, int | float] = {}
    if "reporting" in diagnosis.parts:
        numbers |= {
            "backlog": diagnosis.rows("pending") + diagnosis.rows("processing"),
            "failed": diagnosis.rows("failed"),
            "parked": diagnosis.rows("parked"),
            "lag_seconds": max(diagnosis.lag_seconds.values()),
            **{f"lag_seconds/{fact}": lag for fact, lag in diagnosis.lag_seconds.items()},
            **{f"facts_{what}": diagnosis.total(what, *_FACTS) for what in _WRONG},
        }
    if "items" in diagnosis.parts and diagnosis.is_complete:
        numbers |= {f"items_{what}": diagnosis.total(what, _ITEMS) for what in _OF_ITEMS}
    return numbers


def _history(
    context: dg.AssetExecutionContext, diagnosis: "Diagnosis", numbers: Mapping[str, float]
) -> tuple[list[datetime], list[Line]]:
    """What was measured before, the oldest first, and now."""
    records = context.instance.fetch_materializations(context.asset_key, limit=_HISTORY).records
    times = [datetime.fromtimestamp(record.timestamp, UTC) for record in reversed(records)]
    measured = [
        record.asset_materialization.metadata
        for record in reversed(records)
        if record.asset_materialization is not None
    ]
    return [*times, diagnosis.at], [
        Line(title, color, [*(_number(one, name) for one in measured), numbers[name]])
        for name, title, color in _LINES
        if name in numbers
    ]


def _number(metadata: Mapping[str, dg.MetadataValue], name: str) -> float:
    value = metadata[name].value if name in metadata else None
    return float(value) if isinstance(value, int | float) else 0.0


def _days_table(diagnosis: "Diagnosis") -> dg.TableMetadataValue:
    days: Sequence[dict[str, str | int]] = [
        {
            "table": day.table,
            "day": day.day.isoformat(),
            "expected": day.expected,
            "missing": day.missing,
            "stale": day.stale,
            "orphaned": day.orphaned,
            "rejected": day.rejected or 0,
        }
        for day in diagnosis.days
    ]
    return dg.MetadataValue.table([dg.TableRecord(day) for day in days], schema=_DAYS_SCHEMA)
