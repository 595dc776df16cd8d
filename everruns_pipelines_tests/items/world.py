"""A small world to rebuild in: projects, spans as the SDK writes them, and what came of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID, uuid5

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb, set_json_loads

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.items.accounting import Rebuilt
from everruns_pipelines.items.rebuild import rebuild, rebuild_day
from everruns_pipelines.items.scope import RebuildRequest

_SEED = UUID("00000000-0000-4000-8000-000000000000")
ORGANIZATION = uuid5(_SEED, "acme")
WORKSPACE = uuid5(_SEED, "red")
PROJECT = uuid5(_SEED, "webapp")
SESSION = str(uuid5(_SEED, "session"))
OTHER_SESSION = str(uuid5(_SEED, "other session"))
RUN = str(uuid5(_SEED, "run"))
DAY = date(2026, 1, 1)

Row = dict[str, Any]


def name_id(name: str) -> UUID:
    return uuid5(_SEED, name)


def key(name: str) -> str:
    """A dedupe key, always the same for a name."""
    return name_id(name).hex


def envelope(name: str = "one", **changes: Any) -> Row:
    """An envelope with all its 14 keys."""
    return {
        "item_type": "finding",
        "dedupe_key": key(name),
        "ref": None,
        "title": f"title of {name}",
        "status": None,
        "notes": None,
        "schema_ref": "finding@1",
        "session_id": SESSION,
        "trace_id": None,
        "span_id": None,
        "capability": "web-recon",
        "capability_version": "1.4.2",
        "data": {"title": name, "severity": "low", "metadata": {}},
        "links": None,
        **changes,
    }


def object_of(value: Any) -> Row:
    return {"hash": "", "schema_hash": "0", "value": value, "type": "val"}


def offloaded(uri: str, size: int = 10) -> Row:
    return {"hash": "", "type": "uri", "uri": uri, "size": size}


@dataclass
class Span:
    """A row of `otel_traces`. `items` are values of outputs named `item`, or whole objects."""

    items: list[Any] = field(default_factory=list[Any])
    objects: list[Row] | None = None
    name: str = "span"
    trace: str = "trace"
    session: str | None = SESSION
    project: str | None = str(PROJECT)
    run: str | None = RUN
    start: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)
    nanoseconds: int = 0
    duration: int = 4_000_012
    attributes: Mapping[str, str | None] = field(default_factory=dict[str, str | None])

    @property
    def trace_id(self) -> str:
        return name_id(self.trace).hex

    @property
    def span_id(self) -> str:
        return name_id(self.name).hex[:16]

    @property
    def ended(self) -> datetime:
        """The span's end, cut to microseconds."""
        return self.start + timedelta(microseconds=(self.nanoseconds + self.duration) // 1000)

    def outputs_and_objects(self) -> tuple[str, str]:
        objects = self.objects if self.objects is not None else [object_of(i) for i in self.items]
        outputs: list[Row] = []
        held: Row = {}
        for number, one in enumerate(objects):
            value: Any = one.get("value")
            hint: Any = (
                cast("Row", value).get("dedupe_key") if isinstance(value, dict) else one.get("key")
            )
            outputs.append(
                {
                    "name": "item",
                    "label": "x",
                    "hash": f"{number:016x}",
                    "attributes": {"dedupe_key": hint} if isinstance(hint, str) else None,
                }
            )
            held[f"{number:016x}"] = {**one, "hash": f"{number:016x}"}
        return json.dumps(outputs), json.dumps(held)

    def row(self) -> Row:
        outputs, objects = self.outputs_and_objects()
        attributes = {
            "dreadnode.project": self.project,
            "dreadnode.session.id": self.session,
            "dreadnode.run.id": self.run,
            "logfire.span_type": "span",
            "dreadnode.outputs": outputs,
            "dreadnode.objects": objects,
            **self.attributes,
        }
        return {
            "Timestamp": f"{self.start:%Y-%m-%d %H:%M:%S.%f}{self.nanoseconds:03}",
            "TraceId": self.trace_id,
            "SpanId": self.span_id,
            "SpanName": "tool:report_item",
            "ServiceName": "agent",
            "Duration": self.duration,
            "SpanAttributes": {
                name: value for name, value in attributes.items() if value is not None
            },
        }


@dataclass(frozen=True)
class World:
    postgres: PostgresDatabase
    clickhouse: ClickHouseDatabase
    connection: Connection
    log: list[str] = field(default_factory=list[str])

    def add_project(
        self,
        slug: str,
        project: UUID,
        *,
        workspace: tuple[str, UUID] = ("red", WORKSPACE),
        organization: tuple[str, UUID] = ("acme", ORGANIZATION),
    ) -> None:
        for query, values in (
            ("INSERT INTO item_organizations (slug, id) VALUES (%s, %s)", organization),
            (
                "INSERT INTO item_workspaces (slug, id, organization_id) VALUES (%s, %s, %s)",
                (*workspace, organization[1]),
            ),
            (
                "INSERT INTO projects (slug, id, workspace_id) VALUES (%s, %s, %s)",
                (slug, project, workspace[1]),
            ),
        ):
            self.connection.execute(f"{query} ON CONFLICT DO NOTHING".encode(), values)

    def add(self, *spans: Span | Row) -> None:
        rows = [span.row() if isinstance(span, Span) else span for span in spans]
        self.insert("\n".join(json.dumps(row) for row in rows).encode())

    def insert(self, rows: bytes) -> None:
        with self.clickhouse.connect() as clickhouse:
            if not self.log:  # The directory is shared; opening it once more would cost more.
                for table in ("otel_traces", "otel_traces_trace_id_ts"):
                    clickhouse.client.command(f"TRUNCATE TABLE {table}")
                self.log.append("the span table is empty")
            clickhouse.client.raw_insert("otel_traces", insert_block=rows, fmt="JSONEachRow")

    def post(self, name: str, project: UUID = PROJECT, **columns: Any) -> UUID:
        """An item that came through the API before."""
        body = envelope(name)
        row: Row = {
            "id": name_id(f"item {name} {project}"),
            "organization_id": ORGANIZATION,
            "project_id": project,
            "source": "runtime",
            "created_at": datetime(2025, 12, 31, tzinfo=UTC),
            "updated_at": datetime(2025, 12, 31, tzinfo=UTC),
            **{
                column: body[column]
                for column in (
                    "item_type",
                    "title",
                    "ref",
                    "data",
                    "session_id",
                    "capability",
                    "capability_version",
                    "schema_ref",
                    "dedupe_key",
                )
            },
            "trace_id": Span().trace_id,
            "span_id": Span().span_id,
            **columns,
        }
        for column in ("data", "disposition"):
            if row.get(column) is not None:
                row[column] = Jsonb(row[column])
        names = ", ".join(row)
        places = ", ".join(f"%({name})s" for name in row)
        self.connection.execute(f"INSERT INTO items ({names}) VALUES ({places})".encode(), row)
        return row["id"]

    def rebuild(self, session: str | None = SESSION, **options: Any) -> Rebuilt:
        scope = {"organization": "acme", "workspace": "red", "project": "webapp"}
        asked: Row = {**scope, "session_id": session, **options}
        request = RebuildRequest(**asked)
        return rebuild(self.postgres, self.clickhouse, request, self.log.append)

    def rebuild_day(self, day: date = DAY, **options: Any) -> Rebuilt:
        return rebuild_day(self.postgres, self.clickhouse, day, self.log.append, **options)

    def items(self, project: UUID = PROJECT) -> dict[str, Row]:
        """The project's items by dedupe key, row version included, numbers exact."""
        rows = self._rows("SELECT xmin::text, * FROM items WHERE project_id = %s", project)
        return {row["dedupe_key"]: row for row in rows}

    def links(self) -> set[tuple[str, str, str]]:
        """Links as dedupe keys of source and target, and relationship."""
        query = (
            "SELECT source.dedupe_key, target.dedupe_key, relationship FROM item_links"
            " JOIN items AS source ON source.id = source_item_id"
            " JOIN items AS target ON target.id = target_item_id"
        )
        return {(row[0], row[1], row[2]) for row in self.connection.execute(query)}

    def rejections(self, project: UUID = PROJECT) -> list[Row]:
        return self._rows(
            "SELECT * FROM everruns_pipelines.item_rejections WHERE project_id = %s"
            " ORDER BY dedupe_key, trace_id, span_id, id",
            project,
        )

    def reasons(self) -> dict[str | None, str]:
        return {row["dedupe_key"]: row["reason"] for row in self.rejections()}

    def _rows(self, query: str, *values: Any) -> list[Row]:
        set_json_loads(exactly, self.connection)
        return (
            self.connection.cursor(row_factory=dict_row).execute(query.encode(), values).fetchall()
        )


def exactly(text: str | bytes) -> Any:
    """JSON with numbers as they are written, as far as PostgreSQL tells them apart."""
    return json.loads(text, parse_float=_number, parse_int=_number)


def _number(text: str) -> str:
    return "number " + format(Decimal(text), "f")


def exact(value: Any) -> Any:
    """A Python value in the form of `exactly`."""
    return exactly(json.dumps(value))
