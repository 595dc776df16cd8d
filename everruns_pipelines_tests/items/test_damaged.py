"""Spans whose attributes strict parsers refuse: what can be saved is, the rest is told."""

import json
import tracemalloc

import pytest

from everruns_pipelines.items.envelope import read_damaged
from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.world import (
    OTHER_SESSION,
    SESSION,
    Row,
    Span,
    World,
    envelope,
    exact,
    key,
    object_of,
)


def _neighbours(poison: str, name: str = "poison") -> Row:
    """A span of three items, the middle one with `poison` in place of a string."""
    middle = envelope(name, data={"text": "POISON"})
    row = Span([envelope(f"{name} before"), middle, envelope(f"{name} after")], name=name).row()
    attributes = row["SpanAttributes"]
    attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace('"POISON"', poison)
    return row


def test_a_poisoned_item_is_rejected_and_its_neighbours_are_recovered(world: World) -> None:
    poisons = {
        "NaN": "invalid_json",
        "Infinity": "invalid_json",
        "-Infinity": "invalid_json",
        '"\\ud800"': "invalid_json",
        '"\\udc00 alone"': "invalid_json",
        '"\\u0000"': "unstorable_text",
        "1e400000": "invalid_json",
        "01": "invalid_json",
        "[1,]": "invalid_json",
        '"tab \t inside"': "invalid_json",
        "'single'": "invalid_json",
        "[" * 1100 + "]" * 1100: "too_deep",
    }
    world.add(*(_neighbours(poison, f"poison {n}") for n, poison in enumerate(poisons)))
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (2 * len(poisons), len(poisons))
    assert world.reasons() == {
        key(f"poison {number}"): reason for number, reason in enumerate(poisons.values())
    }


def test_what_one_parser_takes_and_the_other_does_not_still_leaves_the_neighbours(
    world: World,
) -> None:
    """ClickHouse calls it valid JSON, PostgreSQL does not: the whole statement fails at first."""
    world.add(
        _neighbours("1e-99999999999", "tiny"),
        Span([envelope("far away")], name="another span"),
    )
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (3, 1)
    assert world.reasons() == {key("tiny"): "invalid_json"}


def test_a_number_beyond_64_bits_is_no_damage(world: World) -> None:
    world.add(_neighbours("1" * 400, "huge"))
    assert world.rebuild().inserted == 3


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bytes_that_are_no_utf8_reject_their_item_only(world: World, generation: str) -> None:
    # Of JSON the collector has made U+FFFD: the engine takes no other bytes.
    damage = "\ufffd".encode() if "json" in generation else b"\xff\xfe"
    rows = json.dumps(_neighbours('"BYTES"')).encode().replace(b"BYTES", damage)
    world.insert(rows)
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (2, 1)
    assert world.reasons() == {key("poison"): "invalid_json"}


def test_ids_that_are_no_utf8_or_hold_nul_do_not_stop_the_copy(world: World) -> None:
    row = Span([envelope("one")]).row() | {"SpanId": "NUL\0 and BYTES"}
    world.insert(json.dumps(row).encode().replace(b"BYTES", b"\xff\\b\\t\\n\\\\"))
    assert world.rebuild().inserted == 1


def test_objects_cut_in_mid_text_keep_what_is_whole(world: World) -> None:
    row = Span([envelope("first"), envelope("second"), envelope("third")]).row()
    attributes = row["SpanAttributes"]
    text = attributes["dreadnode.objects"]
    attributes["dreadnode.objects"] = text[: text.index("title of second") + 9]
    world.add(row)
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 2)
    assert world.reasons() == {key("second"): "object_missing", key("third"): "object_missing"}


def test_outputs_cut_in_mid_text_keep_what_is_whole(world: World) -> None:
    row = Span([envelope("first"), envelope("second")]).row()
    attributes = row["SpanAttributes"]
    attributes["dreadnode.outputs"] = attributes["dreadnode.outputs"][:-30]
    world.add(row)
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 1)
    assert world.reasons() == {None: "unreadable_span"}


def test_of_two_damaged_deliveries_the_longer_one_counts(world: World) -> None:
    for number, cut in enumerate((900, 1100, 1300, 1500)):
        row = _neighbours("NaN", f"poison {number}")
        shorter = json.loads(json.dumps(row))
        objects = row["SpanAttributes"]["dreadnode.objects"]
        shorter["SpanAttributes"]["dreadnode.objects"] = objects[:cut]
        world.add(*((row, shorter) if number % 2 else (shorter, row)))
    done = world.rebuild()
    assert (done.spans, done.inserted, done.rejected) == (4, 8, 4)


@pytest.mark.parametrize("outputs", ['[{"na', "item", '{"name": "item"}', '"item"'])
def test_outputs_that_cannot_be_read_leave_one_row(world: World, outputs: str) -> None:
    world.add(Span(attributes={"dreadnode.outputs": outputs}), Span([envelope("one")], name="ok"))
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 1)
    assert world.reasons() == {None: "unreadable_span"}


def test_objects_that_are_gone_leave_a_row_per_item(world: World) -> None:
    for number, objects in enumerate(("", "[]", "null", "{}", None)):
        attributes = {"dreadnode.objects": objects}
        world.add(Span([envelope(str(number))], name=str(number), attributes=attributes))
    done = world.rebuild()
    assert (done.processed, done.rejected) == (0, 5)
    assert world.reasons() == {key(str(number)): "object_missing" for number in range(5)}


def test_a_damaged_span_of_another_session_counts_by_what_its_envelopes_name(
    world: World,
) -> None:
    row = _neighbours("NaN")
    attributes = row["SpanAttributes"]
    attributes["dreadnode.session.id"] = OTHER_SESSION
    attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace(
        Span().session or "", OTHER_SESSION, 1
    )
    world.add(row, Span(name="of the session"))
    done = world.rebuild()
    assert (done.inserted, done.rejected, done.out_of_scope) == (1, 1, 1)
    assert world.items().keys() == {key("poison after")}


def test_a_damaged_envelope_of_another_sessions_span_is_told_if_it_names_the_session(
    world: World,
) -> None:
    poisons = [
        "NaN",
        "[1,]",
        "01",
        "'x'",
        '"\\ud800"',
        '"\\u0000"',
        "[" * 1100 + "]" * 1100,
        '"BYTES"',
    ]
    for number, poison in enumerate(poisons):
        for name, session in (("mine", SESSION), ("theirs", OTHER_SESSION)):
            damaged = envelope(f"{name} {number}", session_id=session, data={"text": "POISON"})
            row = Span([damaged], name=f"{name} {number}", session=OTHER_SESSION).row()
            attributes = row["SpanAttributes"]
            attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace(
                '"POISON"', poison
            )
            world.insert(json.dumps(row).encode().replace(b"BYTES", b"\xff\xfe"))
    world.add(Span(name="of the session"))
    done = world.rebuild()
    assert (done.processed, done.rejected, done.out_of_scope) == (0, len(poisons), len(poisons))
    assert world.reasons().keys() == {key(f"mine {number}") for number in range(len(poisons))}


def test_an_item_of_two_megabytes_in_a_damaged_span(world: World) -> None:
    large = envelope("large", data={"text": 'x\\"{[' * 400_000})
    row = Span([large, envelope("poison", data={"n": "POISON"})]).row()
    attributes = row["SpanAttributes"]
    attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace('"POISON"', "NaN")
    world.add(row)
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 1)
    assert world.items()[key("large")]["data"] == exact(large["data"])


_ONE_ITEM = b'[{"name":"item","hash":"x"}]'


@pytest.mark.parametrize(
    ("outputs", "objects"),
    [
        (b"[" + b"0," * 200_000, b""),
        (_ONE_ITEM, b"{" + b'"":0,' * 80_000),
        (_ONE_ITEM, b'{"x":{"value":{"data":{"x":[' + b"[]," * 130_000 + b"[]]}}}}"),
    ],
    ids=["outputs", "objects", "envelope"],
)
def test_a_dense_text_takes_a_small_multiple_of_its_length(outputs: bytes, objects: bytes) -> None:
    tracemalloc.start()
    try:
        assert len(list(read_damaged(outputs, objects))) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * (len(outputs) + len(objects))


def test_attributes_beyond_all_measure_are_rejected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.items.span_table.LONGEST_ATTRIBUTES", 10_000)
    world.add(
        Span([envelope("large", data={"text": "x" * 10_000})], name="large"),
        Span([envelope("one")], name="ok"),
    )
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 1)
    assert world.reasons() == {None: "too_large"}


def test_the_reader_agrees_with_a_strict_parser_on_sound_text() -> None:
    values = [envelope(f'"quoted\\ {{[,:]}} {n}"', title="\u2028 \u00e9 \\") for n in range(3)]
    outputs, objects = Span(objects=[object_of(value) for value in values]).outputs_and_objects()
    found = list(read_damaged(outputs.encode(), objects.encode()))
    assert [json.loads(one.value or "") for one in found] == values
    assert [one.key_hint for one in found] == [value["dedupe_key"] for value in values]


def test_the_reader_never_fails_wherever_the_text_is_cut() -> None:
    values = [object_of(envelope(f'a "\\ {n}', links=[{"a": [1]}])) for n in range(2)]
    outputs, objects = Span(objects=values).outputs_and_objects()
    for end in range(len(objects)):
        found = list(read_damaged(outputs.encode(), objects[:end].encode()))
        assert len(found) == 2
        for one in found:
            assert one.reason == "object_missing" or json.loads(one.value or "")
    for end in range(len(outputs)):
        found = list(read_damaged(outputs[:end].encode(), objects.encode()))
        assert found[-1].reason == "unreadable_span"
