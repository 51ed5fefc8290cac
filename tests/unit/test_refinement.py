"""CAM, affinity, random walk, PAR and pseudo-labels: closed-form cases and properties."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afa_core import affinity as walks
from afa_core import par
from afa_core.affinity import AffinityBetween, PairAffinity, RandomWalk, label_to_affinity_label, window_mask
from afa_core.cam import MultiScaleCam, cam_to_label, evaluation_mode, multi_scale_cam
from afa_core.classes import IGNORE_INDEX
from afa_core.config import CamConfig, ModelConfig, ParConfig
from afa_core.model import AFANet
from afa_core.packing import Packing
from afa_core.pseudo_label import ShrunkenCrops, make_pseudo_label, refine_cam, softmax_over_valid

SMALL_PAR = ParConfig(dilations=(1, 2), iterations=3)


def naive_par(image: torch.Tensor, maps: torch.Tensor, config: ParConfig) -> torch.Tensor:
    """Equations 9-11 pixel by pixel, neighbour by neighbour."""
    _, _, height, width = image.shape
    offsets = [
        (d * dy, d * dx) for d in config.dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)
    ]
    distance = torch.tensor([(dy * dy + dx * dx) ** 0.5 for dy, dx in offsets])
    position = torch.softmax(-((distance / (distance.std() + 1e-8) / config.colour_bandwidth) ** 2), 0)
    for _ in range(config.iterations):
        out = torch.zeros_like(maps)
        for y in range(height):
            for x in range(width):
                near = [(min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)) for dy, dx in offsets]
                colours = torch.stack([image[0, :, a, b] for a, b in near])
                sigma = colours.std(0) + 1e-8
                term = -(((colours - image[0, :, y, x]).abs() / sigma / config.colour_bandwidth) ** 2).mean(1)
                weight = torch.softmax(term, 0) + config.position_weight * position
                out[0, :, y, x] = sum(w * maps[0, :, a, b] for w, (a, b) in zip(weight, near, strict=True))
        maps = out
    return maps


def test_par_is_its_definition() -> None:
    torch.manual_seed(0)
    image, maps = torch.rand(1, 3, 7, 9), torch.rand(1, 2, 7, 9)
    torch.testing.assert_close(
        par.refine(image, maps, SMALL_PAR), naive_par(image, maps, SMALL_PAR), atol=1e-5, rtol=1e-5
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_par_of_a_constant_map_is_constant(height: int, width: int, seed: int) -> None:
    """Weights add up to 1 + w2, so a constant map grows by that factor an iteration and keeps no trace of the image."""
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    config = ParConfig(iterations=2)
    refined = par.refine(image, torch.ones(1, 1, height, width), config)
    torch.testing.assert_close(refined, torch.full_like(refined, (1 + config.position_weight) ** 2))


def test_par_stops_at_an_edge_of_the_picture() -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 1.0
    maps = torch.zeros(1, 1, 24, 24)
    maps[..., 6:12] = 1.0  # half of the dark side is marked
    refined = par.refine(image, maps, ParConfig(dilations=(1, 2, 4), iterations=10))
    assert refined[..., :12].min() > 0.3
    assert refined[..., 12:].max() < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 8))
def test_window_holds_the_pairs_within_the_radius(height: int, width: int, radius: int) -> None:
    mask = window_mask((height, width), radius)
    for a in range(height * width):
        for b in range(height * width):
            near = abs(a // width - b // width) <= radius and abs(a % width - b % width) <= radius
            assert bool(mask[a, b]) == near


def test_windows_of_ever_new_grids_are_not_all_kept() -> None:
    """A store with pictures of many sizes has hundreds of them, 5 MiB each."""
    first = weakref.ref(window_mask((48, 20), 8))
    assert first() is window_mask((48, 20), 8)
    for width in range(21, 31):
        window_mask((48, width), 8)
    assert first() is None


def test_affinity_label_of_a_small_map() -> None:
    label = torch.tensor([[[1, 1, 0, 255]]])
    expected = torch.tensor([[1, 1, 0, 255], [1, 1, 0, 255], [0, 0, 1, 255], [255, 255, 255, 255]], dtype=torch.uint8)
    assert torch.equal(label_to_affinity_label(label, (1, 4), 8)[0], expected)
    nearest = label_to_affinity_label(label, (1, 4), 1)[0]
    assert nearest[0, 2] == 255
    assert nearest[0, 1] == 1


def between(affinity: torch.Tensor) -> AffinityBetween:
    """Any affinity [B, N, N], as a walk asks for it."""
    return lambda some, others: affinity[:, some, others]


def test_affinity_of_pairs_is_that_of_all() -> None:
    torch.manual_seed(0)
    pairs = PairAffinity(torch.randn(2, 12, 5), torch.randn(2, 12, 5), torch.tensor(0.3))
    some, others = slice(2, 7), slice(5, 12)
    torch.testing.assert_close(pairs(some, others), pairs.all()[:, some, others])
    halves = [PairAffinity(pairs.query[part], pairs.key[part], pairs.bias) for part in (slice(0, 1), slice(1, 2))]
    assert torch.equal(PairAffinity.joined(halves).all(), pairs.all())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 3),
    st.integers(1, 100), st.integers(0, 999),
)  # fmt: skip
def test_a_walk_in_strips_is_its_definition(
    height: int, width: int, radius: int, power: float, iterations: int, strip_tokens: int, seed: int
) -> None:
    """Equations 7 and 8 with all pairs: T = D^-1 (A . window)^power, maps T."""
    generator = torch.Generator().manual_seed(seed)
    tokens = height * width
    maps = torch.rand(2, 3, height, width, generator=generator)
    affinity = torch.rand(2, tokens, tokens, generator=generator)
    affinity = (affinity + affinity.transpose(1, 2)) / 2
    weights = (affinity * window_mask((height, width), radius)) ** power
    expected = maps.flatten(2)
    for _ in range(iterations):
        expected = expected @ (weights / (weights.sum(1, keepdim=True) + 0.1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walks, "CPU_STRIP_TOKENS", strip_tokens)
        walk = RandomWalk(between(affinity), (height, width), radius=radius, power=power, iterations=iterations)
    torch.testing.assert_close(walk(maps).flatten(2), expected)


def test_a_walk_along_the_identity_only_loses_what_the_epsilon_takes() -> None:
    maps = torch.rand(2, 3, 4, 5)
    affinity = torch.eye(20).expand(2, 20, 20)
    walked = RandomWalk(between(affinity), (4, 5), radius=8, power=2.0, iterations=3)(maps)
    torch.testing.assert_close(walked, maps / 1.1**3)


def test_a_walk_fills_a_region_of_equal_affinity() -> None:
    maps = torch.zeros(1, 1, 1, 6)
    maps[..., 0] = 1
    affinity = torch.zeros(1, 6, 6)
    affinity[:, :3, :3] = 1
    walked = RandomWalk(between(affinity), (1, 6), radius=8, power=1.0, iterations=1)(maps)[0, 0, 0]
    torch.testing.assert_close(walked, torch.tensor([1, 1, 1, 0, 0, 0]) / 3.1)
    near = RandomWalk(between(affinity), (1, 6), radius=1, power=1.0, iterations=1)(maps)[0, 0, 0]
    assert near[2] == 0


def test_cam_label_thresholds_and_boxes() -> None:
    cam = torch.tensor([[[[0.2, 0.4, 0.5, 0.9]], [[0.9, 0.9, 0.9, 0.9]]]])
    tags = Packing.of(torch.tensor([[1.0, 0.0]]))  # the second class is not there, however strong
    maps = tags.pack(cam)
    assert cam_to_label(maps, tags, 0.45).tolist() == [[[0, 0, 1, 1]]]
    assert cam_to_label(maps, tags, (0.35, 0.55)).tolist() == [[[0, 255, 255, 1]]]
    assert cam_to_label(maps, tags, 0.45, torch.tensor([[0, 1, 1, 3]])).tolist() == [[[255, 0, 1, 255]]]
    none = Packing.of(torch.zeros(1, 2))
    assert cam_to_label(none.pack(cam), none, 0.45).tolist() == [[[0, 0, 0, 0]]]


def test_multi_scale_cam_is_mirror_symmetric_and_leaves_the_mode() -> None:
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone="mit_b0", drop_path_rate=0.5), 3).train()
    image = torch.randn(1, 3, 64, 96)
    straight = multi_scale_cam(model, image, (1.0, 0.5, 1.5))
    mirrored = multi_scale_cam(model, image.flip(3), (1.0, 0.5, 1.5))
    assert model.training
    assert not straight.cam.requires_grad
    assert straight.grid == (6, 9)
    torch.testing.assert_close(straight.cam, mirrored.cam.flip(3), atol=2e-3, rtol=1e-3)
    assert straight.cam.min() >= 0
    assert straight.cam.max() <= 1
    with evaluation_mode(model):
        assert not model.training
    assert model.training


def test_softmax_gives_nothing_to_classes_without_a_tag() -> None:
    packing = Packing.of(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    probability = packing.unpack(softmax_over_valid(packing.pack(torch.rand(2, 3, 4, 4)), packing, 0.4))
    torch.testing.assert_close(probability.sum(1), torch.ones(2, 4, 4))
    assert probability[0, 2:].abs().max() == 0
    assert probability[1, 0].min() == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 33), st.integers(2, 33), st.floats(0.05, 0.5), st.floats(0.5, 0.95), st.integers(0, 999))
def test_refined_labels_are_tags_background_or_ignored(
    height: int, width: int, low: float, high: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image, cam = (
        torch.rand(1, 3, height, width, generator=generator),
        torch.rand(1, 3, height, width, generator=generator),
    )
    boxes = torch.tensor([[0, height, 0, width // 2]])
    packing = Packing.of(torch.tensor([[1.0, 0.0, 1.0]]))
    crops = ShrunkenCrops(image, SMALL_PAR)
    packed = MultiScaleCam(packing.pack(cam), between(torch.zeros(1, 1, 1)), (1, 1), packing)
    maps = refine_cam(crops, packed, boxes, (low, high))
    assert set(maps.label.unique().tolist()) <= {0, 1, 3, IGNORE_INDEX}
    assert (maps.label[:, :, width // 2 :] == IGNORE_INDEX).all()
    decided = refine_cam(crops, packed, boxes, (low, low))
    assert (decided.label[:, :, : width // 2] != IGNORE_INDEX).all()


def test_without_tags_everything_is_background() -> None:
    model = AFANet(ModelConfig(backbone="mit_b0"), 3).eval()
    image = torch.randn(1, 3, 64, 64)
    made = make_pseudo_label(
        model,
        image,
        torch.rand(1, 3, 64, 64),
        torch.zeros(1, 3),
        torch.tensor([[0, 64, 0, 64]]),
        CamConfig(),
        SMALL_PAR,
    )
    assert isinstance(made.cam, MultiScaleCam)
    assert made.refined_affinity is not None
    assert (made.refined_cam.label == 0).all()
    assert (made.refined_affinity.label == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (3, 2)])
def test_par_of_tiny_pictures_is_finite(size: tuple[int, int]) -> None:
    assert par.refine(torch.rand(1, 3, *size), torch.rand(1, 2, *size), ParConfig()).isfinite().all()
