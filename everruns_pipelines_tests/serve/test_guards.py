"""What stands before every request: hosts, origins, GraphQL by whom and how, headers, the log."""

import http.client
import json
import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from everruns_pipelines.client import Deployment
from everruns_pipelines.errors import Refusal
from everruns_pipelines_tests.browser import CHROMIUM, opened
from everruns_pipelines_tests.serve.conftest import BACKFILL, REBUILD, Serve, Served
from everruns_pipelines_tests.serve.test_refusals import ASYNC, refused

SELECTOR = {
    "repositoryLocationName": "everruns_pipelines",
    "repositoryName": "__repository__",
    "jobName": "project_reporting",
}
LAUNCH = (
    "mutation L($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
    " ... on Error { message } } }"
)
INLINE = (
    'mutation { launchRun(executionParams: {selector: {repositoryLocationName: "everruns_pipelines"'
    ', repositoryName: "__repository__", jobName: "project_reporting"}}) { __typename } }'
)


def launch(**selector: str) -> dict[str, Any]:
    chosen = {**SELECTOR, **selector}
    return {"query": LAUNCH, "variables": {"p": {"selector": chosen, "runConfigData": {}}}}


@pytest.fixture
def nothing_runs(served: Served) -> Iterator[None]:
    """Whatever the test does, it launches nothing."""
    before = served.instance.get_runs_count()
    yield
    assert served.instance.get_runs_count() == before


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("path", ["/", "/graphql", BACKFILL, "/metrics", "/favicon.png"])
def test_a_name_that_is_not_ours_is_refused(served: Served, path: str) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "[::1"):
        assert "EVERRUNS_ALLOWED_HOSTS" in refused(
            served.ask(path, method="GET", headers={"Host": host}), 403
        )


def test_names_that_are_ours_are_answered(serve: Serve) -> None:
    with serve(
        allowed_hosts="pipelines.internal, Other", public_url="https://Public.example/x"
    ) as named:
        for host in ("pipelines.internal", "other:99", "public.example", "localhost:3000", "[::1]"):
            headers = {"Host": host}
            assert named.ask("/server_info", None, "GET", headers=headers).status_code == 200
        # Nobody asks a probe under a name.
        assert named.ask("/healthz", None, "GET", headers={"Host": "10.1.2.3"}).status_code == 200
        told = named.ask(BACKFILL, headers=ASYNC).json()
        assert told["instance"] == f"https://Public.example/x/runs/{told['run_id']}"


@pytest.mark.usefixtures("nothing_runs")
def test_a_mutation_comes_by_post_and_as_json_only(served: Served) -> None:
    by_get = served.ask("/graphql", None, "GET", params={"query": INLINE})
    refused(by_get, 405)
    both = "query A { version } " + INLINE.replace("mutation", "mutation B")
    refused(served.ask("/graphql", None, "GET", params={"query": both, "operationName": "B"}), 405)
    twice = [("query", "{ version }"), ("query", INLINE)]
    refused(served.ask("/graphql", None, "GET", params=twice), 405)
    deep = "{ a(x: " + "[" * 2000 + "]" * 2000 + ") }"
    refused(served.ask("/graphql", None, "GET", params={"query": deep}), 400)
    for content_type in ("text/plain", "application/graphql", "text/plain; application/json"):
        headers = {"Content-Type": content_type}
        refused(served.ask("/graphql", None, data=json.dumps(launch()), headers=headers), 415)
    refused(served.ask("/graphql", None, params={"query": INLINE}), 415)
    query = served.ask("/graphql", None, "GET", params={"query": "{ version }"})
    assert query.json() == {"data": {"version": ""}}


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_changes_nothing(served: Served, headers: dict[str, str]) -> None:
    refused(served.ask("/graphql", None, json=launch(), headers=headers), 403)
    refused(served.ask("/report_asset_materialization/x", None, headers=headers), 403)
    refused(served.ask(BACKFILL, headers=headers), 403)
    with pytest.raises(InvalidStatus, match="403"):
        socket(served, headers)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "path", ["//graphql", "/v1/%2e%2e/graphql", "/graphql/..", "/a/.%2fgraphql"]
)
def test_a_path_that_a_proxy_reads_otherwise_is_refused(served: Served, path: str) -> None:
    answered = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    answered.request("POST", path)
    assert answered.getresponse().status == 400


def test_our_own_page_may(served: Served) -> None:
    headers = {"Origin": served.url, "Sec-Fetch-Site": "same-origin"}
    answer = served.ask("/graphql", None, json=launch(), headers=headers).json()
    assert answer["data"]["launchRun"]["__typename"] == "LaunchRunSuccess"
    socket(served, {"Origin": served.url})


@pytest.mark.usefixtures("nothing_runs")
def test_a_token_reaches_through_graphql_no_more_than_over_the_api(served: Served) -> None:
    def asked(token: str, body: Any) -> requests.Response:
        return served.ask("/graphql", token, json=body)

    refused(asked("evr_unknown", launch()), 401)
    refused(asked("of-one", launch()), 403)
    wider = [
        launch(jobName="rebuild_items"),
        launch(jobName="housekeeping"),
        # GraphQL takes the one that is told by the older name.
        launch(pipelineName="rebuild_items"),
        {"query": INLINE},
        {"query": 'mutation { terminateRun(runId: "x") { __typename } }'},
        {
            "query": LAUNCH.replace(
                "{ launchRun", "{ a: wipeAssets(assetPartitionRanges: []) { __typename } launchRun"
            ),
            "variables": launch()["variables"],
        },
        {**launch(), "variables": json.dumps(launch(jobName="housekeeping")["variables"])},
        {"query": "mutation { ...F } fragment F on Mutation { setNuxSeen }"},
    ]
    for body in wider:
        assert "launches backfill_reporting and project_reporting only" in refused(
            asked("reporter", body), 403
        )
    refused(asked("reporter", []), 400)
    with pytest.raises(InvalidStatus, match="403"):
        socket(served, {"Authorization": "Bearer evr_unknown"})
    with pytest.raises(InvalidStatus, match="403"):
        socket(served, {"Authorization": f"Bearer {served.tokens['reporter']}"})


def test_the_client_launches_with_a_token(served: Served) -> None:
    bearer = {"Authorization": f"Bearer {served.tokens['reporter']}"}
    run = Deployment(served.url, bearer).launch("backfill_reporting", {"enqueue": {"limit": 5}})
    assert served.instance.get_run_by_id(run) is not None
    with pytest.raises(Refusal, match="HTTP status 403"):
        Deployment(served.url, bearer).launch("rebuild_items", {})


def test_every_answer_tells_the_browser_what_may_be_done_with_it(served: Served) -> None:
    for path in ("/", "/runs", "/graphql", "/server_info", "/favicon.png", BACKFILL, "/healthz"):
        response = served.ask(path, None, "GET", headers={"Accept": "text/html"})
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
    assert "'nonce-" in served.ask("/runs", None, "GET").headers["Content-Security-Policy"]


def test_read_only_launches_nothing_by_any_way_in(served: Served, serve: Serve) -> None:
    before = served.instance.get_runs_count()
    with serve(read_only=True) as closed:
        refused(closed.ask(BACKFILL), 403)
        refused(closed.ask(REBUILD, json={"run_ids": ["r"]}), 403)
        for token in (None, "reporter"):
            answer = closed.ask("/graphql", token, json=launch()).json()
            assert answer["data"]["launchRun"]["__typename"] == "UnauthorizedError"
        reported = closed.ask("/report_asset_materialization/fact_turn", None)
        assert reported.status_code == 401
        assert closed.ask("/graphql", None, json={"query": "{ version }"}).status_code == 200
        schedule = (
            "mutation { startSchedule(scheduleSelector: {repositoryLocationName:"
            ' "everruns_pipelines", repositoryName: "__repository__", scheduleName:'
            ' "hourly_health"}) { __typename } }'
        )
        answer = closed.ask("/graphql", None, json={"query": schedule}).json()
        assert answer["data"]["startSchedule"]["__typename"] == "UnauthorizedError"
    assert served.instance.get_runs_count() == before


def test_everything_lies_below_the_prefix(serve: Serve) -> None:
    with serve(prefix="/x") as below:
        told = below.ask(BACKFILL, headers=ASYNC)
        assert told.headers["Location"].startswith(f"/x{BACKFILL}/")
        assert told.json()["instance"].startswith(f"{below.url}/runs/")
        assert below.ask("/healthz", None, "GET").status_code == 200
        assert below.ask("/api/openapi.json", None, "GET").json()["servers"] == [{"url": "/x"}]
        refused(below.ask("/graphql", None, "GET", params={"query": INLINE}), 405)
        assert '"pathPrefix": "/x"' in below.ask("/runs", None, "GET").text
        root = below.url.removesuffix("/x")
        assert requests.post(root + BACKFILL, timeout=10).status_code == 404
        assert requests.get(root, timeout=10).url == below.url + "/"


def test_the_log_has_no_query_and_no_token(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "everruns_pipelines.access")
    served.ask(f"{BACKFILL}?token=secret", headers=ASYNC)
    served.ask("/metrics%0Aforged?x=secret", "evr_secret", "GET")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(f"127.0.0.1 POST {BACKFILL} 202 ")
    assert lines[1].startswith("127.0.0.1 GET /metrics%0Aforged ")
    assert "secret" not in caplog.text
    assert served.tokens["admin"] not in caplog.text


def socket(served: Served, headers: dict[str, str]) -> None:
    """Open a WebSocket as the UI does, and close it."""
    given = dict(headers)
    with connect(
        served.url.replace("http", "ws") + "/graphql",
        origin=given.pop("Origin", None),  # pyright: ignore[reportArgumentType]
        additional_headers=given,
        subprotocols=["graphql-ws"],  # pyright: ignore[reportArgumentType]
    ) as opened_socket:
        opened_socket.send(json.dumps({"type": "connection_init"}))
        assert json.loads(opened_socket.recv(10)) == {"type": "connection_ack"}


HOSTILE = Path(__file__).with_name("hostile.html").read_text()


@pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no Chromium: apt-get install chromium")
@pytest.mark.usefixtures("nothing_runs")
def test_a_hostile_page_launches_nothing(served: Served) -> None:
    page_text = (
        HOSTILE.replace("LAUNCH", json.dumps(launch()))
        .replace("QUERY", INLINE.replace(" ", "%20").replace('"', "%22"))
        .replace("BODY_HEAD", json.dumps({**launch(), "x": ""})[:-2])
        .replace("BODY_TAIL", '"}')
    )
    asked: list[str] = []
    with hostile_site() as site:
        # The same server under its other name is another site too.
        for url in (served.url, served.url.replace("127.0.0.1", "localhost")):
            site["page"] = page_text.replace("URL", url).encode()
            with opened(site["url"]) as page:
                page.on("response", lambda one: asked.append(f"{one.status} {one.url}"))
                page.goto("/")
                page.wait_for_function("document.title.startsWith('done')")
                told = page.title()
                page.wait_for_load_state("networkidle")
                assert "socket: refused" in told
                assert "json: TypeError" in told
                framed = page.frames[-1]
                assert "Dagster" not in framed.content()
    assert not [one for one in asked if one.startswith("2") and "/graphql" in one]


@contextmanager
def hostile_site() -> Generator[dict[str, Any]]:
    """Another site on this machine, whose page is what `page` holds."""
    site: dict[str, Any] = {"page": b""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(site["page"])

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, likewise
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site["url"] = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()
