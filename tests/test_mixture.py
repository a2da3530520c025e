"""Mixtures of discretised logistics: the published formula, the traps in it, and pixels drawn. What is asked of all
operators is in test_operators.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import genfuse
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from genfuse import ops
from genfuse.reference import likelihood as reference
from operator_cases import check, make
from scipy import stats
from torch import Tensor
from torch import library as registry

NLL = "discretized_logistic_mixture_nll"
INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close
both = pytest.mark.parametrize("backend", ["native", "reference"])
nll, sample = ops.discretized_logistic_mixture_nll, ops.discretized_logistic_mixture_sample


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients(result: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result.sum(), leaves))


def values(bits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """All levels as pixels [2^bits, 1, 1]."""
    last = 2**bits - 1
    return ((2.0 * torch.arange(last + 1, dtype=torch.float64) - last) / last).to(dtype).view(-1, 1, 1)


def grey(mean: float, log_scale: float, dtype: torch.dtype, *more: float) -> Tensor:
    """Parameters [1, 3, 1] of one component, or of two."""
    numbers = [0.0, mean, log_scale] if not more else [0.0, more[0], mean, more[1], log_scale, more[2]]
    return torch.tensor(numbers, dtype=dtype).view(1, -1, 1)


# ---- the published formula -------------------------------------------------------------------------------------------


def published(x: Tensor, params: Tensor) -> Tensor:
    """Nats of each pixel [B, H, W] of x [B, H, W, 3] under params [B, H, W, 10 M], in channels last: after the paper's
    code, from the formula alone, with nothing of ours."""
    m = params.shape[-1] // 10
    logits, rest = params[..., :m], params[..., m:].reshape(*x.shape, 3 * m)
    means, log_scales, coeffs = rest[..., :m], rest[..., m : 2 * m].clamp(min=-7.0), torch.tanh(rest[..., 2 * m :])
    pixel = x[..., None].expand(*x.shape, m)
    m1 = means[..., 0, :]
    m2 = means[..., 1, :] + coeffs[..., 0, :] * pixel[..., 0, :]
    m3 = means[..., 2, :] + coeffs[..., 1, :] * pixel[..., 0, :] + coeffs[..., 2, :] * pixel[..., 1, :]
    centered = pixel - torch.stack((m1, m2, m3), -2)
    inv_stdv = torch.exp(-log_scales)
    plus_in, min_in, mid_in = (inv_stdv * (centered + d) for d in (1.0 / 255.0, -1.0 / 255.0, 0.0))
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)

    def softplus(a: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-a.abs())) + a.clamp(min=0.0)

    log_pdf_mid = mid_in - log_scales - 2.0 * softplus(mid_in)
    inside = torch.where(cdf_delta > 1e-5, torch.log(cdf_delta.clamp(min=1e-12)), log_pdf_mid - math.log(127.5))
    log_probs = torch.where(
        pixel < -0.999, plus_in - softplus(plus_in), torch.where(pixel > 0.999, -softplus(min_in), inside)
    )
    return -torch.logsumexp(log_probs.sum(-2) + torch.log_softmax(logits, -1), -1)


def pictures(dtype: torch.dtype, std: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (3, 3, 5, 13), generator=generator)
    levels[:, :, 0, :6] = torch.tensor([0, 1, 254, 255, 0, 255])
    params = std * torch.randn(3, 40, 5, 13, generator=generator, dtype=torch.float64) - 1.0
    return (levels / 127.5 - 1.0).to(dtype), params.to(dtype)


@both
@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_openai_mode_is_the_published_formula(backend: str, std: float) -> None:
    """In float64, to the digits that its difference of sigmoids has: an ulp of 1 over the least difference, 1e-5."""
    x, params = pictures(torch.float64, std)
    off = torch.finfo(torch.float64).eps / 1e-5
    leaves = params.clone().requires_grad_(), params.clone().requires_grad_()
    exact = published(x.movedim(1, -1), leaves[0].movedim(1, -1))
    with genfuse.use_backend(backend):
        found = nll(x, leaves[1], mode="openai", reduction="pixel")
        image = nll(x, leaves[1], mode="openai")
    close(found, exact, rtol=3 * off, atol=3 * off)
    close(image, exact.sum((1, 2)), rtol=3 * off, atol=3 * off)
    close(gradients(found, leaves[1]), gradients(exact, leaves[0]), rtol=10 * off, atol=10 * off)


@both
def test_both_modes_agree_where_bins_are_narrow(backend: str) -> None:
    """And not where the approximation is bad: at the least scale it is off by more than a nat."""
    wide = grey(0.0, 0.5, torch.float64)
    x = torch.full((1, 1, 1), 0.5 / 127.5, dtype=torch.float64)
    with genfuse.use_backend(backend):
        close(nll(x, wide), nll(x, wide, mode="openai"))
        narrow = grey(0.5, -7.0, torch.float64)
        assert float(nll(x, narrow, mode="openai") - nll(x, narrow)) > 1.0


@both
@pytest.mark.parametrize("channels", [1, 3])
def test_reductions_and_layouts(backend: str, channels: int) -> None:
    """Every layout is the same numbers, in another order."""
    generator = torch.Generator().manual_seed(3)
    m, kinds = 4, 3 if channels > 1 else 2
    logits = torch.randn(2, m, 3, 5, generator=generator, dtype=torch.float64)
    parts = torch.randn(2, channels, kinds, m, 3, 5, generator=generator, dtype=torch.float64)
    x = values(8)[torch.randint(0, 256, (2, channels, 3, 5), generator=generator)].view(2, channels, 3, 5)
    softplus = parts.clone()  # such that the inverse scale is e^-log_scale
    softplus[:, :, 1] = torch.log(torch.expm1(torch.exp(-parts[:, :, 1])))
    by_layout = {
        "openai": parts.flatten(1, 3),
        "pixel_models": parts.permute(0, 2, 3, 1, 4, 5).flatten(1, 3),
        "flax": softplus.permute(0, 1, 3, 2, 4, 5).flatten(1, 3),
        **({"wavenet": parts.flatten(1, 3)} if channels == 1 else {}),
    }
    with genfuse.use_backend(backend):
        pixel = nll(x, torch.cat((logits, by_layout["openai"]), 1), reduction="pixel")
        assert pixel.shape == (2, 3, 5)
        for layout, rest in by_layout.items():
            params = torch.cat((logits, rest), 1)
            close(nll(x, params, layout=layout, reduction="pixel"), pixel)
            close(nll(x, params, layout=layout), pixel.sum((1, 2)))
            close(nll(x, params, layout=layout, reduction="sum"), pixel.sum())
            close(nll(x, params, layout=layout, reduction="mean"), pixel.sum() / 2)
            bits = pixel.sum() / 2 / (15 * channels * math.log(2.0))
            close(nll(x, params, layout=layout, reduction="bits_per_dim"), bits)


# ---- a probability ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("log_scale", [-7.0, -6.0, -5.0, -3.0, -1.0, 0.0, 3.0, 20.0, 80.0, 200.0])
def test_the_levels_probabilities_sum_to_one(backend: str, bits: int, log_scale: float) -> None:
    for mean in (-1e4, -30.0, -1.5, -1.0, -0.9961, -0.5, 0.0, 0.002, 0.3, 0.99, 1.0, 1.01, 5.0, 1e3):
        for dtype, off in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            params = grey(mean, log_scale, dtype).expand(2**bits, 3, 1)
            with genfuse.use_backend(backend):
                each = nll(values(bits, dtype), params, bits=bits)
            total = float(torch.exp(-each.double()).sum())
            # Where an edge is far off its mass is e^-(distance / scale), and so as exact as the distance is.
            assert abs(total - 1.0) < off, (mean, dtype, total)


@both
def test_the_probabilities_of_colours_sum_to_one(backend: str) -> None:
    generator = torch.Generator().manual_seed(1)
    params = torch.randn(1, 30, 1, generator=generator, dtype=torch.float64)
    one = values(2).flatten()
    x = torch.cartesian_prod(one, one, one).unsqueeze(2)
    with genfuse.use_backend(backend):
        each = nll(x, params.expand(64, 30, 1), bits=2)
    close(torch.exp(-each).sum(), torch.ones((), dtype=torch.float64))


@both
def test_the_probabilities_of_sound_sum_to_one(backend: str) -> None:
    """16 bits, of which neighbours are 3e-5 apart: one component as narrow as is allowed, one as wide as the range."""
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        params = grey(0.1, -7.0, dtype, -0.2, -0.3, 0.0).expand(65536, 6, 1)
        with genfuse.use_backend(backend):
            each = nll(values(16, dtype), params, bits=16, layout="wavenet")
            published = nll(values(16, dtype), params, bits=16, layout="wavenet", mode="openai")
        assert abs(float(torch.exp(-each.double()).sum()) - 1.0) < most
        # Here the approximation is a good one; the published edges are of 33 levels each.
        inside = values(16).flatten().abs() < 0.999
        # In float32 the difference as published, which the definition takes, loses a hundredth of a nat.
        off = 1e-4 if backend == "native" or dtype == torch.float64 else 1e-2
        close(published[inside], each[inside], rtol=off, atol=off)


@both
def test_the_published_edges_are_numbers_and_not_levels(backend: str) -> None:
    """x < -0.999 and x > 0.999: of 16 bits, 33 levels at either end."""
    x = values(16)[[0, 32, 33, 65535 - 33, 65535 - 32, 65535]]
    params = grey(0.3, -1.0, torch.float64)
    with genfuse.use_backend(backend):
        found = nll(x, params.expand(6, 3, 1), bits=16, mode="openai")
    t = (x.flatten() - 0.3) * math.exp(1.0)
    w = math.exp(1.0) / 65535
    inside = -torch.log(torch.sigmoid(t + w) - torch.sigmoid(t - w))
    expected = torch.stack((-F.logsigmoid(t + w)[0], -F.logsigmoid(t + w)[1], inside[2], inside[3],
                            -F.logsigmoid(w - t)[4], -F.logsigmoid(w - t)[5]))  # fmt: skip
    close(found, expected, rtol=1e-9, atol=1e-9)


# ---- the traps -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_jumps_at_a_mass_of_a_hundred_thousandth(backend: str, dtype: torch.dtype) -> None:
    """Nor at the switches between series and logarithm, nor where the mean leaves the bin."""
    for mean, scales in ((0.5, torch.linspace(-4.6, -3.8, 200)), (0.001, torch.linspace(-7.0, -4.0, 1000))):
        scale = scales.to(dtype)
        params = torch.stack((torch.zeros_like(scale), torch.full_like(scale, mean), scale), 1).unsqueeze(2)
        x = torch.zeros(len(scale), 1, 1, dtype=dtype) + 1.0 / 255.0
        with genfuse.use_backend(backend):
            each = nll(x, params)
        second = each[2:] - 2.0 * each[1:-1] + each[:-2]
        step = float(scale[1] - scale[0])
        # Its second derivative is below that of 0.5 / scale, with rounding of the values themselves.
        noise = 8 * torch.finfo(dtype).eps * float(each.abs().max())
        assert float(second.abs().max()) < step**2 * 4.0 * 0.5 * math.exp(-float(scale[0])) + noise


@both
def test_far_off_pixels_have_gradients(backend: str) -> None:
    """Of the mass's logarithm, a slope of 1 / scale: not 0, as where a mass of 0 is clamped."""
    for dtype, (mean, level) in itertools.product(
        (torch.float32, torch.float64), ((0.9, 10), (-0.9, 240), (50.0, 128), (0.9, 0), (-0.9, 255))
    ):
        params = grey(mean, -6.5, dtype).requires_grad_()
        x = values(8, dtype)[level].view(1, 1, 1).requires_grad_()
        with genfuse.use_backend(backend):
            each = nll(x, params)
        by_x, by_params = gradients(each, x, params)
        slope = math.exp(6.5)
        assert bool(each.isfinite().all())
        close(by_x.double().abs().flatten(), torch.tensor([slope], dtype=torch.float64), rtol=1e-5, atol=0.0)
        close(by_params[0, 1].double(), -by_x[0, 0].double(), rtol=1e-6, atol=0.0)
        assert float(by_params[0, 1].sign()) == math.copysign(1.0, mean)
        distance = abs(mean - float(x.detach())) * slope
        assert float(by_params[0, 2]) == pytest.approx(-distance, rel=2.0 / 255 * slope / distance + 1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["exact", "openai"])
def test_254_is_not_an_edge(backend: str, dtype: torch.dtype, mode: str) -> None:
    """Levels 1 and 254 are bins of a width, 0 and 255 reach to infinity: a far mean makes the difference."""
    means = torch.tensor([8.0, -8.0], dtype=torch.float64)
    for mean in means:
        edge, beside = (255, 254) if mean > 0 else (0, 1)
        params = grey(float(mean), 0.0, dtype)
        x = (torch.tensor([edge, beside]) / 127.5 - 1.0).to(dtype).view(2, 1, 1)
        with genfuse.use_backend(backend):
            found = torch.exp(-nll(x, params.expand(2, 3, 1), mode=mode).double())
            levels = torch.exp(-nll(torch.tensor([edge, beside]).view(2, 1, 1), params.expand(2, 3, 1), mode=mode))
        exact = stats.logistic.cdf(-(7.0 + 1.0 / 255.0)), stats.logistic.pdf(7.0)
        assert float(found[0]) == pytest.approx(1.0 - exact[0], rel=1e-3)
        assert float(found[1]) == pytest.approx(2.0 / 255.0 * exact[1], rel=2e-2)
        close(levels.double(), found, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@both
def test_a_component_without_weight_has_no_part(backend: str) -> None:
    """A logit of -infinity: whatever its other parameters are, infinities and NaN too."""
    x, params = pictures(torch.float64, 1.0)
    params = params[:, :20].clone()
    one = torch.cat((params[:, :1], params[:, 2:].unflatten(1, (3, 3, 2))[:, :, :, 0].flatten(1, 2)), 1)
    params[:, 1] = -INF
    for spoiled in (0.0, NAN, INF, -INF, 1e300):
        dead = params.clone()
        dead[:, 2:].unflatten(1, (3, 3, 2))[:, :, :, 1] = spoiled
        for mode in ("exact", "openai"):
            leaves = dead.clone().requires_grad_(), one.clone().requires_grad_()
            pixels = x.clone().requires_grad_(), x.clone().requires_grad_()
            with genfuse.use_backend(backend):
                found, alone = (nll(p, leaf, mode=mode) for p, leaf in zip(pixels, leaves, strict=True))
            close(found, alone)
            by_x, by_params = gradients(found, pixels[0], leaves[0])
            x_alone, params_alone = gradients(alone, pixels[1], leaves[1])
            close(by_x, x_alone)
            close(by_params[:, :1], params_alone[:, :1])
            parts = by_params[:, 2:].unflatten(1, (3, 3, 2))
            close(parts[:, :, :, 0].flatten(1, 2), params_alone[:, 1:])
            assert not bool(parts[:, :, :, 1].any())
            assert not bool(by_params[:, 1].any())


@both
@pytest.mark.parametrize("mode", ["exact", "openai"])
@pytest.mark.parametrize("layout", ["openai", "flax"])
def test_nan_is_nan_for_its_own_pixel_alone(backend: str, mode: str, layout: str) -> None:
    x, params = pictures(torch.float32, 1.0)
    params = params[:, :20].contiguous()

    def run(x: Tensor, params: Tensor) -> list[Tensor]:
        leaves = x.clone().requires_grad_(), params.clone().requires_grad_()
        with genfuse.use_backend(backend):
            each = nll(*leaves, mode=mode, layout=layout, reduction="pixel")
        return [each.detach(), *gradients(each, *leaves)]

    clean = run(x, params)
    spot = torch.zeros(3, 5, 13, dtype=torch.bool)
    spot[1, 2, 7] = True
    for tensor, channels in ((x, 3), (params, 20)):
        for channel in range(channels):
            changed = tensor.clone()
            changed[1, channel, 2, 7] = NAN
            found = run(changed, params) if tensor is x else run(x, changed)
            assert torch.equal(found[0].isnan(), spot), channel
            for ours, theirs in zip(found, clean, strict=True):
                where = spot if ours.dim() == 3 else spot.unsqueeze(1).expand_as(ours)
                assert torch.equal(ours[~where], theirs[~where]), channel
    for channel in (0, 1):
        changed = params.clone()
        changed[1, :2, 2, 7] = -INF  # no distribution
        assert torch.equal(run(x, changed)[0].isnan(), spot)
        changed[1, channel, 2, 7] = INF
        assert torch.equal(run(x, changed)[0].isnan(), spot)


@both
def test_a_component_that_is_infinitely_far_has_no_part(backend: str) -> None:
    """A mean of infinity explains nothing, and has no gradient; if it is alone, the pixel is impossible."""
    x = values(8, torch.float32)[::15].contiguous()
    near = grey(0.2, -2.0, torch.float32).expand(len(x), 3, 1)
    both = grey(INF, -2.0, torch.float32, 0.0, 0.2, -2.0).expand(len(x), 6, 1)
    leaf = both.clone().requires_grad_()
    with genfuse.use_backend("native"):
        found = nll(x[:-1], leaf[:-1])
    close(found, nll(x[:-1], near[:-1]) + math.log(2.0))
    assert bool(gradients(found, leaf)[0].isfinite().all())
    with genfuse.use_backend(backend):
        alone = nll(x, grey(INF, -2.0, torch.float32).expand(len(x), 3, 1))
    assert torch.equal(alone[:-1], torch.full_like(alone[:-1], INF))
    assert float(alone[-1]) == 0.0  # but for the highest level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, params = pictures(dtype, 1.0)
    found, wide = nll(x, params), nll(x.float(), params.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, wide)
    mixed = nll(x.float(), params)  # pixels that are exact, beside a network's bfloat16
    assert torch.equal(mixed, wide)
    leaf = params.clone().requires_grad_()
    (by_params,) = gradients(nll(x, leaf), leaf)
    assert by_params.dtype == dtype


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 8, 16])
def test_the_mass_and_its_slope_at_every_width(backend: str, dtype: torch.dtype, bits: int) -> None:
    """ln(1 - e^-d) from d = 1e-10 to 1e3, and its derivative 1 / expm1(d), which autograd through a clamp makes NaN."""
    half = 1.0 / (2**bits - 1)
    eps = torch.finfo(dtype).eps
    for d in np.logspace(-10, 3, 53):
        log_scale = math.log(2.0 * half / d)
        params = grey(0.0, log_scale, dtype).requires_grad_()
        x = torch.zeros(1, 1, 1, dtype=dtype)  # the middle of a bin, be there a level or not
        with genfuse.use_backend(backend):
            each = nll(x, params, bits=bits, log_scale_min=-100.0)
        exact_log_scale = float(params.detach()[0, 2].double())
        if bits == 1:
            continue_as = -np.log1p(-stats.logistic.cdf(-half / math.exp(exact_log_scale)))
            assert float(each) >= 0.0 or float(each) == pytest.approx(continue_as)
        w = half / math.exp(exact_log_scale)
        exact = -(np.log(np.tanh(0.5 * w)))  # sigmoid(w) - sigmoid(-w)
        assert float(each) == pytest.approx(exact, rel=32 * eps, abs=32 * eps)
        slope = w * (1.0 / np.sinh(w) if w < 300 else 0.0)  # of -ln tanh(w / 2) by ln scale
        assert float(gradients(each, params)[0][0, 2]) == pytest.approx(slope, rel=64 * eps, abs=64 * eps)


@both
def test_scales_below_the_least_have_no_gradient(backend: str) -> None:
    x = torch.zeros(3, 1, 1)
    params = torch.tensor([[0.0, 0.3, s] for s in (-9.0, -7.0, -5.0)]).unsqueeze(2).requires_grad_()
    with genfuse.use_backend(backend):
        each = nll(x, params)
        by_params = gradients(each, params)[0].flatten(1)
    assert float(each[0]) == float(each[1])
    assert by_params[:, 2].ne(0.0).tolist() == [False, True, True]
    assert by_params[:, 1].ne(0.0).all()
    flax = torch.tensor([[0.0, 0.3, s] for s in (-30.0, -1.0)]).unsqueeze(2).requires_grad_()
    with genfuse.use_backend(backend):
        each = nll(x[:2], flax, layout="flax")
    assert gradients(each, flax)[0][:, 2].ne(0.0).flatten().tolist() == [False, True]
    close(torch.exp(-each[0].double()), torch.tensor(0.5 * 1e-7 / 255.0, dtype=torch.float64), rtol=1e-5, atol=0.0)


def test_levels_are_pixels() -> None:
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(0, 256, (2, 3, 4, 5), generator=generator)
    params = torch.randn(2, 20, 4, 5, generator=generator, dtype=torch.float64)
    expected = nll(levels / 127.5 - 1.0, params)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        close(nll(levels.to(dtype), params), expected)
    close(nll(levels.to(torch.uint8), params.float()), expected.float())
    close(nll(levels % 32, params, bits=5), nll((levels % 32) / 15.5 - 1.0, params, bits=5))


# ---- where the numbers lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(), (1,), (7,), (40,), (5, 13), (4, 16), (3, 2, 5)])
def test_channels_last(space: tuple[int, ...]) -> None:
    """Of parameters, pixels, or both: the same bits, and a gradient that lies as its tensor."""
    generator = torch.Generator().manual_seed(5)
    for channels, components in ((3, 3), (1, 7)):
        each = 10 if channels == 3 else 3
        params = torch.randn(3, each * components, *space, generator=generator)
        x = values(8, torch.float32).flatten()[torch.randint(0, 256, (3, channels, *space), generator=generator)]

        def last(t: Tensor) -> Tensor:
            return t.movedim(1, -1).contiguous().movedim(-1, 1)

        found = []
        for x_last, params_last in itertools.product((False, True), repeat=2):
            leaves = [
                (last(t) if is_last else t).requires_grad_() for t, is_last in ((x, x_last), (params, params_last))
            ]
            result = nll(*leaves)
            by_x, by_params = gradients(result, *leaves)
            assert by_x.stride() == leaves[0].stride()
            assert by_params.stride() == leaves[1].stride()
            found.append([result.detach(), by_x, by_params])
        for more in found[1:]:
            for one, other in zip(found[0], more, strict=True):
                assert torch.equal(one, other)


def test_slices_are_read_where_they_lie() -> None:
    """A part of a larger tensor's batch, rows or channels, contiguous or channels last."""
    generator = torch.Generator().manual_seed(6)
    big = torch.randn(5, 50, 8, 16, generator=generator)
    x = torch.rand(5, 3, 8, 16, generator=generator)
    for whole in (big, big.to(memory_format=torch.channels_last)):
        for cut in ((slice(1, 4), slice(5, 45), slice(None)), (slice(0, 5, 2), slice(0, 20), slice(2, 5))):
            part = whole[cut[0], cut[1], cut[2]]
            pixels = x[cut[0], :, cut[2]]
            assert torch.equal(nll(pixels, part), nll(pixels.contiguous(), part.contiguous()))


@pytest.mark.parametrize("components", [1, 2, 5, 33, 130])
def test_any_number_of_components(components: int) -> None:
    for channels in (1, 3):
        check(make(NLL, {"channels": channels, "components": components}, shape=(2, 19)))


def test_long_rows() -> None:
    """An image's or a second's sum, in float32 or wider."""
    check(make(NLL, "grey", shape=(2, 5000)), make(NLL, "grey", shape=(2, 5000), seed=1))
    one = nll(torch.zeros(1, 1, 300_000), torch.zeros(1, 3, 300_000))
    assert one.item() == pytest.approx(nll(torch.zeros(1, 1, 1), torch.zeros(1, 3, 1)).item() * 300_000, rel=1e-6)


def test_threads_make_no_difference() -> None:
    cases = [(make(NLL, variant, shape=shape)) for variant, shape in (
        ("rgb", (7, 1501)), ("pixel_models, each pixel", (3, 37, 41)), ("grey", (1, 5003)), ("flax", (2003, 1)),
    )]  # fmt: skip
    params = torch.randn(9, 20, 701)
    one: list[list[Tensor]] = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found = [tensor for case in cases for tensor in case.run(case.cotangents())]
        found.append(sample(params, channels=3, rng=torch.tensor([1, 2])))
        one = one or [found]
        assert all(torch.equal(a, b) for a, b in zip(one[0], found, strict=True))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["openai", "pixel_models", "flax", "wavenet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_the_definitions(layout: str, dtype: torch.dtype) -> None:
    """But for the rare pixel where rounding decides: of the component, or of the level."""
    for channels in (1,) if layout == "wavenet" else (1, 3):
        for snap, temperature, bits in ((True, 1.0, 8), (False, 1.0, 8), (True, 0.6, 5), (False, 2.0, 16)):
            generator = torch.Generator().manual_seed(9)
            params = torch.randn(3, 40 if channels == 3 else 12, 9, 23, generator=generator, dtype=torch.float64)
            params = (2.0 * params).to(dtype)
            params[0, 1] = -INF
            u = uniforms(3, 1 + channels, 9, 23)
            options = {"channels": channels, "layout": layout, "bits": bits, "snap": snap, "temperature": temperature}
            found = sample(params, u=u, **options)  # type: ignore[arg-type]
            last = sample(params.to(memory_format=torch.channels_last), u=u, **options)  # type: ignore[arg-type]
            assert torch.equal(found, last)
            assert found.dtype == dtype
            with genfuse.use_backend("reference"):
                exact = sample(params.double(), u=u.to(dtype).double(), **options)  # type: ignore[arg-type]
            step = 2.0 / (2**bits - 1) if snap else 0.0
            off = 64 * torch.finfo(dtype).eps * (1.0 + math.exp(2.0 * 4.0) * temperature)
            wrong = (found.double() - exact).abs() > off
            assert float(wrong.double().mean()) < (2e-3 if dtype == torch.float32 else 1e-9)
            if snap:
                assert bool(((found.double() - exact).abs() < 1.01 * step + off).double().mean() > 0.998)


def test_a_draw_by_hand() -> None:
    """Three channels of one component, and what each takes from those before it."""
    params = torch.tensor([0.0, 0.1, -1.0, 0.5, -0.2, -2.0, -0.7, 0.3, -1.5, 0.9], dtype=torch.float64).view(1, 10, 1)
    u = torch.tensor([0.5, 0.6, 0.3, 0.8], dtype=torch.float64).view(1, 4, 1)
    logit = [math.log(v / (1 - v)) for v in (0.6, 0.3, 0.8)]
    k = [math.tanh(v) for v in (0.5, -0.7, 0.9)]
    for snap in (False, True):
        grid = (lambda v: round((v + 1) * 127.5) / 127.5 - 1) if snap else lambda v: v
        red = grid(0.1 + math.exp(-1.0) * logit[0])
        green = grid(-0.2 + k[0] * red + math.exp(-2.0) * logit[1])
        blue = grid(0.3 + k[1] * red + k[2] * green + math.exp(-1.5) * logit[2])
        found = sample(params, u=u, snap=snap, channels=3)
        close(found.flatten(), torch.tensor([red, green, blue], dtype=torch.float64))


@both
def test_the_ends_of_what_is_drawn(backend: str) -> None:
    with genfuse.use_backend(backend):
        for u, value in ((0.0, -1.0), (1.0 - 2.0**-24, 1.0)):
            wide = sample(grey(0.0, 3.0, torch.float32), u=torch.full((1, 2, 1), u))
            assert float(wide) == value  # clamped
        tail = sample(grey(0.0, -5.0, torch.float64), u=torch.tensor([0.0, 0.0]).view(1, 2, 1), snap=False)
        assert float(tail) == pytest.approx(math.exp(-5.0) * math.log(1e-5 / (1 - 1e-5)), rel=1e-5)
        narrow = sample(grey(0.5, -90.0, torch.float64), u=torch.tensor([0.0, 0.9]).view(1, 2, 1), snap=False)
        assert float(narrow) == pytest.approx(0.5 + math.exp(-7.0) * math.log(9.0), rel=1e-5)  # the least scale
        for bad in (NAN, INF, -INF):
            params = grey(0.5, -5.0, torch.float32)
            params[0, 0] = bad
            assert bool(sample(params, u=torch.full((1, 2, 1), 0.5)).isnan().all())
        dead = grey(NAN, INF, torch.float32, 0.0, 0.25, -7.0)  # the component that is not chosen
        dead[0, 1] = 0.0
        for first in (0.6, 0.9):
            assert float(sample(dead, u=torch.tensor([first, 0.5]).view(1, 2, 1))) == pytest.approx(0.25, abs=4e-3)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_coldest_draw_is_of_the_likeliest_component(dtype: torch.dtype, backend: str) -> None:
    """At its mean; nothing overflows."""
    params = torch.tensor([-40.0, 30.0, 29.0, -0.5, 0.25, 0.75, -1.0, -1.0, -1.0], dtype=dtype).view(1, 9, 1)
    with genfuse.use_backend(backend):
        for u in (0.0, 0.9):
            noise = torch.full((1, 2, 1), u, dtype=dtype)
            found = sample(params, u=noise, temperature=torch.finfo(dtype).tiny, snap=False)
            assert float(found) == pytest.approx(0.25)
    with pytest.raises(RuntimeError, match="temperature"):
        torch.ops.genfuse.discretized_logistic_mixture_sample(
            params, noise, None, 1, 8, 0, -7.0, 1e-46 if dtype == torch.float32 else 1e-310, False
        )


def test_components_are_chosen_as_classes_are() -> None:
    """By inversion in their order; one without weight never, whatever u is."""
    logits = torch.tensor([0.3, -INF, 1.0, -200.0, -0.5, -INF])
    means = torch.linspace(-1.0, 1.0, 6)
    params = torch.cat((logits, means, torch.full((6,), -7.0))).view(1, 18, 1).expand(1, 18, 4001)
    u = torch.stack((torch.linspace(0.0, 1.0 - 2.0**-24, 4001), torch.full((4001,), 0.5))).unsqueeze(0)
    found = sample(params, u=u, snap=False)
    chosen = ops.categorical_sample(logits, 4001, u=u[0, 0])
    close(found.flatten(), means[chosen], rtol=0.0, atol=1e-6)


def test_what_is_drawn_has_the_likelihood_that_is_computed() -> None:
    """Levels' frequencies against the exact probabilities, by chi square."""
    params = torch.tensor([0.2, -0.4, -0.5, 0.6, -1.2, -0.9]).view(1, 6, 1)
    count = 200_000
    drawn = sample(params.expand(1, 6, count), bits=4, rng=torch.tensor([3, 4]))
    levels = ((drawn + 1.0) * 7.5).round().long().flatten()
    expected = torch.exp(-nll(values(4), params.double().expand(16, 6, 1), bits=4))
    assert float(expected.sum()) == pytest.approx(1.0)
    found = torch.bincount(levels, minlength=16)
    assert stats.chisquare(found.numpy(), (expected * count / expected.sum()).numpy()).pvalue > 1e-3


def test_the_random_pair_is_the_houses() -> None:
    params = torch.randn(3, 20, 7, 11)
    rng = torch.tensor([5, 6])
    for shape in ((3, 20, 7, 11), (3, 20, 300), (3, 20)):
        params = torch.randn(shape)
        u = ops.philox_uniform((3, 4, *shape[2:]), seed=5, offset=6)
        assert torch.equal(sample(params, channels=3, rng=rng), sample(params, channels=3, u=u))
        torch.manual_seed(1)
        first = sample(params, channels=3)
        torch.manual_seed(1)
        assert torch.equal(first, sample(params, channels=3))
        generator = torch.Generator().manual_seed(8)
        again = sample(params, channels=3, generator=generator)
        assert torch.equal(again, sample(params, channels=3, generator=torch.Generator().manual_seed(8)))
        assert not torch.equal(again, sample(params, channels=3, generator=generator))
        with genfuse.use_backend("reference"):
            close(sample(params, channels=3, rng=rng), sample(params, channels=3, u=u))


def test_channels_are_found_or_asked_for() -> None:
    assert sample(torch.zeros(1, 20, 2)).shape == (1, 3, 2)
    assert sample(torch.zeros(1, 6, 2)).shape == (1, 1, 2)
    assert sample(torch.zeros(1, 30, 2), layout="wavenet").shape == (1, 1, 2)
    assert sample(torch.zeros(1, 30, 2), u=torch.zeros(1, 4, 2)).shape == (1, 3, 2)
    with pytest.raises(ValueError, match="3 components of 3 channels or of 10 of 1: say which by channels="):
        sample(torch.zeros(1, 30, 2))


def test_samples_compile_and_vectorise() -> None:
    params = torch.randn(4, 20, 5)
    u = uniforms(4, 4, 5).float()
    registry.opcheck(
        torch.ops.genfuse.discretized_logistic_mixture_sample.default,
        (params, u, None, 3, 8, 0, -7.0, 1.0, True),
    )
    registry.opcheck(
        torch.ops.genfuse.discretized_logistic_mixture_sample.default,
        (params, None, torch.tensor([1, 2]), 3, 8, 0, -7.0, 1.0, True),
    )
    compiled = torch.compile(lambda p, u: sample(p, u=u, channels=3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(params, u), sample(params, u=u))
    many = torch.vmap(lambda p, u: sample(p, u=u, channels=3))(params.unsqueeze(1), u.unsqueeze(1))
    assert torch.equal(many.squeeze(1), sample(params, u=u))


def test_the_loss_compiles_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, params: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        return nll(x, params, reduction="bits_per_dim") + ops.categorical_nll(logits, target, reduction="mean")

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    # None is as large as another dimension, for which it would be taken.
    for batch, side in ((2, 9), (6, 4), (8, 11)):
        x = torch.rand(batch, 3, side, 5)
        params, logits = torch.randn(batch, 20, side, 5), torch.randn(batch, 7, side)
        target = torch.randint(0, 7, (batch, side))
        leaves = [x.requires_grad_(), params.requires_grad_(), logits.requires_grad_()]
        expected = loss(*leaves, target)
        found = compiled(*leaves, target)
        close(found, expected)
        close(gradients(found, *leaves), gradients(expected, *leaves))
        assert len([g for g in counter.graphs if any(n.op == "call_function" for n in g.graph.nodes)]) == 1


# ---- mistakes --------------------------------------------------------------------------------------------------------

X, P = torch.zeros(2, 3, 4), torch.zeros(2, 20, 4)
ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([0.0], P), {}, TypeError, "x must be a Tensor, got list"),
    ((X, 1.0), {}, TypeError, "params must be a Tensor, got float"),
    ((X, P.long()), {}, ValueError, "params must be of a floating dtype .*, got torch.int64"),
    ((X.bool(), P), {}, ValueError, "x must be of a floating dtype, or uint8, int16, int32 or int64; got torch.bool"),
    ((X[0], P), {}, RuntimeError, r"x must be \[B, C, ...\] with 1 or 3 channels, got \[3, 4\]"),
    ((torch.zeros(2, 2, 4), P), {}, RuntimeError, r"x must be \[B, C, ...\] with 1 or 3 channels, got \[2, 2, 4\]"),
    ((X, P[:1]), {}, RuntimeError, r"params must have the shape of x, \[2, 3, 4\], but for the number of channels"),
    ((X, P[..., None]), {}, RuntimeError, "params must have the shape of x"),
    ((X, P[:, :19]), {}, RuntimeError, "params must have 10 M channels in dimension 1 for 3 of x"),
    ((X, P[:, :0]), {}, RuntimeError, "params must have 10 M channels"),
    ((X[:, :1], P), {}, RuntimeError, "params must have 3 M channels in dimension 1 for 1 of x"),
    ((X, P.to("meta")), {}, RuntimeError, "x must be on meta, as params is; got cpu"),
    ((X, P), {"bits": 0}, ValueError, "bits must be between 1 and 24, got 0"),
    ((X, P), {"bits": 25}, ValueError, "bits must be between 1 and 24, got 25"),
    ((X, P), {"bits": 8.0}, TypeError, "bits must be an int, got float"),
    ((X, P), {"mode": "fast"}, ValueError, "mode must be one of 'exact', 'openai', got 'fast'"),
    ((X, P), {"layout": "tf"}, ValueError, "layout must be one of 'openai', 'pixel_models', 'flax', 'wavenet'"),
    ((X, P), {"layout": "wavenet"}, ValueError, "layout='wavenet' is of 1 channel, got 3"),
    ((X, P), {"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'pixel', 'sum', 'mean'"),
    ((X, P), {"log_scale_min": NAN}, ValueError, "log_scale_min must be at least|log_scale_min must be finite"),
    ((X, P), {"log_scale_min": "low"}, TypeError, "log_scale_min must be a number, got str"),
    ((X.long() + 256, P), {}, ValueError, r"x must hold levels in \[0, 255\] for bits=8, got 256"),
    ((X.long() - 1, P), {}, ValueError, r"x must hold levels in \[0, 255\] for bits=8, got -1"),
    ((X.to(torch.uint8) + 32, P), {"bits": 5}, ValueError, r"x must hold levels in \[0, 31\] for bits=5, got 32"),
]
U = torch.zeros(2, 4, 4)
SAMPLE_ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((1.0,), {}, TypeError, "params must be a Tensor, got float"),
    ((P.long(),), {}, ValueError, "params must be of a floating dtype"),
    ((P[0, :, 0],), {}, RuntimeError, r"params must have at least 2 dimensions, \[B, P, ...\], got \[20\]"),
    ((P,), {"channels": 2}, ValueError, "channels must be 1 or 3, got 2"),
    ((P,), {"channels": 3.0}, TypeError, "channels must be an int or None, got float"),
    ((P,), {"channels": 1}, RuntimeError, "params must have 3 M channels"),
    ((P[:, :7],), {}, RuntimeError, "params must have 10 M channels"),
    ((P,), {"layout": "wavenet"}, RuntimeError, "params must have 3 M channels"),
    ((P,), {"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
    ((P,), {"temperature": 1e-46}, ValueError, "temperature must be within float32's normal numbers, got 1e-46"),
    ((P,), {"temperature": 1e-39}, ValueError, "temperature must be within float32's normal numbers, got 1e-39"),
    ((P,), {"temperature": 1e39}, ValueError, r"temperature must be within float32's normal numbers, got 1e\+39"),
    ((P,), {"snap": 1}, TypeError, "snap must be a bool, got int"),
    ((P,), {"u": U[:, :, :3]}, RuntimeError, r"u must have shape \[2, 4, 4\], got \[2, 4, 3\]"),
    ((P[:, :3],), {"u": torch.full((2, 5, 4), 0.5)}, RuntimeError, r"u must have shape \[2, 2, 4\], got \[2, 5, 4\]"),
    ((P,), {"u": U[:, :3]}, RuntimeError, r"u must have shape \[2, 4, 4\], got \[2, 3, 4\]"),
    ((P,), {"u": U + 1.0}, ValueError, r"u must be in \[0, 1\)"),
    ((P,), {"u": U * NAN}, ValueError, r"u must be in \[0, 1\)"),
    ((P,), {"u": U.to("meta")}, RuntimeError, "u must be on cpu, as params is; got meta"),
    ((P,), {"u": 0.5}, TypeError, "u must be a Tensor, got float"),
    ((P,), {"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        nll(*arguments, **options)
    assert str(info.value).startswith("discretized_logistic_mixture_nll: ")


@pytest.mark.parametrize(("arguments", "options", "error", "message"), SAMPLE_ERRORS)
def test_errors_of_samples(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as info:
        sample(*arguments, **options)
    assert str(info.value).startswith("discretized_logistic_mixture_sample: ")


def test_direct_callers_cannot_reach_out_of_bounds() -> None:
    ops_ = torch.ops.genfuse
    rest = (8, False, 0, -7.0, False)
    for call in (
        lambda: ops_.discretized_logistic_mixture_nll(X, P[:1], *rest),
        lambda: ops_.discretized_logistic_mixture_nll(X, P[:, :19], *rest),
        lambda: ops_.discretized_logistic_mixture_nll(X[:, :2], P, *rest),
        lambda: ops_.discretized_logistic_mixture_nll(X, P[:, :, :3], *rest),
        lambda: ops_.discretized_logistic_mixture_nll(X, P, 8, False, 4, -7.0, False),
        lambda: ops_.discretized_logistic_mixture_nll(X, P, 63, False, 0, -7.0, False),
        lambda: ops_.discretized_logistic_mixture_nll(X.long(), P, *rest),
        lambda: ops_.discretized_logistic_mixture_nll(X[0, 0], P[0, 0], *rest),
        lambda: ops_.discretized_logistic_mixture_nll_backward(torch.zeros(3), X, P, *rest, 3),
        lambda: ops_.discretized_logistic_mixture_nll_backward(torch.zeros(2), X, P, 8, False, 0, -7.0, True, 3),
        lambda: ops_.discretized_logistic_mixture_sample(P, None, None, 3, 8, 0, -7.0, 1.0, True),
        lambda: ops_.discretized_logistic_mixture_sample(P, U[:1], None, 3, 8, 0, -7.0, 1.0, True),
        lambda: ops_.discretized_logistic_mixture_sample(P, U, None, 2, 8, 0, -7.0, 1.0, True),
        lambda: ops_.discretized_logistic_mixture_sample(P, U, None, 3, 8, 0, -7.0, 0.0, True),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_nothing_is_saved_but_the_inputs() -> None:
    x, params = pictures(torch.float32, 1.0)
    leaf, kept = params.requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nll(x, leaf, reduction="bits_per_dim")
    pointers = {x.data_ptr(), leaf.data_ptr()}
    assert all(tensor.data_ptr() in pointers for tensor in kept)


def test_the_reference_is_public() -> None:
    x, params = pictures(torch.float64, 1.0)
    (found,) = reference.discretized_logistic_mixture_nll(x, params, 8, False, "openai", -7.0, False)
    close(found, nll(x, params))
