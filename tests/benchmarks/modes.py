"""What the modes of labelling are worth on the demo's pictures.

``PYTHONPATH=tests python tests/benchmarks/modes.py demo``, after ``make demo``: its model labels its pictures, without
tags, in every mode. A line of JSON for each: mIoU against the truth that was held back, pixels ignored, and the rank
correlation of a label's uncertainty, which the review queue sorts by, with its share of wrong pixels.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import afa
from PIL import Image
from scipy.stats import spearmanr

from afa_core.classes import IGNORE_INDEX, SHAPES
from afa_core.metrics import ConfusionMatrix
from pipelines.demo import MODEL, read_label_set

MODES: list[list[object]] = [
    [],
    ["--background-score", 0.25],
    ["--refine", "none"],
    ["--refine", "par"],
    ["--refine", "affinity"],
    ["--crf"],
    ["--profile", "fast"],
    ["--profile", "best"],
    ["--head", "segmentation"],
    ["--head", "agreement"],
]


def scores(labels: Path, truth: Path) -> dict[str, Any]:
    """Of a label set."""
    matrix = ConfusionMatrix(len(SHAPES) + 1)
    uncertainty, wrong, ignored = [], [], []
    for key, (label, facts) in read_label_set(labels).items():
        true = np.asarray(Image.open(truth / f"{key}.png"))
        matrix.update(torch.tensor(true), torch.tensor(label))
        decided = label != IGNORE_INDEX
        uncertainty.append(facts["uncertainty"])
        wrong.append(float(np.mean((label != true)[decided])) if decided.any() else 1.0)
        ignored.append(float(np.mean(~decided)))
    rank = spearmanr(uncertainty, wrong).statistic
    return {
        "miou": round(matrix.miou(), 3),
        "ignored": round(float(np.mean(ignored)), 3),
        "rank": round(float(rank), 2),
    }


def main(demo: Path) -> None:
    """Label the demo's pictures in every mode."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{demo.absolute()}/runs/mlflow.db"
    for mode in MODES:
        with tempfile.TemporaryDirectory() as scratch:
            words = ["--model", f"models:/{MODEL}@champion", "--input", demo / "pictures", "--output", scratch]
            afa("label", *words, *mode)
            found = scores(Path(scratch), demo / "truth")
        print(json.dumps({"mode": " ".join(map(str, mode)) or "default", **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
