"""The embedded ClickHouse engine in a thread of its own: whoever waits for it hears signals.

A call into the engine returns when the engine is done, and no signal is heard before. Here the
caller waits for the thread instead; if he is interrupted, the engine is told to give its query up.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")

# The engine has one user at a time: every other query is the one to give up.
_GIVE_UP = "KILL QUERY WHERE query NOT LIKE 'KILL QUERY%' ASYNC"


class ByteStream(Protocol):
    """An answer, piece by piece."""

    def read(self, size: int | None = ..., /) -> bytes:
        """The next bytes; none at the end."""
        ...

    def close(self) -> None:
        """Read no more."""
        ...


class Client(Protocol):
    """What of clickhouse-connect's client we use."""

    def command(self, cmd: str, /) -> Any:
        """Run a statement without rows, or with one value."""

    def raw_stream(
        self,
        query: str,
        /,
        parameters: dict[str, Any],
        settings: dict[str, Any] | None = None,
        *,
        fmt: str,
    ) -> ByteStream:
        """The answer piece by piece, as the server formats it."""
        ...

    def raw_insert(self, table: str, /, *, insert_block: bytes, fmt: str) -> Any:
        """Insert rows that are formatted already."""

    def close(self) -> None:
        """End the connection."""


class InterruptibleClient:
    """A client of the engine, all of whose calls are made by one thread.

    Args:
        opened: opens a client of the engine.
    """

    def __init__(self, opened: Callable[[], Client]) -> None:
        self._opened = opened
        self._thread = ThreadPoolExecutor(1, "clickhouse")
        self._client = self._call(opened)

    def command(self, cmd: str, /) -> Any:
        """As of `Client`."""
        return self._call(lambda: self._client.command(cmd))

    def raw_stream(
        self,
        query: str,
        /,
        parameters: dict[str, Any],
        settings: dict[str, Any] | None = None,
        *,
        fmt: str,
    ) -> ByteStream:
        """As of `Client`."""
        return _Answer(
            self._call(lambda: self._client.raw_stream(query, parameters, settings, fmt=fmt)),
            self._call,
        )

    def raw_insert(self, table: str, /, *, insert_block: bytes, fmt: str) -> Any:
        """As of `Client`."""
        return self._call(
            lambda: self._client.raw_insert(table, insert_block=insert_block, fmt=fmt)
        )

    def close(self) -> None:
        """As of `Client`."""
        self._call(self._client.close)
        self._thread.shutdown()

    def _call(self, call: Callable[[], _T]) -> _T:
        called = self._thread.submit(call)
        try:
            return called.result()
        except BaseException:
            if not called.done():
                self._give_up()
            raise

    def _give_up(self) -> None:
        other = self._opened()
        try:
            other.command(_GIVE_UP)
        finally:
            other.close()


class _Answer:
    def __init__(self, stream: ByteStream, call: Callable[[Callable[[], Any]], Any]) -> None:
        self._stream = stream
        self._call = call

    def read(self, size: int | None = -1, /) -> bytes:
        return self._call(lambda: self._stream.read(size))

    def close(self) -> None:
        self._call(self._stream.close)
