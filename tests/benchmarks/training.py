"""Steps of one worker and of two, all-reduce between them, and a checkpoint: ``python tests/benchmarks/training.py``.

``afa train`` on the built-in shapes, 8 pictures a step and worker; the times of each step are those that the run logs.
Medians, and the fastest tenth, which other work on the machine disturbs least. Prints JSON lines.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from torch.multiprocessing.spawn import spawn

from afa_core.checkpoint import save_bundle, save_training_state
from afa_core.classes import VOC
from afa_core.config import CamConfig, LabelConfig, ModelConfig, OptimConfig, ParConfig
from afa_core.model import build_model
from afa_core.optim import build_optimizer

STEPS, CLASSIFICATION, LABELS = 100, 50, 60  # of the run; until segmentation; until the affinity decides about labels
CASES = ((1, 1), (2, 1))  # workers, threads of each
REPEATS = 10


def train(folder: Path, workers: int, threads: int) -> dict[str, object]:
    """A run, and the times of its steps."""
    name = f"w{workers}t{threads}"
    words = ["train", folder / "shards", "--config", "shapes_cpu", "--storage", folder / "runs", "--run-name", name]
    values = {
        "optim.total_steps": STEPS, "loss.classification_steps": CLASSIFICATION, "loss.affinity_label_step": LABELS,
        "optim.warmup_steps": 10, "train.workers": workers, "train.eval_every": STEPS, "train.eval_samples": 8,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    changes = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words), *changes]
    began = time.monotonic()
    # Ray starts workers at nice 15: beside other work they would hardly run.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAY_worker_niceness": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        start_s = 0.0
        assert run.stdout is not None
        for line in run.stdout:
            if "pictures a step" in line:
                start_s = time.monotonic() - began
    assert run.returncode == 0
    client = MlflowClient(values["tracking.uri"])
    run_id = json.loads((folder / "runs" / name / "afa_run.json").read_text())["run_id"]
    step_s = {point.step: point.value for point in client.get_metric_history(run_id, "time.step_s")}
    data_s = {point.step: point.value for point in client.get_metric_history(run_id, "time.data_s")}
    facts: dict[str, object] = {"workers": workers, "threads": threads, "start_s": round(start_s, 1)}
    for phase, first, last in (("classification", 5, CLASSIFICATION), ("labels", LABELS + 2, STEPS)):
        times = sorted(value for step, value in step_s.items() if first <= step < last)
        waits = [data_s[step] for step in step_s if first <= step < last]
        facts |= {
            f"{phase}_step_ms": round(1000 * statistics.median(times), 1),
            f"{phase}_fast_ms": round(1000 * times[len(times) // 10], 1),
            f"{phase}_images_per_s": round(8 * workers / statistics.median(times), 1),
            f"{phase}_data_ms": round(1000 * statistics.median(waits), 1),
        }
    return facts


def all_reduce(rank: int, address: str, megabytes: tuple[int, ...], results: str) -> None:
    """One of two processes; gloo over loopback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    facts = {}
    for number in megabytes:
        values = torch.ones(number * 10**6 // 4)
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(values)
            times.append(time.monotonic() - began)
        facts[f"all_reduce_{number}_mb_ms"] = round(1000 * statistics.median(times), 1)
        facts[f"all_reduce_{number}_mb_fast_ms"] = round(1000 * min(times), 1)
    if rank == 0:
        Path(results).write_text(json.dumps(facts))
    dist.destroy_process_group()


def checkpoint(folder: Path) -> dict[str, object]:
    """Size and time of a checkpoint of mit_b1 with the classes of VOC, one step done."""
    config = ModelConfig(backbone="mit_b1")
    model = build_model(config, len(VOC))
    optimizer = build_optimizer(model, OptimConfig(), pretrained=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    began = time.monotonic()
    save_bundle(folder, model, VOC, config, CamConfig(), ParConfig(), LabelConfig())
    save_training_state(folder / "state", {"step": 1, "optimizer": optimizer.state_dict()})
    seconds = time.monotonic() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "checkpoint_mb": round(size / 1e6, 1),
        "bytes_per_parameter": round(size / parameters, 2),
        "write_s": round(seconds, 2),
        "write_mb_per_s": round(size / seconds / 1e6),
    }


def main() -> None:
    """All of it, about five minutes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print(json.dumps(checkpoint(folder)), flush=True)
        results = str(folder / "all_reduce.json")
        spawn(all_reduce, (f"file://{folder}/rendezvous", (1, 55, 164), results), nprocs=2)
        print(Path(results).read_text(), flush=True)
        words = [
            "shards",
            "shapes",
            str(folder / "shards"),
            "--train",
            "800",
            "--val",
            "16",
            "--samples-per-shard",
            "100",
        ]
        subprocess.run([sys.executable, "-m", "pipelines.cli", *words], check=True, capture_output=True)
        for workers, threads in CASES:
            print(json.dumps(train(folder, workers, threads)), flush=True)


if __name__ == "__main__":
    main()
