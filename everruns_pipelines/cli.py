"""The command line: `everruns-pipelines`.

Standard output is the result as one JSON object; progress and logs go to standard error. Exit
status: 0 done, 1 the run failed, 2 the request was refused.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg

from everruns_pipelines.errors import FieldError, Refusal, RunFailure, SettingsError
from everruns_pipelines.settings import Settings

if TYPE_CHECKING:
    from everruns_pipelines.postgres import Connection

_DONE, _FAILED, _REFUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status."""
    # Not an option's default: what cannot be parsed is refused in the same form.
    is_of_items = list(arguments[:1]) == ["rebuild"]
    try:
        options = _parser().parse_args(arguments)
        result = options.command(options, Settings.from_environment())
    except SettingsError as error:
        return _tell(str(error), _REFUSED)
    except Refusal as refusal:
        _print(refusal.as_items_error() if is_of_items else refusal.as_problem_details())
        return _tell(refusal.detail, _REFUSED)
    except RunFailure as failure:
        return _tell(str(failure), _FAILED)
    except psycopg.Error as error:
        # The rest of a server's message quotes rows.
        reason = error.diag.message_primary or type(error).__name__
        return _tell(f"PostgreSQL failed: {reason}", _FAILED)
    if result is not None:
        _print(result)
    return _DONE


def _tell(message: str, status: int) -> int:
    sys.stderr.write(f"everruns-pipelines: {message}\n")
    return status


def _print(result: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(
            f"{message}; see {self.prog} --help", errors=(FieldError(("arguments",), message),)
        )


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.60}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="everruns-pipelines", description="Keeps derived data right.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace, Settings], Any], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=run)
        return added

    command("demo", _demo, "the main job end to end on embedded databases, with sample data")
    init = command("init", _init, "make what is ours in your PostgreSQL; may be repeated")
    init.add_argument(
        "--indexes", action="store_true", help="also the recommended indexes on platform tables"
    )
    backfill = command("backfill", _backfill, "enqueue what is missing and project it")
    backfill.add_argument("--limit", type=_number, default=1000, help="1 to 10000, default 1000")
    backfill.add_argument("--org-id", type=_number, help="one organization; all if not given")
    backfill.add_argument(
        "--source-type",
        action="append",
        dest="source_types",
        help="event, session, llm_generation or usage_ledger; repeatable; all if not given",
    )
    backfill.add_argument("--dry-run", action="store_true", help="count only, write nothing")
    project = command("project", _project, "project what is due in the outbox")
    project.add_argument("--org-id", type=_number, help="one organization; all if not given")
    project.add_argument("--max-rows", type=_number, help="until nothing is due if not given")
    rebuild = command("rebuild", _rebuild, "bring items back to what their spans say")
    rebuild.add_argument("--organization", required=True, help="slug or UUID")
    rebuild.add_argument("--workspace", required=True, help="slug or UUID")
    rebuild.add_argument("--project", required=True, help="slug or UUID")
    rebuild.add_argument("--session-id", help="a UUID; needed unless runs are given")
    rebuild.add_argument(
        "--run-id",
        action="append",
        dest="run_ids",
        help="a run id, or a trace id as 32 hex digits; repeatable",
    )
    rebuild.add_argument("--dry-run", action="store_true", help="count only, write nothing")
    diagnose = command("diagnose", _diagnose, "what is missing, stale, failing or waiting")
    diagnose.add_argument("--days", type=_number, default=7, help="days to compare, default 7")
    diagnose.add_argument("--json", action="store_true", help="one JSON object, not tables")
    command("doctor", _doctor, "whether everything is in place, and what to do if not")
    dev = command("dev", _dev, "Dagster's UI and daemon on this machine")
    dev.add_argument("--port", type=_number, default=3000, help="port on 127.0.0.1, default 3000")
    for added in (backfill, project, rebuild):
        added.add_argument("--verbose", action="store_true", help="tell all that was counted")
        added.add_argument("--url", help="run it in the deployment at http://host:port, not here")
    return parser


def _demo(_: argparse.Namespace, settings: Settings) -> None:
    from everruns_pipelines.demo import demo

    demo(settings)


def _init(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.items.rebuild import ensure_schema
    from everruns_pipelines.postgres import PostgresResource
    from everruns_pipelines.reporting import database

    with PostgresResource(settings).connect() as connection:
        database.prepare(connection)
        ensure_schema(connection)
        if options.indexes:
            database.create_indexes(connection)
    return {"schema": "everruns_pipelines", "indexes": options.indexes}


def _backfill(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.reporting.backfill import BackfillRequest, check

    request = BackfillRequest(options.limit, options.org_id, options.source_types, options.dry_run)
    _refuse_early(options, settings, lambda connection: check(connection, request))
    outputs = _run_job(
        options,
        settings,
        "backfill_reporting",
        {
            "enqueue": {
                "limit": options.limit,
                "org_id": options.org_id,
                "source_types": options.source_types,
                "dry_run": options.dry_run,
            },
            "project": {"org_id": options.org_id},
        },
    )
    return {**outputs["enqueue"], **(outputs if options.verbose else {})}


def _project(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.reporting.drain import check

    _refuse_early(
        options,
        settings,
        lambda connection: check(connection, org_id=options.org_id, max_rows=options.max_rows),
    )
    ops = {"project": {"org_id": options.org_id, "max_rows": options.max_rows}}
    return _run_job(options, settings, "project_reporting", ops)["project"]


def _rebuild(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.items.scope import RebuildRequest, resolve_project

    request = RebuildRequest(
        options.organization,
        options.workspace,
        options.project,
        options.session_id,
        tuple(options.run_ids or ()),
        options.dry_run,
    )
    request.check()
    if options.url is None:
        from everruns_pipelines.items.rebuild import check_platform
        from everruns_pipelines.postgres import PostgresResource

        with PostgresResource(settings).connect() as connection:
            check_platform(connection)
            resolve_project(connection, request)
    config = {
        "organization": options.organization,
        "workspace": options.workspace,
        "project": options.project,
        "session_id": options.session_id,
        "run_ids": options.run_ids,
        "dry_run": options.dry_run,
    }
    counts = _run_job(options, settings, "rebuild_items", {"rebuild": config})["rebuild"]
    return counts if options.verbose else {"processed": counts["processed"]}


def _diagnose(options: argparse.Namespace, settings: Settings) -> dict[str, Any] | None:
    from rich.console import Console

    from everruns_pipelines.diagnosis import diagnose

    with Console(stderr=True).status("Looking") as status:
        diagnosis = diagnose(settings, options.days, status.update)
    if options.json:
        return diagnosis.as_json()
    from everruns_pipelines.tables import show_diagnosis

    show_diagnosis(diagnosis)
    return None


def _doctor(_: argparse.Namespace, settings: Settings) -> None:
    from everruns_pipelines.doctor import examine
    from everruns_pipelines.tables import show_findings

    if not show_findings(examine(settings)):
        raise RunFailure("something is to be done")


def _dev(options: argparse.Namespace, _: Settings) -> None:
    import os

    # Takes this process over: signals reach Dagster, which ends its own children.
    command = ["-m", "dagster", "dev", "--host", "127.0.0.1", "--port", str(options.port)]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606, no shell is wanted


def _refuse_early(
    options: argparse.Namespace, settings: Settings, check: "Callable[[Connection | None], None]"
) -> None:
    """Refuse before a run is made: for what the request says, else for what the database holds.

    A deployment's database need not be within reach: its run will refuse.
    """
    check(None)
    if options.url is not None:
        return
    from everruns_pipelines.postgres import PostgresResource
    from everruns_pipelines.reporting.database import check_platform, prepare

    with PostgresResource(settings).connect() as connection:
        check_platform(connection)
        check(connection)
        prepare(connection)


def _run_job(
    options: argparse.Namespace,
    settings: Settings,
    job: str,
    ops: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    if options.url is not None:
        from everruns_pipelines.client import Deployment
        from everruns_pipelines.progress import shown

        with shown(job) as tell:
            return Deployment(options.url, settings.headers()).run(job, ops, tell)
    from everruns_pipelines.local_runs import run_job

    return run_job(settings, job, ops)
