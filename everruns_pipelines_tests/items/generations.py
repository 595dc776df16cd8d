"""The generations of the span table: the files that make them."""

GENERATIONS = [
    "otel_traces_older.sql",
    "otel_traces.sql",
    "otel_traces_newest_bloom.sql",
    "otel_traces_newest_text.sql",
    "otel_traces_json.sql",
]
