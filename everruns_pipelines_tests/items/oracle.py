"""What the tables must hold after a day's rebuild, worked out in plain Python, item by item.

Independent of the rebuild: it starts from what agents reported, not from span attributes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from uuid import UUID

from everruns_pipelines_tests.items.world import Row, exact

_KNOWN_STATUS = {"open", "triaged", "verified", "resolved", "dismissed"}
_LIMITS = {"title": 512, "ref": 128, "capability": 255, "capability_version": 64}
_TEXTS = (*_LIMITS, "schema_ref", "session_id", "trace_id", "span_id", "status", "notes")
DERIVED = (
    "item_type", "title", "ref", "session_id", "trace_id", "span_id", "capability",
    "capability_version", "schema_ref", "data",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One output named `item`: where it stands, and the value an agent gave."""

    value: Any
    trace_id: str
    span_id: str
    ended: datetime
    position: int
    is_readable: bool = True

    @property
    def is_object(self) -> bool:
        return isinstance(self.value, dict)

    @property
    def fields(self) -> Row:
        return cast("Row", self.value)

    @property
    def order(self) -> Any:
        return self.ended, self.trace_id, self.span_id, self.position


def expected_items(
    reports: Iterable[Report], before: dict[str, Row]
) -> tuple[dict[str, Row], set[str | None]]:
    """The table's rows by dedupe key, and the keys that are rejected."""
    rejected: list[str | None] = []
    valid: dict[str, Report] = {}
    for report in sorted(reports, key=lambda report: report.order):
        if not report.is_object and report.is_readable:
            continue
        if report.is_readable and _is_sound(report.fields):
            valid.setdefault(report.fields["dedupe_key"], report)
        else:
            rejected.append(_key(report.fields if report.is_object else {}))
    waiting = dict(sorted(valid.items(), key=lambda entry: (entry[1].ended, entry[0])))
    after = dict(before)
    # Whoever is given another ref sets its old one free, and that may go to somebody who waits.
    while given := _given(waiting, after):
        for key in given:
            after[key] = _row(waiting.pop(key), before.get(key))
    lost = set(waiting)
    # A sound copy that is stored speaks for the others.
    return after, {*rejected, *lost} - (valid.keys() - lost)


def _given(waiting: dict[str, Report], table: dict[str, Row]) -> list[str]:
    """Who can be stored as the table is: refs go to their holder, else to the first who asks."""
    taken = {row["ref"]: key for key, row in table.items() if row["ref"]}
    return [
        key
        for key, report in waiting.items()
        if not report.fields["ref"] or taken.setdefault(report.fields["ref"], key) == key
    ]


def _row(report: Report, known: Row | None) -> Row:
    value = report.fields
    session = _uuid(value["session_id"])
    data = value["data"]
    if value["session_id"] is not None and session is None:
        metadata = data.setdefault("metadata", {})
        if isinstance(metadata, dict):
            metadata["session_ref"] = value["session_id"]
    derived: Row = {name: value[name] for name in DERIVED}
    derived |= {
        "ref": value["ref"] or None,
        "session_id": session,
        "trace_id": report.trace_id if value["trace_id"] is None else value["trace_id"],
        "span_id": report.span_id if value["span_id"] is None else value["span_id"],
        "data": exact(data),
    }
    if known is not None:
        if _sorted(known["data"]) == _sorted(derived["data"]):
            derived["data"] = known["data"]
        return {**known, **derived}
    status = value["status"] if value["status"] in _KNOWN_STATUS else None
    disposition = {"status": status, "notes": value["notes"]} if status or value["notes"] else None
    return {
        **derived,
        "source": "extracted",
        "created_at": report.ended,
        "disposition": disposition,
    }


def _is_sound(value: Row) -> bool:
    for name, longest in (("item_type", 64), ("dedupe_key", 64)):
        text = value.get(name)
        if not isinstance(text, str) or not 1 <= len(text) <= longest:
            return False
    for name in _TEXTS:
        text = value.get(name)
        if text is not None and not isinstance(text, str):
            return False
        if name in _LIMITS and len(text or "") > _LIMITS[name]:
            return False
    return isinstance(value.get("data"), dict) and isinstance(value.get("links"), list | None)


def _key(fields: Row) -> str | None:
    key: Any = fields.get("dedupe_key")
    return key if isinstance(key, str) and 1 <= len(key) <= 64 else None


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        return None


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(child) for name, child in cast("Row", value).items()}
    if isinstance(value, list):
        children = (_sorted(child) for child in cast("list[Any]", value))
        return sorted(children, key=lambda child: json.dumps(child, sort_keys=True))
    return value
