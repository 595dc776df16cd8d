"""Runs behind the HTTP API: each request launches one, once, and follows it to its end.

The run is Dagster's from the moment it is launched: a client that hangs up or a server that
restarts takes nothing from it.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.remote_representation.external import RemoteJob
from dagster._core.storage.tags import AUTO_RETRY_RUN_ID_TAG
from dagster._core.workspace.context import IWorkspaceProcessContext, WorkspaceRequestContext
from dagster_graphql.implementation.execution.run_lifecycle import create_valid_pipeline_run
from dagster_graphql.implementation.utils import ExecutionMetadata, ExecutionParams
from sqlalchemy import exc, text
from starlette.concurrency import run_in_threadpool

from everruns_pipelines.errors import Refusal
from everruns_pipelines.orchestration.coordinator import labels
from everruns_pipelines.orchestration.retries import may_be_retried

TOKEN_TAG = "everruns/token"  # noqa: S105, the name of a tag
KEY_TAG = "everruns/idempotency_key"
MOST_AT_WORK = 10

FINISHED = (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED)
AT_WORK = tuple(status for status in DagsterRunStatus if status not in FINISHED)

_POLL_SECONDS = 0.05
_PAUSE_SECONDS = 1.0
_NAMESPACE = uuid.UUID("6f1a0d1e-95a9-4e6e-9d0f-6b1f1f6f2f5c")
_logger = logging.getLogger(__name__)

ProcessContext: TypeAlias = IWorkspaceProcessContext[WorkspaceRequestContext]


@dataclass(frozen=True)
class Wanted:
    """A run that a request asks for.

    Args:
        token: the name of the token that asks.
        key: the request's `Idempotency-Key`: the same one makes the same run.
    """

    job: str
    ops: Mapping[str, Mapping[str, Any]]
    token: str
    key: str | None

    @property
    def run_config(self) -> dict[str, Any]:
        """The config of the run."""
        return {"ops": {op: {"config": dict(config)} for op, config in self.ops.items()}}

    @property
    def run_id(self) -> str:
        """The run's id: told by the key, so that every server and every try comes to the same."""
        if self.key is None:
            return str(uuid.uuid4())
        return str(uuid.uuid5(_NAMESPACE, f"{self.token}\0{self.job}\0{self.key}"))


class Runs:
    """Launches runs and follows them.

    Args:
        context: Dagster's instance, and the code location.
    """

    def __init__(self, context: ProcessContext) -> None:
        self._context = context
        self._instance: DagsterInstance = context.instance
        # One launch at a time in this process: a launch holds a connection of the storage's pool
        # while it waits for its turn, and needs a second one when it comes.
        self._turn = asyncio.Lock()
        self._followed: dict[str, list[asyncio.Future[DagsterRun]]] = {}
        self._poller: asyncio.Task[None] | None = None

    async def launch(self, wanted: Wanted) -> str:
        """Launch the run, unless its key has launched it before; its id.

        Raises:
            Refusal: too many runs of the token are at work, the key belongs to another request, or
                the code location or the storage is not there.
        """
        async with self._turn:
            return await run_in_threadpool(self._launch, wanted)

    def find(self, run_id: str) -> DagsterRun | None:
        """A run, by its id."""
        return self._instance.get_run_by_id(run_id)

    async def follow(self, run_id: str, seconds: float) -> DagsterRun | None:
        """The run once it has ended, or the one that was launched in its place; None if it goes on
        for longer than `seconds`, all of them together.
        """
        until = time.monotonic() + seconds
        ended = await self._end(run_id, seconds)
        while ended is not None and AUTO_RETRY_RUN_ID_TAG in ended.tags:
            left = max(0.0, until - time.monotonic())
            ended = await self._end(ended.tags[AUTO_RETRY_RUN_ID_TAG], left)
        return ended

    async def _end(self, run_id: str, seconds: float) -> DagsterRun | None:
        future = asyncio.get_running_loop().create_future()
        self._followed.setdefault(run_id, []).append(future)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            return await asyncio.wait_for(future, seconds)
        except (TimeoutError, asyncio.CancelledError):
            # The server is ending, and lets requests go that wait: they are told that it goes on.
            return None
        finally:
            self._forget(run_id, future)

    def _forget(self, run_id: str, future: asyncio.Future[DagsterRun]) -> None:
        self._followed[run_id].remove(future)
        if not self._followed[run_id]:
            del self._followed[run_id]

    def counts(self, run: DagsterRun) -> dict[str, dict[str, int]]:
        """The counts that each op of a run answered.

        Raises:
            Refusal: the run refused the request, or failed.
        """
        if run.status is DagsterRunStatus.SUCCESS:
            outputs = self._events(run, DagsterEventType.STEP_OUTPUT)
            counts: dict[str, dict[str, int]] = {}
            for event in outputs:
                metadata = event.step_output_data.metadata
                counts.setdefault(str(event.step_key), {}).update(
                    {
                        name: value.value
                        for name, value in metadata.items()
                        if isinstance(value.value, int)
                    }
                )
            return counts
        raise self._why(run)

    def _events(self, run: DagsterRun, of_type: DagsterEventType) -> list[Any]:
        records = self._instance.get_records_for_run(run.run_id, of_type=of_type).records
        return [record.event_log_entry.dagster_event for record in records]

    def _why(self, run: DagsterRun) -> Refusal:
        """What `failures.told_plainly` said of the op that failed."""
        for event in self._events(run, DagsterEventType.STEP_FAILURE):
            told = event.step_failure_data.user_failure_data
            if told is None:
                continue
            error = told.metadata.get("error")
            if error is not None:
                return Refusal.from_error(cast("dict[str, Any]", error.value))
            return Refusal(
                told.description or "A database failed", code="upstream_failed", status=502
            )
        ended = "canceled" if run.status is DagsterRunStatus.CANCELED else "failed"
        return Refusal(f"Run {run.run_id} {ended}", code="run_failed", status=500)

    async def _poll(self) -> None:
        """Ask for the ends of all runs that are followed at once, as long as there are any."""
        while self._followed:
            try:
                ended = await run_in_threadpool(self._ended, list(self._followed))
            except Exception as error:
                _logger.warning("Dagster's storage does not answer (%s)", type(error).__name__)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            for run in ended:
                for future in self._followed.get(run.run_id, ()):
                    if not future.done():
                        future.set_result(run)
            await asyncio.sleep(_POLL_SECONDS)

    def _ended(self, run_ids: list[str]) -> list[DagsterRun]:
        runs = self._instance.get_runs(RunsFilter(run_ids=run_ids, statuses=FINISHED))
        # One that Dagster will launch again has ended once its replacement is known.
        return [
            run
            for run in runs
            if not may_be_retried(self._instance, run) or AUTO_RETRY_RUN_ID_TAG in run.tags
        ]

    def _launch(self, wanted: Wanted) -> str:
        run_id = wanted.run_id
        try:
            with self._alone(wanted.token), self._context.create_request_context() as workspace:
                run = None if wanted.key is None else self.find(run_id)
                if run is None:
                    self._refuse_too_many(wanted.token)
                    self._create(workspace, wanted, run_id)
                elif run.run_config != wanted.run_config:
                    raise Refusal("Idempotency-Key: it was used for another request", status=422)
                # Not so if a server was killed between the two: a repeated key goes on.
                if run is None or run.status is DagsterRunStatus.NOT_STARTED:
                    self._instance.submit_run(run_id, workspace)
        except (exc.OperationalError, exc.TimeoutError):
            raise _unavailable("Dagster's storage does not answer") from None
        except DagsterUserCodeUnreachableError:
            raise _unavailable("The code server does not answer") from None
        return run_id

    def _refuse_too_many(self, token: str) -> None:
        at_work = self._instance.get_runs_count(
            RunsFilter(tags={TOKEN_TAG: token}, statuses=AT_WORK)
        )
        if at_work >= MOST_AT_WORK:
            raise Refusal(
                f"{at_work} runs of this token are at work: wait for one to end",
                code="too_many_requests",
                status=429,
            )

    def _create(self, workspace: WorkspaceRequestContext, wanted: Wanted, run_id: str) -> None:
        selector, job = _find_job(workspace, wanted.job)
        tags = {TOKEN_TAG: wanted.token, **({} if wanted.key is None else {KEY_TAG: wanted.key})}
        # Here and not in the queue, which would write them by themselves.
        tags |= labels(tags, wanted.run_config)
        create_valid_pipeline_run(
            workspace,
            job,
            ExecutionParams(
                selector=selector,
                run_config=wanted.run_config,
                mode=None,
                execution_metadata=ExecutionMetadata(run_id=run_id, tags=tags),
                step_keys=None,
            ),
        )

    @contextmanager
    def _alone(self, token: str) -> Generator[None]:
        """No other launch for the token, in any server, meanwhile: counted and found is exact."""
        key = {"key": f"everruns_pipelines/serve/{token}"}
        storage = cast("Any", self._instance.run_storage)
        with storage.connect() as connection:
            lock = "SELECT pg_advisory_lock(hashtextextended(:key, 0))"
            connection.execute(text(lock), key)
            try:
                yield
            finally:
                unlock = "SELECT pg_advisory_unlock(hashtextextended(:key, 0))"
                connection.execute(text(unlock), key)


def _find_job(workspace: WorkspaceRequestContext, name: str) -> tuple[JobSubsetSelector, RemoteJob]:
    """The job, in whichever code location has it."""
    for location in workspace.code_locations:
        for repository in location.get_repositories().values():
            if repository.has_job(name):
                selector = JobSubsetSelector(
                    location_name=location.name,
                    repository_name=repository.name,
                    job_name=name,
                    op_selection=None,
                )
                return selector, repository.get_full_job(name)
    raise _unavailable(f"No code location with the job {name} is loaded")


def _unavailable(detail: str) -> Refusal:
    return Refusal(detail, code="unavailable", status=503)
