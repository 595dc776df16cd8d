"""The public SDK's real output, rebuilt and compared row by row with what was reported."""

import pytest

from everruns_pipelines.items.accounting import Rebuilt
from everruns_pipelines_tests.items import real
from everruns_pipelines_tests.items.generations import GENERATIONS
from everruns_pipelines_tests.items.real import META, REAL_PROJECT
from everruns_pipelines_tests.items.world import World


@pytest.fixture
def sample(world: World) -> World:
    real.lay(world)
    return world


def _rebuild(world: World, session: str) -> Rebuilt:
    return world.rebuild(session, organization="sample", project=META["project"])


@pytest.mark.parametrize("generation", GENERATIONS)
def test_all_runs_of_the_sample_row_by_row(sample: World) -> None:
    before = sample.items(REAL_PROJECT)
    real.check(sample, before, real.rebuild_all(sample))


def test_the_kinds_of_the_sample(sample: World) -> None:
    sessions = {one["kind"]: one["session_id"] for one in META["sessions"]}
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
    expected = real.expected_items({})
    assert done.processed == len(expected)
    assert sample.items(REAL_PROJECT).keys() == expected.keys()
    again = sample.rebuild_day(dry_run=True)
    assert (again.inserted, again.refreshed, again.links_created) == (0, 0, 0)
