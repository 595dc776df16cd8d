"""The web server and Dagster's daemon together, for one machine: `python -m` this, with the
arguments of `serve`. They end together: at a signal, or when one of them ends by itself.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence

_SERVE = "from everruns_pipelines.commands.main import main; main()"
_GRACE_SECONDS = 30


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
    for process in processes.values():
        if process.poll() is None:
            process.terminate()
    for process in processes.values():
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return ended[0] if ended else 0


def _unblock() -> None:
    """A child must not inherit that signals are blocked, nor that SIGINT is ignored, to which
    Dagster maps SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
