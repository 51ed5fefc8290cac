"""What may import what, and that every shipped configuration is one."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.config import experiment_from_values, experiment_to_values, load_experiment
from pipelines.errors import UsageError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "pipelines" / "configs").glob("*.yaml"))


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once the code has run in an interpreter of its own."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(answer.stdout.split())


def test_the_science_loads_no_ray_no_mlflow_and_no_boto3() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "afa_core").rglob("*.py")
        if path.stem != "par_gpu" or find_spec("triton")  # which only torch's CUDA builds bring
    )
    loaded = modules_after("\n".join(f"import {name}" for name in modules))
    assert "afa_core" in loaded
    assert not loaded & {"ray", "mlflow", "boto3", "pipelines", "infra"}


def test_infra_does_not_load_the_science() -> None:
    loaded = modules_after("import infra.tracking, infra.registry")
    assert "mlflow" in loaded
    assert not loaded & {"afa_core", "pipelines", "torch"}


@pytest.mark.parametrize("stage", ["verify_labels", "export", "report", "review"])
def test_whoever_works_with_labels_that_are_there_does_not_wait_for_torch(stage: str) -> None:
    loaded = modules_after(f"import pipelines.{stage}")
    assert "pipelines" in loaded
    assert not loaded & {"torch", "ray", "mlflow"}


def test_the_driver_of_labelling_leaves_torch_to_its_workers_and_waits_for_mlflow_only_for_a_registry() -> None:
    loaded = modules_after("import pipelines.pseudo_label")
    assert "ray" in loaded
    assert not loaded & {"torch", "mlflow"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_loads_and_survives_the_round_trip(name: str) -> None:
    experiment = load_experiment(name, [])
    assert experiment_from_values(experiment_to_values(experiment), "test") == experiment


def test_later_overrides_win_and_numbers_may_have_an_exponent() -> None:
    experiment = load_experiment("shapes_cpu", ["optim.lr=1e-4", "optim.lr=2e-4", "cam.scales=[1.0, 0.75]"])
    assert experiment.optim.lr == 2e-4
    assert experiment.cam.scales == (1.0, 0.75)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim: {lr: [1]}", "optim.lr"),
        ("optim:\n  speed: 1", "optim.speed"),
        ("model: 3", "model"),
        ("- 1", "keys and values"),
        ("a: [", "line"),
        ("cam: {background_score_low: 0.9}", "background_score_low"),
        ("data: {crop_px: 4}", "data.crop_px"),
        ("train: {best_metric: luck}", "luck"),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as caught:
        load_experiment(str(path), [])
    assert "\n" not in str(caught.value)
