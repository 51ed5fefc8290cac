"""The KubeRay overlays, rendered by kustomize: KubeRay's CRDs, made strict, and the stages' own parsers."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipelines.config import load_experiment

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay-crds"


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
    words = ray_manifest(overlay)["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "-m"]
    module = importlib.import_module(words[2])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args(words[3:])
    if overlay == "training":
        assert arguments.resume_existing
        assert arguments.run_name
        assert load_experiment(arguments.config, arguments.overrides).train.use_gpu
    else:
        assert arguments.use_gpu


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_made_elsewhere(overlay: str) -> None:
    assert {manifest["kind"] for manifest in rendered(overlay)} <= {
        "RayCluster", "RayJob", "ServiceAccount", "ConfigMap", "NetworkPolicy",
    }  # fmt: skip
