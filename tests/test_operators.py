"""What is asked of every operator of sampling and likelihoods: equal to its definition, at home in all of torch."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import genfuse
import pytest
import torch
from genfuse import ops
from genfuse.ops import sampling
from genfuse.ops.flow import coupling, linear, pointwise, spline
from genfuse.ops.likelihood import categorical, mixture, rows
from genfuse.ops.masked_conv import conv, gate
from genfuse.ops.operator import Operator
from operator_cases import (
    CONV_OPS,
    CONVS,
    DTYPE_NAMES,
    DTYPES,
    FLOW_OPS,
    FLOWS,
    GATE_OPS,
    GATES,
    LIKELIHOOD,
    PIXEL_OPS,
    PIXELS,
    SAMPLING,
    SIZES,
    SPLINES,
    VARIANTS,
    Problem,
    check,
    floating,
    make,
)
from tolerances import FACTOR
from torch import Tensor
from torch import library as registry
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

CASES = SAMPLING + LIKELIHOOD + SPLINES + FLOWS + GATES + CONVS + PIXELS
SPLINE_OPS = tuple(dict.fromkeys(op for op, _ in SPLINES))
OPERATORS: dict[str, Operator] = {
    "gaussian_rsample": sampling._GAUSSIAN,
    "gaussian_rsample_kl": sampling._GAUSSIAN,
    "gaussian_kl": sampling._GAUSSIAN,
    "gumbel_softmax": sampling._GUMBEL_SOFTMAX,
    "relaxed_bernoulli": sampling._RELAXED_BERNOULLI,
    "vector_quantize": sampling._VECTOR_QUANTIZE,
    "bernoulli_nll": rows._BERNOULLI,
    "gaussian_nll": rows._GAUSSIAN,
    "discretized_gaussian_nll": rows._DISCRETIZED,
    **dict.fromkeys(SPLINE_OPS, spline._SPLINE),
    "affine_coupling": coupling._AFFINE,
    "additive_coupling": coupling._ADDITIVE,
    "actnorm": pointwise._ACTNORM,
    "dequantize_logit": pointwise._DEQUANTIZE,
    "conv1x1": linear._CONV1X1,
    "gated_activation": gate._GATED,
    "concat_elu": gate._CONCAT_ELU,
    "masked_conv2d": conv._MASKED_CONV2D,
    "discretized_logistic_mixture_nll": mixture._NLL,
    "categorical_nll": categorical._NLL,
}
# A gradient that is not the derivative, on purpose.
STRAIGHT_THROUGH = {
    (op, variant)
    for op, variant in CASES
    if op == "vector_quantize" or "hard" in variant or "clamp" in VARIANTS[op][variant]
}
RICH = {  # for each operator a variant with every input that it has
    "gaussian_rsample": "logvar",
    "gaussian_rsample_kl": "prior",
    "gaussian_kl": "prior",
    "gumbel_softmax": "soft",
    "relaxed_bernoulli": "soft",
    "vector_quantize": "defaults",
    "bernoulli_nll": "probabilities",
    "gaussian_nll": "logvar",
    "discretized_gaussian_nll": "logvar",
    **dict.fromkeys(SPLINE_OPS, "separate"),
    **{op: next(iter(VARIANTS[op])) for op in (*FLOW_OPS, *GATE_OPS, *CONV_OPS, *PIXEL_OPS)},
}
# Whose first input is [B, C, ...], and whose results are in its memory format.
CHANNELS = ("affine_coupling", "additive_coupling", "actnorm", "conv1x1", *GATE_OPS, *CONV_OPS)
KEEP_FORMAT = (*GATE_OPS, *CONV_OPS)
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more; that results do not depend on it is a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def operator_arguments(problem: Problem) -> tuple[Operator, tuple[Any, ...]]:
    """The operator that a call ends in, and its positional arguments there."""
    seen: list[tuple[Any, ...]] = []
    operator = OPERATORS[problem.op]
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


# ---- equal to the definition -----------------------------------------------------------------------------------------


def test_these_are_the_kernels() -> None:
    """And not the reference in their stead."""
    for op, operator in OPERATORS.items():
        assert operator.op is not None
        problem = make(op)
        explanation = genfuse.explain(op, **problem.inputs, **problem.options)
        assert explanation.backend == "native"


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(("op", "variant"), CASES)
def test_results_and_gradients(op: str, variant: str, dtype: torch.dtype) -> None:
    # In float64 the definition stands for the exact result, and of a spline it is off by more than its nudged inputs
    # show: by its sums over bins. What the kernel is off by, test_flow_spline.py asks of wider numbers.
    factor = 8.0 if op in SPLINE_OPS and dtype == torch.float64 else FACTOR
    if dtype == torch.float64 and VARIANTS[op][variant].get("mode") == "openai":
        # The definition's difference of sigmoids is off by an ulp of 1, at masses of 1e-5 and more. No nudge of the
        # inputs shows it: near 1 a sigmoid does not move with them.
        problem = make(op, variant, dtype=dtype)
        cotangents, off = problem.cotangents(), torch.finfo(dtype).eps / 1e-5
        close(problem.run(cotangents), problem.run(cotangents, "reference"), rtol=off, atol=off)
        return
    check(*(make(op, variant, dtype=dtype, seed=seed) for seed in range(2)), factor=factor)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", [op for op in VARIANTS if op != "vector_quantize"])
def test_odd_sizes(op: str, size: int) -> None:
    for shape in ((3, size), (size, 3)):
        check(*(make(op, shape=shape, seed=seed) for seed in range(4 if size < 20 else 1)))


@pytest.mark.parametrize("op", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_element(op: str, dtype: torch.dtype) -> None:
    for codes in (1, 3) if op == "vector_quantize" else (1,):
        check(*(make(op, dtype=dtype, shape=(1, 1), codes=codes, seed=seed) for seed in range(16)))


@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (0, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("op", VARIANTS)
def test_nothing(op: str, shape: tuple[int, ...]) -> None:
    """No rows, or rows of nothing."""
    for variant in VARIANTS[op]:
        if VARIANTS[op][variant].get("batch_dims", 2 if op in CHANNELS else 1) > len(shape):
            continue
        problem = make(op, variant, shape=shape)
        cotangents = problem.cotangents()
        for ours, theirs in zip(problem.run(cotangents), problem.run(cotangents, "reference"), strict=True):
            assert ours.shape == theirs.shape
            close(ours, theirs, rtol=0.0, atol=0.0, equal_nan=True)  # the mean of no rows is none


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("gaussian_rsample", {}),
        ("gaussian_rsample_kl", {"batch_dims": 0, "prior_mean": "full"}),
        ("gaussian_kl", {"batch_dims": 0}),
        ("gumbel_softmax", {}),
        ("gumbel_softmax", {"hard": True, "dim": 0}),
        ("relaxed_bernoulli", {"noise": "rng"}),
        ("bernoulli_nll", {"batch_dims": 0}),
        ("gaussian_nll", {"batch_dims": 0, "unit": "bits_per_dim"}),
        ("discretized_gaussian_nll", {"batch_dims": 0}),
        ("rational_quadratic_spline", {}),
        ("linear_spline", {"inverse": True}),
        ("quadratic_spline", {}),
        ("cubic_spline", {}),
    ],
)
def test_a_number(op: str, options: dict[str, Any]) -> None:
    problems = [make(op, options, shape=(), seed=seed) for seed in range(8)]
    check(*problems)
    for result in problems[0].results():
        assert result.shape == ()


@pytest.mark.parametrize("op", VARIANTS)
def test_more_dimensions(op: str) -> None:
    shape = (3, 4, 2, 5)
    check(make(op, shape=shape))
    if "batch_dims" in str(VARIANTS[op]):
        variant = {**VARIANTS[op][RICH[op]], "batch_dims": 2}
        check(make(op, variant, shape=shape))
        assert make(op, variant, shape=shape).results()[-1].shape == (3, 4)


# ---- where the numbers lie -------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0],
    "within a larger one": lambda t: torch.nn.functional.pad(t, (1, 2), value=torch.nan)[..., 1:-2],
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", ["given", "rng"])
@pytest.mark.parametrize("op", VARIANTS)
def test_strides_make_no_difference(op: str, noise: str, layout: str) -> None:
    variant = dict(VARIANTS[op][RICH[op]])
    if noise == "rng":
        if op not in ("gaussian_rsample", "gaussian_rsample_kl", "gumbel_softmax", "relaxed_bernoulli"):
            pytest.skip("has no noise")
        variant["noise"] = "rng"
    problem = make(op, variant, shape=(3, 4, 2, 5))
    cotangents = problem.cotangents()
    change = LAYOUTS[layout]
    # `run` clones its leaves, and a clone keeps the strides of what is dense; so the views are made of the leaves.
    leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
    views = leaves.map(change)
    results = views.results()
    gradients = torch.autograd.grad(
        results, list(leaves.inputs.values()), [change(c) if c.dim() > 1 else c for c in cotangents]
    )
    if op in (*KEEP_FORMAT, "categorical_nll"):  # then sums go over the numbers as they lie
        close([*results, *gradients], problem.run(cotangents))
        return
    equal([*results, *gradients], problem.run(cotangents))
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("op", [op for op in VARIANTS if op != "categorical_nll"])  # its targets are no floats
def test_expanded_inputs_and_gradients(op: str) -> None:
    problem = make(op, RICH[op], shape=(1, 7))
    wide = problem.map(lambda tensor: tensor.expand(4, *tensor.shape[1:]) if tensor.size(0) == 1 else tensor)
    leaves = wide.map(lambda tensor: tensor.detach().requires_grad_())  # still expanded
    plain = wide.map(lambda tensor: tensor.contiguous().requires_grad_())
    gradients = []
    for one in (leaves, plain):
        total = sum((result.sum() for result in one.results()), torch.zeros(()))  # expanded gradients
        gradients.append(list(torch.autograd.grad(total, list(one.inputs.values()))))
    equal(*gradients)


def any_layout(pick: random.Random, shape: tuple[int, ...], broadcast: bool) -> Tensor:
    """Numbers of a shape, or of one that broadcasts to it (then perhaps already expanded), somehow strided."""
    sizes = list(shape)
    if broadcast:
        sizes = [1 if pick.random() < 0.35 else size for size in sizes][pick.choice([0, 0, 0, 1, 2]) :]
    order = list(range(len(sizes)))
    pick.shuffle(order)
    values = torch.randn([sizes[k] for k in order], dtype=torch.float64)
    values = values.permute([order.index(k) for k in range(len(sizes))])
    if sizes and pick.random() < 0.3:
        values = torch.stack((values, torch.full_like(values, torch.nan)), -1)[..., 0]
    return values.expand(shape) if broadcast and pick.random() < 0.5 else values


@pytest.mark.parametrize("seed", range(8))
def test_any_layout_and_any_broadcasting(seed: int) -> None:
    """Problems by chance: shapes, strides, broadcasting, batch dimensions, options."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        shape = tuple(pick.choice([0, 1, 1, 2, 3, 5, 8, 17, 33]) for _ in range(pick.randrange(5)))
        op = pick.choice(["gaussian_rsample_kl", "bernoulli_nll", "gaussian_nll", "discretized_gaussian_nll"])
        options: dict[str, Any] = {"batch_dims": pick.randrange(len(shape) + 1)}
        scale = pick.choice(["logvar", "log_std"])
        names = {"gaussian_rsample_kl": ["mean", scale], "bernoulli_nll": ["logits", "target"]}.get(
            op, ["x", "mean", scale]
        )
        whole = pick.choice(names)  # the others broadcast to it
        inputs = {name: any_layout(pick, shape, name != whole) for name in names}
        if op == "gaussian_rsample_kl":
            for name in ("prior_mean", pick.choice(["prior_logvar", "prior_log_std"])):
                if pick.random() < 0.6:
                    inputs[name] = any_layout(pick, shape, True)
            if pick.random() < 0.5:
                inputs["eps"] = any_layout(pick, shape, False)
            else:
                options["rng"] = torch.tensor([seed, 3])
            options["free_bits"] = pick.choice([0.0, 0.3])
            options["clamp"] = pick.choice([None, (-0.4, 0.5)])
        else:
            options["unit"] = pick.choice(["nats", "bits_per_dim"])
        found = []
        for backend in (None, "reference"):
            leaves = Problem(op, {name: t.detach().requires_grad_() for name, t in inputs.items()}, options)
            results = leaves.results(backend)
            cotangents = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape) for r in results]
            found.append([*results, *torch.autograd.grad(results, list(leaves.inputs.values()), cotangents)])
        close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", VARIANTS)
def test_only_the_gradients_that_are_asked_for(op: str) -> None:
    problem = make(op, RICH[op])
    cotangents = problem.cotangents()
    count = len(problem.inputs)
    every = problem.run(cotangents)[-count:]
    for wanted in itertools.product([False, True], repeat=count):
        if not any(wanted):
            continue
        inputs = {
            name: tensor.clone().requires_grad_(want)
            for (name, tensor), want in zip(problem.inputs.items(), wanted, strict=True)
        }
        leaves = [tensor for tensor in inputs.values() if tensor.requires_grad]
        results = Problem(op, inputs, problem.options).results()
        for result, cotangent in zip(results, cotangents, strict=True):
            if result.requires_grad:
                result.backward(cotangent, retain_graph=True)
        for leaf, whole in zip(leaves, (g for g, want in zip(every, wanted, strict=True) if want), strict=True):
            assert leaf.grad is not None
            close(leaf.grad, whole)


@pytest.mark.parametrize("op", VARIANTS)
def test_the_backward_operators_contract(op: str) -> None:
    """Bit i of `needs` asks for gradient i; what is not asked for is empty; no two share memory."""
    problem = make(op, RICH[op])
    operator, arguments = operator_arguments(problem)
    outputs = operator.op(*arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads = [torch.randn_like(outputs[index]) for index in operator.grads]
    saved = [outputs[index] for index in operator.saved]
    tensors, options = arguments[: operator.tensors], arguments[operator.tensors :]
    there = [tensor is not None for tensor in tensors[: operator.differentiable]]

    def backward(needs: int) -> tuple[Tensor, ...]:
        found = operator.op_backward(*grads, *tensors, *saved, *options, needs)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    full = sum(1 << index for index, present in enumerate(there) if present)
    every = backward(full)
    pointers = [gradient.data_ptr() for gradient in every if gradient.numel() > 0]
    assert len(set(pointers)) == len(pointers)
    for needs in range(full + 1):
        if needs & ~full:
            continue
        found = backward(needs)
        assert len(found) == operator.differentiable
        for index, (one, whole) in enumerate(zip(found, every, strict=True)):
            if needs >> index & 1:
                assert torch.equal(one, whole)
            else:
                assert one.numel() == 0


@pytest.mark.parametrize("op", ["gaussian_rsample_kl", "vector_quantize"])
def test_one_of_two_results_is_used(op: str) -> None:
    problem = make(op, RICH[op])
    cotangents = problem.cotangents()
    for index in range(2):
        chosen = [c if i == index else torch.zeros_like(c) for i, c in enumerate(cotangents)]
        gradients = []
        for backend in (None, "reference"):
            leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
            result = leaves.results(backend)[index]
            inputs = list(leaves.inputs.values())
            gradients.append(torch.autograd.grad(result, inputs, cotangents[index], materialize_grads=True))
        close(*gradients)
        close(list(gradients[0]), problem.run(chosen)[2:])


@pytest.mark.parametrize("op", VARIANTS)
def test_direct_callers_get_gradients(op: str) -> None:
    problem = make(op, RICH[op])
    operator, arguments = operator_arguments(problem)
    cotangents = problem.cotangents()
    gradients = []
    for function in (operator.op, lambda *a: operator.run(op, problem.inputs[next(iter(problem.inputs))], a)):
        leaves = [
            a.clone().requires_grad_() if isinstance(a, Tensor) and i < operator.differentiable else a
            for i, a in enumerate(arguments)
        ]
        results = [result for result in floating(function(*leaves)) if result.requires_grad]
        if op in ("gaussian_rsample", "gaussian_kl"):
            results = results[:1] if op == "gaussian_rsample" else results[1:]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients.append(list(torch.autograd.grad(results, inputs, cotangents, create_graph=True)))
        total = sum((gradient.square().sum() for gradient in gradients[-1]), torch.zeros(()))
        gradients[-1] += torch.autograd.grad(total, inputs, materialize_grads=True)
    equal(*gradients)


def test_backward_keeps_no_noise() -> None:
    """Neither noise nor sample is kept where backward can do without: the inputs and the random pair alone."""
    for op, variant, extra in (
        ("gaussian_rsample", "rng", 0),
        ("gaussian_rsample_kl", "prior, rng", 0),
        ("gumbel_softmax", "rng", 1),  # the sample
        ("relaxed_bernoulli", "rng", 1),
        ("discretized_gaussian_nll", "logvar", 0),
    ):
        problem = make(op, variant).map(lambda tensor: tensor.requires_grad_())
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t), lambda _: None):  # type: ignore[misc]
            problem.call()
        mine = {tensor.data_ptr() for tensor in [*problem.inputs.values(), *problem.options.values()] if
                isinstance(tensor, Tensor)}  # fmt: skip
        assert sum(tensor.data_ptr() not in mine for tensor in kept) == extra, op


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "variant"), [case for case in CASES if case not in STRAIGHT_THROUGH])
def test_gradcheck(op: str, variant: str) -> None:
    problem = make(op, variant, dtype=torch.float64, shape=(2, 3), seed=3)
    names = list(problem.inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(Problem(op, dict(zip(names, tensors, strict=True)), problem.options).results())

    leaves = tuple(tensor.requires_grad_() for tensor in problem.inputs.values())
    # Every number of a spline's or kernel's many would take minutes; directions at random do for all but one variant.
    fast = op in (*SPLINE_OPS, *CONV_OPS) and variant != RICH[op]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast)
    if variant == RICH[op] and len(leaves) > 1:  # a constant among them
        leaves[1].requires_grad_(False)
        assert torch.autograd.gradgradcheck(function, leaves)


def derivatives(problem: Problem, backend: str | None, orders: int) -> list[Tensor]:
    """The gradients of a mixture of all results, the gradients of a mixture of those, and so on."""
    leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
    inputs = list(leaves.inputs.values())
    values, found = leaves.results(backend), []
    for order in range(orders):
        generator = torch.Generator().manual_seed(order)
        total = sum(
            (value * torch.randn(value.shape, generator=generator).to(value)).sum().double() for value in values
        )
        assert isinstance(total, Tensor)
        if not total.requires_grad:  # of what is linear
            return found + [torch.zeros_like(value) for value in inputs] * (orders - order)
        values = list(torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True))
        found += [value.detach() for value in values]
    return found


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_derivatives_to_the_third_are_the_references(op: str, variant: str) -> None:
    """Straight-through ones too, which no finite difference can check."""
    problem = make(op, variant, dtype=torch.float64, shape=(2, 3), codes=4)
    close(derivatives(problem, None, 3), derivatives(problem, "reference", 3))


@pytest.mark.parametrize("op", VARIANTS)
def test_function_transforms(op: str) -> None:
    problem = make(op, RICH[op], dtype=torch.float64, shape=(2, 3), codes=4)
    first = next(iter(problem.inputs))
    x = problem.inputs[first]

    def results(x: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        return tuple(Problem(op, {**problem.inputs, first: x}, problem.options).results(backend))

    def scalar(x: Tensor, backend: str | None = None) -> Tensor:
        found = results(x, backend)
        return sum(((k + 1) * one.sin().sum() for k, one in enumerate(found)), x.new_zeros(()))

    def definition(x: Tensor) -> Tensor:
        return scalar(x, "reference")

    func = torch.func
    close(func.grad(scalar)(x), func.grad(definition)(x))
    close(func.jacrev(results)(x, None), func.jacrev(results)(x, "reference"))
    expected = torch.autograd.functional.hessian(definition, x)
    for hessian in (func.hessian, lambda f: func.jacrev(func.jacrev(f)), lambda f: func.jacfwd(func.jacfwd(f))):
        close(hessian(scalar)(x), expected)
    inner = func.grad(lambda x: func.grad(scalar)(x).square().sum())
    close(inner(x), func.grad(lambda x: func.grad(definition)(x).square().sum())(x))
    xs = torch.stack([x, x + 0.5, 0.3 * x])
    close(func.vmap(func.grad(scalar))(xs), torch.stack([func.grad(definition)(one) for one in xs]))
    tangent = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    close(func.jvp(scalar, (x,), (tangent,)), func.jvp(definition, (x,), (tangent,)))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(scalar(forward_ad.make_dual(x, tangent))).tangent
    close(dual, func.jvp(definition, (x,), (tangent,))[1])
    functional = torch.autograd.functional
    loop = functional.jacobian(lambda x: results(x, "reference"), x)
    close(functional.jacobian(lambda x: results(x, None), x, vectorize=True), loop)
    close(functional.jacobian(lambda x: results(x, None), x, vectorize=True, strategy="forward-mode"), loop)


def test_the_reference_has_forward_derivatives_of_a_clamp() -> None:
    logvar = torch.tensor([-9.0, 0.0, 9.0])

    def z(logvar: Tensor) -> Tensor:
        return ops.gaussian_rsample(torch.zeros(3), logvar, clamp=(-2.0, 2.0), eps=torch.ones(3))

    expected = 0.5 * torch.exp(0.5 * logvar.clamp(-2.0, 2.0))
    close(torch.func.jvp(z, (logvar,), (torch.ones(3),))[1], expected)
    close(torch.func.jacfwd(z)(logvar), torch.diag(expected))
    close(torch.func.jacrev(z)(logvar), torch.diag(expected))


# ---- batches of problems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["first", "last", "all"])
@pytest.mark.parametrize("op", VARIANTS)
def test_vmap(op: str, which: str) -> None:
    for variant in (RICH[op], *(v for v in VARIANTS[op] if v in ("rng", "prior, rng", "hard, rng"))):
        problems = [make(op, variant, shape=(2, 4), codes=3, seed=seed) for seed in range(3)]
        for problem in problems:
            problem.options = problems[0].options
        names = list(problems[0].inputs)
        batched = {"first": names[:1], "last": names[-1:], "all": names}[which]

        def call(*tensors: Tensor, names: list[str] = batched, problem: Problem = problems[0]) -> Any:
            return Problem(op, {**problem.inputs, **dict(zip(names, tensors, strict=True))}, problem.options).call()

        stacked = [torch.stack([problem.inputs[name] for problem in problems], 1) for name in batched]
        loop = [call(*(problem.inputs[name] for name in batched)) for problem in problems]
        many = loop if not isinstance(loop[0], Tensor) else [(one,) for one in loop]
        expected = [torch.stack(parts) for parts in zip(*many, strict=True)]
        result = torch.vmap(call, in_dims=1)(*stacked)
        equal([result] if isinstance(result, Tensor) else list(result), expected)
        leaves = [tensor.requires_grad_() for tensor in stacked]  # gradients by torch, outside
        total = sum(part.sum() for part in floating(torch.vmap(call, in_dims=1)(*leaves)))
        assert isinstance(total, Tensor)
        gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
        for name, gradient in zip(batched, gradients, strict=True):
            for k, problem in enumerate(problems):
                inputs = {**problems[0].inputs, **{n: problem.inputs[n] for n in batched}}
                one = Problem(op, {n: t.clone().requires_grad_() for n, t in inputs.items()}, problem.options)
                alone = torch.autograd.grad(sum(r.sum() for r in one.results()), one.inputs[name], allow_unused=True)[0]
                close(gradient[:, k], torch.zeros_like(gradient[:, k]) if alone is None else alone)


@pytest.mark.parametrize("op", VARIANTS)
def test_vmap_of_no_examples(op: str) -> None:
    problem = make(op, RICH[op], shape=(2, 4))
    first = next(iter(problem.inputs))
    result = torch.vmap(lambda x: problem.call(**{first: x}))(torch.zeros(0, *problem.inputs[first].shape))
    for ours, theirs in zip(floating(result), problem.results(), strict=True):
        assert ours.shape == (0, *theirs.shape)


NOISY: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian_rsample": lambda x: ops.gaussian_rsample(x, x),
    "gaussian_rsample_kl": lambda x: ops.gaussian_rsample_kl(x, x)[0],
    "gumbel_softmax": ops.gumbel_softmax,
    "relaxed_bernoulli": ops.relaxed_bernoulli,
    "categorical_sample": lambda x: ops.categorical_sample(x, 40),
}


@pytest.mark.parametrize("op", NOISY)
def test_randomness_under_vmap(op: str) -> None:
    function = NOISY[op]
    x = torch.zeros(3, 2, 50)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(x)
    same = torch.vmap(function, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0, 0], same[0, 1])
    different = torch.vmap(function, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])
    torch.manual_seed(5)
    again = torch.vmap(function, randomness="same")(x)
    torch.manual_seed(5)
    assert torch.equal(again[1], function(x[1]))
    if op != "categorical_sample":
        gradient = torch.vmap(torch.func.grad(lambda x: function(x).square().sum()), randomness="different")(x)
        assert not torch.equal(gradient[0], gradient[1])


# ---- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", VARIANTS)
def test_opcheck(op: str) -> None:
    for variant in dict.fromkeys((RICH[op], list(VARIANTS[op])[-1])):
        problem = make(op, variant, shape=(2, 3), codes=4)
        operator, arguments = operator_arguments(problem)
        for tensor in arguments[: operator.differentiable]:
            if tensor is not None:
                tensor.requires_grad_()
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        rich = variant == RICH[op]
        if rich:
            registry.opcheck(operator.op, arguments)
        else:
            registry.opcheck(operator.op, arguments, test_utils=utilities)
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        results = operator.op(*plain)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        grads = [torch.randn_like(results[index]) for index in operator.grads]
        saved = [results[index] for index in operator.saved]
        there = [k for k in range(operator.differentiable) if plain[k] is not None]
        for needs in (sum(1 << k for k in there), 1 << there[-1]):
            backward = (*grads, *plain[: operator.tensors], *saved, *plain[operator.tensors :], needs)
            registry.opcheck(operator.op_backward, backward, test_utils=utilities)


@pytest.mark.parametrize("op", ["categorical_sample", "vector_quantize_statistics"])
def test_opcheck_of_what_has_no_gradient(op: str) -> None:
    if op == "categorical_sample":
        registry.opcheck(torch.ops.genfuse.categorical_sample.default, (torch.randn(2, 5), torch.rand(2, 3), None, 3))
        rng = torch.tensor([1, 2])
        registry.opcheck(torch.ops.genfuse.categorical_sample.default, (torch.randn(2, 5), None, rng, 2))
    else:
        arguments = (torch.randn(4, 3), torch.tensor([0, 2, 2, 1]), 5)
        registry.opcheck(torch.ops.genfuse.vector_quantize_statistics.default, arguments)


def everything(mean: Tensor, logvar: Tensor, codebook: Tensor, tau: float = 0.7) -> tuple[Tensor, ...]:
    """Every operator in one function: ``[B, D]``, ``[B, D]``, ``[K, D]``."""
    z, kl = ops.gaussian_rsample_kl(mean, logvar, prior_mean=codebook[0], free_bits=0.05)
    alone = ops.gaussian_rsample(z, log_std=logvar, clamp=(-1.0, 1.0))
    kl = kl + ops.gaussian_kl(mean, logvar)
    y = ops.gumbel_softmax(z, tau, hard=True) + ops.relaxed_bernoulli(alone, tau)
    drawn = ops.categorical_sample(z, 3)
    quantized, indices, loss = ops.vector_quantize(y, codebook)
    counts, sums = ops.vector_quantize_statistics(z, indices, codebook.size(0))
    nll = ops.bernoulli_nll(z, y.sigmoid(), unit="bits_per_dim") + ops.gaussian_nll(z, mean, logvar)
    nll = nll + ops.discretized_gaussian_nll(quantized.detach().clamp(-1, 1), z, log_std=logvar)
    return kl + loss + nll, quantized, drawn, indices, counts, sums


def inputs_of(batch: int, features: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shapes = ((batch, features), (batch, features), (5, features))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def outcome(function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    torch.manual_seed(3)
    results = function(*inputs, *rest)
    gradients = torch.autograd.grad(results[0].sum() + results[1].square().sum(), inputs)
    return [*(result.detach() for result in results), *gradients]


def graphs(counter: CompileCounterWithBackend) -> int:
    """How many graphs were compiled; where Dynamo starts anew, it leaves an empty one, too."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


def test_compiles_once_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for sizes in ((3, 6), (5, 6), (17, 6), (9, 11), (6, 6)):
        close(outcome(compiled, inputs_of(*sizes)), outcome(everything, inputs_of(*sizes)))
        assert graphs(counter) == 1
    assert counter.op_count < 200  # the operators, and not what they are made of


def test_compiles_at_most_twice_unasked() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True)
    for batch in (3, 5, 17, 9, 4):
        close(outcome(compiled, inputs_of(batch)), outcome(everything, inputs_of(batch)))
    assert graphs(counter) <= 2


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()

    def function(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = ops.gaussian_rsample_kl(mean, logvar)
        return z, ops.bernoulli_nll(2.0 * z, mean.sigmoid()) + kl

    compiled = torch.compile(function, fullgraph=True)
    mean, logvar, _ = inputs_of(4)
    assert not torch.equal(compiled(mean, logvar)[0], compiled(mean, logvar)[0])  # drawn anew in the graph
    z, loss = compiled(mean, logvar)
    loss.sum().backward()
    with torch.no_grad():
        eps = (z - mean) * torch.exp(-0.5 * logvar)
    again, kl = ops.gaussian_rsample_kl(mean, logvar, eps=eps)
    close(loss, ops.bernoulli_nll(2.0 * again, mean.sigmoid()) + kl)


def test_exports_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, mean: Tensor, logvar: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
            return everything(mean, logvar, codebook)

    batch = torch.export.Dim("batch", min=2)
    shapes = {"mean": {0: batch}, "logvar": {0: batch}, "codebook": None}
    with torch.no_grad():
        program = torch.export.export(Model(), tuple(inputs_of(3)), dynamic_shapes=shapes)
        for size in (3, 8):
            torch.manual_seed(1)
            expected = everything(*inputs_of(size))
            torch.manual_seed(1)
            close(program.module()(*inputs_of(size)), expected)


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_a_fake_tensor_call_computes_nothing(op: str, variant: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = make(op, variant, dtype=torch.bfloat16)
    problem = problem.map(lambda t: t.T.contiguous().T if t.dim() == 2 else t)  # results are contiguous even so
    with FakeTensorMode() as mode:
        options = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        fake = Problem(op, problem.map(mode.from_tensor).inputs, options).call()
    real = problem.call()
    for ours, theirs in zip(*([r] if isinstance(r, Tensor) else r for r in (fake, real)), strict=True):
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("op", [op for op in VARIANTS if op != "categorical_nll"])
def test_a_meta_call_computes_nothing(op: str) -> None:
    problem = make(op, RICH[op])
    meta = problem.map(lambda tensor: tensor.to("meta"))
    for ours, theirs in zip(meta.results(), problem.results(), strict=True):
        assert ours.is_meta
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype


# ---- the machine makes no difference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "variant", "shape"),
    [
        ("gaussian_rsample", "rng", (67, 3001)),
        ("gaussian_rsample", "rng", (200_003,)),
        ("gaussian_rsample_kl", "free bits", (67, 3001)),
        ("gaussian_rsample_kl", "prior, rng", (2, 100_003)),
        ("gaussian_kl", "prior", (30_001, 5)),
        ("gumbel_softmax", "hard, rng", (301, 701)),
        ("gumbel_softmax", "rng", (2, 100_003)),
        ("relaxed_bernoulli", "rng", (67, 3001)),
        ("vector_quantize", "defaults", (4099, 17)),
        ("vector_quantize", "weights", (7, 300, 33)),
        ("bernoulli_nll", "probabilities", (67, 3001)),
        ("bernoulli_nll", "probabilities", (2, 100_003)),
        ("gaussian_nll", "logvar", (67, 3001)),
        ("gaussian_nll", "logvar", (100_003, 2)),
        ("discretized_gaussian_nll", "logvar", (67, 1001)),
        ("discretized_gaussian_nll", "logvar", (2, 30_003)),
        ("rational_quadratic_spline", "8 bins", (67, 301)),
        ("rational_quadratic_spline", "packed, inverse, summed", (3, 5_003)),
        ("rational_quadratic_spline", "one row of parameters", (301, 67)),
        ("linear_spline", "no tails, summed", (3, 5_003)),
        ("quadratic_spline", "packed, summed", (67, 301)),
        ("cubic_spline", "inverse", (67, 301)),
    ],
)
def test_threads_make_no_difference(op: str, variant: str, shape: tuple[int, ...]) -> None:
    problem = make(op, variant, shape=shape, codes=70)
    torch.set_num_threads(1)
    cotangents = problem.cotangents()
    one = problem.run(cotangents)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        equal(problem.run(cotangents), one)


def test_threads_make_no_difference_to_what_has_no_gradient() -> None:
    logits, x = torch.randn(501, 301), torch.randn(20_001, 9)
    indices = torch.randint(0, 40, (20_001,))
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        drawn = ops.categorical_sample(logits, 7, rng=torch.tensor([1, 2]))
        found.append([drawn, *ops.vector_quantize_statistics(x, indices, 40)])
    for more in found[1:]:
        equal(more, found[0])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_equals_the_definition(isa: str) -> None:
    program = """
import torch
from operator_cases import *
torch.set_num_threads(1)
for op, variants in VARIANTS.items():
    for variant in variants:
        check(make(op, variant, shape=(3, 67)))
    for dtype in DTYPES:
        check(make(op, dtype=dtype, shape=(2, 131)))
torch.manual_seed(0)
x = torch.randn(100, 37)
indices = ops.vector_quantize(x, torch.randn(77, 37)).indices
counts, sums = ops.vector_quantize_statistics(x, indices, 77)
print(indices.sum().item(), counts.sum().item(), ops.categorical_sample(x, 50, rng=torch.tensor([1, 2])).sum().item())
print(ops.gumbel_softmax(x, hard=True, rng=torch.tensor([1, 2])).argmax(-1).sum().item())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment, "GENFUSE_ISA": name},
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
        for name in (isa,)
    ]
    assert found[0].returncode == 0, found[0].stderr
    torch.manual_seed(0)
    x = torch.randn(100, 37)
    rng = torch.tensor([1, 2])
    here = [
        int(ops.vector_quantize(x, torch.randn(77, 37)).indices.sum()),
        100.0,
        int(ops.categorical_sample(x, 50, rng=rng).sum()),
        int(ops.gumbel_softmax(x, hard=True, rng=rng).argmax(-1).sum()),
    ]
    assert list(map(float, found[0].stdout.split())) == here


@pytest.mark.parametrize("op", VARIANTS)
def test_deterministic_mode(op: str) -> None:
    problem = make(op, RICH[op])
    cotangents = problem.cotangents()
    torch.use_deterministic_algorithms(True)  # and not only warn, as the fixture has it
    equal(problem.run(cotangents), problem.run(cotangents))


@pytest.mark.parametrize("op", VARIANTS)
def test_modes_make_no_difference(op: str) -> None:
    problem = make(op, RICH[op])
    expected = [result.detach() for result in problem.map(lambda t: t.clone().requires_grad_()).results()]
    equal(problem.results(), expected)
    with torch.no_grad():
        equal(problem.map(lambda t: t.clone().requires_grad_()).results(), expected)
    with torch.inference_mode():
        equal([r.clone() for r in problem.map(torch.clone).results()], expected)


# ---- numbers of other kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("op", [op for op in VARIANTS if not OPERATORS[op].keeps and not OPERATORS[op].lowers])
def test_autocast_computes_in_float32(op: str, dtype: torch.dtype) -> None:
    problem = make(op, RICH[op], dtype=dtype)
    wide = problem.map(Tensor.float)
    expected = wide.results()
    with torch.autocast("cpu", dtype=dtype):
        results = problem.results()
    equal(results, expected)
    assert all(result.dtype == torch.float32 for result in results)
    leaves = problem.map(lambda tensor: tensor.clone().requires_grad_())
    with torch.autocast("cpu", dtype=dtype):
        total = sum((result.sum() for result in leaves.results()), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(leaves.inputs.values()))
    cotangents = [torch.ones_like(result) for result in expected]
    equal(list(gradients), [gradient.to(dtype) for gradient in wide.run(cotangents)[len(expected) :]])
    with torch.autocast("cpu", dtype=dtype):
        assert all(result.dtype == torch.float64 for result in problem.map(Tensor.double).results())
        mixed = problem.map(lambda t: t)
        first = next(iter(mixed.inputs))
        mixed.inputs[first] = mixed.inputs[first].float()  # as a float32 parameter meets a half activation
        equal(mixed.results(), expected)
    operator, arguments = operator_arguments(problem)
    with torch.autocast("cpu", dtype=dtype):
        direct = floating(operator.op(*arguments))
    whole = floating(operator.op(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a
                                   for a in arguments)))  # fmt: skip
    equal(direct, whole)


def spoiled(problem: Problem, name: str, index: int) -> Tensor:
    """Which elements of a result a NaN in element (1, 2) of an input makes NaN."""
    op, options = problem.op, problem.options
    element = torch.zeros(5, 7, dtype=torch.bool)
    if op in SPLINE_OPS:
        element[1, 2] = True
        return element.any(-1) if index == 1 and "reduce_dims" in options else element
    sample = op == "gaussian_rsample" or (op == "gaussian_rsample_kl" and index == 0)
    if not (name.startswith("prior") if sample else name == "eps"):
        element[1, 2] = True
    if op == "gumbel_softmax":
        return element.any(options.get("dim", -1), keepdim=True).expand(5, 7)
    if sample or op == "relaxed_bernoulli":
        return element
    return element.flatten(options.get("batch_dims", 1)).any(-1) if options.get("batch_dims", 1) < 2 else element


@pytest.mark.parametrize(
    ("op", "variant"),
    [case for case in CASES if case[0] != "vector_quantize" and case not in FLOWS + GATES + CONVS + PIXELS],
)
def test_nan_in_gives_nan_out_in_its_own_row_alone(op: str, variant: str) -> None:
    """No clamp, maximum or branch swallows it."""
    clean = make(op, variant)
    cotangents = clean.cotangents()
    expected, count = clean.run(cotangents), len(cotangents)
    others = torch.arange(5) != 1
    for name, tensor in clean.inputs.items():
        if tensor.shape != (5, 7):
            continue
        value = tensor.clone()
        value[1, 2] = torch.nan
        problem = Problem(op, {**clean.inputs, name: value}, clean.options)
        found = problem.run(cotangents)
        for index in range(count):
            mask = spoiled(problem, name, index)
            assert torch.equal(found[index].isnan(), mask), (name, index)
            assert torch.equal(found[index][~mask], expected[index][~mask]), (name, index)
        for ours, theirs in zip(found[count:], expected[count:], strict=True):
            if ours.shape == (5, 7) and problem.options.get("dim") != 0:
                assert torch.equal(ours[others], theirs[others]), name


@pytest.mark.parametrize("op", VARIANTS)
def test_use_backend(op: str) -> None:
    problem = make(op, RICH[op])
    close(problem.results("reference"), problem.results())
    reason = r"\w+ is on cpu; it runs on cuda|the op has no such backend"
    with pytest.raises(RuntimeError, match=f"cannot run on backend 'triton': ({reason})"):
        problem.results("triton")


# ---- transforms of each other ----------------------------------------------------------------------------------------


def scalar_and_place(op: str) -> tuple[Callable[..., Tensor], Tensor]:
    """A function of an operator's first input, and where to take it."""
    problem = make(op, RICH[op], dtype=torch.float64, shape=(2, 3), codes=4)
    first = next(iter(problem.inputs))

    def scalar(x: Tensor, backend: str | None = None) -> Tensor:
        found = Problem(op, {**problem.inputs, first: x}, problem.options).results(backend)
        return sum(((k + 1) * one.sin().sum() for k, one in enumerate(found)), x.new_zeros(()))

    return scalar, problem.inputs[first]


@pytest.mark.parametrize("op", VARIANTS)
def test_gradients_of_examples_are_differentiated_again(op: str) -> None:
    """By autograd, and that again; as penalties of the gradients of examples are."""
    scalar, x = scalar_and_place(op)
    xs = torch.stack([x, x + 0.5, 0.3 * x]).requires_grad_()

    def found(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        gradients = [torch.vmap(torch.func.grad(function))(xs)]
        for _ in range(2):
            gradients += torch.autograd.grad(gradients[-1].sin().sum(), xs, create_graph=True, materialize_grads=True)
        return gradients

    close(found(scalar), found(lambda x: scalar(x, "reference")))
    hessian = torch.autograd.functional.hessian
    close(hessian(scalar, x, vectorize=True), hessian(lambda x: scalar(x, "reference"), x))


def test_a_library_without_the_operator_is_no_silent_reference() -> None:
    with pytest.raises(AttributeError, match="no_such_operator"):
        Operator("no_such_operator", (), 0, 0, 1, lambda: (), lambda: None).register()


@pytest.mark.parametrize("op", ["gaussian_rsample", "gaussian_kl"])
@pytest.mark.parametrize(("clamp", "kind"), [(("a", "b"), "str"), ((None, 1.0), "NoneType")])
def test_what_is_wrong_with_a_clamp(op: str, clamp: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"{op}: clamp must hold numbers, got {kind}"):
        getattr(ops, op)(torch.zeros(2, 3), torch.zeros(2, 3), clamp=clamp)


def test_a_call_of_each_example_copies_no_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda self: copies.append(self) or contiguous(self))
    x, indices = torch.randn(4, 6, 2), torch.arange(12).view(6, 2)[:, 0] % 3
    counts, _ = torch.vmap(lambda x: torch.ops.genfuse.vector_quantize_statistics(x, indices, 3))(x)
    assert torch.equal(counts, torch.full((4, 3), 2.0))
    assert len(copies) == 1
    # Pairs along another dimension than the first are pairs all the same.
    pairs, zero = torch.arange(6).view(2, 3), torch.zeros(2, 5)
    drawn = torch.vmap(lambda rng: torch.ops.genfuse.gumbel_softmax(zero, None, rng, 1.0, False), in_dims=1)(pairs)
    close(drawn, torch.stack([ops.gumbel_softmax(zero, rng=pairs[:, k].contiguous()) for k in range(3)]))
