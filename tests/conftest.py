"""What several test files share: one local Ray, and a tracking database of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from golden import reference_weights
from servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from afa_core.checkpoint import save_bundle
from afa_core.classes import SHAPES
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.model import build_model


class Lanes(LoadScopeScheduling):
    """A file's tests stay together, and so do all that make hosts and bridges of this machine."""

    def _split_scope(self, nodeid: str) -> str:
        folder, _, _ = nodeid.partition("/test_")
        return folder if folder.endswith("cluster") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    """With ``pytest -n 2`` the suite runs in two lanes: half of its time a test waits for other processes."""
    return Lanes(config, log)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray for the whole session; commands that are run as processes connect to it."""
    import ray
    from ray._private import parameter

    from pipelines.local_ray import start_ray

    os.environ.pop("RAY_ADDRESS", None)
    with pytest.MonkeyPatch.context() as patch:
        # Not the port that a command's own Ray takes: its agent would try for four seconds.
        patch.setattr(parameter, "RayParams", partial(parameter.RayParams, dashboard_agent_listen_port=0))
        start_ray(dashboard=True)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    os.environ.pop("RAY_ADDRESS", None)
    ray.shutdown()


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of an empty SQLite tracking database, which is also the environment's."""
    folder: Path = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a real S3 server; its credentials are the environment's."""
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield endpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def published() -> dict[str, torch.Tensor]:
    """The weights of the golden tensors, mit_b0, by the names of the published code."""
    values = reference_weights.state_dict(Path(__file__).parent / "golden" / "names-mit_b0.json")
    return {name: torch.as_tensor(value) for name, value in values.items()}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model: what it says does not matter here."""
    folder = tmp_path_factory.mktemp("bundle")
    config = ModelConfig(backbone="mit_tiny", decoder_channels=16)
    torch.manual_seed(0)
    cam, par = CamConfig(scales=(1.0,), affinity_radius=2), ParConfig(dilations=(1,), iterations=1)
    save_bundle(folder, build_model(config, len(SHAPES)), SHAPES, config, cam, par, LabelConfig(max_side_px=128))
    return folder
