"""Whether the code that a run was launched from is still the code that is served."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import dagster as dg
from dagster._core.storage.tags import GRPC_INFO_TAG

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 5


@contextmanager
def told_when_replaced(run: dg.DagsterRun, replaced: Event) -> Generator[None]:
    """Set the event once the run's code server has been replaced, or is gone.

    A run that was not launched by a code server, or cannot reach it, is told nothing.
    """
    address = json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))
    ended = Event()

    def look() -> None:
        first = _server_id(address)
        while first is not None and not ended.wait(_LOOK_SECONDS):
            if _server_id(address) != first:
                replaced.set()
                return

    if not address:
        yield
        return
    Thread(target=look, name="code-server", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _server_id(address: dict[str, Any]) -> str | None:
    from dagster._core.errors import DagsterUserCodeUnreachableError
    from dagster._grpc.client import DagsterGrpcClient

    try:
        client = DagsterGrpcClient(**address)
        return client.get_server_id(timeout=_ANSWER_SECONDS)
    except DagsterUserCodeUnreachableError:
        return None
