"""Couplings: equal to their peers, invertible, finite where the truth is, indifferent to layout, size and threads.

(What is asked of every operator is in test_operators.py, the options in flow_cases.py.)
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_cases import VARIANTS
from genfuse import ops
from genfuse.reference.flow import coupling as reference
from operator_cases import Problem, check, make
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

close = torch.testing.assert_close
SCALES: dict[str, dict[str, Any]] = {
    "exp": {},
    "sigmoid": {},
    "inverse_sigmoid": {},
    "softplus": {},
    "tanh": {},
    "atan": {},
    "sigmoid_clamp": {},
    "softclip": {},
    "clip": {"clamp": (-0.8, 0.7)},
}
LAYOUTS = ("shift_scale", "scale_shift", "interleaved_shift_scale", "interleaved_scale_shift")
SPLITS = ("all", "first", "second", "even", "odd", "list", "mask")
VARIANTS_OF_AFFINE = list(VARIANTS["affine_coupling"])


def split_of(name: str, x: Tensor) -> tuple[str | Tensor, int]:
    """A split and how many channels it transforms."""
    channels = x.shape[1]
    middle = (channels + 1) // 2
    if name == "list":
        return torch.randperm(channels)[:middle], middle
    if name == "mask":
        return torch.rand(x.shape[1:]) < 0.5, channels
    return name, {"first": middle, "even": middle, "all": channels}.get(name, channels - middle)


def with_gradients(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[Tensor]:
    """Results and the gradients of all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves, **options)
    results = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


# ---- peers -----------------------------------------------------------------------------------------------------------

SHAPES = [(6, 4), (5, 7), (3, 6, 4, 4), (2, 5, 3, 2)]


class Fixed(torch.nn.Module):
    """A network that returns what it was given, whatever it is asked."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, *_: Any) -> Any:
        return self.values[0] if len(self.values) == 1 else self.values


def same_as(peer: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> None:
    """Results and gradients, in float64, and in float32 to its digits."""
    for dtype in (torch.float64, torch.float32):
        wide = [tensor.to(dtype) for tensor in inputs]
        for theirs, mine in zip(with_gradients(peer, *wide), with_gradients(ours, *wide), strict=True):
            close(
                mine,
                theirs,
                rtol=1e-9 if dtype == torch.float64 else 1e-4,
                atol=1e-9 if dtype == torch.float64 else 1e-4,
            )


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nflows(shape: tuple[int, ...], inverse: bool) -> None:
    coupling = pytest.importorskip("nflows.transforms.coupling")
    x = torch.randn(shape, dtype=torch.float64)
    for name in ("first", "second", "even", "odd", "list"):
        split, moved = split_of(name, x)
        mask = torch.zeros(shape[1])
        mask[reference.split_channels(shape[1], split)] = 1
        if name == "list":
            split = split.sort().values  # type: ignore[union-attr]
        params = torch.randn(shape[0], 2 * moved, *shape[2:], dtype=torch.float64)

        def theirs(kind: str, x: Tensor, params: Tensor, mask: Tensor = mask) -> Any:
            layer = getattr(coupling, kind)(mask, lambda *_: Fixed(params))
            return layer.inverse(x) if inverse else layer(x)

        def affine(x: Tensor, params: Tensor, split: str | Tensor = split) -> Any:
            return ops.affine_coupling(x, params, scale="sigmoid", eps=1e-3, split=split, inverse=inverse)

        def additive(x: Tensor, shift: Tensor, split: str | Tensor = split) -> Any:
            return ops.additive_coupling(x, shift, split=split, inverse=inverse)

        same_as(lambda x, p: theirs("AffineCouplingTransform", x, p), affine, x, params)
        same_as(lambda x, p: theirs("AdditiveCouplingTransform", x, p)[0], additive, x, params[:, :moved])


def test_the_general_activation_of_nflows() -> None:
    """(softplus(r) + 1e-3).clamp(0, 3), which later versions of nflows offer."""

    def theirs(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.chunk(2, 1)
        scale = (torch.nn.functional.softplus(raw) + 1e-3).clamp(0, 3)
        return x * scale + shift, scale.log().sum(1)

    x, params = torch.randn(50, 3, dtype=torch.float64), 3 * torch.randn(50, 6, dtype=torch.float64)
    assert bool((params[:, 3:] > 3.1).any())
    same_as(theirs, lambda x, p: ops.affine_coupling(x, p, scale="softplus", clamp=3.0), x, params)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(
    ("scale_map", "scale"), [("exp", "exp"), ("sigmoid", "inverse_sigmoid"), ("sigmoid_inv", "sigmoid")]
)
def test_normflows(scale_map: str, scale: str, inverse: bool) -> None:
    coupling = pytest.importorskip("normflows.flows.affine.coupling")
    for shape in SHAPES:
        for split, mode in (("second", "channel"), ("first", "channel_inv")):
            x = torch.randn(shape, dtype=torch.float64)
            _, moved = split_of(split, x)
            params = torch.randn(shape[0], 2 * moved, *shape[2:], dtype=torch.float64)

            def theirs(x: Tensor, params: Tensor, mode: str = mode) -> Any:
                block = coupling.AffineCouplingBlock(Fixed(params), scale_map=scale_map, split_mode=mode)
                return block.inverse(x) if inverse else block(x)

            def ours(x: Tensor, params: Tensor, split: str = split) -> Any:
                layout = "interleaved_shift_scale"
                return ops.affine_coupling(x, params, scale=scale, layout=layout, split=split, inverse=inverse)

            same_as(theirs, ours, x, params)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_normflows_masked(inverse: bool) -> None:
    coupling = pytest.importorskip("normflows.flows.affine.coupling")
    for shape in SHAPES:
        x, s, t = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        kept = torch.rand(shape[1:]) < 0.5

        def theirs(x: Tensor, s: Tensor, t: Tensor, kept: Tensor = kept) -> Any:
            flow = coupling.MaskedAffineFlow(kept.to(x.dtype), Fixed(t), Fixed(s))
            return flow.inverse(x) if inverse else flow(x)

        def ours(x: Tensor, s: Tensor, t: Tensor, kept: Tensor = kept) -> Any:
            return ops.affine_coupling(x, s, t, split=~kept, inverse=inverse)

        same_as(theirs, ours, x, s, t)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("activation", "scale"), [("ATAN", "atan"), ("TANH", "tanh"), ("SIGMOID", "sigmoid_clamp")])
def test_freia(activation: str, scale: str, inverse: bool) -> None:
    modules = pytest.importorskip("FrEIA.modules")
    for shape in ((6, 4), (3, 6, 4, 4)):
        half = shape[1] // 2
        x = torch.randn(shape, dtype=torch.float64)
        first, second = (torch.randn(shape[0], shape[1], *shape[2:], dtype=torch.float64) for _ in range(2))

        def theirs(x: Tensor, first: Tensor, second: Tensor, shape: tuple[int, ...] = shape) -> Any:
            values = iter((second, first))  # its subnet1 transforms the second half
            block = modules.GLOWCouplingBlock(
                [shape[1:]], subnet_constructor=lambda *_: Fixed(next(values)), clamp=1.3, clamp_activation=activation
            )
            (y,), log_abs_det = block([x], rev=inverse)
            return y, log_abs_det

        def ours(x: Tensor, first: Tensor, second: Tensor) -> Any:
            options: dict[str, Any] = {"scale": scale, "layout": "scale_shift", "clamp": 1.3, "inverse": inverse}
            y, one = ops.affine_coupling(x, first, split="first", **options)
            y, two = ops.affine_coupling(y, second, split="second", **options)
            return y, one + two

        assert half * 2 == shape[1]
        same_as(theirs, ours, x, first, second)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_pyro(inverse: bool) -> None:
    transforms = pytest.importorskip("pyro.distributions.transforms")
    x, mean = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    log_scale = 4 * torch.randn(40, 4, dtype=torch.float64)
    assert bool((log_scale > 3).any())
    assert bool((log_scale < -5).any())

    def theirs(x: Tensor, log_scale: Tensor, mean: Tensor) -> Any:
        transform = transforms.AffineCoupling(2, lambda _: (mean, log_scale))
        if inverse:
            y = transform._inverse(x)
            return y, -transform.log_abs_det_jacobian(y, x)
        y = transform._call(x)
        return y, transform.log_abs_det_jacobian(x, y)

    def ours(x: Tensor, log_scale: Tensor, mean: Tensor) -> Any:
        return ops.affine_coupling(x, log_scale, mean, scale="clip", split=torch.arange(2, 6), inverse=inverse)

    same_as(theirs, ours, x, log_scale, mean)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_zuko(inverse: bool) -> None:
    transforms = pytest.importorskip("zuko.transforms")
    x, shift, scale = (3 * torch.randn(40, 5, dtype=torch.float64) for _ in range(3))

    def theirs(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        transform = transforms.MonotonicAffineTransform(shift, scale)
        y, log_abs_det = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, log_abs_det.sum(1)

    def ours(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return ops.affine_coupling(x, scale, shift, scale="softclip", inverse=inverse)

    same_as(theirs, ours, x, scale, shift)


def test_glow_adds_first() -> None:
    """(x + t) sigmoid(r + 2) on the second half: openai's layout is interleaved, rosinality's has halves [log s, t]."""
    x, params = torch.randn(3, 6, 2, 2, dtype=torch.float64), torch.randn(3, 6, 2, 2, dtype=torch.float64)

    def glow(x: Tensor, shift: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(raw + 2)
        return torch.cat([x[:, :3], (x[:, 3:] + shift) * s], 1), s.log().flatten(1).sum(1)

    def ours(layout: str) -> Callable[..., Any]:
        options: dict[str, Any] = {"scale": "sigmoid", "order": "add_multiply", "split": "second"}
        return lambda x, params: ops.affine_coupling(x, params, layout=layout, **options)

    same_as(lambda x, p: glow(x, p[:, 0::2], p[:, 1::2]), ours("interleaved_shift_scale"), x, params)
    same_as(lambda x, p: glow(x, p[:, 3:], p[:, :3]), ours("scale_shift"), x, params)


# ---- every option at every size --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_splits(layout: str, split: str) -> None:
    """Stretches of memory and gathered blocks, shorter and longer than a block."""
    for shape in (
        (7, 1),
        (3, 2),
        (65, 5),
        (2, 33),
        (2, 2101),
        (3, 4, 5),
        (2, 6, 15),
        (2, 5, 16),
        (2, 3, 1025),
        (1, 300, 7),
    ):
        x = torch.randn(shape, dtype=torch.float64)
        chosen, moved = split_of(split, x)
        params = torch.randn(shape[0], 2 * moved, *shape[2:], dtype=torch.float64)
        for order, inverse in itertools.product(("multiply_add", "add_multiply"), (False, True)):
            options: dict[str, Any] = {"layout": layout, "order": order, "inverse": inverse, "split": chosen}
            for reduce in (True, False):
                ours, theirs = (
                    with_gradients(f, x, params, reduce=reduce, **options)
                    for f in (ops.affine_coupling, reference.affine_coupling)
                )
                close(ours, theirs, rtol=1e-11, atol=1e-11)
        ours, theirs = (
            with_gradients(f, x, params[:, :moved], split=chosen, inverse=True)
            for f in (ops.additive_coupling, reference.additive_coupling)
        )
        close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", SCALES)
def test_kinds_of_scale_on_images_and_vectors(scale: str) -> None:
    for inverse, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        options = {**SCALES[scale], "scale": scale, "inverse": inverse, "split": "second"}
        for shape in ((4, 6, 5, 7), (40, 9)):
            check(*(make("affine_coupling", options, dtype=dtype, shape=shape, seed=seed) for seed in range(2)))


@pytest.mark.parametrize("seed", range(4))
def test_any_coupling(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        shape = tuple(pick.choice([1, 2, 3, 5, 8, 17, 40]) for _ in range(pick.randrange(2, 5)))
        x = torch.randn(shape, dtype=torch.float64)
        split, moved = split_of(pick.choice(SPLITS), x)
        scale = pick.choice(list(SCALES))
        options = {
            **SCALES[scale],
            "scale": scale,
            "layout": pick.choice(LAYOUTS),
            "order": pick.choice(["multiply_add", "add_multiply"]),
            "inverse": pick.choice([False, True]),
            "split": split,
            "reduce": pick.choice([False, True]),
        }
        separate = pick.choice([False, True])
        sizes = [shape[0], moved if separate else 2 * moved, *shape[2:]]
        if pick.random() < 0.3:
            sizes = [1 if k != 1 and pick.random() < 0.5 else size for k, size in enumerate(sizes)]
        inputs = [x, torch.randn(sizes, dtype=torch.float64)]
        if separate:
            inputs.append(torch.randn(shape[0], moved, *shape[2:], dtype=torch.float64))
        ours, theirs = (
            with_gradients(f, *inputs, **options) for f in (ops.affine_coupling, reference_with_broadcasting)
        )
        close(ours, theirs, rtol=1e-10, atol=1e-10)


def reference_with_broadcasting(x: Tensor, params: Tensor, shift: Tensor | None = None, **options: Any) -> Any:
    params = params.expand(x.shape[0], params.shape[1], *x.shape[2:])
    return reference.affine_coupling(x, params, shift, **options)


@pytest.mark.parametrize("variant", VARIANTS_OF_AFFINE)
def test_the_jacobian(variant: str) -> None:
    """log_abs_det is that of the Jacobian that autograd finds."""
    for shape in ((1, 5), (1, 4, 3)):
        problem = make(
            "affine_coupling",
            {**VARIANTS["affine_coupling"][variant], "reduce": True},
            dtype=torch.float64,
            shape=shape,
        )
        x = problem.inputs["x"]
        jacobian = torch.autograd.functional.jacobian(lambda x: problem.call(x=x)[0], x)  # noqa: B023
        expected = torch.linalg.slogdet(jacobian.view(x.numel(), x.numel())).logabsdet
        close(problem.call()[1], expected.view(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS_OF_AFFINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_round_trip(variant: str, dtype: torch.dtype) -> None:
    """Within a few units in the last place of the largest number on the way, which the scale multiplies."""
    problem = make(
        "affine_coupling", {**VARIANTS["affine_coupling"][variant], "reduce": True}, dtype=dtype, shape=(64, 8, 3)
    )
    x = problem.inputs["x"]
    direction = problem.options.get("inverse", False)
    y, there = problem.call()
    back, again = problem.call(x=y, inverse=not direction)
    worst = max(float(t.abs().max()) for t in (x, y, *problem.inputs.values()))
    spread = float(problem.call(reduce=False)[1].exp().reciprocal().max().clamp(min=1.0))
    bound = 8.0 * torch.finfo(dtype).eps * worst * spread
    assert float((back - x).abs().max()) <= bound
    close(again, -there, rtol=0.0, atol=16 * torch.finfo(dtype).eps * float(there.abs().max()))


# ---- numbers at the edge ---------------------------------------------------------------------------------------------

EXTREME = (-100.0, -60.0, -20.5, -3.0, 0.0, 3.0, 20.5, 60.0, 100.0)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("eps", [None, 0.0])
def test_extreme_raw_scales(scale: str, eps: float | None, inverse: bool) -> None:
    """Trap 8: each result and gradient is finite where the exact one is a float32, and right to its digits.

    x = 0 and a gradient of 0 are there, too: they times a scale that overflows are 0, not NaN.
    """
    if eps is not None and scale not in ("sigmoid", "softplus"):
        pytest.skip("has no eps")
    options: dict[str, Any] = {"scale": scale, "inverse": inverse, "reduce": False, "eps": eps}
    raw = torch.tensor(EXTREME).repeat(5).view(1, -1)
    x = torch.tensor([0.0, 1e-30, 0.5, -2.0, 1.0]).repeat_interleave(len(EXTREME)).view(1, -1)
    shift = torch.zeros_like(raw)
    found: dict[Any, list[list[Tensor]]] = {}
    largest = torch.finfo(torch.float32).max
    for cotangent_of_y in (1.0, 0.0, 1e-20):
        for function, dtype in ((ops.affine_coupling, torch.float32), (reference.affine_coupling, torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, raw, shift)]
            y, log_abs_det = function(*leaves, **options)  # type: ignore[operator]
            grads = torch.full_like(y, cotangent_of_y), torch.ones_like(y)
            gradients = torch.autograd.grad((y, log_abs_det), leaves, grads)
            found.setdefault(dtype, []).append([y.detach(), log_abs_det.detach(), *gradients])
    for ours, exact in zip(found[torch.float32], found[torch.float64], strict=True):
        for index, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
            # Slopes that autograd, or the kernel too, has as a difference of ones: 1 - tanh^2, and 1 - sigmoid.
            slopes = {"tanh": 1e-5, "sigmoid_clamp": 1e-5, "sigmoid": 1e-14, "inverse_sigmoid": 1e-14}
            absolute = slopes.get(scale, 1e-37) if index == 3 else 1e-37
            there = truth.abs() < 0.99 * largest
            assert bool(mine[there].isfinite().all())
            close(mine[there].double(), truth[there], rtol=3e-5, atol=absolute)
            assert bool((mine[truth.abs() > 1.01 * largest].abs() == math.inf).all())


def test_log_determinant_of_a_vanishing_scale() -> None:
    """Trap 8: sigmoid(r + 2) is 0 in float32 at r = -150, and its logarithm is not -inf."""
    for inverse, sign in ((False, 1.0), (True, -1.0)):
        raw = torch.full((2, 3), -150.0, requires_grad=True)
        _, log_abs_det = ops.affine_coupling(torch.ones(2, 3), raw, raw * 0, scale="sigmoid", inverse=inverse)
        close(log_abs_det, torch.full((2,), sign * -148.0 * 3))
        close(torch.autograd.grad(log_abs_det.sum(), raw)[0], torch.full((2, 3), sign))


def test_32_layers_of_unbounded_scales_come_back() -> None:
    """normflows #73: a deep chain of e^r; each layer's inverse undoes it, and nothing overflows on the way."""
    x = torch.randn(16, 8)
    layers = [torch.randn(16, 8) for _ in range(32)]
    y, total = x, torch.zeros(16)
    for k, params in enumerate(layers):
        y, log_abs_det = ops.affine_coupling(y, params, split="first" if k % 2 else "second")
        total = total + log_abs_det
    for k, params in reversed(list(enumerate(layers))):
        y, log_abs_det = ops.affine_coupling(y, params, split="first" if k % 2 else "second", inverse=True)
        total = total + log_abs_det
    close(y, x, rtol=1e-2, atol=1e-2)
    close(total, torch.zeros(16), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 20)])
@pytest.mark.parametrize("variant", VARIANTS_OF_AFFINE)
def test_nan_stays_in_its_place(variant: str, shape: tuple[int, ...]) -> None:
    problem = make("affine_coupling", variant, shape=shape)
    cotangents = problem.cotangents()
    clean = problem.run(cotangents)
    reduced = problem.options.get("reduce", True)
    moved = affected(problem)
    for name, value in problem.inputs.items():
        rows = value.shape[0]
        spoilt = value.clone()
        row = 1 if rows > 1 else 0
        spoilt[row] = torch.nan
        found = Problem(problem.op, {**problem.inputs, name: spoilt}, problem.options).run(cotangents)
        place = moved.clone() if name != "x" else torch.ones_like(moved)
        if rows > 1:
            place[[0, 2]] = False
        assert torch.equal(found[0].isnan(), place), name
        logs = place if name == "params" else torch.zeros_like(place)
        if name == "params" and "separate" not in str(VARIANTS["affine_coupling"][variant]):
            logs = place
        assert torch.equal(found[1].isnan(), logs.flatten(1).any(1) if reduced else logs), name
        others = [0, 2]
        if rows > 1:
            for ours, before in zip(found, clean, strict=True):
                if ours.shape[0] == 3:
                    assert torch.equal(ours[others], before[others]), name


def affected(problem: Problem) -> Tensor:
    """Which elements of y are transformed."""
    wide = problem.map(lambda t: torch.ones_like(t))
    return wide.call()[0] != wide.inputs["x"]


def test_what_a_mask_leaves_out_does_not_matter() -> None:
    """Parameters may be NaN or infinite there: neither results nor gradients see them."""
    for shape in ((4, 6), (2, 3, 8, 8)):
        mask = torch.rand(shape[1:]) < 0.5
        for scale, inverse in itertools.product(SCALES, (False, True)):
            x, raw, shift = (torch.randn(shape) for _ in range(3))

            def function(x: Tensor, raw: Tensor, shift: Tensor) -> Any:
                return ops.affine_coupling(x, raw, shift, scale=scale, split=mask, inverse=inverse)  # noqa: B023

            clean = with_gradients(function, x, raw, shift)
            for value in (torch.nan, torch.inf, -torch.inf):
                for spoilt in ((raw.where(mask, value), shift), (raw, shift.where(mask, value))):
                    found = with_gradients(function, x, *spoilt)
                    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
            gradients = clean[3:]
            assert all(bool((gradient[:, ~mask] == 0).all()) for gradient in gradients)


def test_a_long_row_is_summed_in_wide_digits() -> None:
    """Trap 6: 2^21 terms of about 1/3; one after the other in float32 would be off by 1e-3 of it."""
    raw = torch.full((1, 1, 1 << 21), 1 / 3)
    _, log_abs_det = ops.affine_coupling(torch.zeros_like(raw), raw, raw)
    close(log_abs_det.double(), raw.double().flatten(1).sum(1), rtol=1e-7, atol=0.0)


# ---- kinds of numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_another_dtype(dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """Trap 15: y has x's dtype, each gradient its own tensor's, and all is computed in the widest."""
    x = torch.randn(3, 4, 5).to(dtype)
    raw, shift = (torch.randn(3, 2, 5).to(param_dtype) for _ in range(2))
    wide = torch.float64 if torch.float64 in (dtype, param_dtype) else torch.float32

    def function(x: Tensor, raw: Tensor, shift: Tensor) -> Any:
        return ops.affine_coupling(x, raw, shift, split="second", scale="sigmoid")

    ours = with_gradients(function, x, raw, shift)
    assert [t.dtype for t in ours] == [dtype, wide, dtype, param_dtype, param_dtype]
    leaves = [t.to(wide).requires_grad_() for t in (x, raw, shift)]
    y, log_abs_det = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    cotangents = [
        torch.randn(r.shape, generator=generator, dtype=torch.float64).to(kind)
        for r, kind in ((y, dtype), (log_abs_det, wide))
    ]
    gradients = torch.autograd.grad((y, log_abs_det), leaves, [c.to(wide) for c in cotangents])
    expected = [
        y.to(dtype),
        log_abs_det,
        *(g.to(k) for g, k in zip(gradients, (dtype, *2 * [param_dtype]), strict=True)),
    ]
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine, theirs)
    packed = torch.cat((shift, raw), 1)
    assert torch.equal(ops.affine_coupling(x, packed, split="second", scale="sigmoid")[0], ours[0])
    added = ops.additive_coupling(x, shift, split="second")
    assert added.dtype == dtype


def test_autocast_takes_a_network_in_half() -> None:
    net = torch.nn.Linear(2, 4)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = net(x[:, :2])
        assert params.dtype == torch.bfloat16
        y, log_abs_det = ops.affine_coupling(x, params, split="second")
    assert y.dtype == log_abs_det.dtype == torch.float32
    close(y, ops.affine_coupling(x, params.float(), split="second")[0])
    log_abs_det.sum().backward()
    assert net.weight.grad is not None


# ---- where tensors lie -----------------------------------------------------------------------------------------------


def test_parameters_are_read_where_they_lie_and_their_gradient_is_one_tensor() -> None:
    for layout, split in itertools.product(LAYOUTS, ("all", "second", "even")):
        for shape in ((4, 6), (4, 6, 20)):
            x = torch.randn(shape)
            _, moved = split_of(split, x)
            params = torch.randn(shape[0], 2 * moved, *shape[2:], requires_grad=True)
            y, log_abs_det = ops.affine_coupling(x, params, layout=layout, split=split)
            node = y.grad_fn
            assert node is not None
            assert [type(before[0]).__name__ for before in node.next_functions if before[0]] == ["AccumulateGrad"]
            (y.sum() + log_abs_det.sum()).backward()
            assert params.grad is not None
            assert params.grad.is_contiguous()


def test_batches_that_are_slices_or_repeat() -> None:
    for shape in ((5, 6), (5, 6, 20)):
        large, params = torch.randn(9, *shape[1:]), torch.randn(10, *shape[1:])
        row = torch.randn(1, *shape[1:])
        for x, p in (
            (large[2:7], params[::2]),
            (large[::2], params[5:]),
            (large[:5], row.expand(shape)),
            (row.expand(shape), params[:5]),
            (large[0].expand(shape), row.expand(shape)),
        ):
            found = with_gradients(ops.affine_coupling, x, p, split="second")
            again = with_gradients(
                lambda x, p: ops.affine_coupling(x, p, split="second"), x.contiguous(), p.contiguous()
            )
            direct, log_abs_det = ops.affine_coupling(x, p, split="second")
            assert torch.equal(direct, again[0])
            assert torch.equal(log_abs_det, again[1])
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_channels_last() -> None:
    x, params = torch.randn(3, 6, 5, 4), torch.randn(3, 6, 5, 4)
    expected = with_gradients(ops.affine_coupling, x, params, split="second")
    last = [t.to(memory_format=torch.channels_last) for t in (x, params)]
    found = with_gradients(ops.affine_coupling, *last, split="second")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_list_in_order_is_a_range() -> None:
    x, params = torch.randn(3, 7, 4), torch.randn(3, 6, 4)
    for channels in ([2, 3, 4], [4, 2, 3], [0, 3, 6], [6, 5, 4]):
        split = torch.tensor(channels)
        y, _ = ops.affine_coupling(x, params, split=split)
        s, t = params[:, 3:].exp(), params[:, :3]
        expected = x.clone()
        expected[:, channels] = x[:, channels] * s + t
        close(y, expected)
        assert torch.equal(
            y[:, [c for c in range(7) if c not in channels]], x[:, [c for c in range(7) if c not in channels]]
        )


def test_only_inputs_are_kept_for_backward() -> None:
    problem = make("affine_coupling", "exp, second half").map(lambda t: t.requires_grad_())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda _: None):  # type: ignore[misc]
        problem.call()
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in problem.inputs.values()}


@pytest.mark.parametrize(
    "shape", [(64, 24, 16, 16), (3, 4, 100_003), (30_001, 2), (401, 301), (1, 7, 20_011), (2, 40_001)]
)
@pytest.mark.parametrize("split", ["second", "even", "mask"])
def test_threads_make_no_difference(shape: tuple[int, ...], split: str) -> None:
    x = torch.randn(shape)
    chosen, moved = split_of(split, x)
    params = torch.randn(shape[0], 2 * moved, *shape[2:])
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(with_gradients(ops.affine_coupling, x, params, split=chosen, scale="tanh"))
    finally:
        torch.set_num_threads(before)
    for more in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(more, found[0], strict=True))


# ---- compilers -------------------------------------------------------------------------------------------------------


def layers(x: Tensor, params: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    y, first = ops.affine_coupling(x, params, split="second", scale="sigmoid")
    y = ops.additive_coupling(y, shift, split="first")
    y, second = ops.affine_coupling(
        y, params, split="even", inverse=True, layout="interleaved_shift_scale", reduce=False
    )
    mask = torch.arange(4, device=x.device) % 2 == 0
    y, third = ops.affine_coupling(y, y.detach(), x, split=mask, scale="softclip")
    return y, first + second.sum(1) + third


def inputs_of(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, size, generator=generator).requires_grad_() for size in (4, 4, 2)]


def test_compiles_without_a_graph_break_or_a_recompilation_for_a_batch() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 17, 9):
        inputs = inputs_of(batch)
        close(with_gradients(compiled, *inputs), with_gradients(layers, *inputs))
    assert sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs) == 1


def test_exports_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, params: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
            return layers(x, params, shift)

    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        shapes = {name: {0: batch} for name in ("x", "params", "shift")}
        program = torch.export.export(Model(), tuple(inputs_of(3)), dynamic_shapes=shapes)
        for size in (3, 8):
            close(program.module()(*inputs_of(size)), layers(*inputs_of(size)))


# ---- what is wrong with a call ---------------------------------------------------------------------------------------

X, PARAMS = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": X.long()}, ValueError, "x must be of a floating dtype .*, got torch.int64"),
        ({"x": torch.zeros(4)}, RuntimeError, r"x must have at least 2 dimensions, \[B, C, ...\], got \[4\]"),
        ({"params": None}, TypeError, "params must be a Tensor, got NoneType"),
        ({"params": PARAMS.int()}, ValueError, "params must be of a floating dtype"),
        ({"params": torch.zeros(2, 3, 3)}, RuntimeError, r"params must be \[2, 4, 3\].*got \[2, 3, 3\]"),
        ({"params": torch.zeros(2, 4)}, RuntimeError, r"params must be \[2, 4, 3\].*got \[2, 4\]"),
        ({"params": torch.zeros(2, 1, 3)}, RuntimeError, r"params must be \[2, 4, 3\].*got \[2, 1, 3\]"),
        ({"shift": torch.zeros(2, 2, 3)}, RuntimeError, r"params must be \[2, 2, 3\].*got \[2, 4, 3\]"),
        ({"params": torch.zeros(2, 2, 3), "shift": torch.zeros(2, 3, 3)}, RuntimeError, r"shift must be \[2, 2, 3\]"),
        ({"params": PARAMS.to("meta")}, RuntimeError, "params must be on cpu, as x is; got meta"),
        ({"scale": "cube"}, ValueError, "scale must be one of 'exp', .*, got 'cube'"),
        ({"scale": 3}, ValueError, "scale must be one of 'exp', .*, got 3"),
        ({"layout": "side"}, ValueError, "layout must be one of 'shift_scale', .*, got 'side'"),
        ({"order": "both"}, ValueError, "order must be one of 'multiply_add', 'add_multiply', got 'both'"),
        ({"split": "half"}, ValueError, "split must be one of 'all', .*, got 'half'"),
        ({"split": 2}, TypeError, "split must be a str or a Tensor, got int"),
        (
            {"split": torch.tensor([0.0, 1.0])},
            ValueError,
            "split must be a bool mask or int64 channels, got torch.float32",
        ),
        ({"split": torch.tensor([[0], [1]])}, RuntimeError, r"channels of split must be a vector, got \[2, 1\]"),
        ({"split": torch.tensor([0, 4])}, RuntimeError, r"split must hold channels of x, in \[0, 4\), got 4"),
        ({"split": torch.tensor([0, -1])}, RuntimeError, r"split must hold channels of x, in \[0, 4\), got -1"),
        ({"split": torch.tensor([2, 2])}, RuntimeError, "split must hold no channel twice, got 2 again"),
        (
            {"split": torch.ones(5, 3, dtype=torch.bool)},
            RuntimeError,
            r"mask must broadcast with .* \[4, 3\]; got \[5, 3\]",
        ),
        ({"split": torch.tensor([0, 1], device="meta")}, RuntimeError, "split must be on cpu, as x is; got meta"),
        ({"inverse": 1}, TypeError, "inverse must be a bool, got int"),
        ({"reduce": None}, TypeError, "reduce must be a bool, got NoneType"),
        ({"offset": 1.0}, ValueError, "scale='exp' takes no offset, got 1.0"),
        ({"scale": "tanh", "eps": 1.0}, ValueError, "scale='tanh' takes no eps, got 1.0"),
        ({"scale": "sigmoid", "clamp": 1.0}, ValueError, "scale='sigmoid' takes no clamp"),
        ({"scale": "sigmoid", "eps": -1.0}, ValueError, "eps must be at least 0 and finite, got -1.0"),
        ({"scale": "sigmoid", "offset": "2"}, TypeError, "offset must be a number, got str"),
        ({"scale": "tanh", "clamp": 0.0}, ValueError, "clamp must be above 0 and finite, got 0.0"),
        ({"scale": "softclip", "clamp": 1.0}, ValueError, "clamp must be below 1 for scale='softclip'"),
        (
            {"scale": "clip", "clamp": 1.0},
            TypeError,
            r"clamp must be a pair \(lowest, highest\) for scale='clip', got 1.0",
        ),
        ({"scale": "clip", "clamp": (1.0, -1.0)}, ValueError, r"clamp must be \(lowest, highest\), got"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "params": PARAMS, "split": "second", **changed}
    with pytest.raises(error, match=message):
        ops.affine_coupling(**arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a Tensor, got float"),
        ({"shift": torch.zeros(2, 4, 3)}, RuntimeError, r"shift must be \[2, 2, 3\].*got \[2, 4, 3\]"),
        ({"split": "none"}, ValueError, "split must be one of"),
        ({"inverse": "no"}, TypeError, "inverse must be a bool, got str"),
    ],
)
def test_wrong_arguments_of_the_additive_one(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "shift": torch.zeros(2, 2, 3), "split": "second", **changed}
    with pytest.raises(error, match=f"additive_coupling: {message}"):
        ops.additive_coupling(**arguments)


def test_the_operator_itself_checks_what_it_is_given() -> None:
    """Whoever calls torch.ops directly can read nothing out of bounds."""
    op = torch.ops.genfuse.affine_coupling
    tail = (False, False, 0.0, 0.0, 0.0, 2.0, True)
    with pytest.raises(RuntimeError, match=r"params must have the shape of x, .* but for 4 channels"):
        op(X, torch.zeros(2, 3, 3), None, None, 0, 0, 2, *tail)
    with pytest.raises(RuntimeError, match=r"scale must be a code in \[0, 9\), got 9"):
        op(X, PARAMS, None, None, 9, 0, 2, *tail)
    with pytest.raises(RuntimeError, match=r"layout must be a code in \[0, 4\), got -1"):
        op(X, PARAMS, None, None, 0, -1, 2, *tail)
    with pytest.raises(RuntimeError, match="channels must be given for a split by a list or a mask"):
        op(X, PARAMS, None, None, 0, 0, 5, *tail)
    with pytest.raises(RuntimeError, match="a mask must have the shape of a batch row"):
        op(X, torch.zeros(2, 8, 3), None, torch.ones(4, dtype=torch.bool), 0, 0, 6, *tail)
    with pytest.raises(RuntimeError, match="grad_y must have the shape of x"):
        torch.ops.genfuse.affine_coupling_backward(torch.zeros(3), None, X, PARAMS, None, None, 0, 0, 2, *tail, 3)
