"""Tables for a terminal: a diagnosis shaped by pandas, drawn by rich."""

from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from everruns_pipelines.operations.diagnosis import Day, Diagnosis
    from everruns_pipelines.operations.doctor import Finding

_STATUSES = ["pending", "processing", "failed", "parked", "completed"]


def show_diagnosis(diagnosis: "Diagnosis") -> None:
    """Print a diagnosis on standard output. It fits into 80 columns, however many days it has."""
    remedies = diagnosis.remedies()
    Console().print(
        Group(
            *([_outbox(diagnosis), _lag(diagnosis)] if "reporting" in diagnosis.parts else []),
            *([_failures(diagnosis)] if diagnosis.failures else []),
            *(_days(diagnosis.days, what) for what in ("missing", "stale", "orphaned")),
            *(f"[yellow]unknown[/yellow] {reason}" for reason in diagnosis.unknown),
            *(["", "To repair it:"] if remedies else []),
            *(f"  {escape(remedy)}" for remedy in remedies),
        )
    )


def show_findings(findings: "Iterable[Finding]") -> bool:
    """Print findings as they come, a line each; whether all is well."""
    console = Console()
    all_well = True
    for finding in findings:
        all_well = all_well and finding.ok
        mark = "[green]ok  [/green]" if finding.ok else "[red]FIX [/red]"
        console.print(mark, end="")
        console.print(
            f"{finding.name}: {finding.text}", markup=False, highlight=False, soft_wrap=True
        )
    return all_well


def _outbox(diagnosis: "Diagnosis") -> RenderableType:
    rows: Any = pd.DataFrame(
        [(one.source_type, one.status, one.rows) for one in diagnosis.outbox],
        columns=["source type", "status", "rows"],
    )
    counts = (
        rows.pivot_table(index="source type", columns="status", values="rows", aggfunc="sum")
        .reindex(columns=_STATUSES)
        .fillna(0)
        .astype(int)
    )
    due = diagnosis.oldest_due
    title = (
        "Outbox: nothing is due"
        if due is None
        else f"Outbox: the oldest row is due since {due:%F %T} UTC"
    )
    return _table(counts, title)


def _lag(diagnosis: "Diagnosis") -> RenderableType:
    lag: Any = pd.Series(diagnosis.lag_seconds, name="seconds waiting")
    seconds = lag.round().astype(int).to_frame().rename_axis("fact")
    return _table(seconds, "Lag of the oldest queued source")


def _failures(diagnosis: "Diagnosis") -> RenderableType:
    table = Table("when", "org", "source", "state", "attempts", "why", title="Newest failures")
    for one in diagnosis.failures:
        source = f"{one.source_type} {one.source_id}"
        when = f"{one.failed_at:%F %T}"
        table.add_row(
            when, str(one.org_id), source, one.status, str(one.attempts), one.last_error or ""
        )
    return table


def _days(days: "Sequence[Day]", what: str) -> RenderableType:
    rows: Any = pd.DataFrame(
        [(str(one.day), one.table, getattr(one, what)) for one in days],
        columns=["day", "table", "rows"],
    )
    pivot = rows.pivot_table(index="day", columns="table", values="rows", aggfunc="sum")
    counts = pivot.astype("Int64")  # with nothing where a table was not compared on a day
    if not counts.sum().any():
        return f"[green]✓[/green] No {what} rows in {len(counts.dropna())} days"
    compared = counts.loc[:, counts.sum() > 0].dropna(how="all")
    wrong = compared.loc[compared.sum(axis=1) > 0]
    wrong.loc["all"] = wrong.sum()
    wrong.columns = [str(name).removeprefix("fact_").replace("_", "\n") for name in wrong.columns]
    title = f"{what.capitalize()} rows per day: {len(wrong) - 1} of {len(compared)} days"
    return _table(wrong.rename_axis("day"), title)


def _table(frame: Any, title: str) -> RenderableType:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(str(frame.index.name), no_wrap=True)
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    values: list[list[Any]] = frame.to_numpy().tolist()
    for name, row in zip(frame.index, values, strict=True):
        table.add_row(str(name), *(_count(value) for value in row))
    return table


def _count(value: Any) -> str:
    if value is pd.NA:
        return ""
    return f"{value:,}" if value else "·"
