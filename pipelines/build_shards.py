"""``afa shards voc|folder|shapes``: pack tagged pictures into a shard set, as a Ray Data job.

The driver plans (which picture goes into which shard), every task writes one tar, the driver writes ``dataset.json``
last. The same input gives the same bytes. What cannot be packed is left out, counted and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image

from afa_core.classes import BACKGROUND, BUILT_IN, IGNORE_INDEX, SHAPES, check_classes, load_classes
from afa_core.data.sample import BadSample, check_key, decode_image, decode_seg_label, encode_mask, encode_sample
from afa_core.data.shapes import draw
from afa_core.data.shards import (
    INDEX,
    DatasetIndex,
    ShardEntry,
    ShardWriter,
    SplitIndex,
    load_dataset_index,
    save_dataset_index,
)
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.local_ray import start_ray
from pipelines.progress import Progress
from pipelines.shard_sources import (
    PictureRef,
    annotation_tags,
    folder_pictures,
    mask_tags,
    shapes_pictures,
    voc_pictures,
)

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


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that could not be used: a reason code, the key, the detail."""

    reason: str
    key: str
    detail: str


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One tar to write."""

    name: str
    split: str
    output: str
    classes: tuple[str, ...]
    max_megapixels: float
    pictures: tuple[PictureRef, ...]


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What became of a plan."""

    entry: ShardEntry
    class_images: dict[str, int]
    problems: list[Problem]


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


def prepare_output(output: Path, *, overwrite: bool) -> None:
    """An empty folder.

    Raises:
        UsageError: there is something in it that may not be removed.
    """
    if output.exists() and any(output.iterdir()):
        if not (output / INDEX).is_file():
            raise UsageError(f"{output} is not empty and no shard set: use another OUT")
        if not overwrite:
            raise UsageError(f"{output} holds a shard set already: use --overwrite or another OUT")
        earlier = load_dataset_index(output)
        for split in earlier.splits.values():
            for shard in split.shards:
                (output / shard.name).unlink(missing_ok=True)
        (output / INDEX).unlink()
    output.mkdir(parents=True, exist_ok=True)


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
    shared = ray.put(list(plans))
    rows = [{"index": index} for index in range(len(plans))]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(partial(_write_row, shared=shared))
    for row in results.iter_rows():
        values = json.loads(row["result"])
        problems = [Problem(**problem) for problem in values["problems"]]
        yield plans[row["index"]], ShardResult(ShardEntry(**values["entry"]), values["class_images"], problems)


def _write_row(row: dict[str, Any], shared: Any) -> dict[str, Any]:
    result = write_shard(ray.get(shared)[row["index"]])
    return {"index": row["index"], "result": json.dumps(dataclasses.asdict(result))}


def write_shard(plan: ShardPlan) -> ShardResult:
    """Write one tar."""
    writer = ShardWriter(Path(plan.output) / plan.name)
    problems: list[Problem] = []
    for picture in plan.pictures:
        try:
            members, tags = pack(picture, plan.classes, plan.max_megapixels)
        except BadSample as bad:
            problems.append(Problem(bad.reason, picture.key, bad.detail))
            continue
        unknown = [tag for tag in tags if tag not in plan.classes]
        problems += [Problem("unknown_tag", picture.key, tag) for tag in unknown]
        writer.write(members, [tag for tag in tags if tag in plan.classes])
    return ShardResult(writer.close(), writer.class_images, problems)


def pack(
    picture: PictureRef, classes: tuple[str, ...], max_megapixels: float
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Members of a sample and its tags, known to the class list or not.

    Raises:
        BadSample: with its reason.
    """
    check_key(picture.key)
    if not picture.mask_classes:
        return _pack_drawn(picture)
    data, extension = _read_picture(picture), Path(picture.path).suffix.lower().lstrip(".")
    height, width = decode_image(data, max_megapixels).shape[:2]
    mask = Path(picture.mask).read_bytes() if picture.mask else None
    if picture.tags is not None:
        tags = picture.tags
    elif picture.annotation:
        tags = annotation_tags(picture.annotation)
    elif mask is not None:
        tags = mask_tags(mask, picture.mask_classes)
    else:
        raise BadSample("no_tags", "neither an annotation nor a mask")
    facts = {
        "tags": [tag for tag in tags if tag in classes],
        "width": width,
        "height": height,
        "source": Path(picture.path).name,
    }
    seg = encode_mask(_to_class_list(decode_seg_label(mask), picture.mask_classes, classes)) if mask else None
    return encode_sample(picture.key, data, extension, facts, seg), tags


def _read_picture(picture: PictureRef) -> bytes:
    if ".." in Path(picture.path).parts:
        raise BadSample("bad_path", picture.path)
    try:
        return Path(picture.path).read_bytes()
    except FileNotFoundError as error:
        raise BadSample("missing_file", picture.path) from error
    except OSError as error:
        raise BadSample("unreadable", f"{picture.path}: {error.strerror}") from error


def _to_class_list(
    label: np.ndarray[Any, np.dtype[np.uint8]], mask_classes: Sequence[str], classes: Sequence[str]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A mask in the numbers of the class list. Objects of other classes are no background: they become ignored."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[BACKGROUND] = BACKGROUND
    for value, name in enumerate(mask_classes, start=1):
        if name in classes:
            table[value] = classes.index(name) + 1
    return table[label]


def _pack_drawn(picture: PictureRef) -> tuple[dict[str, Any], tuple[str, ...]]:
    seed, index, size_px = map(int, picture.path.split("/"))
    drawn = draw(seed, index, size_px)
    buffer = io.BytesIO()
    Image.fromarray(drawn.image).save(buffer, "PNG")
    facts = {"tags": list(drawn.tags), "width": size_px, "height": size_px, "source": f"shapes:{seed}/{index}"}
    return encode_sample(picture.key, buffer.getvalue(), "png", facts, encode_mask(drawn.label)), drawn.tags


def to_index(shards: Sequence[tuple[ShardPlan, ShardResult]], classes: tuple[str, ...]) -> DatasetIndex:
    """Index of the shards that hold anything."""
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
