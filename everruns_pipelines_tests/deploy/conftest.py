"""What the tests of deployments share: a place that servers' own users may enter."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest

_ENOUGH_MEMORY = 2 * 2**30  # bytes


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for servers that run as another user: in memory where there is room."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ENOUGH_MEMORY
    with TemporaryDirectory(prefix="deploy-", dir=memory if roomy else gettempdir()) as directory:
        path = Path(directory)
        path.chmod(0o711)
        yield path
