"""Offloaded envelopes: objects in a store that fsspec reaches, under one configured prefix.

A uri comes from a span, so from anyone. Only plain paths under EVERRUNS_OBJECT_STORE_URL are
read, and none that lies in the directory of another organization or workspace.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from everruns_pipelines.errors import Refusal

# In bytes; as much as a rebuild reads of a span's attributes.
LONGEST_OBJECT = 16 << 20

# What the objects of one request may take in memory is this many times LONGEST_OBJECT.
OBJECTS_AT_ONCE = 4

_PLAIN_PATH = re.compile(r"[A-Za-z0-9._~+=@-]+(/[A-Za-z0-9._~+=@-]+)*")


class _FileSystem(Protocol):
    @property
    def protocol(self) -> str | tuple[str, ...]: ...

    def cat_ranges(
        self,
        paths: list[str],
        starts: list[int],
        ends: list[int],
        max_gap: int | None = None,
        on_error: str = "return",
    ) -> list[bytes | Exception]: ...


@dataclass(frozen=True)
class _Unreachable:
    """A store that we cannot even connect to: that is told of each of its objects."""

    error: OSError
    protocol: str = ""

    def cat_ranges(self, paths: list[str], *_: Any, **__: Any) -> list[bytes | Exception]:
        return [self.error for _ in paths]


@dataclass(frozen=True)
class ObjectStore:
    """Where offloaded envelopes may be read."""

    prefix: str
    root: str
    filesystem: _FileSystem

    @classmethod
    def at(cls, url: str | None) -> "ObjectStore | None":
        """The store under `url`, which is EVERRUNS_OBJECT_STORE_URL; None where it is unset.

        Raises:
            Refusal: no library for this kind of store is installed.
        """
        if url is None:
            return None
        import fsspec.core  # pyright: ignore[reportMissingTypeStubs]

        core: Any = fsspec.core
        try:
            filesystem, root = core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise Refusal(
                f"EVERRUNS_OBJECT_STORE_URL cannot be used: {error}", code="unavailable", status=503
            ) from None
        except OSError as error:
            filesystem, root = _Unreachable(error), ""
        return cls(url.rstrip("/") + "/", root, filesystem)

    def objection(self, uri: str, others: Collection[str]) -> str | None:
        """Why a uri is not read, if it is not.

        Args:
            others: directory names that belong to somebody else.
        """
        if not uri.startswith(self.prefix):
            return "the uri is not under EVERRUNS_OBJECT_STORE_URL"
        path = uri.removeprefix(self.prefix)
        parts = path.split("/")
        if not _PLAIN_PATH.fullmatch(path) or {".", ".."} & set(parts):
            return "the uri is no plain path"
        if {part.lower() for part in parts} & set(others):
            return "the uri lies in another organization or workspace"
        if "file" not in self.filesystem.protocol:
            return None
        try:
            is_inside = self._is_inside(path)
        except (OSError, RuntimeError):  # links that lead in a circle
            return "the uri leads nowhere"
        return None if is_inside else "the uri leads out of EVERRUNS_OBJECT_STORE_URL"

    def fetch(self, uris: Sequence[str]) -> list[bytes | str]:
        """The objects of at most `OBJECTS_AT_ONCE` uris, or in few words why there is none."""
        paths = [f"{self.root.rstrip('/')}/{uri.removeprefix(self.prefix)}" for uri in uris]
        answers = self.filesystem.cat_ranges(
            paths, [0] * len(paths), [LONGEST_OBJECT + 1] * len(paths), on_error="return"
        )
        return [_told(answer) for answer in answers]

    def _is_inside(self, path: str) -> bool:
        root = Path(self.root).resolve()
        return (root / path).resolve().is_relative_to(root)


def _told(answer: bytes | Exception) -> bytes | str:
    if isinstance(answer, FileNotFoundError):
        return "the object store has no such object"
    if isinstance(answer, Exception):
        return f"the object cannot be read ({type(answer).__name__})"
    if len(answer) > LONGEST_OBJECT:
        return "the object is longer than a rebuild reads"
    return bytes(answer)
