"""``afa shards voc|folder|shapes``: pack tagged pictures into a shard set, as a Ray Data job.

The driver plans (which picture goes into which shard), every task writes one tar, the driver writes ``dataset.json``
last. The same input gives the same bytes. What cannot be packed is left out, counted and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data

from afa_core.classes import BUILT_IN, SHAPES, check_classes, load_classes
from afa_core.data.shards import INDEX, DatasetIndex, ShardEntry, SplitIndex, save_dataset_index
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.local_ray import start_ray
from pipelines.progress import Progress
from pipelines.shard_folder import prepare_output
from pipelines.shard_packing import Problem, ShardPlan, ShardResult, write_shard
from pipelines.shard_sources import PictureRef, folder_pictures, shapes_pictures, voc_pictures

RARE_SHARE = 0.01
LISTED_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands and options of ``afa shards``."""
    sources = parser.add_subparsers(dest="source", required=True)
    voc = sources.add_parser("voc", help="PASCAL VOC's layout")
    voc.add_argument("root", type=Path, help="folder with JPEGImages and ImageSets")
    voc.add_argument("--train-list", default="train_aug", help="list in ImageSets (default: train_aug)")
    voc.add_argument("--val-list", default="val", help="list in ImageSets (default: val)")
    folder = sources.add_parser("folder", help="your own pictures")
    folder.add_argument("root", type=Path, help="folder of pictures; without --labels in class-named sub-folders")
    folder.add_argument("--labels", type=Path, help="table of paths and tags: .csv, .jsonl or .parquet")
    folder.add_argument("--path-column", default="path", help="paths relative to the folder (default: path)")
    folder.add_argument("--tags-column", default="tags", help="list, or separated by , ; or | (default: tags)")
    folder.add_argument("--masks", type=Path, help="folder of masks with the pictures' names, for evaluation")
    folder.add_argument("--val-share", type=float, default=0.1, help="share of the validation split (default: 0.1)")
    shapes = sources.add_parser("shapes", help="the built-in data")
    shapes.add_argument("--train", type=int, default=2000, help="pictures (default: 2000)")
    shapes.add_argument("--val", type=int, default=200, help="pictures (default: 200)")
    shapes.add_argument("--seed", type=int, default=0)
    shapes.add_argument("--size-px", type=int, default=96, help="side of a picture (default: 96)")
    for source in (voc, folder, shapes):
        source.add_argument("output", type=Path, metavar="OUT", help="folder of the shard set")
        source.add_argument("--samples-per-shard", type=int, default=500, help="(default: 500)")
        source.add_argument("--strict", action="store_true", help="anything that cannot be packed is an error")
        source.add_argument("--overwrite", action="store_true", help="replace the shard set that is there")
        source.add_argument("--max-megapixels", type=float, default=100.0, help="larger pictures are left out")
        if source is not shapes:
            source.add_argument(
                "--classes", help=f"{', '.join(BUILT_IN)}, a file with a class a line, or names with commas"
            )


def run(arguments: argparse.Namespace) -> int:
    """Pack; prints counts per class and what was left out."""
    if arguments.samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard {arguments.samples_per_shard}: must be at least 1")
    pictures, classes = plan_pictures(arguments)
    output = arguments.output.absolute()
    prepare_output(output, overwrite=arguments.overwrite)
    unique, problems = without_duplicates(pictures)
    plans = list(plan_shards(unique, arguments.samples_per_shard, classes, output, arguments.max_megapixels))
    start_ray()
    shards: list[tuple[ShardPlan, ShardResult]] = []
    progress = Progress("shard", len(plans))
    for plan, result in write_shards(plans):
        shards.append((plan, result))
        problems += result.problems
        progress.count(result.entry.samples)
        print(progress.line(), flush=True)
    shards.sort(key=lambda pair: pair[0].name)
    index = to_index(shards, classes)
    print(summary(index, problems, output))
    if arguments.strict and problems:
        raise UsageError(f"--strict: {len(problems)} problems (listed above), {INDEX} was not written")
    save_dataset_index(output, index)
    return 0


def plan_pictures(arguments: argparse.Namespace) -> tuple[list[PictureRef], tuple[str, ...]]:
    """References to all pictures, and the class list.

    Raises:
        InputError, UsageError: the source is not there or an option is wrong.
    """
    if arguments.source == "shapes":
        if min(arguments.train, arguments.val) < 0 or not arguments.train + arguments.val:
            raise UsageError("--train and --val: give how many pictures to draw")
        if arguments.size_px < 32:
            raise UsageError(f"--size-px {arguments.size_px}: must be at least 32")
        return shapes_pictures(arguments.train, arguments.val, arguments.seed, arguments.size_px), SHAPES
    if arguments.source == "voc":
        lists = {"train": arguments.train_list, "val": arguments.val_list}
        return voc_pictures(arguments.root.absolute(), lists), parse_classes(arguments.classes or "voc")
    if not 0 <= arguments.val_share < 1:
        raise UsageError(f"--val-share {arguments.val_share}: must lie between 0 and 1")
    pictures = folder_pictures(
        arguments.root.absolute(),
        arguments.labels,
        path_column=arguments.path_column,
        tags_column=arguments.tags_column,
        val_share=arguments.val_share,
        masks=arguments.masks.absolute() if arguments.masks else None,
    )
    found = sorted({tag for picture in pictures for tag in picture.tags or ()})
    classes = parse_classes(arguments.classes) if arguments.classes else check_classes(found)
    return [dataclasses.replace(picture, mask_classes=classes) for picture in pictures], classes


def parse_classes(text: str) -> tuple[str, ...]:
    """Class list by name, file, or names with commas."""
    return check_classes(name.strip() for name in text.split(",")) if "," in text else load_classes(text)


def without_duplicates(pictures: Sequence[PictureRef]) -> tuple[list[PictureRef], list[Problem]]:
    """The first picture of every key, and a problem for each of the others."""
    taken: dict[str, str] = {}
    unique, problems = [], []
    for picture in pictures:
        if picture.key in taken:
            problems.append(Problem("duplicate_key", picture.key, f"{picture.path} beside {taken[picture.key]}"))
            continue
        taken[picture.key] = picture.path
        unique.append(picture)
    return unique, problems


def plan_shards(
    pictures: Sequence[PictureRef],
    samples_per_shard: int,
    classes: tuple[str, ...],
    output: Path,
    max_megapixels: float,
) -> Iterator[ShardPlan]:
    """Tars of each split, filled in the order of the source."""
    for split in dict.fromkeys(picture.split for picture in pictures):
        own = [picture for picture in pictures if picture.split == split]
        for start in range(0, len(own), samples_per_shard):
            yield ShardPlan(
                name=f"{split}-{start // samples_per_shard:06d}.tar",
                split=split,
                output=str(output),
                classes=classes,
                max_megapixels=max_megapixels,
                pictures=tuple(own[start : start + samples_per_shard]),
            )


def write_shards(plans: Sequence[ShardPlan]) -> Iterator[tuple[ShardPlan, ShardResult]]:
    """Write all tars on Ray, yielding each with its result as it is done."""
    shared = [ray.put(plan) for plan in plans]
    rows = [{"index": index} for index in range(len(plans))]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(partial(_write_row, shared=shared))
    for row in results.iter_rows():
        values = json.loads(row["result"])
        problems = [Problem(**problem) for problem in values["problems"]]
        yield plans[row["index"]], ShardResult(ShardEntry(**values["entry"]), values["class_images"], problems)


def _write_row(row: dict[str, Any], shared: list[ray.ObjectRef[ShardPlan]]) -> dict[str, Any]:
    result = write_shard(ray.get(shared[row["index"]]))
    return {"index": row["index"], "result": json.dumps(dataclasses.asdict(result))}


def to_index(shards: Sequence[tuple[ShardPlan, ShardResult]], classes: tuple[str, ...]) -> DatasetIndex:
    """Index of all shards."""
    splits: dict[str, SplitIndex] = {}
    for split in dict.fromkeys(plan.split for plan, _ in shards):
        results = [result for plan, result in shards if plan.split == split]
        counts = sum((Counter(result.class_images) for result in results), Counter[str]())
        splits[split] = SplitIndex(tuple(result.entry for result in results), {name: counts[name] for name in classes})
    return DatasetIndex(classes, splits)


def summary(index: DatasetIndex, problems: Sequence[Problem], output: Path) -> str:
    """Counts per class and split, warnings, and what was left out."""
    lines = ["", f"{'class':20s} " + " ".join(f"{split:>9s}" for split in index.splits)]
    for name in index.classes:
        counts = [split.class_images[name] for split in index.splits.values()]
        lines.append(f"{name:20s} " + " ".join(f"{count:9d}" for count in counts))
    lines.append(f"{'pictures':20s} " + " ".join(f"{split.samples:9d}" for split in index.splits.values()))
    for split_name, split in index.splits.items():
        for name, count in split.class_images.items():
            if not count:
                lines.append(f"warning: no picture of {split_name} has the class {name}")
            elif count < RARE_SHARE * split.samples:
                lines.append(f"warning: only {count} of {split.samples} pictures of {split_name} have the class {name}")
    for reason, count in sorted(Counter(problem.reason for problem in problems).items()):
        lines.append(f"{reason}: {count}")
        named = [problem for problem in problems if problem.reason == reason][:LISTED_PROBLEMS]
        lines += [f"    {problem.key}: {problem.detail}" for problem in named]
        lines += [f"    ... and {count - len(named)} more"] if count > len(named) else []
    return "\n".join([*lines, f"shard set {output}"])


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
