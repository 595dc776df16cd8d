"""Shows on standard error how a run of a deployment goes."""

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.progress import TimeElapsedColumn as Elapsed
from rich.text import Text

from everruns_pipelines.client import Progress as Said
from everruns_pipelines.client import Tell


class _Count(MofNCompleteColumn):
    """How much of how much, for a run that says it. Not every one does."""

    def render(self, task: Task) -> Text:
        """Nothing, or the two numbers."""
        return Text() if task.total is None else super().render(task)


@contextmanager
def shown(job: str) -> Generator[Tell]:
    """A progress bar with the run's messages above it. It moves once the run tells numbers."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
        Elapsed(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(job, total=None)

        def tell(said: Said) -> None:
            # Messages are text, not markup: brackets in them mean nothing.
            bar.console.print(said.message, markup=False, highlight=False, soft_wrap=True)
            if said.done is not None:
                bar.update(task, completed=said.done, total=said.total)

        yield tell
