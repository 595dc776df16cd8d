"""The files in deploy/proxy: Debian's own Caddy and nginx are started from them, and attacked."""

import shutil
import socket
import ssl
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import requests
import urllib3
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from everruns_pipelines_tests.deploy.services import needs, running
from everruns_pipelines_tests.deployment import ROOT, free_port
from everruns_pipelines_tests.serve.conftest import BACKFILL, Serve, Served
from everruns_pipelines_tests.serve.test_guards import INLINE, launch
from everruns_pipelines_tests.serve.test_refusals import ASYNC, refused

pytestmark = [pytest.mark.deploy, pytest.mark.filterwarnings("ignore:Unverified HTTPS")]

FILES = ROOT / "deploy" / "proxy"
LOGIN = ("operator", "correct horse")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("caddy", marks=needs("caddy", "caddy")),
        pytest.param("nginx", marks=needs("nginx", "nginx")),
    ],
)
def proxy(
    request: pytest.FixtureRequest, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Served]]:
    """The address of a proxy, and the server behind it."""
    urllib3.disable_warnings()
    directory = tmp_path_factory.mktemp(request.param)
    port = free_port()
    url = f"https://localhost:{port}"
    with serve(public_url=url) as served:
        start = caddy if request.param == "caddy" else nginx
        with start(directory, port, served.url.removeprefix("http://")):
            yield url, served
    served.end_runs()


def caddy(directory: Path, port: int, upstream: str) -> AbstractContextManager[Any]:
    hashed = subprocess.run(
        ["caddy", "hash-password", "--plaintext", LOGIN[1]], capture_output=True, check=True
    )
    return running(
        ["caddy", "run", "--adapter", "caddyfile", "--config", str(FILES / "Caddyfile")],
        lambda: answers(port),
        directory / "log",
        environment={
            "EVERRUNS_SITE": f"https://localhost:{port}",
            "EVERRUNS_UPSTREAM": upstream,
            "EVERRUNS_USER": LOGIN[0],
            "EVERRUNS_PASSWORD_HASH": hashed.stdout.decode().strip(),
            "EVERRUNS_HTTP_PORT": str(free_port()),
            "XDG_DATA_HOME": str(directory),
            "XDG_CONFIG_HOME": str(directory),
        },
    )


def nginx(directory: Path, port: int, upstream: str) -> AbstractContextManager[Any]:
    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-out", str(certificate), "-keyout", str(key)],
        capture_output=True, check=True,
    )  # fmt: skip
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", LOGIN[1]], capture_output=True, check=True, text=True
    )
    (directory / "passwords").write_text(f"{LOGIN[0]}:{hashed.stdout}")
    directory.chmod(0o755)
    text = (FILES / "nginx.conf").read_text()
    for told, here in (
        ("127.0.0.1:3000", upstream),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("pipelines.example.com", "localhost"),
        ("/etc/ssl/certs/everruns.pem", str(certificate)),
        ("/etc/ssl/private/everruns.key", str(key)),
        ("/etc/nginx/everruns.htpasswd", str(directory / "passwords")),
    ):
        assert told in text
        text = text.replace(told, here)
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "whole.conf").write_text(
        f"user root; daemon off; pid {directory}/pid; error_log {directory}/error;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n{text}\n}}\n"
    )
    return running(
        [str(shutil.which("nginx")), "-c", str(directory / "whole.conf")],
        lambda: answers(port),
        directory / "log",
    )


def answers(port: int) -> bool:
    try:
        requests.get(f"https://localhost:{port}/", verify=False, timeout=5)
    except requests.RequestException:
        return False
    return True


def ask(url: str, method: str = "GET", **request: Any) -> requests.Response:
    return requests.request(method, url, verify=False, timeout=60, allow_redirects=False, **request)


def test_people_log_in(proxy: tuple[str, Served]) -> None:
    url, served = proxy
    for path in ("/", "/runs", "/graphql", "/server_info", "/logs/x", "/healthz"):
        response = ask(url + path)
        assert response.status_code == 401, path
        assert "Basic" in response.headers["WWW-Authenticate"]
    assert ask(f"{url}/", auth=(LOGIN[0], "wrong")).status_code == 401
    before = served.instance.get_runs_count()
    assert ask(f"{url}/graphql", "POST", json=launch()).status_code == 401
    assert served.instance.get_runs_count() == before
    assert "Dagster" in ask(f"{url}/runs", auth=LOGIN).text
    own = {"Origin": url}
    answer = ask(f"{url}/graphql", "POST", json=launch(), auth=LOGIN, headers=own).json()
    assert answer["data"]["launchRun"]["__typename"] == "LaunchRunSuccess"
    assert "max-age" in ask(f"{url}/runs", auth=LOGIN).headers["Strict-Transport-Security"]


def test_a_foreign_page_in_the_browser_of_somebody_logged_in_changes_nothing(
    proxy: tuple[str, Served],
) -> None:
    url, served = proxy
    before = served.instance.get_runs_count()
    foreign = {"Origin": "https://evil.example"}
    refused(ask(f"{url}/graphql", "POST", json=launch(), auth=LOGIN, headers=foreign), 403)
    refused(ask(f"{url}/graphql", params={"query": INLINE}, auth=LOGIN), 405)
    assert served.instance.get_runs_count() == before


def test_programs_come_with_a_token(proxy: tuple[str, Served]) -> None:
    url, served = proxy
    refused(ask(url + BACKFILL, "POST"), 401)
    refused(ask(f"{url}/metrics"), 401)
    bearer = {"Authorization": f"Bearer {served.tokens['reporter']}"}
    told = ask(url + BACKFILL, "POST", headers={**bearer, **ASYNC})
    assert told.status_code == 202
    assert told.json()["instance"].startswith(f"{url}/runs/")
    query = {"query": "{ version }"}
    assert ask(f"{url}/graphql", "POST", json=query, headers=bearer).status_code == 200
    wider = launch(jobName="housekeeping")
    refused(ask(f"{url}/graphql", "POST", json=wider, headers=bearer), 403)
    # A token opens nothing of what is for people.
    assert ask(f"{url}/runs", headers=bearer).status_code == 401


@pytest.mark.parametrize(
    "way",
    [
        "/report_asset_materialization/x/../../v1/y",
        "/logs/../v1/x",
        "/report_asset_check/..%2f..%2fv1/x",
    ],
)
def test_no_detour_leads_past_the_login(proxy: tuple[str, Served], way: str) -> None:
    status, _ = raw(proxy[0], f"POST {way} HTTP/1.1", [])
    assert status in (400, 401, 404)


@pytest.mark.parametrize(
    "value",
    [
        "Bearer evr_x",
        "bearer evr_x",
        "Bearer\tevr_x",
        "BEARER evr_x",
        "Bearer",
        "Bearer ",
        "Bear x",
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "/graphql",
        "/graphql/",
        "//graphql",
        "/%67raphql",
        "/v1/../graphql",
        "/v1/%2e%2e/graphql",
        "/api/..%2fgraphql",
        "/v1%2f..%2fgraphql",
        "/v1/..;/graphql",
    ],
)
def test_nobody_gets_past_the_login_with_a_token_that_is_not_known(
    proxy: tuple[str, Served], value: str, path: str
) -> None:
    url, _ = proxy
    status, text = raw(url, f"POST {path} HTTP/1.1", [f"Authorization: {value}"])
    assert status in (400, 401, 404, 415), (status, text)
    assert '"data"' not in text
    basic = "Authorization: Basic eDp5"
    status, text = raw(url, f"POST {path} HTTP/1.1", [f"Authorization: {value}", basic])
    assert status in (400, 401, 404), (status, text)
    status, text = raw(url, f"POST {path} HTTP/1.1", [basic, f"Authorization: {value}"])
    assert status in (400, 401, 404), (status, text)


def test_no_websocket_without_a_login(proxy: tuple[str, Served]) -> None:
    url, served = proxy
    for value in (None, "Bearer evr_x", f"Bearer {served.tokens['reporter']}"):
        with pytest.raises(InvalidStatus, match=r"401|403"):
            websocket(url, {} if value is None else {"Authorization": value})
    basic = "Basic " + b64encode(":".join(LOGIN).encode()).decode()
    websocket(url, {"Authorization": basic, "Origin": url})
    with pytest.raises(InvalidStatus, match="403"):
        websocket(url, {"Authorization": basic, "Origin": "https://evil.example"})


def test_what_is_large_slow_or_for_another_name_ends_at_the_proxy(
    proxy: tuple[str, Served],
) -> None:
    url, served = proxy
    bearer = {"Authorization": f"Bearer {served.tokens['reporter']}"}
    large = ask(url + BACKFILL, "POST", data=b" " * (2**20 + 4096), headers=bearer)
    # 502: the server behind, which refuses it too, hung up while Caddy still sent.
    assert large.status_code in (413, 502)
    _, text = raw(url, "GET /v1/x HTTP/1.1", [], host="evil.example")
    assert "There is nothing at this path" not in text
    port = int(url.rpartition(":")[2])
    with tls(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        connection.settimeout(30)
        started = time.monotonic()
        connection.recv(4096)
        assert time.monotonic() - started < 25


def raw(url: str, line: str, headers: list[str], host: str | None = None) -> tuple[int, str]:
    """A request as it is spelled, with a body that asks for what nobody may have: the answer."""
    port = int(url.rpartition(":")[2])
    body = '{"query": "{ version }"}'
    text = [
        line,
        f"Host: {host or f'localhost:{port}'}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
        "",
        body,
    ]
    with tls(port) as connection:
        connection.sendall("\r\n".join(text).encode())
        connection.settimeout(30)
        told = b""
        while piece := connection.recv(65_536):
            told += piece
    return int(told.split(b" ", 2)[1]), told.decode(errors="replace")


def tls(port: int) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(
        socket.create_connection(("127.0.0.1", port), timeout=30), server_hostname="localhost"
    )


def websocket(url: str, headers: dict[str, str]) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    given = dict(headers)
    with connect(
        url.replace("https", "wss") + "/graphql",
        ssl=context,
        origin=given.pop("Origin", None),  # pyright: ignore[reportArgumentType]
        additional_headers=given,
        subprotocols=["graphql-ws"],  # pyright: ignore[reportArgumentType]
    ) as opened:
        opened.send('{"type": "connection_init"}')
        assert "connection_ack" in str(opened.recv(10))
