"""The GraphQL client against a webserver that misbehaves on purpose."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from everruns_pipelines import client
from everruns_pipelines.client import Deployment, Progress
from everruns_pipelines.errors import Refusal, RunFailure

JOBS = {
    "repositoriesOrError": {
        "nodes": [
            {
                "name": "__repository__",
                "location": {"name": "everruns_pipelines"},
                "jobs": [{"name": "backfill_reporting"}],
            }
        ]
    }
}
LAUNCHED = {"launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "run-1"}}}


FOR_GOOD = {"dagster/will_retry": "false"}


def followed(
    status: str,
    *events: dict[str, Any],
    more: bool = False,
    tags: Mapping[str, str] = FOR_GOOD,
) -> dict[str, Any]:
    told = [{"key": key, "value": value} for key, value in tags.items()]
    return {
        "runOrError": {"__typename": "Run", "status": status, "tags": told},
        "logsForRun": {"cursor": "c", "hasMore": more, "events": list(events)},
    }


def output(step: str, **counts: int) -> dict[str, Any]:
    return {
        "__typename": "ExecutionStepOutputEvent",
        "stepKey": step,
        "metadataEntries": [{"label": k, "intValue": v} for k, v in counts.items()],
    }


def said(message: str) -> dict[str, Any]:
    return {"__typename": "LogMessageEvent", "message": message}


Answer = dict[str, Any] | int | None


@dataclass
class Webserver:
    """Answers from a script: data, an HTTP status, or (None) a connection that breaks."""

    url: str = ""
    script: list[tuple[str, Answer]] = field(default_factory=list[tuple[str, Answer]])
    requests: list[tuple[dict[str, str], dict[str, Any]]] = field(
        default_factory=list[tuple[dict[str, str], dict[str, Any]]]
    )

    def answer(self, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        self.requests.append((headers, body))
        operation, answer = self.script.pop(0)
        assert operation in body["query"]
        return answer


@pytest.fixture
def webserver() -> Iterator[Webserver]:
    script = Webserver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = script.answer(dict(self.headers), body)
            if answer is None:
                self.close_connection = True
                return
            status, text = (answer, b"") if isinstance(answer, int) else (200, _encoded(answer))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    server.shutdown()
    server.server_close()
    thread.join()
    assert not script.script


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SHORTEST_POLL", 0.001)
    monkeypatch.setattr(client, "_LONGEST_POLL", 0.001)


def backfill(url: str, tell: Callable[[Progress], None] = lambda _: None) -> Any:
    return Deployment(url, patience=20).run("backfill_reporting", {"enqueue": {"limit": 1}}, tell)


def test_counts_come_back_by_op(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        ("Follow", followed("STARTED", output("enqueue", enqueued=3), more=True)),
        ("Follow", followed("SUCCESS", output("project", claimed=3))),
    ]
    assert backfill(webserver.url) == {"enqueue": {"enqueued": 3}, "project": {"claimed": 3}}


def test_what_an_op_lists_comes_back_too(webserver: Webserver) -> None:
    listed = output("rebuild", processed=3)
    row = {"item": "one", "fields": "title"}
    table = {"label": "taken_back", "table": {"records": [json.dumps(row)]}}
    listed["metadataEntries"].append(table)
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        ("Follow", followed("SUCCESS", listed)),
    ]
    assert backfill(webserver.url) == {"rebuild": {"processed": 3, "taken_back": [row]}}


def test_it_tells_messages_and_how_far_the_run_is(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        (
            "Follow",
            followed("SUCCESS", said("Looking"), said("5 rows claimed, 1 failed; 7 remain")),
        ),
    ]
    told: list[Progress] = []
    backfill(webserver.url, told.append)
    assert told[0].message.endswith(f"{webserver.url}/runs/run-1")
    assert told[1:] == [Progress("Looking"), Progress("5 rows claimed, 1 failed; 7 remain", 5, 12)]


def test_it_survives_a_restart_of_the_webserver(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        ("Follow", followed("STARTED", output("enqueue", enqueued=3))),
        ("Follow", None),
        ("Follow", 502),
        ("Follow", 503),
        ("Follow", followed("SUCCESS")),
    ]
    told: list[Progress] = []
    assert backfill(webserver.url, told.append) == {"enqueue": {"enqueued": 3}}
    assert sum("Waiting: " in one.message for one in told) == 3


def test_it_gives_up_in_the_end_and_says_where_the_run_is(webserver: Webserver) -> None:
    webserver.script = [("Follow", 503)]
    with pytest.raises(RunFailure, match=r"The run may go on: http://\S+/runs/run-1"):
        Deployment(webserver.url, patience=-1).follow("run-1")


def test_a_run_is_not_launched_twice_when_the_answer_is_lost(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", None),
        ("FindRun", 503),
        ("FindRun", {"runsOrError": {"results": [{"runId": "run-7"}]}}),
    ]
    assert Deployment(webserver.url).launch("backfill_reporting", {}) == "run-7"
    launch, found = webserver.requests[1][1], webserver.requests[3][1]
    assert launch["variables"]["parameters"]["executionMetadata"] == {
        "tags": found["variables"]["tags"]
    }


def test_a_launch_that_did_not_happen_is_refused(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", None),
        *[("FindRun", {"runsOrError": {"results": []}})] * 3,
    ]
    with pytest.raises(Refusal, match="No run of this request was found") as refused:
        Deployment(webserver.url).launch("backfill_reporting", {})
    assert refused.value.code == "unavailable"


def test_a_launch_that_the_server_is_still_at_is_found(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", 504),
        ("FindRun", {"runsOrError": {"results": []}}),
        ("FindRun", {"runsOrError": {"results": [{"runId": "run-7"}]}}),
    ]
    assert Deployment(webserver.url).launch("backfill_reporting", {}) == "run-7"


def test_headers_go_with_every_request_and_stay_secret(webserver: Webserver) -> None:
    webserver.script = [("Jobs", 302)]
    deployment = Deployment(webserver.url, {"Authorization": "Bearer secret"})
    with pytest.raises(Refusal, match="HTTP status 302"):
        deployment.run("backfill_reporting", {})
    assert webserver.requests[0][0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(deployment)


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "permission_denied"), (403, "permission_denied"), (404, "unavailable")],
)
def test_a_refusal_of_the_proxy_is_a_refusal(webserver: Webserver, status: int, code: str) -> None:
    webserver.script = [("Jobs", status)]
    with pytest.raises(Refusal) as refused:
        backfill(webserver.url)
    assert refused.value.code == code


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:3000", "http:///x"])
def test_only_web_addresses_are_asked(url: str) -> None:
    with pytest.raises(Refusal, match="url: expected"):
        backfill(url)


def test_an_unknown_job_is_refused(webserver: Webserver) -> None:
    webserver.script = [("Jobs", JOBS)]
    with pytest.raises(Refusal, match="has no job elsewhere"):
        Deployment(webserver.url).launch("elsewhere", {})


def test_config_that_dagster_refuses_is_a_refusal(webserver: Webserver) -> None:
    invalid = {"__typename": "RunConfigValidationInvalid", "errors": [{"message": "no such field"}]}
    webserver.script = [("Jobs", JOBS), ("Launch", {"launchRun": invalid})]
    with pytest.raises(Refusal, match="no such field"):
        backfill(webserver.url)


def test_a_run_that_refuses_is_a_refusal(webserver: Webserver) -> None:
    error = {"code": "not_found_error", "detail": "no organization 7", "status": 404}
    failure = {
        "__typename": "ExecutionStepFailureEvent",
        "error": {"message": "dagster.Failure"},
        "failureMetadata": {
            "description": "no organization 7",
            "metadataEntries": [{"label": "error", "jsonString": json.dumps(error)}],
        },
    }
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        ("Follow", followed("FAILURE", failure)),
    ]
    with pytest.raises(Refusal) as refused:
        backfill(webserver.url)
    assert refused.value.as_problem_details()["status"] == 404


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({"__typename": "RunFailureEvent", "message": "worker died\ntrace"}, "worker died"),
        ({"__typename": "RunCanceledEvent"}, "it was canceled"),
    ],
)
def test_a_run_that_fails_is_a_failure(
    webserver: Webserver, event: dict[str, Any], reason: str
) -> None:
    status = "CANCELED" if "Canceled" in event["__typename"] else "FAILURE"
    webserver.script = [("Follow", followed(status, event))]
    with pytest.raises(RunFailure, match=f"Run run-1 failed: {reason}$"):
        Deployment(webserver.url).follow("run-1")


def test_a_run_that_died_is_followed_to_the_one_in_its_place(webserver: Webserver) -> None:
    again = {"dagster/will_retry": "true"}
    webserver.script = [
        ("Follow", followed("FAILURE", tags={})),
        ("Follow", followed("FAILURE", tags=again)),
        ("Follow", followed("FAILURE", tags={**again, "dagster/auto_retry_run_id": "run-2"})),
        ("Follow", followed("QUEUED", tags={})),
        ("Follow", followed("SUCCESS", output("enqueue", enqueued=3), tags={})),
    ]
    told: list[str] = []
    counts = Deployment(webserver.url).follow("run-1", lambda said: told.append(said.message))
    assert counts == {"enqueue": {"enqueued": 3}}
    assert told == [f"Run run-1 died and is done again: {webserver.url}/runs/run-2"]
    assert [asked["variables"]["run"] for _, asked in webserver.requests][-2:] == ["run-2"] * 2


def test_where_runs_are_not_retried_a_failure_is_final(webserver: Webserver) -> None:
    webserver.script = [("Follow", followed("FAILURE", tags={}))] * 3
    with pytest.raises(RunFailure, match="Run run-1 failed"):
        Deployment(webserver.url).follow("run-1")


def _encoded(data: dict[str, Any]) -> bytes:
    return json.dumps({"data": data}).encode()


def test_a_job_that_is_not_configured_by_op_is_launched(webserver: Webserver) -> None:
    webserver.script = [
        ("Jobs", JOBS),
        ("Launch", LAUNCHED),
        ("Follow", followed("SUCCESS")),
    ]
    Deployment(webserver.url).run("backfill_reporting", {})
    [_, (_, launched), _] = webserver.requests
    assert launched["variables"]["parameters"]["runConfigData"] == {}
