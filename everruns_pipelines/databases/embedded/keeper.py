"""Stops the embedded PostgreSQL when the last process that uses it has ended, however it ended."""

import fcntl
import sys
from pathlib import Path

from everruns_pipelines.databases.embedded.servers import KEEPER_LOCK, USERS_LOCK, stop_server


def main(home: Path) -> None:
    """Wait until nobody uses the server under `home`, then stop it."""
    # The keeper's lock goes first: whoever gets the users' lock then sees that no keeper is left.
    with (home / USERS_LOCK).open("w") as users, (home / KEEPER_LOCK).open("w") as keeper:
        try:
            fcntl.flock(keeper, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        fcntl.flock(users, fcntl.LOCK_EX)
        # Nobody uses the server now, and nobody can begin to until we let go of the lock.
        stop_server(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
