"""Splines: what each promises, at the ends, at the knots and in the tails, and that it is the peers' function.

What is asked of all operators (opcheck, gradcheck, compile, vmap, dtypes, sizes, strides, threads) is in
test_operators.py, by the problems of spline_cases.py. The numbered traps are those of the design notes on flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import genfuse
import numpy as np
import pytest
import spline_cases
import torch
import torch.nn.functional as F
from genfuse import ops
from genfuse.reference.flow import spline as reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import DTYPE_NAMES, DTYPES, Problem
from operator_cases import make as make_problem
from tolerances import FACTOR, ULPS, assert_as_accurate, eager_runs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

OPS = tuple(spline_cases.VARIANTS)
CASES = [(op, variant) for op in OPS for variant in spline_cases.VARIANTS[op]]
INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close
both = pytest.mark.parametrize("backend", ["native", "reference"])
every = pytest.mark.parametrize("op", OPS)
either_way = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameters(
    op: str,
    *shape: int,
    bins: int = 8,
    tails: str | None = "linear",
    std: float = 1.0,
    dtype: torch.dtype = torch.float64,
    ends: bool = False,
) -> list[Tensor]:
    """An operator's parameters in its order."""
    counts = spline_cases.counts(op, bins, tails, ends)
    return [(std * torch.randn(*shape, n, dtype=torch.float64)).to(dtype) for n in counts.values()]


def call(op: str, x: Tensor, values: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    y, log_abs_det = getattr(ops, op)(x, *values, **options)
    return y, log_abs_det


def inside(*shape: int, low: float = -3.0, high: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (low + (high - low) * torch.rand(*shape, dtype=torch.float64)).to(dtype)


# ---- against the peers -----------------------------------------------------------------------------------------------


def outcome(function: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Both results and all gradients, of cotangents that are the same for every function."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(4)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


def agree(
    ours: Callable[..., tuple[Tensor, Tensor]],
    theirs: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    rtol: float = 1e-9,
) -> None:
    """In float64 to `rtol`; in float32 our error is at most twice theirs."""
    exact = outcome(theirs, inputs)
    close(outcome(ours, inputs), exact, rtol=rtol, atol=rtol)
    single = [tensor.float() for tensor in inputs]
    exact = outcome(ours, [tensor.double() for tensor in single])
    eager = eager_runs(lambda nudge: outcome(theirs, [nudge(tensor) for tensor in single]))
    for index, (mine, runs, truth) in enumerate(zip(outcome(ours, single), eager, exact, strict=True)):
        assert_as_accurate(mine, runs, truth, f"result {index}", gradient=index > 1)


SHAPE = (40, 9)


@either_way
def test_unconstrained_rational_quadratic_is_nflows(inverse: bool) -> None:
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    inputs = [2.0 * torch.randn(*SHAPE, dtype=torch.float64), *parameters("rational_quadratic_spline", *SHAPE, std=0.5)]
    options = {"inverse": inverse, "tail_bound": 3.0, "min_bin_width": 0.01, "min_derivative": 0.02}
    agree(
        lambda *a: ops.unconstrained_rational_quadratic_spline(*a, **options),
        lambda *a: nflows.unconstrained_rational_quadratic_spline(*a, **options),
        inputs,
    )
    agree(
        lambda *a: ops.unconstrained_rational_quadratic_spline(*a, inverse),
        lambda *a: nflows.unconstrained_rational_quadratic_spline(*a, inverse),
        [0.5 * inputs[0], *inputs[1:]],
    )


@either_way
def test_rational_quadratic_is_nflows(inverse: bool) -> None:
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    box = {"left": -1.0, "right": 2.0, "bottom": 0.5, "top": 1.5}
    low, high = (0.5, 1.5) if inverse else (-1.0, 2.0)
    inputs = [
        inside(*SHAPE, low=low + 1e-3, high=high - 1e-3),
        *parameters("rational_quadratic_spline", *SHAPE, bins=5, tails=None, std=0.5),
    ]
    agree(
        lambda *a: ops.rational_quadratic_spline(*a, inverse=inverse, tails=None, **box),
        lambda *a: nflows.rational_quadratic_spline(*a, inverse=inverse, **box),
        inputs,
    )


@either_way
def test_linear_is_nflows(inverse: bool) -> None:
    nflows = pytest.importorskip("nflows.transforms.splines.linear")
    x, pdf = 2.0 * torch.randn(*SHAPE, dtype=torch.float64), 0.5 * torch.randn(*SHAPE, 8, dtype=torch.float64)
    if inverse:
        # Theirs adds 1e-6 to the end of the last bin before it takes the bin's slope.
        last = pdf.softmax(-1)[..., -1]
        x = torch.where((x > 3.0 - 6.0 * last - 0.01) & (x <= 3.0), x - 3.0, x)
        x = torch.where((x > 3.0 - 6.0 * last - 0.01) & (x <= 3.0), -2.9, x)
    agree(
        lambda *a: ops.linear_spline(*a, inverse=inverse),
        lambda *a: nflows.unconstrained_linear_spline(*a, inverse=inverse, tail_bound=3.0),
        [x, pdf],
    )


@either_way
def test_quadratic_is_nflows(inverse: bool) -> None:
    nflows = pytest.importorskip("nflows.transforms.splines.quadratic")
    inputs = [2.0 * torch.randn(*SHAPE, dtype=torch.float64), *parameters("quadratic_spline", *SHAPE, std=0.5)]
    options = {"inverse": inverse, "tail_bound": 3.0, "min_bin_width": 0.01, "min_bin_height": 0.02}
    agree(
        lambda *a: ops.quadratic_spline(*a, **options),
        lambda *a: nflows.unconstrained_quadratic_spline(*a, **options),
        inputs,
    )
    inputs = [inside(*SHAPE, low=0.001, high=0.999), *parameters("quadratic_spline", *SHAPE, tails=None, std=0.5)]
    agree(
        lambda *a: ops.quadratic_spline(*a, inverse=inverse, tails=None, left=0.0, right=1.0, bottom=0.0, top=1.0),
        lambda *a: nflows.quadratic_spline(*a, inverse=inverse),
        inputs,
    )


def test_cubic_is_nflows() -> None:
    nflows = pytest.importorskip("nflows.transforms.splines.cubic")
    x, w, h, d = [2.0 * torch.randn(*SHAPE, dtype=torch.float64), *parameters("cubic_spline", *SHAPE, std=0.5)]

    def theirs(x: Tensor, w: Tensor, h: Tensor, d: Tensor, inverse: bool = False) -> Any:
        return nflows.unconstrained_cubic_spline(x, w, h, d[..., :1], d[..., 1:], inverse=inverse, tail_bound=3.0)

    agree(ops.cubic_spline, theirs, [x, w, h, d])
    # Theirs goes by a closed form that loses digits, and is another root now and then: no measure but in the mean.
    ours, log_ours = ops.cubic_spline(x, w, h, d, inverse=True)
    again, log_again = theirs(ours, w, h, d)
    close(again, x, rtol=1e-9, atol=1e-9)
    close(log_again, -log_ours, rtol=1e-7, atol=1e-7)
    peer, log_peer = theirs(x, w, h, d, inverse=True)
    near = (peer - ours).abs() < 1e-4
    assert near.double().mean() > 0.95
    close(log_peer[near], log_ours[near], rtol=1e-2, atol=1e-2)


@either_way
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_rational_quadratic_is_normflows(tails: str, inverse: bool) -> None:
    normflows = pytest.importorskip("normflows.utils.splines")
    inputs = [
        2.0 * torch.randn(*SHAPE, dtype=torch.float64),
        *parameters("rational_quadratic_spline", *SHAPE, tails=tails, std=0.5),
    ]
    options = {"inverse": inverse, "tails": tails, "tail_bound": 2.5}
    agree(
        lambda *a: ops.unconstrained_rational_quadratic_spline(*a, **options),
        lambda *a: normflows.unconstrained_rational_quadratic_spline(*a, **options),
        inputs,
    )


@either_way
def test_rational_quadratic_is_zukos(inverse: bool) -> None:
    zuko = pytest.importorskip("zuko")
    inputs = [3.0 * torch.randn(*SHAPE, dtype=torch.float64), *parameters("rational_quadratic_spline", *SHAPE, std=0.5)]

    def theirs(x: Tensor, *values: Tensor) -> Any:
        transform = zuko.transforms.MonotonicRQSTransform(*values, bound=5.0)
        return (transform.inv if inverse else transform).call_and_ladj(x)

    agree(
        lambda *a: ops.rational_quadratic_spline(*a, inverse=inverse, tail_bound=5.0, normalizer="zuko"), theirs, inputs
    )


@either_way
def test_rational_quadratic_is_pyros(inverse: bool) -> None:
    pyro = pytest.importorskip("pyro.distributions.transforms.spline")
    x, w, h, d = [
        2.0 * torch.randn(*SHAPE, dtype=torch.float64),
        *parameters("rational_quadratic_spline", *SHAPE, std=0.5),
    ]
    least = 1e-3

    def ours(x: Tensor, w: Tensor, h: Tensor, d: Tensor) -> Any:
        d = F.pad(d, (1, 1), value=1.0 - 2.0 * least)  # their slope at the ends is 1 - min_derivative
        return ops.rational_quadratic_spline(x, w, h, d, inverse=inverse, normalizer="none", min_derivative=least)

    def theirs(x: Tensor, w: Tensor, h: Tensor, d: Tensor) -> Any:
        return pyro._monotonic_rational_spline(x, w, h, d, inverse=inverse, bound=3.0, min_derivative=least)

    agree(ours, theirs, [x, w.softmax(-1), h.softmax(-1), d.exp()])


@either_way
@pytest.mark.parametrize("tails", ["linear", None])
def test_transform_is_that_of_vits(tails: str | None, inverse: bool) -> None:
    """Whose definition is nflows', with an interval of [0, 1] where there are no tails."""
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x = inside(4, 1, 50, low=0.001, high=0.999) if tails is None else 3.0 * torch.randn(4, 1, 50, dtype=torch.float64)
    inputs = [x, *parameters("rational_quadratic_spline", 4, 1, 50, bins=10, tails=tails, std=0.5)]
    more = {"tails": tails, "tail_bound": 5.0} if tails else {}

    def theirs(*a: Tensor) -> Any:
        if tails is None:
            return nflows.rational_quadratic_spline(*a, inverse=inverse)
        return nflows.unconstrained_rational_quadratic_spline(*a, inverse=inverse, **more)

    agree(lambda *a: ops.piecewise_rational_quadratic_transform(*a, inverse=inverse, **more), theirs, inputs)


@either_way
def test_unconstrained_rational_quadratic_is_transformers(inverse: bool) -> None:
    vits = pytest.importorskip("transformers.models.vits.modeling_vits")
    inputs = [3.0 * torch.randn(*SHAPE, dtype=torch.float64), *parameters("rational_quadratic_spline", *SHAPE, std=0.5)]
    agree(
        lambda *a: ops.unconstrained_rational_quadratic_spline(*a, inverse=inverse, tail_bound=5.0),
        lambda *a: vits._unconstrained_rational_quadratic_spline(*a, reverse=inverse, tail_bound=5.0),
        inputs,
    )


def test_what_no_peer_offers_is_refused_as_they_do() -> None:
    values = parameters("rational_quadratic_spline", 3)
    with pytest.raises(RuntimeError, match="circle tails are not implemented"):
        ops.unconstrained_rational_quadratic_spline(torch.zeros(3).double(), *values, tails="circle")
    with pytest.raises(RuntimeError, match="circular tails are not implemented"):
        ops.piecewise_rational_quadratic_transform(torch.zeros(3).double(), *values, tails="circular")


# ---- trap 1: the derivatives' floor, and a slope of 1 at the ends ----------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_slope_at_the_ends_of_linear_tails_is_one(dtype: torch.dtype, backend: str) -> None:
    for bound in (1.0, 3.0, 50.0):
        for normalizer in ("softmax", "identity", "zuko"):
            for bins in (1, 2, 8, 11):
                values = parameters("rational_quadratic_spline", 16, bins=bins, std=3.0, dtype=dtype)
                x = torch.tensor([-bound, bound], dtype=dtype).repeat(8).requires_grad_()
                options = {"tail_bound": bound, "normalizer": normalizer}
                with genfuse.use_backend(backend):
                    y, log_abs_det = call("rational_quadratic_spline", x, values, **options)
                    back, log_back = call("rational_quadratic_spline", x, values, inverse=True, **options)
                close(y, x, rtol=2 * torch.finfo(dtype).eps, atol=0.0)  # the last knot is a sum
                assert torch.equal(log_abs_det, torch.zeros_like(x))
                slope = torch.autograd.grad(y.sum(), x)[0]
                close(
                    slope,
                    torch.ones_like(x),
                    rtol=0.0,
                    atol=(8 if backend == "native" else 1e4) * torch.finfo(dtype).eps,
                )
                # Of the inverse the place in the bin is rounded, where bins are narrow by much of their width.
                narrow = 1e4 * torch.finfo(dtype).eps
                close(back, x.detach(), rtol=narrow, atol=0.0)
                close(log_back, torch.zeros_like(x), rtol=0.0, atol=1e3 * narrow)


@both
def test_slopes_at_knots_are_softplus_above_the_floor(backend: str) -> None:
    """Where softplus is next to 0, next to the threshold at which torch's is linear (20), and far beyond."""
    raw = torch.tensor([-1e4, -200.0, -50.0, -5.0, 0.0, 5.0, 19.99, 20.01, 50.0, 200.0, 1e4], dtype=torch.float64)
    least = 0.01
    width = torch.zeros(2, dtype=torch.float64)
    for normalizer, slope in (
        ("softmax", least + F.softplus(raw)),
        ("identity", least + F.softplus(raw, beta=math.log(2) / (1 - least))),
    ):
        for dtype in (torch.float64, torch.float32):
            x = torch.zeros(len(raw), dtype=dtype)  # the knot in the middle
            with genfuse.use_backend(backend):
                found = call(
                    "rational_quadratic_spline",
                    x,
                    [width.to(dtype), width.to(dtype), raw[:, None].to(dtype)],
                    min_derivative=least,
                    normalizer=normalizer,
                )[1]
            close(found.double(), slope.log(), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-6)
        with genfuse.use_backend(backend):
            raw.requires_grad_()
            log_abs_det = call(
                "rational_quadratic_spline",
                torch.zeros(len(raw), dtype=torch.float64),
                [width, width, raw[:, None]],
                min_derivative=least,
                normalizer=normalizer,
            )[1]
            gradient = torch.autograd.grad(log_abs_det.sum(), raw)[0]
            raw.requires_grad_(False)
        assert gradient.isfinite().all()
        assert (gradient >= 0).all()


@both
def test_parameters_of_zero_are_the_identity(backend: str) -> None:
    x = 2.0 * torch.randn(500)
    with genfuse.use_backend(backend):
        for packed, tails in ((23, "linear"), (24, "circular")):
            y, log_abs_det = ops.rational_quadratic_spline(
                x, torch.zeros(packed), tails=tails, normalizer="identity", min_derivative=0.3
            )
            close(y, x, rtol=0.0, atol=1e-6)
            close(log_abs_det, torch.zeros_like(x), rtol=0.0, atol=2e-6)
        y, log_abs_det = ops.rational_quadratic_spline(x, torch.zeros(23), normalizer="zuko")
        close(y, x, rtol=0.0, atol=1e-6)
        zeros = torch.zeros(500, 8)
        y, log_abs_det = ops.unconstrained_rational_quadratic_spline(
            x, zeros, zeros, zeros[:, 1:], enable_identity_init=True
        )
        close(y, x, rtol=0.0, atol=1e-6)
        y, log_abs_det = ops.linear_spline(x, torch.zeros(8))
        close(y, x, rtol=0.0, atol=1e-6)
        assert torch.equal(log_abs_det, torch.zeros_like(x))


def test_circular_tails_have_one_slope_at_both_ends() -> None:
    values = parameters("rational_quadratic_spline", 5, tails="circular")
    x = torch.tensor([-3.0, 3.0], dtype=torch.float64)[:, None].expand(2, 5).contiguous()
    log_abs_det = call("rational_quadratic_spline", x, values, tails="circular")[1]
    expected = (1e-3 + F.softplus(values[2][:, 0])).log()
    close(log_abs_det, expected.expand(2, 5), rtol=1e-10, atol=1e-10)


# ---- trap 2: least bins, pinned ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rational_quadratic_spline", "quadratic_spline", "cubic_spline"])
def test_bins_that_do_not_fit(op: str) -> None:
    values = parameters(op, 2, bins=8)
    x = torch.zeros(2, dtype=torch.float64)
    for name in ("min_bin_width", "min_bin_height"):
        with pytest.raises(ValueError, match=rf"{op}: {name} must be at most 1 / 8, for 8 bins; got 0.126"):
            call(op, x, values, **{name: 0.126})
        with pytest.raises(ValueError, match=rf"{op}: {name} must be at least 0, got -0.1"):
            call(op, x, values, **{name: -0.1})
        assert call(op, x, values, **{name: 0.125})[0].isfinite().all()


@both
def test_least_bins_are_kept(backend: str) -> None:
    """However far apart the logits: the slope of a bin whose height is the least and whose width the largest."""
    widths, heights = torch.full((4,), -80.0), torch.full((4,), -80.0)
    widths[1] = heights[2] = 80.0
    x = torch.linspace(-2.99, 2.99, 301)
    for least in (1e-3, 0.1):
        with genfuse.use_backend(backend):
            options = {"min_bin_width": least, "min_bin_height": least}
            y = ops.rational_quadratic_spline(x, widths, heights, torch.zeros(3), **options)[0]
            assert (y.diff() >= -1e-6).all()
            knots = 6.0 * torch.tensor([0.0, least, 1 - 2 * least, 1 - least, 1.0]) - 3.0
            heights_at = 6.0 * torch.tensor([0.0, least, 2 * least, 1 - least, 1.0]) - 3.0
            at_knots = ops.rational_quadratic_spline(knots, widths, heights, torch.zeros(3), **options)[0]
        close(at_knots, heights_at, rtol=0.0, atol=1e-3 if least == 1e-3 else 2e-5)


@both
@either_way
@every
def test_ends_are_pinned(op: str, inverse: bool, backend: str) -> None:
    """left gives bottom and right gives top, to the last place or two, however the bins' sizes add up."""
    for dtype in (torch.float32, torch.float64):
        for left, right, bottom, top in ((0.0, 1.0, -2.0, 5.0), (-0.3, 0.7, 0.1, 0.2), (-50.0, 50.0, -50.0, 50.0)):
            for bins in (2, 8, 33):
                values = parameters(op, 32, bins=bins, tails=None, dtype=dtype)
                options = {"left": left, "right": right, "bottom": bottom, "top": top, "inverse": inverse}
                ends, images = ((bottom, top), (left, right)) if inverse else ((left, right), (bottom, top))
                for end, image in zip(ends, images, strict=True):
                    x = torch.full((32,), end, dtype=dtype)
                    with genfuse.use_backend(backend):
                        y, log_abs_det = call(op, x, values, tails=None, **options)
                    want = torch.full((32,), image, dtype=dtype)
                    atol = 4e2 * torch.finfo(dtype).eps * (top - bottom + right - left)
                    exact = not inverse and op == "rational_quadratic_spline"
                    scale = max(abs(bottom), abs(top))
                    close(y, want, rtol=0.0, atol=2 * torch.finfo(dtype).eps * scale if exact else atol)
                    assert log_abs_det.isfinite().all()
                    assert ((y >= images[0]) & (y <= images[1])).all()


# ---- trap 3: at the bound and at knots, in every dtype ---------------------------------------------------------------


@both
@either_way
@dtypes
@every
def test_at_the_bound(op: str, dtype: torch.dtype, inverse: bool, backend: str) -> None:
    for bound in (0.5, 1.0, 3.0, 50.0):
        ends = torch.tensor([-bound, bound], dtype=dtype)
        beyond = torch.nextafter(ends, 2 * ends) if dtype in (torch.float32, torch.float64) else 1.01 * ends
        within = torch.nextafter(ends, 0 * ends) if dtype in (torch.float32, torch.float64) else 0.99 * ends
        for bins in (2, 8, 16):
            x = torch.cat([ends, beyond, within]).requires_grad_()
            values = [v.requires_grad_() for v in parameters(op, 6, bins=bins, dtype=dtype)]
            with genfuse.use_backend(backend):
                y, log_abs_det = call(op, x, values, tail_bound=bound, inverse=inverse)
                gradients = torch.autograd.grad([y.sum() + log_abs_det.sum()], [x, *values])
            assert y.dtype == log_abs_det.dtype == dtype
            close(y[:2], x.detach()[:2], rtol=(2 if dtype.itemsize == 2 else 1e4) * torch.finfo(dtype).eps, atol=0.0)
            assert (y[4:].abs() <= bound).all()
            assert torch.equal(y[2:4], x[2:4])
            assert torch.equal(log_abs_det[2:4], torch.zeros(2, dtype=dtype))
            for result in (log_abs_det, *gradients):
                assert result.isfinite().all()


@both
@either_way
@dtypes
def test_at_every_knot(dtype: torch.dtype, inverse: bool, backend: str) -> None:
    for bound in (1.0, 3.0, 50.0):
        for bins in (1, 2, 8, 21):
            w, h, d = parameters("rational_quadratic_spline", bins=bins, dtype=dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            size = reference._sizes(w.to(wide), 1e-3, "softmax"), reference._sizes(h.to(wide), 1e-3, "softmax")
            xs, ys = (reference._knots(one, -bound, bound) for one in size)
            slopes = reference._slopes(d.to(wide), 1e-3, "softmax", "one")
            if inverse:
                xs, ys, slopes = ys, xs, 1 / slopes
            x = xs.to(dtype).requires_grad_()
            with genfuse.use_backend(backend):
                y, log_abs_det = ops.rational_quadratic_spline(x, w, h, d, tail_bound=bound, inverse=inverse)
                slope = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
                other = torch.autograd.grad(log_abs_det.sum(), x)[0]
            assert slope.isfinite().all()
            assert other.isfinite().all()
            if dtype.itemsize == 2:  # the number next to a knot is none
                continue
            rounding = 1e3 * torch.finfo(dtype).eps
            close(y, ys, rtol=0.0, atol=rounding * bound)
            close(log_abs_det, slopes.log(), rtol=0.0, atol=100 * rounding)
            close(slope, slopes, rtol=100 * rounding, atol=100 * rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every
def test_half_types_are_float32_rounded(op: str, dtype: torch.dtype) -> None:
    """Whatever lies at knots, at the bound, outside."""
    x = torch.linspace(-4.0, 4.0, 800).to(dtype)
    values = parameters(op, 800, dtype=dtype)
    for inverse in (False, True):
        y, log_abs_det = call(op, x, values, inverse=inverse)
        wide = call(op, x.float(), [value.float() for value in values], inverse=inverse)
        assert torch.equal(y, wide[0].to(dtype))
        assert torch.equal(log_abs_det, wide[1].to(dtype))


# ---- trap 4: all in the tails, nothing at all, outside of the domain -------------------------------------------------


@both
@either_way
@every
def test_all_in_the_tails(op: str, inverse: bool, backend: str) -> None:
    x = torch.tensor([-1e30, -3.5, 3.5, 1e30, INF, -INF, 4.0]).requires_grad_()
    values = [value.requires_grad_() for value in parameters(op, 7, dtype=torch.float32)]
    with genfuse.use_backend(backend):
        y, log_abs_det = call(op, x, values, inverse=inverse)
        gradients = torch.autograd.grad([y, log_abs_det], [x, *values], [torch.arange(7.0), torch.ones(7)])
    assert torch.equal(y, x)
    assert torch.equal(log_abs_det, torch.zeros(7))
    assert torch.equal(gradients[0], torch.arange(7.0))  # trap 7: nothing of what is not used is NaN
    for gradient in gradients[1:]:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
@every
def test_nothing_at_all(op: str, backend: str) -> None:
    for tails in ("linear", None):
        for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
            x, values = torch.zeros(shape), parameters(op, *shape, tails=tails, dtype=torch.float32)
            with genfuse.use_backend(backend):
                y, log_abs_det = call(op, x.requires_grad_(), values, tails=tails)
                assert y.shape == log_abs_det.shape == shape
                y.sum().backward()
                assert call(op, x, values, tails=tails, reduce_dims=-1)[1].shape == shape[:-1]
            assert x.grad is not None
            assert x.grad.shape == shape


@both
@either_way
@every
def test_outside_of_the_domain(op: str, inverse: bool, backend: str) -> None:
    box = {"tails": None, "left": 0.0, "right": 1.0, "bottom": 2.0, "top": 4.0, "inverse": inverse}
    low, high = (2.0, 4.0) if inverse else (0.0, 1.0)
    values = parameters(op, 3, tails=None)
    with genfuse.use_backend(backend):
        for wrong in (low - 0.001, high + 0.001, INF, -INF):
            x = torch.tensor([low, high, wrong], dtype=torch.float64)
            with pytest.raises(ops.InputOutsideDomain, match=rf"{op}: x must lie in \[{low}, {high}\] without tails"):
                call(op, x, values, **box)
            with pytest.raises(ValueError, match="without tails"):
                call(op, x, values, **box)
            # Where values cannot be looked at, NaN says so.
            y, log_abs_det = torch.vmap(lambda x: call(op, x, values, **box))(x[None])
            assert y.isnan().tolist() == log_abs_det.isnan().tolist() == [[False, False, True]]


# ---- trap 5: the inverse never aborts --------------------------------------------------------------------------------


@both
@every
def test_inverse_of_wild_parameters(op: str, backend: str) -> None:
    """Bins from the least to nearly all, slopes from the floor to hundreds: a discriminant next to 0 and below it."""
    for dtype in (torch.float32, torch.float64):
        for std in (3.0, 30.0):
            values = parameters(op, 4000, std=std, dtype=dtype)
            x = inside(4000, dtype=dtype)
            with genfuse.use_backend(backend):
                y, log_abs_det = call(op, x, values, inverse=True)
            assert (y.abs() <= 3.0).all()
            if op == "rational_quadratic_spline":
                assert log_abs_det.isfinite().all()
            else:
                assert not log_abs_det.isnan().any()


@both
def test_a_discriminant_of_zero(backend: str) -> None:
    """In a steep bin between knots of the least slope, at its ends, where b^2 - 4 a c cancels to nothing."""
    for dtype in (torch.float32, torch.float64):
        for least in (1e-6, 1e-3):
            widths = torch.tensor([0.0, -8.0, 0.0], dtype=dtype)
            heights = torch.tensor([-8.0, 8.0, -8.0], dtype=dtype)
            slopes = torch.full((2,), -100.0, dtype=dtype)
            size = reference._sizes(heights, 1e-3, "softmax")
            knots = reference._knots(size, -3.0, 3.0)
            y = torch.cat([knots, torch.nextafter(knots, knots + 1), torch.nextafter(knots, knots - 1)]).clamp(-3, 3)
            y.requires_grad_()
            with genfuse.use_backend(backend):
                x, log_abs_det = ops.rational_quadratic_spline(
                    y, widths, heights, slopes, inverse=True, min_derivative=least
                )
                gradients = torch.autograd.grad(x.sum() + log_abs_det.sum(), y)
            for result in (x, log_abs_det, *gradients):
                assert result.isfinite().all()
            assert (x.abs() <= 3.0 + 1e-5).all()


# ---- trap 6: sums of the log-determinant -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_over_an_image_are_float32(dtype: torch.dtype, backend: str) -> None:
    shape = (2, 3, 64, 64)
    values = parameters("rational_quadratic_spline", *shape, bins=4, dtype=dtype)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    with genfuse.use_backend(backend):
        total = call("rational_quadratic_spline", x, values, reduce_dims=(1, 2, 3))[1]
        other = call("rational_quadratic_spline", x, values, reduce_dims=(0, 2))[1]
    exact = call("rational_quadratic_spline", x.double(), [value.double() for value in values])[1]
    assert total.dtype == other.dtype == torch.float32
    size = exact.abs().sum((1, 2, 3))
    assert ((total - exact.sum((1, 2, 3))).abs() <= 1e-5 * size).all()
    close(other.double(), exact.sum((0, 2)), rtol=2e-2, atol=0.5)  # elements, which half types have rounded


# ---- trap 7: what is masked has no gradient of NaN -------------------------------------------------------------------


@both
@either_way
@every
def test_elements_outside_disturb_no_gradient(op: str, inverse: bool, backend: str) -> None:
    x = inside(50)
    values = parameters(op, 50)

    def gradients(x: Tensor) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *values)]
        with genfuse.use_backend(backend):
            y, log_abs_det = call(op, leaves[0], leaves[1:], inverse=inverse)
        found = torch.autograd.grad(y.sum() + log_abs_det.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in found), leaves)
        return [*(g.detach() for g in found), *second]

    clean = gradients(x)
    places = torch.arange(0, 50, 5)
    for wild in (1e30, -INF, INF, 3.5):
        moved = x.clone()
        moved[places] = wild
        found = gradients(moved)
        keep = torch.ones(50, dtype=torch.bool)
        keep[places] = False
        for index, (one, other) in enumerate(zip(found, clean, strict=True)):
            close(one[keep], other[keep], rtol=1e-12, atol=1e-12)
            want = torch.ones_like(one[places]) if index == 0 else torch.zeros_like(one[places])
            assert torch.equal(one[places], want), index


# ---- NaN -------------------------------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("tails", ["linear", None])
@every
def test_nan_of_any_parameter(op: str, tails: str | None, inverse: bool) -> None:
    """Where the definition has NaN, and nowhere else: in that element, if the parameter is one that it uses."""
    names = list(spline_cases.counts(op, 5, tails, False))
    values = parameters(op, 20, bins=5, tails=tails)
    x = inside(20)
    if tails is not None:
        x[:3] = torch.tensor([-7.0, 7.0, INF])
    clean = call(op, x, values, tails=tails, inverse=inverse)
    for which, name in enumerate(names):
        for place in range(values[which].shape[-1]):
            spoiled = [value.clone() for value in values]
            spoiled[which][::2, place] = NAN
            found = call(op, x, spoiled, tails=tails, inverse=inverse)
            with genfuse.use_backend("reference"):
                expected = call(op, x, spoiled, tails=tails, inverse=inverse)
            for one, definition, other in zip(found, expected, clean, strict=True):
                assert torch.equal(one.isnan(), definition.isnan()), (name, place)
                assert torch.equal(one[1::2], other[1::2])
            if name in ("widths", "heights", "pdf"):  # all bins of a softmax
                used = (x[::2] >= -3) & (x[::2] <= 3)
                assert torch.equal(found[0][::2].isnan(), used)
                assert torch.equal(found[1][::2].isnan(), used)


@both
@either_way
@every
def test_nan_does_not_abort(op: str, inverse: bool, backend: str) -> None:
    for dtype in DTYPES:
        for tails in ("linear", None):
            values = [torch.full_like(value, NAN) for value in parameters(op, 9, tails=tails, dtype=dtype)]
            x = torch.linspace(-3, 3, 9).to(dtype)
            x[4] = NAN
            leaves = [tensor.requires_grad_() for tensor in (x, *values)]
            with genfuse.use_backend(backend):
                y, log_abs_det = call(op, leaves[0], leaves[1:], tails=tails, inverse=inverse)
                torch.autograd.grad(y.sum() + log_abs_det.sum(), leaves)
            assert y[4].isnan()
            assert log_abs_det[4].isnan()
            if op != "rational_quadratic_spline" or inverse:
                continue
            assert y[1:-1].isnan().all()


# ---- traps 14, 15: double backward at its edges, types that differ ---------------------------------------------------


@either_way
@every
def test_second_derivatives_are_finite_everywhere(op: str, inverse: bool) -> None:
    x = torch.cat([torch.linspace(-4, 4, 33, dtype=torch.float64), torch.tensor([-3.0, 3.0, 0.0]).double()])
    leaves = [tensor.requires_grad_() for tensor in (x, *parameters(op, 36, bins=4, std=2.0))]
    y, log_abs_det = call(op, leaves[0], leaves[1:], inverse=inverse)
    first = torch.autograd.grad(y.sin().sum() + log_abs_det.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for gradient in (*first, *second):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_parameters_of_float32_inputs_under_autocast(dtype: torch.dtype) -> None:
    """As a network under autocast gives them: computed in float32, and gradients of each one's own type."""
    for op in OPS:
        x, values = torch.randn(30, requires_grad=True), [v.requires_grad_() for v in parameters(op, 30, dtype=dtype)]
        with torch.autocast("cpu", dtype=dtype):
            y, log_abs_det = call(op, x, values)
            total = call(op, x, values, reduce_dims=0)[1]
        wide = [v.detach().float().requires_grad_() for v in values]
        expected = call(op, x, wide)
        assert torch.equal(y, expected[0])
        assert torch.equal(log_abs_det, expected[1])
        assert y.dtype == log_abs_det.dtype == total.dtype == torch.float32
        gradients = torch.autograd.grad(y.sum() + log_abs_det.sum(), [x, *values])
        theirs = torch.autograd.grad(expected[0].sum() + expected[1].sum(), [x, *wide])
        for one, other, like in zip(gradients, theirs, [x, *values], strict=True):
            assert one.dtype == like.dtype
            assert torch.equal(one, other.to(like.dtype))
        with pytest.raises(RuntimeError, match=r"must be torch\.float32, the dtype of x; got"):
            call(op, x, values)


# ---- accuracy --------------------------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("bins", [8, 64, 250])
@every
def test_errors_are_distributed_as_eagers(op: str, bins: int, inverse: bool) -> None:
    """Quantiles of the errors of many elements, where the largest one is the luck of the narrowest bin."""
    count = {8: 6000, 64: 1500, 250: 600}[bins]
    x, values = inside(count, dtype=torch.float32), parameters(op, count, bins=bins, dtype=torch.float32)
    inputs = [x, *values]

    def run(inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        with genfuse.use_backend(backend):
            return outcome(lambda *a: call(op, a[0], a[1:], inverse=inverse, min_bin_width=1e-4, min_bin_height=1e-4)
                           if op != "linear_spline" else call(op, a[0], a[1:], inverse=inverse), inputs)  # fmt: skip

    exact = run([tensor.double() for tensor in inputs], "reference")
    parts = torch.tensor([0.5, 0.8] if count < 1000 else [0.5, 0.8, 0.95], dtype=torch.float64)
    for index, (mine, theirs, truth) in enumerate(
        zip(run(inputs, "native"), run(inputs, "reference"), exact, strict=True)
    ):

        def error(found: Tensor, truth: Tensor = truth) -> Tensor:
            difference = (found.double() - truth).abs()
            return torch.quantile(difference.amax(-1) if difference.dim() > 1 else difference, parts)

        ulp = ULPS * torch.finfo(torch.float32).eps * float(truth.abs().median())
        ours, eager = error(mine), error(theirs)
        assert (ours <= FACTOR * eager + ulp).all(), (index, (ours / eager).tolist())


def in_long_double(x: Tensor, w: Tensor, h: Tensor, d: Tensor, inverse: bool) -> tuple[Any, Any]:
    """A rational-quadratic spline on [-3, 3] of numpy's widest numbers, of the paper's formulas."""
    wide = np.longdouble
    least, bound, bins = wide(1e-3), wide(3), w.shape[-1]

    def knots(logits: Tensor) -> Any:
        u = logits.numpy().astype(wide)
        p = np.exp(u - u.max(-1, keepdims=True))
        sizes = least + (1 - least * bins) * p / p.sum(-1, keepdims=True)
        inner = 2 * bound * np.cumsum(sizes, -1)[:, :-1] - bound
        end = np.full_like(inner[:, :1], bound)
        return np.concatenate([-end, inner, end], -1)

    at, xs, ys = x.numpy().astype(wide), knots(w), knots(h)
    slopes = np.pad(least + np.log1p(np.exp(d.numpy().astype(wide))), ((0, 0), (1, 1)), constant_values=1)
    k = (at[:, None] >= (ys if inverse else xs)[:, 1:-1]).sum(-1)[:, None]

    def pick(values: Any, index: Any) -> Any:
        return np.take_along_axis(values, index, -1)[:, 0]

    x_k, y_k, d_0, d_1 = pick(xs, k), pick(ys, k), pick(slopes, k), pick(slopes, k + 1)
    width, height = pick(xs, k + 1) - x_k, pick(ys, k + 1) - y_k
    s = height / width
    bend = d_0 + d_1 - 2 * s
    if inverse:
        a, b, c = height * (s - d_0) + (at - y_k) * bend, height * d_0 - (at - y_k) * bend, -s * (at - y_k)
        t = 2 * c / (-b - np.sqrt(b * b - 4 * a * c))
    else:
        t = (at - x_k) / width
    below = s + bend * t * (1 - t)
    log_slope = np.log(s**2 * (d_1 * t**2 + 2 * s * t * (1 - t) + d_0 * (1 - t) ** 2) / below**2)
    if inverse:
        return x_k + t * width, -log_slope
    return y_k + height * (s * t**2 + d_0 * t * (1 - t)) / below, log_slope


@pytest.mark.skipif(np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="no numbers wider than float64")
@either_way
@pytest.mark.parametrize("bins", [8, 9, 32])
def test_float64_errors_are_distributed_as_eagers(bins: int, inverse: bool) -> None:
    x, (w, h, d) = inside(4000), parameters("rational_quadratic_spline", 4000, bins=bins)
    exact = in_long_double(x, w, h, d, inverse)
    ours = ops.rational_quadratic_spline(x, w, h, d, inverse=inverse)
    with genfuse.use_backend("reference"):
        theirs = ops.rational_quadratic_spline(x, w, h, d, inverse=inverse)
    for mine, eager, truth in zip(ours, theirs, exact, strict=True):
        errors = [
            np.quantile(np.abs(found.numpy() - truth).astype(np.float64), [0.5, 0.9, 0.99]) for found in (mine, eager)
        ]
        assert (errors[0] <= FACTOR * errors[1]).all()


@every
def test_round_trips(op: str) -> None:
    """x -> y -> x is off by what y's rounding, some units of the bound's last place, is worth in x: times dx / dy."""
    for dtype in (torch.float32, torch.float64):
        for bound in (1.0, 50.0):
            for bins in (3, 8, 20):
                x = inside(4000, low=-1.2 * bound, high=1.2 * bound, dtype=dtype)
                values = parameters(op, 4000, bins=bins, dtype=dtype)
                y, forward = call(op, x, values, tail_bound=bound)
                back, inverse = call(op, y, values, tail_bound=bound, inverse=True)
                rounding = 8 * torch.finfo(dtype).eps * bound
                steepest = torch.maximum((-forward).exp(), inverse.exp())  # dx / dy on either side of a knot
                assert ((back - x).abs() <= rounding * (1 + steepest)).all()
                again, _ = call(op, back, values, tail_bound=bound)
                assert ((again - y).abs() <= 2 * rounding * (1 + forward.exp()) * (1 + steepest)).all()
                assert torch.equal(back[x.abs() > bound], x[x.abs() > bound])
                # Slopes are as far apart as the places are, by what the slope changes: mostly nothing.
                apart = (forward + inverse).abs().double().quantile(0.95)
                assert apart <= 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_log_abs_det_is_of_the_slope_of_y(op: str, variant: str) -> None:
    problem = make_problem(op, variant, dtype=torch.float64, shape=(40, 7))
    options = {name: value for name, value in problem.options.items() if name != "reduce_dims"}
    x = problem.inputs["x"].requires_grad_()
    y, log_abs_det = Problem(op, problem.inputs, options).call()
    slope = torch.autograd.grad(y.sum(), x)[0]
    assert (slope > 0).all()
    close(slope.log(), log_abs_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_monotone(op: str, variant: str) -> None:
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(op, variant, dtype=dtype, shape=(2, 7))
        options = {name: value for name, value in problem.options.items() if name != "reduce_dims"}
        low, high = (-6.0, 6.0)
        if options.get("tails", "linear") is None:
            low, high = (
                (options["bottom"], options["top"]) if options.get("inverse") else (options["left"], options["right"])
            )
        x = torch.linspace(low, high, 4001, dtype=dtype).view(-1, 1, 1).expand(4001, 2, 7)
        y = Problem(op, {**problem.inputs, "x": x}, options).call()[0]
        slack = 0.0 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps * 6.0
        assert (y.diff(dim=0) >= -slack).all()


# ---- how parameters are given ----------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("bins", [1, 2, 7, 8, 9, 16])
def test_packed_is_separate(bins: int, tails: str | None, inverse: bool) -> None:
    for op in OPS if tails != "circular" else OPS[:1]:
        if op == "linear_spline" or (op == "quadratic_spline" and bins == 1):
            continue
        values = [v.requires_grad_() for v in parameters(op, 37, bins=bins, tails=tails, dtype=torch.float32)]
        x = inside(37, dtype=torch.float32).requires_grad_()
        packed = torch.cat(values, -1)
        separate, together = (call(op, x, v, tails=tails, inverse=inverse) for v in (values, [packed]))
        for one, other in zip(separate, together, strict=True):
            assert torch.equal(one, other)
        gradients = [torch.autograd.grad(y.sum() + log.sum(), [x, *values]) for y, log in (separate, together)]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


def copies(function: Callable[[], Any]) -> set[str]:
    """Which operators that copy torch ran within a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = {event.name for event in profile.events()}
    assert "genfuse::spline" in names
    return names & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::_to_copy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bins", [4, 8])
def test_parameters_of_an_image_are_read_where_they_lie(bins: int, dtype: torch.dtype) -> None:
    """[B, d P, H, W] -> [B, d, H, W, P] as nflows permutes the output of a convolution; the gradient lies so, too."""
    per = 3 * bins - 1
    network = torch.randn(2, 3 * per, 5, 6, dtype=dtype)
    view = network.view(2, 3, per, 5, 6).permute(0, 1, 3, 4, 2)
    x = torch.randn(2, 3, 5, 6, dtype=dtype)
    leaf = view.clone().requires_grad_()
    assert leaf.stride() == view.stride()
    assert copies(lambda: ops.rational_quadratic_spline(x, view, reduce_dims=(1, 2, 3))) == set()
    y, log_abs_det = ops.rational_quadratic_spline(x, leaf)
    gradient = torch.autograd.grad([y, log_abs_det], leaf, [torch.ones_like(y)] * 2)[0]
    assert gradient.stride() == view.stride()
    flat = view.contiguous().requires_grad_()
    again = ops.rational_quadratic_spline(x, flat)
    assert torch.equal(y, again[0])
    assert torch.equal(log_abs_det, again[1])
    assert torch.equal(gradient, torch.autograd.grad(again, flat, [torch.ones_like(y)] * 2)[0])
    # All the way to the network's output no element is moved, but for those that a third merge cannot reach.
    network.requires_grad_()
    results = ops.rational_quadratic_spline(x, network.view(2, 3, per, 5, 6).permute(0, 1, 3, 4, 2))
    whole = torch.autograd.grad(results, network, [torch.ones_like(y)] * 2)[0]
    assert torch.equal(whole.view(2, 3, per, 5, 6).permute(0, 1, 3, 4, 2), gradient)
    assert whole.is_contiguous()


def test_what_must_be_copied_is_seen() -> None:
    """So that the test above could fail: three strides that do not merge."""
    big = torch.randn(3, 5, 5, 2 * 11)[:, ::2, ::3, ::2]
    x = torch.randn(3, 3, 2)
    assert copies(lambda: ops.rational_quadratic_spline(x, big)) != set()
    close(ops.rational_quadratic_spline(x, big), ops.rational_quadratic_spline(x, big.contiguous()))


@pytest.mark.parametrize("dims", [None, 0, 1, -1, -3, (2,), (1, 2), (0, 1, 2), (-1, 0), (0, 1), (), [2, 1]], ids=str)
@every
def test_reduce_dims(op: str, dims: Any) -> None:
    x, values = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_(), parameters(op, 3, 4, 5)
    y, each = call(op, x, values)
    again, total = call(op, x, values, reduce_dims=dims)
    expected = each if dims is None or dims == () else each.sum(dims if isinstance(dims, int) else tuple(dims))
    assert torch.equal(y, again)
    close(total, expected)
    cotangent = torch.randn_like(expected)
    close(torch.autograd.grad(total, x, cotangent), torch.autograd.grad(expected, x, cotangent))
    small = call(op, x.detach().bfloat16(), [v.bfloat16() for v in values], reduce_dims=dims)[1]
    assert small.dtype == (torch.bfloat16 if dims is None or dims == () else torch.float32)


def test_wrong_reduce_dims() -> None:
    x, w = torch.zeros(2, 3), torch.zeros(23)
    for wrong, kind, match in (
        (2, IndexError, r"reduce_dims must be within \[-2, 1\]"),
        ((0, -3), IndexError, r"reduce_dims must be within"),
        ((1, -1), RuntimeError, "reduce_dims must name each dimension once"),
        (("a",), TypeError, "reduce_dims must hold integers, got str"),
        ((True,), TypeError, "reduce_dims must hold integers, got bool"),
        (1.5, TypeError, "reduce_dims must"),
    ):
        with pytest.raises(kind, match=f"rational_quadratic_spline: {match}"):
            ops.rational_quadratic_spline(x, w, reduce_dims=wrong)  # type: ignore[arg-type]


@either_way
@every
def test_logit_scale(op: str, inverse: bool) -> None:
    """nflows' division by the root of the hidden features, of widths and heights but not of derivatives."""
    scale = 1 / math.sqrt(128)
    x, values = inside(50), [v.requires_grad_() for v in parameters(op, 50, std=4.0)]
    by_hand = [value * scale if k < 2 else value for k, value in enumerate(values)]
    ours = call(op, x, values, inverse=inverse, logit_scale=scale)
    theirs = call(op, x, by_hand, inverse=inverse)
    close(ours, theirs)
    close(*(torch.autograd.grad(y.sum() + log.sum(), values) for y, log in (ours, theirs)))


@either_way
@every
def test_many_bins(op: str, inverse: bool) -> None:
    """256 by the kernel, more by the definition, which says so."""
    for bins in (255, 256, 257, 300):
        x, values = inside(40), [v.requires_grad_() for v in parameters(op, 40, bins=bins)]
        y, log_abs_det = call(op, x, values, inverse=inverse)
        gradients = torch.autograd.grad(y.sum() + log_abs_det.sum(), values)
        with genfuse.use_backend("reference"):
            expected = call(op, x, values, inverse=inverse)
        close([y, log_abs_det], list(expected), rtol=1e-9, atol=1e-9)
        close(gradients, torch.autograd.grad(expected[0].sum() + expected[1].sum(), values), rtol=1e-7, atol=1e-7)
        served = "native" if bins <= 256 else "reference"
        assert genfuse.explain(op, x, *values).backend == served
        assert genfuse.explain(op, x, *([torch.cat(values, -1)] if op != "linear_spline" else values)).backend == served
        if bins > 256:
            with genfuse.use_backend("native"), pytest.raises(RuntimeError, match=f"{bins} bins; it takes at most 256"):
                call(op, x, values)


def test_parameters_broadcast() -> None:
    x = torch.randn(4, 1, 3, dtype=torch.float64).requires_grad_()
    w, h, d = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 1, 8), (8,), (4, 5, 3, 7)))
    y, log_abs_det = ops.rational_quadratic_spline(x, w, h, d, reduce_dims=-1)
    assert y.shape == (4, 5, 3)
    assert log_abs_det.shape == (4, 5)
    whole = [x.expand(4, 5, 3), w.expand(4, 5, 3, 8), h.expand(4, 5, 3, 8), d]
    expected = ops.rational_quadratic_spline(*(tensor.contiguous() for tensor in whole), reduce_dims=-1)
    close([y, log_abs_det], list(expected))
    leaves = [x, w, h, d]
    close(*(torch.autograd.grad(y.sum() + log.sin().sum(), leaves) for y, log in ((y, log_abs_det), expected)))


# ---- wrong arguments -------------------------------------------------------------------------------------------------

X, W, D = torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 3)
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("rational_quadratic_spline", ([0.0], W, W, D), {}, TypeError, "x must be a Tensor"),
    ("rational_quadratic_spline", (X, None), {}, TypeError, "widths must be"),
    ("rational_quadratic_spline", (X, [1.0], W, D), {}, TypeError, "widths must be a Tensor"),
    ("rational_quadratic_spline", (X.long(), W, W, D), {}, ValueError, "x must"),
    ("rational_quadratic_spline", (X, W.double(), W, D), {}, RuntimeError, "widths must be torch.float32"),
    ("rational_quadratic_spline", (X, W, W), {}, TypeError, "derivatives must be given where heights are"),
    ("rational_quadratic_spline", (X, W, None, D), {}, TypeError, "heights must be given where derivatives are"),
    ("rational_quadratic_spline", (X, W, W[:, :3], D), {}, RuntimeError, "heights must have widths' number of bins"),
    ("rational_quadratic_spline", (X, W, W, W), {}, RuntimeError, "derivatives must hold 3 or 5 for 4 bins"),
    ("rational_quadratic_spline", (X, W, W, D), {"tails": None}, RuntimeError, "derivatives must hold 5 for 4 bins"),
    ("rational_quadratic_spline", (X, W), {}, RuntimeError, "widths must hold 3 K - 1 packed parameters"),
    ("rational_quadratic_spline", (X, W), {"tails": "circular"}, RuntimeError, "widths must hold 3 K packed"),
    ("rational_quadratic_spline", (X, D), {"tails": None}, RuntimeError, r"widths must hold 3 K \+ 1 packed"),
    ("rational_quadratic_spline", (X, torch.tensor(0.0)), {}, RuntimeError, "widths must have a last dimension"),
    ("rational_quadratic_spline", (X, torch.zeros(2, 23)), {}, RuntimeError, "widths must broadcast with x"),
    ("rational_quadratic_spline", (X, W, torch.zeros(4, 4), D), {}, RuntimeError, "heights must broadcast with x"),
    ("rational_quadratic_spline", (X, W, W, D), {"tails": "flat"}, ValueError, "tails must be 'linear', 'circular'"),
    ("rational_quadratic_spline", (X, W, W, D), {"normalizer": "l1"}, ValueError, "normalizer must be one of"),
    ("rational_quadratic_spline", (X, W, W, D), {"tail_bound": 0.0}, ValueError, "tail_bound must be above 0"),
    ("rational_quadratic_spline", (X, W, W, D), {"tail_bound": NAN}, ValueError, "tail_bound must be above 0"),
    ("rational_quadratic_spline", (X, W, W, D), {"min_derivative": 1.0}, ValueError, "min_derivative must be in"),
    ("rational_quadratic_spline", (X, W, W, D), {"min_derivative": NAN}, ValueError, "min_derivative must be in"),
    ("rational_quadratic_spline", (X, W, W, D), {"min_bin_width": NAN}, ValueError, "min_bin_width must be"),
    ("rational_quadratic_spline", (X, W, W, D), {"left": 0.0}, ValueError, "left, right, bottom and top go with"),
    ("linear_spline", (X, torch.zeros(3, 0)), {}, RuntimeError, "pdf must have at least one bin"),
    ("linear_spline", (X, W), {"tails": None, "left": 1.0, "right": 1.0}, ValueError, "left must be below right"),
    ("linear_spline", (X, W), {"tails": None, "bottom": 4.0}, ValueError, "bottom must be below top"),
    ("quadratic_spline", (X, W, W), {}, RuntimeError, "heights must hold 3 or 5 for 4 bins"),
    ("quadratic_spline", (X, W), {}, RuntimeError, "widths must hold 2 K - 1 packed parameters"),
    ("quadratic_spline", (X, W[:, :1]), {}, RuntimeError, "widths must have at least 2 bins"),
    ("cubic_spline", (X, W, W), {}, TypeError, "heights and derivatives must both be given"),
    ("cubic_spline", (X, W, W, D), {}, RuntimeError, "derivatives must hold 2"),
    ("cubic_spline", (X, W[:, :3]), {}, RuntimeError, r"widths must hold 2 K \+ 2 packed parameters"),
    ("cubic_spline", (X, W, D, D[:, :2]), {}, RuntimeError, "heights must have widths' number of bins"),
]


@pytest.mark.parametrize(("op", "arguments", "options", "kind", "match"), WRONG)
def test_wrong_arguments(
    op: str, arguments: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=f"{op}: {match}"):
        getattr(ops, op)(*arguments, **options)


def test_circular_tails_are_of_rational_quadratic_splines() -> None:
    for op in OPS[1:]:
        with pytest.raises(ValueError, match=f"{op}: tails must be 'linear' or None, got 'circular'"):
            call(op, X, parameters(op, 3, dtype=torch.float32), tails="circular")


def test_the_operator_refuses_what_no_function_asks_for() -> None:
    """Of direct callers of torch.ops.genfuse.spline."""
    good = [X, torch.zeros(3, 11), None, None, 0, 0, 0, True, False, -3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, 1.0, 4, 1]
    assert torch.ops.genfuse.spline(*good)[0].shape == (3,)
    for place, wrong, match in (
        (4, 4, "kind, normalizer and ends"),
        (5, -1, "kind, normalizer and ends"),
        (6, 3, "kind, normalizer and ends"),
        (17, 0, "bins must be between 1 and 256"),
        (17, 257, "bins must be between 1 and 256"),
        (17, 5, "params must have the shape of x"),
        (18, 2, "batch_dims"),
        (18, -1, "batch_dims"),
        (1, torch.zeros(2, 11), "params must have the shape of x"),
        (1, torch.zeros(3, 11).double(), "params must have the dtype of x"),
        (2, torch.zeros(3, 4), "params must have the shape of x"),
        (3, torch.zeros(3, 3), "derivatives must not be given"),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.genfuse.spline(*good[:place], wrong, *good[place + 1 :])
    # Kinds that know no other normalizer than softmax.
    with pytest.raises(RuntimeError, match="normalizer must be softmax for kinds"):
        torch.ops.genfuse.spline(X, W, None, None, 1, 3, *good[6:])
    with pytest.raises(RuntimeError, match="grad_y must have the shape of x"):
        torch.ops.genfuse.spline_backward(torch.zeros(2), None, *good, 1)


# ---- what nobody thought of ------------------------------------------------------------------------------------------

SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples for everybody: a failure is a failure, not bad luck
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def awkward(tensor: Tensor, kind: int) -> Tensor:
    """The same numbers with other strides, among NaNs that must not be read."""
    if kind == 1:  # every second one of a wider tensor
        return torch.stack((tensor, torch.full_like(tensor, NAN)), -1)[..., 0]
    if kind == 2 and tensor.dim() > 0:  # in the middle of a wider tensor, at an odd offset
        return F.pad(tensor, (1, 2), value=NAN)[..., 1:-2]
    if kind == 3 and tensor.dim() > 1:  # parameters before elements, as of an image
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == 4 and tensor.dim() > 2:  # parameters between elements
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == 5 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


@st.composite
def problems(draw: st.DrawFn, op: str) -> tuple[list[Tensor], dict[str, Any]]:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33]), max_size=3))
    tails = draw(st.sampled_from(["linear", None, "circular"] if op == OPS[0] else ["linear", None]))
    options: dict[str, Any] = {"tails": tails, "inverse": draw(st.booleans())}
    bins = draw(st.one_of(st.integers(2, 12), st.sampled_from([1, 8, 40]) if op != "quadratic_spline" else st.just(8)))
    low, high = -3.0, 3.0
    if tails is None:
        options.update(
            left=-1.0, right=draw(st.sampled_from([0.1, 4.0])), bottom=0.3, top=draw(st.sampled_from([0.7, 9.0]))
        )
        low, high = (options["bottom"], options["top"]) if options["inverse"] else (options["left"], options["right"])
    else:
        options["tail_bound"] = high = draw(st.sampled_from([0.1, 1.0, 50.0]))
        low = -high
    if op == OPS[0]:
        options["normalizer"] = draw(st.sampled_from(["softmax", "identity", "zuko"]))
    if shape and draw(st.booleans()):
        options["reduce_dims"] = draw(st.sampled_from([-1, tuple(range(len(shape))), 0]))
    torch.manual_seed(draw(st.integers(0, 100)))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    middle, half = (low + high) / 2, (high - low) / 2
    x = middle + half * (0.9 if tails is None else 1.3) * (2 * torch.rand(shape, dtype=torch.float64) - 1)
    values = []
    for count in spline_cases.counts(op, bins, tails, False).values():
        own = [1 if draw(st.integers(0, 5)) == 0 else size for size in shape][draw(st.sampled_from([0, 0, 0, 1])) :]
        values.append(torch.randn(*own, count, dtype=torch.float64))
    inputs = [awkward(tensor.to(dtype), draw(st.integers(0, 5))) for tensor in (x, *values)]
    return inputs, options


@every
def test_any_problem(op: str) -> None:
    """What this is after is a wrong element, which is off by more than the narrowest bin of a float32 run is."""

    @SETTINGS
    @given(problem=problems(op))
    def run(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
        inputs, options = problem
        dtype = inputs[0].dtype

        def found(backend: str, wanted: torch.dtype) -> list[Tensor]:
            leaves = [tensor.detach().to(wanted) for tensor in inputs] if wanted != dtype else inputs
            leaves = [tensor.detach().requires_grad_() for tensor in leaves]
            with genfuse.use_backend(backend):
                results = call(op, leaves[0], leaves[1:], **options)
            cotangents = [
                torch.linspace(-1, 2, r.numel(), dtype=torch.float64).view(r.shape).to(r.dtype) for r in results
            ]
            return [*results, *torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)]

        exact = found("reference", torch.float64)
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 0.1}[dtype]
        for index, (ours, truth) in enumerate(zip(found("native", dtype), exact, strict=True)):
            assert ours.shape == truth.shape, index
            scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
            close(ours.double(), truth, rtol=tolerance, atol=tolerance * (1.0 + scale))

    run()


@every
def test_any_wrong_tensor_is_an_exception(op: str) -> None:
    """Never a crash, and a result only where the tensor fits after all."""

    @SETTINGS
    @given(problem=problems(op), data=st.data())
    def run(problem: tuple[list[Tensor], dict[str, Any]], data: st.DataObject) -> None:
        inputs, options = problem
        which = data.draw(st.integers(0, len(inputs) - 1))
        good = inputs[which]
        shape, dtype = list(good.shape), good.dtype
        change = data.draw(st.sampled_from(["grow", "shrink", "add", "remove", "dtype"]))
        place = data.draw(st.integers(0, max(0, len(shape) - 1)))
        if change == "dtype":
            dtype = data.draw(st.sampled_from([torch.int64, torch.bool, torch.float16, torch.complex64]))
        elif change == "add":
            shape.insert(place, 2)
        elif not shape:
            return
        elif change == "remove":
            del shape[place]
        else:
            shape[place] = max(0, shape[place] + (2 if change == "grow" else -1))
        middle = 0.35 if options["tails"] is None else 0.0  # within every interval drawn
        inputs[which] = torch.full(shape, middle).to(dtype)
        try:
            y, _ = call(op, inputs[0], inputs[1:], **options)
        except (RuntimeError, ValueError, TypeError) as error:
            assert str(error).startswith(f"{op}: "), error  # noqa: PT017  there may be no exception, or this one
        else:
            assert y.dtype == inputs[0].dtype

    run()


# ---- compilers -------------------------------------------------------------------------------------------------------


def everything(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    y, log_abs_det = ops.rational_quadratic_spline(x, values, reduce_dims=-1)
    y, more = ops.linear_spline(y, values[..., :4], reduce_dims=-1)
    total = log_abs_det + more
    y, more = ops.quadratic_spline(y, values[..., :7], inverse=True, reduce_dims=-1)
    total = total + more
    y, more = ops.cubic_spline(y, values[..., :10], reduce_dims=0)
    return y, total + more.sum()


def problem_of(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(s, generator=generator).requires_grad_() for s in ((batch, 6), (batch, 6, 11))]


def compiled_outcome(function: Callable[..., tuple[Tensor, Tensor]], batch: int) -> list[Tensor]:
    inputs = problem_of(batch)
    y, log_abs_det = function(*inputs)
    return [y.detach(), log_abs_det.detach(), *torch.autograd.grad(y.square().sum() + log_abs_det.sum(), inputs)]


def test_compiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 17, 9):
        close(compiled_outcome(compiled, batch), compiled_outcome(everything, batch))
        graphs = [any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs]
        assert sum(graphs) == 1


def test_exports_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return everything(x, values)

    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(
            Model(), tuple(problem_of(3)), dynamic_shapes={"x": {0: batch}, "values": {0: batch}}
        )
        for size in (3, 8):
            close(program.module()(*problem_of(size)), everything(*problem_of(size)))


def test_compiled_splines_without_tails_give_nan_outside() -> None:
    torch._dynamo.reset()
    values = torch.zeros(8)

    def function(x: Tensor) -> Tensor:
        return ops.linear_spline(x, values, tails=None)[0]

    y = torch.compile(function, backend="aot_eager", fullgraph=True)(torch.tensor([-4.0, 0.0, 4.0]))
    assert y.isnan().tolist() == [True, False, True]
