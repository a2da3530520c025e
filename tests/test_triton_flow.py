"""The Triton flows without a GPU: run by the interpreter against the reference, and compiled for every target.

The interpreted tests run in a process of their own, as those of test_triton_sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

from genfuse.kernels import flow as kernels
from genfuse.kernels import sampling as sampling_kernels
from genfuse.ops.flow import coupling as coupling_ops
from genfuse.ops.flow import pointwise as pointwise_ops
from genfuse.ops.flow import spline as spline_ops
from test_triton_sampling import (
    DTYPES,
    HALVES,
    NAN,
    RNG,
    TILES,
    Check,
    check_compilation,
    compiled,
    interpreted,
    normal,
    pool,
    recorded,
    run_interpreted,
)

__all__ = ["pool"]

EPS = torch.finfo(torch.float32).eps
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


class Definitions:
    """The operators' references, by their positional arguments."""

    def __init__(self, *operators: Any) -> None:
        self.operators = {operator.name: operator for operator in operators}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self.operators[name].run_reference(arguments)


definitions = Definitions(
    spline_ops._SPLINE,
    coupling_ops._AFFINE,
    coupling_ops._ADDITIVE,
    pointwise_ops._ACTNORM,
    pointwise_ops._DEQUANTIZE,
    pointwise_ops._QUANTIZE,
)


def check(name: str, differentiable: int) -> Check:
    return Check(name, differentiable, family=kernels, definition=definitions)


spline, affine, additive = check("spline", 4), check("affine_coupling", 3), check("additive_coupling", 2)
actnorm, dequantize = check("actnorm", 3), check("dequantize_logit", 2)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and many blocks a program, from few elements."""
    monkeypatch.setattr(kernels, "_BLOCK", 8)
    for module in (kernels, sampling_kernels):
        monkeypatch.setattr(module, "_TILE", 16)
        monkeypatch.setattr(module, "_PROGRAMS", 2)


@pytest.fixture
def maybe_small(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles:
        small(monkeypatch)


# ---- splines --------------------------------------------------------------------------------------------------------

SOFTMAX, IDENTITY, ZUKO, NONE = range(4)
ONE, WRAP, GIVEN = range(3)
SLOPES = {ONE: -1, WRAP: 0, GIVEN: 1}


def spline_options(
    batch_dims: int,
    bins: int = 8,
    normalizer: int = SOFTMAX,
    ends: int = ONE,
    tails: bool = True,
    inverse: bool = False,
    sides: tuple[float, float, float, float] = (-2.0, 2.0, -2.5, 2.5),
    logit_scale: float = 1.0,
    kind: int = 0,
) -> tuple[Any, ...]:
    return (kind, normalizer, ends, tails, inverse, *sides, 1e-3, 2e-3, 3e-3, logit_scale, bins, batch_dims)


def parameters(*shape: int, bins: int = 8, normalizer: int = SOFTMAX, ends: int = ONE) -> Tensor:
    """Packed, float64."""
    packed = normal(*shape, 3 * bins + SLOPES[ends])
    if normalizer == NONE:
        widths, heights, slopes = packed.split((bins, bins, bins + SLOPES[ends]), -1)
        packed = torch.cat([widths.softmax(-1), heights.softmax(-1), slopes.exp()], -1)
    return packed


@interpreted
@INVERSE
@pytest.mark.parametrize("ends", [ONE, WRAP, GIVEN], ids=["one", "wrap", "given"])
@pytest.mark.parametrize("normalizer", range(4), ids=["softmax", "identity", "zuko", "none"])
def test_spline(normalizer: int, ends: int, inverse: bool) -> None:
    params = parameters(4, 5, normalizer=normalizer, ends=ends)
    options = spline_options(1, normalizer=normalizer, ends=ends, inverse=inverse, logit_scale=0.7)
    spline((normal(4, 5, scale=1.5), params, None, None), options)


@interpreted
@pytest.mark.parametrize(
    ("shape", "batch_dims"), [((1,), 0), ((7,), 1), ((3, 4), 1), ((2, 3, 2), 2), ((2, 21), 1), ((1, 33), 0)], ids=str
)
def test_spline_shapes(shape: tuple[int, ...], batch_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = (normal(*shape), parameters(*shape, bins=2), None, None), spline_options(batch_dims, bins=2)
    spline(tensors, options)
    small(monkeypatch)
    spline(tensors, options)


@interpreted
@INVERSE
@pytest.mark.parametrize("bins", [1, 2, 5, 16, 32])
def test_spline_bins(bins: int, inverse: bool) -> None:
    for ends in (ONE, GIVEN):
        params = parameters(3, 4, bins=bins, ends=ends)
        spline((normal(3, 4), params, None, None), spline_options(1, bins=bins, ends=ends, inverse=inverse))


@interpreted
def test_spline_parameters_apart_and_gradients_alone() -> None:
    shape, options = (3, 4), spline_options(1, bins=5, ends=GIVEN)
    widths, heights, slopes = normal(*shape, 5), normal(*shape, 5), normal(*shape, 6)
    spline((normal(*shape), widths, heights, slopes), options)
    spline((normal(*shape), widths, heights, slopes), options, without=[0])
    spline((normal(*shape), widths, heights, slopes), spline_options(2, bins=5, ends=GIVEN), without=[1])
    widths, heights, slopes = (t.movedim(-1, 0).contiguous().movedim(0, -1) for t in (widths, heights, slopes))
    spline((normal(*shape), widths, heights, slopes), options)
    one = normal(*shape, 1)
    spline((normal(*shape), one, one.clone(), one[..., :0]), spline_options(1, bins=1))


@interpreted
@INVERSE
def test_spline_reads_and_writes_parameters_where_they_lie(inverse: bool) -> None:
    shape, size = (2, 3, 4), 8
    views = {
        "dense": parameters(*shape, bins=3),
        "of a convolution": parameters(*shape, bins=3).movedim(-1, -2).contiguous().movedim(-2, -1),
        "one for all rows": parameters(1, 3, 4, bins=3).expand(*shape, size),
        "one for all columns": parameters(2, 1, 1, bins=3).expand(*shape, size),
        "part of a row": normal(2, 3 * 4 + 2, size)[:, 2:].unflatten(1, (3, 4)),
        "turned round": normal(4, 3, 2, size).permute(2, 1, 0, 3),
    }
    for name, params in views.items():
        batch_dims = 3 if inverse else 1
        places = kernels._splits(params[..., 0], batch_dims)
        assert kernels._Parameters(params[..., 0], [params], 3, ONE, places).given[0] is params, name
        spline((normal(*shape), params, None, None), spline_options(batch_dims, bins=3, inverse=inverse))
    params = normal(2, 2, 3, 2, size).permute(0, 3, 2, 1, 4)  # of three strides in a row
    assert kernels._Parameters(params[..., 0], [params], 3, ONE, [1]).given[0].is_contiguous()
    spline((normal(2, 2, 3, 2), params, None, None), spline_options(1, bins=3, inverse=inverse))
    x = normal(4, 2, 3).permute(1, 2, 0)
    spline((x, views["dense"], None, None), spline_options(1, bins=3, inverse=inverse))
    spline((x, views["of a convolution"], None, None), spline_options(3, bins=3, inverse=inverse))
    # The gradient of a transposed view is one.
    params = views["of a convolution"].float()
    y, log = kernels.spline(x.float(), params, None, None, *spline_options(1, bins=3))
    back = kernels.spline_backward(y, log, x.float(), params, None, None, *spline_options(1, bins=3), 2)
    assert back[1].stride() == params.stride()


@interpreted
@INVERSE
@HALVES
def test_spline_half(dtype: torch.dtype, inverse: bool) -> None:
    for batch_dims in (1, 2):
        options = spline_options(batch_dims, bins=5, inverse=inverse)
        spline((normal(3, 7), parameters(3, 7, bins=5), None, None), options, dtype)


def spline_of(x: Tensor, params: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, log slope, and the gradients of x and params for gradients of 1."""
    y, log = kernels.spline(x, params, None, None, *options)
    one = torch.ones_like(log)
    back = kernels.spline_backward(torch.ones_like(y), one, x, params, None, None, *options, 3)
    return y, log, back[0], back[1]


@interpreted
@INVERSE
def test_spline_outside_of_its_interval(inverse: bool) -> None:
    x = torch.tensor([-3.0, 3.0, NAN, math.inf, -math.inf, 1e30])
    params = parameters(6).float()
    y, log, grad_x, grad_params = spline_of(x, params, *spline_options(1, inverse=inverse))
    assert torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))
    assert log.tolist()[:2] == [0, 0]
    assert log.isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(grad_x, torch.ones(6))
    assert torch.equal(grad_params, torch.zeros_like(params))
    params[:3, :3] = NAN  # parameters that are not used
    assert torch.equal(spline_of(x, params, *spline_options(1, inverse=inverse))[0].nan_to_num(7.0), y.nan_to_num(7.0))
    y, log, grad_x, grad_params = spline_of(x, parameters(6).float(), *spline_options(1, tails=False, inverse=inverse))
    assert bool(y.isnan().all())
    assert bool(log.isnan().all())
    assert torch.equal(grad_x, torch.zeros(6))
    assert torch.equal(grad_params, torch.zeros_like(params))


@interpreted
@INVERSE
def test_spline_nan_stays_in_its_element(inverse: bool) -> None:
    x, params = torch.zeros(2, 6), parameters(2, 6, ends=GIVEN).float()
    x[0, 0] = NAN
    params[0, 1, 3] = NAN  # a width
    params[0, 2, 9] = NAN  # a height
    params[0, 3, 16:] = NAN  # the slopes
    y, log = kernels.spline(x, params, None, None, *spline_options(2, ends=GIVEN, inverse=inverse))
    wanted = [[True] * 4 + [False] * 2, [False] * 6]
    assert y.isnan().tolist() == log.isnan().tolist() == wanted
    _, rows = kernels.spline(x, params, None, None, *spline_options(1, ends=GIVEN, inverse=inverse))
    assert rows.isnan().tolist() == [True, False]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [1.0, 3.0, 50.0])
def test_spline_at_its_ends_and_at_knots(bound: float, dtype: torch.dtype) -> None:
    sides = (-bound, bound, -bound, bound)
    params = torch.zeros(9, 8 * 3 - 1, dtype=dtype)
    params[:, 16:] = math.log(math.expm1(1.0 - 3e-3))  # slopes of 1: the identity
    x = (torch.linspace(-1, 1, 9) * bound).to(dtype)  # the ends and every knot
    for inverse in (False, True):
        options = spline_options(1, inverse=inverse, sides=sides)
        y, log, grad_x, _ = spline_of(x, params, *options)
        eps = torch.finfo(dtype).eps
        assert torch.allclose(y.float(), x.float(), rtol=4 * eps, atol=bound * 16 * EPS)
        assert y[[0, -1]].tolist() == x[[0, -1]].tolist()  # the ends to the last digit
        assert float(log.float().abs().max()) <= 8 * eps
        assert bool(grad_x.isfinite().all())


@interpreted
@pytest.mark.parametrize("normalizer", [SOFTMAX, ZUKO])
def test_spline_round_trip(normalizer: int) -> None:
    x = torch.linspace(-2.1, 2.1, 701)
    params = (parameters(701, normalizer=normalizer) * 2.0).float()
    sides = (-2.0, 2.0, -2.0, 2.0)
    options = [spline_options(1, normalizer=normalizer, inverse=inverse, sides=sides) for inverse in (False, True)]
    y, log = kernels.spline(x, params, None, None, *options[0])
    again, back = kernels.spline(y, params, None, None, *options[1])
    # A unit in the last place of y is one of x by the slope; and x has rounding of its own.
    error = (again - x).abs().double()
    assert bool((error <= 4 * EPS * 2.0 * (1.0 + torch.exp(-log.double()))).all())
    # The reference is as far off: x and y, of which each is rounded, do not say more of the slope.
    theirs = definitions.spline(x, params, None, None, *options[0])
    back_theirs = definitions.spline(theirs[0], params, None, None, *options[1])[1]
    assert float((back + log).abs().max()) <= 2.0 * float((back_theirs + theirs[1]).abs().max())


@interpreted
def test_spline_with_a_discriminant_of_zero() -> None:
    """In a steep bin between knots of the least slope, at its ends, where b^2 - 4 a c cancels to nothing."""
    for least in (1e-6, 1e-3):
        sizes = torch.tensor([0.0, -8.0, 0.0, -8.0, 8.0, -8.0, -100.0, -100.0])
        knots = torch.tensor([-3.0, 3.0]).repeat_interleave(512)
        share = 1e-3 + (1.0 - 3e-3) * torch.softmax(sizes[3:6], 0)
        knots[100:612] = -3.0 + 6.0 * share[0]
        knots[612:] = 3.0 - 6.0 * share[2]
        y = torch.cat([knots, knots * (1.0 + EPS * torch.arange(-512, 512))]).clamp(-3.0, 3.0)
        options = list(spline_options(1, bins=3, inverse=True, sides=(-3.0, 3.0, -3.0, 3.0)))
        options[9:12] = 1e-3, 1e-3, least
        x, log, grad_x, grad_params = spline_of(y, sizes.expand(2048, 8), *options)
        for result in (x, log, grad_x, grad_params):
            assert bool(result.isfinite().all())
        assert float(x.abs().max()) <= 3.0 + 1e-5


@interpreted
@INVERSE
def test_spline_with_steep_and_narrow_bins(inverse: bool) -> None:
    params = parameters(24) * 4.0
    x = torch.linspace(-1.9, 1.9, 24, dtype=torch.float64)
    for normalizer in (SOFTMAX, ZUKO):
        spline((x, params, None, None), spline_options(1, normalizer=normalizer, inverse=inverse))


@interpreted
@INVERSE
def test_spline_whose_last_bin_is_what_remains(inverse: bool) -> None:
    """Given shares that do not add up to 1."""
    params = parameters(4, 5, normalizer=NONE)
    params[..., :8] *= 0.9
    params[..., 8:16] *= 0.8
    spline((normal(4, 5, scale=2.0), params, None, None), spline_options(1, normalizer=NONE, inverse=inverse))


@interpreted
def test_spline_of_many_bins_knows_where_in_its_bin_an_element_is() -> None:
    """By a sum of 31 sizes that forgets nothing, where eager PyTorch's is rounded to float32 and subtracted again."""
    x, params = normal(2000).float(), parameters(2000, bins=32, normalizer=NONE).float()
    exact, theirs, ours = (
        run(x.to(dtype), params.to(dtype), None, None, *spline_options(1, 32, NONE))[1].double()
        for run, dtype in (
            (definitions.spline, torch.float64),
            (definitions.spline, torch.float32),
            (kernels.spline, torch.float32),
        )
    )
    assert float((ours - exact).abs().median()) <= float((theirs - exact).abs().median()) / 3.0


@interpreted
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_spline_empty(shape: tuple[int, ...]) -> None:
    x, params = torch.empty(shape), torch.empty(*shape, 23)
    for batch_dims in {1, len(shape)}:
        options = spline_options(batch_dims)
        y, log = kernels.spline(x, params, None, None, *options)
        assert y.shape == shape
        assert torch.equal(log, torch.zeros(shape[:batch_dims]))
        back = kernels.spline_backward(y, log, x, params, None, None, *options, 3)
        assert [gradient.shape for gradient in back] == [x.shape, params.shape, (0,), (0,)]


@interpreted
def test_spline_no_gradient_coming_in() -> None:
    x, params = torch.randn(2, 3), parameters(2, 3).float()
    back = kernels.spline_backward(None, None, x, params, None, None, *spline_options(1), 3)
    assert torch.equal(back[0], torch.zeros(2, 3))
    assert torch.equal(back[1], torch.zeros(2, 3, 23))


@interpreted
def test_spline_says_what_it_does_not_do() -> None:
    x = torch.zeros(2)
    with pytest.raises(NotImplementedError, match="rational_quadratic splines, got kind cubic"):
        kernels.spline(x, torch.zeros(2, 18), None, None, *spline_options(1, kind=3))
    with pytest.raises(NotImplementedError, match="up to 32 bins, got 33"):
        kernels.spline(x, torch.zeros(2, 98), None, None, *spline_options(1, bins=33))


# ---- couplings ------------------------------------------------------------------------------------------------------

SCALES = dict(zip(coupling_ops._SCALES, range(9), strict=True))
ALL, FIRST, SECOND, EVEN, ODD, LIST, MASK = range(7)
MOVED = {ALL: 5, FIRST: 3, SECOND: 2, EVEN: 3, ODD: 2, LIST: 3, MASK: 5}


def affine_options(
    scale: str = "exp",
    layout: int = 0,
    split: int = ALL,
    add_first: bool = False,
    inverse: bool = False,
    numbers: dict[str, Any] | None = None,
    reduce: bool = True,
) -> tuple[Any, ...]:
    given = {"offset": None, "eps": None, "clamp": None} | (numbers or {})
    constants = coupling_ops.reference.constants(scale, given["offset"], given["eps"], given["clamp"])
    return (SCALES[scale], layout, split, add_first, inverse, *constants, reduce)


@interpreted
@INVERSE
@pytest.mark.parametrize("add_first", [False, True], ids=["multiply_add", "add_multiply"])
@pytest.mark.parametrize("scale", SCALES)
def test_affine(scale: str, add_first: bool, inverse: bool) -> None:
    tensors = normal(3, 4, 3), normal(3, 8, 3), None, None
    affine(tensors, affine_options(scale, add_first=add_first, inverse=inverse))


@interpreted
@INVERSE
@pytest.mark.parametrize(
    ("scale", "numbers"),
    [
        ("sigmoid", {"eps": 1e-3}),
        ("sigmoid", {"offset": 0.0, "eps": 0.1}),
        ("inverse_sigmoid", {"offset": 0.5}),
        ("softplus", {"eps": 0.0}),
        ("softplus", {"eps": 0.0, "clamp": 1.1}),
        ("softplus", {"clamp": 1.1}),
        ("tanh", {"clamp": 0.5}),
        ("atan", {"clamp": 5.0}),
        ("softclip", {"clamp": 0.1}),
        ("clip", {"clamp": (-0.5, 0.7)}),
    ],
    ids=str,
)
def test_affine_numbers(scale: str, numbers: dict[str, Any], inverse: bool) -> None:
    tensors = normal(2, 3, 5), normal(2, 3, 5, scale=2.0), normal(2, 3, 5), None
    affine(tensors, affine_options(scale, inverse=inverse, numbers=numbers))


@interpreted
@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("split", MOVED)
def test_affine_splits(split: int, layout: int) -> None:
    channels, inverse = None, layout in (1, 2)
    if split == LIST:
        channels = torch.tensor([3, 0, 4])
    elif split == MASK:
        channels = torch.rand(5, 3) < 0.5
    options = affine_options("tanh", layout, split, bool(layout % 2), inverse, reduce=layout < 2)
    affine((normal(2, 5, 3), normal(2, 2 * MOVED[split], 3), None, channels), options)
    if layout < 2:
        additive((normal(2, 5, 3), normal(2, MOVED[split], 3), channels), (split, inverse))


@interpreted
@TILES
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (12, 2), (3, 4, 1), (2, 3, 5, 2), (1, 5, 17)], ids=str)
def test_affine_shapes(shape: tuple[int, ...], maybe_small: None) -> None:
    params = shape[0], 2 * ((shape[1] + 1) // 2), *shape[2:]
    for reduce in (True, False):
        affine((normal(*shape), normal(*params), None, None), affine_options("sigmoid", split=FIRST, reduce=reduce))


@interpreted
def test_affine_strides_and_gradients_alone() -> None:
    shape = (3, 4, 2, 3)
    dense, last = normal(*shape), normal(3, 2, 3, 4).movedim(-1, 1)
    expanded = normal(1, 4, 1, 1).expand(shape)
    wide = normal(3, 9, 2, 3)[:, 1:]
    for x, params in ((dense, wide), (last, wide), (wide[:, ::2], last.repeat(1, 2, 1, 1))):
        affine((x, params, None, None), affine_options())
    affine((normal(3, 4, 3, 2).transpose(2, 3), wide, None, None), affine_options())
    affine((dense, expanded, last, None), affine_options("sigmoid", add_first=True))
    affine((expanded, dense, expanded, None), affine_options("sigmoid", inverse=True))
    for without in (0, 1):
        for reduce in (True, False):
            affine((dense, wide, None, None), affine_options("tanh", reduce=reduce), without=[without])
    additive((last, expanded, None), (ALL, True))


@interpreted
@HALVES
def test_affine_half(dtype: torch.dtype) -> None:
    tensors = normal(3, 4, 3), normal(3, 4, 3), None, None
    for reduce in (True, False):
        affine(tensors, affine_options("sigmoid", split=SECOND, reduce=reduce), dtype)
    additive((normal(3, 4, 3), normal(3, 2, 3), None), (ODD, False), dtype)


@interpreted
def test_affine_nan_and_what_is_not_transformed() -> None:
    x, params = torch.randn(3, 4), torch.zeros(3, 8)
    mask = torch.tensor([True, False, True, True])
    params[:, [1, 5]] = NAN  # of the channel that is not transformed
    params[1, 6] = NAN
    x[2, 3] = NAN
    options = affine_options("exp", split=MASK)
    y, log = kernels.affine_coupling(x, params, None, mask, *options)
    assert y.isnan().nonzero().tolist() == [[1, 2], [2, 3]]
    assert log.isnan().tolist() == [False, True, False]
    one = torch.ones(3)
    back = kernels.affine_coupling_backward(torch.ones(3, 4), one, x, params, None, mask, *options, 7)
    assert back[0].isnan().nonzero().tolist() == [[1, 2]]
    assert torch.equal(back[1][:, [1, 5]], torch.zeros(3, 2))
    assert not bool(back[1][0].isnan().any())


@interpreted
@INVERSE
@pytest.mark.parametrize("scale", SCALES)
def test_affine_far_out(scale: str, inverse: bool) -> None:
    """What is a number in float64 and can be one in float32 is one."""
    raw = torch.tensor([-1e30, -200.0, -100.0, -40.0, -21.0, -19.0, 19.0, 40.0, 100.0, 200.0, 1e30]).view(1, -1)
    zero = torch.zeros_like(raw)
    options = affine_options(scale, inverse=inverse, numbers={"eps": 0.0} if scale == "softplus" else None)
    for x in (zero, zero + 1.0):
        y, log = kernels.affine_coupling(x, raw, zero, None, *options[:-1], False)
        exact = definitions.affine_coupling(x.double(), raw.double(), zero.double(), None, *options[:-1], False)
        limit = torch.finfo(torch.float32).max
        assert torch.equal(y.isfinite(), exact[0].abs() < limit)
        fits = y.isfinite()
        # An error of the exponent's last place is multiplied by the exponent, of up to 200.
        assert torch.allclose(y[fits].double(), exact[0][fits], rtol=200 * EPS, atol=1e-38)
        assert torch.allclose(log.double(), exact[1], rtol=8 * EPS, atol=1e-44)


@interpreted
def test_tanh_and_atan_keep_their_digits() -> None:
    """Through scales of clamp 1: within 4 units in the last place, of large and of small arguments."""
    r = torch.logspace(-20, 6, 3001)
    r = torch.cat([r, -r, torch.linspace(-3, 3, 3001)]).view(1, -1)
    zero = torch.zeros_like(r)
    for scale, exact in (("tanh", r.double().tanh()), ("atan", 0.636 * r.double().atan())):
        options = affine_options(scale, numbers={"clamp": 1.0}, reduce=False)
        _, log = kernels.affine_coupling(zero, r, zero, None, *options)
        assert bool(((log.double() - exact).abs() <= 4 * EPS * exact.abs()).all()), scale


@interpreted
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0)], ids=str)
def test_affine_empty(shape: tuple[int, ...]) -> None:
    x, params = torch.empty(shape), torch.empty(shape[0], 2 * shape[1], *shape[2:])
    for reduce in (True, False):
        options = affine_options(reduce=reduce)
        y, log = kernels.affine_coupling(x, params, None, None, *options)
        assert y.shape == shape
        assert torch.equal(log, torch.zeros(shape[:1] if reduce else shape))
        back = kernels.affine_coupling_backward(y, log, x, params, None, None, *options, 7)
        assert [gradient.shape for gradient in back] == [x.shape, params.shape, (0,)]
    assert kernels.additive_coupling(x, x, None, ALL, False).shape == shape


@interpreted
def test_affine_no_gradient_coming_in() -> None:
    x, params = torch.randn(2, 3), torch.randn(2, 6)
    back = kernels.affine_coupling_backward(None, None, x, params, None, None, *affine_options(), 7)
    assert torch.equal(back[0], torch.zeros(2, 3))
    assert torch.equal(back[1], torch.zeros(2, 6))


# ---- actnorm --------------------------------------------------------------------------------------------------------


@interpreted
@TILES
@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (3, 5, 2, 2), (2, 3, 17), (2, 9, 1)], ids=str)
def test_actnorm_shapes(shape: tuple[int, ...], maybe_small: None) -> None:
    actnorm((normal(*shape), normal(shape[1]), normal(shape[1])), (False, False))


@interpreted
@INVERSE
@pytest.mark.parametrize("add_first", [False, True], ids=["multiply_add", "add_multiply"])
def test_actnorm(add_first: bool, inverse: bool) -> None:
    actnorm((normal(3, 4, 5), normal(4), normal(4)), (inverse, add_first))


@interpreted
def test_actnorm_strides_halves_and_gradients_alone() -> None:
    shape = (3, 4, 2, 3)
    last, bias = normal(3, 2, 3, 4).movedim(-1, 1), normal(1).expand(4)
    actnorm((last, normal(8)[::2], bias), (False, False))
    actnorm((normal(1, 4, 2, 3).expand(shape), normal(4), bias), (True, True))
    for without in (0, 1):
        actnorm((normal(*shape), normal(4), normal(4)), (True, False), without=[without])
    for dtype in (torch.bfloat16, torch.float16):
        actnorm((normal(*shape), normal(4), normal(4)), (False, False), dtype)


@interpreted
def test_actnorm_empty_nan_and_no_gradient() -> None:
    for shape in ((0, 3), (3, 0), (2, 3, 0)):
        x, numbers = torch.empty(shape), torch.zeros(shape[1])
        y, log = kernels.actnorm(x, numbers, numbers, False, False)
        assert y.shape == shape
        assert torch.equal(log, torch.zeros(shape[0]))
        back = kernels.actnorm_backward(y, log, x, numbers, numbers, False, False, 7)
        assert torch.equal(back[1], torch.zeros(shape[1]))
    x, numbers = torch.zeros(2, 3), torch.zeros(3)
    x[1, 2] = NAN
    assert kernels.actnorm(x, numbers, numbers, False, False)[0].isnan().nonzero().tolist() == [[1, 2]]
    back = kernels.actnorm_backward(None, None, x, numbers, numbers, False, False, 7)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in back)
    far = torch.tensor([120.0])
    y, _ = kernels.actnorm(torch.full((1, 1), 1e-30), far, far * 0, False, False)
    assert math.isclose(float(y), math.exp(120.0) * 1e-30, rel_tol=1e-4)  # the power alone is no number


# ---- dequantisation -------------------------------------------------------------------------------------------------


def levels_of(*shape: int, levels: int = 256) -> Tensor:
    return torch.randint(0, levels, shape)


@interpreted
@TILES
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 8), (3, 2, 7), (1, 33)], ids=str)
def test_dequantize_logit(shape: tuple[int, ...], maybe_small: None) -> None:
    x, u = levels_of(*shape, levels=16), torch.rand(shape, dtype=torch.float64)
    for tensors in ((x.double(), u, None), (x.double(), None, RNG), (x.to(torch.uint8), u, None)):
        if tensors[0].is_floating_point():
            dequantize(tensors, (16, 0.05))
        else:
            check("dequantize_logit", 0)(tensors, (16, 0.05))
    check("dequantize_logit", 0)((x.to(torch.uint8), None, RNG), (16, 0.0))


@interpreted
@HALVES
def test_dequantize_logit_half_and_strides(dtype: torch.dtype) -> None:
    x = levels_of(3, 37, levels=16).double()
    dequantize((x, torch.rand(3, 37, dtype=torch.float64), None), (16, 0.05), dtype)
    transposed = levels_of(5, 3, levels=4).double().t()
    dequantize((transposed, torch.rand(5, dtype=torch.float64).expand(3, 5), None), (4, 0.1))
    dequantize((transposed, None, RNG), (4, 0.1), without=[0])
    dequantize((transposed, None, RNG), (4, 0.1), without=[1])


@interpreted
def test_dequantize_logit_and_back_again() -> None:
    x = torch.arange(256).view(4, 64)
    for alpha in (0.0, 0.05, 1e-6):
        y, _ = kernels.dequantize_logit(x.to(torch.uint8), None, RNG, 256, alpha)
        again = kernels.logit_quantize(y, 256, alpha)
        # A unit in the last place of 1 - p may be a level's edge, where p is near 1.
        assert int((again != x).sum()) <= 1
        wanted = definitions.logit_quantize(y, 256, alpha)[0]
        assert float((again - wanted).abs().max()) <= 1.0
    far = torch.tensor([-1e30, 1e30, -math.inf, math.inf, NAN])
    assert kernels.logit_quantize(far, 256, 0.05).nan_to_num(-1.0).tolist() == [0, 255, 0, 255, -1]


@interpreted
def test_dequantize_logit_empty_and_no_gradient() -> None:
    for shape in ((0, 3), (3, 0)):
        x = torch.empty(shape)
        y, log = kernels.dequantize_logit(x, None, RNG, 4, 0.05)
        assert y.shape == shape
        assert torch.equal(log, torch.zeros(shape[:1]))
        assert kernels.dequantize_logit_backward(y, log, x, None, RNG, 4, 0.05, 1)[0].shape == shape
        assert kernels.logit_quantize(x, 4, 0.05).shape == shape
    back = kernels.dequantize_logit_backward(None, None, torch.ones(2, 3), torch.zeros(2, 3), None, 4, 0.05, 3)
    assert all(torch.equal(gradient, torch.zeros(2, 3)) for gradient in back)
    back = kernels.dequantize_logit_backward(
        torch.ones(2, 3), None, torch.ones(2, 3, dtype=torch.uint8), torch.zeros(2, 3), None, 4, 0.05, 2
    )
    assert [gradient.shape for gradient in back] == [(0,), (2, 3)]


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    run_interpreted(__file__)


# ---- compiling for GPUs that are not there --------------------------------------------------------------------------


def calls(dtype: torch.dtype) -> None:
    """Every operator, with the options whose code differs most."""

    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    x = of(8, 100)
    for params, normalizer, ends, inverse, batch_dims in (
        (of(8, 100, 23), SOFTMAX, ONE, False, 1),
        (of(8, 25, 100).movedim(1, 2), ZUKO, GIVEN, True, 2),
    ):
        options = spline_options(batch_dims, normalizer=normalizer, ends=ends, inverse=inverse)
        y, log = kernels.spline(x, params, None, None, *options)
        kernels.spline_backward(y, log, x, params, None, None, *options, 3)
    volume = of(8, 24, 16, 16)
    cases: list[tuple[Any, ...]] = [(volume, volume, "sigmoid", SECOND, False), (of(9, 5), of(9, 4), "atan", ODD, True)]
    for given, params, scale, split, inverse in cases:
        options = affine_options(scale, split=split, add_first=True, inverse=inverse)
        y, log = kernels.affine_coupling(given, params, None, None, *options)
        kernels.affine_coupling_backward(y, log, given, params, None, None, *options, 7)
    kernels.additive_coupling(volume, of(8, 12, 16, 16), None, EVEN, False)
    kernels.additive_coupling(volume, of(8, 3, 16, 16), torch.tensor([5, 0, 7]), LIST, False)
    kernels.additive_coupling(volume, volume, torch.ones(24, 16, 16, dtype=torch.bool), MASK, False)
    numbers = of(24)
    y, log = kernels.actnorm(volume, numbers, numbers, False, False)
    kernels.actnorm_backward(y, log, volume, numbers, numbers, False, False, 7)
    pixels = torch.zeros(8, 784, dtype=torch.uint8)
    kernels.dequantize_logit(pixels, None, RNG, 256, 0.05)
    y, log = kernels.dequantize_logit(x, None, RNG, 256, 0.05)
    kernels.dequantize_logit_backward(y, log, x, None, RNG, 256, 0.05, 1)
    kernels.logit_quantize(y, 256, 0.05)


@compiled
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_compiles_for_every_target(dtype: str, pool: ProcessPoolExecutor) -> None:
    check_compilation(kernels, recorded(lambda: calls(DTYPES[dtype])), dtype, pool)
