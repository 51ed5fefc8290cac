"""What is written for others: bundles without pickles, pages without foreign markup, logs without passwords."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afa_core.bundle import bundle_digest
from afa_core.checkpoint import load_bundle, save_bundle
from afa_core.classes import SHAPES
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.errors import InputError
from afa_core.model import build_model
from infra.errors import ServiceError
from infra.tracking import safe_uri, tracking_uri
from pipelines.page import Card, render_page
from pipelines.progress import Progress

MODEL = ModelConfig(backbone="mit_tiny", decoder_channels=16)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_model(MODEL, len(SHAPES))
    save_bundle(tmp_path / "b", model, SHAPES, MODEL, CamConfig(background_score=0.3), ParConfig(), LabelConfig())
    return tmp_path / "b"


def test_a_bundle_comes_back_as_it_was_and_holds_no_pickle(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    torch.manual_seed(0)
    expected = build_model(MODEL, len(SHAPES)).state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.cam_config == CamConfig(background_score=0.3)
    assert loaded.classes == SHAPES
    assert not loaded.model.training
    assert sorted(path.name for path in bundle.iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.digest == bundle_digest(bundle)


@pytest.mark.parametrize("damage", ["cut", "classes", "json", "key", "gone"])
def test_a_damaged_bundle_is_one_line(bundle: Path, damage: str) -> None:
    weights, config = bundle / "model.safetensors", bundle / "config.json"
    values = json.loads(config.read_text())
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "classes":
            config.write_text(json.dumps({**values, "classes": ["one"]}))
        case "json":
            config.write_text("{")
        case "key":
            config.write_text(json.dumps({**values, "model": {**values["model"], "surprise": 1}}))
        case "gone":
            weights.unlink()
    with pytest.raises(InputError) as caught:
        load_bundle(bundle)
    assert str(bundle) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_page_escapes_what_it_is_told() -> None:
    hostile = "<script>alert('x')</script>\" onload=\"y"
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    page = render_page(hostile, hostile, {hostile: {hostile: hostile}}, [Card(hostile, {hostile: buffer.getvalue()})])
    assert "<script" not in page
    assert '" onload="' not in page
    assert "http" not in page  # nothing is fetched


@given(st.text(st.characters(exclude_characters="/ \t\n\r\v\f\x1c\x1d\x1e\x1f\x85", exclude_categories=["Z", "C"])))
def test_a_uri_shows_no_password(password: str) -> None:
    shown = safe_uri(f"postgresql://user:{password}@db.example/mlflow")
    assert shown == "postgresql://db.example/mlflow"


def test_a_tracking_folder_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="use sqlite:///FILE"):
        tracking_uri(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(None) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_progress_line_counts_up_and_survives_having_nothing_to_say() -> None:
    progress = Progress("unit", 4, done=1)
    assert progress.line() == "unit 1/4  0.0 images/s  ETA 0:00"
    progress.count(10)
    assert progress.line("phase", {"loss": 0.5}).startswith("unit 2/4  phase  loss 0.5  ")
