"""The deployments of deploy/, as processes of this machine: tests and benchmarks share them."""

import os
import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from everruns_pipelines_tests.deploy.fake_kubernetes import FakeKubernetes
from everruns_pipelines_tests.deploy.platform import Platform
from everruns_pipelines_tests.deploy.processes import Processes, is_ready, listens
from everruns_pipelines_tests.deploy.services import HOST
from everruns_pipelines_tests.deployment import ROOT, free_port, until

KUBERNETES = ROOT / "deploy" / "kubernetes"


@contextmanager
def one_machine(home: Path, environment: Mapping[str, str], *, runs: int) -> Generator[Processes]:
    """Runs are processes beside the code server, which belongs to the daemon."""
    deployment = Processes(home, environment)
    shipped = (ROOT / "dagster.yaml").read_text()
    deployment.configure(
        re.sub(r"max_concurrent_runs: \d+", f"max_concurrent_runs: {runs}", shipped),
        ROOT / "workspace.yaml",
    )
    with _started(deployment):
        yield deployment


@dataclass
class CeleryProcesses(Processes):
    """With Redis, and workers."""

    redis_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        broker = f"redis://{HOST}:{self.redis_port}/0"
        self.environment = {**self.environment, "EVERRUNS_CELERY_BROKER_URL": broker}

    def start_redis(self) -> None:
        command = ["redis-server", "--bind", HOST, "--port", str(self.redis_port), "--save", ""]
        self.start("redis", command, lambda: listens(self.redis_port))

    def start_worker(self, name: str, processes: int = 2) -> None:
        app = ["-A", "everruns_pipelines.orchestration.celery_worker", "worker"]
        options = ["-n", f"{name}@%h", "-c", str(processes), "-l", "INFO"]
        self.start(
            name,
            [sys.executable, "-m", "celery", *app, *options],
            lambda: " ready." in self.log(name).read_text(),
        )


@contextmanager
def celery(
    home: Path, environment: Mapping[str, str], *, start_timeout: int = 600
) -> Generator[CeleryProcesses]:
    """Without workers."""
    deployment = CeleryProcesses(home, environment)
    shipped = (ROOT / "deploy" / "celery" / "dagster.yaml").read_text()
    deployment.configure(
        shipped.replace("start_timeout_seconds: 600", f"start_timeout_seconds: {start_timeout}")
    )
    with _started(deployment, deployment.start_redis, deployment.start_code_server):
        yield deployment


@contextmanager
def kubernetes(
    home: Path, environment: Mapping[str, str], cluster: FakeKubernetes
) -> Generator[Processes]:
    """Runs are Jobs of the cluster, which are gone 8 s after their end."""
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": cluster.url}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    (home / "kubeconfig").write_text(yaml.safe_dump(config))
    shipped = (KUBERNETES / "base" / "dagster.yaml").read_text()
    outside = _changed(
        shipped,
        "load_incluster_config: true",
        f"load_incluster_config: false\n    kubeconfig_file: {home / 'kubeconfig'}",
    )
    deployment = Processes(
        home,
        {
            **environment,
            "EVERRUNS_NAMESPACE": "test",
            "EVERRUNS_IMAGE": "everruns-pipelines:test",
            "NO_PROXY": "127.0.0.1",
        },
    )
    deployment.configure(
        _changed(outside, "ttl_seconds_after_finished: 3600", "ttl_seconds_after_finished: 8")
    )
    with _started(deployment, deployment.start_code_server):
        yield deployment


@contextmanager
def fake_cluster(
    home: Path, pods: Path, environment: Mapping[str, str]
) -> Generator[FakeKubernetes]:
    """A pod gets what the ConfigMap and the Secret hold, and nothing of ours beside it."""
    (home / "dagster.yaml").write_text((KUBERNETES / "base" / "dagster.yaml").read_text())
    injected = {**environment, "DAGSTER_HOME": str(home), "PATH": os.environ["PATH"]}
    with FakeKubernetes(injected, pods) as cluster:
        yield cluster


@contextmanager
def held_run(deployment: Processes, lived: Platform) -> Generator[tuple[str, Callable[[], None]]]:
    """A run that is at work on the busiest day and can write nothing; and what lets it go on."""
    day, _ = lived.busiest_day()
    lived.lose_facts()
    with lived.held() as let_go:
        run = deployment.materialize(day)
        until(lived.a_run_waits, "the run waits for the lock")
        yield run, let_go


@contextmanager
def _started(deployment: Processes, *first: Callable[[], None]) -> Generator[None]:
    try:
        for start in first:
            start()
        deployment.start_web_server()
        until(lambda: is_ready(deployment.web_port), "the web server has loaded the code")
        deployment.stop_healing()
        deployment.start_daemon()
        yield
    finally:
        deployment.close()


def _changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)
