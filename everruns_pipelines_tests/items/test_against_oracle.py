"""Adversarial spans made from a seed, compared row by row with a recomputation in plain Python.

More worlds in each kind of table: `EVERRUNS_TEST_WORLDS=50 pytest` and the name of this file.
"""

import copy
import json
import os
import random
from typing import Any, cast
from uuid import UUID

import pytest

from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.oracle import DERIVED, Report, expected_items
from everruns_pipelines_tests.items.world import (
    OTHER_SESSION,
    RUN,
    SESSION,
    Row,
    Span,
    World,
    envelope,
    object_of,
)

_COMPARED = (*DERIVED, "source", "created_at", "disposition")
_STRANGE: list[Any] = [
    None, "", 5, 1.5, True, [], {}, "x" * 129, "x" * 513, "é\u2028\"\\/\b\f😀", "r1", "r2",
    "local session", SESSION.upper(), OTHER_SESSION, "open", ["x"], {"a": [3, 1, 2]},
]  # fmt: skip
_FIELDS = list(envelope())
_WORLDS = int(os.environ.get("EVERRUNS_TEST_WORLDS", "1"))


def _payload(chance: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "number", "none"] + (["list", "object"] * 2 if depth < 3 else [])
    match chance.choice(kinds):
        case "list":
            return [_payload(chance, depth + 1) for _ in range(chance.randrange(4))]
        case "object":
            return {str(n): _payload(chance, depth + 1) for n in range(chance.randrange(4))}
        case "number":
            return chance.choice([0, 1, 1.0, -1, 2**53 + 1, 2**64, 10**30, 1e22, 0.1])
        case "text":
            return chance.choice(["", "a", "b", "'\t\n\\N", "\u00e9", "[1,2]", "\\."])
        case _:
            return None


def _reported(chance: random.Random) -> Any:
    if chance.random() < 0.05:
        return chance.choice(_STRANGE)
    value = envelope(str(chance.randrange(120)), data={"payload": _payload(chance)})
    value["ref"] = chance.choice([None, "", *(f"r{n}" for n in range(40))])
    if chance.random() < 0.3:
        value[chance.choice(_FIELDS)] = copy.deepcopy(chance.choice(_STRANGE))
    if chance.random() < 0.1:
        del value[chance.choice(["links", "notes", "title"])]
        value = {**dict.fromkeys(("links", "notes", "title")), **value}
    return value


def _damaged(row: Row, place: str, poison: str) -> Row:
    attributes = row["SpanAttributes"]
    attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace(f'"{place}"', poison)
    return row


def _shuffled(value: Any, chance: random.Random) -> Any:
    if isinstance(value, list):
        children = [_shuffled(child, chance) for child in cast("list[Any]", value)]
        chance.shuffle(children)
        return children
    if isinstance(value, dict):
        return {name: _shuffled(child, chance) for name, child in cast("Row", value).items()}
    return value


@pytest.mark.parametrize(
    ("generation", "seed"),
    [
        (generation, seed)
        for number, generation in enumerate(GENERATIONS)
        for seed in range(number * _WORLDS, (number + 1) * _WORLDS)
    ],
)
def test_a_day_of_adversarial_spans_row_by_row(world: World, seed: int) -> None:
    check(world, lay(world, seed))


def lay(world: World, seed: int) -> list[Report]:
    """Add spans that are made from a seed, and items that stood before; what the spans report."""
    chance = random.Random(seed)
    rows: list[Row] = []
    reports: list[Report] = []
    for number in range(60):
        values = [_reported(chance) for _ in range(chance.randrange(1, 6))]
        poisoned = envelope(f"poisoned {number}", data={"x": "POISON"})
        is_damaged = chance.random() < 0.3
        if is_damaged:
            values.insert(chance.randrange(len(values) + 1), poisoned)
        span = Span(
            objects=[object_of(value) for value in values],
            name=f"{seed} {number}",
            trace=chance.choice("abcdef"),
            session=chance.choice([None, SESSION, OTHER_SESSION, "local"]),
            duration=chance.randrange(10**12),
            nanoseconds=chance.randrange(1000),
        )
        row = span.row()
        if is_damaged:
            poison = chance.choice(["NaN", '"\\ud800"', '"\\u0000"', "1e999999", "[1,]"])
            row = _damaged(row, "POISON", poison)
        rows += [row] * chance.choice([1, 1, 1, 2])
        reports += [
            Report(
                copy.deepcopy(value),
                span.trace_id,
                span.span_id,
                span.ended,
                position,
                is_readable=value is not poisoned,
            )
            for position, value in enumerate(values)
        ]
    for number in range(0, 120, 3):
        data = [r.value["data"] for r in reports if _names(r.value, number)]
        stored = _shuffled(copy.deepcopy(data[0]), chance) if data else {"only": "here"}
        ref = f"r{number // 3}" if number % 2 else None
        world.post(str(number), data=stored, ref=ref, disposition={"status": "open"})
    chance.shuffle(rows)
    world.add(*rows)
    return reports


def check(world: World, reports: list[Report]) -> None:
    """Compare, row by row, what rebuilds make of the reports with a recomputation."""
    before = world.items()
    expected, rejected = expected_items(reports, before)
    done = world.rebuild_day()
    after = world.items()

    assert after.keys() == expected.keys()
    for dedupe_key, row in expected.items():
        compared = {name: _plain(row[name]) for name in _COMPARED}
        assert {name: _plain(after[dedupe_key][name]) for name in _COMPARED} == compared
    assert {row["dedupe_key"] for row in world.rejections()} == rejected
    assert done.inserted == len(after) - len(before)
    again = world.rebuild_day()
    assert (again.inserted, again.refreshed, again.processed) == (0, 0, done.processed)
    assert world.items() == after
    traces = tuple({report.trace_id for report in reports})
    for runs in (traces, (RUN,)):
        same = world.rebuild(None, run_ids=runs, dry_run=True)
        assert (same.inserted, same.refreshed, same.processed) == (0, 0, done.processed)


def _names(value: Any, number: int) -> bool:
    fields = cast("Row", value) if isinstance(value, dict) else {}
    named = fields.get("dedupe_key") == envelope(str(number))["dedupe_key"]
    return named and isinstance(fields.get("data"), dict)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, UUID) else json.loads(json.dumps(value, default=str))
