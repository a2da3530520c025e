"""The invertible layers: their inverses, their Jacobians, and the chain that stores nothing."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from genfuse import nn, ops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, D, CONTEXT = 4, 5, 3
IMAGE = (4, 4, 6)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def conv_net(ins: int, outs: int) -> nn.ConvNet:
    return nn.ConvNet(ins, outs, 6)


def conv_net_of_context(ins: int, outs: int) -> nn.ConvNet:
    return nn.ConvNet(ins, outs, 6, context_features=CONTEXT)


MASK = torch.tensor([True, False, True, True, False])
SPLITS: dict[str, Any] = {"first": "first", "even": "even", "odd": "odd", "indices": [3, 0], "mask": MASK}
VECTORS: dict[str, Callable[[], nn.Transform]] = {
    "affine": lambda: nn.AffineCoupling(D, hidden=(7,)),
    "affine, add first": lambda: nn.AffineCoupling(D, hidden=(7,), order="add_multiply", scale="sigmoid"),
    "additive": lambda: nn.AdditiveCoupling(D, hidden=(7,)),
    "spline": lambda: nn.SplineCoupling(D, hidden=(7,), num_bins=4),
    "spline, circular": lambda: nn.SplineCoupling(D, hidden=(7,), tails="circular", tail_bound=9.0),
    "spline, bounded": lambda: nn.SplineCoupling(D, hidden=(7,), tails=None, tail_bound=9.0),
    "spline, identity": lambda: nn.SplineCoupling(D, hidden=(7,), normalizer="identity"),
    "spline, linear": lambda: nn.SplineCoupling(D, hidden=(7,), kind="linear"),
    "spline, quadratic": lambda: nn.SplineCoupling(D, hidden=(7,), kind="quadratic"),
    "spline, cubic": lambda: nn.SplineCoupling(D, hidden=(7,), kind="cubic"),
    "spline, residual": lambda: nn.SplineCoupling(D, lambda ins, outs: nn.ResidualNet(ins, outs, 6)),
    **{
        f"{name}, {split}": lambda kind=kind, split=split: kind(D, hidden=(7,), split=SPLITS[split])
        for name, kind in (("affine", nn.AffineCoupling), ("spline", nn.SplineCoupling))
        for split in SPLITS
    },
    "actnorm": lambda: nn.ActNorm(D),
    "linear": lambda: nn.LULinear(D),
    "linear, rotation": lambda: nn.LULinear(D, bias=False, identity_init=False),
    "convolution of vectors": lambda: nn.InvertibleConv2d(D),
    "permutation": lambda: nn.Permutation(D),
    "affine autoregressive": lambda: nn.MaskedAffineAutoregressive(D, (9, 8)),
    "affine autoregressive, softplus": lambda: nn.MaskedAffineAutoregressive(D, (9,), scale="softplus"),
    "spline autoregressive": lambda: nn.MaskedSplineAutoregressive(D, hidden=(9, 8)),
    "inverse": lambda: nn.Inverse(nn.MaskedAffineAutoregressive(D, (9, 8), activation="tanh")),
    "glow step of vectors": lambda: nn.GlowStep(D, hidden=(7,)),
    "flow": lambda: nn.Flow([nn.ActNorm(D), nn.AffineCoupling(D, hidden=(7,)), nn.Permutation(D, "reverse")]),
}
IMAGES: dict[str, Callable[[], nn.Transform]] = {
    "affine of images": lambda: nn.AffineCoupling(4, conv_net),
    "affine, checkerboard": lambda: nn.AffineCoupling(4, conv_net, split=nn.checkerboard_mask(4, 6)),
    "spline of images": lambda: nn.SplineCoupling(4, conv_net, split="first"),
    "spline, checkerboard": lambda: nn.SplineCoupling(4, conv_net, split=nn.checkerboard_mask(4, 6, invert=True)),
    "actnorm of images": lambda: nn.ActNorm(4),
    "convolution": lambda: nn.InvertibleConv2d(4),
    "convolution, full": lambda: nn.InvertibleConv2d(4, lu=False),
    "permutation of columns": lambda: nn.Permutation(6, "reverse", dim=3),
    "squeeze": lambda: nn.Squeeze(),
    "glow step": lambda: nn.GlowStep(4, conv_net),
    "glow step, additive": lambda: nn.GlowStep(4, conv_net, additive=True, lu=False, split="first"),
    "scales": lambda: nn.MultiScale(
        [nn.Flow([nn.Squeeze(), nn.GlowStep(16, conv_net)]), nn.GlowStep(8, conv_net)], [nn.Split(16)], IMAGE
    ),
    "scales, standard": lambda: nn.MultiScale([nn.Squeeze(), nn.Squeeze(1)], [nn.Split(16, prior="standard")], IMAGE),
}
CONTEXTS: dict[str, Callable[[], nn.Transform]] = {
    "affine, context": lambda: nn.AffineCoupling(D, hidden=(7,), context_features=CONTEXT),
    "additive, context": lambda: nn.AdditiveCoupling(D, hidden=(7,), context_features=CONTEXT),
    "spline, context": lambda: nn.SplineCoupling(D, hidden=(7,), context_features=CONTEXT),
    "affine autoregressive, context": lambda: nn.MaskedAffineAutoregressive(D, (9, 8), context_features=CONTEXT),
    "spline autoregressive, context": lambda: nn.MaskedSplineAutoregressive(D, hidden=(9,), context_features=CONTEXT),
    "flow, context": lambda: nn.Flow([nn.LULinear(D), nn.AffineCoupling(D, hidden=(7,), context_features=CONTEXT)]),
}
CONTEXT_IMAGES: dict[str, Callable[[], nn.Transform]] = {
    "glow step, context": lambda: nn.GlowStep(4, conv_net_of_context, context_features=CONTEXT),
}
ALL = {**VECTORS, **IMAGES, **CONTEXTS, **CONTEXT_IMAGES}
AUTOREGRESSIVE = [name for name in ALL if "autoregressive" in name or name == "inverse"]


def build(case: str, dtype: torch.dtype = torch.float64) -> Any:
    """A layer whose parameters are not those that it starts with, and that has seen its first batch."""
    torch.manual_seed(1)
    layer = ALL[case]()
    for name, parameter in layer.named_parameters():
        if name.endswith(("lower", "upper", "log_s")) or "conv.weight" in name or name == "weight":
            parameter.data += 0.1 * torch.randn_like(parameter)  # a matrix that is well conditioned
        elif "prior" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.4 if parameter.dim() < 4 else 0.15)
    for module in layer.modules():
        if isinstance(module, nn.ActNorm):
            module.initialized.fill_(True)
            module._ready = True
    return layer.to(dtype)


def inputs(case: str, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shape = IMAGE if case in IMAGES or case in CONTEXT_IMAGES else (D,)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(batch, CONTEXT, generator=generator, dtype=torch.float64).to(dtype)
    return (x, context) if case in CONTEXTS or case in CONTEXT_IMAGES else (x,)


def jacobian(layer: Any, x: Tensor, *context: Tensor) -> Tensor:
    """Of the first of a batch, ``[D, D]``."""
    more = [one[:1] for one in context]

    def one(x: Tensor) -> Tensor:
        z: Tensor = layer(x.unsqueeze(0), *more)[0]
        return z.flatten()

    found: Tensor = torch.autograd.functional.jacobian(one, x[0])
    return found.flatten(1)


# ---- a bijection, and its volume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_log_abs_det_is_the_jacobians(case: str) -> None:
    layer, (x, *context) = build(case), inputs(case)
    z, log_abs_det = layer(x, *context)
    assert log_abs_det.shape == (BATCH,)
    assert z.shape[0] == BATCH
    assert z[0].numel() == x[0].numel()
    exact = torch.linalg.slogdet(jacobian(layer, x, *context))[1]
    torch.testing.assert_close(log_abs_det[0], exact, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.inverse(z, *context)[1], -log_abs_det, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ALL)
def test_round_trip(case: str, dtype: torch.dtype) -> None:
    """x comes back within 64 ulp of what rounding z may move it by: |x| + |J^-1| (|z| + |J| |x|), row sums.

    z is off by a few ulp of itself and of its terms, which the inverse map takes to x (64: the networks' own rounding,
    which both directions share but for the order of the autoregressive one).
    """
    layer, (x, *context) = build(case, dtype), inputs(case, dtype)
    with torch.no_grad():
        z, _ = layer(x, *context)
        back, _ = layer.inverse(z, *context)
    assert back.dtype == z.dtype == dtype
    exact = build(case)
    wide = [one.double() for one in (x, *context)]
    slopes = jacobian(exact, *wide).abs()
    ahead = z[0].double().abs().flatten() + slopes @ wide[0][0].abs().flatten()
    reach = wide[0][0].abs().flatten() + torch.linalg.inv(jacobian(exact, *wide)).abs() @ ahead
    error = (back[0].double() - wide[0][0]).abs().flatten()
    bound = 64 * torch.finfo(dtype).eps * reach
    assert bool((error <= bound).all()), f"error {float((error / bound).max()):.3g} of the bound"


@pytest.mark.parametrize("case", ALL)
def test_inverse_is_differentiable(case: str) -> None:
    """The gradient through a round trip is the identity's, and nothing's to the parameters."""
    layer, (x, *context) = build(case), inputs(case)
    x.requires_grad_()
    z, ahead = layer(x, *context)
    back, behind = layer.inverse(z, *context)
    weights = torch.randn(back.shape, dtype=back.dtype)
    total = (back * weights).sum() + (ahead + behind).square().sum() + (ahead + behind).sum()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    torch.testing.assert_close(gradients[0], weights, rtol=1e-8, atol=1e-9)
    for gradient in gradients[1:]:
        if gradient is not None:
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("case", ALL)
def test_copied_pickled_and_loaded(case: str) -> None:
    layer, given = build(case), inputs(case)
    with torch.no_grad():
        layer(*given)  # what it remembers is not copied
        layer.inverse(layer(*given)[0], *given[1:])
    torch.manual_seed(99)
    fresh = ALL[case]().double()
    fresh.load_state_dict(layer.state_dict())
    others = [fresh, copy.deepcopy(layer)]
    if "residual" not in case:  # whose lambda is no longer there, but pickle need not know that
        others.append(pickle.loads(pickle.dumps(layer)))
    want = layer(*given)
    for other in others:
        for ours, theirs in zip(other(*given), want, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(other.inverse(want[0], *given[1:])[0], layer.inverse(want[0], *given[1:])[0])


@pytest.mark.parametrize("case", ALL)
def test_no_rows(case: str) -> None:
    layer, (x, *context) = build(case), inputs(case, batch=0)
    z, log_abs_det = layer(x, *context)
    assert log_abs_det.shape == (0,)
    assert layer.inverse(z, *context)[0].shape == x.shape


@pytest.mark.parametrize("case", ALL)
def test_autocast(case: str) -> None:
    """Networks follow it, volumes stay in float32, and matrices stay exact."""
    layer, (x, *context) = build(case, torch.float32), inputs(case, torch.float32)
    exact, exact_log_det = layer(x, *context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_abs_det = layer(x, *context)
        back, behind = layer.inverse(z, *context)
    assert log_abs_det.dtype == behind.dtype == torch.float32
    assert z.dtype == back.dtype == torch.float32
    assert bool((z - exact).norm() <= 0.05 * exact.norm())
    assert bool((log_abs_det - exact_log_det).norm() <= 0.05 * exact_log_det.norm() + 0.1)
    if case not in AUTOREGRESSIVE:  # whose network runs once in bfloat16 and once in float32
        plain = float((layer.inverse(exact, *context)[0] - x).abs().max())
        assert float((back - x).abs().max()) <= 16 * plain + 64 * torch.finfo(torch.float32).eps
    if z.requires_grad:
        (z.square().sum() + log_abs_det.sum()).backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())


COMPILED = [
    "affine",
    "spline",
    "spline, mask",
    "actnorm of images",
    "convolution",
    "linear",
    "glow step",
    "affine autoregressive",
    "spline autoregressive",
    "scales",
    "glow step, context",
]


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_in_one_graph(case: str) -> None:
    torch._dynamo.reset()
    layer, given = build(case, torch.float32), inputs(case, torch.float32)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for left, right in zip(compiled(*given), eager(*given), strict=True):
        torch.testing.assert_close(left, right)
    for one in (compiled, eager):
        z, log_abs_det = one(*given)
        (z.square().sum() + log_abs_det.sum()).backward()
    for (name, ours), theirs in zip(layer.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        z = eager(*given)[0]
        backward = torch.compile(layer.inverse, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(backward(z, *given[1:])[0], given[0], rtol=1e-3, atol=1e-3)


# ---- the chain -------------------------------------------------------------------------------------------------------


def chain(reversible: bool, depth: int = 4, context: bool = True, dtype: torch.dtype = torch.float64) -> nn.Flow:
    """Layers of all cheap kinds; one coupling stands in two places."""
    torch.manual_seed(3)
    features = CONTEXT if context else None
    shared = nn.AffineCoupling(D, hidden=(6,), context_features=features, zero_init=False)
    steps: list[nn.Transform] = [shared]
    for index in range(depth):
        steps += [nn.ActNorm(D), nn.LULinear(D)]
        split = "first" if index % 2 else "second"
        steps.append(nn.AffineCoupling(D, hidden=(6,), split=split, context_features=features, zero_init=False))
        steps.append(nn.SplineCoupling(D, hidden=(6,), num_bins=4, split=split, context_features=features))
    steps += [nn.Permutation(D, "reverse"), shared]
    flow = nn.Flow(steps, reversible=reversible).to(dtype)
    flow(torch.randn(20, D, dtype=dtype), torch.randn(20, CONTEXT, dtype=dtype))
    return flow


def derivatives(flow: nn.Flow, x: Tensor, context: Tensor | None, invert: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    z, log_abs_det = (flow.inverse if invert else flow)(x, context)
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(one.shape, generator=generator, dtype=one.dtype) for one in (z, log_abs_det)]
    loss = (z * weights[0]).sum() + (log_abs_det * weights[1]).sum()
    flow.zero_grad()
    loss.backward()
    found = [z.detach(), log_abs_det.detach(), x.grad]
    if context is not None:
        found.append(context.grad)
    return [*found, *(p.grad for p in flow.parameters())]


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("invert", [False, True])
def test_reversible_gradients_are_the_stored_ones(invert: bool, with_context: bool) -> None:
    stored, reversible = chain(False, context=with_context), chain(True, context=with_context)
    x, context = torch.randn(7, D, dtype=torch.float64), torch.randn(7, CONTEXT, dtype=torch.float64)
    found = [derivatives(flow, x, context if with_context else None, invert) for flow in (stored, reversible)]
    assert len(found[0]) > 40
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-10)
    assert torch.equal(found[0][0], found[1][0])


def test_reversible_with_one_result_or_frozen_parts() -> None:
    x, context = torch.randn(7, D, dtype=torch.float64), torch.randn(7, CONTEXT, dtype=torch.float64)
    for use in (lambda z, log_det: z.square().sum(), lambda z, log_det: log_det.square().sum()):
        gradients = []
        for flow in (chain(False), chain(True)):
            for index, parameter in enumerate(flow.parameters()):
                parameter.requires_grad_(index % 3 > 0)
            use(*flow(x, context)).backward()
            gradients.append([p.grad for p in flow.parameters()])
        for left, right in zip(*gradients, strict=True):
            assert (left is None) <= (right is None or not bool(right.any()))
            if left is not None:
                torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-10)
    flow = chain(True).requires_grad_(False)
    assert not flow(x, context)[0].requires_grad
    x.requires_grad_()
    stored = chain(False)
    for one in (flow, stored):
        one(x, context)[0].square().sum().backward()
    both = torch.autograd.grad(flow(x, context)[0].square().sum() - stored(x, context)[0].square().sum(), x)[0]
    torch.testing.assert_close(both, torch.zeros_like(both), rtol=0.0, atol=1e-9)


def count_saved(flow: nn.Flow, x: Tensor, context: Tensor) -> int:
    """Numbers that forward keeps for backward, parameters aside."""
    own = {p.data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = flow(x, context)
    del result
    return sum(kept.values())


def test_reversible_keeps_nothing_of_the_depth() -> None:
    x, context = torch.randn(50, D, dtype=torch.float64), torch.randn(50, CONTEXT, dtype=torch.float64)
    shallow, deep = (count_saved(chain(True, depth), x, context) for depth in (1, 6))
    assert shallow == deep == x.numel() + context.numel()  # the result, and the context
    stored = [count_saved(chain(False, depth), x, context) for depth in (1, 6)]
    assert stored[1] > 3 * stored[0] > 10 * deep


def test_reversible_backward_keeps_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """While backward runs, activations of at most one step are alive, however deep the chain."""
    alive: list[int] = []

    def watched(flow: nn.Flow) -> int:
        x, context = torch.randn(64, D, dtype=torch.float64), torch.randn(64, CONTEXT, dtype=torch.float64)
        alive.clear()
        for step in flow:
            step.register_forward_pre_hook(lambda *_: alive.append(batches(64)))
        z, log_abs_det = flow(x, context)
        alive.clear()
        (z.sum() + log_abs_det.sum()).backward()
        return max(alive)

    def batches(size: int) -> int:
        found = (one for one in gc.get_objects() if type(one) is Tensor)
        return sum(one.dim() > 0 and one.shape[0] == size for one in found)

    gc.collect()
    shallow, deep = watched(chain(True, 1)), watched(chain(True, 3))
    assert deep <= shallow + 2


def test_reversible_under_functional_call_and_autograd_grad() -> None:
    """Parameters that are put in for one call, and are no leaves."""
    x, context = torch.randn(7, D, dtype=torch.float64), torch.randn(7, CONTEXT, dtype=torch.float64)
    found = []
    for flow in (chain(False), chain(True)):
        factor = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        swapped = {name: p.detach() * factor for name, p in flow.named_parameters()}
        z, log_abs_det = torch.func.functional_call(flow, swapped, (x, context))
        found.append(torch.autograd.grad(z.sum() + log_abs_det.sum(), factor)[0])
        assert all(p.grad is None for p in flow.parameters())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert found[0].abs() > 0.1


def test_reversible_hooks_on_parameters_see_whole_gradients() -> None:
    """A coupling in two places: one call of its hook, with the sum (what DDP's buckets rely on)."""
    flow, calls = chain(True), []
    parameter = next(flow[0].parameters())
    parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    x, context = torch.randn(7, D, dtype=torch.float64), torch.randn(7, CONTEXT, dtype=torch.float64)
    stored = chain(False)
    for one in (flow, stored):
        z, log_abs_det = one(x, context)
        (z.square().sum() + log_abs_det.sum()).backward()
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], next(stored[0].parameters()).grad, rtol=1e-9, atol=1e-10)


def test_reversible_under_autocast() -> None:
    x, context = torch.randn(7, D), torch.randn(7, CONTEXT)
    found = []
    for flow in (chain(False, dtype=torch.float32), chain(True, dtype=torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_abs_det = flow(x, context)
        (z.square().sum() + log_abs_det.sum()).backward()  # outside of it, as users do
        found.append([p.grad for p in flow.parameters()])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(right, left, rtol=0.02, atol=0.02 * float(left.abs().max()) + 1e-4)


def test_reversible_first_batch_sets_actnorm() -> None:
    flows = [nn.Flow([nn.ActNorm(D), nn.LULinear(D)], reversible=reversible) for reversible in (False, True)]
    x = 3.0 + 2.0 * torch.randn(50, D)
    gradients = []
    for flow in flows:
        z, log_abs_det = flow(x)
        (z.square().sum() + log_abs_det.sum()).backward()
        assert bool(flow[0].initialized)
        gradients.append(flow[0].bias.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_reversible_refuses_what_it_cannot_repeat() -> None:
    class Noisy(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    flow = nn.Flow([nn.AdditiveCoupling(4, Noisy(2, 2))], reversible=True)
    with pytest.raises(RuntimeError, match="no transform may draw random numbers"):
        flow(torch.randn(3, 4))
    flow.eval()
    flow(torch.randn(3, 4))[0].sum().backward()
    with pytest.raises(RuntimeError, match="no transform may draw random numbers"):
        nn.Flow([nn.DequantizeLogit(), nn.ActNorm(4)], reversible=True)(torch.zeros(3, 4))


def test_reversible_refuses_second_derivatives_and_changed_parameters() -> None:
    flow = chain(True, context=False)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(flow(x)[0].sum(), x, create_graph=True)
    z, _ = flow(x)
    with torch.no_grad():
        next(flow.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_reversible_under_functorch_and_compile() -> None:
    flow, stored = chain(True, context=False, dtype=torch.float32), chain(False, context=False, dtype=torch.float32)
    x = torch.randn(3, D)
    for call in (lambda flow: torch.func.grad(lambda x: flow(x)[0].square().sum())(x),):
        torch.testing.assert_close(call(flow), call(stored))
    torch._dynamo.reset()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    for one in (compiled, stored):
        z, log_abs_det = one(x)
        (z.square().sum() + log_abs_det.sum()).backward()
    for ours, theirs in zip(flow.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_flow_is_a_sequence() -> None:
    steps = [nn.ActNorm(3), nn.Permutation(3), nn.LULinear(3)]
    flow = nn.Flow(steps, reversible=True)
    assert len(flow) == 3
    assert list(flow) == steps
    assert flow[-1] is steps[2]
    assert isinstance(flow[:2], nn.Flow)
    assert flow[:2].reversible
    assert list(flow.append(nn.ActNorm(3)))[:3] == steps
    assert next(iter(flow.state_dict())) == "0.log_scale"
    x = torch.randn(2, 3)
    empty = nn.Flow([], reversible=True)
    assert empty(x)[0] is x
    assert empty(x)[1].tolist() == [0.0, 0.0]
    with pytest.raises(TypeError, match="transforms must be Modules with an inverse, got Linear"):
        nn.Flow([torch.nn.Linear(3, 3)])


def test_without_an_inverse() -> None:
    class Forward(nn.Transform):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x, x.new_zeros(len(x))

    with pytest.raises(NotImplementedError, match=r"Forward: inverse \(noise to data\) is not defined"):
        nn.Flow([Forward()]).inverse(torch.zeros(1, 2))
    with pytest.raises(NotImplementedError, match=r"Inverse: forward|Forward: inverse"):
        nn.Inverse(Forward())(torch.zeros(1, 2))


# ---- actnorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 3), (10, 3, 7), (5, 3, 4, 4)])
def test_actnorm_starts_by_its_first_batch(shape: tuple[int, ...]) -> None:
    layer = nn.ActNorm(3)
    x = 100.0 + torch.tensor([1e-3, 1.0, 50.0]).view(1, 3, *[1] * (len(shape) - 2)) * torch.randn(shape)
    x = x.requires_grad_()
    z, _ = layer(x)
    channels = z.detach().transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0.0, atol=0.02)
    torch.testing.assert_close(channels.var(1, correction=0), torch.ones(3, dtype=torch.float64), rtol=0.01, atol=0.0)
    state = copy.deepcopy(layer.state_dict())
    z.sum().backward()
    layer(7.0 * x)
    with torch.no_grad():
        layer(9.0 * x)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())


def test_actnorm_starts_in_training_only_and_remembers_it() -> None:
    x = 5.0 + 3.0 * torch.randn(30, 3)
    layer = nn.ActNorm(3).eval()
    assert torch.equal(layer(x)[0], x)
    assert torch.equal(layer.train().inverse(x)[0], x)
    layer(x[:0])
    assert not layer.initialized
    fresh = nn.ActNorm(3)
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer(x)
        fresh(x)
    assert layer.initialized
    assert torch.equal(fresh.bias, layer.bias)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    loaded, again = nn.ActNorm(3), nn.ActNorm(3)
    loaded.load_state_dict(torch.load(stream))
    again(100.0 * x)
    again.load_state_dict(nn.ActNorm(3).state_dict())  # of one that has not begun
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        other(11.0 * x)
        assert torch.equal(other.bias, layer.bias)
    again(x)
    assert torch.equal(again.bias, layer.bias)


def test_actnorm_of_a_constant_channel() -> None:
    layer = nn.ActNorm(2)
    x = torch.stack([torch.full((8,), 3.0), torch.randn(8)], 1)
    z, log_abs_det = layer(x)
    assert bool(z.isfinite().all())
    assert bool(log_abs_det.isfinite().all())
    torch.testing.assert_close(layer.log_scale[0].exp(), torch.tensor(1e6), rtol=1e-5, atol=0.0)
    assert bool((z[:, 0].abs() < 1.0).all())


def test_actnorm_reads_nothing_from_the_device_once_it_has_begun() -> None:
    layer = nn.ActNorm(3)
    layer(torch.randn(5, 3))
    layer.initialized = torch.zeros((), dtype=torch.bool, device="meta")  # reading it would raise
    layer(torch.randn(5, 3))


@pytest.mark.parametrize("before", [True, False])
def test_actnorm_starts_under_compile(before: bool) -> None:
    """Whether it has begun is a guard, so the first batch has a graph of its own."""
    torch._dynamo.reset()
    layer, eager, x = nn.ActNorm(3), nn.ActNorm(3), 5.0 + 3.0 * torch.randn(30, 3)
    eager(x)
    if before:
        layer(x)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for _ in range(3):
        torch.testing.assert_close(compiled(x)[0], eager(x)[0])
    assert layer._ready
    assert layer.initialized
    assert counter.frame_count == (1 if before else 2)


def _first_batches(rank: int, folder: str) -> None:
    """One of two processes: actnorm of its part of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        x = 5.0 + 3.0 * torch.randn(31, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        layer, step, uneven = nn.ActNorm(3).double(), nn.GlowStep(3, hidden=(4,)), nn.ActNorm(3).double()
        layer((x[:10], x[10:])[rank])
        uneven((x[:0], x)[rank])
        step.actnorm.double()
        step.actnorm.initialize((x[:10], x[10:])[rank])
        states = [layer.state_dict(), uneven.state_dict(), step.actnorm.state_dict()]
        assert layer._ready
        assert uneven._ready
        torch.save(states, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_actnorm_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_first_batches, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = nn.ActNorm(3).double()
    alone(5.0 + 3.0 * torch.randn(31, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for left, right in zip(*states, strict=True):
        for name, value in alone.state_dict().items():
            assert torch.equal(left[name], right[name]), name
            torch.testing.assert_close(left[name], value)


# ---- matrices --------------------------------------------------------------------------------------------------------


def test_convolution_is_its_matrix() -> None:
    layer, x = build("convolution"), inputs("convolution")[0]
    weight = layer._matrix()
    torch.testing.assert_close(layer(x)[0], torch.einsum("oi,bihw->bohw", weight, x))
    torch.testing.assert_close(layer(x)[1], 24 * torch.linalg.slogdet(weight)[1].expand(BATCH))
    torch.testing.assert_close(layer(x.flatten(2))[0], layer(x)[0].flatten(2))
    for lu in (True, False):
        fresh = nn.InvertibleConv2d(8, lu=lu).double()
        torch.testing.assert_close(
            fresh._matrix() @ fresh._matrix().T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(fresh(torch.randn(2, 8).double())[1], torch.zeros(2).double(), rtol=0, atol=1e-5)


def test_matrices_are_computed_once_while_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.InvertibleConv2d(4), torch.randn(2, 4, 3, 3)
    counts: list[str] = []
    assemble, invert = layer._assemble, torch.linalg.inv
    monkeypatch.setattr(layer, "_assemble", lambda: (counts.append("weight"), assemble())[1])
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: (counts.append("inverse"), invert(matrix))[1])

    def run() -> int:
        counts.clear()
        with torch.no_grad():
            layer.inverse(layer(x)[0])
            layer.inverse(x)
            found, exact = len(counts), assemble()
            assert torch.equal(layer._matrix(), exact)
            assert torch.equal(layer._matrix_inverse(), invert(exact.double()).to(exact.dtype))
        return found

    assert run() == 3  # the weight, for the inverse once more, and the inverse
    assert run() == 0
    changes: list[Callable[[], Any]] = [
        lambda: layer.log_s.data.add_(0.3),  # which no version tells of
        lambda: layer.load_state_dict(nn.InvertibleConv2d(4).state_dict()),
        lambda: torch.optim.SGD(layer.parameters(), lr=0.1).step(),
        lambda: setattr(layer, "upper", torch.nn.Parameter(0.3 * torch.randn(4, 4))),
        lambda: setattr(layer.lower, "data", 0.3 * torch.randn(4, 4)),
    ]
    layer(x)[0].square().sum().backward()
    for change in changes:
        change()
        assert run() == 3
        assert run() == 0
    layer.double()
    counts.clear()
    with torch.no_grad():
        assert layer(x.double())[0].dtype == torch.float64
    assert counts
    counts.clear()
    layer(x.double())
    layer(x.double())
    assert len(counts) == 2  # with gradients there is a graph to make each time


def test_inverse_matrix_is_of_float64() -> None:
    """Trap: at 48 channels a float32 inverse is what limits the flow."""
    torch.manual_seed(0)
    layer = nn.InvertibleConv2d(48)
    with torch.no_grad():
        layer.log_s.copy_(3.0 * torch.randn(48))
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        weight = layer._matrix()
        want = torch.linalg.inv(weight.double())
        ours = (layer._matrix_inverse().double() - want).norm() / want.norm()
        theirs = (torch.linalg.inv(weight).double() - want).norm() / want.norm()
    assert ours < 1e-6 < theirs
    assert exact._matrix_inverse().dtype == torch.float64


def test_matrices_ignore_autocast() -> None:
    layer, linear, x = nn.InvertibleConv2d(8), nn.LULinear(8, identity_init=False), torch.randn(4, 8)
    for one in (layer, linear):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(one(x)[0], one(x)[0].float())
            low = one(x)[0]
        assert torch.equal(low, one(x)[0])


@pytest.mark.parametrize("lu", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_glow_step_is_its_parts(lu: bool, additive: bool) -> None:
    torch.manual_seed(0)
    step = nn.GlowStep(4, conv_net, lu=lu, additive=additive).double()
    x = 2.0 + 3.0 * torch.randn(3, 4, 5, 5, dtype=torch.float64)
    step(x)  # actnorm's first batch
    parts = nn.Flow([step.actnorm, step.conv, step.coupling])
    fresh = copy.deepcopy(step)
    fresh.actnorm = nn.ActNorm(4).double()
    fresh(x)
    torch.testing.assert_close(fresh.actnorm.bias, step.actnorm.bias)
    torch.nn.init.normal_(step.coupling.net.layers[-1].weight, 0.0, 0.1)
    for directions in ("forward", "inverse"):
        found = []
        for one in (step, parts):
            step.zero_grad()
            leaf = x.clone().requires_grad_()
            z, log_abs_det = getattr(one, directions)(leaf)
            (z.square().sum() + log_abs_det.sin().sum()).backward()
            found.append([z, log_abs_det, leaf.grad, *(p.grad for p in step.parameters())])
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_squeeze_is_torchs_and_round() -> None:
    x = torch.randn(2, 3, 4, 6)
    z, _ = nn.Squeeze()(x)
    assert torch.equal(z, F.pixel_unshuffle(x, 2))
    blocks = x.view(2, 3, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3)
    assert torch.equal(z, blocks)


def test_permutations() -> None:
    x = torch.arange(8.0).view(2, 4)
    assert torch.equal(nn.Permutation(4, "reverse")(x)[0], x.flip(1))
    assert torch.equal(nn.Permutation(4, [2, 0, 3, 1])(x)[0], x[:, [2, 0, 3, 1]])
    torch.manual_seed(0)
    first, second = nn.Permutation(20), nn.Permutation(20)
    assert not torch.equal(first.permutation, second.permutation)
    second.load_state_dict(first.state_dict())
    y = torch.randn(3, 20)
    assert torch.equal(second.inverse(first(y)[0])[0], y)


def test_split_of_a_learnt_gaussian() -> None:
    split = nn.Split(5).double()
    torch.nn.init.normal_(split.prior.weight, 0.0, 0.3)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    kept, z, log_abs_det = split(x)
    assert torch.equal(kept, x[:, :3])
    mean, log_std = split.prior(kept).chunk(2, 1)
    density = torch.distributions.Normal(mean, log_std.exp()).log_prob(x[:, 3:]).flatten(1).sum(1)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(standard + log_abs_det, density)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_mlp_with_context_is_one_of_both_side_by_side(activation: str) -> None:
    net = nn.MLP(3, 4, (6, 5), context_features=2, activation=activation)
    x, context = torch.randn(7, 3), torch.randn(7, 2)
    first = torch.nn.Linear(5, 6)
    first.weight.data = torch.cat([net.layers[0].weight, net.context_layer.weight], 1)
    first.bias.data = net.layers[0].bias.data
    act = {"relu": torch.relu, "tanh": torch.tanh, "silu": F.silu}[activation]
    want = net.layers[2](act(net.layers[1](act(first(torch.cat([x, context], 1))))))
    torch.testing.assert_close(net(x, context), want)


def test_networks_leave_their_inputs_alone_and_learn() -> None:
    """Rectifiers write over what is theirs."""
    for net, x in (
        (nn.MLP(3, 4, (6,)), torch.randn(5, 3)),
        (nn.MLP(3, 4, ()), torch.randn(5, 3)),
        (nn.ResidualNet(3, 4, 6), torch.randn(5, 3)),
        (nn.ConvNet(3, 4, 6, zero_init=False), torch.randn(2, 3, 4, 4)),
        (nn.MADE(3, 4, (6, 6)), torch.randn(5, 3)),
    ):
        before = x.clone()
        net.double()
        assert torch.autograd.gradcheck(lambda x, net=net: net(x), (x.double().requires_grad_(),))
        assert torch.equal(x, before)
    dropped = nn.ResidualNet(3, 4, 6, dropout=0.5)
    torch.nn.init.normal_(dropped.blocks[0].layers[1].weight)
    x = torch.randn(5, 3)
    assert not torch.equal(dropped(x), dropped(x))
    dropped.eval()
    assert torch.equal(dropped(x), dropped(x))


def test_zero_init_starts_at_the_identity() -> None:
    x = torch.randn(6, D)
    for layer in (
        nn.AffineCoupling(D),
        nn.AdditiveCoupling(D),
        nn.SplineCoupling(D, zero_init=True, normalizer="identity"),
        nn.MaskedAffineAutoregressive(D, scale="exp", zero_init=True),
        nn.LULinear(D),
    ):
        z, log_abs_det = layer(x)
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(log_abs_det, torch.zeros(6), rtol=0.0, atol=1e-5)


def test_logits_are_scaled_by_the_width() -> None:
    assert nn.SplineCoupling(D, hidden=(7, 16)).spline.options["logit_scale"] == 0.25
    assert nn.SplineCoupling(D, torch.nn.Linear(3, 46)).spline.options["logit_scale"] == 1.0
    assert nn.SplineCoupling(D, hidden=(16,), logit_scale=2.0).spline.options["logit_scale"] == 2.0


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(("features", "hidden"), [(5, (9, 8)), (5, (3,)), (1, (4,)), (2, (4, 4)), (6, (4, 30))])
def test_made_sees_what_is_before(features: int, hidden: tuple[int, ...], context: bool) -> None:
    torch.manual_seed(0)
    net = nn.MADE(features, 2, hidden, context_features=CONTEXT if context else None, activation="tanh").double()
    x, given = torch.randn(features, dtype=torch.float64), torch.randn(1, CONTEXT, dtype=torch.float64)
    more = (given,) if context else ()
    found = torch.autograd.functional.jacobian(lambda x: net(x.unsqueeze(0), *more)[0], x)
    sees = (found != 0).any(1)
    assert not bool(sees.triu().any())
    if len(hidden) == 1 and hidden[0] >= features - 1:
        assert bool(sees[torch.tril_indices(features, features, -1).unbind()].all())
    for layer in net.layers:
        assert bool((layer.in_degrees.diff() >= 0).all())
        assert bool((layer.out_degrees.diff() >= 0).all())
        dead = layer.out_degrees.unsqueeze(1) < layer.in_degrees
        layer.weight.data[dead] = math.nan  # which nothing may read
    assert bool(net(x.unsqueeze(0), *more).isfinite().all())
    if context:  # it reaches every feature's parameters, the first one's too
        reach = torch.autograd.functional.jacobian(lambda context: net(x.unsqueeze(0), context)[0], given)
        assert bool((reach != 0).flatten(2).any(2).all())


@pytest.mark.parametrize("case", [name for name in AUTOREGRESSIVE if name != "inverse"])
def test_autoregressive_jacobians_are_triangular(case: str) -> None:
    layer, given = build(case), inputs(case)
    found = jacobian(layer, *given)
    assert not bool(found.triu(1).any())
    assert bool((found.diagonal() > 0).all())


def test_dequantize_logit() -> None:
    layer = nn.DequantizeLogit(8, 0.1)
    x = torch.randint(8, (5, 1, 4, 4))
    for given in (x.to(torch.uint8), x.float(), x.double()):
        z, log_abs_det = layer(given)
        back, behind = layer.inverse(z)
        assert torch.equal(back.to(torch.int64), x)
        torch.testing.assert_close(behind, -log_abs_det.to(behind.dtype), rtol=1e-5, atol=1e-4)
    u = torch.rand(x.shape, dtype=torch.float64)
    z, log_abs_det = layer(x.double(), u=u)
    continuous, behind = layer.continuous(z)
    torch.testing.assert_close(continuous, x + u)
    torch.testing.assert_close(behind, -log_abs_det)
    first, second = layer(x.float())[0], layer(x.float())[0]
    assert not torch.equal(first, second)
    layer.eval()
    seeded = [layer(x.float(), generator=torch.Generator().manual_seed(1))[0] for _ in range(2)]
    assert torch.equal(*seeded)
    far, _ = layer.inverse(torch.tensor([[-50.0, 50.0]]))
    assert far.tolist() == [[0.0, 7.0]]


def test_couplings_call_one_operator() -> None:
    """Nothing else passes over the activations: no copy, no gather."""
    layer, x = nn.AffineCoupling(8, torch.nn.Linear(4, 8)), torch.randn(5, 8)
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        layer(x)
    called = [name for name in called if name not in ("aten.slice.Tensor", "aten.t.default", "aten.addmm.default")]
    assert called == ["genfuse.affine_coupling.default"]


@pytest.mark.parametrize("split", ["even", "odd"])
def test_splits_of_equal_halves_are_interleaved(split: str) -> None:
    torch.manual_seed(0)
    layer = nn.SplineCoupling(6, hidden=(7,), split=split).double()
    given = list(range(0 if split == "even" else 1, 6, 2))
    other = nn.SplineCoupling(6, layer.net, split=given).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    for ours, theirs in zip(layer(x), other(x), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_spline_coupling_is_the_operator() -> None:
    layer, x = build("spline, first"), inputs("spline, first")[0]
    params = layer.net(x[:, 3:]).view(BATCH, 3, -1)
    options = {"tail_bound": 3.0, "logit_scale": 1 / math.sqrt(7), "reduce_dims": (1,)}
    y, log_abs_det = ops.rational_quadratic_spline(x[:, :3], params, **options)
    assert torch.equal(layer(x)[0], torch.cat([y, x[:, 3:]], 1))
    assert torch.equal(layer(x)[1], log_abs_det)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.ActNorm(0), ValueError, "num_features must be at least 1, got 0"),
        (lambda: nn.ActNorm(3.0), TypeError, "num_features must be an int, got float"),
        (lambda: nn.InvertibleConv2d(True), TypeError, "channels must be an int, got bool"),
        (lambda: nn.LULinear(0), ValueError, "features must be at least 1"),
        (lambda: nn.Permutation(3, "shuffle"), ValueError, "permutation must be 'reverse', 'random' or indices"),
        (lambda: nn.Permutation(3, [0, 0, 1]), ValueError, "must hold the numbers from 0 to 2"),
        (lambda: nn.Permutation(3, dim=0), ValueError, "dim 0 is the batch's"),
        (lambda: nn.Squeeze(0), ValueError, "factor must be at least 1"),
        (lambda: nn.Split(1), ValueError, "channels must be at least 2, got 1"),
        (lambda: nn.Split(4, prior="flat"), ValueError, "prior must be 'learned' or 'standard', got 'flat'"),
        (lambda: nn.MultiScale([nn.Squeeze()], [nn.Split(4)], (1, 4, 4)), ValueError, "one fewer than levels"),
        (lambda: nn.MultiScale([nn.Squeeze()], [], (1, 3, 4)), ValueError, "3 by 4 pixels cannot be squeezed by 2"),
        (lambda: nn.MultiScale([nn.Squeeze()] * 2, [nn.Split(6)], (1, 4, 4)), ValueError, "a split has 6 channels"),
        (lambda: nn.DequantizeLogit(1), ValueError, "levels must be at least 2"),
        (lambda: nn.DequantizeLogit(alpha=0.5), ValueError, r"alpha must be in \[0, 0.5\), got 0.5"),
        (lambda: nn.MLP(0, 3), ValueError, "in_features must be at least 1"),
        (lambda: nn.MLP(3, 3, 64), TypeError, "hidden must be a sequence of ints, got int"),
        (lambda: nn.MLP(3, 3, activation="step"), ValueError, "activation must be one of relu, .*; got 'step'"),
        (lambda: nn.ResidualNet(3, 3, dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: nn.ResidualNet(3, 3, context_mode="cat"), ValueError, "context_mode must be 'glu' or 'add'"),
        (lambda: nn.AffineCoupling(1), ValueError, "at least one channel to transform and one to see, got 0 and 1"),
        (lambda: nn.AffineCoupling(4, split="left"), ValueError, "split must be 'first', .*, got 'left'"),
        (lambda: nn.AffineCoupling(4, split=[4]), ValueError, "split must hold channels below 4"),
        (lambda: nn.AffineCoupling(4, split=[1, 1]), ValueError, "split must hold each channel once"),
        (lambda: nn.AffineCoupling(4, scale="cube"), ValueError, "scale must be one of exp, .*; got 'cube'"),
        (lambda: nn.AffineCoupling(4, 7), TypeError, "net must be a Module or make one, got int"),
        (lambda: nn.SplineCoupling(4, kind="quintic"), ValueError, "kind must be one of"),
        (lambda: nn.SplineCoupling(4, kind="cubic", tails="circular"), ValueError, "tails of a cubic spline"),
        (lambda: nn.SplineCoupling(4, num_bins=0), ValueError, "num_bins must be at least 1"),
        (lambda: nn.SplineCoupling(4, tail_bound=0.0), ValueError, "tail_bound must be finite and above 0.0, got 0.0"),
        (lambda: nn.MaskedLinear([], [1]), ValueError, "in_degrees must be a vector of whole numbers"),
        (lambda: nn.MADE(3, 2, ()), ValueError, "hidden must hold at least 1"),
        (lambda: nn.MaskedAffineAutoregressive(3, scale="cube"), ValueError, "scale must be one of"),
        (lambda: nn.checkerboard_mask(0, 2), ValueError, "height must be at least 1"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("case", "want"),
    [
        ("affine", r"x must be \[B, 5, \.\.\.\], got \[2, 7\]"),
        ("spline", r"x must be \[B, 5, \.\.\.\], got \[2, 7\]"),
        ("actnorm", r"x must be \[B, 5, \.\.\.\], got \[2, 7\]"),
        ("linear", r"x must be \[B, 5, \.\.\.\], got \[2, 7\]"),
        ("glow step", r"x must be \[B, 4, \.\.\.\], got \[2, 7\]"),
        ("permutation", r"x must have 5 in dimension 1, got \[2, 7\]"),
        ("affine autoregressive", r"x must be \[B, 5\], got \[2, 7\]"),
        ("squeeze", r"x must be \[B, C, H, W\] with H and W multiples of 2, got \[2, 7\]"),
        ("scales", r"x must be \['B', 4, 4, 6\], got \[2, 7\]"),
    ],
)
def test_wrong_inputs(case: str, want: str) -> None:
    with pytest.raises(ValueError, match=want):
        build(case)(torch.zeros(2, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match="z must"):
        build(case).inverse(torch.zeros(2, 7, dtype=torch.float64))


@pytest.mark.parametrize("case", [*CONTEXTS, *CONTEXT_IMAGES])
def test_context_is_asked_for(case: str) -> None:
    layer, (x, context) = build(case), inputs(case)
    with pytest.raises(ValueError, match=r"context must be \[B, 3\], got None"):
        layer(x)
    with pytest.raises(ValueError, match=r"context must be \[B, 3\], got \[4, 2\]"):
        layer(x, context[:, :2])
    assert not torch.equal(layer(x, context)[0], layer(x, 2.0 * context)[0])


def test_layers_without_context_ignore_it() -> None:
    for case in ("affine", "spline", "actnorm", "affine autoregressive", "glow step", "scales"):
        layer, (x,) = build(case), inputs(case)
        assert torch.equal(layer(x, torch.randn(BATCH, CONTEXT))[0], layer(x)[0])
