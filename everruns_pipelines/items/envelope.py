"""The tolerant reader: cuts what can be saved out of attributes that strict JSON parsers refuse.

One bare NaN, one lone surrogate, a cut in mid-text makes a whole attribute invalid, and with it
every other item of the span. This reader only finds where values begin and end. Whether a value
is sound is judged by PostgreSQL, one value at a time, so that its neighbours live.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

# PostgreSQL's parser recurses; so deep no item is meant to be.
_MAX_DEPTH = 1000

# A string as a whole, cut or not; a character that gives JSON its structure; anything else.
# Possessive: a string of megabytes leaves nothing to go back to.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},:]|[^\s\[\]{},:"]++', re.DOTALL)

_OPENING = {b"[", b"{"}
_CLOSING = {b"]", b"}"}


@dataclass(frozen=True)
class Found:
    """One item output of a damaged span, or the remark that the outputs end too early.

    `value` is the envelope's text, to be judged; without it `reason` says why there is none.
    """

    position: int
    key_hint: str | None = None
    session_hint: str | None = None
    uri: str | None = None
    reason: str | None = None
    detail: str | None = None
    value: str | None = None


def read_damaged(outputs: bytes, objects: bytes) -> Iterator[Found]:
    """What can be told of the items of a span whose outputs or objects are not valid JSON."""
    whole, entries = _elements(outputs)
    members = dict(_members(objects)) if entries else {}
    for position, entry in enumerate(entries, start=1):
        output = _loads(entry)
        if isinstance(output, dict):
            fields = cast("dict[str, Any]", output)
            if fields.get("name") == "item":
                yield _item(position, fields, members)
        elif output is None and b"item" in entry:
            yield Found(position, reason="unreadable_span", detail="an output cannot be read")
    if not whole:
        yield Found(
            position=0,
            reason="unreadable_span",
            detail="dreadnode.outputs ends too early or is no array",
        )


def _item(position: int, output: dict[str, Any], members: dict[str, bytes]) -> Found:
    attributes = output.get("attributes")
    hint: Any = (
        cast("dict[str, Any]", attributes).get("dedupe_key") if _is_object(attributes) else None
    )
    key_hint = _storable(hint)
    item = members.get(str(output.get("hash")))
    if item is None:
        return Found(
            position, key_hint, reason="object_missing", detail="no such object, or it is cut"
        )
    parts = dict(_members(item))
    kind = _loads(parts.get("type", b"null"))
    if kind == "uri":
        uri = _loads(parts.get("uri", b"null"))
        return Found(position, key_hint, uri=_storable(uri), reason="offloaded")
    value = parts.get("value")
    if value is None:
        return Found(position, key_hint, reason="object_missing", detail="the object has no value")
    return read_envelope(position, key_hint, value)


def read_envelope(position: int, key_hint: str | None, value: bytes) -> Found:
    """An envelope's text, or why PostgreSQL cannot even be asked about it."""
    if _depth(value) > _MAX_DEPTH:
        return Found(position, key_hint, reason="too_deep", detail=f"more than {_MAX_DEPTH} levels")
    envelope = _loads(value)
    fields = cast("dict[str, Any]", envelope) if _is_object(envelope) else {}
    key_hint = key_hint or _storable(fields.get("dedupe_key"))
    session_hint = _session(fields.get("session_id"))
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return Found(
            position, key_hint, session_hint, reason="invalid_json", detail="not valid UTF-8"
        )
    if "\0" in text:
        return Found(position, key_hint, session_hint, reason="invalid_json", detail="a NUL byte")
    return Found(position, key_hint, session_hint, value=text)


def _elements(text: bytes) -> tuple[bool, list[bytes]]:
    """Whether an array is whole, and the elements of it that are."""
    parts, whole = _split(text, b"[")
    return whole, [text[start:end] for start, end in parts]


def _members(text: bytes) -> Iterator[tuple[str, bytes]]:
    """The members of an object that are whole."""
    parts, _ = _split(text, b"{")
    for start, end in parts:
        key = _TOKEN.match(text, start)
        if key is None or not key.group().startswith(b'"'):
            continue
        colon = _TOKEN.search(text, key.end())
        name = _loads(key.group())
        if colon is not None and colon.group() == b":" and isinstance(name, str):
            yield name, text[colon.end() : end].strip()


def _split(text: bytes, opening: bytes) -> tuple[list[tuple[int, int]], bool]:
    """Where the parts between the commas of a list or object lie, and whether it ends.

    A last part that no comma and no bracket ends is cut, and left out.
    """
    parts: list[tuple[int, int]] = []
    start: int | None = None
    depth = 0
    end = 0
    for token in _TOKEN.finditer(text):
        mark = token.group() if token.end() - token.start() == 1 else b""
        if depth == 0:
            if mark != opening:
                break
            depth = 1
            continue
        if depth == 1 and (mark == b"," or mark in _CLOSING):
            if start is not None:
                parts.append((start, end))
            start = None
            if mark in _CLOSING:
                return parts, True
            continue
        if start is None:
            start = token.start()
        depth += (mark in _OPENING) - (mark in _CLOSING)
        end = token.end()
    return parts, False


def _depth(text: bytes) -> int:
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        mark = token.group() if token.end() - token.start() == 1 else b""
        depth += (mark in _OPENING) - (mark in _CLOSING)
        deepest = max(deepest, depth)
    return deepest


def _loads(text: bytes) -> Any:
    """A value as Python reads it, which takes NaN and lone surrogates; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _storable(value: Any) -> str | None:
    """A string that PostgreSQL can hold."""
    if not isinstance(value, str) or "\0" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _session(value: Any) -> str | None:
    """A session that is a UUID. Another one is not needed: it is nobody's scope."""
    try:
        return str(UUID(value)) if isinstance(value, str) else None
    except ValueError:
        return None
