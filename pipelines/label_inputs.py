"""The inputs of a work unit: decoded one by one, or the reason why not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from afa_core.config import LabelConfig
from afa_core.data.sample import BadSample, decode_sample
from afa_core.labelling import WorkingPicture, to_working_picture, working_size
from infra.errors import ServiceError
from pipelines.label_job import StageSeconds
from pipelines.label_sources import Listed, storable
from pipelines.raw_inputs import RawInput, raw_inputs

# So many unanswered objects in a row are no longer the objects' fault.
OUTAGE = 16


@dataclass(frozen=True)
class Input:
    """One input of a unit: decoded, or the reason why not.

    Attributes:
        key: of the label; below the shard's key for a sample of a shard.
        parent: key of the inventory row it comes from.
        uri: where it is.
        etag: of what was read.
        picture: decoded, at its working size; None if it could not be.
        tags: given ones; None where there are none.
        reason: stable code, if so.
        detail: what exactly.
        size: height and width of the decoded picture in display orientation, whatever is made of it later.
    """

    key: str
    parent: str
    uri: str
    etag: str
    picture: WorkingPicture | None
    tags: tuple[str, ...] | None = None
    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)


def read_inputs(
    rows: list[Listed], classes: tuple[str, ...], config: LabelConfig, seconds: StageSeconds
) -> Iterator[Input]:
    """Every input of some inventory rows, decoded one by one; bad ones come with their reason.

    Raises:
        ServiceError: the store cannot be read at all.
    """
    inputs = raw_inputs(rows, int(config.max_file_mb * 1e6))
    unanswered = 0
    while True:
        started = time.monotonic()
        raw = next(inputs, None)
        seconds.read += time.monotonic() - started
        if raw is None:
            return
        reason = raw.members.reason if isinstance(raw.members, BadSample) else ""
        unanswered = unanswered + 1 if reason == "unavailable" else 0
        if unanswered == OUTAGE:
            raise ServiceError(f"the store of {raw.uri} does not answer: run the same command when it is back")
        started = time.monotonic()
        decoded = _decoded(raw, classes, config)
        seconds.decode += time.monotonic() - started
        yield decoded


def _decoded(raw: RawInput, classes: tuple[str, ...], config: LabelConfig) -> Input:
    try:
        if isinstance(raw.members, BadSample):
            raise raw.members
        needed_size = partial(working_size, max_side_px=config.max_side_px)
        sample = decode_sample(raw.members, classes, config.max_megapixels, needed_size=needed_size)
        if config.tags == "given" and sample.tags is None:
            raise BadSample("no_tags", "and --tags given")
    except BadSample as bad:
        return Input(raw.key, raw.parent, raw.uri, raw.etag, None, None, bad.reason, bad.detail)
    tags = None if sample.tags is None else tuple(map(storable, sample.tags))
    picture = to_working_picture(sample.image, config.max_side_px, sample.full_size)
    return Input(raw.key, raw.parent, raw.uri, raw.etag, picture, tags, size=sample.full_size)
