"""Every run says where it came from."""

from typing import Any, cast

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.run_coordinator import SubmitRunContext

from everruns_pipelines.orchestration.coordinator import LabellingRunCoordinator, labels
from everruns_pipelines_tests.deployment import ROOT


@pytest.mark.parametrize(
    ("tags", "origin"),
    [
        ({}, "ui"),
        ({"dagster/sensor_name": "a"}, "sensor"),
        ({"dagster/schedule_name": "a"}, "schedule"),
        ({"everruns/request": "a"}, "cli"),
        ({"everruns/token": "a", "everruns/request": "a"}, "api"),
        ({"everruns/from": "demo"}, "demo"),
    ],
)
def test_a_run_says_where_it_came_from_and_whether_it_is_dry(
    tags: dict[str, str], origin: str
) -> None:
    wet = {"ops": {"enqueue": {"config": {"dry_run": False}}}}
    dry = {"ops": {"enqueue": {"config": {"dry_run": True}}}}
    assert labels(tags, wet) == {"everruns/from": origin}
    assert labels(tags, dry) == {"everruns/from": origin, "everruns/dry_run": "true"}


def test_the_queue_of_a_deployment_labels_its_runs(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVERRUNS_DAGSTER_POSTGRES_URL", postgres_url)
    with DagsterInstance.from_config(str(ROOT)) as instance:
        assert isinstance(instance.run_coordinator, LabellingRunCoordinator)
        run = instance.add_run(DagsterRun("job", status=DagsterRunStatus.STARTED))
        context = SubmitRunContext(run, workspace=cast("Any", None))
        queued = instance.run_coordinator.submit_run(context)
    assert queued.tags["everruns/from"] == "ui"
