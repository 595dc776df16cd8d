"""deploy/helm/values.yaml says what deploy/kubernetes says, under the chart's names."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef

from everruns_pipelines_tests.deployment import ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "helm" / "values.yaml").read_text())


@pytest.fixture
def shipped() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kubernetes" / "base" / "dagster.yaml").read_text())


def in_snake_case(name: str) -> str:
    return re.sub("(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def test_what_the_chart_cannot_say_stands_in_the_rest_word_by_word(
    values: dict[str, Any], shipped: dict[str, Any]
) -> None:
    rest = values["additionalInstanceConfig"]
    assert rest == {section: shipped[section] for section in rest}
    # The chart would write these a second time.
    daemon = values["dagsterDaemon"]
    assert not daemon["runMonitoring"]["enabled"]
    assert not daemon["runRetries"]["enabled"]
    assert not daemon["sensors"]["useThreads"]
    assert not values["retention"]["enabled"]
    by_chart = {"storage", "run_coordinator", "run_launcher", "compute_logs", "telemetry"}
    assert set(shipped) - set(rest) == by_chart


def test_what_the_chart_says_is_the_same(values: dict[str, Any], shipped: dict[str, Any]) -> None:
    coordinator = values["dagsterDaemon"]["runCoordinator"]
    assert coordinator["type"] == "CustomRunCoordinator"
    assert coordinator["config"]["customRunCoordinator"] == shipped["run_coordinator"]
    assert values["telemetry"] == shipped["telemetry"]
    assert values["computeLogManager"]["type"] == shipped["compute_logs"]["class"]
    launcher = values["runLauncher"]
    assert launcher["type"] == shipped["run_launcher"]["class"]
    run = launcher["config"]["k8sRunLauncher"]["runK8sConfig"]
    assert {in_snake_case(name): value for name, value in run.items()} == (
        shipped["run_launcher"]["config"]["run_k8s_config"]
    )


def test_the_code_location_has_the_name_that_our_client_asks_for(values: dict[str, Any]) -> None:
    """The chart names it by its deployment, unless the workspace does."""
    [deployment] = values["dagster-user-deployments"]["deployments"]
    [server] = values["dagsterWebserver"]["workspace"]["servers"]
    assert server == {
        "host": deployment["name"],
        "port": deployment["port"],
        "name": "everruns_pipelines",
    }


def test_no_container_may_more_than_it_needs(values: dict[str, Any]) -> None:
    [deployment] = values["dagster-user-deployments"]["deployments"]
    for workload in (deployment, values["dagsterWebserver"], values["dagsterDaemon"]):
        assert workload["podSecurityContext"]["runAsNonRoot"] is True
        assert workload["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert workload["resources"]["requests"]
    # What the code server hands on to runs has the right to make Jobs.
    assert deployment["includeConfigInLaunchedRuns"] == {"enabled": False}
    run = values["runLauncher"]["config"]["k8sRunLauncher"]
    assert dict(one.split("=") for one in run["envVars"]) == {
        one["name"]: one["value"] for one in deployment["env"]
    }


def test_dagster_takes_what_stands_in_the_rest(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(values["additionalInstanceConfig"]))
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
        assert instance.run_monitoring_enabled
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 4
