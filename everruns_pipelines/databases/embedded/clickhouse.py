"""The embedded ClickHouse: a chDB directory under EVERRUNS_HOME, with the exporter's tables."""

from collections.abc import Iterator

from everruns_pipelines.databases.sql_files import read_sql


def span_tables(generation: str = "otel_traces.sql") -> Iterator[str]:
    """The statements that make the span table, its companion and the view between them, each
    where it is missing.
    """
    script = read_sql("everruns_pipelines.databases.embedded", f"schema/{generation}")
    for statement in script.split(";\n"):
        if statement.strip():
            yield statement
