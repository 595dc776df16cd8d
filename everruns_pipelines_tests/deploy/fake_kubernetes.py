"""The few calls of Kubernetes' API that Dagster's launcher makes, on loopback.

A Job's pod is a process: the container's real command, with its real environment; what the cluster
would mount and inject is given. A Job is removed once its time to live is over, as there.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from everruns_pipelines_tests.deploy.services import HOST


@dataclass
class Job:
    """A Job, and the process that is its pod."""

    body: dict[str, Any]
    process: subprocess.Popen[bytes]
    ended: float | None = None

    @property
    def name(self) -> str:
        return self.body["metadata"]["name"]

    @property
    def container(self) -> dict[str, Any]:
        return self.body["spec"]["template"]["spec"]["containers"][0]

    def status(self) -> dict[str, Any]:
        code = self.process.poll()
        if code is None:
            return {"active": 1}
        return {"succeeded": 1} if code == 0 else {"failed": 1}

    def is_over(self) -> bool:
        """Whether its time to live has passed since it ended."""
        if self.process.poll() is not None and self.ended is None:
            self.ended = monotonic()
        age = 0.0 if self.ended is None else monotonic() - self.ended
        return self.ended is not None and age > self.body["spec"]["ttlSecondsAfterFinished"]

    def pod(self) -> dict[str, Any]:
        code = self.process.poll()
        phase = "Running" if code is None else "Succeeded" if code == 0 else "Failed"
        return {
            "metadata": {"name": f"{self.name}-pod", "namespace": "test"},
            "spec": {"containers": [self.container]},
            "status": {"phase": phase, "containerStatuses": []},
        }


class FakeKubernetes:
    """The server.

    Args:
        injected: what the cluster gives a pod: secrets and settings, DAGSTER_HOME.
        directory: where the pods' output goes.
    """

    def __init__(self, injected: Mapping[str, str], directory: Path) -> None:
        self.jobs: dict[str, Job] = {}
        self.created: list[Job] = []
        self._injected = injected
        self._directory = directory
        self._lock = Lock()
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def do_DELETE(self) -> None:
                self._answer("DELETE")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

            def _answer(self, method: str) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                status, answer = cluster.answer(method, self.path, body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self._server = ThreadingHTTPServer((HOST, 0), Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for job in self.created:
            job.process.kill()
            job.process.wait()

    def answer(self, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """What the API says to a request."""
        parts = urlsplit(path)
        with self._lock:
            self.jobs = {name: job for name, job in self.jobs.items() if not job.is_over()}
            jobs = re.fullmatch(
                r"/apis/batch/v1/namespaces/test/jobs(?:/([^/]+))?(/status)?", parts.path
            )
            if jobs:
                return self._answer_jobs(method, jobs[1], body)
            pods = re.fullmatch(r"/api/v1/namespaces/test/pods(?:/([^/]+))?(/log)?", parts.path)
            if pods:
                return self._answer_pods(method, pods[1], parse_qs(parts.query))
            if parts.path == "/api/v1/namespaces/test/events":
                return 200, {"kind": "EventList", "items": []}
        return 404, {"kind": "Status", "code": 404, "message": f"no such path: {parts.path}"}

    def _answer_jobs(self, method: str, name: str | None, body: Any) -> tuple[int, dict[str, Any]]:
        if method == "POST":
            job = Job(body, self._start(body))
            self.jobs[job.name] = job
            self.created.append(job)
            return 201, body
        if name is None:
            return 200, {"kind": "JobList", "items": [job.body for job in self.jobs.values()]}
        if name not in self.jobs:
            return 404, {"kind": "Status", "code": 404, "message": "not found"}
        job = self.jobs[name]
        if method == "DELETE":
            del self.jobs[name]
            return 200, {"kind": "Status", "status": "Success"}
        return 200, {**job.body, "status": job.status()}

    def _answer_pods(
        self, method: str, name: str | None, query: Mapping[str, list[str]]
    ) -> tuple[int, dict[str, Any]]:
        of_job = query.get("labelSelector", [""])[0].removeprefix("job-name=")
        found = [
            job
            for job in self.jobs.values()
            if of_job in ("", job.name) and name in (None, f"{job.name}-pod")
        ]
        if name is None:
            return 200, {"kind": "PodList", "items": [job.pod() for job in found]}
        if method == "DELETE":
            # Its job may have gone before it.
            [job] = [job for job in self.created if name == f"{job.name}-pod"]
            job.process.send_signal(signal.SIGTERM)
            return 200, job.pod()
        if not found:
            return 404, {"kind": "Status", "code": 404, "message": "not found"}
        return 200, found[0].pod()

    def _start(self, body: dict[str, Any]) -> subprocess.Popen[bytes]:
        container = body["spec"]["template"]["spec"]["containers"][0]
        command: list[str] = [*(container.get("command") or []), *container["args"]]
        assert command[0] == "dagster"
        given = {one["name"]: one["value"] for one in container["env"] if one.get("value")}
        given.pop("DAGSTER_HOME")  # a directory of the image
        output = (self._directory / f"{body['metadata']['name']}.log").open("ab")
        with output:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / "dagster"), *command[1:]],
                env={**self._injected, **given},
                stdout=output,
                stderr=output,
                cwd=self._directory,
                start_new_session=True,
            )
