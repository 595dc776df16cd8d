"""Two agent sessions whose items are partly lost, as spans and as what the API stored.

The API was down for all of the first session. In the second some reports came through, were
triaged, and were retitled by mistake since; one item was offloaded to an object store.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from psycopg.types.json import Jsonb

from everruns_pipelines.databases.clickhouse import ClickHouse
from everruns_pipelines.databases.postgres import Connection

_SEED = UUID("7d3f5d3e-5b5c-4d0c-9a55-0d6e5b0f1c11")
ORGANIZATION, WORKSPACE, PROJECT = "acme", "red", "webapp"
_PROJECT_ID = uuid5(_SEED, PROJECT)
LOST_SESSION = str(uuid5(_SEED, "lost"))
TRIAGED_SESSION = str(uuid5(_SEED, "triaged"))

_WEAKNESSES = ("SQL injection", "Stored XSS", "SSRF", "Open redirect", "Path traversal", "IDOR")
_PLACES = ("/login", "/search", "/upload", "/api/orders", "/admin", "/webhook")
_SEVERITIES = ("critical", "high", "medium", "low", "info")
_DECISIONS = (
    {"status": "triaged", "notes": "confirmed by hand"},
    {"status": "dismissed", "notes": "duplicate of an older one"},
    {"status": "verified", "notes": None},
)
_ITEMS = 12
_POSTED = 6


@dataclass(frozen=True)
class _Report:
    """One item as an agent reported it."""

    session: str
    number: int
    started: datetime

    @property
    def name(self) -> str:
        return f"{self.session} {self.number}"

    @property
    def trace_id(self) -> str:
        return uuid5(_SEED, self.session).hex

    @property
    def span_id(self) -> str:
        return uuid5(_SEED, f"span {self.name}").hex[:16]

    @property
    def is_offloaded(self) -> bool:
        return self.session == TRIAGED_SESSION and self.number == _ITEMS - 1

    @property
    def envelope(self) -> dict[str, Any]:
        weakness = _WEAKNESSES[self.number % len(_WEAKNESSES)]
        place = _PLACES[self.number // 2 % len(_PLACES)]
        title = f"{weakness} in {place}"
        return {
            "item_type": "finding",
            "dedupe_key": uuid5(_SEED, self.name).hex,
            "ref": f"{self.session[:8]}-f{self.number}",
            "title": title,
            "status": None,
            "notes": None,
            "schema_ref": "finding@1",
            "session_id": self.session,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "capability": "web-recon",
            "capability_version": "1.4.2",
            "data": {
                "title": title,
                "severity": _SEVERITIES[self.number % len(_SEVERITIES)],
                "description": f"`{place}` takes input that it should not.",
                "metadata": {"cvss": 4.0 + self.number / 4, "tags": ["web", weakness.lower()]},
            },
            "links": self._links,
        }

    @property
    def _links(self) -> list[dict[str, str]] | None:
        if self.number % 4 != 3:
            return None
        return [
            {"target_ref": f"{self.session[:8]}-f{self.number - 1}", "relationship": "leads to"}
        ]

    def span(self) -> dict[str, Any]:
        envelope = self.envelope
        digest = uuid5(_SEED, f"object {self.name}").hex[:16]
        kept: dict[str, Any] = {"hash": digest}
        if self.is_offloaded:
            kept |= {"type": "uri", "uri": f"s3://sample/cas/objects/{digest}", "size": 12_000}
        else:
            kept |= {"type": "val", "value": envelope}
        output = {
            "name": "item",
            "label": "finding",
            "hash": digest,
            "attributes": {"item_type": "finding", "dedupe_key": envelope["dedupe_key"]},
        }
        return {
            "Timestamp": f"{self.started:%Y-%m-%d %H:%M:%S.%f}",
            "TraceId": self.trace_id,
            "SpanId": self.span_id,
            "SpanName": "tool:report_item",
            "SpanKind": "Internal",
            "ServiceName": "agent",
            "Duration": 4_000_000,
            "SpanAttributes": {
                "dreadnode.project": str(_PROJECT_ID),
                "dreadnode.session.id": self.session,
                "dreadnode.run.id": str(uuid5(_SEED, f"run {self.session}")),
                "logfire.span_type": "span",
                "dreadnode.outputs": json.dumps([output]),
                "dreadnode.objects": json.dumps({digest: kept}),
            },
        }


def load_sample_items(connection: Connection, clickhouse: ClickHouse) -> None:
    """Put the sample into the embedded databases; once only, however often it is called."""
    organization, workspace = uuid5(_SEED, ORGANIZATION), uuid5(_SEED, WORKSPACE)
    with connection.transaction():
        made = connection.execute(
            "INSERT INTO item_organizations (id, slug) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            [organization, ORGANIZATION],
        ).rowcount
        if not made:
            return
        connection.execute(
            "INSERT INTO item_workspaces (id, organization_id, slug) VALUES (%s, %s, %s)",
            [workspace, organization, WORKSPACE],
        )
        connection.execute(
            "INSERT INTO projects (id, workspace_id, slug) VALUES (%s, %s, %s)",
            [_PROJECT_ID, workspace, PROJECT],
        )
        reports = list(_reports(datetime.now(UTC)))
        for report in reports:
            if report.session == TRIAGED_SESSION and report.number < _POSTED:
                _store(connection, organization, report)
        rows = "\n".join(json.dumps(report.span()) for report in reports)
        clickhouse.client.raw_insert("otel_traces", insert_block=rows.encode(), fmt="JSONEachRow")


def _reports(now: datetime) -> Iterator[_Report]:
    noon = now.replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)
    for hour, session in enumerate((LOST_SESSION, TRIAGED_SESSION)):
        for number in range(_ITEMS):
            yield _Report(session, number, noon + timedelta(hours=hour, seconds=number))


def _store(connection: Connection, organization: UUID, report: _Report) -> None:
    """The row that the API made of a report, and what people did with it since."""
    envelope = report.envelope
    columns = {name: value for name, value in envelope.items() if name not in _NOT_STORED}
    connection.execute(
        "INSERT INTO items (organization_id, project_id, item_type, dedupe_key, ref, title,"
        " schema_ref, session_id, trace_id, span_id, capability, capability_version, data,"
        " disposition, source, created_at)"
        " VALUES (%(organization_id)s, %(project_id)s, %(item_type)s, %(dedupe_key)s, %(ref)s,"
        " %(title)s, %(schema_ref)s, %(session_id)s, %(trace_id)s, %(span_id)s, %(capability)s,"
        " %(capability_version)s, %(data)s, %(disposition)s, 'runtime', %(created_at)s)",
        {
            **columns,
            "organization_id": organization,
            "project_id": _PROJECT_ID,
            "title": "untitled" if report.number % 3 == 0 else envelope["title"],
            "data": Jsonb(envelope["data"]),
            "disposition": Jsonb(_DECISIONS[report.number % len(_DECISIONS)]),
            "created_at": report.started,
        },
    )


_NOT_STORED = ("status", "notes", "links")
