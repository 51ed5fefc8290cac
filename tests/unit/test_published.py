"""Import of published checkpoints: names, wrappers, strictness, and files that are not weights."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from afa_core.config import ModelConfig
from afa_core.errors import InputError
from afa_core.model import AFANet, build_model
from afa_core.published import import_published

State = dict[str, torch.Tensor]


def model() -> AFANet:
    return AFANet(ModelConfig(backbone="mit_b0"), 20)


def test_with_and_without_the_wrappers_prefix(published: State, tmp_path: Path) -> None:
    plain, wrapped = model(), model()
    import_published(plain, published)
    torch.save({f"module.{name}": value for name, value in published.items()}, tmp_path / "afa.pth")
    import_published(wrapped, tmp_path / "afa.pth")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, wrapped.state_dict()[name]), name
    assert torch.equal(plain.classifier.weight, published["classifier.weight"])
    assert torch.equal(plain.affinity_head.head_weight, published["attn_proj.weight"].flatten())


def test_segformer_checkpoint_fills_the_backbone_only(published: State, tmp_path: Path) -> None:
    names = {key.removeprefix("encoder."): value for key, value in published.items() if key.startswith("encoder.")}
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save(names | head, tmp_path / "mit_b0.pth")
    torch.manual_seed(0)
    filled = build_model(ModelConfig(backbone="mit_b0", pretrained=str(tmp_path / "mit_b0.pth")), 7)
    first = filled.state_dict()["backbone.stages.0.merging.projection.weight"]
    assert torch.equal(first, names["patch_embed1.proj.weight"])
    torch.manual_seed(0)
    scratch = build_model(ModelConfig(backbone="mit_b0"), 7)
    assert torch.equal(filled.decoder.fusion.weight, scratch.decoder.fusion.weight)


@pytest.mark.parametrize("leave_out", ["classifier.weight", "encoder.block3.1.attn.kv.bias"])
def test_a_missing_name_is_named(published: State, leave_out: str) -> None:
    with pytest.raises(InputError, match="missing"):
        import_published(model(), {name: value for name, value in published.items() if name != leave_out})


def test_an_unexpected_name_is_named(published: State) -> None:
    with pytest.raises(InputError, match=r"unexpected encoder\.block9"):
        import_published(model(), published | {"encoder.block9.0.norm1.weight": torch.zeros(1)})


def test_another_number_of_classes_is_named(published: State) -> None:
    with pytest.raises(InputError, match=r"has shape"):
        import_published(AFANet(ModelConfig(backbone="mit_b0"), 6), published)


def test_another_architecture_is_named(published: State) -> None:
    with pytest.raises(InputError, match=r"model\.backbone|has shape"):
        import_published(AFANet(ModelConfig(backbone="mit_b2"), 20), published)


class _Payload:
    """A pickle that would run a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"classifier.weight": _Payload(tmp_path / "pwned")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a checkpoint of plain tensors"):
        import_published(model(), tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Payload(tmp_path / "pwned")))
    with pytest.raises(InputError):
        import_published(model(), tmp_path / "evil.pkl")
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint at"):
        import_published(model(), tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(InputError):
        import_published(model(), tmp_path / "text.pth")
