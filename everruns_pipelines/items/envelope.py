"""The tolerant reader: cuts what can be saved out of attributes that strict JSON parsers refuse.

One bare NaN, one lone surrogate, a cut in mid-text makes a whole attribute invalid, and with it
every other item of the span. This reader only finds where values begin and end. Whether a value
is sound is judged by PostgreSQL, one value at a time, so that its neighbours live.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

# PostgreSQL's parser recurses; so deep no item is meant to be.
_MAX_DEPTH = 1000

# A string as a whole, cut or not, or a character that gives JSON its structure.
# Possessive: a string of megabytes leaves nothing to go back to.
_STRING = rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'
_MARKS = re.compile(_STRING + rb"|([\[\]{},])", re.DOTALL)
_NAME = re.compile(rb"\s*+(" + _STRING + rb")\s*+:", re.DOTALL)

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
    size: Decimal | None = None
    reason: str | None = None
    detail: str | None = None
    value: str | None = None


def read_damaged(outputs: bytes, objects: bytes) -> Iterator[Found]:
    """What can be told of the items of a span whose outputs or objects are not valid JSON."""
    hashes = {_text(output.get("hash")) for _, output in _item_outputs(outputs) if output}
    held = _members(objects, hashes) if hashes else {}
    for position, output in _item_outputs(outputs):
        if output is not None:
            yield _item(position, output, held)
        elif position > 0:
            yield Found(position, reason="unreadable_span", detail="an output cannot be read")
        else:
            yield Found(
                position,
                reason="unreadable_span",
                detail="dreadnode.outputs ends too early or is no array",
            )


def read_envelope(position: int, key_hint: str | None, value: bytes) -> Found:
    """An envelope's text, or why PostgreSQL cannot even be asked about it."""
    fields = _members(value, {"dedupe_key", "session_id"})
    key_hint = key_hint or _text(fields.get("dedupe_key"))
    session_hint = _session(fields.get("session_id"))
    if _is_too_deep(value):
        detail = f"more than {_MAX_DEPTH} levels"
        return Found(position, key_hint, session_hint, reason="too_deep", detail=detail)
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return Found(
            position, key_hint, session_hint, reason="invalid_json", detail="not valid UTF-8"
        )
    if "\0" in text:
        return Found(position, key_hint, session_hint, reason="invalid_json", detail="a NUL byte")
    return Found(position, key_hint, session_hint, value=text)


def _item_outputs(outputs: bytes) -> Iterator[tuple[int, dict[str, bytes] | None]]:
    """Position and members of each output named item.

    None stands for an output that cannot be read, and at position 0 for the end that is missing.
    """
    for position, part in enumerate(_parts(outputs, b"["), start=1):
        if part is None:
            yield 0, None
            continue
        entry = outputs[part]
        # Most are told apart without a closer look.
        if b"item" not in entry and b"\\u" not in entry:
            continue
        output = _members(entry, {"name", "hash", "attributes"})
        name = _text(output.get("name"))
        if name == "item":
            yield position, output
        elif name is None and b"item" in entry and not _is_json(entry):
            yield position, None


def _item(position: int, output: Mapping[str, bytes], held: Mapping[str, bytes]) -> Found:
    attributes = _members(output.get("attributes", b""), {"dedupe_key"})
    key_hint = _text(attributes.get("dedupe_key"))
    item = held.get(_text(output.get("hash")) or "")
    if item is None:
        return Found(
            position, key_hint, reason="object_missing", detail="no such object, or it is cut"
        )
    parts = _members(item, {"type", "uri", "size", "value"})
    if _text(parts.get("type")) == "uri":
        uri, size = _text(parts.get("uri")), _size(parts.get("size"))
        return Found(position, key_hint, uri=uri, size=size, reason="offloaded")
    value = parts.get("value")
    if value is None:
        return Found(position, key_hint, reason="object_missing", detail="the object has no value")
    return read_envelope(position, key_hint, value)


def _members(text: bytes, names: Collection[str | None]) -> dict[str, bytes]:
    """Those members of an object that have one of the names and are whole."""
    members: dict[str, bytes] = {}
    for part in _parts(text, b"{"):
        named = part and _NAME.match(text, part.start, part.stop)
        name = _text(named[1]) if named else None
        if part and named and name is not None and name in names:
            members[name] = text[named.end() : part.stop].strip()
    return members


def _parts(text: bytes, opening: bytes) -> Iterator[slice | None]:
    """What lies between the commas of a list or object; None if its end is missing.

    A last part that no comma and no bracket ends is cut, and left out.
    """
    start = depth = 0
    for token in _MARKS.finditer(text):
        mark = token[1]
        if depth == 0:
            if mark != opening or text[: token.start()].strip():
                break
            depth = 1
            start = token.end()
        elif depth == 1 and (mark == b"," or mark in _CLOSING):
            yield slice(start, token.start())
            if mark in _CLOSING:
                return
            start = token.end()
        else:
            depth += (mark in _OPENING) - (mark in _CLOSING)
    yield None


def _is_too_deep(text: bytes) -> bool:
    depth = 0
    for token in _MARKS.finditer(text):
        depth += (token[1] in _OPENING) - (token[1] in _CLOSING)
        if depth > _MAX_DEPTH:
            return True
    return False


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text(value: bytes | None) -> str | None:
    """A string that PostgreSQL can hold; None for any other value."""
    if value is None or not value.startswith(b'"'):
        return None
    try:
        text: str = json.loads(value)
        text.encode()
    except ValueError:
        return None
    return None if "\0" in text else text


def _size(value: bytes | None) -> Decimal | None:
    return Decimal(value.decode()) if value is not None and value.isdigit() else None


def _session(value: bytes | None) -> str | None:
    """A session that is a UUID. Another one is not needed: it is nobody's scope."""
    text = _text(value)
    try:
        return None if text is None else str(UUID(text))
    except ValueError:
        return None
