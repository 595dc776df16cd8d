"""A typed client of a running deployment: launches jobs over GraphQL and waits for their counts.

    deployment = Deployment("http://127.0.0.1:3000")
    deployment.run("backfill_reporting", {"enqueue": {"limit": 100}})["enqueue"]["enqueued"]

The queries are Dagster's own API, see docs/graphql.md.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from everruns_pipelines.errors import FieldError, Refusal, RunFailure

if TYPE_CHECKING:
    from requests import PreparedRequest

LOCATION = "everruns_pipelines"

_REQUEST_TAG = "everruns/request"
_SHORTEST_POLL, _LONGEST_POLL = 0.25, 2.0
_LOOKS_FOR_A_RUN = 3
_TIMEOUT = 30.0
_FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}
_AWAY = {502, 503, 504}
# Dagster's, on a run that failed: whether it is launched again, and the run that was.
_WILL_RETRY_TAG, _RETRIED_AS_TAG = "dagster/will_retry", "dagster/auto_retry_run_id"
# Whether it is stands on the run a moment after that it failed; never, where runs are not retried.
_UNDECIDED_ANSWERS = 3
_REMAINS = re.compile(r"(\d+) rows claimed.* (\d+) remain$")


@dataclass(frozen=True)
class Progress:
    """What a run has just said.

    Args:
        message: for a person; holds nothing of the data.
        done: rows done so far, if it said so.
        total: rows done and remaining, if it said so.
    """

    message: str
    done: int | None = None
    total: int | None = None


Counts = dict[str, dict[str, Any]]
Tell = Callable[[Progress], None]


def _tell_nobody(_: Progress) -> None:
    return


@dataclass(frozen=True)
class Deployment:
    """A webserver of Dagster with our code location in it.

    Args:
        url: where it is, such as `http://127.0.0.1:3000`; a path prefix is kept.
        headers: more headers for every request: what an authenticating proxy asks for.
        patience: seconds to go on asking for a run while the webserver does not answer.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    patience: float = 300.0

    def run(
        self, job: str, ops: Mapping[str, Mapping[str, Any]], tell: Tell = _tell_nobody
    ) -> Counts:
        """Launch a job and wait for its end.

        Args:
            ops: config by op; empty for what the job does by itself.

        Returns:
            What each op counted; beside it, what it listed: a list of rows for each table.

        Raises:
            Refusal: the deployment, or the run itself, refused the request.
            RunFailure: the run failed, or was not heard of any more.
        """
        run_id = self.launch(job, ops)
        tell(Progress(f"Run {run_id} is launched: {self.page(run_id)}"))
        return self.follow(run_id, tell)

    def page(self, run_id: str) -> str:
        """Where a person sees the run."""
        return f"{self.url.rstrip('/')}/runs/{run_id}"

    def launch(self, job: str, ops: Mapping[str, Mapping[str, Any]]) -> str:
        """Launch a job; its run id. Launched at most once, also if the answer gets lost.

        Raises:
            Refusal: it was not launched, or its run was not found within seconds.
        """
        try:
            selector = self._find(job)
        except _Away as away:
            raise self._unreachable(f"{away}. Nothing was launched") from None
        request_id = str(uuid.uuid4())
        parameters = {
            "selector": selector,
            # Not all jobs are configured by op: one that is not refuses the word.
            "runConfigData": {"ops": {op: {"config": dict(c)} for op, c in ops.items()}}
            if ops
            else {},
            "executionMetadata": {"tags": [{"key": _REQUEST_TAG, "value": request_id}]},
        }
        try:
            answer = self._ask(_LAUNCH, {"parameters": parameters})["launchRun"]
        except _Away as away:
            return self._launched_all_the_same(request_id, str(away))
        if answer["__typename"] == "LaunchRunSuccess":
            return str(answer["run"]["runId"])
        if answer["__typename"] == "UnauthorizedError":
            raise Refusal(
                "This deployment does not let you launch", code="permission_denied", status=403
            )
        messages = [one["message"] for one in answer.get("errors", [])] or [answer["message"]]
        raise Refusal(messages[0], errors=tuple(FieldError(("config",), one) for one in messages))

    def follow(self, run_id: str, tell: Tell = _tell_nobody) -> Counts:
        """Wait for the end of a run, and of the one that Dagster launches in its place if it dies.

        Returns:
            The counts that each op answered.

        Raises:
            Refusal: the run refused the request.
            RunFailure: the run failed, or was not heard of for `patience` seconds.
        """
        seen = _Seen()
        pause = _SHORTEST_POLL
        heard = time.monotonic()
        while True:
            try:
                answer = self._ask(_FOLLOW, {"run": run_id, "after": seen.cursor})
            except _Away as away:
                if time.monotonic() - heard > self.patience:
                    raise RunFailure(
                        f"{away}, for {self.patience:g} s now. The run may go on: "
                        f"{self.page(run_id)}"
                    ) from None
                tell(Progress(f"Waiting: {away}"))
            else:
                heard = time.monotonic()
                new = seen.take_in(answer, tell)
                if seen.is_complete:
                    retry = seen.tags.get(_RETRIED_AS_TAG)
                    if retry is None:
                        return seen.result(run_id)
                    tell(Progress(f"Run {run_id} died and is done again: {self.page(retry)}"))
                    return self.follow(retry, tell)
                pause = _SHORTEST_POLL if new else pause
                if seen.has_more:
                    continue
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_POLL)

    def _find(self, job: str) -> dict[str, str]:
        answer = self._ask(_JOBS, {})["repositoriesOrError"]
        repositories = [
            node for node in answer.get("nodes", []) if job in {one["name"] for one in node["jobs"]}
        ]
        if not repositories:
            raise Refusal(
                f"The deployment at {self.url} has no job {job}: its code location is not loaded, "
                "or its EVERRUNS_PARTS leaves the job out",
                code="not_found_error",
                status=404,
            )
        ours = [node for node in repositories if node["location"]["name"] == LOCATION]
        node = (ours or repositories)[0]
        return {
            "repositoryLocationName": node["location"]["name"],
            "repositoryName": node["name"],
            "jobName": job,
        }

    def _launched_all_the_same(self, request_id: str, reason: str) -> str:
        """The run of a request whose answer got lost. The server may still be at launching it."""
        tags = [{"key": _REQUEST_TAG, "value": request_id}]
        deadline = time.monotonic() + self.patience
        looks = 0
        while looks < _LOOKS_FOR_A_RUN and time.monotonic() < deadline:
            with suppress(_Away):
                runs = self._ask(_FIND_RUN, {"tags": tags})["runsOrError"]["results"]
                if runs:
                    return str(runs[0]["runId"])
                looks += 1
            time.sleep(_LONGEST_POLL)
        raise self._unreachable(f"{reason}. No run of this request was found")

    def _unreachable(self, reason: str) -> Refusal:
        return Refusal(
            f"{reason}; --url must name a running webserver",
            code="unavailable",
            status=503,
        )

    def _ask(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        import requests

        try:
            response = requests.post(
                f"{self._checked_url()}/graphql",
                json={"query": query, "variables": variables},
                headers=dict(self.headers),
                auth=_as_given,
                timeout=_TIMEOUT,
                # The headers may hold a secret, and belong to one host.
                allow_redirects=False,
            )
            if response.status_code != requests.codes.ok:
                self._refused(response.status_code)
            answer = response.json()
        except requests.RequestException as lost:
            raise _Away(f"{self.url} does not answer ({type(lost).__name__})") from None
        if answer.get("errors"):
            raise RunFailure(f"{self.url} answered: {answer['errors'][0]['message']}")
        return answer["data"]

    def _refused(self, status: int) -> NoReturn:
        if status in _AWAY:
            raise _Away(f"{self.url} answers with HTTP status {status}")
        if status in (401, 403, 407):
            raise Refusal(
                f"{self.url} refuses access (HTTP status {status}): EVERRUNS_GRAPHQL_HEADERS "
                "must hold the headers that it asks for",
                code="permission_denied",
                status=status,
            )
        raise Refusal(
            f"{self.url} answers with HTTP status {status}: it must be the URL of a webserver "
            "of Dagster, with the path that it is served under",
            code="unavailable",
            status=503,
        )

    def _checked_url(self) -> str:
        if not re.match(r"https?://[^/]", self.url):
            raise Refusal(
                "url: expected http://host:port or https://host:port",
                errors=(FieldError(("url",), "http://host:port or https://host:port"),),
            )
        return self.url.rstrip("/")


class _Away(Exception):
    """The webserver did not answer this time."""


def _as_given(asked: "PreparedRequest") -> "PreparedRequest":
    """Authorization as the headers say it, and not as a ~/.netrc does."""
    return asked


@dataclass
class _Seen:
    """What is known of a run so far."""

    cursor: str | None = None
    has_more: bool = True
    status: str = "QUEUED"
    tags: dict[str, str] = field(default_factory=dict[str, str])
    undecided_answers: int = 0
    counts: Counts = field(default_factory=Counts)
    failure: str | None = None
    refusal: Refusal | None = None

    @property
    def is_complete(self) -> bool:
        if self.status not in _FINISHED or self.has_more:
            return False
        if self.status != "FAILURE":
            return True
        if _WILL_RETRY_TAG not in self.tags:
            return self.undecided_answers == _UNDECIDED_ANSWERS
        return self.tags[_WILL_RETRY_TAG] != "true" or _RETRIED_AS_TAG in self.tags

    def take_in(self, answer: Mapping[str, Any], tell: Tell) -> bool:
        """Remember what is new; whether anything was."""
        run, log = answer["runOrError"], answer["logsForRun"]
        if run["__typename"] != "Run":
            raise RunFailure(f"The run is gone: {run['message']}")
        self.status = run["status"]
        self.tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        self.cursor, self.has_more = log["cursor"], log["hasMore"]
        if self.status == "FAILURE" and not self.has_more and _WILL_RETRY_TAG not in self.tags:
            self.undecided_answers += 1
        for event in log["events"]:
            self._take_in_event(event, tell)
        return bool(log["events"])

    def _take_in_event(self, event: Mapping[str, Any], tell: Tell) -> None:
        match event["__typename"]:
            case "LogMessageEvent":
                tell(_progress(event["message"]))
            case "ExecutionStepOutputEvent":
                counts = self.counts.setdefault(event["stepKey"], {})
                for entry in event["metadataEntries"]:
                    if entry.get("intValue") is not None:
                        counts[entry["label"]] = entry["intValue"]
                    elif entry.get("table") is not None:
                        counts[entry["label"]] = list(map(json.loads, entry["table"]["records"]))
            case "ExecutionStepFailureEvent":
                told = event["failureMetadata"]
                self.refusal = _refusal(told["metadataEntries"]) if told else None
                self.failure = (told and told["description"]) or event["error"]["message"]
            case "RunFailureEvent":
                self.failure = self.failure or event["message"]
            case _:
                pass

    def result(self, run_id: str) -> Counts:
        if self.status == "SUCCESS":
            return self.counts
        if self.refusal is not None:
            raise self.refusal
        reason = self.failure or f"it was {self.status.lower()}"
        raise RunFailure(f"Run {run_id} failed: {reason.strip().splitlines()[0]}")


def _progress(message: str) -> Progress:
    remains = _REMAINS.search(message)
    if remains is None:
        return Progress(message)
    done = int(remains[1])
    return Progress(message, done, done + int(remains[2]))


def _refusal(entries: list[Mapping[str, Any]]) -> Refusal | None:
    """The refusal that `failures.told_plainly` put into the failure, if it was one."""
    for entry in entries:
        if entry["label"] == "error" and entry.get("jsonString"):
            return Refusal.from_error(json.loads(entry["jsonString"]))
    return None


_JOBS = """
query Jobs {
  repositoriesOrError {
    ... on RepositoryConnection { nodes { name location { name } jobs { name } } }
  }
}
"""

_LAUNCH = """
mutation Launch($parameters: ExecutionParams!) {
  launchRun(executionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on Error { message }
  }
}
"""

_FIND_RUN = """
query FindRun($tags: [ExecutionTag!]) {
  runsOrError(filter: {tags: $tags}, limit: 1) { ... on Runs { results { runId } } }
}
"""

_FOLLOW = """
query Follow($run: ID!, $after: String) {
  runOrError(runId: $run) {
    __typename
    ... on Run { status tags { key value } }
    ... on Error { message }
  }
  logsForRun(runId: $run, afterCursor: $after, limit: 1000) {
    ... on EventConnection {
      cursor
      hasMore
      events {
        __typename
        ... on MessageEvent { message stepKey }
        ... on ExecutionStepOutputEvent {
          metadataEntries {
            label
            ... on IntMetadataEntry { intValue }
            ... on TableMetadataEntry { table { records } }
          }
        }
        ... on ExecutionStepFailureEvent {
          error { message }
          failureMetadata {
            description
            metadataEntries { label ... on JsonMetadataEntry { jsonString } }
          }
        }
      }
    }
  }
}
"""
