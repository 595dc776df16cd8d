"""The picture of the architecture, drawn from the imports that the code really has.

`python -m everruns_pipelines_tests.architecture` draws it anew in docs/architecture.md.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "everruns_pipelines"
DOCUMENT = ROOT / "docs" / "architecture.md"

# From top to bottom: a room imports from those below it only. Rooms of one line stand side by side.
LEVELS = (
    ("commands",),
    ("serve",),
    ("component",),
    ("definitions", "client"),
    ("parts",),
    ("operations",),
    ("reporting", "items"),
    ("orchestration",),
    ("dagster_storage",),
    ("databases",),
    ("settings",),
    ("errors",),
)
# Everything imports these: their arrows would hide the others.
_EVERYWHERE = ("settings", "errors")
_PICTURE = re.compile(r"(?<=```mermaid\n).*?(?=```)", re.DOTALL)


def imports() -> dict[str, set[str]]:
    """Which rooms each room imports from: folders and modules of the package's root."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts
        if len(module) == 2 and module[1] == "__init__":
            continue
        others = {name.split(".")[1] for name in _imported(path)}
        found.setdefault(module[1], set()).update(others - {module[1]})
    return found


def _imported(path: Path) -> Iterator[str]:
    """What a module imports of ours, wherever the statement stands: at the top, in a function, or
    for types alone.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            is_root = module == PACKAGE.name
            names = [f"{module}.{alias.name}" for alias in node.names] if is_root else [module]
        else:
            continue
        yield from (
            name
            for name in names
            if name.startswith(f"{PACKAGE.name}.") and not name.endswith("__")
        )


def upwards() -> list[str]:
    """Imports that do not go down."""
    height = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
    return [
        f"{room} imports {other}"
        for room, others in sorted(imports().items())
        for other in sorted(others)
        if height[other] <= height[room]
    ]


def picture() -> str:
    """The rooms and their imports, as Mermaid reads it."""
    rooms = imports()
    lines = ["flowchart TD"]
    for room in (room for rooms_of_level in LEVELS for room in rooms_of_level if room in rooms):
        is_folder = (PACKAGE / room).is_dir()
        lines.append(f"    {room}[{room}/]" if is_folder else f"    {room}({room}.py)")
    for room, others in sorted(rooms.items()):
        lines += [f"    {room} --> {other}" for other in sorted(others - set(_EVERYWHERE))]
    return "\n".join(lines) + "\n"


def drawn() -> str:
    """The picture that stands in the document."""
    found = _PICTURE.search(DOCUMENT.read_text())
    assert found is not None, "docs/architecture.md has no picture"
    return found[0]


if __name__ == "__main__":
    DOCUMENT.write_text(_PICTURE.sub(lambda _: picture(), DOCUMENT.read_text(), count=1))
