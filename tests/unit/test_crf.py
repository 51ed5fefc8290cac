"""Dense CRF: the lattice against exact Gaussian kernels, mean field against its definition, and properties."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afa_core.config import CrfConfig
from afa_core.crf import Lattice, refine

SMALL = CrfConfig(iterations=5, bilateral_xy_px=12.0, bilateral_rgb=15.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def positions(height: int, width: int) -> torch.Tensor:
    """Row and column of each pixel, [N, 2]."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).double()


def exact_kernel(features: torch.Tensor) -> torch.Tensor:
    """[N, N]; a Gaussian of standard deviation 1."""
    return torch.exp(-(torch.cdist(features, features) ** 2) / 2).float()


def from_both_sides(kernel: torch.Tensor) -> torch.Tensor:
    scale = kernel.sum(1).rsqrt()
    return scale[:, None] * kernel * scale


def exact_refine(image: torch.Tensor, probability: torch.Tensor, config: CrfConfig) -> torch.Tensor:
    """Mean field with all pairs of pixels; class by class, no lattice."""
    classes, height, width = probability.shape
    place, colour = positions(height, width), image.reshape(-1, 3).double() / config.bilateral_rgb
    smoothness = from_both_sides(exact_kernel(place / config.position_xy_px))
    appearance = from_both_sides(exact_kernel(torch.cat([place / config.bilateral_xy_px, colour], 1)))
    kernel = config.position_weight * smoothness + config.bilateral_weight * appearance
    unary = -probability.flatten(1).clamp_min(1e-5).log()
    marginal = torch.softmax(-unary, 0)
    for _ in range(config.iterations):
        message = marginal @ kernel.T
        # Potts: a label costs what all other labels' messages weigh.
        pairwise = torch.stack([message[torch.arange(classes) != label].sum(0) for label in range(classes)])
        marginal = torch.softmax(-unary - pairwise, 0)
    return marginal.view(classes, height, width)


def random_case(
    height: int, width: int, seed: int, *, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """A picture of random colours [H, W, 3] uint8, random probabilities [C, H, W], and what drew them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return image, torch.randn(classes, height, width, generator=generator).softmax(0), generator


def two_regions(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A slanted edge between two colours: picture [24, 24, 3], noisy probabilities [2, 24, 24], truth [24, 24]."""
    _, _, generator = random_case(1, 1, seed)
    row, column = positions(24, 24).T
    truth = (column > 6 + row / 2).long().view(24, 24)
    colours = torch.tensor([[70.0, 110.0, 60.0], [180.0, 120.0, 90.0]])[truth]
    image = (colours + 6 * torch.randn(24, 24, 3, generator=generator)).clamp(0, 255)
    sure = torch.where(torch.rand(24, 24, generator=generator) < 0.25, 1 - truth, truth)  # a quarter is wrong
    margin = torch.rand(24, 24, generator=generator) * 1.5
    return image, torch.stack([margin * (sure == 0), margin * (sure == 1)]).softmax(0), truth


def agreement(filtered: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Correlation and error relative to the norm."""
    correlation = torch.corrcoef(torch.stack([filtered.flatten(), exact.flatten()]))[0, 1]
    return float(correlation), float((filtered - exact).norm() / exact.norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_filter_of_positions_is_gaussian(sigma: float, seed: int) -> None:
    """On a dense grid the lattice is within 3 % of the exact filter, and follows it pixel by pixel."""
    _, values, _ = random_case(24, 20, seed)
    features = positions(24, 20) / sigma
    filtered = Lattice(features).filter_normalised(values.flatten(1).T)
    correlation, error = agreement(filtered, from_both_sides(exact_kernel(features)) @ values.flatten(1).T)
    assert correlation > 0.98
    assert error < 0.03


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("xy_px", "rgb", "least_correlation", "most_error"),
    # Colours far apart: few pixels mix. Middle: each sees some tens of others, the lattice is at its worst, since
    # points are missing. Wide: hundreds.
    [(3.0, 5.0, 0.99, 0.03), (3.0, 40.0, 0.92, 0.20), (6.0, 60.0, 0.92, 0.10)],
)
def test_filter_of_positions_and_colours_is_gaussian(
    xy_px: float, rgb: float, least_correlation: float, most_error: float, seed: int
) -> None:
    """In five dimensions, on random colours, the lattice is an approximation of 3 to 20 %."""
    image, values, _ = random_case(22, 24, seed)
    features = torch.cat([positions(22, 24) / xy_px, image.view(-1, 3).double() / rgb], 1)
    filtered = Lattice(features).filter_normalised(values.flatten(1).T)
    correlation, error = agreement(filtered, from_both_sides(exact_kernel(features)) @ values.flatten(1).T)
    assert correlation > least_correlation
    assert error < most_error


@pytest.mark.parametrize("sigma", [2.0, 3.0])
def test_filter_is_as_wide_as_it_should_be(sigma: float) -> None:
    """The second moment of the answer to an impulse is sigma squared, averaged over where the impulse stands."""
    lattice, place = Lattice(positions(41, 41) / sigma), positions(41, 41).float()
    moments = []
    for centre in [20 * 41 + 20, 20 * 41 + 21, 21 * 41 + 22, 19 * 41 + 18, 22 * 41 + 19]:
        impulse = torch.zeros(41 * 41, 1)
        impulse[centre] = 1
        answer = lattice.filter(impulse)
        moments.append(((place - place[centre]) ** 2 * answer).sum(0) / answer.sum())
    torch.testing.assert_close(torch.stack(moments).mean(0), torch.full((2,), sigma**2), rtol=0.05, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(0.5, 100))
def test_constant_in_constant_out(height: int, width: int, seed: int, rgb: float) -> None:
    """Weights of a pixel's neighbours add up to K 1; normalised from both sides, (K 1)^1/2 is what stays."""
    image, _, _ = random_case(height, width, seed)
    lattice = Lattice(torch.cat([positions(height, width) / 4, image.view(-1, 3).double() / rgb], 1))
    degree = lattice.filter(torch.ones(height * width, 1))
    assert (degree > 0).all()
    torch.testing.assert_close(lattice.filter(torch.full_like(degree, 7.0)) / degree, torch.full_like(degree, 7.0))
    torch.testing.assert_close(lattice.filter_normalised(degree.sqrt()), degree.sqrt())


@pytest.mark.parametrize("config", [SMALL, CrfConfig()], ids=["small", "published"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_goes_as_by_exact_kernels(seed: int, config: CrfConfig) -> None:
    image, probability, truth = two_regions(seed)
    refined, exact = refine(image, probability, config), exact_refine(image, probability, config)
    assert (refined.argmax(0) == exact.argmax(0)).float().mean() >= 0.95
    assert (refined - exact).abs().mean() < 0.01
    assert (probability.argmax(0) == truth).float().mean() < 0.8
    assert (refined.argmax(0) == truth).float().mean() > 0.98


@pytest.mark.parametrize("seed", range(3))
def test_weak_kernels_refine_as_exact_ones(seed: int) -> None:
    """Where noise is only half gone, pixel after pixel must agree and not just the two regions."""
    image, probability, _ = two_regions(seed)
    config = CrfConfig(
        iterations=3,
        position_xy_px=1.0,
        position_weight=0.5,
        bilateral_xy_px=4.0,
        bilateral_rgb=15.0,
        bilateral_weight=0.5,
    )
    refined, exact = refine(image, probability, config), exact_refine(image, probability, config)
    assert (refined - probability).abs().mean() > 0.04
    assert (refined - exact).abs().mean() < 0.003
    assert (refined.argmax(0) == exact.argmax(0)).float().mean() >= 0.95


@pytest.mark.parametrize("row", [(0.25, 0.25, 0.25, 0.25), (0.5, 0.0, 0.5, 0.0), (0.0, 1.0, 0.0, 0.0)])
@pytest.mark.parametrize("picture", ["constant", "random"])
def test_even_and_certain_probabilities_are_fixed_points(picture: str, row: tuple[float, ...]) -> None:
    """Where all classes get the same message, or there is one class only, no message can change anything."""
    image, _, _ = random_case(16, 18, 0)
    image = torch.full_like(image, 90) if picture == "constant" else image
    probability = torch.tensor(row)[:, None, None].expand(-1, 16, 18)
    torch.testing.assert_close(refine(image, probability, CrfConfig()), probability.contiguous())


def test_constant_probability_stays_even_and_grows_surer() -> None:
    """On a constant picture, away from the border, every pixel is treated alike: it follows the likeliest class."""
    image = torch.full((24, 24, 3), 128, dtype=torch.uint8)
    probability = torch.tensor([0.5, 0.3, 0.2])[:, None, None].expand(-1, 24, 24)
    config = CrfConfig(iterations=3, position_xy_px=1.0, position_weight=1.0, bilateral_weight=0.0)
    refined = refine(image, probability, config)
    assert (refined[0] > probability[0]).all()
    inner = refined[:, 6:-6, 6:-6]
    assert (inner.flatten(1).amax(1) - inner.flatten(1).amin(1)).max() < 0.02


def test_absent_class_stays_absent() -> None:
    image, probability, _ = random_case(10, 12, 0, classes=4)
    probability[[1, 3]] = 0
    probability[0, :5] = 0  # present, but not everywhere
    probability = probability / probability.sum(0)
    refined = refine(image, probability, SMALL)
    assert refined.isfinite().all()
    assert (refined[[1, 3]] == 0).all()
    torch.testing.assert_close(refined[[0, 2]], refine(image, probability[[0, 2]], SMALL))


def test_certain_pixels_can_be_overruled() -> None:
    """A probability of 0 is taken for 1e-5, so that wrong labels among right ones give way."""
    image, probability, truth = two_regions(0)
    certain = torch.eye(2)[probability.argmax(0)].permute(2, 0, 1)
    config = CrfConfig(position_weight=8.0, bilateral_weight=16.0)
    refined = refine(image, certain, config)
    assert (refined.argmax(0) == truth).float().mean() > 0.98
    assert (refined - exact_refine(image, certain, config)).abs().mean() < 0.01


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
@pytest.mark.filterwarnings("error")
def test_refined_is_a_probability(height: int, width: int, classes: int, seed: int) -> None:
    image, probability, _ = random_case(height, width, seed, classes=classes)
    refined = refine(image, probability, SMALL)
    assert refined.shape == probability.shape
    assert refined.min() >= 0
    torch.testing.assert_close(refined.sum(0), torch.ones(height, width))
    torch.testing.assert_close(refined, refine(image.float(), probability, SMALL))


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1)])
def test_thin_pictures(size: tuple[int, int]) -> None:
    """One iteration: the next ones would blow up what few lattice points, with few neighbours, get wrong."""
    image, probability, _ = random_case(*size, 0)
    config = CrfConfig(iterations=1)
    torch.testing.assert_close(
        refine(image, probability, config), exact_refine(image, probability, config), atol=0.05, rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**31))
def test_classes_are_treated_alike(order: list[int], height: int, width: int, seed: int) -> None:
    image, probability, _ = random_case(height, width, seed, classes=4)
    torch.testing.assert_close(
        refine(image, probability[order], SMALL), refine(image, probability, SMALL)[order], atol=1e-4, rtol=1e-4
    )


def test_many_values_are_filtered_as_one_by_one() -> None:
    _, values, _ = random_case(8, 8, 0, classes=70)
    lattice, values = Lattice(positions(8, 8) / 3), values.flatten(1).T
    torch.testing.assert_close(lattice.filter(values), torch.cat([lattice.filter(v) for v in values.split(1, 1)], 1))


def test_without_kernels_nothing_changes() -> None:
    image, probability, _ = random_case(6, 5, 0)
    torch.testing.assert_close(
        refine(image, probability, CrfConfig(position_weight=0.0, bilateral_weight=0.0)), probability
    )


def test_type_of_the_probabilities_is_kept() -> None:
    image, probability, _ = random_case(6, 5, 0)
    for kind in (torch.float16, torch.float64):
        refined = refine(image, probability.to(kind), SMALL)
        assert refined.dtype == kind
        torch.testing.assert_close(refined.float(), refine(image, probability, SMALL), atol=1e-2, rtol=0)


def test_what_cannot_be_refined_is_said() -> None:
    image, probability, _ = random_case(6, 5, 0)
    with pytest.raises(ValueError, match=r"image must be \[6, 5, 3\]"):
        refine(image.permute(2, 0, 1), probability, SMALL)
    for wrong in (probability * 2, probability * 0, probability * float("nan")):
        with pytest.raises(ValueError, match="sum to 1"):
            refine(image, wrong, SMALL)
    for narrow in (1e-4, 1e-320):
        with pytest.raises(ValueError, match="too narrow"):
            refine(image, probability, CrfConfig(bilateral_rgb=narrow))
