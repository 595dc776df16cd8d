"""The span table as users have it: which predicates find spans in it, and how they are read.

Each selection is one query whose predicate an index or the partition key answers: `OR` between
them would make ClickHouse read everything. What two selections both find is one span again later.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import islice
from string import Template
from typing import Any
from uuid import UUID

from everruns_pipelines.databases.clickhouse import ClickHouse
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import Refusal

_SQL = read_statements("everruns_pipelines.items", "spans.sql")

# Attributes longer than this, in bytes, are rejected as a whole. OTLP messages are 4 MiB.
LONGEST_ATTRIBUTES = 16 << 20

# So few that the index on the trace id still tells blocks apart, and a query stays short.
_TRACES_PER_QUERY = 500
_RUNS_PER_QUERY = 500

_NEEDED_COLUMNS = {"Timestamp", "TraceId", "SpanId", "SpanAttributes", "Duration"}


@dataclass(frozen=True)
class Selection:
    """Which spans: a predicate over the span table, and which of them are meant as a whole."""

    predicate: str
    whole: str = "true"
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class SpanTable:
    """The span table of one ClickHouse, and what of it a rebuild may read.

    Args:
        projects: names under which the spans know the projects in scope; None = all spans.
    """

    clickhouse: ClickHouse
    name: str
    projects: Sequence[str] | None = None

    @property
    def _names(self) -> dict[str, str]:
        database, _, table = self.name.rpartition(".")
        return {
            "database": database or self.clickhouse.database,
            "spans": table,
            "times": f"{table}_trace_id_ts",
        }

    def check(self) -> None:
        """Raise a `Refusal` if the table is missing or lacks a column."""
        described = self.clickhouse.rows(
            "DESCRIBE TABLE {database:Identifier}.{spans:Identifier}", self._names
        )
        missing = _NEEDED_COLUMNS - {column for column, *_ in described}
        if missing:
            raise Refusal(
                f"The span table {self.name} lacks {', '.join(sorted(missing))}: "
                "EVERRUNS_SPANS_TABLE must name a table of the OpenTelemetry Collector's exporter",
                code="incompatible_schema",
                status=503,
            )

    def query(self, selection: Selection) -> tuple[str, dict[str, Any]]:
        """The query for a selection's spans, and its parameters."""
        predicate = selection.predicate
        parameters = {
            "longest": LONGEST_ATTRIBUTES,
            **self._names,
            **selection.parameters,
        }
        if self.projects is not None:
            predicate += " AND project_name IN {projects:Array(String)}"
            parameters["projects"] = list(self.projects)
        sql = Template(_SQL["spans"]).substitute(selection=predicate, whole=selection.whole)
        return sql, parameters

    def reported(self, since: int, until: int, most: int) -> list[list[str]]:
        """The first `most` items of spans that ended after `since`, up to and with `until`.

        Args:
            since: like `until` in whole seconds since the epoch.
        """
        sql = Template(_SQL["reported"]).substitute()
        return self.clickhouse.rows(
            sql, {**self._names, "since": since, "until": until, "most": most}
        )

    def of_session(self, session: UUID) -> Iterator[Selection]:
        """Spans of a session's traces; whole are those whose own session it is."""
        text, digits = str(session), session.hex
        usual = [text, text.upper(), digits]
        rare = [
            digits.upper(),
            *(f"{{{one}}}" for one in usual),
            *(f"urn:uuid:{one}" for one in usual),
        ]
        # For each spelling the index lets one block of spans in a hundred pass that lacks it: rare
        # ones are looked for only where no other is found.
        traces = self._traces_of(usual) or self._traces_of(rare)
        whole = "SpanAttributes['dreadnode.session.id'] IN {sessions:Array(String)}"
        for some in _groups(traces, _TRACES_PER_QUERY):
            yield self._of_traces(some, whole, {"sessions": [*usual, *rare]})

    def _traces_of(self, sessions: Sequence[str]) -> list[str]:
        rows = self.clickhouse.rows(_SQL["traces"], {**self._names, "sessions": sessions})
        return [trace for (trace,) in rows]

    def of_runs(self, run_ids: Iterable[str]) -> Iterator[Selection]:
        """Spans of runs, and of traces where a run id is a trace id."""
        runs, traces = set[str](), set[str]()
        for run in run_ids:
            (traces if _is_trace_id(run) else runs).add(run)
        for some in _groups(sorted(runs), _RUNS_PER_QUERY):
            yield Selection(
                "hasAny(mapValues(SpanAttributes), {runs:Array(String)})"
                " AND SpanAttributes['dreadnode.run.id'] IN {runs:Array(String)}",
                parameters={"runs": some},
            )
        for some in _groups(sorted(traces), _TRACES_PER_QUERY):
            yield self._of_traces([trace.lower() for trace in some], "true", {})

    def _of_traces(
        self, traces: Sequence[str], whole: str, parameters: Mapping[str, Any]
    ) -> Selection:
        predicate = "TraceId IN {traces:Array(String)}"
        parameters = {**parameters, "traces": list(traces)}
        bounds = self._bounds(traces)
        if bounds is not None:
            predicate += (
                " AND Timestamp >= fromUnixTimestamp64Milli({since:Int64} * 1000, 'UTC')"
                " AND Timestamp < fromUnixTimestamp64Milli({until:Int64} * 1000, 'UTC')"
            )
            parameters |= {"since": bounds[0], "until": bounds[1]}
        return Selection(predicate, whole, parameters)

    def _bounds(self, traces: Sequence[str]) -> tuple[int, int] | None:
        """Seconds between which the traces' spans start; None where the companion cannot tell."""
        try:
            [[since, until, known]] = self.clickhouse.rows(
                _SQL["bounds"], {**self._names, "traces": list(traces)}
            )
        except Refusal:  # There is no companion: the index on the trace id remains.
            return None
        return (int(since), int(until)) if int(known) == len(set(traces)) else None


def of_day(day: date) -> Selection:
    """Spans that start on a UTC day: one partition of the table."""
    return Selection(
        "Timestamp >= toDateTime64({since:String}, 9, 'UTC')"
        " AND Timestamp < toDateTime64({until:String}, 9, 'UTC')",
        parameters={"since": str(day), "until": str(day + timedelta(days=1))},
    )


def _groups(values: Iterable[str], size: int) -> Iterator[list[str]]:
    rest = iter(values)
    while group := list(islice(rest, size)):
        yield group


def _is_trace_id(run: str) -> bool:
    return len(run) == 32 and all(digit in "0123456789abcdefABCDEF" for digit in run)
