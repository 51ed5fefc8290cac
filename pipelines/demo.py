"""``afa demo``: the whole job on the built-in data and embedded defaults, in a few minutes.

shapes -> shards -> two-worker training -> registry -> labels for a folder of unlabelled pictures -> a page of overlays
and a table of mIoU. The stages run as the commands a user would type, each in a process of its own, on one local Ray.
The truth of the unlabelled pictures is kept aside until the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from PIL import Image

from afa_core.checkpoint import load_bundle
from afa_core.classes import SHAPES
from afa_core.data.sample import Sample, decode_seg_label
from afa_core.data.shapes import draw
from afa_core.metrics import ConfusionMatrix
from pipelines.errors import UsageError
from pipelines.label_set import committed_units, find_run
from pipelines.local_ray import start_ray
from pipelines.model_files import find_model
from pipelines.page import Card, render_page
from pipelines.pictures import overlay_tile, png_bytes
from pipelines.scoring import Scores, score_samples

MODEL = "afa-shapes"
PAGE_PICTURES = 48
UNLABELLED_SEED = 1_000_003  # far from the seed of the shard set
SIZE_PX = 65  # 8 n + 1: tokens are centred on pixels 0, 8, ... 64; at 64 every map would lie half a token off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa demo``."""
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--pictures", type=int, default=96, help="unlabelled pictures to label (default: 96)")
    parser.add_argument("--train-pictures", type=int, default=3000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override a value of the configuration shapes_cpu")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; prints the table and where the page is."""
    demo = Demo(arguments.output.absolute(), arguments.pictures)
    demo.prepare()
    start_ray(show_workers=False, dashboard=True)  # each stage shows its own
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    demo.stage(
        "shards", "pipelines.build_shards", "shapes", demo.path("shards"),
        "--train", arguments.train_pictures, "--val", 128, "--size-px", SIZE_PX, "--samples-per-shard", 250,
    )  # fmt: skip
    overrides = [word for override in arguments.overrides for word in ("--set", override)]
    demo.stage(
        "train", "pipelines.train", demo.path("shards"), "--config", "shapes_cpu", "--storage", demo.path("runs"),
        "--run-name", "shapes", *overrides,
    )  # fmt: skip
    demo.stage("register", "pipelines.promote", demo.run_id(), "--name", MODEL)
    demo.stage(
        "label", "pipelines.pseudo_label", "--model", f"models:/{MODEL}@champion", "--input", demo.path("pictures"),
        "--output", demo.path("labels"),
    )  # fmt: skip
    ray.shutdown()
    demo.finish()
    return 0


class Demo:
    """Folder of a demo, its clock, and what it found."""

    def __init__(self, folder: Path, pictures: int) -> None:
        self.folder, self.pictures = folder, pictures
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def path(self, *parts: str) -> Path:
        """A path inside the demo's folder."""
        return self.folder.joinpath(*parts)

    def prepare(self) -> None:
        """An empty folder with the unlabelled pictures, and their truth in another.

        Raises:
            UsageError: the folder holds something that is not a demo.
        """
        if self.folder.exists():
            if (
                any(self.folder.iterdir())
                and not self.path("summary.json").is_file()
                and not self.path("runs").is_dir()
            ):
                raise UsageError(f"{self.folder} holds something else: use another --output")
            shutil.rmtree(self.folder)
        for name in ("pictures", "truth"):
            self.path(name).mkdir(parents=True)
        for index in range(self.pictures):
            drawn = draw(UNLABELLED_SEED, index, SIZE_PX)
            Image.fromarray(drawn.image).save(self.path("pictures", f"{index:04d}.png"))
            Image.fromarray(drawn.label).save(self.path("truth", f"{index:04d}.png"))
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.path('runs', 'mlflow.db')}"
        self.path("runs").mkdir()

    def stage(self, name: str, module: str, *words: object) -> None:
        """Run one stage as a user would; its failure is the demo's."""
        command = [sys.executable, "-m", module, *map(str, words)]
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        status = subprocess.run(command, check=False).returncode
        self.seconds[name] = round(time.monotonic() - began, 1)
        if status:
            raise UsageError(f"stage {name} ended with status {status}: its own message is above")

    def run_id(self) -> str:
        """MLflow run of the training stage."""
        record: dict[str, str] = json.loads(self.path("runs", "shapes", "afa_run.json").read_text())
        return record["run_id"]

    def finish(self) -> None:
        """Score against the truth, write page and summary, print the table."""
        labelled = read_label_set(self.path("labels"))
        scores = self.score(labelled)
        self.seconds["total"] = round(time.monotonic() - self.started, 1)
        summary = {
            "pictures": self.pictures,
            "labels": len(labelled),
            "miou": scores,
            "seconds": self.seconds,
            "run_id": self.run_id(),
        }
        self.path("summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        self.path("index.html").write_text(self.page(labelled, scores))
        print("\nmIoU of the unlabelled pictures against the truth that was held back")
        for name, value in scores.items():
            print(f"  {name:16s} {value:.3f}")
        print(f"{self.seconds['total']:.0f} s; page {self.path('index.html')}, figures {self.path('summary.json')}")

    def score(self, labelled: dict[str, tuple[NDArray[np.uint8], dict[str, Any]]]) -> dict[str, float]:
        """mIoU of each stage on the same pictures, with the same (predicted) tags."""
        folder, _ = find_model(f"models:/{MODEL}@champion", None, self.path("model"))
        bundle = load_bundle(folder)
        scores, final = Scores(len(SHAPES)), ConfusionMatrix(len(SHAPES) + 1)
        samples = []
        for key, (label, facts) in labelled.items():
            truth = np.asarray(Image.open(self.path("truth", f"{key}.png")))
            image = np.asarray(Image.open(self.path("pictures", f"{key}.png")).convert("RGB"))
            samples.append(Sample(key=key, image=image, tags=tuple(facts["tags"]), seg_label=truth, source=""))
            final.update(torch.tensor(truth), torch.tensor(label))
        for _ in score_samples(bundle.model, samples, SHAPES, bundle.cam_config, bundle.par_config, scores):
            pass
        return {
            "CAM": scores.matrices["cam"].miou(),
            "refined CAM": scores.matrices["refined_cam"].miou(),
            "segmentation": scores.matrices["segmentation"].miou(),
            "final labels": final.miou(),
        }

    def page(self, labelled: dict[str, tuple[NDArray[np.uint8], dict[str, Any]]], scores: dict[str, float]) -> str:
        """The page: table, stage times, and a card for each of the first pictures."""
        cards = []
        for key, (label, facts) in list(labelled.items())[:PAGE_PICTURES]:
            image = np.asarray(Image.open(self.path("pictures", f"{key}.png")).convert("RGB"))
            truth = np.asarray(Image.open(self.path("truth", f"{key}.png")))
            tiles = {"picture": image, "label": overlay_tile(image, label), "truth": overlay_tile(image, truth)}
            pictures = {name: png_bytes(Image.fromarray(tile)) for name, tile in tiles.items()}
            caption = f"{key}: {', '.join(facts['tags']) or 'nothing found'}; disagreement {facts['disagreement']:.2f}"
            cards.append(Card(caption, pictures))
        return render_page(
            "AFA on the built-in shapes",
            "Pictures without tags, labelled by the registered model; the truth was held back. "
            "Each card: picture, label, truth.",
            {
                "mIoU against the truth": {name: f"{value:.3f}" for name, value in scores.items()},
                "Seconds": {name: f"{value:.0f}" for name, value in self.seconds.items()},
            },
            cards,
        )


def read_label_set(folder: Path) -> dict[str, tuple[NDArray[np.uint8], dict[str, Any]]]:
    """Masks and facts by key, of every unit of a label set."""
    members = {key: value for unit in committed_units(find_run(str(folder))) for key, value in unit.members().items()}
    return {key: (decode_seg_label(mask), facts) for key, (mask, facts) in sorted(members.items())}
