"""SQL in files, beside the module that runs it: the one way in which it is read.

A file is one statement or script; or it holds several, each below a line `-- name: its_name`.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import LiteralString, cast


@cache
def read_sql(package: str, file: str) -> LiteralString:
    """The text of a file of a package."""
    # The package's own files are as literal as its source.
    return cast("LiteralString", (files(package) / file).read_text())


@cache
def read_statements(package: str, file: str) -> Mapping[str, LiteralString]:
    """The statements of a file of a package, by name."""
    parts = re.split(r"^-- name: (\w+)\n", read_sql(package, file), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], cast("list[LiteralString]", parts[1::2]), strict=True))
