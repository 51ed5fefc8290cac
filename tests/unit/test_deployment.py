"""The shipped deployment files: what Ray, EC2's API model, KubeRay's CRDs and Ray's own scheduler say of them."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
AWS, ONPREM = ROOT / "ray_cluster.yaml", ROOT / "infra" / "onprem" / "ray_cluster.yaml"
KUBERAY = ROOT / "infra" / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
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
    endpoint = "AWS_ENDPOINT_URL_S3" if launcher["provider"]["type"] == "aws" else "AWS_ENDPOINT_URL"
    assert variables[endpoint].startswith("http")
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


# --- Kubernetes -------------------------------------------------------------------------------------------------------


def rendered(overlay: str) -> list[Any]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl: the overlays were not rendered")
    answer = subprocess.run(
        ["kubectl", "kustomize", KUBERAY / "overlays" / overlay], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return list(yaml.safe_load_all(answer.stdout))


OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())


def schema_of(kind: str) -> dict[str, Any]:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no KubeRay CRDs at {CRDS}: the manifests were not validated")
    definition = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """The schema, with fields it does not name refused; Kubernetes drops them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {name: strict(value) for name, value in inner.items()} if key == "properties" else strict(inner)
        for key, inner in schema.items()
    }
    if "properties" in schema and "additionalProperties" not in schema:
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    if schema.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    return result


def pods(manifest: Any) -> Iterator[tuple[str, Any]]:
    """Every pod template with the name of its role."""
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]["spec"]
        spec = spec["rayClusterSpec"]
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def ray_manifest(overlay: str) -> Any:
    found = [manifest for manifest in rendered(overlay) if manifest["apiVersion"] == "ray.io/v1"]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberays_schema_knows_every_field(overlay: str) -> None:
    import jsonschema

    manifest = ray_manifest(overlay)
    schema = schema_of(manifest["kind"])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft7Validator(schema)
    assert not [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    for _, pod in pods(manifest):  # the check does see a slip of the pen, deep inside too
        pod["containers"][0]["ressources"] = {}
        assert any("ressources" in error.message for error in validator.iter_errors(manifest))
        del pod["containers"][0]["ressources"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_not_root_and_have_limits_probes_and_accounts(overlay: str) -> None:
    manifest = ray_manifest(overlay)
    for role, pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True, role
        assert pod["securityContext"]["runAsUser"] > 0, role
        assert pod["serviceAccountName"] == ("afa-head" if role == "head" else "afa-worker")
        names = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["image"].endswith("/afa-pipelines:0.1.0")
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert container["resources"]["requests"] == container["resources"]["limits"], role
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == names, role
            if role != "submitter":
                assert container["readinessProbe"]["httpGet"] == container["livenessProbe"]["httpGet"]
                assert "shm" in names
        assert (role.startswith("gpu")) == ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_wants_a_token_scales_and_survives_its_head(overlay: str) -> None:
    import ray

    manifest = ray_manifest(overlay)
    spec = manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "afa-redis"
    on_demand, spot = spec["workerGroupSpecs"]
    assert on_demand["minReplicas"] >= 1
    assert (spot["minReplicas"], spot["priority"]) == (0, 10)
    if manifest["kind"] == "RayJob":
        job = manifest["spec"]
        assert job["shutdownAfterJobFinishes"] is True
        assert job["ttlSecondsAfterFinished"] > 0
        assert job["backoffLimit"] > 0
        assert job["activeDeadlineSeconds"] > 0


@pytest.mark.parametrize("overlay", ["training", "labelling"])
def test_a_jobs_command_is_one_that_the_stage_takes(overlay: str) -> None:
    """Parsed by the stage's own parser, and safe to repeat: backoffLimit runs it again."""
    import argparse
    import importlib

    words = ray_manifest(overlay)["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args(words[3:])
    if overlay == "training":
        from pipelines.config import load_experiment

        assert arguments.resume_existing
        assert arguments.run_name
        assert load_experiment(arguments.config, arguments.overrides).train.use_gpu
    else:
        assert arguments.use_gpu


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
    assert not any(manifest["kind"] == "Secret" for overlay in OVERLAYS for manifest in rendered(overlay))


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
