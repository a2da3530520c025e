"""The masked linear layer and the inverse of autoregressive flows: equal to their definitions and to the peers'."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from autoregressive_cases import RESIDUAL, VARIANTS, Network, make
from genfuse import ops
from genfuse.ops import MaskedLayer
from genfuse.ops.flow import autoregressive as module
from genfuse.reference.flow import autoregressive as reference
from operator_cases import DTYPE_NAMES, DTYPES, Problem, check
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor
from torch import library as registry
from torch._dynamo.testing import CompileCounterWithBackend

INVERSE, LINEAR = "autoregressive_inverse", "masked_linear"
LINEARS: dict[str, dict[str, Any]] = {
    "masked": {},
    "strict": {"strict": True},
    "sorted": {"sorted": True},
    "no bias": {"bias": False, "strict": True},
}
CASES = [(LINEAR, variant) for variant in LINEARS] + [(INVERSE, variant) for variant in VARIANTS]
close = torch.testing.assert_close


def problem_of(op: str, variant: str, **sizes: Any) -> Problem:
    return make(op, LINEARS[variant] if op == LINEAR else variant, **sizes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more; that results do not depend on it is a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- equal to the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_results_and_gradients(op: str, variant: str, dtype: torch.dtype) -> None:
    check(*(problem_of(op, variant, dtype=dtype, seed=seed) for seed in range(3)))


def test_these_are_the_kernels() -> None:
    """And not the reference in their stead."""
    assert module._MASKED_LINEAR.op is not None
    problem = make(LINEAR)
    assert genfuse.explain(LINEAR, **problem.inputs, **problem.options).backend == "native"
    network = make(INVERSE)
    assert isinstance(network, Network)
    explanation = genfuse.explain(INVERSE, network.inputs["u"], network.network(), **network.options)
    assert explanation.backend == "native"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 129])
def test_odd_sizes(size: int) -> None:
    check(make(LINEAR, batch=size, columns=7, units=13), make(LINEAR, batch=size, columns=7, units=13, seed=1))
    check(make(LINEAR, batch=5, columns=size, units=13))
    check(make(LINEAR, batch=5, columns=7, units=size))
    check(*(make(INVERSE, batch=size, seed=seed) for seed in range(3)))
    check(make(INVERSE, "nflows", units=size))
    many = {"layers": RESIDUAL, "scale": "softplus", "layout": "scale_shift"}
    check(make(INVERSE, many, batch=3, columns=size, units=20))
    check(make(INVERSE, {**many, "transform": "rational_quadratic"}, batch=70, columns=min(size, 17), units=20))


def test_long_sums() -> None:
    """Depths beyond the blocks of the products."""
    check(make(LINEAR, batch=3, columns=1300, units=70))
    check(make(LINEAR, batch=1300, columns=70, units=9))
    check(make(INVERSE, batch=3, units=1300))
    check(make(INVERSE, batch=1300, columns=3, units=9))


@pytest.mark.parametrize(("batch", "columns", "units"), [(0, 5, 4), (6, 5, 0), (6, 0, 4), (0, 0, 0), (6, 1, 4)])
def test_nothing(batch: int, columns: int, units: int) -> None:
    """No rows, no columns, no units."""
    for op, variant in ((LINEAR, {}), (INVERSE, {"layers": RESIDUAL})):
        problem = make(op, variant, batch=batch, columns=columns, units=units)
        if columns == 0 and op == INVERSE:  # nothing depends on anything
            close(problem.results(), problem.results("reference"))
            continue
        cotangents = problem.cotangents()
        for ours, theirs in zip(problem.run(cotangents), problem.run(cotangents, "reference"), strict=True):
            assert ours.shape == theirs.shape
            close(ours, theirs)


def test_leading_dimensions() -> None:
    problem = make(LINEAR, batch=24)
    flat = problem.call()
    for shape in ((2, 3, 4), (1, 24), (24, 1)):
        problem.inputs["x"] = problem.inputs["x"].view(*shape, 5)
        assert torch.equal(problem.call(), flat.view(*shape, 9))
    problem.inputs["x"] = problem.inputs["x"].view(24, 5)[0]
    assert torch.equal(problem.call(), flat[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0],
    "within a larger one": lambda t: F.pad(t, (1, 2), value=torch.nan)[..., 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (INVERSE, "nflows")])
def test_strides_make_no_difference(op: str, variant: str, layout: str) -> None:
    problem = problem_of(op, variant)
    cotangents = problem.cotangents()
    leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
    results = leaves.map(LAYOUTS[layout]).results()
    gradients = torch.autograd.grad(results, list(leaves.inputs.values()), [LAYOUTS[layout](c) for c in cotangents])
    for ours, theirs in zip([*results, *gradients], problem.run(cotangents), strict=True):
        assert torch.equal(ours, theirs)
    assert all(result.is_contiguous() for result in results)


def test_expanded_gradients() -> None:
    for op, variant in ((LINEAR, "masked"), (INVERSE, "nflows")):
        problem = problem_of(op, variant)
        leaves = problem.map(lambda tensor: tensor.requires_grad_())
        total = sum((result.sum() for result in leaves.results()), torch.zeros(()))
        gradients = torch.autograd.grad(total, list(leaves.inputs.values()))
        expected = problem.run([torch.ones_like(result) for result in problem.results()])[-len(gradients) :]
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.equal(ours, theirs)


# ---- what the mask hides ---------------------------------------------------------------------------------------------


def dead_weights(problem: Problem) -> dict[str, Tensor]:
    """Which weights see nothing, by the degrees alone."""
    if not isinstance(problem, Network):
        o, i, strict = problem.options["out_degrees"], problem.options["in_degrees"], problem.options.get("strict")
        return {"weight": o[:, None] <= i if strict else o[:, None] < i}
    columns = problem.inputs["u"].size(1)
    of_columns = torch.tensor(problem.options.get("degrees", range(1, columns + 1)))
    degrees = [of_columns]
    dead = {}
    for index, layer in enumerate(problem.layers):
        own = layer["degrees"]
        if own is None:
            each = problem.inputs[f"weight {index}"].size(0) // columns
            interleaved = problem.options.get("interleaved", True)
            own = (of_columns.repeat_interleave(each) if interleaved else of_columns.repeat(each)) - 1
        source = degrees[index if layer["source"] is None else layer["source"] + 1]
        dead[f"weight {index}"] = own[:, None] < source
        degrees.append(own)
    return dead


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_dead_weights_are_never_read_and_have_gradients_of_0(op: str, variant: str) -> None:
    problem = problem_of(op, variant)
    cotangents = problem.cotangents()
    expected = problem.run(cotangents)
    masks = dead_weights(problem)
    poisoned = {
        name: t.masked_fill(masks[name], torch.nan) if name in masks else t for name, t in problem.inputs.items()
    }
    problem.inputs = poisoned
    found = problem.run(cotangents)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    gradients = dict(zip(problem.inputs, found[-len(problem.inputs) :], strict=True))
    for name, mask in masks.items():
        assert bool((gradients[name][mask] == 0).all())
        assert variant == "one group" or bool(mask.any())


def test_units_that_no_column_sees_are_never_computed() -> None:
    problem = make(INVERSE, "affine")
    assert isinstance(problem, Network)
    degrees = problem.layers[0]["degrees"]
    unseen = degrees >= 5
    assert bool(unseen.any())
    expected = problem.results()
    problem.inputs["weight 0"][unseen] = torch.nan
    problem.inputs["bias 0"][unseen] = torch.nan
    for ours, theirs in zip(problem.results(), expected, strict=True):
        assert torch.equal(ours, theirs)
    found = dict(zip(problem.inputs, problem.run(problem.cotangents())[2:], strict=True))
    assert bool((found["bias 0"][unseen] == 0).all())


def test_a_column_depends_on_those_of_lower_degree_alone() -> None:
    for variant in ("zuko", "groups", "spline"):
        problem = make(INVERSE, variant, dtype=torch.float64)
        degrees = torch.tensor(problem.options.get("degrees", (1, 2, 3, 4, 5)))
        jacobian = torch.autograd.functional.jacobian(
            lambda u, p=problem: Network(p.op, {**p.inputs, "u": u}, p.options, p.layers).call()[0].sum(0),  # type: ignore[attr-defined]
            problem.inputs["u"],
        )[:, 0]
        sees = degrees[:, None] > degrees
        assert bool((jacobian[~(sees | torch.eye(5, dtype=torch.bool))] == 0).all())
        assert bool((jacobian.diagonal() > 0).all())


# ---- the flow and its inverse ----------------------------------------------------------------------------------------


def forward_map(problem: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """u and ln |det du/dx| by one pass of the plain network: what the inverse has to undo."""
    columns = x.size(1)
    options = problem.options
    degrees = list(options.get("degrees", range(1, columns + 1)))
    found = reference.masked_network(x, problem.network(), degrees, columns_first=options.get("interleaved", True))
    if options.get("transform") == "additive":
        return x + found[..., 0], x.new_zeros(x.size(0))
    if options.get("transform") == "rational_quadratic":
        names = ("tail_bound", "normalizer", "logit_scale")
        chosen = {name: options[name] for name in names if name in options}
        return ops.rational_quadratic_spline(x, found, tails="linear", reduce_dims=(1,), **chosen)
    layout = options.get("layout", "shift_scale")
    chosen = {name: options[name] for name in ("scale", "eps", "clamp") if name in options}
    return ops.affine_coupling(x, found.transpose(1, 2).flatten(1), layout=layout, **chosen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, dtype: torch.dtype) -> None:
    problem = make(INVERSE, variant, dtype=dtype)
    assert isinstance(problem, Network)
    x, log_abs_det = problem.call()
    u, other = forward_map(problem, x)
    # An error of x of one unit in the last place is one of u times the slope: the largest of the Jacobian's rows.
    jacobian = torch.autograd.functional.jacobian(lambda x: forward_map(problem, x)[0].sum(0), x)
    slope = float(jacobian.abs().sum((1, 2)).max())
    unit = torch.finfo(dtype).eps * max(float(x.abs().max()), 1.0)
    close(u, problem.inputs["u"], rtol=0, atol=8 * unit * max(slope, 1.0))
    close(other, -log_abs_det, rtol=0, atol=64 * unit * max(slope, 1.0))


@pytest.mark.parametrize("variant", ["nflows", "groups", "spline, zuko"])
def test_log_abs_det_is_that_of_the_jacobian(variant: str) -> None:
    problem = make(INVERSE, variant, dtype=torch.float64, batch=1)
    assert isinstance(problem, Network)

    def x_of(u: Tensor) -> Tensor:
        found: Tensor = Network(problem.op, {**problem.inputs, "u": u}, problem.options, problem.layers).call()[0]
        return found

    jacobian = torch.autograd.functional.jacobian(x_of, problem.inputs["u"])[0, :, 0]
    close(problem.call()[1][0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("columns", [8, 64])
def test_errors_grow_no_faster_than_the_definitions(columns: int) -> None:
    """Through many columns, where each error is the input of the next: the tolerance grows as eager's error does."""
    check(make(INVERSE, {"layers": RESIDUAL, "scale": "softplus"}, batch=8, columns=columns, units=70))


# ---- peers -----------------------------------------------------------------------------------------------------------


def randomise(net: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / fan**0.5)


def layers_of_made(made: Any, context: Tensor | None) -> list[MaskedLayer]:
    """nflows' and normflows' MADE."""
    act, residual = "relu", getattr(made, "use_residual_blocks", True)

    def layer(linear: Any, **rest: Any) -> MaskedLayer:
        return MaskedLayer(linear.weight, linear.bias, linear.degrees, **rest)

    added = None if context is None else F.relu(made.context_layer(context))
    layers = [layer(made.initial_layer, add=added)]
    for block in made.blocks:
        if not residual:
            layers.append(layer(block.linear, activation=act))
            continue
        first, second = block.linear_layers
        added = None if context is None else block.context_layer(context)
        layers.append(layer(first, activation=act, add=added))
        layers.append(layer(second, activation=act, residual=len(layers) - 2))
    final = made.final_layer
    last = "none" if residual else act
    return [*layers, MaskedLayer(final.weight, final.bias, activation=last)]


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_nflows(residual: bool, context: int | None) -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(1)
    peer = transforms.MaskedAffineAutoregressiveTransform(
        features=7, hidden_features=32, context_features=context, use_residual_blocks=residual
    ).double()
    randomise(peer)
    u = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    given = None if context is None else torch.randn(11, context, dtype=torch.float64, requires_grad=True)
    layers = layers_of_made(peer.autoregressive_net, given)
    ours, theirs = ops.autoregressive_inverse(u, layers, scale="softplus", layout="scale_shift"), peer.inverse(u, given)
    inputs = [u, *([] if given is None else [given]), *peer.parameters()]
    cotangents = [torch.randn_like(one) for one in theirs]
    close(ours, theirs)
    close(*(torch.autograd.grad(found, inputs, cotangents) for found in (ours, theirs)))
    close(peer(ours[0], given)[0], u)


def test_nflows_in_float32() -> None:
    """As it comes from its constructor: no further from float64 than it is itself."""
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(7)
    peer = transforms.MaskedAffineAutoregressiveTransform(features=16, hidden_features=64)
    u = torch.randn(65, 16)
    with torch.no_grad():
        layers = layers_of_made(peer.autoregressive_net, None)
        ours = ops.autoregressive_inverse(u, layers, scale="softplus", layout="scale_shift")
        theirs = eager_runs(lambda nudge: peer.inverse(nudge(u)))
        exact = peer.double().inverse(u.double())
    for one, runs, truth in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(one, runs, truth)


def test_nflows_with_random_masks() -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(2)
    peer = transforms.MaskedAffineAutoregressiveTransform(
        features=6, hidden_features=40, use_residual_blocks=False, random_mask=True
    ).double()
    randomise(peer)
    u = torch.randn(9, 6, dtype=torch.float64)
    layers = layers_of_made(peer.autoregressive_net, None)
    close(ops.autoregressive_inverse(u, layers, scale="softplus", layout="scale_shift"), peer.inverse(u))


def test_nflows_spline() -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(3)
    peer = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        num_bins=5, tails="linear", tail_bound=2.5, features=6, hidden_features=24
    ).double()
    randomise(peer)
    u = 2.0 * torch.randn(9, 6, dtype=torch.float64)
    layers = layers_of_made(peer.autoregressive_net, None)
    found = ops.autoregressive_inverse(u, layers, transform="rational_quadratic", num_bins=5, tail_bound=2.5)
    close(found, peer.inverse(u))


def test_normflows() -> None:
    flows = pytest.importorskip("normflows.flows")
    torch.manual_seed(4)
    peer = flows.MaskedAffineAutoregressive(6, 24).double()  # whose context, if any, gates the residuals
    randomise(peer)
    u = torch.randn(9, 6, dtype=torch.float64)
    layers = layers_of_made(peer.autoregressive_net, None)
    options: dict[str, Any] = {"scale": "sigmoid", "eps": 1e-3, "layout": "scale_shift"}
    close(ops.autoregressive_inverse(u, layers, **options), peer.inverse(u))


@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("context", [0, 3])
def test_zuko(context: int, passes: int | None) -> None:
    autoregressive = pytest.importorskip("zuko.flows.autoregressive")
    torch.manual_seed(5)
    order = torch.tensor([2, 0, 4, 1, 3])
    peer = autoregressive.MaskedAutoregressiveTransform(
        5, context, passes=passes, order=order, hidden_features=(16, 20), activation=torch.nn.ELU
    ).double()
    randomise(peer)
    u, given = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, context, dtype=torch.float64)
    # A unit's degree is that of the last column that it sees; a context is seen by all.
    linears = [one for one in peer.hyper if isinstance(one, torch.nn.Linear)]
    columns = peer.order + 1
    layers, reach = [], torch.eye(5 + context, dtype=torch.bool)
    for index, linear in enumerate(linears):
        reach = (linear.mask.double() @ reach.double()) > 0
        degrees = torch.where(reach[:, :5], columns, 0).amax(1)
        weight, added = linear.weight, None
        if index == 0 and context:
            added = F.linear(given, (linear.mask * weight)[:, 5:])
            weight = weight[:, :5]
        last = index == len(linears) - 1
        activation = "elu" if index else "none"
        layers.append(MaskedLayer(weight, linear.bias, None if last else degrees, activation=activation, add=added))
    transform = peer(given if context else None)
    expected, ladj = transform.inv.call_and_ladj(u)
    found = ops.autoregressive_inverse(u, layers, degrees=columns, scale="softclip")
    close(found, (expected, ladj))


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Pyro makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("skip", [False, True])
def test_pyro(skip: bool) -> None:
    pytest.importorskip("pyro")
    from pyro.distributions.transforms import AffineAutoregressive
    from pyro.nn import AutoRegressiveNN

    torch.manual_seed(6)
    order = torch.tensor([3, 1, 0, 4, 2])
    net = AutoRegressiveNN(5, [20, 15], permutation=order, skip_connections=skip).double()
    randomise(net)
    u = torch.randn(9, 5, dtype=torch.float64)
    columns = torch.empty(5, dtype=torch.int64)
    columns[order] = torch.arange(1, 6)
    layers, sees = [], columns
    for index, linear in enumerate(net.layers[:-1]):
        degrees = torch.where(linear.mask > 0, sees, 0).amax(1)
        activation = "relu" if index else "none"
        layers.append(MaskedLayer(linear.weight, linear.bias, degrees, activation=activation))
        sees = degrees
    residual = None
    if skip:
        residual = len(layers)
        layers.append(MaskedLayer(net.skip_layer.weight, None, columns.repeat(2) - 1, source=-1))
    final = net.layers[-1]
    layers.append(MaskedLayer(final.weight, final.bias, source=1, activation="relu", residual=residual))
    transform = AffineAutoregressive(net)
    x = transform._inverse(u)
    found = ops.autoregressive_inverse(u, layers, degrees=columns, scale="clip", interleaved=False)
    close(found, (x, -transform.log_abs_det_jacobian(x, transform(x))))


# ---- derivatives -----------------------------------------------------------------------------------------------------

SMOOTH = ["nflows", "sigmoid", "softplus without least", "groups", "spline"]


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (LINEAR, "strict"), *((INVERSE, v) for v in SMOOTH)])
def test_gradcheck(op: str, variant: str) -> None:
    degrees = {"degrees": (1, 2, 1)} if variant == "groups" else {}
    chosen: Any = LINEARS[variant] if op == LINEAR else {**VARIANTS[variant], **degrees}
    problem = make(op, chosen, dtype=torch.float64, batch=2, columns=3, units=3, seed=3)
    names = list(problem.inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        changed = problem.map(lambda tensor: tensor)
        changed.inputs = dict(zip(names, tensors, strict=True))
        return tuple(changed.results())

    leaves = tuple(tensor.requires_grad_() for tensor in problem.inputs.values())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_only_the_gradients_that_are_asked_for() -> None:
    for op, variant in ((LINEAR, "masked"), (INVERSE, "nflows")):
        problem = problem_of(op, variant)
        cotangents = problem.cotangents()
        every = dict(zip(problem.inputs, problem.run(cotangents)[-len(problem.inputs) :], strict=True))
        for name in problem.inputs:
            leaves = problem.map(torch.clone)
            leaves.inputs[name].requires_grad_()
            results = leaves.results()
            (gradient,) = torch.autograd.grad(results, [leaves.inputs[name]], cotangents)
            assert torch.equal(gradient, every[name])


def test_one_of_two_results_is_used() -> None:
    problem = make(INVERSE, "nflows", dtype=torch.float64)
    cotangents = problem.cotangents()
    for index in range(2):
        chosen = [c if i == index else torch.zeros_like(c) for i, c in enumerate(cotangents)]
        leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
        result = leaves.results()[index]
        gradients = torch.autograd.grad(result, list(leaves.inputs.values()), cotangents[index])
        close(list(gradients), problem.run(chosen, "reference")[2:])


def test_backward_keeps_the_inputs_and_the_solution_alone() -> None:
    problem = make(INVERSE, "nflows").map(lambda tensor: tensor.requires_grad_())
    operator, arguments = operator_arguments(problem)
    arguments = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda _: None):
        x, _ = operator.run(INVERSE, arguments[0], arguments)
    mine = {tensor.data_ptr() for tensor in (*arguments, x) if isinstance(tensor, Tensor)}
    assert {tensor.data_ptr() for tensor in kept} == mine


def operator_arguments(problem: Problem) -> tuple[Any, tuple[Any, ...]]:
    """The operator that a call ends in, and its positional arguments there."""
    operator = module._MASKED_LINEAR if problem.op == LINEAR else module._INVERSE
    seen: list[tuple[Any, ...]] = []
    original = operator.run

    def spy(name: str, subject: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments)
        return original(name, subject, arguments)

    try:
        operator.run = spy  # type: ignore[method-assign]
        problem.call()
    finally:
        del operator.run
    return operator, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in seen[0])


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (LINEAR, "no bias"), (INVERSE, "nflows")])
def test_the_backward_operators_contract(op: str, variant: str) -> None:
    """Bit i of `needs` asks for gradient i; what is not asked for is empty; no two share memory."""
    operator, arguments = operator_arguments(problem_of(op, variant))
    outputs = operator.op(*arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads, saved = [torch.randn_like(one) for one in outputs], [outputs[index] for index in operator.saved]
    tensors, options = arguments[: operator.tensors], arguments[operator.tensors :]
    there = sum(1 << index for index in range(3) if tensors[index] is not None)
    every = operator.op_backward(*grads, *tensors, *saved, *options, there)
    for needs in range(8):
        if needs & ~there:
            continue
        for index, one in enumerate(operator.op_backward(*grads, *tensors, *saved, *options, needs)):
            assert torch.equal(one, every[index]) if needs >> index & 1 else one.numel() == 0


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (INVERSE, "nflows"), (INVERSE, "spline")])
def test_function_transforms(op: str, variant: str) -> None:
    problem = problem_of(op, variant, dtype=torch.float64, batch=2, columns=3, units=4)
    first = next(iter(problem.inputs))
    x = problem.inputs[first]

    def results(x: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        changed = problem.map(lambda tensor: tensor)
        changed.inputs[first] = x
        return tuple(changed.results(backend))

    def scalar(x: Tensor, backend: str | None = None) -> Tensor:
        return sum(((k + 1) * one.sin().sum() for k, one in enumerate(results(x, backend))), x.new_zeros(()))

    def definition(x: Tensor) -> Tensor:
        return scalar(x, "reference")

    func = torch.func
    close(func.grad(scalar)(x), func.grad(definition)(x))
    close(func.jacrev(results)(x), func.jacrev(lambda x: results(x, "reference"))(x))
    close(func.hessian(scalar)(x), torch.autograd.functional.hessian(definition, x))
    xs = torch.stack([x, x + 0.5, -x])
    close(func.vmap(func.grad(scalar))(xs), torch.stack([func.grad(definition)(one) for one in xs]))
    close(func.vmap(results)(xs), tuple(torch.stack(parts) for parts in zip(*map(results, xs), strict=True)))
    tangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    close(func.jvp(scalar, (x,), (tangent,)), func.jvp(definition, (x,), (tangent,)))
    assert func.vmap(lambda x: results(x)[0])(xs[:0]).shape == (0, *results(x)[0].shape)


# ---- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (LINEAR, "no bias"), (INVERSE, "nflows")])
def test_opcheck(op: str, variant: str) -> None:
    operator, arguments = operator_arguments(problem_of(op, variant, batch=2, units=4))
    for tensor in arguments[:3]:
        if tensor is not None:
            tensor.requires_grad_()
    registry.opcheck(operator.op, arguments)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    outputs = operator.op(*plain)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads, saved = [torch.randn_like(one) for one in outputs], [outputs[index] for index in operator.saved]
    there = sum(1 << index for index in range(3) if plain[index] is not None)
    for needs in (there, 1):
        backward = (*grads, *plain[: operator.tensors], *saved, *plain[operator.tensors :], needs)
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        registry.opcheck(operator.op_backward, backward, test_utils=utilities)


class Model(torch.nn.Module):
    """Both operators with parameters: ``[B, 5]`` to ``[B, 5]``, ``[B]``."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((9, 5), (9, 9), (10, 9))
        self.weights = torch.nn.ParameterList(torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)
        self.biases = torch.nn.ParameterList(torch.randn(shape[0]) for shape in shapes)
        self.register_buffer("columns", torch.arange(1, 6))
        self.register_buffer("units", torch.arange(9) % 4 + 1)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        (a, b, c), (d, e, f) = self.weights, self.biases
        layers = [
            MaskedLayer(a, d, self.units),
            MaskedLayer(b, e, self.units, activation="relu"),
            MaskedLayer(c, f, activation="relu"),
        ]
        x, log_abs_det = ops.autoregressive_inverse(u, layers, scale="softplus")
        h = ops.masked_linear(x, a, d, self.columns, self.units)
        return x, log_abs_det + h.sum(1)


def outcome(function: Callable[[Tensor], tuple[Tensor, ...]], model: Model, batch: int) -> list[Tensor]:
    u = torch.randn(batch, 5, generator=torch.Generator().manual_seed(batch)).requires_grad_()
    results = function(u)
    gradients = torch.autograd.grad(results[0].sum() + results[1].square().sum(), [u, *model.parameters()])
    return [*(result.detach() for result in results), *gradients]


def test_compiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    model = Model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 17):
        close(outcome(compiled, model, batch), outcome(model, model, batch))
    # Where Dynamo starts anew, it leaves an empty graph, too.
    assert sum(any(node.op == "call_function" for node in one.graph.nodes) for one in counter.graphs) == 1


def test_exports_with_a_dynamic_batch() -> None:
    model = Model()
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(3, 5),), dynamic_shapes=({0: batch},))
        for size in (3, 8):
            u = torch.randn(size, 5)
            close(program.module()(u), model(u))


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_a_fake_tensor_call_computes_nothing(op: str, variant: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = problem_of(op, variant, dtype=torch.bfloat16)
    problem = problem.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t)  # results are contiguous even so
    with FakeTensorMode() as mode:
        fake = problem.map(mode.from_tensor)
        fake.options = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        if isinstance(fake, Network):
            fake.layers = [
                {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in layer.items()}
                for layer in fake.layers
            ]
        shapes = fake.results()
    for ours, theirs in zip(shapes, problem.results(), strict=True):
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype


# ---- the machine makes no difference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (INVERSE, "nflows"), (INVERSE, "spline")])
@pytest.mark.parametrize("batch", [40, 301])  # few rows are cut into narrower panels
def test_threads_make_no_difference(batch: int, op: str, variant: str) -> None:
    problem = problem_of(op, variant, batch=batch, units=70)
    cotangents = problem.cotangents()
    one = problem.run(cotangents)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for ours, theirs in zip(problem.run(cotangents), one, strict=True):
            assert torch.equal(ours, theirs)


def test_rows_make_no_difference() -> None:
    """A row's result does not depend on the others, nor on how many there are."""
    for variant in ("nflows", "spline"):
        problem = make(INVERSE, variant, batch=90)
        whole = problem.results()
        for begin, end in ((0, 1), (7, 40), (64, 90)):
            part = problem.map(lambda t: t[begin:end] if t.size(0) == 90 else t)  # noqa: B023  used at once
            for ours, theirs in zip(part.results(), whole, strict=True):
                assert torch.equal(ours, theirs[begin:end])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_definition(isa: str) -> None:
    program = """
import torch
from autoregressive_cases import *
from operator_cases import check
torch.set_num_threads(1)
for variant in VARIANTS:
    check(make("autoregressive_inverse", variant, batch=37))
    check(make("autoregressive_inverse", variant, batch=9, dtype=torch.float64))
for strict in (False, True):
    check(make("masked_linear", {"strict": strict}, batch=37, columns=70, units=70))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GENFUSE_ISA": isa}
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert found.returncode == 0, found.stderr


# ---- numbers of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_gives_nan_out_in_its_own_row_alone(variant: str) -> None:
    problem = make(INVERSE, variant)
    cotangents = problem.cotangents()
    expected = problem.run(cotangents)
    degrees = torch.tensor(problem.options.get("degrees", (1, 2, 3, 4, 5)))
    u = problem.inputs["u"].clone()
    u[1, 2] = torch.nan
    problem.inputs["u"] = u
    found = problem.run(cotangents)
    rows = torch.arange(6) != 1
    for index in range(len(cotangents) + 1):  # the results and the gradient of u
        assert torch.equal(found[index][rows], expected[index][rows])
    assert bool(found[0][1, 2].isnan())
    if variant not in ("additive", "one group", "any degrees"):  # whose other columns do not see this one
        assert bool(found[1][1].isnan())
    before = degrees < degrees[2]
    assert torch.equal(found[0][1, before], expected[0][1, before])


def test_infinite_numbers() -> None:
    """Where the definition is infinite or not a number, so is the kernel."""
    for variant in ("affine", "zuko", "spline"):
        problem = make(INVERSE, variant)
        problem.inputs["u"][0] = torch.tensor([torch.inf, -torch.inf, 1e38, -1e38, 0.0])
        for ours, theirs in zip(problem.results(), problem.results("reference"), strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype: torch.dtype) -> None:
    """A linear layer follows autocast, as torch's does; a log-determinant is computed in float32."""
    layer = make(LINEAR)
    expected = layer.map(lambda t: t.to(dtype)).results()[0]
    operator, arguments = operator_arguments(layer)
    with torch.autocast("cpu", dtype=dtype):
        for result in (layer.results()[0], operator.op(*arguments)):
            assert result.dtype == dtype
            assert torch.equal(result, expected)
        assert layer.map(Tensor.double).results()[0].dtype == torch.float64
    problem = make(INVERSE, "nflows", dtype=dtype)
    expected_all = problem.map(Tensor.float).results()
    with torch.autocast("cpu", dtype=dtype):
        mixed = problem.map(lambda t: t)
        mixed.inputs["weight 0"] = mixed.inputs["weight 0"].float()
        for results in (problem.results(), mixed.results()):
            for ours, theirs in zip(results, expected_all, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("op", "variant"), [(LINEAR, "masked"), (INVERSE, "nflows")])
def test_deterministic_and_other_modes(op: str, variant: str) -> None:
    problem = problem_of(op, variant)
    expected = [result.detach() for result in problem.map(lambda t: t.clone().requires_grad_()).results()]
    cotangents = problem.cotangents()
    torch.use_deterministic_algorithms(True)
    for ours, theirs in zip(problem.run(cotangents), problem.run(cotangents), strict=True):
        assert torch.equal(ours, theirs)
    with torch.inference_mode():
        for ours, theirs in zip(problem.map(torch.clone).results(), expected, strict=True):
            assert torch.equal(ours.clone(), theirs)
    with pytest.raises(RuntimeError, match="has no such backend"):
        problem.call("triton")


# ---- what is wrong with a call ---------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_masked_linear() -> None:
    x, w, b, d = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4), torch.arange(4)
    for error, message, arguments in (
        (TypeError, "x must be a Tensor, got list", ([1.0], w, b, d[:3], d)),
        (ValueError, "x must be of a floating dtype", (x.long(), w, b, d[:3], d)),
        (RuntimeError, "weight must be torch.float32, the dtype of x; got torch.float64", (x, w.double(), b, d[:3], d)),
        (RuntimeError, r"weight must be \[outputs, inputs\], got \[4\]", (x, b, b, d[:3], d)),
        (RuntimeError, r"x must be \[..., 3\], the inputs of weight; got \[2, 4\]", (w.T[:2], w, b, d[:3], d)),
        (RuntimeError, r"bias must be \[4\], the outputs of weight; got \[3\]", (x, w, b[:3], d[:3], d)),
        (TypeError, "in_degrees must be an int64 Tensor, got list", (x, w, b, [1, 2, 3], d)),
        (ValueError, "out_degrees must be torch.int64, got torch.float32", (x, w, b, d[:3], b)),
        (RuntimeError, r"in_degrees must be \[3\], one for each input; got \[4\]", (x, w, b, d, d)),
        (RuntimeError, r"out_degrees must be \[4\], one for each output; got \[3\]", (x, w, b, d[:3], d[:3])),
    ):
        with pytest.raises(error, match=f"masked_linear: {message}"):
            ops.masked_linear(*arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strict must be a bool, got int"):
        ops.masked_linear(x, w, b, d[:3], d, strict=1)  # type: ignore[arg-type]


def test_what_is_wrong_with_an_inverse() -> None:
    u, d = torch.zeros(2, 3), torch.arange(4)
    hidden, last = MaskedLayer(torch.zeros(4, 3), torch.zeros(4), d), MaskedLayer(torch.zeros(6, 4), torch.zeros(6))

    spline = {"transform": "rational_quadratic"}

    def changed(layer: MaskedLayer, **fields: Any) -> MaskedLayer:
        return MaskedLayer(**{**vars(layer), **fields})

    for error, message, arguments, options in (
        (TypeError, "u must be a Tensor, got int", (1, [hidden, last]), {}),
        (RuntimeError, r"u must be \[B, D\], got \[3\]", (u[0], [hidden, last]), {}),
        (TypeError, "layers must be a sequence of MaskedLayer, got Tensor", (u, u), {}),
        (ValueError, "layers must hold at least one layer", (u, []), {}),
        (
            RuntimeError,
            r"layers\[1\].weight must be \[units, 4\], got \[6, 3\]",
            (u, [hidden, changed(last, weight=torch.zeros(6, 3))]),
            {},
        ),
        (RuntimeError, r"layers\[1\].weight must be \[3, inputs\]", (u, [hidden, last]), {"transform": "additive"}),
        (
            RuntimeError,
            r"layers\[0\].bias must be \[4\], got \[3\]",
            (u, [changed(hidden, bias=torch.zeros(3)), last]),
            {},
        ),
        (
            RuntimeError,
            r"layers\[0\].add must be \[2, 4\], got \[3, 4\]",
            (u, [changed(hidden, add=torch.zeros(3, 4)), last]),
            {},
        ),
        (
            TypeError,
            r"layers\[0\].degrees must be an int64 Tensor, got NoneType",
            (u, [changed(hidden, degrees=None), last]),
            {},
        ),
        (ValueError, r"layers\[1\].degrees must be None", (u, [hidden, changed(last, degrees=torch.arange(6))]), {}),
        (
            ValueError,
            r"layers\[0\].source must be a layer before it, at least -1; got 0",
            (u, [changed(hidden, source=0), last]),
            {},
        ),
        (
            ValueError,
            r"layers\[1\].residual must be a layer before it, at least 0; got 1",
            (u, [hidden, changed(last, residual=1)]),
            {},
        ),
        (
            RuntimeError,
            r"layers\[1\] has 6 units, its residual layers\[0\] has 4",
            (u, [hidden, changed(last, residual=0)]),
            {},
        ),
        (
            ValueError,
            r"layers\[1\].activation must be one of 'none', 'relu', .*, got 'selu'",
            (u, [hidden, changed(last, activation="selu")]),
            {},
        ),
        (
            ValueError,
            "transform must be one of 'affine', 'additive', 'rational_quadratic', got 'cubic'",
            (u, [hidden, last]),
            {"transform": "cubic"},
        ),
        (ValueError, "scale must be one of 'exp', .*, got 'linear'", (u, [hidden, last]), {"scale": "linear"}),
        (
            ValueError,
            "layout must be one of 'shift_scale', 'scale_shift', got 'both'",
            (u, [hidden, last]),
            {"layout": "both"},
        ),
        (TypeError, "interleaved must be a bool, got int", (u, [hidden, last]), {"interleaved": 1}),
        (RuntimeError, "degrees must be 3, one for each column of u; got 2", (u, [hidden, last]), {"degrees": [1, 2]}),
        (
            TypeError,
            "degrees must be whole numbers, got torch.float32",
            (u, [hidden, last]),
            {"degrees": torch.ones(3)},
        ),
        (TypeError, "degrees must be a sequence of ints", (u, [hidden, last]), {"degrees": "abc"}),
        (TypeError, "num_bins must be an int, got float", (u, [hidden, last]), {**spline, "num_bins": 2.0}),
        (ValueError, "num_bins must be at least 1, got 0", (u, [hidden, last]), {**spline, "num_bins": 0}),
        (ValueError, "tail_bound must be above 0", (u, [hidden, last]), {**spline, "tail_bound": 0.0}),
        (
            ValueError,
            "min_bin_width must be at most 1 / num_bins = 0.125, got 0.5",
            (u, [hidden, last]),
            {**spline, "min_bin_width": 0.5},
        ),
    ):
        with pytest.raises(error, match=f"autoregressive_inverse: {message}"):
            ops.autoregressive_inverse(*arguments, **options)  # type: ignore[arg-type]


def test_a_residual_must_be_known_before_it_is_added() -> None:
    low, high = torch.tensor([1, 1]), torch.tensor([1, 2])
    layers = [
        MaskedLayer(torch.zeros(2, 3), None, high),
        MaskedLayer(torch.zeros(2, 2), None, low, residual=0),
        MaskedLayer(torch.zeros(6, 2)),
    ]
    with pytest.raises(ValueError, match=r"layers\[1\] has units of lower degree than the units of its residual"):
        ops.autoregressive_inverse(torch.zeros(1, 3), layers)


def test_the_operator_refuses_what_it_could_not_index() -> None:
    """Direct callers meet the same borders: no program reads or writes out of bounds."""
    _, arguments = operator_arguments(make(INVERSE, "nflows"))
    u, parameters, additions, degrees, program, constants = arguments
    op = torch.ops.genfuse.autoregressive_inverse
    head = 5 + u.size(1)

    def with_field(index: int, value: int) -> tuple[int, ...]:
        return (*program[:index], value, *program[index + 1 :])

    wrong: list[tuple[Any, ...]] = [
        (u[0], parameters, additions, degrees, program, constants),
        (u, parameters[1:], additions, degrees, program, constants),
        (u, parameters.double(), additions, degrees, program, constants),
        (u, parameters, None, degrees, program, constants),
        (u, parameters, additions[:, 1:], degrees, program, constants),
        (u, parameters, additions, degrees[1:], program, constants),
        (u, parameters, additions, torch.cat([degrees, degrees]), program, constants),
        (u, parameters, additions, degrees.int(), program, constants),
        (u, parameters, additions, degrees, program[:-1], constants),
        (u, parameters, additions, degrees, program[:head], constants),
        (u, parameters, additions, degrees, program, constants[1:]),
        *(
            (u, parameters, additions, degrees, with_field(index, value), constants)
            for index, value in (
                (0, 3),
                (0, -1),
                (1, 9),
                (2, 3),
                (head, 8),
                (head, -1),
                (head, 1 << 62),
                (head + 1, 0),
                (head + 1, -2),
                (head + 2, 8),
                (head + 5, 0),
                (head + 17, 5),
                (5, -(1 << 63)),
            )
        ),
    ]
    for call in wrong:
        with pytest.raises((RuntimeError, TypeError)):
            op(*call)
