"""The embedded ClickHouse: a chDB directory under EVERRUNS_HOME, with the exporter's tables."""

from importlib.resources import files

from everruns_pipelines.clickhouse import Client

_SCHEMA = files("everruns_pipelines.embedded") / "schema"


def ensure_span_tables(client: Client, generation: str = "otel_traces.sql") -> None:
    """Make the span table, its companion and the view between them where they are missing."""
    for statement in (_SCHEMA / generation).read_text().split(";\n"):
        if statement.strip():
            client.command(statement)
