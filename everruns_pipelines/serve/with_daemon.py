"""The web server and Dagster's daemon together, for one machine: `python -m` this, with the
arguments of `serve`. They end together: at a signal, or when one of them ends by itself. What they
have started ends with them: code servers, and the runs that are at work.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

_SERVE = "from everruns_pipelines.commands.main import main; main()"
_GRACE_SECONDS = 30
_LOOK_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    """Run both until one ends; what it ended with."""
    commands = (
        [sys.executable, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"],
        [sys.executable, "-c", _SERVE, "serve", *arguments],
    )
    # Signals wait until both are there to be ended.
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    processes = {
        process.pid: process
        for process in (
            subprocess.Popen(command, preexec_fn=_unblock, start_new_session=True)
            for command in commands
        )
    }
    while all(process.poll() is None for process in processes.values()):
        if signal.sigwait(ends) != signal.SIGCHLD:
            break
    ended = [process.returncode for process in processes.values() if process.poll() is not None]
    _end(processes.values())
    return ended[0] if ended else 0


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End them with all that they have started, in order if that takes no longer than it may.

    Each leads a group. A code server alone would wait for the runs that it has started.
    """
    groups = {process.pid for process in processes}
    deadline = time.monotonic() + _GRACE_SECONDS
    told = signal.SIGTERM
    while groups:
        groups = {group for group in groups if _signalled(group, told)}
        for process in processes:
            process.poll()  # one that has ended is no longer in its group once it is asked for
        # Whoever has been told is asked only whether it is there.
        told = 0 if time.monotonic() < deadline else signal.SIGKILL
        time.sleep(_LOOK_SECONDS)


def _signalled(group: int, number: int) -> bool:
    """Whether any process is left in the group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _unblock() -> None:
    """A child must not inherit that signals are blocked, nor that SIGINT is ignored, to which
    Dagster maps SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
