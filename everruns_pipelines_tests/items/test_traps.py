"""Each trap of the contract, met with the real SDK, and what a rebuild does."""

import json
import random
import string
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from everruns_pipelines_tests.items.world import (
    OTHER_SESSION,
    PROJECT,
    SESSION,
    Row,
    Span,
    World,
    envelope,
    exact,
    exactly,
    key,
    name_id,
    object_of,
)


def test_a_failed_post_is_healed(world: World) -> None:
    span = Span([envelope("one")], nanoseconds=999)
    world.add(span)
    done = world.rebuild()
    assert done.counts() == {
        "processed": 1,
        "inserted": 1,
        "refreshed": 0,
        "unchanged": 0,
        "rejected": 0,
        "offloaded": 0,
        "links_created": 0,
        "links_unresolved": 0,
    }
    item = world.items()[key("one")]
    assert item["source"] == "extracted"
    assert item["created_at"] == span.ended
    assert (item["trace_id"], item["span_id"]) == (span.trace_id, span.span_id)
    assert item["disposition"] is None
    assert item["created_by"] is None
    assert str(item["session_id"]) == SESSION


def test_the_span_end_is_cut_to_microseconds_not_rounded(world: World) -> None:
    span = Span([envelope("one")], nanoseconds=999, duration=1_999_000)
    before_1970 = replace(
        span, items=[envelope("old")], name="old", start=datetime(1969, 12, 31, tzinfo=UTC)
    )
    world.add(span, before_1970)
    world.rebuild()
    items = world.items()
    assert items[key("one")]["created_at"] == span.start + timedelta(microseconds=1999)
    assert items[key("old")]["created_at"] == before_1970.start + timedelta(microseconds=1999)


def test_a_known_item_keeps_what_people_decided(world: World) -> None:
    kept: dict[str, Any] = {
        "disposition": {"status": "triaged", "notes": "seen"},
        "created_by": name_id("a person"),
        "created_at": datetime(2025, 5, 5, tzinfo=UTC),
        "source": "api",
    }
    item_id = world.post("one", title="edited", data={"edited": True}, **kept)
    world.add(Span([envelope("one", status="open", notes="from the span")]))
    assert world.rebuild().refreshed == 1
    item = world.items()[key("one")]
    assert item["id"] == item_id
    assert {name: item[name] for name in kept} == kept
    assert item["title"] == "title of one"
    assert item["data"] == exact(envelope("one")["data"])
    assert item["updated_at"] > datetime(2025, 12, 31, tzinfo=UTC)


def test_a_row_that_would_not_change_is_not_written(world: World) -> None:
    world.post("one")
    world.add(Span([envelope("one"), envelope("two")]))
    world.rebuild()
    before = world.items()
    done = world.rebuild()
    assert (done.unchanged, done.inserted, done.refreshed) == (2, 0, 0)
    assert world.items() == before


def test_list_order_of_the_stored_row_is_kept(world: World) -> None:
    reported: Row = {"tags": ["c", "a", "b"], "deep": [{"x": [3, 1]}, {"x": [2]}], "n": 1}
    in_span: Row = {"tags": ["a", "b", "c"], "deep": [{"x": [2]}, {"x": [1, 3]}], "n": 1}
    reported["numbers"] = [1.0, 1, 2, 1e22]
    in_span["numbers"] = [1, 2, 1e22, 1.0]
    world.post("one", data=reported)
    world.add(Span([envelope("one", data=in_span)]))
    before = world.items()
    assert world.rebuild().unchanged == 1
    assert world.items() == before


def test_list_order_is_kept_while_other_columns_are_refreshed(world: World) -> None:
    world.post("one", data={"tags": ["c", "a"]}, title="edited")
    world.add(Span([envelope("one", data={"tags": ["a", "c"]})]))
    assert world.rebuild().refreshed == 1
    item = world.items()[key("one")]
    assert (item["title"], item["data"]) == ("title of one", {"tags": ["c", "a"]})


def test_what_differs_in_more_than_list_order_is_refreshed(world: World) -> None:
    pairs: list[tuple[Any, Any]] = [
        ({"a": [[1, 2], [3]]}, {"a": [[1, 3], [2]]}),
        ({"a": [1, 1, 2]}, {"a": [1, 2, 2]}),
        ({"a": [1, 2]}, {"a": [1, 2, 2]}),
        ({"a": 1}, {"a": 1.0}),
        ({"a": [1, 1.0, 1]}, {"a": [1.0, 1, 1.0]}),
        ({"a": [{"x": 1, "y": 1.0}, 2]}, {"a": [2, {"x": 1.0, "y": 1}]}),
        ({"a": ["1", "22"]}, {"a": ["12", "2"]}),
        ({"a": None}, {"b": None}),
        ({"a": {}}, {"a": []}),
    ]
    for number, (stored, _) in enumerate(pairs):
        world.post(str(number), data=stored)
    world.add(Span([envelope(str(n), data=in_span) for n, (_, in_span) in enumerate(pairs)]))
    assert world.rebuild().refreshed == len(pairs)
    items = world.items()
    for number, (_, in_span) in enumerate(pairs):
        assert items[key(str(number))]["data"] == exact(in_span)


def test_list_order_is_kept_below_many_levels(world: World) -> None:
    def nested(innermost: list[int]) -> Any:
        value: Any = innermost
        for level in range(90):
            value = {"k": value} if level % 2 else [value, 0]
        return {"a": value}

    world.post("one", data=nested([2, 1]))
    world.add(Span([envelope("one", data=nested([1, 2]))]))
    before = world.items()
    assert world.rebuild().unchanged == 1
    assert world.items() == before


def test_lists_nested_beyond_reason_do_not_break_the_batch(world: World) -> None:
    def nested(first: int, second: int) -> Any:
        value: Any = [first, second]
        for _ in range(500):
            value = [value]
        return {"a": value}

    world.post("one", data=nested(2, 1))
    world.add(Span([envelope("one", data=nested(1, 2)), envelope("two")]))
    assert world.rebuild().processed == 2
    assert world.items()[key("one")]["data"] == exact(nested(1, 2))


_BEYOND: list[dict[str, Any]] = [
    {"item_type": ""},
    {"item_type": "x" * 65},
    {"item_type": None},
    {"item_type": 5},
    {"dedupe_key": ""},
    {"dedupe_key": "x" * 65},
    {"dedupe_key": None},
    {"dedupe_key": ["x"]},
    {"title": "x" * 513},
    {"title": {"a": 1}},
    {"ref": "x" * 129},
    {"ref": 7},
    {"capability": "x" * 256},
    {"capability_version": "x" * 65},
    {"capability_version": 1.4},
    {"data": None},
    {"data": []},
    {"data": "text"},
    {"links": "text"},
    {"schema_ref": 1},
    {"session_id": 5},
    {"trace_id": 5},
    {"span_id": []},
    {"status": 5},
    {"notes": []},
]


def test_a_refused_report_is_judged_by_the_limits_and_its_neighbours_live(world: World) -> None:
    for number, changes in enumerate(_BEYOND):
        around = (envelope(f"before {number}"), envelope(f"after {number}"))
        broken = envelope(f"broken {number}", **changes)
        world.add(Span([around[0], broken, around[1]], name=f"span {number}"))
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (2 * len(_BEYOND), len(_BEYOND))
    told = {row["span_id"]: row for row in world.rejections()}
    for number, changes in enumerate(_BEYOND):
        rejection = told[Span(name=f"span {number}").span_id]
        assert rejection["reason"] == "invalid_field"
        assert rejection["detail"].split()[0] in changes
        assert rejection["run_id"] == Span().run
        assert {key(f"before {number}"), key(f"after {number}")} <= world.items().keys()


def test_a_value_at_the_limit_is_stored(world: World) -> None:
    at_the_limit: list[dict[str, Any]] = [
        {"item_type": "x" * 64},
        {"dedupe_key": "é" * 64},
        {"title": "😀" * 512},
        {"title": None},
        {"ref": "é" * 128},
        {"capability": "x" * 255, "capability_version": "x" * 64},
        {"capability": None, "capability_version": None, "schema_ref": None},
    ]
    envelopes = [envelope(str(number), **changes) for number, changes in enumerate(at_the_limit)]
    world.add(Span(envelopes))
    assert world.rebuild().inserted == len(envelopes)
    items = world.items()
    for changes, reported in zip(at_the_limit, envelopes, strict=True):
        item = items[reported["dedupe_key"]]
        assert {name: item[name] for name in changes} == changes


def test_a_rejected_envelope_leaves_the_stored_row_as_it_is(world: World) -> None:
    world.post("one", title="stored")
    world.add(Span([envelope("one", title="x" * 513)]))
    before = world.items()
    done = world.rebuild()
    assert (done.processed, done.rejected) == (0, 1)
    assert world.items() == before


def test_one_ref_in_two_envelopes_goes_to_the_earlier_span_end(world: World) -> None:
    later = Span([envelope("a", ref="web-1")], name="later", duration=9_000_000)
    earlier = Span([envelope("b", ref="web-1")], name="earlier", duration=1_000_000)
    world.add(later, earlier)
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 1)
    assert world.items().keys() == {key("b")}
    assert world.reasons() == {key("a"): "ref_conflict"}


def test_whoever_holds_a_ref_in_the_table_keeps_it(world: World) -> None:
    world.post("holder", ref="web-1", session_id=None)
    world.add(Span([envelope("a", ref="web-1")]))
    before = world.items()
    assert world.rebuild().rejected == 1
    assert world.items() == before


def test_an_item_made_by_hand_keeps_its_ref_too(world: World) -> None:
    world.post("by hand", ref="web-1", dedupe_key=None)
    world.add(Span([envelope("a", ref="web-1")]))
    assert world.rebuild().rejected == 1


def test_the_holder_of_a_ref_wins_against_an_earlier_envelope(world: World) -> None:
    world.post("a", ref="web-1")
    world.add(
        Span([envelope("a", ref="web-1")], name="later", duration=9_000_000),
        Span([envelope("b", ref="web-1")], name="earlier", duration=1_000_000),
    )
    done = world.rebuild()
    assert (done.processed, done.rejected) == (1, 1)
    assert world.reasons() == {key("b"): "ref_conflict"}


def test_refs_that_change_hands_do_not_collide(world: World) -> None:
    world.post("a", ref="x")
    world.post("b", ref="y")
    world.add(Span([envelope("a", ref="y"), envelope("b", ref="x"), envelope("c", ref="z")]))
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 2)
    assert {name: item["ref"] for name, item in world.items().items()} == {
        key("a"): "x",
        key("b"): "y",
        key("c"): "z",
    }


def test_a_ref_that_is_set_free_goes_to_who_waits_for_it_in_the_same_rebuild(
    world: World,
) -> None:
    world.post("a", ref="x")
    world.post("b", ref="y")
    world.add(Span([envelope("c", ref="x"), envelope("a", ref="y"), envelope("b", ref="z")]))
    would = world.rebuild(dry_run=True)
    done = world.rebuild()
    assert would.counts() == done.counts()
    assert (done.inserted, done.refreshed, done.rejected) == (1, 2, 0)
    assert {name: item["ref"] for name, item in world.items().items()} == {
        key("a"): "y",
        key("b"): "z",
        key("c"): "x",
    }
    assert world.rebuild().unchanged == 3


def test_an_empty_ref_is_not_set(world: World) -> None:
    world.add(Span([envelope("a", ref=""), envelope("b", ref="")]))
    assert world.rebuild().inserted == 2
    assert {item["ref"] for item in world.items().values()} == {None}


def test_numbers_survive_exactly(world: World) -> None:
    numbers = [
        "9007199254740993",
        "1e22",
        "1.0",
        "0.10",
        "123456789012345678901234567890.125",
        "18446744073709551616",
        "-0.0000000001",
    ]
    row = Span([envelope(number, data={"n": f"NUMBER {number}"}) for number in numbers]).row()
    attributes = row["SpanAttributes"]
    for number in numbers:
        attributes["dreadnode.objects"] = attributes["dreadnode.objects"].replace(
            f'"NUMBER {number}"', number
        )
    world.add(row)
    assert world.rebuild().inserted == len(numbers)
    for number in numbers:
        assert world.items()[key(number)]["data"] == exactly('{"n": ' + number + "}")


# 76 KB as JSON; as PostgreSQL's text of it more than it can hold.
_HUGE = f"[{','.join(['1e131071'] * 8300)}]"


def _with_huge_numbers(span: Span) -> Row:
    """The span, with `_HUGE` in place of each string HUGE."""
    row = span.row()
    for name in ("dreadnode.outputs", "dreadnode.objects"):
        text = row["SpanAttributes"][name]
        row["SpanAttributes"][name] = text.replace('"HUGE"', _HUGE)
    return row


def test_numbers_whose_text_nobody_can_hold_reject_their_own_item_only(world: World) -> None:
    fields = [name for name in envelope() if name != "links"]
    world.add(
        _with_huge_numbers(Span([envelope("one"), *(envelope(n, **{n: "HUGE"}) for n in fields)]))
    )
    outputs = [
        {"name": "item", "hash": "sound", "attributes": {"dedupe_key": "HUGE"}},
        {"name": "item", "hash": "HUGE"},
        {"name": "HUGE", "hash": "sound"},
        {"name": "item", "hash": "strange"},
        {"name": "item", "hash": "elsewhere"},
    ]
    objects = {
        "sound": object_of(envelope("two")),
        "strange": {"type": "HUGE", "value": envelope("three")},
        "elsewhere": {"type": "uri", "uri": "HUGE"},
    }
    attributes = {
        "dreadnode.outputs": json.dumps(outputs),
        "dreadnode.objects": json.dumps(objects),
    }
    world.add(_with_huge_numbers(Span(attributes=attributes, name="outputs")))
    done = world.rebuild()
    assert (done.inserted, done.rejected, done.offloaded) == (3, len(fields) + 1, 1)
    assert world.items().keys() == {key("one"), key("two"), key("three")}
    assert {row["reason"] for row in world.rejections()} == {
        "invalid_field",
        "object_missing",
        "offloaded",
    }


def test_a_link_of_numbers_whose_text_nobody_can_hold_is_malformed(world: World) -> None:
    links = [
        {"target_ref": "HUGE", "relationship": "x"},
        {"target_item_id": "HUGE", "relationship": "x"},
        {"target_ref": "me", "relationship": "HUGE"},
        {"target_ref": "me", "relationship": "x"},
    ]
    world.add(_with_huge_numbers(Span([envelope("one", ref="me", links=links)])))
    done = world.rebuild()
    assert (done.links_created, done.links_unresolved) == (1, 3)


def test_payloads_of_numbers_whose_text_nobody_can_hold_are_compared(world: World) -> None:
    names = ("grown", "shrunk", "sorted")
    in_span: dict[str, Any] = {"grown": {"n": "HUGE"}, "shrunk": {}, "sorted": {"n": [1, "HUGE"]}}
    stored: dict[str, Any] = {"grown": {}, "shrunk": {"n": "HUGE"}, "sorted": {"n": ["HUGE", 1]}}
    for name in names:
        world.post(name)
        world.connection.execute(
            "UPDATE items SET data = %s::jsonb WHERE dedupe_key = %s",
            [json.dumps(stored[name]).replace('"HUGE"', _HUGE), key(name)],
        )
    world.add(_with_huge_numbers(Span([envelope(name, data=in_span[name]) for name in names])))
    done = world.rebuild()
    assert (done.refreshed, done.unchanged) == (2, 1)
    assert world.rebuild().unchanged == 3


def test_a_session_that_is_no_uuid_goes_into_the_metadata(world: World) -> None:
    cases: list[tuple[Any, Any]] = [
        ({}, {"metadata": {"session_ref": "local-1"}}),
        ({"metadata": {"a": 1}}, {"metadata": {"a": 1, "session_ref": "local-1"}}),
        ({"metadata": None}, {"metadata": None}),
        ({"metadata": [1]}, {"metadata": [1]}),
    ]
    world.add(
        Span(
            [
                envelope(str(n), session_id="local-1", data=data)
                for n, (data, _) in enumerate(cases)
            ],
            session="local-1",
        )
    )
    assert world.rebuild(None, run_ids=(Span().run,)).inserted == len(cases)
    for number, (_, kept) in enumerate(cases):
        item = world.items()[key(str(number))]
        assert (item["session_id"], item["data"]) == (None, exact(kept))


def test_a_session_uuid_is_read_in_every_spelling(world: World) -> None:
    spellings = [
        SESSION.upper(),
        SESSION.replace("-", ""),
        "{" + SESSION + "}",
        f"urn:uuid:{SESSION}",
    ]
    world.add(Span([envelope(text, session_id=text) for text in spellings]))
    assert world.rebuild().inserted == 4
    assert {str(item["session_id"]) for item in world.items().values()} == {SESSION}


def test_the_envelopes_session_counts_for_the_row(world: World) -> None:
    world.add(Span([envelope("one", session_id=OTHER_SESSION)]))
    assert world.rebuild().inserted == 1
    assert str(world.items()[key("one")]["session_id"]) == OTHER_SESSION


def test_a_rebuild_covers_envelopes_that_name_the_session_in_its_traces(world: World) -> None:
    world.add(
        Span(name="of the session"),
        Span(
            [envelope("named"), envelope("not named", session_id=OTHER_SESSION)],
            name="of another",
            session=OTHER_SESSION,
        ),
        Span([envelope("no session at all")], name="elsewhere", trace="elsewhere", session=None),
    )
    done = world.rebuild()
    assert (done.inserted, done.out_of_scope) == (1, 1)
    assert world.items().keys() == {key("named")}


def test_outputs_named_item_that_are_no_envelopes(world: World) -> None:
    world.add(Span([42, [1, 2], "text", None, True, {}, {"foo": "bar"}, envelope("real")]))
    done = world.rebuild()
    assert (done.inserted, done.rejected) == (1, 2)


def test_an_envelope_under_another_name_or_among_arguments_is_no_item(world: World) -> None:
    row = Span([envelope("one")]).row()
    attributes = row["SpanAttributes"]
    attributes["dreadnode.outputs"] = attributes["dreadnode.outputs"].replace('"item"', '"items"')
    other = Span([envelope("two")], name="other")
    other.attributes = {"dreadnode.outputs": '[{"name":"item","hash":"elsewhere"}]'}
    world.add(row, other)
    done = world.rebuild()
    assert (done.processed, done.rejected) == (0, 1)
    assert {row["reason"] for row in world.rejections()} == {"object_missing"}


def test_several_hundred_items_in_one_span(world: World) -> None:
    world.add(Span([envelope(str(number)) for number in range(700)]))
    assert world.rebuild().inserted == 700


def test_a_name_written_with_escapes_is_found(world: World) -> None:
    row = Span([envelope("one")]).row()
    attributes = row["SpanAttributes"]
    attributes["dreadnode.outputs"] = attributes["dreadnode.outputs"].replace(
        '"item"', '"\\u0069tem"'
    )
    world.add(row)
    assert world.rebuild().inserted == 1


def test_at_least_once_delivery_is_removed(world: World) -> None:
    span = Span([envelope("one"), envelope("two", title="x" * 513)])
    world.add(span, span)
    world.add(span)
    done = world.rebuild()
    assert (done.spans, done.processed, done.rejected) == (1, 1, 1)


def test_a_dedupe_key_in_several_spans_is_one_item_of_the_earliest(world: World) -> None:
    first = Span([envelope("one", title="first")], name="z", duration=1000)
    world.add(Span([envelope("one", title="second")], name="a", duration=2000), first)
    assert world.rebuild().processed == 1
    item = world.items()[key("one")]
    assert (item["title"], item["created_at"]) == ("first", first.ended)


def test_a_sound_copy_counts_though_an_earlier_one_is_rejected(world: World) -> None:
    sound = Span([envelope("one")], name="sound", duration=2000)
    world.add(Span([envelope("one", data=[])], name="bad", duration=1000), sound)
    done = world.rebuild()
    assert (done.processed, done.rejected) == (1, 0)
    assert world.items()[key("one")]["created_at"] == sound.ended


def test_pending_spans_are_ignored(world: World) -> None:
    pending = {"logfire.span_type": "pending_span"}
    world.add(Span([envelope("one")], attributes=pending), Span([envelope("two")], name="done"))
    done = world.rebuild()
    assert (done.processed, done.rejected) == (1, 0)


def test_status_and_notes_of_a_new_item_are_its_first_disposition(world: World) -> None:
    cases: list[tuple[Any, Any, Any]] = [
        (None, None, None),
        ("triaged", None, {"status": "triaged", "notes": None}),
        ("open", "look", {"status": "open", "notes": "look"}),
        (None, "look", {"status": None, "notes": "look"}),
        ("who knows", None, None),
        ("who knows", "look", {"status": None, "notes": "look"}),
        ("", "", None),
    ]
    world.add(Span([envelope(str(n), status=s, notes=t) for n, (s, t, _) in enumerate(cases)]))
    world.rebuild()
    for number, (_, _, disposition) in enumerate(cases):
        assert world.items()[key(str(number))]["disposition"] == disposition


def test_links_by_ref_and_id_forward_and_to_oneself(world: World) -> None:
    stored = world.post("stored")
    links = [
        {"target_ref": "later", "relationship": "affects"},
        {"target_ref": "me", "relationship": "same as"},
        {"target_item_id": str(stored), "relationship": "found on"},
        {"target_ref": "never", "relationship": "affects"},
        {"target_ref": "later", "relationship": "affects"},
    ]
    world.add(
        Span([envelope("one", ref="me", links=links)], name="a", duration=1),
        Span([envelope("two", ref="later")], name="b", duration=2),
    )
    done = world.rebuild()
    assert (done.links_created, done.links_unresolved) == (3, 1)
    one = key("one")
    expected = {
        (one, key("two"), "affects"),
        (one, one, "same as"),
        (one, key("stored"), "found on"),
    }
    assert world.links() == expected
    again = world.rebuild()
    assert (again.links_created, again.links_unresolved) == (0, 1)
    assert world.links() == expected


def test_no_default_is_needed_but_that_of_an_items_id(world: World) -> None:
    defaults = {
        ("items", "created_at"): "now()",
        ("items", "updated_at"): "now()",
        ("item_links", "id"): "uuidv7()",
        ("item_links", "created_at"): "now()",
    }
    world.add(
        Span([envelope("one", ref="me", links=[{"target_ref": "me", "relationship": "same as"}])])
    )
    for table, column in defaults:
        world.connection.execute(f"ALTER TABLE {table} ALTER {column} DROP DEFAULT".encode())
    try:
        done = world.rebuild()
    finally:
        for (table, column), default in defaults.items():
            world.connection.execute(
                f"ALTER TABLE {table} ALTER {column} SET DEFAULT {default}".encode()
            )
    assert (done.inserted, done.links_created) == (1, 1)
    assert world.items()[key("one")]["updated_at"] > datetime.now(UTC) - timedelta(minutes=1)


def test_a_malformed_link_is_dropped_and_counted(world: World) -> None:
    links: list[Any] = [
        5,
        None,
        "ref",
        {},
        {"target_ref": "me"},
        {"target_ref": "me", "relationship": ""},
        {"target_ref": 5, "relationship": "x"},
        {"target_item_id": "no uuid", "relationship": "x"},
        {"target_item_id": 5, "relationship": "x"},
        {"target_ref": "me", "relationship": 5},
        [1],
    ]
    world.add(Span([envelope("one", ref="me", links=links * 2)]))
    done = world.rebuild()
    assert (done.processed, done.links_created) == (1, 0)
    assert done.links_unresolved == 2 * len(links)


def test_a_relationship_that_no_index_entry_holds_is_unresolved_and_the_rest_goes_on(
    world: World,
) -> None:
    # Random, or it would be compressed.
    longest = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=2600))
    links = [
        {"target_ref": "me", "relationship": relationship}
        for relationship in (longest, longest + "x", longest * 1000, "é" * 1301, "short")
    ]
    world.add(
        Span([envelope("one", ref="me", links=links)], name="a"),
        Span([envelope("two", title="x" * 513)], name="b"),
    )
    done = world.rebuild()
    assert (done.links_created, done.links_unresolved) == (2, 3)
    assert world.links() == {(key("one"), key("one"), name) for name in (longest, "short")}
    assert world.reasons() == {key("two"): "invalid_field"}


def test_a_rejection_is_replaced_and_goes_once_the_item_is_stored(world: World) -> None:
    world.post("holder", ref="web-1")
    world.add(Span([envelope("one", ref="web-1"), {"no": "key"}]))
    world.rebuild()
    first = world.rejections()
    world.rebuild()
    again = world.rejections()
    assert [row["id"] for row in again] == [row["id"] for row in first]
    assert all(
        new["rejected_at"] > old["rejected_at"] for new, old in zip(again, first, strict=True)
    )
    world.connection.execute("UPDATE items SET ref = NULL")
    assert world.rebuild().inserted == 1
    assert world.reasons() == {None: "invalid_field"}


def test_nothing_of_the_payload_is_told(world: World) -> None:
    secret = "hunter2"
    value = object_of(envelope("one", title=secret * 99, data={"password": secret}))
    world.add(Span(objects=[value, object_of({"x": secret}), object_of(secret)]))
    world.rebuild()
    told = str(world.rejections()) + "".join(world.log)
    assert secret not in told
    assert len(world.rejections()) == 2


def test_items_outside_any_span_stay(world: World) -> None:
    world.post("by hand")
    world.add(Span([envelope("one")]))
    world.rebuild()
    assert world.items(PROJECT).keys() == {key("by hand"), key("one")}
