"""The launcher's files, image and compose, judged by Ray's schema, scheduler and packer and by EC2's API model."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AWS, ONPREM = ROOT / "ray_cluster.yaml", ROOT / "infra" / "onprem" / "ray_cluster.yaml"
# Values are fine, names of environment variables are fine; a value behind a name that says "secret" is not.
SECRET = re.compile(
    r"(?i)(AKIA[0-9A-Z]{16}|-----BEGIN|(password|secret|token|access_key)\w*\s*[=:]\s*['\"]?[\w+/-]{8,})"
)
HARMLESS = re.compile(
    r"(?i)auth_token\W+~/.ray|RAY_AUTH_MODE=token|HttpTokens: required|AUTOMOUNTSERVICEACCOUNTTOKEN: false"
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- the cluster launcher ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[AWS, ONPREM], ids=["aws", "onprem"])
def launcher(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


def test_the_launcher_accepts_its_files(launcher: Any) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher)
    validate_config(prepared)
    broken = copy.deepcopy(prepared)
    broken["set_up_commands"] = []
    with pytest.raises(Exception, match="set_up_commands"):
        validate_config(broken)


def test_the_head_schedules_no_work() -> None:
    aws = load(AWS)
    head = aws["available_node_types"][aws["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    (start,) = [command for command in load(ONPREM)["head_start_ray_commands"] if "--head" in command]
    assert "--num-cpus=0 --num-gpus=0" in start


def test_start_commands_keep_the_dashboard_on_loopback(launcher: Any) -> None:
    starts = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    assert [command for command in starts if "--head" in command]
    for command in starts:
        assert ("--dashboard-host=127.0.0.1" in command) == ("--head" in command)
        assert "0.0.0.0" not in command


def test_set_up_installs_this_checkout_from_the_pinned_constraints(launcher: Any) -> None:
    commands = "\n".join(launcher["setup_commands"])
    assert "pip install --quiet --disable-pip-version-check -c constraints.txt ." in commands
    uploaded = {remote: ROOT / local for remote, local in launcher["file_mounts"].items() if "afa-pipelines" in remote}
    assert all(path.exists() for path in uploaded.values())
    assert {remote.removeprefix("~/afa-pipelines/") for remote in uploaded} == {
        "pyproject.toml", "constraints.txt", "README.md", "afa_core", "infra", "pipelines",
    }  # fmt: skip
    for command in launcher["setup_commands"]:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


def test_every_process_is_told_the_addresses_and_to_want_the_token(launcher: Any, tmp_path: Path) -> None:
    """The set-up command that writes the environment is run, and what it wrote is read by a shell."""
    (write,) = [command for command in launcher["setup_commands"] if "printf" in command]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-c", write], env=home, check=True)
    read = subprocess.run(
        ["bash", "-c", ". ~/.afa_environment; env"], env=home, check=True, capture_output=True, text=True
    )
    variables = dict(line.split("=", 1) for line in read.stdout.splitlines())
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_ADDRESS"] == "auto"
    assert variables["PATH"] == f"{tmp_path}/venv/bin:/usr/bin:/bin"
    assert variables["MLFLOW_TRACKING_URI"].startswith("http")
    assert variables["AWS_ENDPOINT_URL_S3"].startswith("http")
    assert launcher["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_machines_are_what_ec2s_api_takes() -> None:
    """botocore's model of RunInstances, without a call; Ray adds the rest (counts, tags, key pair)."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in load(AWS)["available_node_types"].items():
        request = dict(node_type["node_config"])
        request["SubnetId"] = request.pop("SubnetIds")[0]  # Ray takes one for each attempt
        report = ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert request["IamInstanceProfile"]
        assert request["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in request["BlockDeviceMappings"])
        unknown = ParamValidator().validate({**request, "Spot": True, "MinCount": 1, "MaxCount": 1}, shape)
        assert "Spot" in unknown.generate_report()


def test_spot_machines_come_first_and_on_demand_ones_when_they_do_not_come_up() -> None:
    """Ray's own scheduler, fed with the file's node types."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    types = {
        name: NodeTypeConfig(
            name=name,
            resources=value["resources"],
            min_worker_nodes=0,
            max_worker_nodes=value.get("max_workers", 0),
            priority=value.get("priority", 0),
        )
        for name, value in load(AWS)["available_node_types"].items()
    }

    def launched(bundles: int, recovered: dict[str, float]) -> dict[str, int]:
        demand = ResourceRequestByCount(request=ResourceRequestUtil.make({"GPU": 1}), count=bundles)
        request = SchedulingRequest(
            node_type_configs=types,
            max_num_nodes=11,
            resource_requests=[demand],
            recoverable_resource_availabilities=recovered,
            disable_launch_config_check=True,
        )
        reply = ResourceDemandScheduler().schedule(request)
        return {launch.instance_type: launch.count for launch in reply.to_launch}

    assert launched(2, {}) == {"gpu-spot": 2}
    assert launched(2, {"gpu-spot": 0.0}) == {"gpu-on-demand": 2}
    assert launched(10, {}) == {"gpu-spot": 8, "gpu-on-demand": 2}
    workers = load(AWS)["available_node_types"]
    assert workers["gpu-on-demand"]["min_workers"] >= 1
    assert "InstanceMarketOptions" not in workers["gpu-on-demand"]["node_config"]
    assert workers["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


# --- images and secrets -----------------------------------------------------------------------------------------------


def test_the_image_is_built_from_the_pins_and_runs_as_nobody() -> None:
    text = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    assert "FROM python:3.11-" in text  # as the Makefile's
    assert "pip install -c constraints.txt ." in text
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in names.split())


def test_compose_listens_on_loopback_and_takes_passwords_from_the_environment() -> None:
    services = load(ROOT / "infra" / "compose" / "compose.yaml")["services"]
    assert set(services) == {"postgres", "s3", "mlflow"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service["environment"].items():
            if any(word in name for word in ("PASSWORD", "KEY", "ROOT")):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), name
    script = services["mlflow"]["command"][0].replace("$$", "$")
    assert subprocess.run(["sh", "-n", "-c", script], check=False).returncode == 0
    example = (ROOT / "infra" / "compose" / ".env.example").read_text()
    wanted = set(re.findall(r"\$\{(\w+):", (ROOT / "infra" / "compose" / "compose.yaml").read_text()))
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == wanted


def test_no_shipped_file_holds_a_secret() -> None:
    paths = [AWS, *(path for path in (ROOT / "infra").rglob("*") if path.name.endswith(("yaml", "example", "file")))]
    files = [path for path in paths if path.is_file()]
    assert len(files) > 10
    for path in files:
        for line in path.read_text().splitlines():
            found = SECRET.search(HARMLESS.sub("", line))
            assert not found or "${" in line or "$$" in line, f"{path.name}: {line}"
    assert SECRET.search("MLFLOW_TRACKING_PASSWORD=correct-horse")


def test_a_job_takes_only_code_along(tmp_path: Path) -> None:
    """Ray's own packer on a checkout full of what must stay at home."""
    from ray._private.runtime_env.packaging import _zip_files

    checkout, packed = tmp_path / "checkout", tmp_path / "packed.zip"
    checkout.mkdir()
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, checkout)
    keep = ["pipelines/train.py", "pipelines/configs/mine.yaml", "infra/tracking.py", "mine.yaml"]
    leave = [
        ".venv/lib/big.so", "runs/one/checkpoint/model.safetensors", "demo/index.html", "work/a.png", "data/a.jpg",
        "infra/compose/.env", ".env", "tests/unit/test_a.py", "docs/a.md", "mlruns/0/meta.yaml", "mlflow.db",
        "pipelines/__pycache__/train.pyc", "key.pem", ".git/config",
    ]  # fmt: skip
    for name in [*keep, *leave]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    _zip_files(str(checkout), [".git"], str(packed), include_gitignore=True)
    with zipfile.ZipFile(packed) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert names == {*keep, ".gitignore", ".rayignore"}
