"""What the API waits for when a run fails: whether Dagster tries it again."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from dagster import DagsterRun, DagsterRunStatus

from everruns_pipelines.serve.runs import Runs
from everruns_pipelines_tests.deployment import failed_a_moment_ago
from everruns_pipelines_tests.serve.conftest import Served


def test_a_failure_counts_once_it_is_decided_that_it_is_not_tried_again(served: Served) -> None:
    runs = Runs(cast("Any", SimpleNamespace(instance=served.instance)))
    run = failed_a_moment_ago(served.instance, "backfill_reporting")
    assert asyncio.run(runs.follow(run.run_id, 0.5)) is None
    served.instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
    ended = asyncio.run(runs.follow(run.run_id, 60))
    assert ended is not None
    assert ended.status is DagsterRunStatus.FAILURE


def test_a_run_that_dies_again_and_again_is_not_waited_for_again_and_again(served: Served) -> None:
    runs = Runs(cast("Any", SimpleNamespace(instance=served.instance)))
    last = served.instance.add_run(DagsterRun("idle", status=DagsterRunStatus.SUCCESS))
    first = last.run_id
    for _ in range(40):
        tags = {"dagster/will_retry": "true", "dagster/auto_retry_run_id": first}
        died = DagsterRun("idle", status=DagsterRunStatus.FAILURE, tags=tags)
        first = served.instance.add_run(died).run_id
    assert asyncio.run(runs.follow(first, 0.3)) is None
    ended = asyncio.run(runs.follow(first, 60))
    assert ended is not None
    assert ended.run_id == last.run_id
