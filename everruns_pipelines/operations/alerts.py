"""What people are told of when nobody looks: each problem once, and once more when it is over.

Knows nothing of Dagster: `alert_sensor` finds the problems and keeps the memory in its cursor.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from everruns_pipelines.settings import Settings

# What a tick may spend on telling, in seconds. Who could not be told is told at the next one.
_SECONDS = 20.0
_LOCAL = "http://127.0.0.1:3000"

Kind = Literal["warning", "success", "info"]
Send = Callable[[str, "Message"], bool]


@dataclass(frozen=True)
class Problem:
    """Something that people should know. No text of it holds payload or a secret.

    Args:
        key: what it is about, the same at every look.
        title: a line.
        what: what was found, and how much of it.
        since: in seconds since the epoch.
        repair: what to do.
        page: where the UI shows it, as a path.
    """

    key: str
    title: str
    what: str
    since: float
    repair: str
    page: str


@dataclass(frozen=True)
class Message:
    """What one receiver is told."""

    title: str
    body: str
    kind: Kind


@dataclass
class _Told:
    """A problem that people know of, and which of them: receivers by their place in the list."""

    title: str
    since: float
    page: str
    receivers: list[int] = field(default_factory=list[int])


@dataclass
class Memory:
    """What is known from one look to the next.

    Args:
        told: problems by key.
        failed: by what failed, the run that did last, and when. It stays until a run succeeds.
        away: by variable, since when its database cannot be reached.
        runs_until: changes of runs up to then have been looked at, in seconds since the epoch.
        checks_until: the newest result of a check that has been looked at, by its number.
    """

    told: dict[str, _Told] = field(default_factory=dict[str, _Told])
    failed: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])
    away: dict[str, float] = field(default_factory=dict[str, float])
    runs_until: float = 0.0
    checks_until: int | None = None

    @classmethod
    def read(cls, cursor: str | None, now: float) -> Self:
        """What the cursor says. Without one nothing is known: what was before is not told."""
        try:
            kept = json.loads(cursor or "")
            kept["told"] = {key: _Told(**told) for key, told in kept["told"].items()}
            kept["failed"] = {what: (run, at) for what, (run, at) in kept["failed"].items()}
            return cls(**kept)
        except (AttributeError, KeyError, TypeError, ValueError):
            return cls(runs_until=now)

    def write(self) -> str:
        """The cursor."""
        return json.dumps(asdict(self))


def tell(
    settings: Settings,
    memory: Memory,
    seen: Mapping[str, Sequence[Problem] | None],
    now: float,
    send: Send | None = None,
) -> int:
    """Tell every receiver what it does not know yet; how many messages were sent.

    Args:
        seen: the problems that there are, by kind. The key of each begins with its kind. None if it
            could not be found out: then none of that kind is over.
        send: how to send; for tests.
    """
    urls = receivers(settings)
    deadline = time.monotonic() + _SECONDS
    sent = 0

    def reaches(receiver: int, message: Message) -> bool:
        nonlocal sent
        done = time.monotonic() < deadline and (send or deliver)(urls[receiver], message)
        sent += done
        return done

    there = {problem.key: problem for problems in seen.values() for problem in problems or ()}
    for problem in there.values():
        told = memory.told.setdefault(
            problem.key, _Told(problem.title, problem.since, problem.page)
        )
        for receiver in range(len(urls)):
            if receiver not in told.receivers and reaches(receiver, _begins(settings, problem)):
                told.receivers.append(receiver)
    for key, told in tuple(memory.told.items()):
        if key in there or seen.get(key.partition(":")[0]) is None:
            continue
        message = _is_over(settings, told, now)
        told.receivers = [
            receiver
            for receiver in told.receivers
            if receiver < len(urls) and not reaches(receiver, message)
        ]
        if not told.receivers:
            del memory.told[key]
    return sent


def receivers(settings: Settings) -> list[str]:
    """Apprise URLs of those who are told. Secrets."""
    urls = settings.alert_urls
    return [] if urls is None else urls.get_secret_value().split()


def deliver(url: str, message: Message) -> bool:
    """Send to one receiver; whether it was taken. Nothing of the URL is logged."""
    import apprise

    logger = logging.getLogger("apprise")
    logger.setLevel(logging.CRITICAL)
    receiver: Any = apprise.Apprise()
    kinds = {
        "warning": apprise.NotifyType.WARNING,
        "success": apprise.NotifyType.SUCCESS,
        "info": apprise.NotifyType.INFO,
    }
    return bool(
        receiver.add(url)
        and receiver.notify(
            title=message.title,
            body=message.body,
            notify_type=kinds[message.kind],
            body_format=apprise.NotifyFormat.TEXT,
        )
    )


def trial(settings: Settings) -> Message:
    """What `alert-test` sends."""
    return Message(
        "everruns_pipelines: this is a test",
        f"Alerts of everruns_pipelines arrive here.\n{_link(settings, '/')}",
        "info",
    )


def _begins(settings: Settings, problem: Problem) -> Message:
    lines = (
        problem.what if problem.what.endswith(".") else f"{problem.what}.",
        f"Since {_clock(problem.since)}.",
        f"To repair: {problem.repair}",
        _link(settings, problem.page),
    )
    return Message(f"everruns_pipelines: {problem.title}", "\n".join(lines), "warning")


def _is_over(settings: Settings, told: _Told, now: float) -> Message:
    lines = (
        f"It is over. It was so from {_clock(told.since)} to {_clock(now)}.",
        _link(settings, told.page),
    )
    return Message(f"everruns_pipelines: over: {told.title}", "\n".join(lines), "success")


def _link(settings: Settings, page: str) -> str:
    return f"{(settings.public_url or _LOCAL).rstrip('/')}{page}"


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%F %R} UTC"
