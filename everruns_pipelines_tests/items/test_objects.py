"""Offloaded envelopes: counted, told, and recovered where the store may be read."""

import json
from collections.abc import Iterator
from hashlib import sha1
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.errors import Refusal
from everruns_pipelines_tests.items.world import (
    OTHER_SESSION,
    Row,
    Span,
    World,
    envelope,
    key,
    name_id,
    offloaded,
)


def _at(world: World, url: str) -> World:
    settings = world.clickhouse.settings.model_copy(update={"object_store_url": url})
    return World(world.postgres, ClickHouseDatabase(settings), world.connection, world.log)


def _offloaded(name: str, uri: str) -> Row:
    return {**offloaded(uri), "key": key(name)}


def _kept(name: str, directory: Path, body: Any) -> Row:
    """An object that was offloaded into a directory as the SDK does it: by its hash."""
    text = (body if isinstance(body, str) else json.dumps(body)).encode()
    path = directory / sha1(text).hexdigest()[:16]
    path.write_bytes(text)
    return {**offloaded(f"file://{path}", len(text)), "key": key(name)}


def test_an_offloaded_item_is_counted_and_told(world: World) -> None:
    world.add(Span(objects=[_offloaded("one", "s3://bucket/one"), _offloaded("two", "")]))
    done = world.rebuild()
    assert (done.processed, done.rejected, done.offloaded) == (0, 0, 2)
    assert world.reasons() == {key("one"): "offloaded", key("two"): "offloaded"}


def test_an_offloaded_item_is_recovered_from_a_directory(world: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "cas").mkdir(parents=True)
    bodies: dict[str, Any] = {
        "sound": envelope("sound", session_id=None),
        "bad": envelope("bad", title="x" * 513),
        "other": envelope("somebody else's"),
        "list": [1],
    }
    bodies["broken"] = '{"dedupe_key": NaN'
    kept = [_kept(name, store / "cas", body) for name, body in bodies.items()]
    world.add(Span(objects=[*kept, _offloaded("gone", f"file://{store}/cas/gone")]))
    world.rebuild()
    assert set(world.reasons().values()) == {"offloaded"}
    done = _at(world, f"file://{store}").rebuild()
    assert (done.inserted, done.rejected, done.offloaded) == (1, 3, 1)
    assert world.items().keys() == {key("sound")}
    assert world.reasons() == {
        key("bad"): "invalid_field",
        key("other"): "invalid_field",
        key("broken"): "invalid_json",
        key("gone"): "offloaded",
    }


def test_an_object_that_is_a_stored_item_does_not_stand_for_the_one_of_the_span(
    world: World, tmp_path: Path
) -> None:
    world.add(
        Span([envelope("stored")], name="a"),
        Span(objects=[_kept("one", tmp_path, envelope("stored"))], name="b"),
    )
    done = _at(world, f"file://{tmp_path}").rebuild()
    assert (done.processed, done.rejected) == (1, 1)
    assert world.reasons() == {key("one"): "invalid_field"}


def test_a_uri_is_untrusted_input(world: World, tmp_path: Path) -> None:
    store, outside = tmp_path / "store", tmp_path / "store-of-others"
    for directory in (store, outside):
        directory.mkdir()
    (outside / "secret").write_text(json.dumps(envelope("one")))
    (store / "link").symlink_to(outside / "secret")
    rival = name_id("rival")
    world.add_project(
        "other", name_id("o"), workspace=("blue", name_id("blue")), organization=("rival", rival)
    )
    for directory in (rival, name_id("blue")):
        (store / str(directory)).mkdir()
        (store / str(directory) / "theirs").write_text(json.dumps(envelope("one")))
    uris = [
        f"file://{outside}/secret",
        f"file://{store}/../store-of-others/secret",
        f"file://{store}/./secret",
        f"file://{store}/%2e%2e/store-of-others/secret",
        f"file://{store}/link",
        f"file://{store}/{rival}/theirs",
        f"file://{store}/{str(name_id('blue')).upper()}/theirs",
        f"file://{store}//etc/passwd",
        f"file://{store}/x?y",
        f"file://{store}/*",
        f"{store}/link",
        "s3://bucket/x",
        f"simplecache::file://{store}/x",
        "",
    ]
    world.add(Span(objects=[_offloaded(str(number), uri) for number, uri in enumerate(uris)]))
    done = _at(world, f"file://{store}").rebuild()
    assert (done.processed, done.offloaded) == (0, len(uris))
    assert not any("secret" in str(row["detail"]) for row in world.rejections())


def test_an_offloaded_envelope_of_another_session_is_judged_once_it_is_read(
    world: World, tmp_path: Path
) -> None:
    sessions = {"mine": Span().session, "theirs": OTHER_SESSION}
    world.add(
        Span(name="of the session"),
        Span(
            objects=[
                _kept(name, tmp_path, envelope(name, session_id=session))
                for name, session in sessions.items()
            ],
            name="of another",
            session=OTHER_SESSION,
        ),
    )
    assert world.rebuild().offloaded == 0
    done = _at(world, f"file://{tmp_path}").rebuild()
    assert (done.inserted, done.out_of_scope) == (1, 1)
    assert world.items().keys() == {key("mine")}


def test_a_path_that_cannot_be_followed_does_not_stop_the_rebuild(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "directory").mkdir()
    paths = ("loop", "loop/x", "directory", "x" * 5000)
    world.add(
        Span([envelope("one")]),
        Span(objects=[_offloaded(path, f"file://{tmp_path}/{path}") for path in paths], name="x"),
    )
    done = _at(world, f"file://{tmp_path}").rebuild()
    assert (done.processed, done.offloaded) == (1, len(paths))
    assert all(row["detail"] for row in world.rejections())


def test_a_store_that_cannot_be_reached_does_not_stop_the_rebuild(world: World) -> None:
    world.add(
        Span([envelope("one")]),
        Span(objects=[_offloaded("two", "ftp://127.0.0.1:1/x/two")], name="x"),
    )
    done = _at(world, "ftp://127.0.0.1:1/x").rebuild()
    assert (done.processed, done.offloaded) == (1, 1)
    [rejection] = world.rejections()
    assert rejection["detail"] == "the object cannot be read (ConnectionRefusedError)"


def test_a_store_without_its_library_is_refused(world: World) -> None:
    with pytest.raises(Refusal, match="EVERRUNS_OBJECT_STORE_URL"):
        _at(world, "nosuch://bucket").rebuild()


@pytest.mark.parametrize("change", ["body", "size"])
def test_an_object_that_was_replaced_is_not_taken(
    world: World, tmp_path: Path, change: str
) -> None:
    kept = _kept("one", tmp_path, envelope("one"))
    if change == "size":
        kept["size"] += 1
    else:
        path = Path(kept["uri"].removeprefix("file://"))
        path.write_text(path.read_text().replace("title of one", "title of two"))
    world.add(Span(objects=[kept]))
    done = _at(world, f"file://{tmp_path}").rebuild()
    assert (done.processed, done.offloaded) == (0, 1)
    [rejection] = world.rejections()
    assert "is not the one that was offloaded" in rejection["detail"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3-compatible server in this process; its bucket's prefix."""
    from moto.server import ThreadedMotoServer

    server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "made")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield "s3://bucket/prefix"
    server.stop()


def test_an_offloaded_item_is_recovered_from_s3(world: World, s3: str) -> None:
    filesystem: Any = import_module("s3fs").S3FileSystem(skip_instance_cache=True)
    filesystem.mkdir("bucket")
    large = envelope("large", data={"text": "x" * 2_000_000})
    body = json.dumps(large).encode()
    name = sha1(body).hexdigest()[:16]
    filesystem.pipe_file(f"bucket/prefix/cas/{name}", body)
    uris = {"large": f"{s3}/cas/{name}", "gone": f"{s3}/cas/gone", "far": f"s3://bucket/cas/{name}"}
    world.add(
        Span(
            objects=[{**offloaded(uri, len(body)), "key": key(item)} for item, uri in uris.items()]
        )
    )
    done = _at(world, s3).rebuild()
    assert (done.inserted, done.offloaded) == (1, 2)
    assert world.items()[key("large")]["data"] == large["data"]
