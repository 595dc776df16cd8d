"""Every status code of the interface that needs no run to end, provoked for real."""

import http.client
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
import requests
from dagster import DagsterRunStatus
from psycopg import sql
from pydantic import SecretStr

from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.serve import guards
from everruns_pipelines.serve.guards import LARGEST_BODY
from everruns_pipelines.serve.runs import MOST_AT_WORK
from everruns_pipelines_tests.serve.conftest import BACKFILL, REBUILD, Serve, Served

PROBLEM = ["title", "status", "detail", "code", "allowed_actions"]
ASYNC = {"Prefer": "respond-async"}


def refused(response: requests.Response, status: int) -> str:
    """The detail of a refusal, which must have the form that its path has."""
    told = response.json()
    assert response.status_code == status, told
    if "/v1/org/" in response.url:
        assert response.headers["Content-Type"] == "application/json"
        assert {"code", "detail", "type"} <= set(told) <= {"code", "detail", "type", "errors"}
    else:
        assert response.headers["Content-Type"] == "application/problem+json"
        assert list(told)[:5] == PROBLEM
        assert set(told) <= {*PROBLEM, "instance", "retry_after_seconds"}
        assert told["status"] == status
    return told["detail"]


@pytest.mark.parametrize("path", [BACKFILL, REBUILD, f"/api{BACKFILL}", "/metrics"])
def test_without_a_known_token_nobody_gets_in(served: Served, path: str) -> None:
    method = "GET" if path == "/metrics" else "POST"
    for token in (None, "evr_unknown", ""):
        response = served.ask(path, token, method)
        refused(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_token_does_what_its_scopes_say(served: Served) -> None:
    assert "items:admin" in refused(served.ask(REBUILD, "reporter", json={}), 403)
    assert "reports:admin" in refused(served.ask(BACKFILL, "items"), 403)
    assert "metrics:read" in refused(served.ask("/metrics", "reporter", "GET"), 403)


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        (BACKFILL, '{"limit": 0}', 400, "limit: expected a whole number from 1 to 10000; got 0"),
        (BACKFILL, '{"limit": 10001}', 400, "got 10001"),
        (BACKFILL, '{"limit":', 400, "Invalid JSON"),
        (BACKFILL, "\ud800".encode("utf-8", "surrogatepass"), 400, "Invalid JSON"),
        (BACKFILL, "[" * 10_000, 400, "Invalid JSON"),
        (BACKFILL, "[]", 422, "Input should be an object"),
        (BACKFILL, "null", 422, "Input should be an object"),
        (BACKFILL, '{"limit": "5"}', 422, "limit: Input should be a valid integer"),
        (BACKFILL, '{"limit": 5.5}', 422, "limit"),
        (BACKFILL, '{"limit": true}', 422, "limit"),
        (
            BACKFILL,
            '{"limits": 5, "org_id": 1}',
            422,
            "limits: Extra inputs are not permitted; org",
        ),
        (
            BACKFILL,
            '{"limit": "5"}',
            422,
            "Allowed: limit (the most outbox rows to enqueue, from 1",
        ),
        (REBUILD, "{}", 400, "Name a session or at least one run"),
        (REBUILD, '{"run_ids": []}', 400, "Name a session or at least one run"),
        (REBUILD, '{"session_id": "x"}', 422, "session_id must be a UUID"),
        (REBUILD, '{"run_ids": ["\\u0000"]}', 422, "NUL"),
        (REBUILD, '{"run_ids": "x"}', 422, "run_ids: Input should be a valid array"),
        (REBUILD, '{"session": "x"}', 422, "session: Extra inputs are not permitted"),
    ],
)
def test_a_body_that_is_wrong_is_told_what_is_allowed(
    served: Served, path: str, body: Any, status: int, told: str
) -> None:
    runs = served.instance.get_runs_count()
    response = served.ask(path, data=body, headers={"Content-Type": "application/json"})
    assert told in refused(response, status)
    assert served.instance.get_runs_count() == runs


def test_items_errors_name_the_fields(served: Served) -> None:
    told = served.ask(REBUILD, json={"session_id": "x"}).json()
    assert told["errors"] == [
        {"loc": ["session_id"], "msg": "must be a UUID", "type": "uuid_parsing"}
    ]


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"],
)
def test_a_body_of_another_type_is_refused(served: Served, content_type: str) -> None:
    for path in (BACKFILL, REBUILD):
        response = served.ask(path, data="{}", headers={"Content-Type": content_type})
        refused(response, 415)


def test_a_large_body_is_refused_however_it_is_sent(served: Served) -> None:
    headers = {"Content-Type": "application/json"}
    size = LARGEST_BODY + 1
    refused(served.ask(REBUILD, data=b" " * size, headers=headers), 413)
    pieces = iter([b" " * 65_536] * (size // 65_536 + 1))
    refused(served.ask(BACKFILL, data=pieces, headers=headers), 413)


def test_a_body_that_does_not_arrive_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "BODY_SECONDS", 0.2)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {BACKFILL} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 9\r\n\r\n{{"
        connection.sendall(head.encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408
        assert b"must arrive within" in response.read()


def test_what_does_not_exist_is_not_found(served: Served) -> None:
    session = {"session_id": str(uuid4())}
    for wrong, kind in (("acme", "organization"), ("red", "workspace"), ("webapp", "project")):
        path = REBUILD.replace(wrong, "nowhere")
        assert refused(served.ask(path, json=session), 404) == f"No such {kind}: 'nowhere'"
    nul = REBUILD.replace("acme", "a%00b%ff")
    assert refused(served.ask(nul, json=session), 404).startswith("No such organization")
    assert "77" in refused(served.ask(BACKFILL, "of-none"), 404)
    for path in ("/v1/reports", "/api/v1/", "/api/nothing", f"{BACKFILL}/{uuid4()}"):
        refused(served.ask(path, method="GET"), 404)
    refused(served.ask(f"{BACKFILL}/no%00uuid", method="GET"), 404)


def test_other_methods_are_refused(served: Served) -> None:
    for path in (BACKFILL, REBUILD):
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            response = served.ask(path, method=method)
            refused(response, 405)
            assert response.headers["Allow"] == "POST"


def test_a_bound_token_cannot_tell_whether_another_organization_exists(served: Served) -> None:
    session = {"session_id": str(uuid4())}
    answers = [
        (other, served.ask(REBUILD.replace("acme", other), "of-acme", json=body))
        for other in ("globex", "nowhere")
        for body in (session, {})
    ]
    for other, one in answers:
        assert refused(one, 404) == f"No such organization: '{other}'"
    assert len({one.text.replace(other, "") for other, one in answers}) == 1
    # It sees its own by either name.
    assert served.ask(REBUILD, "of-acme", json=session, headers=ASYNC).status_code == 202


def test_a_bound_token_backfills_its_organization_and_sees_no_other_run(served: Served) -> None:
    everybodys = served.ask(BACKFILL, headers=ASYNC).json()["run_id"]
    own = served.ask(BACKFILL, "of-one", headers=ASYNC).json()["run_id"]
    run = served.instance.get_run_by_id(own)
    assert run is not None
    assert run.run_config == {
        "ops": {
            "enqueue": {"config": {"limit": 1000, "org_id": 1}},
            "project": {"config": {"org_id": 1}},
        }
    }
    hidden = served.ask(f"{BACKFILL}/{everybodys}", "of-one", "GET")
    missing = served.ask(f"{BACKFILL}/{uuid4()}", "of-one", "GET")
    assert refused(hidden, 404) == refused(missing, 404)
    assert served.ask(f"{BACKFILL}/{own}", "of-one", "GET").status_code == 202


def test_a_run_that_goes_on_is_told_where_to_ask_again(served: Served) -> None:
    response = served.ask(f"/api{BACKFILL}", headers={"Prefer": "wait=1"})
    refused(response, 504)
    run_id = served.instance.get_runs(limit=1)[0].run_id
    assert response.json()["instance"] == f"{served.url}/runs/{run_id}"
    assert response.json()["retry_after_seconds"] == int(response.headers["Retry-After"])
    assert response.headers["Location"] == f"/api{BACKFILL}/{run_id}"
    again = served.ask(response.headers["Location"], method="GET")
    assert again.status_code == 202
    assert again.json()["run_id"] == run_id
    items = served.ask(REBUILD, json={"run_ids": ["r"]}, headers={"Prefer": "wait=1"})
    assert served.instance.get_runs(limit=1)[0].run_id in refused(items, 504)


def test_a_run_that_was_canceled_has_failed(served: Served) -> None:
    run_id = served.ask(BACKFILL, headers=ASYNC).json()["run_id"]
    served.end_runs()
    response = served.ask(f"{BACKFILL}/{run_id}", method="GET")
    assert refused(response, 500) == f"Run {run_id} canceled"
    assert response.json()["code"] == "run_failed"


def test_a_token_has_so_many_runs_at_work_and_no_more(served: Served) -> None:
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(served.ask, BACKFILL, headers=ASYNC) for _ in range(MOST_AT_WORK + 20)]
        responses = [one.result() for one in asked]
    statuses = [one.status_code for one in responses]
    assert statuses.count(202) == MOST_AT_WORK
    assert statuses.count(429) == 20
    full = next(one for one in responses if one.status_code == 429)
    refused(full, 429)
    assert int(full.headers["Retry-After"]) == full.json()["retry_after_seconds"] > 0
    # Others are not held up.
    assert served.ask(BACKFILL, "reporter", headers=ASYNC).status_code == 202


def test_one_key_makes_one_run_whichever_server_is_asked(served: Served, serve: Serve) -> None:
    headers = {**ASYNC, "Idempotency-Key": f"night-{uuid4()}"}
    with serve() as other:
        servers = [served, other] * 8
        with ThreadPoolExecutor(len(servers)) as pool:
            asked = [pool.submit(one.ask, BACKFILL, headers=headers) for one in servers]
            answers = [one.result() for one in asked]
    assert {one.status_code for one in answers} == {202}
    run_ids = {one.json()["run_id"] for one in answers}
    assert len(run_ids) == 1
    # Another token's, another call's, another request's key is another matter.
    theirs = served.ask(BACKFILL, "reporter", headers=headers).json()["run_id"]
    items = served.ask(REBUILD, json={"run_ids": ["r"]}, headers=headers).json()["run_id"]
    assert not {theirs, items} & run_ids
    assert "another request" in refused(
        served.ask(BACKFILL, json={"limit": 7}, headers=headers), 422
    )
    for key in ("", "ä", "x" * 256, "a b"):
        bad = {"Idempotency-Key": key.encode()}
        assert "Idempotency-Key" in refused(served.ask(BACKFILL, headers=bad), 400)


def test_a_run_that_a_killed_server_left_behind_is_launched_by_its_key(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {**ASYNC, "Idempotency-Key": f"night-{uuid4()}"}
    with monkeypatch.context() as killed:

        def dies(*_: object) -> None:
            raise KeyError

        killed.setattr(type(served.instance), "submit_run", dies)
        refused(served.ask(BACKFILL, headers=headers), 500)
    left = served.instance.get_runs(limit=1)[0]
    assert left.status is DagsterRunStatus.NOT_STARTED
    assert served.ask(BACKFILL, headers=headers).json()["run_id"] == left.run_id
    run = served.instance.get_run_by_id(left.run_id)
    assert run is not None
    assert run.status is DagsterRunStatus.QUEUED


def test_a_client_that_hangs_up_does_not_stop_the_run(served: Served) -> None:
    with pytest.raises(requests.ReadTimeout):
        requests.post(
            served.url + BACKFILL,
            headers={"Authorization": f"Bearer {served.tokens['admin']}"},
            timeout=1.5,
        )
    assert served.instance.get_runs(limit=1)[0].status is DagsterRunStatus.QUEUED


def test_a_database_that_is_away_is_told(served: Served, serve: Serve) -> None:
    nowhere = SecretStr("postgresql://nobody:secret@127.0.0.1:1/nothing")
    with serve(postgres_url=nowhere) as lost:
        response = lost.ask(BACKFILL, "of-one")
        assert "secret" not in refused(response, 503)
        assert response.headers["Retry-After"]
        assert (
            'everruns_scrape_failed{part="outbox"} 1.0' in lost.ask("/metrics", method="GET").text
        )


def test_a_database_without_the_tables_of_a_part_is_told(served: Served) -> None:
    tables = [sql.Identifier("item_workspaces"), sql.Identifier("hidden")]
    rename = sql.SQL("ALTER TABLE {} RENAME TO {}")
    with PostgresDatabase(served.settings).connect() as connection:
        connection.execute(rename.format(*tables))
        try:
            told = refused(served.ask(REBUILD, json={"run_ids": ["r"]}), 503)
        finally:
            connection.execute(rename.format(*reversed(tables)))
    assert "item_workspaces" in told


@pytest.mark.parametrize(
    ("part", "there", "off"), [("items", REBUILD, BACKFILL), ("reporting", BACKFILL, REBUILD)]
)
def test_the_call_of_a_part_that_is_off_is_not_found(
    serve: Serve, part: str, there: str, off: str
) -> None:
    with serve(parts=(part,)) as half:
        refused(half.ask(off, json={}), 404)
        refused(half.ask(there, None), 401)
        paths = half.ask("/api/openapi.json", None, "GET").json()["paths"]
        assert [path for path in paths if path.endswith("backfill")] == [
            f"/api{BACKFILL}" for _ in range(part == "reporting")
        ]
        assert "scrape_failed" in half.ask("/metrics", method="GET").text


def test_without_a_file_of_tokens_the_api_lets_nobody_in(serve: Serve) -> None:
    with serve(api_tokens=None) as closed:
        refused(closed.ask(BACKFILL), 401)
        assert closed.ask("/healthz", None, "GET").json() == {"status": "ok"}
        assert closed.ask("/readyz", None, "GET").json() == {"status": "ok"}
