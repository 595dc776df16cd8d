"""What the checks of both domains share: which days they look at, and what they say of them.

A check has no partitions, though its asset has. One with partitions is executed only by a run of a
single day, and after a range of days Dagster keeps no result of it. Here each evaluation looks at
several days and says which of them are wrong.
See https://docs.dagster.io/guides/test/asset-checks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg
from dagster._core.storage.asset_check_execution_record import (
    COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES,
    AssetCheckExecutionRecord,
)
from pydantic import Field

from everruns_pipelines.errors import FieldError, Refusal
from everruns_pipelines.orchestration.partitions import day_partitions, days_of_run
from everruns_pipelines.settings import Settings

MOST_DAYS = 366
_MOST_TOLD = 100
_DAYS_SCHEMA = dg.TableSchema(
    [
        dg.TableColumn("day", "date", "UTC day that is wrong."),
        dg.TableColumn("rows", "integer", "Wrong rows of that day."),
    ]
)
# Wrong rows by day, by what is wrong with them: missing, stale, orphaned.
Wrong = Mapping[str, Mapping[date, int]]


class CheckConfig(dg.Config):
    """Which days to look at."""

    days: int = Field(
        7,
        description=f"How many days to look at, today included: 1 to {MOST_DAYS}. "
        "A run of a partition, or of a range of them, looks at these days instead.",
    )


def check_specs(key: dg.AssetKey, promises: Mapping[str, str]) -> list[dg.AssetCheckSpec]:
    """A check per thing that can be wrong with rows, with what it promises when it passes."""
    return [
        dg.AssetCheckSpec(check_name(what), asset=key, description=promise)
        for what, promise in promises.items()
    ]


def check_name(what: str) -> str:
    """The name of the check that no row is missing, stale, ...: the same for every table."""
    return f"no_{what}_rows"


def severity(what: str) -> dg.AssetCheckSeverity:
    """An orphan may be wanted: whoever deleted its source decides. All else is an error."""
    return dg.AssetCheckSeverity.WARN if what == "orphaned" else dg.AssetCheckSeverity.ERROR


def evaluations(
    instance: dg.DagsterInstance, key: dg.AssetCheckKey, limit: int = 1
) -> Iterator[tuple[AssetCheckExecutionRecord, dg.AssetCheckEvaluation]]:
    """The last results of a check, the newest first. One that is only planned is none."""
    for record in instance.event_log_storage.get_asset_check_execution_history(
        key, limit=limit, status=COMPLETED_ASSET_CHECK_EXECUTION_RECORD_STATUSES
    ):
        if record.evaluation is not None:
            yield record, record.evaluation


def check_op(table: str) -> str:
    """The name of the op that executes the checks of a table."""
    return f"{table}_checks"


def check_job(name: str, group: str, tables: Iterable[str]) -> Any:
    """A job that executes the checks of an asset group, and repairs nothing."""
    ops = [check_op(table) for table in tables]
    assets = dg.AssetSelection.groups(group)  # pyright: ignore[reportUnknownMemberType]

    @dg.config_mapping  # pyright: ignore[reportUnknownMemberType, reportUntypedFunctionDecorator]
    def config(given: CheckConfig) -> dict[str, Any]:
        return {"ops": {op: {"config": {"days": given.days}} for op in ops}}

    return dg.define_asset_job(  # pyright: ignore[reportUnknownMemberType]
        name,
        selection=assets - assets.without_checks(),
        config=config,
        description=f"Look whether the last days of {group} are right; repair nothing. "
        "To look at other days, give the run the tags of a partition range.",
        executor_def=dg.in_process_executor,
    )


def days_to_check(
    context: dg.AssetCheckExecutionContext,
    settings: Settings,
    config: CheckConfig,
    anywhere: Callable[[], Iterable[date]] = lambda: (),
) -> list[date]:
    """The days of the run, else the last ones; and those that were wrong at the last look, so that
    a check does not pass because one wrong day of several was repaired.

    Args:
        anywhere: finds days of any age that are wrong; asked unless the run is of partitions.

    Raises:
        Refusal: a day is not a partition, or the config asks for too many days or none.
    """
    if not 1 <= config.days <= MOST_DAYS:
        expected = f"expected a whole number from 1 to {MOST_DAYS}"
        raise Refusal(
            f"days: {expected}, got {config.days}", errors=(FieldError(("days",), expected),)
        )
    days = days_of_run(context.run, day_partitions(settings))
    return sorted({*(days or (*last_days(config.days), *anywhere())), *_wrong_before(context)})


def last_days(number: int) -> list[date]:
    """So many UTC days, up to and with today."""
    today = datetime.now(UTC).date()
    return [today - timedelta(days=ago) for ago in range(number - 1, -1, -1)]


def check_results(
    context: dg.AssetCheckExecutionContext,
    days: Sequence[date],
    expected: int,
    wrong: Wrong,
    underway: int = 0,
) -> Iterator[dg.AssetCheckResult]:
    """The result of each check that was asked for.

    Args:
        days: the days that were looked at.
        expected: how many rows their sources make.
        wrong: rows by day; days that are right may be left out.
        underway: rows that are not counted as wrong, since their source has only just changed.
    """
    for key in context.selected_asset_check_keys:
        for what, rows in wrong.items():
            if key.name == check_name(what):
                found = {day: number for day, number in sorted(rows.items()) if number}
                yield _result(key.name, what, days, found, expected, underway)


def _result(
    name: str,
    what: str,
    days: Sequence[date],
    found: Mapping[date, int],
    expected: int,
    underway: int,
) -> dg.AssetCheckResult:
    number = sum(found.values())
    metadata: dict[str, Any] = {
        f"{what}_rows": number,
        "expected_rows": expected,
        "underway_rows": underway,
        "days_checked": len(days),
        "days_wrong": len(found),
    }
    if found:
        records = [{"day": day.isoformat(), "rows": rows} for day, rows in found.items()]
        metadata["days"] = dg.MetadataValue.table(
            [dg.TableRecord(record) for record in records[:_MOST_TOLD]], schema=_DAYS_SCHEMA
        )
    return dg.AssetCheckResult(
        check_name=name,
        passed=not found,
        severity=severity(what),
        description=(
            f"{number:,} {what} rows {_told(list(found))}. "
            f"{_REMEDIES.get(what, 'Materialize these days to repair them')}."
            if found
            else f"No {what} rows {_told(days)}."
        ),
        metadata=metadata,
    )


_REMEDIES = {
    "orphaned": "Their source is gone; materialize with the run config `remove_orphans: true` "
    "to remove them"
}


def _told(days: Sequence[date]) -> str:
    """Days as people say them: each alone if they are few, else their ends and their number."""
    if not days:
        return "yet: there is nothing to look at"
    if len(days) <= 3:
        return f"on {', '.join(map(str, days))}"
    return f"in {len(days)} days between {days[0]} and {days[-1]}"


def _wrong_before(context: dg.AssetCheckExecutionContext) -> Iterator[date]:
    """What the last evaluations found wrong."""
    for key in context.selected_asset_check_keys:
        for _, evaluation in evaluations(context.op_execution_context.instance, key):
            table = evaluation.metadata.get("days")
            if isinstance(table, dg.TableMetadataValue):
                for row in table.records:
                    yield date.fromisoformat(str(row.data["day"]))
