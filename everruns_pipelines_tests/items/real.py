"""The public SDK's real output, as it lies before a rebuild, and what must come of it."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from psycopg.types.json import Jsonb

from everruns_pipelines.items.accounting import Rebuilt
from everruns_pipelines_tests.items.world import Row, World, exact

_SAMPLE = Path(__file__).parent / "sample"
META = json.loads((_SAMPLE / "meta.json").read_text())
REAL_PROJECT = UUID(META["project_id"])


def lines(name: str) -> list[Row]:
    return [json.loads(line) for line in (_SAMPLE / name).read_text().splitlines()]


def lay(world: World) -> None:
    """Add the sample's spans, the items that were posted, and what people decided."""
    world.add_project(
        META["project"],
        REAL_PROJECT,
        workspace=("red", UUID(META["workspace_id"])),
        organization=("sample", UUID(META["org_id"])),
    )
    world.insert((_SAMPLE / "spans.jsonl").read_bytes())
    for post in lines("posts.jsonl"):
        body = {name: post["body"].get(name) for name in _POSTED}
        world.post(
            "posted",
            **body,
            id=post["id"],
            organization_id=post["organization_id"],
            project_id=post["project_id"],
        )
    for disposition in lines("dispositions.jsonl"):
        patch = disposition["patch"]
        decided = {name: patch[name] for name in ("status", "notes") if patch.get(name) is not None}
        if decided:
            world.connection.execute(
                "UPDATE items SET disposition = %s WHERE id = %s",
                [Jsonb(decided), disposition["item_id"]],
            )
        if "title" in patch:
            world.connection.execute(
                "UPDATE items SET title = %s WHERE id = %s",
                [patch["title"], disposition["item_id"]],
            )
        if "data" in patch:
            world.connection.execute(
                "UPDATE items SET data = data || %s WHERE id = %s",
                [Jsonb(patch["data"]), disposition["item_id"]],
            )


_POSTED = (
    "item_type", "data", "source", "ref", "dedupe_key", "title", "session_id", "trace_id",
    "span_id", "capability", "capability_version", "schema_ref",
)  # fmt: skip


RUNS = {row["SpanAttributes"]["dreadnode.run.id"] for row in lines("spans.jsonl")}
TRACES = {row["TraceId"] for row in lines("spans.jsonl")}


def rebuild_all(world: World, runs: Iterable[str] = RUNS, **options: Any) -> Rebuilt:
    """Rebuild every run of the sample, or those named, and one of its sessions."""
    session = META["sessions"][0]["session_id"]
    scope = {"organization": "sample", "project": META["project"]}
    return world.rebuild(session, run_ids=tuple(runs), **scope, **options)


def check(world: World, before: dict[str, Row], done: Rebuilt) -> None:
    """Compare, row by row, what a rebuild of everything has made of the items that stood before."""
    expected = expected_items(before)
    after = world.items(REAL_PROJECT)
    assert after.keys() == expected.keys()
    for dedupe_key, row in expected.items():
        assert {name: after[dedupe_key][name] for name in row} == row
    assert (done.inserted, done.processed) == (len(after) - len(before), len(after))
    assert (done.rejected, done.offloaded) == (5, 1)


def expected_items(before: dict[str, Row]) -> dict[str, Row]:
    """What the table must hold, from the reporter's side alone."""
    ends = {row["SpanId"]: _end(row) for row in lines("spans.jsonl")}
    # The SDK's tool reports one item a span: there the platform's refusal is that item's.
    refused = {
        row["SpanId"]
        for row in lines("spans.jsonl")
        if "Item was not saved" in row["SpanAttributes"].get("dreadnode.tool.error", "")
        and row["SpanAttributes"]["dreadnode.outputs"].count('"name":"item"') == 1
    }
    expected: dict[str, Row] = {}
    refs: dict[str, str] = {row["ref"]: holder for holder, row in before.items() if row["ref"]}
    for truth in lines("truth.jsonl"):
        if truth["kind"] != "item" or truth["in_span"] != "inline":
            continue
        ref, dedupe_key = truth["ref"], truth["dedupe_key"]
        if ref and refs.setdefault(ref, dedupe_key) != dedupe_key:
            continue
        known = before.get(dedupe_key)
        if known is None and truth["span_id"] in refused:
            continue
        data = exact(truth["data_in_span"])
        if known is not None and _sorted(known["data"]) == _sorted(data):
            data = known["data"]
        kept = (
            {name: known[name] for name in ("id", "source", "disposition", "created_at")}
            if known
            else {
                "source": "extracted",
                "disposition": None,
                "created_at": ends[truth["span_id"]],
            }
        )
        expected[dedupe_key] = {
            **kept,
            "data": data,
            **{name: truth[name] for name in _DERIVED},
        }
    return expected


_DERIVED = (
    "item_type", "title", "ref", "trace_id", "span_id", "capability", "capability_version",
    "schema_ref",
)  # fmt: skip


def _end(span: Row) -> datetime:
    """A span's end, cut to microseconds, in whole numbers."""
    seconds, _, fraction = span["Timestamp"].partition(".")
    start = datetime.fromisoformat(seconds).replace(tzinfo=UTC)
    return start + timedelta(microseconds=(int(fraction) + int(span["Duration"])) // 1000)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(child) for name, child in cast("Row", value).items()}
    if isinstance(value, list):
        return sorted((_sorted(child) for child in cast("list[Any]", value)), key=json.dumps)
    return value
