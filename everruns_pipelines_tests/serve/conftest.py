"""The web server in this process, without a daemon: what it launches stays in the queue."""

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copy
from typing import Any, Protocol
from unittest.mock import patch

import pytest
import requests
import uvicorn
from dagster import DagsterInstance
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from psycopg import sql

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import embedded_postgres_url
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.serve.app import Address, create_app
from everruns_pipelines.serve.runs import AT_WORK
from everruns_pipelines.serve.tokens import Grant, make_token
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT, free_port, until

GRANTS = (
    Grant("admin", frozenset({"reports:admin", "items:admin", "metrics:read"})),
    Grant("reporter", frozenset({"reports:admin"})),
    Grant("items", frozenset({"items:admin"})),
    Grant("of-one", frozenset({"reports:admin"}), org_id=1),
    Grant("of-none", frozenset({"reports:admin"}), org_id=77),
    Grant("of-acme", frozenset({"items:admin"}), organization="acme"),
    Grant("fuzz", frozenset({"reports:admin", "items:admin"})),
)
LOCATION = InProcessCodeLocationOrigin(
    LoadableTargetOrigin(module_name="everruns_pipelines.definitions"),
    location_name="everruns_pipelines",
)
BACKFILL = "/v1/reports/admin/backfill"
REBUILD = "/v1/org/acme/ws/red/projects/webapp/items/rebuild"


@dataclass
class Served:
    """A server that answers, and what stands behind it."""

    url: str
    settings: Settings
    instance: DagsterInstance
    tokens: dict[str, str] = field(default_factory=dict[str, str])

    def ask(
        self, path: str, token: str | None = "admin", method: str = "POST", **request: Any
    ) -> requests.Response:
        """A request; by default with the token that may do everything."""
        given: dict[str, str] = {}
        if token is not None:
            given["Authorization"] = f"Bearer {self.tokens.get(token, token)}"
        headers = {**given, **request.pop("headers", {})}
        return requests.request(method, self.url + path, headers=headers, timeout=60, **request)

    def end_runs(self) -> None:
        """Take everything out of the queue, so that no token is at its limit."""
        for run in self.instance.get_runs():
            if run.status in AT_WORK:
                self.instance.report_run_canceled(run)


class Serve(Protocol):
    """Starts a server; what is not given is as in `running`."""

    def __call__(
        self, *, prefix: str = ..., read_only: bool = ..., **changes: Any
    ) -> AbstractContextManager[Served]: ...


@pytest.fixture(scope="session")
def serve(
    home: Path, admin: Connection, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """Starts servers that share Dagster's storage and the platform's database."""
    databases = {"served": "everruns", "served_dagster": "template0"}
    for name, template in databases.items():
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    directory = tmp_path_factory.mktemp("served")
    copy(ROOT / "dagster.yaml", directory)
    tokens, lines = zip(*(make_token(grant) for grant in GRANTS), strict=True)
    (directory / "tokens").write_text("\n".join(lines) + "\n")
    environment = {
        "EVERRUNS_POSTGRES_URL": embedded_postgres_url(home, "served"),
        "EVERRUNS_HOME": str(home),
        "EVERRUNS_API_TOKENS": str(directory / "tokens"),
    }
    settings = Settings.from_environment(environment)
    with PostgresDatabase(settings).connect() as connection:
        load_sample_data(connection, events=60, days=3)
        _add_projects(connection)
    stored = {
        "EVERRUNS_DAGSTER_POSTGRES_URL": embedded_postgres_url(home, "served_dagster"),
        "EVERRUNS_HOME": str(home),
    }
    with ExitStack() as stack:
        with patch.dict(os.environ, stored):
            instance = stack.enter_context(DagsterInstance.from_config(str(directory)))
        instance.optimize_for_webserver(15_000, 3600, 20)

        @contextmanager
        def start(
            *, prefix: str = "", read_only: bool = False, **changes: Any
        ) -> Generator[Served]:
            address = Address("127.0.0.1", free_port(), prefix)
            with WorkspaceProcessContext(
                instance,
                workspace_load_target=InProcessWorkspaceLoadTarget(LOCATION),
                read_only=read_only,
            ) as context:
                changed = settings.model_copy(update=changes)
                app = create_app(context, changed, address, read_only=read_only)
                with _running(app, address.port):
                    yield Served(
                        f"http://127.0.0.1:{address.port}{prefix}",
                        changed,
                        instance,
                        {grant.name: token for grant, token in zip(GRANTS, tokens, strict=True)},
                    )

        yield start
    for name in databases:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def running(serve: Serve) -> Iterator[Served]:
    with serve() as served:
        yield served


@pytest.fixture
def served(running: Served) -> Served:
    """The server, with nothing in its queue."""
    running.end_runs()
    return running


def _add_projects(connection: Connection) -> None:
    """Two organizations, each with a workspace `red` and a project `webapp`."""
    for name in ("acme", "globex"):
        connection.execute(
            "WITH organization AS ("
            " INSERT INTO item_organizations (slug) VALUES (%s) RETURNING id"
            "), workspace AS ("
            " INSERT INTO item_workspaces (organization_id, slug)"
            " SELECT id, 'red' FROM organization RETURNING id"
            ") INSERT INTO projects (workspace_id, slug) SELECT id, 'webapp' FROM workspace",
            [name],
        )


@contextmanager
def _running(app: Any, port: int) -> Generator[None]:
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started, "the server has started")
        yield
    finally:
        server.should_exit = True
        thread.join(30)
