"""The folder that a shard set is written into."""

from __future__ import annotations

import re
from pathlib import Path

from afa_core.data.shards import INDEX
from pipelines.errors import UsageError

OWN_FILE = re.compile(r"(dataset\.json|[a-z]+-\d{6}\.tar|.*\.partial)")  # also what a killed job left


def prepare_output(output: Path, *, overwrite: bool) -> None:
    """An empty folder.

    Raises:
        UsageError: there is something in it that may not be removed.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: name a folder")
    output.mkdir(parents=True, exist_ok=True)
    names = [path.name for path in output.iterdir()]
    foreign = [name for name in names if not OWN_FILE.fullmatch(name)]
    if foreign:
        raise UsageError(f"{output} holds something else ({sorted(foreign)[0]}): use another OUT")
    if names and not overwrite:
        state = "a shard set already" if INDEX in names else "an unfinished shard set"
        raise UsageError(f"{output} holds {state}: use --overwrite or another OUT")
    for name in sorted(names):  # the index first: without it the rest is no shard set
        (output / name).unlink()
