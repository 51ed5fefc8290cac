"""``afa evaluate``: score a model on a split with masks, every stage of the label side by side."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from pipelines.cli import stage_main
from pipelines.model_files import find_model
from pipelines.scoring import score_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa evaluate``."""
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION or a bundle's folder or s3:// prefix")
    parser.add_argument("dataset", help="shard set (folder or s3:// prefix) whose samples have masks")
    parser.add_argument("--split", default="val")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")


def run(arguments: argparse.Namespace) -> int:
    """Score; prints a line per score."""
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        folder, _ = find_model(arguments.model, arguments.tracking_uri, Path(scratch))
        scores = score_bundle(folder, arguments.dataset, arguments.split)
    for name, value in scores.items():
        print(f"{name:28s} {value:.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
