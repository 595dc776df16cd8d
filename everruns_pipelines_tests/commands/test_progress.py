"""What a person sees while a run of a deployment goes on."""

import io

import pytest
from rich.console import Console

from everruns_pipelines.client import Progress
from everruns_pipelines.commands import progress


def _seen(monkeypatch: pytest.MonkeyPatch, *said: Progress) -> str:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)

    def on_terminal(**_: object) -> Console:
        return console

    monkeypatch.setattr(progress, "Console", on_terminal)
    with progress.shown("rebuild_items") as tell:
        for one in said:
            tell(one)
    return terminal.getvalue()


def test_a_run_that_tells_no_numbers_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _seen(monkeypatch, Progress("Reading the spans"))
    assert "Reading the spans" in seen
    assert "/?" not in seen


def test_a_run_that_tells_numbers_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "5/12" in _seen(monkeypatch, Progress("5 rows claimed; 7 remain", 5, 12))
