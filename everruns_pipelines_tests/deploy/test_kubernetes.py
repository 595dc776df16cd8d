"""deploy/kubernetes: valid manifests, and a dagster.yaml whose Jobs run, as real processes."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from everruns_pipelines_tests.deploy.deployments import (
    KUBERNETES,
    fake_cluster,
    held_run,
    kubernetes,
)
from everruns_pipelines_tests.deploy.fake_kubernetes import FakeKubernetes
from everruns_pipelines_tests.deploy.platform import Platform, platform
from everruns_pipelines_tests.deploy.processes import Processes
from everruns_pipelines_tests.deployment import ROOT, until

pytestmark = pytest.mark.deploy

TOOLS = ROOT / ".venv-kubernetes" / "bin"
OLDEST, NEWEST = "1.33.0", "1.37.0"
OVERLAYS = ("production", "example")

needs_tools = pytest.mark.skipif(
    not (TOOLS / "kubectl").exists(), reason="there is no kubectl: make .venv-kubernetes/.installed"
)


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rendered") / f"{request.param}.yaml"
    made.write_text(tool("kubectl", "kustomize", str(KUBERNETES / "overlays" / request.param)))
    return made


def objects(rendered: Path, kind: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all(rendered.read_text())
    return {one["metadata"]["name"]: one for one in found if one["kind"] == kind}


def pods(rendered: Path) -> dict[str, dict[str, Any]]:
    workloads = {**objects(rendered, "Deployment"), **objects(rendered, "Job")}
    return {name: one["spec"]["template"]["spec"] for name, one in workloads.items()}


@needs_tools
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_the_manifests_are_valid(rendered: Path, version: str) -> None:
    tool("kubernetes-validate", "--strict", "-k", version, str(rendered))


@needs_tools
def test_no_container_may_more_than_it_needs(rendered: Path) -> None:
    assert len(pods(rendered)) == 4
    for spec in pods(rendered).values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert not any("PASSWORD" in one["name"] for one in container.get("env", ()))
    with_token = {n for n, spec in pods(rendered).items() if spec["automountServiceAccountToken"]}
    assert with_token == {"everruns-pipelines-daemon", "everruns-pipelines-web"}


@needs_tools
def test_runs_use_the_image_of_the_code_server(rendered: Path) -> None:
    images: set[str] = set()
    for spec in pods(rendered).values():
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            images.add(container["image"])
            images |= {
                one["value"] for one in container.get("env", ()) if one["name"] == "EVERRUNS_IMAGE"
            }
    assert len(images) == 1
    assert ":" in images.pop()


@needs_tools
def test_what_runs_in_the_cluster_may_only_run_jobs(rendered: Path) -> None:
    assert objects(rendered, "ClusterRole") == {}
    [role] = objects(rendered, "Role").values()
    changes = {
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        if verb not in ("get", "list")
    }
    assert changes == {("jobs", "create"), ("jobs", "delete"), ("pods", "delete")}


def test_the_shipped_dagster_yaml_is_the_projects_own_but_for_what_it_says() -> None:
    """What is right in dagster.yaml is not forgotten elsewhere."""
    own = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    # How soon a run ends that was told to, is the launcher's.
    own["run_monitoring"].pop("cancel_timeout_seconds")
    for shipped in (KUBERNETES / "base", ROOT / "deploy" / "celery"):
        other = yaml.safe_load((shipped / "dagster.yaml").read_text())
        for added in ("run_launcher", "compute_logs"):
            other.pop(added, None)
            own.pop(added, None)
        other["concurrency"]["runs"] = own["concurrency"]["runs"]
        for section, value in own.items():
            if section == "run_monitoring":
                assert {**other[section], **value} == other[section]
            else:
                assert other[section] == value, section
        assert set(other) == set(own)


@pytest.fixture(scope="module")
def lived(home: Path) -> Iterator[Platform]:
    with platform(home, "kubernetes") as made:
        yield made


@pytest.fixture(scope="module")
def cluster(lived: Platform, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeKubernetes]:
    home, pods = tmp_path_factory.mktemp("pod-home"), tmp_path_factory.mktemp("pods")
    with fake_cluster(home, pods, lived.environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def deployment(
    lived: Platform, cluster: FakeKubernetes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    home = tmp_path_factory.mktemp("kubernetes")
    with kubernetes(home, lived.environment, cluster) as deployment:
        yield deployment


def test_a_run_is_a_job_that_succeeds_and_goes(
    deployment: Processes, cluster: FakeKubernetes, lived: Platform
) -> None:
    lived.lose_facts()

    run = deployment.launch()

    until(lambda: deployment.status(run) == "SUCCESS", "the run succeeds")
    assert lived.is_repaired()
    [job] = [job for job in cluster.created if run in job.name]
    assert job.container["image"] == "everruns-pipelines:test"
    assert job.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [one["secretRef"]["name"] for one in job.container["envFrom"] if "secretRef" in one] == [
        "everruns-pipelines"
    ]
    until(lambda: cluster.answer("GET", status_path(job.name), None)[0] == 404, "its time is over")
    assert deployment.status(run) == "SUCCESS"


def status_path(job: str) -> str:
    return f"/apis/batch/v1/namespaces/test/jobs/{job}/status"


def test_a_run_that_fails_says_so_and_is_not_tried_again(deployment: Processes) -> None:
    run = deployment.launch(organization=77)

    until(lambda: deployment.status(run) == "FAILURE", "the run fails")
    after = deployment.launch()
    until(lambda: deployment.status(after) == "SUCCESS", "another one succeeds")
    assert deployment.retries_of(run) == []


def test_a_killed_pod_is_found_and_its_run_done_again_once(
    deployment: Processes, cluster: FakeKubernetes, lived: Platform
) -> None:
    with held_run(deployment, lived) as (run, let_go):
        os.killpg(cluster.created[-1].process.pid, signal.SIGKILL)

        until(lambda: deployment.status(run) == "FAILURE", "the dead pod is found", 45)
        until(lambda: len(deployment.retries_of(run)) == 1, "the run is launched again")
        let_go()
    [retry] = deployment.retries_of(run)
    until(lambda: deployment.status(retry) == "SUCCESS", "the second try succeeds")
    assert lived.day_is_right()
    assert deployment.retries_of(retry) == []


def test_a_run_that_is_terminated_ends(
    deployment: Processes, cluster: FakeKubernetes, lived: Platform
) -> None:
    with held_run(deployment, lived) as (run, let_go):
        until(lambda: deployment.status(run) == "STARTED", "it is that run")
        deployment.terminate(run)
        until(lambda: deployment.status(run) == "CANCELED", "the run ends", 30)
        assert cluster.created[-1].process.wait(30) is not None
        let_go()
    assert deployment.retries_of(run) == []
