"""An older chDB as a server, run by the Python of an environment that holds nothing else.

Its first line of output is the port. Each query opens the directory anew, so what a statement needs
stands in front of it.
"""

import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

from everruns_pipelines_tests.databases.http_engine import HttpEngine

# Tables of the database `default` are forgotten by releases as old as these.
DATABASE = "traces"
_QUOTED = str.maketrans({"\\": r"\\", "'": r"\'"})


def serve(directory: str) -> None:
    """Answer until the process is ended."""
    from chdb.session import Session

    session: Any = Session(directory)
    turn = threading.Lock()
    _run(session, f"CREATE DATABASE IF NOT EXISTS {DATABASE} ENGINE = Atomic")

    def answer(query: str, database: str, bound: Mapping[str, str]) -> bytes:
        given = [f"SET {name} = '{value.translate(_QUOTED)}'" for name, value in bound.items()]
        with turn:
            return _run(session, "; ".join([f"USE {database}", *given, query]))

    with HttpEngine(answer) as server:
        sys.stdout.write(f"{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever(poll_interval=0.05)


def _run(session: Any, statements: str) -> bytes:
    try:
        answer = session.query(statements, "TabSeparated")
    except Exception as error:
        # What the engine adds about where it stands would hide the code.
        raise RuntimeError(re.sub(r"(?s)^.*?(?=Code: \d)", "", str(error))) from None
    return b"" if answer is None else answer.bytes()


if __name__ == "__main__":
    serve(sys.argv[1])
