"""`alert-test`: sends a test message to everybody who is told of problems."""

import argparse
from typing import Any

from everruns_pipelines.errors import Refusal, RunFailure
from everruns_pipelines.settings import Settings

HELP = "send a test message to the receivers of EVERRUNS_ALERT_URLS"


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Nothing: the receivers stand in the environment."""


def run(_: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Send it; how many were told.

    Raises:
        Refusal: there is nobody to tell.
        RunFailure: somebody could not be told. The others were.
    """
    from everruns_pipelines.operations.alerts import deliver, receivers, trial

    urls = receivers(settings)
    if not urls:
        raise Refusal("EVERRUNS_ALERT_URLS is not set: there is nobody to tell")
    failed = [
        str(number) for number, url in enumerate(urls, start=1) if not deliver(url, trial(settings))
    ]
    if failed:
        raise RunFailure(
            f"{len(urls) - len(failed)} of {len(urls)} receivers were told; in EVERRUNS_ALERT_URLS "
            f"number {', '.join(failed)} does not take messages, or is no Apprise URL"
        )
    return {"told": len(urls)}
