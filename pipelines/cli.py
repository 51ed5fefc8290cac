"""The ``afa`` command, and what every stage's own entry point shares.

    afa STAGE ...              the same as  python -m pipelines.STAGE ...

Exit status: 0 done, 1 failed, 2 a mistake of the user (one line on standard error), 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

AddArguments = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int]

# Stage -> module, prefix of its two functions there, what it does. Modules are imported when their stage runs.
STAGES: dict[str, tuple[str, str, str]] = {
    "shards": ("pipelines.build_shards", "", "pack tagged pictures into a shard set"),
    "train": ("pipelines.train", "", "train on a shard set"),
    "evaluate": ("pipelines.evaluate", "", "score a model on shards with masks"),
    "register": ("pipelines.promote", "register", "make a run's best checkpoint a version in the registry"),
    "models": ("pipelines.promote", "models", "list registered models, aliases and scores"),
    "label": ("pipelines.pseudo_label", "", "write masks for a store of pictures or shards"),
    "calibrate": ("pipelines.calibrate", "", "choose the background score, without masks or with a few"),
    "verify-labels": ("pipelines.verify_labels", "", "prove that a label set lost nothing and has nothing twice"),
    "report": ("pipelines.report", "", "one page about a label set: totals, charts, a gallery, decisions"),
    "review": ("pipelines.review", "", "bring accept / reject / fix decisions back into a shard set"),
    "export": (
        "pipelines.export",
        "",
        "hand a label set to other tools: COCO, VOC, Label Studio, CVAT, FiftyOne, shards",
    ),
    "bench": ("pipelines.bench", "", "measure the step, its parts, the labelling job and the loader on this machine"),
    "demo": ("pipelines.demo", "", "the whole job on built-in data, in a few minutes"),
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with the options in one line, and where the right ones stand; so do its sub-parsers."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        said = message.removeprefix("argument ").replace("\n", " ")
        self.exit(2, f"error: {said}; {self.prog} --help tells more\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``afa``."""
    parser = OneLineParser(
        prog="afa", description="Image-level tags to segmentation masks.", epilog="afa STAGE --help tells more."
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    words = list(sys.argv[1:] if argv is None else argv)
    for name, (module_name, prefix, summary) in STAGES.items():
        stage = stages.add_parser(name, help=summary, description=summary)
        if name in words[:1]:  # only the stage that runs pays for its imports
            module = importlib.import_module(module_name)
            getattr(module, f"add_{prefix}_arguments" if prefix else "add_arguments")(stage)
            stage.set_defaults(run_stage=getattr(module, f"run_{prefix}" if prefix else "run"))
    arguments = parser.parse_args(words)
    return guarded(arguments.run_stage, arguments)


def stage_main(add_arguments: AddArguments, run: Run, argv: Sequence[str] | None = None) -> int:
    """Run one stage by itself, ``python -m pipelines.STAGE``."""
    parser = OneLineParser()
    add_arguments(parser)
    return guarded(run, parser.parse_args(argv))


def guarded(run: Run, arguments: argparse.Namespace) -> int:
    """Run a stage; a mistake of the user becomes one line and status 2."""
    from afa_core.errors import InputError
    from infra.errors import ServiceError
    from pipelines.errors import Terminated, UsageError, heed_sigterm

    heed_sigterm()
    try:
        return run(arguments)
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: a thread that waits for Ray holds Python's own exit up, or finds Ray gone and ends the process with
        # another status. Ray's processes end with their driver.
        os._exit(143 if isinstance(interrupt, Terminated) else 130)
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, InputError | ServiceError | UsageError):
                print(f"error: {cause}", file=sys.stderr)
                return 2
        raise


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; Ray wraps what a worker raised in errors of its own."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, getattr(current, "cause", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())


if __name__ == "__main__":
    sys.exit(main())
