"""``afa calibrate``: choose the background score of a model, without masks or with a few of them.

Without masks the score is chosen by agreement (see ``afa_core.calibration``); with ``--masked`` also by mIoU, with an
interval that says how much so few masks can tell. Runs in one process: a few dozen pictures are enough.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afa_core.backbone import kernels
from afa_core.calibration import SCORES, Agreement, MaskedScores, kappa, observe
from afa_core.checkpoint import Bundle, load_bundle
from afa_core.config import LabelConfig
from afa_core.data.shards import iterate_samples
from afa_core.errors import InputError
from afa_core.labelling import label_at_scores, to_full_size, to_working_picture, working_size
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.label_inputs import Input, read_inputs
from pipelines.label_job import StageSeconds
from pipelines.label_options import add_label_options, label_config
from pipelines.label_sources import Listed, absolute_source, list_source
from pipelines.model_files import find_model
from pipelines.shard_store import load_shard_set, split_files

# Kappa below which a choice would be one of noise.
LEAST_AGREEMENT = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa calibrate``."""
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION or a bundle folder")
    parser.add_argument("--input", help="pictures without masks: what afa label takes as input")
    parser.add_argument("--masked", help="shard set (folder or s3:// prefix) whose samples have masks")
    parser.add_argument("--split", default="val", help="of the shard set (default: val)")
    parser.add_argument("--pictures", type=int, default=64, help="most pictures that are looked at (default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--tracking-uri", help="MLflow server (default: MLFLOW_TRACKING_URI, then runs/mlflow.db)")
    add_label_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Calibrate; prints a line per score and the choice."""
    if not arguments.input and not arguments.masked:
        raise UsageError("give --input (pictures without masks), --masked (a shard set with masks), or both")
    if arguments.pictures < 1:
        raise UsageError(f"--pictures {arguments.pictures}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="afa-model-") as scratch:
        folder, _ = find_model(arguments.model, arguments.tracking_uri, Path(scratch))
        bundle = load_bundle(folder, kernels.best_device())
    config = label_config(arguments, bundle)
    table: dict[float, dict[str, float]] = {score: {} for score in SCORES}
    facts: dict[str, Any] = {"scores": table}
    if arguments.input:
        facts["agreement"] = by_agreement(bundle, config, absolute_source(arguments.input), arguments.pictures, table)
    if arguments.masked:
        facts["masked"] = by_masks(bundle, config, arguments.masked, arguments.split, arguments.pictures, table)
    print_table(table)
    report(facts)
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def by_agreement(
    bundle: Bundle, config: LabelConfig, source: str, pictures: int, table: dict[float, dict[str, float]]
) -> dict[str, Any]:
    """Fill the agreement columns; the choice and how many pictures it rests on.

    Raises:
        InputError: no picture of the source can be read, or the model has nothing to say about them.
    """
    agreement = Agreement(len(bundle.classes) + 1)
    count = 0
    for item in tqdm(islice(sampled_inputs(source, bundle, config, pictures), pictures), desc="unlabelled"):
        assert item.picture is not None
        observe(bundle, item.picture, item.tags, config, agreement)
        count += 1
    if not count:
        raise InputError(f"{source} holds no picture that can be read")
    for score in SCORES:
        table[score] |= {"heads": kappa(agreement.heads[score]), "views": kappa(agreement.views[score])}
        table[score]["agreement"] = agreement.criterion(score)
    if agreement.criterion(agreement.choice()) < LEAST_AGREEMENT:
        raise InputError(
            f"at no score do the labels of {source} agree much better than chance: the model finds no class in these"
            " pictures; give tags (a table or shards), or train it further"
        )
    return {"background_score": agreement.choice(), "pictures": count}


def sampled_inputs(source: str, bundle: Bundle, config: LabelConfig, count: int) -> Iterator[Input]:
    """Readable pictures of a source, drawn by the hash of their names: the same ones tomorrow, from all over it."""
    listed = (item for item in list_source(source) if item is not None)
    drawn = heapq.nsmallest(2 * count, listed, key=_draw)
    for item in read_inputs(drawn, bundle.classes, config, StageSeconds()):
        if item.picture is not None:
            yield item


def _draw(item: Listed) -> bytes:
    return hashlib.sha256(item.uri.encode("utf-8", "surrogateescape")).digest()


def by_masks(
    bundle: Bundle, config: LabelConfig, dataset: str, split: str, pictures: int, table: dict[float, dict[str, float]]
) -> dict[str, Any]:
    """Fill the mIoU column; the best score and its interval.

    Raises:
        InputError: the shard set is of other classes, or has no masks.
    """
    index = load_shard_set(dataset)
    if index.classes != bundle.classes:
        raise InputError(f"{dataset} has the classes {', '.join(index.classes)}, the model {', '.join(bundle.classes)}")
    paths = split_files(dataset, index, split).paths()
    needed_size = partial(working_size, max_side_px=config.max_side_px)
    samples = iterate_samples(paths, index.classes, with_seg=True, needed_size=needed_size)
    masked = (sample for sample in samples if sample.seg_label is not None)
    scores, count = MaskedScores(len(bundle.classes) + 1), 0
    for sample in tqdm(islice(masked, pictures), desc="masked"):
        assert sample.seg_label is not None
        picture = to_working_picture(sample.image, config.max_side_px, sample.full_size)
        labels, _ = label_at_scores(bundle, picture, sample.tags, config, SCORES)
        for score, label in zip(SCORES, labels, strict=True):
            scores.count(score, to_full_size(label, picture.full_size), sample.seg_label)
        count += 1
    if not count:
        raise InputError(f"split {split!r} of {dataset} has no picture with a mask (.seg.png)")
    for score in SCORES:
        table[score]["miou"] = scores.miou(score)
    low, high = scores.interval()
    return {"background_score": scores.choice(), "interval_95": [low, high], "pictures": count}


def print_table(table: dict[float, dict[str, float]]) -> None:
    """A line a score."""
    columns = list(table[SCORES[0]])
    print("  ".join(["score", *(f"{name:>9s}" for name in columns)]))
    for score, values in table.items():
        print("  ".join([f"{score:5.2f}", *(f"{values[name]:9.3f}" for name in columns)]))


def report(facts: dict[str, Any]) -> None:
    """The choice, and how to use it."""
    if "agreement" in facts:
        found = facts["agreement"]
        print(
            f"by agreement, {found['pictures']} pictures without masks: --background-score {found['background_score']}"
        )
    if "masked" in facts:
        found = facts["masked"]
        low, high = found["interval_95"]
        print(
            f"by mIoU ({found['pictures']} masked pictures): --background-score {found['background_score']}"
            f" (95 % interval {low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
