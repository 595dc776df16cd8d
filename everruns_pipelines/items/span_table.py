"""The span table as users have it: its generations, and which predicates find spans in each.

Each selection is one query whose predicate an index or the partition key answers: `OR` between
them would make ClickHouse read everything. What two selections both find is one span again later.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cached_property
from itertools import islice
from string import Template
from typing import Any, TypeVar
from uuid import UUID

from everruns_pipelines.databases.clickhouse import ClickHouse, Log
from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import Refusal

_SQL = read_statements("everruns_pipelines.items", "spans.sql")

# Attributes longer than this, in bytes, are rejected as a whole. OTLP messages are 4 MiB.
LONGEST_ATTRIBUTES = 16 << 20

# Servers take parameters of 128 KiB over HTTP.
_TRACES_PER_QUERY = 3_000
_RUNS_PER_QUERY = 100
# A table of fewer spans is read faster than it is looked through twice.
_MANY_SPANS = 500_000
# What is near in time.
_NEAR_NS = 3600 * 1_000_000_000
_LAST_NS = (1 << 63) - 1
_NOT_EVERYWHERE = (
    "The session was looked for as {}. Within an hour of the spans that were found, no span spells "
    "it otherwise; further away that was not looked for, since in a large table bloom filters are "
    "of little help. If spans there do spell it otherwise, name it as they do, or materialize "
    "their days"
)

_NEEDED_COLUMNS = {"Timestamp", "TraceId", "SpanId", "SpanAttributes", "Duration"}
_ATTRIBUTES = {
    "outputs": "dreadnode.outputs",
    "objects": "dreadnode.objects",
    "project": "dreadnode.project",
    "session": "dreadnode.session.id",
    "run": "dreadnode.run.id",
    "tool_error": "dreadnode.tool.error",
    "span_type": "logfire.span_type",
}
_VALUES = "mapValues(SpanAttributes)"
# The exporter's texts of the form key=value. Another table may join the two by something else.
_ITEMS = (
    "arrayMap(kv -> concat(kv.1, '=', kv.2), CAST(SpanAttributes, 'Array(Tuple(String, String))'))"
)
_IS_ITEMS = re.compile(
    r"arrayMap\(\(?(\w+)\)? -> concat\(\1\.1, '=', \1\.2\), "
    r"(CAST\(SpanAttributes, 'Array\(Tuple\(String, String\)\)'\)"
    r"|SpanAttributes::Array\(Tuple\(String, String\)\))\)"
)
_SPANS = [
    "trace_id", "span_id", "run_id", "project_name", "ended_ns", "whole", "refused", "state",
    "outputs", "objects", "complete",
]  # fmt: skip
_TABLE = ["engine", "sorted", "held"]
_TRACES = ["trace", "first_ns", "last_ns"]
_REPORTED = ["trace_id", "project_name", "dedupe_key", "ended_ns", "complete"]

# The exporter's companion table tells between which times a trace's spans start. It may know a
# trace in part, and to tell that from all of it costs as much as to find the spans by their index.
_OF_TRACES = "TraceId IN {traces:Array(String)}"

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """Which spans.

    Args:
        columns: a predicate over plain columns, which are read before the attributes.
        attributes: a predicate over the attributes.
        whole: which of the spans are meant as a whole.
    """

    columns: str = "true"
    attributes: str = "true"
    whole: str = "true"
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, order=True)
class Position:
    """A place in the order in which reported items are looked at: by the span's end, first of all.

    Args:
        ended_ns: in nanoseconds since the epoch.
    """

    ended_ns: int
    trace_id: str = ""
    project: str = ""
    dedupe_key: str = ""


@dataclass(frozen=True)
class SpanTable:
    """The span table of one ClickHouse.

    Args:
        engine: its table engine. Only tables of the MergeTree family tell their indexes; what a
            view or a Distributed table leads to may have any.
        sorted: its sorting key.
        held: how many rows it holds itself.
        columns: the type of each.
        aliases: the expression of each column that is an alias.
        indexes: the type of each by its expression.
    """

    clickhouse: ClickHouse
    database: str
    name: str
    engine: str
    sorted: str
    held: int
    columns: Mapping[str, str]
    aliases: Set[str]
    indexes: Mapping[str, str]

    @classmethod
    def of(cls, clickhouse: ClickHouse, named: str) -> "SpanTable":
        """The table that `named` names, database-qualified if need be.

        Raises:
            Refusal: there is none, or it is no span table.
        """
        database, _, name = named.rpartition(".")
        names = {"database": database or clickhouse.database, "spans": name}
        described = clickhouse.rows(
            _SQL["columns"], names, ["name", "type", "default_kind", "expression"]
        )
        columns = {column: kind for column, kind, *_ in described}
        if not columns:
            raise Refusal(
                f"ClickHouse has no such table, or does not show it to this user: {named}. "
                "EVERRUNS_CLICKHOUSE_DSN and EVERRUNS_SPANS_TABLE must name the span table",
                code="incompatible_schema",
                status=503,
            )
        flaw = _flaw(columns)
        if flaw is not None:
            raise Refusal(
                f"The span table {named} {flaw}: "
                "EVERRUNS_SPANS_TABLE must name a table of the OpenTelemetry Collector's exporter",
                code="incompatible_schema",
                status=503,
            )
        [[engine, order, held]] = clickhouse.rows(_SQL["table"], names, _TABLE)
        indexes = clickhouse.rows(_SQL["indexes"], names, ["type", "indexed"])
        return cls(
            clickhouse,
            names["database"],
            name,
            engine,
            order,
            int(held),
            columns,
            {text for _, _, default, text in described if default == "ALIAS"},
            {expression: kind for kind, expression in indexes},
        )

    @property
    def is_plain(self) -> bool:
        """Whether it holds its rows itself, so that its indexes are all there are."""
        return self.engine.endswith("MergeTree")

    @property
    def is_json(self) -> bool:
        """Whether its attributes are JSON, and no map."""
        return self.columns["SpanAttributes"].startswith("JSON")

    @property
    def generation(self) -> str:
        """What it is, in a few words."""
        if not self.is_plain:
            return f"a table of engine {self.engine}"
        kind = "a table of its own kind"
        if self.is_json:
            kind = "the exporter's JSON generation"
        elif any(_IS_ITEMS.fullmatch(alias) for alias in self.aliases):
            indexes = "text indexes" if self.trace_index == "text" else "bloom filters"
            kind = f"the exporter's newest generation with {indexes}"
        elif "toDateTime(Timestamp)" in self.sorted:
            kind = "the exporter's generation of 2024"
        elif "toUnixTimestamp(Timestamp)" in self.sorted:
            kind = "the exporter's older generation"
        return kind if self.engine == "MergeTree" else f"{kind}, of engine {self.engine}"

    @property
    def trace_index(self) -> str | None:
        """What finds a trace: the type of an index, or the order of the table."""
        by_order = "primary key" if self.sorted.split(",")[0] == "TraceId" else None
        return self.indexes.get("TraceId") or by_order

    @property
    def value_index(self) -> str | None:
        """The type of the index that finds an attribute by its value."""
        return self.indexes.get(_VALUES) or self.indexes.get(self._items or "")

    @property
    def _items(self) -> str | None:
        """The expression of the texts key=value that an index finds."""
        return next(filter(_IS_ITEMS.fullmatch, self.indexes), None)

    def query(
        self, selection: Selection, projects: Sequence[str] | None
    ) -> tuple[str, dict[str, Any], list[str]]:
        """The query for a selection's spans, its parameters, and the columns of its answer.

        Args:
            projects: names under which the spans know the projects in scope; None = all spans.
                Of names that differ in capital letters alone all are found.
        """
        attributes = selection.attributes
        parameters = {"longest": LONGEST_ATTRIBUTES, **self._names, **selection.parameters}
        if projects is not None:
            attributes += f" AND lowerUTF8({self._words['project']}) IN {{projects:Array(String)}}"
            parameters["projects"] = sorted({project.lower() for project in projects})
        sql = self._filled("spans", selection.columns, attributes, whole=selection.whole)
        return sql, parameters, _SPANS

    def of_session(self, named: str, log: Log) -> Iterator[Selection]:
        """Spans of a session's traces; whole are those whose own session it is.

        Args:
            named: the session, a UUID in any spelling.
            log: told what was not looked for.
        """
        session = UUID(named)
        text, digits = str(session), session.hex
        common = [text, text.upper(), digits]
        spellings = [
            *common,
            digits.upper(),
            *(f"{{{one}}}" for one in common),
            *(f"urn:uuid:{one}" for one in common),
        ]
        likely = list(dict.fromkeys((text, named)))
        found = self._traces_of_session(likely, sorted({*spellings} - {*likely}), log)
        for some in _groups(found, _TRACES_PER_QUERY):
            yield Selection(
                _OF_TRACES,
                whole=f"{self._words['session']} IN {{sessions:Array(String)}}",
                parameters={"traces": some, "sessions": [*spellings, named]},
            )

    def of_runs(self, run_ids: Iterable[str]) -> Iterator[Selection]:
        """Spans of runs, and of traces where a run id is a trace id."""
        runs, traces = set[str](), set[str]()
        for run in run_ids:
            (traces if _is_trace_id(run) else runs).add(run)
        for some in _groups(sorted(runs), _RUNS_PER_QUERY):
            predicate, parameters = self._having("run", some)
            yield Selection(attributes=predicate, parameters=parameters)
        for some in _groups(sorted({trace.lower() for trace in traces}), _TRACES_PER_QUERY):
            yield Selection(_OF_TRACES, parameters={"traces": some})

    def reported(
        self, after: Position, until_ns: int, most: int
    ) -> tuple[str, dict[str, Any], list[str]]:
        """The query for the first `most` items of spans that ended after a position, in order.

        Args:
            until_ns: in nanoseconds since the epoch.
        """
        ended = "toInt128(toUnixTimestamp64Nano(Timestamp)) + Duration"
        sql = self._filled(
            "reported",
            "Timestamp >= fromUnixTimestamp64Nano({after:Int64} - 86400000000000, 'UTC')"
            " AND Timestamp <= fromUnixTimestamp64Nano({until:Int64}, 'UTC')"
            f" AND {ended} >= toInt128({{after:Int64}}) AND {ended} <= toInt128({{until:Int64}})",
            "true",
        )
        parameters = {
            **self._names,
            "after": after.ended_ns,
            "after_trace": after.trace_id,
            "after_project": after.project,
            "after_key": after.dedupe_key,
            "until": until_ns,
            "most": most,
        }
        return sql, parameters, _REPORTED

    @property
    def _names(self) -> dict[str, str]:
        return {"database": self.database, "spans": self.name}

    @cached_property
    def _words(self) -> dict[str, str]:
        """What a statement's $names stand for in this generation."""
        if not self.is_json:
            words = {name: f"SpanAttributes['{key}']" for name, key in _ATTRIBUTES.items()}
            return {
                **words,
                "has_outputs": "has(mapKeys(SpanAttributes), 'dreadnode.outputs')",
                "is_lossy": "false",
                "outputs_bytes": words["outputs"],
                "objects_bytes": words["objects"],
            }
        # The collector kept numbers and booleans as what they are: as text they are what a map has.
        words = {
            name: f"ifNull(toString(SpanAttributes.{key}), '')" for name, key in _ATTRIBUTES.items()
        }
        # JSON keeps no byte that is not UTF-8: U+FFFD stands in its place. The SDK escapes a real
        # one, like every character that is not ASCII. As a byte that is none, it is found out.
        lost = "unhex('EFBFBD')"
        return {
            **words,
            "has_outputs": f"{words['outputs']} != ''",
            "is_lossy": f"(position({words['outputs']}, {lost}) > 0"
            f" OR position({words['objects']}, {lost}) > 0)",
            "outputs_bytes": f"replaceAll({words['outputs']}, {lost}, unhex('FF'))",
            "objects_bytes": f"replaceAll({words['objects']}, {lost}, unhex('FF'))",
        }

    def _filled(self, statement: str, columns: str, attributes: str, **more: str) -> str:
        """A statement in the words of this generation.

        Views know no PREWHERE; elsewhere it spares reading the attributes of what plain columns
        rule out.
        """
        can_sift = self.is_plain and columns != "true"
        sift = f"PREWHERE {columns}\nWHERE" if can_sift else f"WHERE {columns} AND"
        words = {**self._words, **more, "sift": f"{sift} {attributes} AND"}
        return Template(_SQL[statement]).substitute(words)

    def _having(self, attribute: str, values: Sequence[str]) -> tuple[str, dict[str, Any]]:
        """A predicate for the spans with one of some values, by whatever index there is.

        The attribute itself is always compared: an index on values does not know its key, and one
        on key=value does not know where the key ends.
        """
        parameters: dict[str, Any] = {"values": list(values)}
        predicate = f"{self._words[attribute]} IN {{values:Array(String)}}"
        if self.is_json:
            return predicate, parameters
        if _VALUES in self.indexes or not self.is_plain:
            predicate = f"hasAny({_VALUES}, {{values:Array(String)}}) AND {predicate}"
        if self._items or not self.is_plain:
            items = self._items or _ITEMS
            # Not `hasAny`, for which servers before 26.5 do not use the index.
            each = [f"has({items}, {{item{n}:String}})" for n in range(len(values))]
            predicate = f"({' OR '.join(each)}) AND {predicate}"
            key = _ATTRIBUTES[attribute]
            parameters |= {f"item{n}": f"{key}={value}" for n, value in enumerate(values)}
        return predicate, parameters

    def _traces_of_session(
        self, likely: Sequence[str], others: Sequence[str], log: Log
    ) -> Iterable[str]:
        """The traces in which a session occurs.

        Args:
            likely: how it may be spelled: as the SDK does, and as we were asked for it.
            others: its other spellings.
        """
        if self.value_index != "bloom_filter" or self.held < _MANY_SPANS:
            return self._traces_of([*likely, *others])
        # For each spelling a bloom filter lets one block of spans in a hundred pass that lacks it.
        # So others are looked for near what was found, and everywhere if there are any.
        found = self._traces_of(likely)
        if found:
            first = min(first for first, _ in found.values()) - _NEAR_NS
            last = max(last for _, last in found.values()) + _NEAR_NS
            if not self._traces_of(others, (first, min(last, _LAST_NS))):
                log(_NOT_EVERYWHERE.format(" and ".join(likely)))
                return found
        return found | self._traces_of(others)

    def _traces_of(
        self, sessions: Sequence[str], during: tuple[int, int] | None = None
    ) -> dict[str, tuple[int, int]]:
        """The traces with a session, and between which times the spans that name it start.

        Args:
            during: between which times spans are looked at, in nanoseconds since the epoch, like
                those that are returned; None = always.
        """
        predicate, parameters = self._having("session", sessions)
        if during is not None:
            predicate += (
                " AND Timestamp >= fromUnixTimestamp64Nano({first:Int64}, 'UTC')"
                " AND Timestamp <= fromUnixTimestamp64Nano({last:Int64}, 'UTC')"
            )
            parameters |= dict(zip(("first", "last"), during, strict=True))
        sql = Template(_SQL["traces"]).substitute(having=predicate)
        rows = self.clickhouse.rows(sql, {**self._names, **parameters}, _TRACES)
        return {trace: (int(first), int(last)) for trace, first, last in rows}


def of_day(day: date) -> Selection:
    """Spans that start on a UTC day: one partition of the table."""
    return Selection(
        "Timestamp >= toDateTime64({since:String}, 9, 'UTC')"
        " AND Timestamp < toDateTime64({until:String}, 9, 'UTC')",
        parameters={"since": str(day), "until": str(day + timedelta(days=1))},
    )


def _flaw(columns: Mapping[str, str]) -> str | None:
    missing = _NEEDED_COLUMNS - columns.keys()
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    kind = columns["SpanAttributes"].split("(")[0]
    return None if kind in ("Map", "JSON") else f"has SpanAttributes of type {kind}"


def _groups(values: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(values)
    while group := list(islice(rest, size)):
        yield group


def _is_trace_id(run: str) -> bool:
    return len(run) == 32 and all(digit in "0123456789abcdefABCDEF" for digit in run)
