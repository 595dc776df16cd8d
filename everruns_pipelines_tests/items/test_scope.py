"""Whose items a rebuild may touch, and what it refuses before anything is touched."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from everruns_pipelines.errors import Refusal
from everruns_pipelines.items import span_table
from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.world import (
    ORGANIZATION,
    OTHER_SESSION,
    PROJECT,
    RUN,
    SESSION,
    WORKSPACE,
    Span,
    World,
    envelope,
    key,
    name_id,
)

OTHER = name_id("other project")


@pytest.fixture
def other(world: World) -> UUID:
    """Another project, in a workspace of another organization."""
    world.add_project(
        "other",
        OTHER,
        workspace=("blue", name_id("blue")),
        organization=("rival", name_id("rival")),
    )
    return OTHER


def _error(world: World, **options: Any) -> dict[str, Any]:
    with pytest.raises(Refusal) as raised:
        world.rebuild(**options)
    return raised.value.as_items_error()


def test_neither_session_nor_runs_is_refused(world: World) -> None:
    error = _error(world, session=None)
    assert (error["code"], error["type"]) == ("validation_error", "validation_error")
    assert [field["loc"] for field in error["errors"]] == [["session_id"], ["run_ids"]]
    assert _error(world, session=None, run_ids=())["code"] == "validation_error"


@pytest.mark.parametrize("session", ["local-1", "", "123", SESSION + "0"])
def test_a_session_that_is_no_uuid_is_refused(world: World, session: str) -> None:
    error = _error(world, session=session)
    assert error["code"] == "validation_error"
    assert error["errors"][0]["loc"] == ["session_id"]


@pytest.mark.parametrize("run", ["", "a\0b", "a\udcff"])
def test_a_run_that_no_span_can_name_is_refused(world: World, run: str) -> None:
    error = _error(world, run_ids=("sound", run))
    assert error["code"] == "validation_error"
    assert [field["loc"] for field in error["errors"]] == [["run_ids", "1"]]


@pytest.mark.parametrize("which", ["organization", "workspace", "project"])
@pytest.mark.parametrize("name", ["unknown", str(OTHER), "", "a\0b", "a\udcff"])
def test_an_unknown_scope_is_refused(world: World, which: str, name: str) -> None:
    error = _error(world, **{which: name})
    assert error["code"] == "not_found_error"
    assert error["errors"][0]["loc"] == [which]


@pytest.mark.usefixtures("other")
def test_a_scope_of_another_organization_is_not_found(world: World) -> None:
    assert _error(world, project="other")["errors"][0]["loc"] == ["project"]
    assert _error(world, project=str(OTHER))["errors"][0]["loc"] == ["project"]
    assert _error(world, workspace="blue")["errors"][0]["loc"] == ["workspace"]


def test_all_three_may_be_named_by_uuid(world: World) -> None:
    world.add(Span([envelope("one")]))
    done = world.rebuild(
        organization=str(ORGANIZATION), workspace=str(WORKSPACE), project=str(PROJECT).upper()
    )
    assert done.processed == 1


@pytest.mark.parametrize(
    "spelling",
    [
        SESSION.upper(),
        SESSION.replace("-", ""),
        SESSION.replace("-", "").upper(),
        f"{{{SESSION}}}",
        f"{{{SESSION.upper()}}}",
        f"urn:uuid:{SESSION}",
    ],
)
def test_the_session_of_a_span_is_read_in_every_spelling(world: World, spelling: str) -> None:
    world.add(
        Span([envelope("one", session_id=spelling)], session=spelling),
        Span([envelope("two", session_id=None)], session=spelling, name="two"),
    )
    assert world.rebuild().processed == 2
    assert str(world.items()[key("one")]["session_id"]) == SESSION


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("many", [0, 500_000], ids=["large", "small"])
def test_a_session_is_found_in_several_spellings_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, many: int, generation: str
) -> None:
    monkeypatch.setattr(span_table, "_MANY_SPANS", many)
    later = {SESSION: 0, SESSION.upper(): 59, f"urn:uuid:{SESSION}": 9000}
    world.add(
        *(
            Span([envelope(spelling)], session=spelling, name=spelling, trace=spelling, start=start)
            for spelling, minutes in later.items()
            for start in [Span().start + timedelta(minutes=minutes)]
        )
    )
    assert world.rebuild().processed == len(later)


def test_where_a_session_was_not_looked_for_in_other_spellings_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_table, "_MANY_SPANS", 0)
    other = SESSION.upper()
    start = Span().start + timedelta(days=2)
    world.add(
        Span([envelope("one")]),
        Span([envelope("two")], session=other, name="two", trace="2", start=start),
    )
    assert world.rebuild().processed == 1
    [told] = [message for message in world.log if SESSION in message]
    assert "name it as they do, or materialize their days" in told
    assert world.rebuild(other).processed == 2
    assert world.rebuild_day(start.date()).processed == 1


def test_a_session_is_looked_for_as_it_is_named(world: World) -> None:
    mixed = SESSION[:18] + SESSION[18:].upper()
    world.add(Span([envelope("one", session_id=None)], session=mixed))
    assert world.rebuild(mixed).processed == 1


def test_a_database_without_the_platforms_tables_is_refused(world: World) -> None:
    world.connection.execute("ALTER TABLE item_links RENAME TO links_of_items")
    try:
        error = _error(world)
    finally:
        world.connection.execute("ALTER TABLE links_of_items RENAME TO item_links")
    assert error["code"] == "incompatible_schema"
    assert "item_links" in error["detail"]


def test_runs_traces_and_sessions_are_a_union(world: World) -> None:
    world.add(
        Span([envelope("session")], name="1", trace="1"),
        Span([envelope("run")], name="2", trace="2", session=None, run="run-2"),
        Span([envelope("trace")], name="3", trace="3", session=None, run=None),
        Span([envelope("none")], name="4", trace="4", session=None, run="run-4"),
    )
    trace = Span(trace="3").trace_id
    done = world.rebuild(run_ids=("run-2", trace.upper(), "unknown"))
    assert done.processed == 3
    assert world.items().keys() == {key("session"), key("run"), key("trace")}


def test_a_run_id_is_no_session_and_no_other_attribute(world: World) -> None:
    world.add(Span([envelope("one")], run=OTHER_SESSION, attributes={"some.id": RUN}))
    assert world.rebuild(None, run_ids=(SESSION,)).processed == 0
    assert world.rebuild(None, run_ids=(RUN,)).processed == 0


@pytest.mark.parametrize("generation", ["otel_traces_json.sql"])
def test_numbers_and_booleans_that_a_collector_typed_are_what_a_map_has(
    world: World, generation: str
) -> None:
    del generation
    runs: dict[str, Any] = {"42": 42, "true": True, "1.5": 1.5}
    for name, run in runs.items():
        row = Span([envelope(name)], name=name).row()
        row["SpanAttributes"] |= {"dreadnode.run.id": run, "dreadnode.session.id": run}
        world.add(row)
    for number, name in enumerate(runs, start=1):
        assert world.rebuild(None, run_ids=(name,)).processed == 1
        assert len(world.items()) == number


@pytest.mark.usefixtures("other")
def test_another_projects_spans_in_the_same_session_are_left_alone(world: World) -> None:
    world.add(
        Span([envelope("mine")], name="mine"),
        Span([envelope("theirs")], name="theirs", project=str(OTHER)),
        Span([envelope("by slug")], name="by slug", project="other"),
        Span([envelope("nobody's")], name="unknown", project="unknown"),
        Span([envelope("no project")], name="none", project=None),
    )
    assert world.rebuild().processed == 1
    assert world.items().keys() == {key("mine")}
    assert world.items(OTHER) == {}


@pytest.mark.usefixtures("other")
def test_another_projects_span_with_the_same_ids_does_not_hide_mine(world: World) -> None:
    world.add(Span([envelope("theirs")], project=str(OTHER)), Span([envelope("mine")]))
    assert world.rebuild_day().processed == 2
    assert world.items().keys() == {key("mine")}
    assert world.items(OTHER).keys() == {key("theirs")}


@pytest.mark.usefixtures("other")
def test_one_dedupe_key_in_two_projects_is_two_items(world: World) -> None:
    world.post("one", OTHER, title="theirs", organization_id=name_id("rival"))
    theirs = world.items(OTHER)
    world.add(Span([envelope("one")]))
    assert world.rebuild().inserted == 1
    assert world.items(OTHER) == theirs


@pytest.mark.usefixtures("other")
def test_a_link_never_leaves_the_project(world: World) -> None:
    theirs = world.post("theirs", OTHER, ref="web-1", organization_id=name_id("rival"))
    links = [
        {"target_item_id": str(theirs), "relationship": "x"},
        {"target_ref": "web-1", "relationship": "x"},
    ]
    world.add(Span([envelope("one", links=links)]))
    done = world.rebuild()
    assert (done.links_created, done.links_unresolved) == (0, 2)


def test_a_slug_names_a_project_in_spans(world: World) -> None:
    world.add(Span([envelope("one")], project="webapp"))
    world.add(Span([envelope("two")], project=str(PROJECT).upper(), name="capitals"))
    assert world.rebuild().processed == 2


def test_a_project_uuid_may_be_spelled_in_small_and_capital_letters(world: World) -> None:
    mixed = str(PROJECT)[:18] + str(PROJECT)[18:].upper()
    world.add(Span([envelope("one")], project=mixed))
    assert world.rebuild().processed == 1
    assert world.rebuild_day().processed == 1


@pytest.mark.parametrize("slug", ["ABCDEF" * 5 + "AB", str(name_id("no project")).upper()])
def test_a_slug_in_capitals_that_looks_like_a_uuid_names_its_project(
    world: World, slug: str
) -> None:
    world.add_project(slug, OTHER)
    world.add(Span([envelope("one")], project=slug))
    assert world.rebuild(project=slug).processed == 1
    assert world.rebuild_day().processed == 1
    world.add_project(slug.lower(), name_id("a third"))
    assert world.rebuild(project=slug).processed == 0
    assert world.rebuild_day().spans_of_unknown_projects == 1


def test_a_slug_that_two_projects_share_names_neither(world: World) -> None:
    world.add_project("webapp", OTHER, workspace=("blue", name_id("blue")))
    world.add(Span([envelope("one")], project="webapp"))
    assert world.rebuild().processed == 0
    done = world.rebuild_day()
    assert (done.processed, done.spans_of_unknown_projects) == (0, 1)


def test_a_slug_that_is_another_projects_uuid_does_not_name_mine(world: World) -> None:
    world.add_project(str(PROJECT), OTHER, workspace=("blue", name_id("blue")))
    world.add(Span([envelope("one")]))
    assert world.rebuild(project=str(OTHER), workspace="blue").processed == 0
    assert world.rebuild_day().processed == 1
    assert world.items().keys() == {key("one")}


@pytest.mark.usefixtures("other")
def test_a_day_covers_all_known_projects_and_items_without_a_session(world: World) -> None:
    world.add(
        Span([envelope("mine", session_id=None)], session=None, run=None),
        Span([envelope("theirs")], name="theirs", project="other"),
        Span([envelope("unknown")], name="unknown", project="unknown"),
    )
    done = world.rebuild_day()
    assert (done.processed, done.spans_of_unknown_projects) == (2, 1)
    assert world.items()[key("mine")]["session_id"] is None
    assert world.items(OTHER)[key("theirs")]["organization_id"] == name_id("rival")
