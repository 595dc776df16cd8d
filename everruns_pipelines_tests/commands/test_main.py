"""The command line: one JSON object on standard output, the rest on standard error, a status."""

import json
from importlib.metadata import version
from typing import Any, NoReturn

import psycopg
import pytest

from everruns_pipelines.commands import main
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration import failures
from everruns_pipelines.reporting import backfill, database
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import World, rows, value, versions

DONE, FAILED, REFUSED = 0, 1, 2
_SCOPE = ("--organization", "o", "--workspace", "w", "--project", "p")


class Terminal:
    """Runs commands on the test's database and reads what they print."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.errors = ""

    def run(self, *arguments: str) -> tuple[int, Any]:
        """The exit status, and standard output as the one JSON object that it must be."""
        self._capfd.readouterr()
        status = main.run(arguments)
        printed = self._capfd.readouterr()
        self.errors = printed.err
        return status, json.loads(printed.out) if printed.out else None


@pytest.fixture
def terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> Terminal:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", postgres_url)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return Terminal(capfd)


@pytest.fixture
def world(connection: Connection) -> World:
    return World(connection)


def test_backfill_prints_exactly_the_keys_of_the_api_and_repairs_what_is_missing(
    terminal: Terminal, world: World
) -> None:
    world.event(world.session(world.org()))

    status, result = terminal.run("backfill", "--limit", "10")

    assert (status, result) == (
        DONE,
        {"enqueued": 2, "events": 1, "llm_generations": 0, "sessions": 1, "usage_ledger": 0},
    )
    assert differences(world.connection) == []


def test_a_dry_run_writes_nothing_and_verbose_tells_the_rest(
    terminal: Terminal, world: World
) -> None:
    org = world.org()
    world.event(world.session(org))
    chosen = ("--source-type", "event", "--source-type", "llm_generation", "--org-id", str(org))

    status, counted = terminal.run("backfill", "--dry-run", *chosen)

    assert (status, counted["enqueued"], counted["events"]) == (DONE, 1, 1)
    assert value(world.connection, "SELECT count(*) FROM reporting_outbox") == 0
    status, told = terminal.run("backfill", "--verbose", *chosen)
    assert (status, told["enqueued"], told["project"]["completed"]) == (DONE, 1, 1)


def test_project_prints_its_counts(terminal: Terminal, world: World) -> None:
    database.prepare(world.connection)
    org = world.org()
    world.tool_call(org)
    world.enqueue(org, "event", "no uuid")

    status, result = terminal.run("project", "--max-rows", "10")

    assert (status, result) == (DONE, {"claimed": 2, "completed": 1, "failed": 1, "parked": 0})


@pytest.mark.parametrize(
    ("arguments", "code", "status", "detail"),
    [
        (("backfill", "--limit", "0"), "validation_error", 400, "limit: expected"),
        (("backfill", "--limit", "10001"), "validation_error", 400, "limit: expected"),
        (
            ("backfill", "--limit", "many"),
            "validation_error",
            400,
            "argument --limit: expected a whole",
        ),
        (
            ("project", "--max-rows", "1.5"),
            "validation_error",
            400,
            "argument --max-rows: expected",
        ),
        (("project", "--org-id", "one"), "validation_error", 400, "argument --org-id: expected"),
        (("backfill", "--source-type", "x"), "validation_error", 400, "source_types: expected"),
        (("backfill", "--org-id", "4711"), "not_found_error", 404, "org_id: there is no"),
        (("project", "--max-rows", "-1"), "validation_error", 400, "max_rows: expected"),
        (("project", "--org-id", "4711"), "not_found_error", 404, "org_id: there is no"),
        (("unknown",), "validation_error", 400, "argument COMMAND"),
    ],
)
def test_a_refusal_is_printed_as_problem_details_and_changes_nothing(
    terminal: Terminal,
    connection: Connection,
    arguments: tuple[str, ...],
    code: str,
    status: int,
    detail: str,
) -> None:
    exit_status, problem = terminal.run(*arguments)

    assert exit_status == REFUSED
    assert problem.keys() == {"title", "status", "detail", "code", "allowed_actions"}
    assert (problem["code"], problem["status"]) == (code, status)
    assert problem["detail"].startswith(detail)
    assert problem["detail"] in terminal.errors
    assert rows(connection, "SELECT FROM reporting_outbox") == []
    assert versions(connection) == set()
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [(("backfill", "--limit", "0"), "limit: "), (("project", "--max-rows", "-1"), "max_rows: ")],
)
def test_a_request_that_is_wrong_in_itself_is_refused_before_any_database_is_asked(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], detail: str
) -> None:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", "postgresql://user:hunter2@127.0.0.1:1/nothing")

    status, problem = terminal.run(*arguments)

    assert (status, problem["code"]) == (REFUSED, "validation_error")
    assert problem["detail"].startswith(detail)


def test_without_a_command_the_help_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(()) == DONE
    assert "backfill" in capfd.readouterr().out


def test_the_version_is_that_of_the_installed_package(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.run(("--version",))
    assert ended.value.code == DONE
    assert capfd.readouterr().out.strip() == version("everruns_pipelines")


@pytest.mark.parametrize(
    ("arguments", "code", "detail"),
    [
        ((), "validation_error", "the following arguments are required: --organization"),
        (("--bogus",), "validation_error", "the following arguments are required"),
        ((*_SCOPE, "--bogus"), "validation_error", "unrecognized arguments: --bogus"),
        ((*_SCOPE, "--session-id"), "validation_error", "argument --session-id"),
        (_SCOPE, "validation_error", "Name a session"),
        ((*_SCOPE, "--session-id", "x"), "validation_error", "session_id must be a UUID"),
        ((*_SCOPE, "--run-id", "x"), "not_found_error", "No such organization"),
    ],
)
def test_a_refusal_of_rebuild_is_printed_as_the_items_api_prints_errors(
    terminal: Terminal, arguments: tuple[str, ...], code: str, detail: str
) -> None:
    exit_status, error = terminal.run("rebuild", *arguments)

    assert exit_status == REFUSED
    assert error.keys() == {"code", "detail", "type", "errors"}
    assert (error["code"], error["type"]) == (code, code)
    assert error["detail"].startswith(detail)
    assert all(field.keys() == {"loc", "msg", "type"} for field in error["errors"])
    assert error["detail"] in terminal.errors


def test_a_database_that_is_not_there_is_refused_without_the_password(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", "postgresql://user:hunter2@127.0.0.1:1/nothing")

    status, problem = terminal.run("backfill")

    assert (status, problem["code"]) == (REFUSED, "unavailable")
    assert "hunter2" not in json.dumps(problem) + terminal.errors


def test_a_wrong_variable_is_one_line_on_standard_error(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", "mysql://user:hunter2@host/db")

    status, printed = terminal.run("project")

    assert (status, printed) == (REFUSED, None)
    assert terminal.errors == (
        "everruns-pipelines: EVERRUNS_POSTGRES_URL: expected"
        " postgresql://user:password@host:port/database\n"
    )


def test_a_run_that_fails_says_why_and_prints_no_result(terminal: Terminal, world: World) -> None:
    database.prepare(world.connection)
    world.tool_call(world.org())
    world.connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION 'writing is refused' USING DETAIL = NEW::text,"
        " ERRCODE = 'object_not_in_prerequisite_state'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON fact_tool_call"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )

    status, printed = terminal.run("project")

    assert (status, printed) == (FAILED, None)
    last_line = terminal.errors.splitlines()[-1]
    assert last_line == "everruns-pipelines: PostgreSQL failed: writing is refused"


def test_a_backfill_of_a_database_that_refuses_writes_says_so_at_once(
    terminal: Terminal, world: World, monkeypatch: pytest.MonkeyPatch, postgres_url: str
) -> None:
    database.prepare(world.connection)
    world.event(world.session(world.org()))
    monkeypatch.setattr(failures, "try_again", _not_again)
    read_only = "options=-c%20default_transaction_read_only%3Don"
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", f"{postgres_url}&{read_only}")

    status, printed = terminal.run("backfill")

    assert status == REFUSED
    assert printed["code"] == "unavailable"
    assert "session is read-only" in printed["detail"]
    assert rows(world.connection, "SELECT FROM reporting_outbox") == []


@pytest.mark.parametrize(
    ("raised", "status", "last_line"),
    [
        (psycopg.OperationalError("gone"), FAILED, "PostgreSQL failed: OperationalError"),
        (Refusal("away", code="unavailable", status=503), REFUSED, "away"),
    ],
)
def test_what_was_tried_again_in_vain_is_told_in_one_line(
    terminal: Terminal,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    status: int,
    last_line: str,
) -> None:
    world.tool_call(world.org())
    tries: list[None] = []

    def fail(*_: object, **__: object) -> NoReturn:
        tries.append(None)
        raise raised

    monkeypatch.setattr(backfill, "enqueue", fail)
    monkeypatch.setattr(failures, "PAUSE", 0)

    assert terminal.run("backfill")[0] == status
    assert len(tries) == 1 + failures.RETRIES
    assert terminal.errors.splitlines()[-1] == f"everruns-pipelines: {last_line}"


def _not_again(*_: object) -> NoReturn:
    pytest.fail("it was to be tried again")


def test_init_makes_our_schema_and_on_request_the_indexes_and_may_be_repeated(
    terminal: Terminal, connection: Connection
) -> None:
    index = "SELECT to_regclass('events_ts_projected') IS NOT NULL"

    for _ in range(2):
        assert terminal.run("init") == (DONE, {"schema": "everruns_pipelines", "indexes": False})
    assert not value(connection, index)
    for _ in range(2):
        assert terminal.run("init", "--indexes")[0] == DONE
    assert value(connection, index)


def test_init_on_a_database_that_is_not_the_platforms_names_what_it_lacks(
    terminal: Terminal, connection: Connection
) -> None:
    connection.execute("DROP TABLE fact_turn")

    status, problem = terminal.run("init")

    assert (status, problem["code"], problem["status"]) == (REFUSED, "incompatible_schema", 503)
    assert "table fact_turn" in problem["detail"]
    assert value(connection, "SELECT to_regnamespace('everruns_pipelines') IS NULL")


def test_a_database_error_outside_of_a_run_is_one_line_and_no_trace(
    terminal: Terminal, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recommended index belongs to the owner of the table alone."""
    connection.execute("CREATE ROLE no_owner LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    assert terminal.run("init")[0] == DONE
    monkeypatch.setenv("EVERRUNS_POSTGRES_URL", connection_url(connection, user="no_owner"))

    status, printed = terminal.run("init", "--indexes")

    assert (status, printed) == (FAILED, None)
    assert terminal.errors == (
        "everruns-pipelines: PostgreSQL failed: must be owner of table events\n"
    )


def connection_url(connection: Connection, user: str) -> str:
    info = connection.info
    return f"postgresql://{user}@/{info.dbname}?host={info.host}"
