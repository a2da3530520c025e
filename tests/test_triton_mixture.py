"""The Triton likelihoods of pixels, without a GPU: mixtures of logistics and levels under a softmax, run by the
interpreter against the reference. (They are compiled in test_triton_likelihood.py.)

The interpreted tests run in a process of their own, as those of test_triton_sampling.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

from genfuse.kernels import likelihood as kernels
from genfuse.ops.likelihood import categorical as categorical_ops
from genfuse.ops.likelihood import mixture as mixture_ops
from genfuse.reference.sampling import philox_uniform
from test_triton_flow import Definitions
from test_triton_sampling import HALVES, INF, NAN, RNG, Check, compiled, interpreted, normal, run_interpreted

definitions = Definitions(mixture_ops._NLL, mixture_ops._SAMPLE, categorical_ops._NLL)
mixture = Check("discretized_logistic_mixture_nll", 2, family=kernels, definition=definitions)
categorical = Check("categorical_nll", 1, constants=(1, 2), saved=(1, 2), family=kernels, definition=definitions)
OPENAI, PIXEL_MODELS, FLAX, WAVENET = range(4)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and many blocks a program, from few elements."""
    monkeypatch.setattr(kernels, "_PIXELS", 8)
    monkeypatch.setattr(kernels, "_MANY", 2)


def levels_of(*shape: int, bits: int = 8) -> Tensor:
    return torch.randint(0, 2**bits, shape).to(torch.float64) * (2.0 / (2**bits - 1)) - 1.0


def parameters(batch: int, components: int, *space: int, channels: int = 3) -> Tensor:
    return normal(batch, components * (10 if channels == 3 else 3), *space)


def options(
    bits: int = 8, openai: bool = False, layout: int = OPENAI, least: float = -7.0, by_pixel: bool = False
) -> tuple[Any, ...]:
    return bits, openai, layout, least, by_pixel


# ---- the likelihood of a mixture ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("layout", range(4), ids=["openai", "pixel_models", "flax", "wavenet"])
@pytest.mark.parametrize("mode", ["exact", "openai"])
def test_mixture(mode: str, layout: int) -> None:
    for channels in (1, 3) if layout != WAVENET else (1,):
        tensors = levels_of(2, channels, 3, 4), parameters(2, 2, 3, 4, channels=channels)
        mixture(tensors, options(openai=mode == "openai", layout=layout, by_pixel=channels == 1))


@interpreted
@pytest.mark.parametrize("shape", [(9,), (1, 1), (2, 17), (1, 2, 3, 2)], ids=str)
def test_mixture_shapes(shape: tuple[int, ...], small: None) -> None:
    batch, *space = shape
    for by_pixel in (False, True):
        tensors = levels_of(batch, 1, *space), parameters(batch, 2, *space, channels=1)
        mixture(tensors, options(by_pixel=by_pixel))


@interpreted
def test_mixture_layouts_in_memory(small: None) -> None:
    x, params = levels_of(2, 3, 3, 2), parameters(2, 1, 3, 2)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, params)]
    mixture(last, options())
    mixture((x, last[1]), options(by_pixel=True))
    mixture((x.transpose(2, 3), params[:1].expand_as(params).transpose(2, 3)), options())
    y = kernels.discretized_logistic_mixture_nll(*(t.float() for t in last), *options())
    back = kernels.discretized_logistic_mixture_nll_backward(y, *(t.float() for t in last), *options(), 3)
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in back)


@interpreted
@HALVES
def test_mixture_half(dtype: torch.dtype) -> None:
    # Parameters are rounded; pixels stay what they are.
    x, params = levels_of(2, 3, 5).float(), parameters(2, 3, 5).to(dtype)
    found = kernels.discretized_logistic_mixture_nll(x, params, *options())
    exact = definitions.discretized_logistic_mixture_nll(x.double(), params.double(), *options())[0]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact, rtol=1e-5)
    back = kernels.discretized_logistic_mixture_nll_backward(found, x, params, *options(), 3)
    assert [gradient.dtype for gradient in back] == [torch.float32, dtype]


# Centres and scales on both sides of every branch: far tails, narrow bins and wide ones, and below the least scale.
CENTERS = [0.0, 1e-4, 0.003, 0.01, 0.085, 0.3, 1.0, 1.9]
LOG_SCALES = [-8.0, -7.0, -6.0, -5.0, -4.7, -4.5, -4.0, -2.0, 0.0, 3.0, 20.0]


def one_logistic() -> tuple[Tensor, Tensor]:
    grid = torch.meshgrid(torch.tensor(CENTERS + [-c for c in CENTERS]), torch.tensor(LOG_SCALES), indexing="ij")
    center, log_scale = (t.flatten().double() for t in grid)
    x = torch.full_like(center, (2.0 * 130 - 255) / 255).float()
    params = torch.stack([torch.zeros_like(center), x.double() - center, log_scale], 1).float()
    return x[:, None, None], params[:, :, None]


@interpreted
@pytest.mark.parametrize("mode", ["exact", "openai"])
@pytest.mark.parametrize("level", [0, 1, 130, 254, 255])
def test_each_pixel_alone(level: int, mode: str) -> None:
    """What is small must be as exact as what is large, and no gradient is cut off."""
    chosen = options(openai=mode == "openai")
    x, params = one_logistic()
    x = torch.full_like(x, (2.0 * level - 255) / 255)
    params[:, 1] += x[:, 0] - (2.0 * 130 - 255) / 255
    leaves = [x.double().requires_grad_(), params.double().requires_grad_()]
    (exact,) = definitions.discretized_logistic_mixture_nll(*leaves, *chosen)
    by_x, by_params = torch.autograd.grad(exact.sum(), leaves)
    found = kernels.discretized_logistic_mixture_nll(x, params, *chosen)
    back = kernels.discretized_logistic_mixture_nll_backward(torch.ones(len(x)), x, params, *chosen, 3)
    # What one unit in the last place of every input does to it.
    moved = (by_x * x).abs().sum((1, 2)) + (by_params * (params.abs() + 1.0)).abs().sum((1, 2))
    assert bool(((found.double() - exact).abs() <= 4 * EPS * (exact.abs() + moved) + 1e-44).all())
    inverse = torch.exp(-params[:, 2:].double().clamp(min=-7.0))
    for gradient, truth in zip((back[0], back[1][:, 1:2]), (by_x, by_params[:, 1:2]), strict=True):
        # Of both edges the slope is at most 1 / scale, and cancels where the density is even.
        assert bool(((gradient.double() - truth).abs() <= 4 * EPS * (truth.abs() + inverse.clamp(max=1e3))).all())
    error = (back[1][:, 2].double() - by_params[:, 2]).abs()
    assert bool((error <= 4 * EPS * (by_params[:, 2].abs() + 1.0 + moved[:, None])).all())


@interpreted
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_probabilities_of_all_levels_sum_to_1(bits: int) -> None:
    levels = 2**bits
    x = ((2.0 * torch.arange(levels) - (levels - 1)) / (levels - 1)).view(1, 1, levels)
    torch.manual_seed(3)
    for log_scale in (-7.0, -5.0, -2.0, 3.0):
        params = torch.randn(1, 9, 1).expand(1, 9, levels).clone()
        params[:, 6:] = log_scale
        nll = kernels.discretized_logistic_mixture_nll(x, params, *options(bits, by_pixel=True))
        assert abs(float(torch.exp(-nll.double()).sum()) - 1.0) <= 1e-5


@interpreted
def test_components_that_cannot_be_and_nan() -> None:
    x, params = levels_of(6, 3, 1).float(), parameters(6, 2, 1).float()
    params[0, 0] = -INF
    params[0, 2::2] = NAN  # all of the component that cannot be
    params[1, :2] = -INF
    params[2, 1] = NAN
    params[3, 5] = NAN
    x[4, 2] = NAN
    found = kernels.discretized_logistic_mixture_nll(x, params, *options())
    alone = params[:1, 1::2].clone()
    wanted = kernels.discretized_logistic_mixture_nll(x[:1], alone, *options())
    assert torch.allclose(found[:1], wanted, rtol=4 * EPS)
    assert float(found[1]) == INF
    assert found.isnan().tolist() == [False, False, True, True, True, False]
    back = kernels.discretized_logistic_mixture_nll_backward(torch.ones(6), x, params, *options(), 3)
    assert bool(back[0][0].isfinite().all())
    assert bool((back[1][0, 2::2] == 0.0).all())


@interpreted
def test_mixture_empty_and_nothing_coming_in() -> None:
    for shape in ((0, 3, 4), (2, 3, 0)):
        x, params = torch.empty(shape), torch.empty(shape[0], 20, shape[2])
        nll = kernels.discretized_logistic_mixture_nll(x, params, *options())
        assert torch.equal(nll, torch.zeros(shape[0]))
        back = kernels.discretized_logistic_mixture_nll_backward(nll, x, params, *options(), 3)
        assert [gradient.shape for gradient in back] == [x.shape, params.shape]
        u = torch.empty(shape[0], 4, shape[2])
        assert kernels.discretized_logistic_mixture_sample(params, u, None, 3, 8, 0, -7.0, 1.0, True).shape == shape
    x, params = torch.randn(2, 3, 4), torch.randn(2, 20, 4)
    back = kernels.discretized_logistic_mixture_nll_backward(None, x, params, *options(), 3)
    assert not bool(back[0].any() | back[1].any())


# ---- drawing from it ------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("layout", range(4), ids=["openai", "pixel_models", "flax", "wavenet"])
def test_sample(layout: int, small: None) -> None:
    for channels in (1, 3) if layout != WAVENET else (1,):
        params = parameters(2, 4, 3, 5, channels=channels).float()
        u = torch.rand(2, 1 + channels, 3, 5)
        for temperature, snap in ((1.0, True), (0.6, False)):
            chosen = channels, 8, layout, -7.0, temperature, snap
            found = kernels.discretized_logistic_mixture_sample(params, u, None, *chosen)
            (wanted,) = definitions.discretized_logistic_mixture_sample(params, u, None, *chosen)
            assert torch.allclose(found, wanted, rtol=0.0, atol=0.0 if snap else 1e-5)
            last = params.contiguous(memory_format=torch.channels_last)
            assert torch.equal(kernels.discretized_logistic_mixture_sample(last, u, None, *chosen), found)


@interpreted
@pytest.mark.parametrize("space", [(3, 5), ()], ids=str)
def test_sample_draws_by_address(space: tuple[int, ...]) -> None:
    params = parameters(3, 4, *space).float()
    u = philox_uniform((3, 4, *space), RNG)
    chosen = 3, 8, OPENAI, -7.0, 1.0, True
    given = kernels.discretized_logistic_mixture_sample(params, u, None, *chosen)
    assert torch.equal(kernels.discretized_logistic_mixture_sample(params, None, RNG, *chosen), given)


@interpreted
def test_sample_at_its_ends() -> None:
    """u of 0 and next to 1, logits of -infinity, and none that is a distribution."""
    params = torch.zeros(5, 12, 1)
    params[:, 4:8, 0] = torch.tensor([-0.6, -0.2, 0.2, 0.6])
    params[:, 8:] = -20.0
    params[0, [0, 3]] = params[1, [0, 3]] = -INF
    params[2, :4] = -INF
    params[3, 1] = NAN
    params[4, 1] = INF
    u = torch.full((5, 2, 1), 0.5)
    u[0, 0], u[1, 0] = 0.0, 1.0 - 2.0**-24
    x = kernels.discretized_logistic_mixture_sample(params, u, None, 1, 8, OPENAI, -7.0, 1.0, False).flatten()
    assert torch.allclose(x[:2], torch.tensor([-0.2, 0.2]))
    assert x.isnan().tolist() == [False] * 2 + [True] * 3


# ---- levels under a softmax -----------------------------------------------------------------------------------------


def targets(*shape: int, levels: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, levels, shape).to(dtype)


@interpreted
@pytest.mark.parametrize("by_position", [False, True], ids=["image", "position"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 7), 1), ((2, 5, 9), 1), ((2, 9, 5), 2), ((2, 3, 6, 2, 3), 2), ((2, 3, 4, 5, 2), 4), ((1, 33, 300), 1)],
    ids=str,
)
def test_categorical(shape: tuple[int, ...], dim: int, by_position: bool, small: None) -> None:
    target = targets(*shape[:dim], *shape[dim + 1 :], levels=shape[dim])
    categorical((normal(*shape, scale=3.0), target), (dim, by_position))


@interpreted
def test_categorical_reads_views_where_they_lie() -> None:
    """The views that come of a convolution over all channels at once, in both memory formats, are not copied."""
    flat = normal(2, 3 * 4, 2, 3)
    last = flat.contiguous(memory_format=torch.channels_last)
    target = targets(2, 3, 2, 3, levels=4, dtype=torch.uint8)
    views = {
        "contiguous": (flat.view(2, 3, 4, 2, 3), 2),
        "channels last": (last.permute(0, 2, 3, 1).view(2, 2, 3, 3, 4).permute(0, 3, 4, 1, 2), 2),
        "levels outside": (flat.view(2, 4, 3, 2, 3), 1),
        "channels last, levels outside": (last.permute(0, 2, 3, 1).view(2, 2, 3, 4, 3).permute(0, 3, 4, 1, 2), 1),
    }
    for name, (logits, dim) in views.items():
        if "last" in name:
            kind = target.contiguous(memory_format=torch.channels_last)
        else:
            kind = target
        assert kernels._Positions(dim, logits, kind).data[0] is logits, name
        for by_position in (False, True):
            categorical((logits, kind), (dim, by_position))
        found, *saved = kernels.categorical_nll(logits.float(), kind, dim, False)
        back = kernels.categorical_nll_backward(found, logits.float(), kind, *saved, dim, False, 1)
        assert back.stride() == logits.float().stride()
    for dtype in (torch.int32, torch.int16):
        categorical((flat.view(2, 3, 4, 2, 3), target.to(dtype)), (2, True))
    # More strides than two in an image: copied.
    logits = normal(2, 3, 2, 4, 3).permute(0, 2, 3, 1, 4)
    categorical((logits, targets(2, 2, 3, 3, levels=4).transpose(1, 2).contiguous().transpose(1, 2)), (2, False))
    categorical((normal(1, 6, 1).expand(4, 6, 5), targets(4, 5, levels=6)), (1, False))


@interpreted
@HALVES
def test_categorical_half(dtype: torch.dtype) -> None:
    categorical((normal(2, 20, 7), targets(2, 7, levels=20)), (1, False), dtype)


@interpreted
def test_categorical_at_its_ends() -> None:
    """Levels of -infinity, of which one is meant; NaN; large logits; and a level that is none, which reads nothing."""
    logits = torch.zeros(6, 4)
    logits[0, 1:] = logits[1, :3] = -INF
    logits[2] = 1e30
    logits[3, 2] = NAN
    target = torch.tensor([0, 0, 3, 0, 4, -1])
    found, *saved = kernels.categorical_nll(logits, target, 1, False)
    assert found[:2].tolist() == [0.0, INF]
    assert found.isnan().tolist() == [False, False, False, True, True, True]
    assert math.isclose(float(found[2]), math.log(4.0), rel_tol=1e-6)
    back = kernels.categorical_nll_backward(torch.ones(6), logits, target, *saved, 1, False, 1)
    torch.testing.assert_close(back[2], torch.tensor([0.25, 0.25, 0.25, -0.75]))
    assert back[0].tolist() == [0.0] * 4
    assert back.isnan().any(1).tolist() == [False, False, False, True, False, False]
    for shape in ((0, 4, 2), (2, 4, 0)):
        empty, none = torch.empty(shape), torch.empty(shape[0], shape[2], dtype=torch.int64)
        found, *others = kernels.categorical_nll(empty, none, 1, False)
        assert torch.equal(found, torch.zeros(shape[0]))
        assert kernels.categorical_nll_backward(found, empty, none, *others, 1, False, 1).shape == shape
    assert not bool(kernels.categorical_nll_backward(None, logits, target, *saved, 1, False, 1).any())


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    run_interpreted(__file__)
