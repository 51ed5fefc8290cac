"""The registered model as an MLflow pyfunc: pictures in, masks out.

``mlflow.pyfunc.load_model("models:/NAME@champion")`` imports this module and hands it the model's data folder, a
bundle (see ``afa_core.checkpoint``). No Ray here. Input columns: ``image`` (encoded picture) and optionally ``tags``
(JSON list of class names; missing or empty: predict them). Output columns: ``mask`` (indexed PNG), ``tags`` (JSON
list), ``tags_source`` (given | predicted) and ``ignored_share`` (0..1).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from afa_core.checkpoint import Bundle, load_bundle
from afa_core.config import LabelConfig
from afa_core.data.sample import decode_picture, encode_mask
from afa_core.errors import InputError
from afa_core.labelling import WorkingPicture, label_working_pictures, to_working_picture, working_size

LOADER_MODULE = "pipelines.pyfunc"


def model_signature() -> ModelSignature:
    """Columns that go in and come out."""
    return ModelSignature(
        inputs=Schema([ColSpec("binary", "image"), ColSpec("string", "tags", required=False)]),
        outputs=Schema(
            [
                ColSpec("binary", "mask"),
                ColSpec("string", "tags"),
                ColSpec("string", "tags_source"),
                ColSpec("double", "ignored_share"),
            ]
        ),
    )


class AfaPyfunc:
    """What ``mlflow.pyfunc.load_model`` wraps."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Label the pictures of the table, row by row.

        Raises:
            BadSample: a picture cannot be decoded.
            InputError: tags are not a JSON list of strings.
        """
        config = self.bundle.label_config
        pictures = [_working_picture(bytes(data), config) for data in model_input["image"]]
        given = model_input["tags"] if "tags" in model_input else [None] * len(pictures)
        labels = label_working_pictures(self.bundle, pictures, [_tags(value) for value in given], config)
        return pd.DataFrame(
            {
                "mask": [encode_mask(label.label) for label in labels],
                "tags": [json.dumps(label.tags) for label in labels],
                "tags_source": ["given" if label.tags_given else "predicted" for label in labels],
                "ignored_share": [label.ignored_share for label in labels],
            }
        )


def _working_picture(data: bytes, config: LabelConfig) -> WorkingPicture:
    needed_size = partial(working_size, max_side_px=config.max_side_px)
    picture = decode_picture(data, config.max_megapixels, needed_size)
    return to_working_picture(picture.pixels, config.max_side_px, picture.full_size)


def _tags(value: Any) -> list[str] | None:
    if not isinstance(value, str) or not value:
        return None
    try:
        tags = json.loads(value)
    except ValueError:
        tags = None
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise InputError(f'tags {value[:80]!r} must be a JSON list of class names, e.g. ["dog", "person"]')
    return tags


def _load_pyfunc(path: str) -> AfaPyfunc:
    """Entry point for MLflow."""
    return AfaPyfunc(load_bundle(path))
