"""Looks after the embedded PostgreSQL: starts it again when it was killed, and stops it when the
last process that uses it has ended, however it ended.
"""

import fcntl
import sys
import time
from pathlib import Path
from typing import IO

from everruns_pipelines.databases.embedded.servers import (
    KEEPER_LOCK,
    USERS_LOCK,
    restart_if_killed,
    stop_server,
)

_LOOK_SECONDS = 0.5


def main(home: Path) -> None:
    """Stay until nobody uses the server under `home`, then stop it."""
    # The keeper's lock goes first: whoever gets the users' lock then sees that no keeper is left.
    with (home / USERS_LOCK).open("w") as users, (home / KEEPER_LOCK).open("w") as keeper:
        if not _locked(keeper):
            return
        while not _locked(users):
            restart_if_killed(home)
            time.sleep(_LOOK_SECONDS)
        # Nobody uses the server now, and nobody can begin to until we let go of the lock.
        stop_server(home)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
