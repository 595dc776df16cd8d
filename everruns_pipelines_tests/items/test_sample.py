"""The public SDK's real output, rebuilt and compared row by row with what was reported."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb

from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.world import Row, World, exact

_SAMPLE = Path(__file__).parent / "sample"
_META = json.loads((_SAMPLE / "meta.json").read_text())
_PROJECT = UUID(_META["project_id"])


def _lines(name: str) -> list[Row]:
    return [json.loads(line) for line in (_SAMPLE / name).read_text().splitlines()]


@pytest.fixture
def sample(world: World) -> World:
    """The sample as it lies before a rebuild: spans, posted items, and what people decided."""
    world.add_project(
        _META["project"],
        _PROJECT,
        workspace=("red", UUID(_META["workspace_id"])),
        organization=("sample", UUID(_META["org_id"])),
    )
    world.insert((_SAMPLE / "spans.jsonl").read_bytes())
    for post in _lines("posts.jsonl"):
        body = {name: post["body"].get(name) for name in _POSTED}
        world.post(
            "posted",
            **body,
            id=post["id"],
            organization_id=post["organization_id"],
            project_id=post["project_id"],
        )
    for disposition in _lines("dispositions.jsonl"):
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
    return world


_POSTED = (
    "item_type", "data", "source", "ref", "dedupe_key", "title", "session_id", "trace_id",
    "span_id", "capability", "capability_version", "schema_ref",
)  # fmt: skip


def _rebuild(world: World, session: str) -> Any:
    return world.rebuild(session, organization="sample", project=_META["project"])


def _expected(before: dict[str, Row]) -> dict[str, Row]:
    """What the table must hold, from the reporter's side alone."""
    ends = {row["SpanId"]: _end(row) for row in _lines("spans.jsonl")}
    # The SDK's tool reports one item a span: there the platform's refusal is that item's.
    refused = {
        row["SpanId"]
        for row in _lines("spans.jsonl")
        if "Item was not saved" in row["SpanAttributes"].get("dreadnode.tool.error", "")
        and row["SpanAttributes"]["dreadnode.outputs"].count('"name":"item"') == 1
    }
    expected: dict[str, Row] = {}
    refs: dict[str, str] = {row["ref"]: holder for holder, row in before.items() if row["ref"]}
    for truth in _lines("truth.jsonl"):
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


@pytest.mark.parametrize("generation", GENERATIONS)
def test_all_runs_of_the_sample_row_by_row(sample: World) -> None:
    before = sample.items(_PROJECT)
    expected = _expected(before)
    runs = tuple({row["SpanAttributes"]["dreadnode.run.id"] for row in _lines("spans.jsonl")})
    done = sample.rebuild(
        _META["sessions"][0]["session_id"],
        run_ids=runs,
        organization="sample",
        project=_META["project"],
    )
    after = sample.items(_PROJECT)
    assert after.keys() == expected.keys()
    for dedupe_key, row in expected.items():
        assert {name: after[dedupe_key][name] for name in row} == row
    assert (done.inserted, done.processed) == (len(after) - len(before), len(after))
    assert (done.rejected, done.offloaded) == (5, 1)


def test_the_kinds_of_the_sample(sample: World) -> None:
    sessions = {one["kind"]: one["session_id"] for one in _META["sessions"]}
    assert _rebuild(sample, sessions["post_failed"]).inserted == 4
    assert _rebuild(sample, sessions["many_in_one_span"]).processed == 12
    decoys = _rebuild(sample, sessions["decoys"])
    assert (decoys.processed, decoys.rejected) == (1, 3)
    triaged = _rebuild(sample, sessions["triaged_then_rebuilt"])
    assert (triaged.inserted, triaged.refreshed, triaged.unchanged) == (0, 2, 5)
    listed = _rebuild(sample, sessions["list_order"])
    assert (listed.processed, listed.refreshed) == (2, 0)
    reused = _rebuild(sample, sessions["ref_reused"])
    assert (reused.processed, reused.rejected) == (1, 1)
    offloaded = _rebuild(sample, sessions["large_offloaded"])
    assert (offloaded.processed, offloaded.offloaded) == (2, 1)


def test_a_day_of_the_sample_is_what_its_sessions_are(sample: World) -> None:
    done = sample.rebuild_day()
    expected = _expected({})
    assert done.processed == len(expected)
    assert sample.items(_PROJECT).keys() == expected.keys()
    again = sample.rebuild_day(dry_run=True)
    assert (again.inserted, again.refreshed, again.links_created) == (0, 0, 0)
