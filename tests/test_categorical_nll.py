"""The likelihood of levels under a softmax: every view of the logits, and the ends of their range. What is asked of all
operators is in test_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from genfuse import ops
from tolerances import FACTOR, ULPS, assert_as_accurate, eager_runs
from torch import Tensor

INF, NAN = float("inf"), float("nan")
close = torch.testing.assert_close
both = pytest.mark.parametrize("backend", ["native", "reference"])
nll = ops.categorical_nll


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(*shape: int) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


# Logits in some view, where neighbours in memory are positions, levels, or neither; and the dimension of the levels.
VIEWS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "[B, L, H, W]": (lambda: draw(3, 17, 5, 7), 1),
    "one position": (lambda: draw(1, 256), 1),
    "rows": (lambda: draw(6, 19), 1),
    "levels last": (lambda: draw(2, 3, 5, 256), -1),
    "whole tiles": (lambda: draw(2, 9, 8, 64), 1),
    "tiles and a rest": (lambda: draw(2, 5, 3, 71), 1),
    "channels last": (lambda: last(draw(3, 256, 3, 5)), 1),
    "[B, C, L, H, W]": (lambda: draw(2, 3 * 11, 4, 16).view(2, 3, 11, 4, 16), 2),
    "[B, C, L, H, W], channels last": (lambda: last(draw(2, 3 * 11, 4, 16)).view(2, 3, 11, 4, 16), 2),
    "[B, L, C, H, W]": (lambda: draw(2, 11 * 3, 4, 5).view(2, 11, 3, 4, 5), 1),
    "[B, L, C, H, W], channels last": (lambda: last(draw(2, 11 * 3, 4, 5)).view(2, 11, 3, 4, 5), 1),
    "short runs": (lambda: draw(5, 13, 3), 1),
    "one level": (lambda: draw(4, 1, 6), 1),
    "transposed": (lambda: draw(4, 5, 19).transpose(1, 2), 1),
    "expanded": (lambda: draw(1, 5, 19).expand(6, 5, 19), 1),
    "every other": (lambda: draw(6, 5, 38)[:, :, ::2], 1),
    "a part": (lambda: draw(6, 19, 9, 40)[1:5, 2:, ::2, 3:], 1),
}


def target_of(logits: Tensor, dim: int) -> Tensor:
    sizes = [size for i, size in enumerate(logits.shape) if i != dim % logits.dim()]
    return torch.randint(0, logits.shape[dim], sizes, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_every_view_is_torchs_cross_entropy(name: str, dtype: torch.dtype) -> None:
    make, dim = VIEWS[name]
    base = make()
    # `to` keeps strides where they are dense; where they are not, the numbers between are poison.
    logits = base if dtype == torch.float64 else base.to(dtype)
    if name in ("every other", "a part"):
        logits = torch.stack((logits, torch.full_like(logits, NAN)), -1)[..., 0]
    target = target_of(logits, dim)

    def exact(z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(wide.movedim(dim, 1), target, reduction="none")

    leaf = logits.detach().requires_grad_()
    for reduction in ("pixel", "none", "sum", "mean", "bits_per_dim"):
        found = nll(leaf, target, dim=dim, reduction=reduction)
        truth_leaf = logits.double().requires_grad_()
        truth = exact(truth_leaf)
        images = truth.flatten(1).sum(1) if truth.dim() > 1 else truth
        count = math.prod(target.shape[1:])
        truth = {
            "pixel": truth,
            "none": images,
            "sum": images.sum(),
            "mean": images.mean(),
            "bits_per_dim": images.mean() / (count * math.log(2.0)),
        }[reduction]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        cotangent = torch.linspace(0.5, 1.5, found.numel(), dtype=torch.float64).view(found.shape)
        (by_logits,) = torch.autograd.grad(found, leaf, cotangent.to(found.dtype), retain_graph=True)
        (slope,) = torch.autograd.grad(truth, truth_leaf, cotangent)
        eps = torch.finfo(found.dtype).eps
        close(found.double(), truth, rtol=8 * eps, atol=16 * eps * (1 if reduction == "pixel" else count))
        half_ulp = torch.finfo(dtype).eps
        close(by_logits.double(), slope, rtol=16 * eps + half_ulp, atol=8 * eps)
        assert by_logits.stride() == torch.empty_like(leaf).stride()


def test_no_copy_of_the_logits_is_made() -> None:
    """Of any view of a convolution's result: the operator reads it, and autograd keeps it, where it is."""
    for make, dim in (VIEWS["[B, C, L, H, W]"], VIEWS["[B, C, L, H, W], channels last"], VIEWS["channels last"]):
        logits = make().float()
        leaf, kept = logits.requires_grad_(), []
        target = target_of(leaf, dim)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):  # type: ignore[misc]
            nll(leaf, target, dim=dim)
        beside = [t for t in kept if t.data_ptr() not in (leaf.data_ptr(), target.data_ptr())]
        assert [t.shape for t in beside] == [target.shape] * 2  # two numbers for each position


def test_as_accurate_as_eager() -> None:
    logits = 5.0 * torch.randn(4, 256, 6, 11, generator=torch.Generator().manual_seed(0))
    target = target_of(logits, 1)

    def run(z: Tensor) -> list[Tensor]:
        leaf = z.detach().requires_grad_()
        each = F.cross_entropy(leaf, target, reduction="none").flatten(1).sum(1)
        return [each.detach(), *torch.autograd.grad(each.sum(), leaf)]

    leaf = logits.clone().requires_grad_()
    found = nll(leaf, target)
    ours = [found.detach(), *torch.autograd.grad(found.sum(), leaf)]
    eager, exact = eager_runs(lambda nudge: run(nudge(logits))), run(logits.double())
    for i, name in enumerate(("nll", "gradient")):
        assert_as_accurate(ours[i], eager[i], exact[i], name, gradient=i == 1)


SHIFTED = pytest.mark.parametrize(
    "name", ["[B, L, H, W]", "whole tiles", "tiles and a rest", "levels last", "[B, L, C, H, W], channels last"]
)


@SHIFTED
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e4, 1e5, -1e6, 1e7])
def test_what_all_logits_have_in_common_costs_nothing(name: str, offset: float) -> None:
    """A softmax knows differences alone. The logits are rounded after they are moved: both start from the same."""
    make, dim = VIEWS[name]
    logits = (make() + offset).float()
    target = target_of(logits, dim)

    def run(z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        each = loss(leaf)
        return each.detach(), torch.autograd.grad(each.sum(), leaf)[0]

    def eager(z: Tensor) -> tuple[Tensor, Tensor]:
        return run(z, lambda leaf: F.cross_entropy(leaf.movedim(dim, 1), target, reduction="none"))

    ours = run(logits, lambda leaf: nll(leaf, target, dim=dim, reduction="pixel"))
    # Not nudged, which moves large logits apart by more than they differ; in both orders of the levels instead.
    flipped, other = logits.flip(dim), logits.shape[dim] - 1 - target
    back = run(flipped, lambda leaf: F.cross_entropy(leaf.movedim(dim, 1), other, reduction="none"))
    theirs, exact = [eager(logits), (back[0], back[1].flip(dim))], eager(logits.double())
    for i, what in enumerate(("nll", "gradient")):
        assert_as_accurate(ours[i], [run[i] for run in theirs], exact[i], what, gradient=i == 1)
    left, lefts = ours[1].double().sum(dim), [gradient.double().sum(dim) for _, gradient in theirs]
    allowed = FACTOR * max(float(each.abs().max()) for each in lefts) + ULPS * torch.finfo(torch.float32).eps
    assert float(left.abs().max()) <= allowed


@both
@SHIFTED
def test_the_largest_logits(name: str, backend: str) -> None:
    """Equal ones that have no sum, and ones whose difference overflows."""
    make, dim = VIEWS[name]
    logits = torch.full_like(make().float(), -3e38)
    target = torch.zeros_like(target_of(logits, dim))
    logits.select(dim, 0).fill_(3e38)
    logits.select(dim, 3).fill_(3e38)
    leaf = logits.requires_grad_()
    with genfuse.use_backend(backend):
        found = nll(leaf, target, dim=dim, reduction="pixel")
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    close(found, torch.full_like(found, math.log(2.0)))
    expected = torch.zeros_like(gradient)
    expected.select(dim, 0).fill_(-0.5)
    expected.select(dim, 3).fill_(0.5)
    close(gradient, expected)


@both
@pytest.mark.parametrize("name", ["[B, L, H, W]", "levels last", "[B, L, C, H, W], channels last", "short runs"])
def test_ends_of_the_range(backend: str, name: str) -> None:
    make, dim = VIEWS[name]
    clean = make().float()
    target = target_of(clean, dim)

    def run(z: Tensor, target: Tensor = target) -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        with genfuse.use_backend(backend):
            found = nll(leaf, target, dim=dim, reduction="pixel")
        return found.detach().flatten(), torch.autograd.grad(found.sum(), leaf)[0].movedim(dim, -1).flatten(0, -2)

    def changed(level: int, value: float, at: int = 1) -> Tensor:
        rows = clean.movedim(dim, -1).flatten(0, -2).clone()
        rows[at, level] = value
        back = rows.view(clean.movedim(dim, -1).shape).movedim(-1, dim)
        return torch.empty_like(clean).copy_(back)

    expected, slopes = run(clean)
    others = torch.arange(len(expected)) != 1
    right, wrong = int(target.flatten()[1]), (int(target.flatten()[1]) + 1) % clean.shape[dim]
    for level, value, outcome in (
        (right, NAN, "nan"), (wrong, NAN, "nan"), (right, INF, "nan"), (wrong, INF, "nan"),
        (right, -INF, "inf"), (wrong, -INF, "less"), (wrong, 1e30, "more"), (right, 1e30, "none"),
    ):  # fmt: skip
        found, gradient = run(changed(level, value))
        assert torch.equal(found[others], expected[others])
        assert torch.equal(gradient[others], slopes[others])
        if outcome == "nan":
            assert bool(found[1].isnan())
        elif outcome == "inf":
            assert float(found[1]) == INF
        elif outcome == "less":
            assert float(found[1]) < float(expected[1])
            assert float(gradient[1, level]) == 0.0  # exactly: it cannot be
        elif outcome == "more":
            assert float(found[1]) == pytest.approx(1e30, rel=1e-6)
            assert float(gradient[1, level]) == 1.0
            assert float(gradient[1, right]) == -1.0
        else:
            assert float(found[1]) == 0.0
            assert not bool(gradient[1].any())
    nothing = clean.movedim(dim, -1).flatten(0, -2).clone()
    nothing[1] = -INF
    nothing = nothing.view(clean.movedim(dim, -1).shape).movedim(-1, dim).contiguous()
    assert bool(run(nothing)[0][1].isnan())


def test_targets_of_every_integer_type() -> None:
    logits = draw(2, 256, 3, 5)
    target = target_of(logits, 1)
    expected = nll(logits, target)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(nll(logits, target.to(dtype)), expected)
    assert torch.equal(nll(logits, target.transpose(1, 2).contiguous().transpose(1, 2)), expected)


def test_threads_make_no_difference() -> None:
    for name in ("[B, L, H, W]", "channels last", "[B, L, C, H, W], channels last"):
        logits = VIEWS[name][0]().float()
        logits = logits.repeat_interleave(20, 0) if name == "[B, L, H, W]" else logits
        target = target_of(logits, 1)
        one: list[Tensor] = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            found = nll(leaf, target)
            results = [found.detach(), *torch.autograd.grad(found.sum(), leaf)]
            one = one or results
            assert all(torch.equal(a, b) for a, b in zip(one, results, strict=True))


def test_meta_and_expanded_calls() -> None:
    logits, target = draw(2, 7, 5), torch.zeros(2, 5, dtype=torch.int64)
    assert nll(logits.to("meta"), target.to("meta")).shape == (2,)
    leaf = draw(1, 7, 5).requires_grad_()
    wide = nll(leaf.expand(4, 7, 5), target[:1].expand(4, 5))
    close(wide, nll(leaf, target[:1]).expand(4))
    (gradient,) = torch.autograd.grad(wide.sum(), leaf)
    close(gradient, 4 * torch.autograd.grad(nll(leaf, target[:1]).sum(), leaf)[0])


# ---- mistakes --------------------------------------------------------------------------------------------------------

Z, T = torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64)
ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([0.0], T), {}, TypeError, "logits must be a Tensor, got list"),
    ((Z, 1), {}, TypeError, "target must be a Tensor, got int"),
    ((Z.long(), T), {}, ValueError, "logits must be of a floating dtype .*, got torch.int64"),
    ((Z, T.float()), {}, ValueError, "target must be int64, int32, int16 or uint8, got torch.float32"),
    ((Z, T.to("meta")), {}, RuntimeError, "target must be on cpu, as logits is; got meta"),
    ((Z, T), {"dim": 1.0}, TypeError, "dim must be an int, got float"),
    ((Z, T), {"dim": 3}, IndexError, r"dim must be a dimension of logits, in \[-3, 2\], got 3"),
    ((Z, T), {"dim": 0}, RuntimeError, "dim must not be 0, the dimension of the batch"),
    ((Z, T), {"dim": -3}, RuntimeError, "dim must not be 0, the dimension of the batch"),
    ((Z, T), {"dim": 2}, RuntimeError, r"target must have the shape of logits without dimension 2, \[2, 5\]; got \[2"),
    ((Z, T[:, :2]), {}, RuntimeError, r"target must have the shape of logits without dimension 1, \[2, 3\]; got"),
    ((Z, T[0]), {}, RuntimeError, "target must have the shape of logits"),
    ((Z[:, :0], T), {}, RuntimeError, r"logits must have at least one level in dimension 1, got \[2, 0, 3\]"),
    ((Z, T + 5), {}, IndexError, r"target must hold levels in \[0, 5\), got 5"),
    ((Z, T - 1), {}, IndexError, r"target must hold levels in \[0, 5\), got -1"),
    ((Z, (T + 7).to(torch.uint8)), {}, IndexError, r"target must hold levels in \[0, 5\), got 7"),
    ((Z, T), {"reduction": "batch"}, ValueError, "reduction must be one of 'none', 'pixel', 'sum', 'mean', 'bits_per"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), ERRORS)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as info:
        nll(*arguments, **options)
    assert str(info.value).startswith("categorical_nll: ")


def test_direct_callers_cannot_reach_out_of_bounds() -> None:
    ops_ = torch.ops.genfuse
    each = torch.zeros(2, 3)
    for call in (
        lambda: ops_.categorical_nll(Z, T + 5, 1, False),
        lambda: ops_.categorical_nll(Z, T - 1, 1, False),
        lambda: ops_.categorical_nll(Z, T[:1], 1, False),
        lambda: ops_.categorical_nll(Z, T, 0, False),
        lambda: ops_.categorical_nll(Z, T, 3, False),
        lambda: ops_.categorical_nll(Z, T.float(), 1, False),
        lambda: ops_.categorical_nll(Z.long(), T, 1, False),
        lambda: ops_.categorical_nll(Z[:, :0], T, 1, False),
        lambda: ops_.categorical_nll_backward(torch.zeros(3), Z, T, each, each, 1, False, 1),
        lambda: ops_.categorical_nll_backward(torch.zeros(2), Z, T + 5, each, each, 1, False, 1),
        lambda: ops_.categorical_nll_backward(torch.zeros(2), Z, T, each[:1], each, 1, False, 1),
        lambda: ops_.categorical_nll_backward(torch.zeros(2), Z, T, each, each[:1], 1, False, 1),
    ):
        with pytest.raises(RuntimeError):
            call()
