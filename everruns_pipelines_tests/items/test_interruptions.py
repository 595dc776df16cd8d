"""Rebuilds that are killed, that meet each other or the platform's own writers; dry runs."""

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, LiteralString

import psycopg
import pytest

from everruns_pipelines.databases.sql_files import read_statements
from everruns_pipelines.errors import Refusal
from everruns_pipelines.items import linking, merging
from everruns_pipelines.items.accounting import Rebuilt
from everruns_pipelines.items.database import ensure_schema
from everruns_pipelines_tests.items.world import PROJECT, Span, World, envelope, key

_COUNT = 40


def _many(world: World) -> None:
    links = [{"target_ref": "r0", "relationship": "after"}]
    world.add(
        *(Span([envelope(str(n), ref=f"r{n}", links=links)], name=str(n)) for n in range(_COUNT))
    )


def test_a_dry_run_tells_what_would_change_and_writes_nothing_at_all(world: World) -> None:
    world.post("changed", title="edited", ref="known")
    world.post("same")
    links = [{"target_ref": ref, "relationship": "x"} for ref in ("known", "new", "never")]
    world.add(
        Span(
            [
                envelope("changed", ref="known"),
                envelope("same"),
                envelope("new", ref="new", links=links),
                envelope("bad", title="x" * 513),
            ]
        )
    )
    before = world.items()
    would = world.rebuild(dry_run=True)
    assert world.items() == before
    assert world.links() == set()
    schemas = world.connection.execute(
        "SELECT FROM pg_namespace WHERE nspname = 'everruns_pipelines'"
    ).fetchall()
    assert schemas == []
    did = world.rebuild()
    assert would.counts() == did.counts()
    assert (did.inserted, did.refreshed, did.unchanged, did.rejected) == (1, 1, 1, 1)
    assert (did.links_created, did.links_unresolved) == (2, 1)


def test_a_dry_run_counts_links_by_the_refs_that_items_would_have(world: World) -> None:
    moved, stored = world.post("moved", ref="x"), world.post("stored", ref="z")
    world.post("takes over", ref="w")
    links = [
        {"target_ref": ref, "relationship": "r"} for ref in ("x", "y", "z", "w", "new", "never")
    ]
    links.append({"target_item_id": str(moved), "relationship": "r"})
    world.add(
        Span(
            [
                envelope("moved", ref="y"),
                envelope("takes over", ref="z"),
                envelope("new", ref="new"),
                envelope("source", links=links),
                envelope("stored", ref=None, links=links),
            ]
        )
    )
    world.connection.execute(
        "INSERT INTO item_links (project_id, source_item_id, target_item_id, relationship)"
        " SELECT project_id, id, %s, 'r' FROM items WHERE id = %s",
        [moved, stored],
    )
    would = world.rebuild(dry_run=True)
    did = world.rebuild()
    assert would.counts() == did.counts()
    assert (did.links_created, did.links_unresolved) == (5, 6)
    assert world.rebuild(dry_run=True).counts() == world.rebuild().counts()


_REBUILD = """
import sys
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.items import batches
from everruns_pipelines.items.rebuild import rebuild
from everruns_pipelines.items.scope import RebuildRequest
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.settings import Settings

settings = Settings.from_environment()
batches.BATCH_SIZE = 7
rebuild(
    PostgresDatabase(settings),
    ClickHouseDatabase(settings),
    RebuildRequest("acme", "red", "webapp", sys.argv[1]),
    lambda message: print(message, flush=True),
)
"""


def test_a_rebuild_killed_between_batches_leaves_whole_ones_and_the_next_does_the_rest(
    world: World,
) -> None:
    _many(world)
    settings = world.clickhouse.settings
    assert settings.postgres_url is not None
    assert settings.clickhouse_dsn is not None
    # The third batch waits for a lock that we hold: the rebuild is killed in its midst.
    with world.postgres.connect() as other, other.transaction():
        last = world.connection.execute(
            "INSERT INTO items (organization_id, project_id, item_type, data, source, dedupe_key)"
            " SELECT organization_id, projects.id, 'x', '{}', 'runtime', %s"
            " FROM projects JOIN item_workspaces ON item_workspaces.id = workspace_id"
            " RETURNING id",
            [key("17")],
        ).fetchone()
        other.execute("SELECT FROM items WHERE id = %s FOR UPDATE", last)
        process = subprocess.Popen(
            [sys.executable, "-c", _REBUILD, Span().session or ""],
            stdout=subprocess.PIPE,
            text=True,
            env={
                "EVERRUNS_POSTGRES_URL": settings.postgres_url.get_secret_value(),
                "EVERRUNS_CLICKHOUSE_DSN": settings.clickhouse_dsn.get_secret_value(),
            },
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "14 items done\n":
                    break
            process.kill()
        world.connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    assert len(world.items()) == 14 + 1
    done = world.rebuild()
    assert (done.unchanged, done.refreshed, done.inserted) == (14, 1, _COUNT - 15)
    assert len(world.links()) == _COUNT
    assert world.rebuild().unchanged == _COUNT


def _together(*actions: Any) -> Sequence[Rebuilt | Exception]:
    answers: list[Rebuilt | Exception] = []

    def run(action: Any) -> None:
        try:
            answers.append(action())
        except Exception as error:
            answers.append(error)

    threads = [threading.Thread(target=run, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_two_rebuilds_of_one_session_at_once_both_succeed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.items.batches.BATCH_SIZE", 7)
    _many(world)
    done = _together(world.rebuild, world.rebuild, world.rebuild_day)
    assert all(isinstance(one, Rebuilt) for one in done)
    assert sorted(one.inserted for one in done if isinstance(one, Rebuilt)) == [0, 0, _COUNT]
    assert len(world.items()) == _COUNT
    assert len(world.links()) == _COUNT


def test_a_rebuild_waits_for_another_however_long_the_server_lets_it(world: World) -> None:
    world.add(Span([envelope("one")]))
    world.connection.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET lock_timeout = 100', "
        "current_database()); END $$"
    )
    lock = _lock_of_project(world)
    world.connection.execute("SELECT pg_advisory_lock(%s)", lock)
    release = threading.Timer(
        0.5, world.connection.execute, ["SELECT pg_advisory_unlock(%s)", lock]
    )

    def tell(message: str) -> None:
        world.log.append(message)
        if message.startswith("Waiting"):
            release.start()

    waiting = World(world.postgres, world.clickhouse, world.connection, _Log(tell))
    assert waiting.rebuild().inserted == 1
    assert any("another rebuild of project" in message for message in world.log)


def test_a_rebuild_that_has_waited_for_too_long_says_who_holds_the_lock(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.items.rebuild._LOCK_SECONDS", 0.1)
    world.add(Span([envelope("one")]))
    world.connection.execute("SELECT pg_advisory_lock(%s)", _lock_of_project(world))
    holder = f"held by the server's process {world.connection.info.backend_pid} "
    with pytest.raises(Refusal, match=holder) as raised:
        world.rebuild()
    assert raised.value.code == "locked"
    assert world.items() == {}


def _lock_of_project(world: World) -> list[Any]:
    name = f"everruns_pipelines.items {PROJECT}"
    row = world.connection.execute("SELECT hashtextextended(%s, 0)", [name]).fetchone()
    assert row is not None
    return list(row)


class _Log(list[str]):
    def __init__(self, tell: Any) -> None:
        super().__init__()
        self.append = tell


def _statements(stage: str) -> Mapping[str, LiteralString]:
    return read_statements("everruns_pipelines.items", f"{stage}.sql")


class _Before(dict[str, Any]):
    """A stage's statements; something happens before one of them."""

    def __init__(self, statements: Mapping[str, Any], moment: str, happen: Callable[[], None]):
        super().__init__(statements)
        self._moment, self._happen = moment, happen

    def __getitem__(self, name: str) -> Any:
        if name == self._moment:
            self._happen()
        return super().__getitem__(name)


@pytest.mark.parametrize("column", ["dedupe_key", "ref"])
def test_a_post_that_comes_between_is_met_again(
    world: World, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """Between a batch's plan and its insert the platform stores the item, or takes its ref."""
    world.add(Span([envelope("one", ref="web-1"), envelope("two")]))
    posted: list[Any] = []

    def post() -> None:
        if not posted:
            name_of_it = "one" if column == "dedupe_key" else "another"
            posted.append(world.post(name_of_it, ref="web-1"))

    monkeypatch.setattr(merging, "_SQL", _Before(_statements("merging"), "insert", post))
    done = world.rebuild()
    if column == "dedupe_key":
        assert (done.inserted, done.processed, done.rejected) == (1, 2, 0)
        assert world.items()[key("one")]["source"] == "runtime"
    else:
        assert (done.inserted, done.processed, done.rejected) == (1, 1, 1)
        assert world.reasons() == {key("one"): "ref_conflict"}
    assert len(posted) == 1


@pytest.mark.parametrize(
    ("moment", "change", "links"),
    [
        ("plan", "DELETE FROM items WHERE ref = 'source'", 0),
        ("plan", "DELETE FROM items WHERE ref = 'target'", 1),
        ("plan", "UPDATE items SET ref = NULL WHERE ref = 'target'", 1),
        ("create", "DELETE FROM items WHERE ref = 'source'", 0),
        ("create", "DELETE FROM items WHERE ref = 'target'", 1),
    ],
)
def test_a_link_whose_end_is_gone_is_unresolved_and_the_rest_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, moment: str, change: str, links: int
) -> None:
    """The platform changes an item between the merge, the plan of the links and their insert."""
    named = [{"target_ref": ref, "relationship": "x"} for ref in ("target", "source")]
    other = [{"target_ref": "other", "relationship": "x"}]
    world.add(
        Span(
            [
                envelope("source", ref="source", links=named),
                envelope("target", ref="target"),
                envelope("other", ref="other", links=other),
            ]
        )
    )
    changes = [change]

    def happen() -> None:
        if changes:
            world.connection.execute(changes.pop().encode())

    monkeypatch.setattr(linking, "_SQL", _Before(_statements("linking"), moment, happen))
    done = world.rebuild()
    assert (done.processed, done.links_created, done.links_unresolved) == (3, links + 1, 2 - links)
    assert len(world.links()) == links + 1
    assert changes == []


def test_a_role_that_may_not_make_our_schema_is_told_so(world: World) -> None:
    world.add(Span([envelope("one")]))
    world.connection.execute("DROP ROLE IF EXISTS meek")
    world.connection.execute("CREATE ROLE meek")
    world.connection.execute("GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO meek")
    with psycopg.connect(world.postgres.url, autocommit=True) as connection:
        connection.execute("SET ROLE meek")
        with pytest.raises(Refusal, match="everruns-pipelines init") as raised:
            ensure_schema(connection)
    world.connection.execute("DROP OWNED BY meek")
    world.connection.execute("DROP ROLE meek")
    assert raised.value.code == "permission_denied"
    assert world.items() == {}
