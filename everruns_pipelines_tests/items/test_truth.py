"""What the platform refused, what people edited, what counts as the same."""

import pytest

from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.world import ORGANIZATION, Span, World, envelope, key, name_id

_REFUSED = {"dreadnode.tool.error": "ValueError: Item was not saved to the platform: 422: no"}
_FAILED = {"dreadnode.tool.error": "ConnectionError: the platform cannot be reached"}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_the_platform_refused_is_kept_out(world: World) -> None:
    world.post("stands")
    world.add(
        Span([envelope("refused")], name="refused", attributes=_REFUSED),
        Span([envelope("again")], name="again"),
        Span([envelope("failed")], name="failed", attributes=_FAILED),
        Span([envelope("stands")], name="stands", attributes=_REFUSED),
        Span([envelope("a"), envelope("b")], name="several", attributes=_REFUSED),
    )
    done = world.rebuild()
    assert world.items().keys() == {key(name) for name in ("again", "failed", "stands", "a", "b")}
    assert (done.rejected, world.reasons()) == (1, {key("refused"): "refused_by_platform"})
    world.post("refused")
    assert world.rebuild().rejected == 0
    assert world.reasons() == {}


def test_edits_that_are_taken_back_are_named_without_their_values(world: World) -> None:
    edited = world.post("edited", title="mine", data={"title": "mine", "severity": "high"})
    world.post("as reported")
    world.add(Span([envelope("edited"), envelope("as reported")]))
    would = world.rebuild(dry_run=True)
    assert would.taken_back == [(str(edited), ["title", "data"])]
    assert world.log[-1:] == [f"Would take back title, data of item {edited}"]
    assert world.items()[key("edited")]["title"] == "mine"
    assert world.rebuild().taken_back == would.taken_back
    assert world.rebuild().taken_back == []


def test_an_item_goes_back_to_the_organization_of_its_project(world: World) -> None:
    elsewhere = name_id("another organization")
    world.connection.execute(
        "INSERT INTO item_organizations (slug, id) VALUES ('umbra', %s)", [elsewhere]
    )
    moved = world.post("moved", organization_id=elsewhere)
    world.add(Span([envelope("moved")]))
    assert world.rebuild().taken_back == [(str(moved), ["organization_id"])]
    assert world.items()[key("moved")]["organization_id"] == ORGANIZATION
    assert world.rebuild().taken_back == []


def test_an_empty_ref_in_the_table_is_none(world: World) -> None:
    world.connection.execute("ALTER TABLE items DROP CONSTRAINT items_ref_check")
    try:
        world.post("one", ref="")
        world.add(Span([envelope("one")]))
        assert world.rebuild().unchanged == 1
    finally:
        world.connection.execute("UPDATE items SET ref = NULL WHERE ref = ''")
        world.connection.execute("ALTER TABLE items ADD CHECK (ref <> '')")
