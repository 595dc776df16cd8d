"""The asset `items`, a day of spans per partition, and the checks that ask whether a day is right.

What belongs here is Dagster's view of a rebuild; the rebuild itself knows nothing of Dagster.
See https://docs.dagster.io/guides/build/assets.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

import dagster as dg

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.databases.postgres import ItemsPostgresDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.asset_keys import asset_key
from everruns_pipelines.orchestration.checks import (
    CheckConfig,
    check_op,
    check_results,
    check_specs,
    days_to_check,
)
from everruns_pipelines.orchestration.failures import told_plainly, try_again
from everruns_pipelines.orchestration.partitions import (
    backfill_policy,
    day_partitions,
    days_to_materialize,
)
from everruns_pipelines.orchestration.timetable import FAILED_AFTER, STALE_AFTER
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.items.accounting import Rebuilt

SPANS = "otel_traces"

_DESCRIPTION = """\
Items (findings, assets, a capability's own records) as agents reported them into spans, rebuilt
into the platform's table `items`. A partition is the UTC day on which the carrying span started,
for all known projects. Derived columns go back to what the span says; dispositions, ids and
creation times stay. What cannot be stored is told in `everruns_pipelines.item_rejections`.
"""

_COLUMNS = (
    ("id", "uuid", "The item's identity in the platform; kept by every rebuild."),
    ("organization_id", "uuid", "The organization of the item's project."),
    ("project_id", "uuid", "The project that the item was reported in."),
    ("item_type", "text", "What it is: finding, asset, or a capability's own type."),
    ("title", "text", "A line for people, as reported."),
    ("ref", "text", "The agent's own name for it, unique in the project; null if it gave none."),
    ("data", "jsonb", "The payload as reported."),
    ("disposition", "jsonb", "What people and agents decided since; never overwritten."),
    ("source", "text", "How the row came to be: api, runtime, or extracted by a rebuild."),
    ("session_id", "uuid", "The session that reported it; null if none, or if it is no UUID."),
    ("trace_id", "text", "The trace it was reported in."),
    ("span_id", "text", "The span it was reported in."),
    ("capability", "text", "The capability that reported it."),
    ("capability_version", "text", "That capability's version."),
    ("schema_ref", "text", "Name and version of the payload's schema."),
    ("dedupe_key", "text", "Made once per report: the identity that span and POST share."),
    ("created_by", "uuid", "Who created it through the API, if anybody did."),
    ("created_at", "timestamptz", "When it was reported: for extracted ones, the span's end."),
    ("updated_at", "timestamptz", "When the row last changed."),
)

_SCHEMA = dg.TableSchema(
    columns=[
        dg.TableColumn(name=name, type=kind, description=description)
        for name, kind, description in _COLUMNS
    ]
)

_SPAN_SCHEMA = dg.TableSchema(
    [
        dg.TableColumn("Timestamp", "DateTime64(9)", "Start of the span."),
        dg.TableColumn("TraceId", "String", "Trace that the span belongs to."),
        dg.TableColumn("SpanId", "String", "The span, unique in its trace."),
        dg.TableColumn("SpanAttributes", "Map", "Where items, session, run and project stand."),
        dg.TableColumn("Duration", "UInt64", "Nanoseconds from start to end."),
    ]
)

_PROMISES = {
    "missing": "Every sound envelope in the days' spans has its row.",
    "stale": "Every row of the days' spans, and its links, are what the span says.",
}

_REASONS = dg.TableSchema(
    columns=[dg.TableColumn(name="reason", type="text"), dg.TableColumn("envelopes", "integer")]
)


_TAKEN_BACK = dg.TableSchema(
    columns=[
        dg.TableColumn(name="item", type="uuid"),
        dg.TableColumn(
            name="fields",
            type="text",
            description="Those that differed from what the span says: edits are taken back.",
        ),
    ]
)


@dataclass(frozen=True)
class ItemAssets:
    """The asset and its checks."""

    asset: dg.AssetsDefinition
    checks: dg.AssetChecksDefinition


def span_table(settings: Settings) -> dg.AssetSpec:
    """The span table that items are made from: shown in the lineage, never written."""
    return dg.AssetSpec(
        asset_key(settings, SPANS),
        group_name="platform",
        description=f"The table {settings.spans_table} of the OpenTelemetry Collector's ClickHouse "
        "exporter: read, never written.",
        kinds={"clickhouse"},
        owners=["team:everruns"],
        metadata={
            "dagster/column_schema": _SPAN_SCHEMA,
            "dagster/table_name": settings.spans_table,
        },
        tags={"domain": "items"},
    )


def item_assets(settings: Settings) -> ItemAssets:
    """The asset `items` and its checks, partitioned by the days that `settings` span."""
    partitions = day_partitions(settings)

    @dg.asset(
        key=asset_key(settings, "items"),
        group_name="items",
        description=_DESCRIPTION,
        kinds={"postgres", "clickhouse"},
        owners=["team:everruns"],
        deps=[asset_key(settings, SPANS)],
        partitions_def=partitions,
        backfill_policy=backfill_policy(settings),
        code_version=_version(),
        # A rebuild reads one and writes the other; of ClickHouse there is less to go round.
        pool="clickhouse",
        freshness_policy=dg.FreshnessPolicy.time_window(
            fail_window=FAILED_AFTER, warn_window=STALE_AFTER
        ),
        metadata={
            "dagster/column_schema": _SCHEMA,
            "dagster/table_name": "public.items",
        },
        tags={"domain": "items"},
    )
    def items(
        context: dg.AssetExecutionContext,
        everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
        everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
    ) -> None:
        from everruns_pipelines.items.rebuild import rebuild_day

        with items_failures():
            for day in days_to_materialize(context.run, partitions):
                context.log.info(f"Rebuilding the items of {day}")
                done = rebuild_day(
                    everruns_items_postgres, everruns_clickhouse, day, context.log.info
                )
                context.add_asset_metadata(
                    {
                        **as_metadata(done),
                        "materialized": "the whole day",
                        "dagster/partition_row_count": done.processed,
                    },
                    partition_key=day.isoformat(),
                )

    @dg.multi_asset_check(
        name=check_op("items"),
        specs=check_specs(asset_key(settings, "items"), _PROMISES),
        can_subset=True,
        pool="clickhouse",
    )
    def items_checks(
        context: dg.AssetCheckExecutionContext,
        config: CheckConfig,
        everruns_items_postgres: dg.ResourceParam[ItemsPostgresDatabase],
        everruns_clickhouse: dg.ResourceParam[ClickHouseDatabase],
    ) -> Iterator[dg.AssetCheckResult]:
        from everruns_pipelines.items.rebuild import GRACE, rebuild_day

        with items_failures():
            asked = days_to_check(context, settings, config)
            # Before the first span is stored there is no table to look at.
            days = asked if everruns_clickhouse.is_there() else []
            would = {
                day: rebuild_day(
                    everruns_items_postgres,
                    everruns_clickhouse,
                    day,
                    context.log.info,
                    dry_run=True,
                    grace=GRACE,
                )
                for day in days
            }
        yield from check_results(
            context,
            days,
            sum(one.processed + one.underway for one in would.values()),
            {
                "missing": {day: one.inserted for day, one in would.items()},
                "stale": {day: one.stale for day, one in would.items()},
            },
            sum(one.underway for one in would.values()),
        )

    return ItemAssets(items, items_checks)


def _version() -> str:
    """Changes when the rows that a rebuild makes may have changed."""
    package = files("everruns_pipelines.items")
    rules = sorted((one.name, one.read_text()) for one in package.iterdir() if one.is_file())
    return sha256(repr(rules).encode()).hexdigest()[:12]


@contextmanager
def items_failures() -> Generator[None]:
    """What a rebuild raises, as failures of the run that say what to do."""
    with told_plainly(Refusal.as_items_error):
        try:
            yield
        except ClickHouseFailure as failure:
            try_again(dg.Failure(str(failure)))


def as_metadata(done: "Rebuilt") -> dict[str, dg.MetadataValue]:
    """A rebuild's account, as metadata of a materialization or of an op's output."""
    rejections = dg.MetadataValue.table(
        records=[
            dg.TableRecord({"reason": reason, "envelopes": number})
            for reason, number in done.reasons.items()
        ],
        schema=_REASONS,
    )
    return {
        **{name: dg.MetadataValue.int(number) for name, number in done.all_counts().items()},
        "rejections": rejections,
        "taken_back": dg.MetadataValue.table(
            records=[
                dg.TableRecord({"item": item, "fields": ", ".join(fields)})
                for item, fields in done.taken_back
            ],
            schema=_TAKEN_BACK,
        ),
    }
