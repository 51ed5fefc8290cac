"""Packed maps: what goes in comes out, and channels are numbered as classes are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afa_core.packing import Packing, strongest


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 999))
def test_packing_keeps_the_labelled_maps_and_drops_the_others(batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cls_label = (torch.rand(batch, classes, generator=generator) > 0.6).float()
    maps = torch.rand(batch, classes, 2, 3, generator=generator)
    packing = Packing.of(cls_label)
    packed = packing.pack(maps)
    assert packed.shape[1] == max(1, int(cls_label.sum(1).max()))
    assert packing.counts == cls_label.sum(1).int().tolist()
    assert torch.equal(packing.unpack(packed), maps * cls_label[:, :, None, None])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 999))
def test_the_highest_packed_channel_is_the_highest_class(batch: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cls_label = (torch.rand(batch, classes, generator=generator) > 0.5).float()
    packing = Packing.of(cls_label)
    every = torch.randint(1, 4, (batch, classes + 1, 4, 4), generator=generator).float()  # many equal ones
    maps = torch.cat([every[:, :1], packing.pack(every[:, 1:])], dim=1)
    assert torch.equal(packing.to_class(strongest(maps)), packing.unpack(maps).argmax(1))


def test_all_classes_packed_are_the_maps_themselves() -> None:
    maps = torch.rand(2, 5, 3, 3)
    packing = Packing.of_all(2, 5, maps.device)
    assert torch.equal(packing.pack(maps), maps)
    assert torch.equal(packing.unpack(maps), maps)
