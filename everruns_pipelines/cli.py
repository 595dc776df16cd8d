"""The command line: `everruns-pipelines`.

Standard output is the result as one JSON object; progress and logs go to standard error. Exit
status: 0 done, 1 the run failed, 2 the request was refused.
"""

import argparse
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

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
    options = argparse.Namespace(rendered=Refusal.as_problem_details)
    try:
        _parser().parse_args(arguments, options)
        result = options.command(options, Settings.from_environment())
    except SettingsError as error:
        return _tell(str(error), _REFUSED)
    except Refusal as refusal:
        _print(options.rendered(refusal))
        return _tell(refusal.detail, _REFUSED)
    except RunFailure as failure:
        return _tell(str(failure), _FAILED)
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
    backfill.add_argument("--limit", type=int, default=1000, help="1 to 10000, default 1000")
    backfill.add_argument("--org-id", type=int, help="one organization; all if not given")
    backfill.add_argument(
        "--source-type",
        action="append",
        dest="source_types",
        help="event, session, llm_generation or usage_ledger; repeatable; all if not given",
    )
    backfill.add_argument("--dry-run", action="store_true", help="count only, write nothing")
    project = command("project", _project, "project what is due in the outbox")
    project.add_argument("--org-id", type=int, help="one organization; all if not given")
    project.add_argument("--max-rows", type=int, help="until nothing is due if not given")
    for added in (backfill, project):
        added.add_argument("--verbose", action="store_true", help="tell all that was counted")
        added.add_argument("--url", help="run it in the deployment at http://host:port, not here")
    return parser


def _demo(_: argparse.Namespace, settings: Settings) -> None:
    from everruns_pipelines.demo import demo

    demo(settings)


def _init(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.postgres import PostgresResource
    from everruns_pipelines.reporting import database

    with PostgresResource(settings).connect() as connection:
        database.prepare(connection)
        if options.indexes:
            database.create_indexes(connection)
    return {"schema": "everruns_pipelines", "indexes": options.indexes}


def _backfill(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    from everruns_pipelines.reporting.backfill import BackfillRequest, check

    request = BackfillRequest(options.limit, options.org_id, options.source_types, options.dry_run)
    with _checked(options, settings) as connection:
        check(connection, request)
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

    with _checked(options, settings) as connection:
        check(connection, org_id=options.org_id, max_rows=options.max_rows)
    ops = {"project": {"org_id": options.org_id, "max_rows": options.max_rows}}
    return _run_job(options, settings, "project_reporting", ops)["project"]


@contextmanager
def _checked(options: argparse.Namespace, settings: Settings) -> "Generator[Connection | None]":
    """A connection to a database that is fit for reporting: to refuse before a run is made.

    None if the run is a deployment's: its database need not be within reach.
    """
    if options.url is not None:
        yield None
        return
    from everruns_pipelines.postgres import PostgresResource
    from everruns_pipelines.reporting.database import prepare

    with PostgresResource(settings).connect() as connection:
        prepare(connection)
        yield connection


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
