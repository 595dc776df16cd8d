"""Spans for the benchmarks, made inside ClickHouse; and a project for them."""

from everruns_pipelines.databases.clickhouse import ClickHouse
from everruns_pipelines.databases.postgres import Connection

PROJECT = "11111111-1111-4111-8111-111111111111"


def add_project(connection: Connection) -> None:
    connection.execute("INSERT INTO item_organizations (slug) VALUES ('acme')")
    connection.execute(
        "INSERT INTO item_workspaces (organization_id, slug)"
        " SELECT id, 'red' FROM item_organizations"
    )
    connection.execute(
        "INSERT INTO projects (id, workspace_id, slug)"
        " SELECT %s, id, 'webapp' FROM item_workspaces",
        [PROJECT],
    )


def make_noise(clickhouse: ClickHouse, start: int, number: int) -> None:
    """Spans of other sessions: fifty a trace, two hundred a session."""
    clickhouse.client.command(f"""
        INSERT INTO otel_traces
        (Timestamp, TraceId, SpanId, ServiceName, SpanName, SpanKind, SpanAttributes, Duration)
        SELECT
            toDateTime64('2026-01-01 00:00:00', 9) + intDiv(number, 20),
            lower(hex(MD5(toString(intDiv(number, 50))))),
            leftPad(lower(hex(number)), 16, '0'),
            'agent',
            ['agent', 'generation', 'tool:shell', 'tool:http', 'task'][number % 5 + 1],
            'Internal',
            map(
                'dreadnode.project', '{PROJECT}',
                'dreadnode.session.id', toString(reinterpretAsUUID(MD5(toString(intDiv(number, 200))))),
                'dreadnode.run.id', toString(reinterpretAsUUID(MD5('run' || toString(intDiv(number, 100))))),
                'logfire.span_type', 'span',
                'logfire.msg', 'message ' || toString(number),
                'dreadnode.outputs', '[{{"name":"result","label":"result","hash":"b25fdfe6ba7b0570","attributes":null}}]',
                'dreadnode.objects', '{{"b25fdfe6ba7b0570":{{"hash":"b25fdfe6ba7b0570","value":"done ' || toString(number) || '","type":"val"}}}}'
            ),
            1000000
        FROM numbers({start}, {number})
    """)  # noqa: E501 - our own constants; a literal is a literal


def make_items(
    clickhouse: ClickHouse, session: str, number: int, *, per_span: int = 1, padding: int = 400
) -> None:
    """A session's items, `per_span` in each span, with `padding` bytes of evidence."""
    clickhouse.client.command(f"""
        INSERT INTO otel_traces
        (Timestamp, TraceId, SpanId, ServiceName, SpanName, SpanKind, SpanAttributes, Duration)
        WITH
            arrayMap(n -> number * {per_span} + n, range({per_span})) AS ns,
            arrayMap(n -> lower(hex(MD5('{session} {per_span} {padding} ' || toString(n)))), ns) AS keys
        SELECT
            toDateTime64('2026-01-01 12:00:00', 9) + intDiv(number, 50),
            lower(hex(MD5('{session}' || toString(intDiv(number, 50))))),
            leftPad(lower(hex(cityHash64('{session}', number, {per_span}, {padding}))), 16, '0'),
            'agent',
            'tool:report_item',
            'Internal',
            map(
                'dreadnode.project', '{PROJECT}',
                'dreadnode.session.id', '{session}',
                'dreadnode.run.id', '{session}',
                'logfire.span_type', 'span',
                'dreadnode.outputs', '[' || arrayStringConcat(arrayMap(key ->
                    '{{"name":"item","label":"x","hash":"' || left(key, 16) || '","attributes":{{"item_type":"finding","severity":"low","status":"","dedupe_key":"' || key || '"}}}}', keys), ',') || ']',
                'dreadnode.objects', '{{' || arrayStringConcat(arrayMap((key, n) ->
                    '"' || left(key, 16) || '":{{"hash":"' || left(key, 16) || '","schema_hash":"0275535e8e9459a7","value":{{"item_type":"finding","dedupe_key":"' || key || '","ref":"r' || key || '","title":"RCE in /api #' || toString(n) || '","status":null,"notes":null,"schema_ref":"finding@1","session_id":"{session}","trace_id":null,"span_id":null,"capability":"web-recon","capability_version":"1.4.2","data":{{"title":"RCE in /api #' || toString(n) || '","description":"**api** is affected; `x=779`","severity":"low","category":null,"evidence":"' || repeat('GET /api?q=A ', intDiv({padding}, 13)) || '","metadata":{{"cvss":2.0,"tags":["cache","login","upload"],"n":' || toString(n) || ',"deep":{{"a":[0,0,7],"b":null,"c":true}}}}}},"links":null}},"type":"val"}}', keys, ns), ',') || '}}'
            ),
            4000012
        FROM numbers({number // per_span})
        SETTINGS max_block_size = 1000
    """)  # noqa: E501 - our own constants; a literal is a literal
