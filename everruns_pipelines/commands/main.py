"""The command line: `everruns-pipelines`.

Standard output is the result as one JSON object; progress and logs go to standard error. Exit
status: 0 done, 1 the run failed or a look found something wrong, 2 the request was refused.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import psycopg

from everruns_pipelines import __version__
from everruns_pipelines.commands import (
    alert_test,
    backfill,
    check,
    demo,
    dev,
    diagnose,
    doctor,
    erase,
    init,
    project,
    rebuild,
    serve,
    token,
    unpark,
    url,
)
from everruns_pipelines.errors import FieldError, Refusal, RunFailure, SettingsError
from everruns_pipelines.settings import Part, Settings

# In the order of the help: first what a newcomer needs, then what an operator does every day.
_COMMANDS = (
    demo,
    dev,
    serve,
    token,
    init,
    doctor,
    backfill,
    project,
    rebuild,
    check,
    diagnose,
    unpark,
    erase,
    url,
    alert_test,
)

_PART_OF: Mapping[str, Part] = {
    "backfill": "reporting",
    "project": "reporting",
    "unpark": "reporting",
    "erase": "reporting",
    "rebuild": "items",
}

_DONE, _FAILED, _REFUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command; its exit status."""
    parser = _parser()
    if not arguments:
        parser.print_help()
        return _DONE
    # Not an option's default: what cannot be parsed is refused in the same form.
    is_of_items = arguments[0] == "rebuild"
    try:
        options = parser.parse_args(arguments)
        settings = Settings.from_environment()
        _refuse_part_that_is_off(arguments[0], options, settings)
        result = options.run(options, settings)
    except SettingsError as error:
        return _tell(str(error), _REFUSED)
    except Refusal as refusal:
        _print(refusal.as_items_error() if is_of_items else refusal.as_problem_details())
        return _tell(refusal.detail, _REFUSED)
    except RunFailure as failure:
        if failure.result is not None:
            _print(failure.result)
        return _tell(str(failure), _FAILED)
    except psycopg.Error as error:
        # The rest of a server's message quotes rows.
        reason = error.diag.message_primary or type(error).__name__
        return _tell(f"PostgreSQL failed: {reason}", _FAILED)
    if result is not None:
        _print(result)
    return _DONE


def _refuse_part_that_is_off(command: str, options: argparse.Namespace, settings: Settings) -> None:
    """What is on in a deployment elsewhere (`--url`), that one says itself."""
    part = _PART_OF.get(command)
    if part is not None and part not in settings.parts and not getattr(options, "url", None):
        raise Refusal(
            f"{command} is of {part}, which is off here: EVERRUNS_PARTS must name {part}",
            code="not_found_error",
            status=404,
        )


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
    parser = _Parser(
        prog="everruns-pipelines",
        description="Finds derived data that is missing or stale, and repairs it.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
