"""The embedded ClickHouse: a chDB directory under EVERRUNS_HOME, with the exporter's tables."""

from collections.abc import Iterator
from importlib.resources import files

_SCHEMA = files("everruns_pipelines.databases.embedded") / "schema"


def span_tables(generation: str = "otel_traces.sql") -> Iterator[str]:
    """The statements that make the span table, its companion and the view between them, each
    where it is missing.
    """
    for statement in (_SCHEMA / generation).read_text().split(";\n"):
        if statement.strip():
            yield statement
