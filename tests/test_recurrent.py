"""LSTM and GRU: the operators against their definition, the layers against torch's."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from genfuse import backends, nn, ops, reference
from genfuse.ops import recurrent as recurrent_ops
from genfuse.reference import random as reference_random
from recurrent_cases import CASES, Problem, check, make
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor
from torch import library as registry
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for more; that results do not depend on it is a test of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPE_NAMES = ["float32", "float64", "bfloat16", "float16"]


def op_of(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return getattr(ops, name)  # type: ignore[no-any-return]


def reference_of(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return getattr(reference, name)  # type: ignore[no-any-return]


def split(problem: Problem, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients."""
    count = len(problem.results)
    return values[:count], values[count:]


def compare(*problems: Problem) -> None:
    """Results and all gradients of an operator against the reference, to the derived tolerance."""
    op = problems[0].op
    check(problems, op_of(op), reference_of(op))


# ---- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """Random123's kat_vectors for philox4x32-10."""
    words = reference_random.philox4x32(
        tuple(torch.tensor(word) for word in counter),  # type: ignore[arg-type]
        tuple(torch.tensor(word) for word in key),  # type: ignore[arg-type]
    )
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("offset", [0, 1 << 40, -3])
def test_uniform_is_addressed_by_seed_offset_and_element(seed: int, offset: int) -> None:
    """Elements in any order, and through the words by hand with Python's integers."""
    elements = [0, 1, 5, (1 << 32) + 2, (1 << 40) + 3]
    rng = torch.tensor([seed, offset])
    result = reference_random.uniform_elements(rng, torch.tensor(elements), stream=2)
    mask = 0xFFFFFFFF
    for element, u in zip(elements, result.tolist(), strict=True):
        block, off = element // 4, (offset + 2) % 2**64
        counter = [block & mask, block >> 32, off & mask, off >> 32]
        key = [seed & mask, (seed % 2**64) >> 32]
        for _ in range(10):
            high, low = (0xD2511F53 * counter[0]) >> 32, (0xD2511F53 * counter[0]) & mask
            high2, low2 = (0xCD9E8D57 * counter[2]) >> 32, (0xCD9E8D57 * counter[2]) & mask
            counter = [high2 ^ counter[1] ^ key[0], low2, high ^ counter[3] ^ key[1], low]
            key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
        assert u == (counter[element % 4] >> 8) * 2.0**-24


def test_uniform_is_uniform() -> None:
    u = reference_random.uniform(torch.tensor([7, 0]), (100_000,))
    counts = torch.histc(u, 50, 0.0, 1.0)
    chi2 = float(((counts - 2000.0) ** 2 / 2000.0).sum())
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    assert chi2 < 100.0  # 49 degrees of freedom: passed at random with probability 1 - 2e-5


# ---- operators against the definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(("op", "options"), CASES)
def test_operator_equals_its_definition(op: str, options: str, dtype: torch.dtype) -> None:
    compare(make(op, options, dtype=dtype))


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (1, 1, 3, 2), (2, 1, 5, 17), (3, 33, 2, 7), (5, 2, 31, 64), (4, 16, 33, 65), (19, 3, 1, 130)],
)
@pytest.mark.parametrize("options", ["plain", "all plain"])
def test_odd_sizes(op: str, sizes: tuple[int, int, int, int], options: str) -> None:
    seeds = range(8 if max(sizes) < 20 else 1)
    compare(*(make(op, options, sizes=sizes, seed=seed) for seed in seeds))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 3), (2, 3, 5, 17), (5, 2, 31, 64), (4, 16, 33, 65)])
def test_odd_sizes_with_layer_norm(sizes: tuple[int, int, int, int]) -> None:
    seeds = range(8 if max(sizes) < 20 else 1)
    compare(*(make("lstm", "all", sizes=sizes, seed=seed) for seed in seeds))


def test_layer_norm_of_one_unit() -> None:
    """One cell is its own mean, so its norm is 0 exactly and so is its gradient: what does not cancel to the last bit
    comes out divided by the root of eps. (In float64 the reference, too, is that far from the exact result.)
    """
    compare(*(make("lstm", "all", sizes=(1, 1, 1, 1), seed=seed) for seed in range(32)))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_long_sequence(op: str) -> None:
    compare(make(op, "plain", sizes=(150, 3, 8, 24)))


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("options", ["plain", "output dropout"])
def test_empty_batch(op: str, options: str) -> None:
    problem = make(op, options, sizes=(4, 0, 3, 5))
    results, gradients = split(problem, problem.run(op_of(op)))
    assert [list(result.shape) for result in results] == [[4, 0, 5]] + [[0, 5]] * (len(results) - 1)
    for name, gradient in zip(problem.inputs, gradients, strict=True):
        assert gradient.shape == problem.inputs[name].shape
        assert bool((gradient == 0).all()), name


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_no_steps_is_torchs_error(op: str) -> None:
    problem = make(op, "plain", sizes=(0, 3, 4, 5))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        op_of(op)(**problem.inputs)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_strides(op: str) -> None:
    """Transposed, sliced, expanded and flipped views, of inputs and of gradients."""
    problem = make(op, "plain", sizes=(6, 4, 5, 8))
    expected, _ = split(problem, problem.run(op_of(op)))
    x = problem.inputs["x"]
    wide = torch.full((6, 4, 11), float("nan"))
    wide[..., 3:8] = x
    strided = torch.full((6, 4, 10), float("nan"))
    strided[..., ::2] = x
    views = [x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., 3:8], strided[..., ::2]]
    for view in views:
        other = Problem(op, {**problem.inputs, "x": x}, problem.arguments, problem.cotangents)
        inputs = {name: t.detach().clone().requires_grad_() for name, t in other.inputs.items()}
        leaf = view.detach().requires_grad_()
        results = op_of(op)(**{**inputs, "x": leaf})
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(results[0], leaf, problem.cotangents[0], retain_graph=True)
        (again,) = torch.autograd.grad(
            results[0], leaf, problem.cotangents[0].transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True
        )
        torch.testing.assert_close(gradient, again, rtol=0, atol=0)
    weights = {
        name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in problem.inputs.items()
    }
    for ours, theirs in zip(op_of(op)(**weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_expanded_inputs_and_gradients(op: str) -> None:
    problem = make(op, "plain", sizes=(6, 4, 5, 8))
    problem.inputs["x"] = problem.inputs["x"][:, :1].expand(6, 4, 5)
    problem.inputs["h0"] = problem.inputs["h0"][:1].expand(4, 8)
    dense = {name: tensor.contiguous() for name, tensor in problem.inputs.items()}
    for ours, theirs in zip(op_of(op)(**problem.inputs), op_of(op)(**dense), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in dense.items()}
    y = op_of(op)(**leaves)[0]
    ones = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), list(leaves.values())), ones, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_only_some_gradients(op: str) -> None:
    """Any subset of the inputs, and of the results, gives the same gradients as all of them."""
    problem = make(op, "all plain")
    _, gradients = split(problem, problem.run(op_of(op)))
    full = dict(zip(problem.inputs, gradients, strict=True))
    for name in problem.inputs:
        inputs = {key: tensor.detach().clone() for key, tensor in problem.inputs.items()}
        inputs[name].requires_grad_()
        results = op_of(op)(**inputs, **problem.arguments)
        (gradient,) = torch.autograd.grad(results, inputs[name], problem.cotangents)
        torch.testing.assert_close(gradient, full[name], rtol=0, atol=0)
    for index in range(len(problem.results)):
        inputs = {key: tensor.detach().clone().requires_grad_() for key, tensor in problem.inputs.items()}
        results = op_of(op)(**inputs, **problem.arguments)
        one = torch.autograd.grad(results[index], list(inputs.values()), problem.cotangents[index], allow_unused=True)
        zeros = [torch.zeros_like(c) if place != index else c for place, c in enumerate(problem.cotangents)]
        inputs = {key: tensor.detach().clone().requires_grad_() for key, tensor in problem.inputs.items()}
        results = op_of(op)(**inputs, **problem.arguments)
        all_ = torch.autograd.grad(results, list(inputs.values()), zeros)
        for ours, theirs in zip(one, all_, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_no_two_gradients_share_memory(op: str) -> None:
    """The LSTM's two biases have the same gradient. Scaled in place, as in clipping by hand, each is scaled once."""
    problem = make(op, "plain")
    _, gradients = split(problem, problem.run(op_of(op)))
    assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)


@pytest.mark.parametrize(("op", "options"), CASES)
def test_second_derivatives(op: str, options: str) -> None:
    problem = make(op, options, dtype=torch.float64, sizes=(3, 2, 2, 3))
    inputs = [tensor.requires_grad_() for tensor in problem.inputs.values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return op_of(op)(**dict(zip(problem.inputs, tensors, strict=True)), **problem.arguments)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_slow_gradcheck(op: str) -> None:
    """The whole Jacobian once, since the fast check looks at one random direction."""
    problem = make(op, "all plain", dtype=torch.float64, sizes=(2, 2, 2, 2))
    inputs = [tensor.requires_grad_() for tensor in problem.inputs.values()]
    names = list(problem.inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return op_of(op)(**dict(zip(names, tensors, strict=True)), **problem.arguments)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_third_derivative(op: str) -> None:
    problem = make(op, "plain", dtype=torch.float64, sizes=(2, 1, 2, 2))

    def third(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        inputs = {name: tensor.clone().requires_grad_() for name, tensor in problem.inputs.items()}
        value = function(**inputs)[0].square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, inputs["weight_hh"], create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    torch.testing.assert_close(third(op_of(op)), third(reference_of(op)))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_direct_callers_get_gradients(op: str) -> None:
    """torch.ops.genfuse by itself, also where it was not asked to save anything for backward."""
    problem = make(op, "all plain")
    layer = recurrent_ops._LSTM if op == "lstm" else recurrent_ops._GRU
    if layer.op is None:
        pytest.skip("the native library is absent")
    defaults = {name: p.default for name, p in inspect.signature(op_of(op)).parameters.items()}
    _, expected = split(problem, problem.run(op_of(op)))
    for save in (True, False):
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in problem.inputs.items()}
        values = {**defaults, **inputs, **problem.arguments}
        results = layer.op(*(values[name] for name in layer.arguments), save)
        assert all(not reserve.requires_grad for reserve in results[1 + layer.states :])
        gradients = torch.autograd.grad(results[: 1 + layer.states], list(inputs.values()), problem.cotangents)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_nan_in_gives_nan_out(op: str) -> None:
    problem = make(op, "plain", sizes=(5, 4, 3, 6))
    problem.inputs["x"][2, 1, 0] = float("nan")
    for ours, theirs in zip(problem.run(op_of(op)), problem.run(reference_of(op)), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_saturated_gates(op: str, scale: float) -> None:
    """Gates far beyond what exp can hold: 0 and 1, and no NaN."""
    problem = make(op, "plain")
    problem.inputs["x"] *= scale
    results, gradients = split(problem, problem.run(op_of(op)))
    exact = problem.to(torch.float64).run(reference_of(op))[: len(results)]
    eager = eager_runs(lambda nudge: problem.map(nudge).run(reference_of(op)))
    for ours, theirs, truth in zip(results, eager, exact, strict=False):
        assert_as_accurate(ours, theirs, truth)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_layer_norm_of_a_constant_row() -> None:
    """No variance: eps alone is under the root."""
    problem = make("lstm", "layer norm")
    problem.inputs["x"].zero_()
    problem.inputs["h0"].zero_()
    compare(problem)


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_certain_probabilities(op: str, p: float) -> None:
    """p = 0 changes nothing; p = 1 drops all, without 0 / 0."""
    names = ["zoneout_h", "weight_drop", "input_dropout", "output_dropout", *(["zoneout_c"] if op == "lstm" else [])]
    rng = torch.tensor([3, 4])
    for name in names:
        problem = make(op, "plain")
        problem.arguments = {name: p, "training": True, "rng": rng}
        compare(problem)
    if p == 1.0:
        problem.arguments = {"output_dropout": 1.0, "training": True, "rng": rng}
        assert bool((problem.run(op_of(op))[0] == 0).all())


# ---- random masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_the_generator_decides_the_masks(op: str) -> None:
    problem = make(op, {"zoneout_h": 0.5, "weight_drop": 0.5, "training": True}, sizes=(8, 4, 4, 16))
    del problem.arguments["rng"]

    def run(**arguments: Any) -> Tensor:
        return op_of(op)(**problem.inputs, **problem.arguments, **arguments)[0]

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)
    mine = [run(generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*mine)
    assert torch.equal(run(rng=torch.tensor([1, 2])), run(rng=torch.tensor([1, 2])))
    assert not torch.equal(run(rng=torch.tensor([1, 2])), run(rng=torch.tensor([1, 12])))


def test_eval_and_certainty_draw_nothing() -> None:
    problem = make("lstm", "masks in eval")
    before = torch.get_rng_state()
    ops.lstm(**problem.inputs, **problem.arguments)
    ops.lstm(**problem.inputs, training=True)
    assert torch.equal(before, torch.get_rng_state())


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "options"), [("lstm", "all plain"), ("lstm", "all"), ("gru", "all plain")])
@pytest.mark.parametrize("sizes", [(12, 9, 33, 70), (3, 1, 200, 300), (2, 65, 5, 17)])
def test_the_same_bits_whatever_the_threads(
    op: str, options: str, sizes: tuple[int, int, int, int], threads: Callable[[int], None]
) -> None:
    problem = make(op, options, sizes=sizes)
    runs = []
    for count in (1, 2, 3, 7, 2):
        threads(count)
        runs.append(problem.run(op_of(op)))
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_calls_from_several_threads(op: str) -> None:
    problem = make(op, "all plain", sizes=(9, 5, 8, 20))
    expected = problem.run(op_of(op))
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            results = problem.run(op_of(op))
            if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
                failures.append("differs")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# ---- errors ----------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("lstm", {"x": [1.0]}, TypeError, r"x must be a Tensor \[T, B, I\], got list"),
    ("lstm", {"x": torch.zeros(5, 4)}, RuntimeError, r"x must have 3 dimensions, \[T, B, I\]; got 2"),
    ("lstm", {"x": torch.zeros(7, 5, 3)}, RuntimeError, r"weight_ih must be \[4H, I\] = \[24, 3\]; got \[24, 4\]"),
    ("lstm", {"x": torch.zeros(7, 2, 4)}, RuntimeError, r"x must be \[T, B, I\] = \[\*, 5, \*\]; got \[7, 2, 4\]"),
    ("lstm", {"x": torch.zeros(7, 5, 4, dtype=torch.int64)}, ValueError, "x must be of a floating dtype"),
    ("lstm", {"x": torch.zeros(7, 5, 4, dtype=torch.float64)}, RuntimeError, "h0 must be torch.float64"),
    ("lstm", {"h0": torch.zeros(5, 7)}, RuntimeError, r"h0 must be \[B, Hy\]"),
    ("lstm", {"h0": None}, TypeError, "h0 must be a Tensor"),
    ("lstm", {"c0": torch.zeros(4, 6)}, RuntimeError, r"c0 must be \[B, H\] = \[5, 6\]; got \[4, 6\]"),
    ("lstm", {"weight_ih": torch.zeros(23, 4)}, RuntimeError, "weight_ih must be"),
    ("lstm", {"weight_hh": torch.zeros(24, 5)}, RuntimeError, r"weight_hh must be \[4H, Hy\]"),
    ("lstm", {"bias_ih": torch.zeros(23)}, RuntimeError, r"bias_ih must be \[4H\] = \[24\]; got \[23\]"),
    ("lstm", {"bias_hh": torch.zeros(24, dtype=torch.float64)}, RuntimeError, "bias_hh must be torch.float32"),
    ("lstm", {"bias_hh": torch.zeros(24, device="meta")}, RuntimeError, "bias_hh must be on cpu"),
    ("lstm", {"weight_hr": torch.zeros(3, 6)}, RuntimeError, "h0 must be"),
    (
        "lstm",
        {"ln_ih_weight": torch.zeros(24)},
        ValueError,
        r"all four .* missing: ln_hh_weight, ln_c_weight, ln_c_bias",
    ),
    ("lstm", {"zoneout_h": 1.5}, ValueError, r"zoneout_h must be a probability in \[0, 1\], got 1.5"),
    ("lstm", {"zoneout_c": -0.1}, ValueError, "zoneout_c must be a probability"),
    ("lstm", {"weight_drop": float("nan")}, ValueError, "weight_drop must be a probability"),
    ("lstm", {"input_dropout": "much"}, TypeError, "input_dropout must be a float, got str"),
    ("lstm", {"eps": -1e-5}, ValueError, "eps must be finite and not negative, got -1e-05"),
    ("lstm", {"eps": "small"}, TypeError, "eps must be a float, got str"),
    ("lstm", {"generator": 5, "training": True, "zoneout_h": 0.5}, TypeError, "generator must be a torch.Generator"),
    ("lstm", {"resets": torch.zeros(7, 5)}, ValueError, "resets must be torch.bool"),
    ("lstm", {"resets": torch.zeros(7, 4, dtype=torch.bool)}, RuntimeError, r"resets must be \[T, B\] = \[7, 5\]"),
    ("lstm", {"resets": [True]}, TypeError, "resets must be a Tensor"),
    ("lstm", {"rng": torch.zeros(2)}, ValueError, "rng must be torch.int64"),
    ("lstm", {"rng": torch.zeros(3, dtype=torch.int64)}, RuntimeError, r"rng must be \[2\]"),
    ("lstm", {"batch_sizes": torch.tensor([5, 3])}, RuntimeError, r"x must have 2 dimensions, \[N, I\]"),
    ("gru", {"x": torch.zeros(5, 4)}, RuntimeError, "x must have 3 dimensions"),
    ("gru", {"h0": torch.zeros(5, 7)}, RuntimeError, r"h0 must be \[B, H\] = \[\*, 6\]"),
    ("gru", {"weight_ih": torch.zeros(24, 4)}, RuntimeError, r"weight_ih must be \[3H, I\] = \[18, 4\]"),
    ("gru", {"weight_hh": torch.zeros(24, 6)}, RuntimeError, r"weight_hh must be \[3H, H\]"),
    ("gru", {"bias_ih": torch.zeros(24)}, RuntimeError, "bias_ih must be"),
    ("gru", {"zoneout_h": 2.0}, ValueError, "zoneout_h must be a probability"),
    ("gru", {"generator": 5, "training": True, "zoneout_h": 0.5}, TypeError, "generator must be a torch.Generator"),
    ("gru", {"resets": torch.zeros(7, 5)}, ValueError, "resets must be torch.bool"),
]


@pytest.mark.parametrize(("op", "change", "kind", "message"), BAD)
def test_error_messages(op: str, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    problem = make(op, "plain")
    with pytest.raises(kind, match=message):
        op_of(op)(**{**problem.inputs, **change})


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_what_no_kernel_takes(op: str) -> None:
    """A dtype of fewer bits, and a layer of no units: said in Python, and not by the library in terms of its files."""
    inputs = make(op, "plain").inputs
    with pytest.raises(ValueError, match=f"^{op}: x must be of a floating dtype .* got torch.float8_e4m3fn"):
        op_of(op)(**{name: tensor.to(torch.float8_e4m3fn) for name, tensor in inputs.items()})
    shapes = {"weight_ih": (0, 4), "weight_hh": (0, 0), "bias_ih": (0,), "bias_hh": (0,), "h0": (5, 0), "c0": (5, 0)}
    empty = {name: torch.zeros(shapes[name]) if name in shapes else tensor for name, tensor in inputs.items()}
    with pytest.raises(RuntimeError, match=rf"^{op}: weight_hh must have at least one unit, got \[0, 0\]"):
        op_of(op)(**empty)


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize(
    ("batch_sizes", "kind", "message"),
    [
        (torch.tensor([5, 4, 6]), ValueError, "must not increase"),
        (torch.tensor([5, 4, 0]), ValueError, "must be positive"),
        (torch.tensor([5, 4, -1]), ValueError, "must be positive"),
        (torch.tensor([5, 4, 2]), RuntimeError, "must sum to the rows of x"),
        (torch.tensor([4, 4, 4]), RuntimeError, "must begin with the rows of h0"),
        (torch.tensor([5, 4, 3], dtype=torch.int32), ValueError, "must be torch.int64 on the CPU"),
        (torch.zeros(0, dtype=torch.int64), RuntimeError, "T > 0"),
        (torch.ones(1, 1, dtype=torch.int64), RuntimeError, r"must be \[T\]"),
        ([5, 4, 3], TypeError, "must be a Tensor"),
    ],
)
def test_bad_batch_sizes(op: str, batch_sizes: Any, kind: type[Exception], message: str) -> None:
    problem = make(op, "packed", lengths=[3, 3, 3, 2, 1])
    with pytest.raises(kind, match=message):
        op_of(op)(**{**problem.inputs, "batch_sizes": batch_sizes})


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_resets_are_not_for_packed_sequences(op: str) -> None:
    problem = make(op, "packed")
    with pytest.raises(ValueError, match="resets is for the dense layout"):
        op_of(op)(**problem.inputs, **problem.arguments, resets=torch.zeros(7, 5, dtype=torch.bool))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_the_operator_guards_itself(op: str) -> None:
    """Direct callers with tensors that do not fit get an exception, and nothing is read beyond a buffer."""
    layer = recurrent_ops._LSTM if op == "lstm" else recurrent_ops._GRU
    if not layer.on_cpu:
        pytest.skip("no CPU kernel")
    defaults = {name: p.default for name, p in inspect.signature(op_of(op)).parameters.items()}
    for other, change, _, _ in BAD:
        if other != op or not all(isinstance(value, Tensor) for value in change.values()):
            continue
        if next(iter(change)) == "rng" or any(value.is_meta for value in change.values()):
            continue
        values = {**defaults, **make(op, "plain").inputs, **change}
        with pytest.raises(RuntimeError):
            layer.op(*(values[name] for name in layer.arguments), False)
    packed = make(op, "packed", lengths=[3, 3, 3, 2, 1])
    for sizes in ([5, 4, 6], [5, 4, 0], [5, 4, -1], [5, 4, 2], [4, 4, 4], [2**62, 2**62]):
        values = {**defaults, **packed.inputs, "batch_sizes": torch.tensor(sizes)}
        with pytest.raises(RuntimeError):
            layer.op(*(values[name] for name in layer.arguments), False)


# ---- dispatcher ------------------------------------------------------------------------------------------------------


def operator_arguments(problem: Problem, layer: Any) -> list[Any]:
    defaults = {name: p.default for name, p in inspect.signature(op_of(problem.op)).parameters.items()}
    values = {**defaults, **problem.inputs, **problem.arguments}
    return [values[name] for name in layer.arguments]


@pytest.mark.parametrize(
    ("op", "options"), [("lstm", "plain"), ("lstm", "all"), ("lstm", "all packed reverse"), ("gru", "all plain")]
)
def test_opcheck(op: str, options: str) -> None:
    layer = recurrent_ops._LSTM if op == "lstm" else recurrent_ops._GRU
    if not layer.on_cpu:
        pytest.skip("no CPU kernel")
    problem = make(op, options, sizes=(3, 2, 4, 5))
    arguments = operator_arguments(problem, layer)
    registry.opcheck(layer.op, (*arguments, False))
    outputs = layer.op(*arguments, True)
    backward = (*problem.cotangents, *arguments[: layer.tensors], outputs[0], *outputs[1 + layer.states :])
    for tensor in problem.inputs.values():
        tensor.requires_grad_()
    registry.opcheck(layer.op, (*arguments, True))
    options_ = arguments[layer.tensors :]
    for needs in ((True, True), (False, True), (True, False)):
        registry.opcheck(
            layer.op_backward, (*backward, *options_, *needs), test_utils=("test_schema", "test_faketensor")
        )


def module(kind: str, **arguments: Any) -> torch.nn.Module:
    return getattr(nn, kind)(4, 6, **arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.1}),
        ("GRU", {"num_layers": 2}),
        ("LayerNormLSTM", {"zoneout_h": 0.1, "zoneout_c": 0.1, "weight_drop": 0.2, "output_dropout": 0.1}),
        ("LSTM", {"proj_size": 3}),
    ],
)
def test_compiles_once_for_all_batch_sizes_and_lengths(kind: str, arguments: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = module(kind, **arguments)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sizes in ((3, 5), (4, 7), (9, 2), (6, 6)):
        x = torch.randn(*sizes, 4, requires_grad=True)
        compiled(x)[0].sum().backward()
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:-1]
    assert counter.op_count < 80  # nothing was unrolled over time
    layer.eval()
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def test_compiled_gradients_equal_eager_ones() -> None:
    torch._dynamo.reset()
    layer = nn.LayerNormLSTM(4, 6, bidirectional=True, zoneout_h=0.2)
    layer.eval()
    x = torch.randn(5, 3, 4)
    gradients = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y, (h_n, c_n) = function(x)
        (y.sum() + h_n.square().sum() + c_n.sum()).backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    layer = nn.LSTM(4, 6, zoneout_h=0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 3, 4)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])  # masks are drawn anew in the graph
    layer.eval()
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@pytest.mark.parametrize("sort", [False, True])
def test_compiles_with_packed_sequences(sort: bool) -> None:
    torch._dynamo.reset()
    layer = nn.GRU(4, 6, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((2, 5), (3, 1, 4)):
        pieces = [torch.randn(length, 4) for length in sorted(lengths, reverse=True)]
        packed = pack_sequence(pieces if sort else pieces[::-1], enforce_sorted=sort)
        torch.testing.assert_close(compiled(packed)[0].data, layer(packed)[0].data)


def test_compiled_functions_heed_use_backend() -> None:
    torch._dynamo.reset()
    layer = nn.LSTM(4, 6)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 3, 4)
    with genfuse.use_backend("reference"):
        slow = compiled(x)[0]
        unrolled = counter.op_count
    fast = compiled(x)[0]
    torch.testing.assert_close(slow, fast)
    if recurrent_ops._LSTM.on_cpu:
        assert counter.op_count - unrolled < unrolled


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LayerNormLSTM"])
def test_exports_with_dynamic_sizes(kind: str) -> None:
    layer = module(kind, batch_first=True, bidirectional=True).eval()
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (torch.randn(3, 5, 4),), dynamic_shapes={"input": {0: batch, 1: steps}})
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    x = torch.randn(7, 11, 4)
    torch.testing.assert_close(loaded(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("op", "options"), [("lstm", "plain"), ("lstm", "all plain"), ("lstm", "packed"), ("gru", "resets")]
)
@pytest.mark.parametrize("batched", [("x",), ("x", "h0"), ("weight_hh",), ("x", "bias_ih")])
def test_vmap(op: str, options: str, batched: tuple[str, ...]) -> None:
    problem = make(op, options)
    inputs = {**problem.inputs, **{name: torch.randn(3, *problem.inputs[name].shape) for name in batched}}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return op_of(op)(**{**problem.inputs, **dict(zip(batched, tensors, strict=True))}, **problem.arguments)

    moved = [inputs[name].movedim(0, 1) for name in batched]
    result = torch.func.vmap(function, in_dims=1)(*moved)
    loop = [function(*(inputs[name][sample] for name in batched)) for sample in range(3)]
    for ours, theirs in zip(result, zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_function_transforms(op: str) -> None:
    """torch.func: gradients, per-sample gradients, Hessians, Jacobian-vector products."""
    problem = make(op, "plain", dtype=torch.float64, sizes=(3, 1, 2, 2))
    inputs = problem.inputs

    def loss(weight: Tensor, x: Tensor, function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        return function(**{**inputs, "weight_hh": weight, "x": x})[0].square().sum()

    weight, x = inputs["weight_hh"], inputs["x"]
    close = torch.testing.assert_close
    gradient = torch.func.grad(loss)
    close(gradient(weight, x, op_of(op)), gradient(weight, x, reference_of(op)))
    xs = torch.randn(4, *x.shape, dtype=torch.float64)
    per_sample = torch.func.vmap(gradient, in_dims=(None, 0, None))
    close(per_sample(weight, xs, op_of(op)), torch.stack([gradient(weight, x, reference_of(op)) for x in xs]))
    for hessian in (torch.func.hessian(loss), torch.func.jacrev(torch.func.jacrev(loss))):
        close(hessian(weight, x, op_of(op)), torch.func.hessian(loss)(weight, x, reference_of(op)))
    tangent = torch.randn_like(x)

    def of_x(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(**{**inputs, "x": x})[0]

    _, expected = torch.func.jvp(of_x(reference_of(op)), (x,), (tangent,))
    close(torch.func.jvp(of_x(op_of(op)), (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = of_x(op_of(op))(forward_ad.make_dual(x, tangent))
        close(forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("op", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(op: str, dtype: torch.dtype) -> None:
    problem = make(op, "plain")
    expected, expected_gradients = split(problem, problem.to(dtype).run(op_of(op)))
    with torch.autocast("cpu", dtype=dtype):
        results, gradients = split(problem, problem.run(op_of(op)))
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
    wide = problem.to(torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert op_of(op)(**wide.inputs)[0].dtype == torch.float64
    layer = recurrent_ops._LSTM if op == "lstm" else recurrent_ops._GRU
    if layer.on_cpu:
        with torch.autocast("cpu", dtype=dtype):
            direct = layer.op(*operator_arguments(problem, layer), False)
        assert direct[0].dtype == dtype
        assert torch.equal(direct[0], expected[0])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_fake_tensor_call_computes_nothing(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = make(name, "all plain")
    expected = op_of(name)(**problem.inputs, **problem.arguments)
    with FakeTensorMode() as mode:
        inputs = {key: mode.from_tensor(tensor) for key, tensor in problem.inputs.items()}
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for key, value in problem.arguments.items()
        }
        results = op_of(name)(**inputs, **arguments)
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.stride() == theirs.stride()
        assert ours.dtype == theirs.dtype


# ---- vendor's kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "no bias", "reverse", "projection", "packed"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_the_call_of_torchs_lstm(options: str) -> None:
    """What the cudnn backend calls runs on the CPU too, where it is torch's own LSTM."""
    problem = make("lstm", options, dtype=torch.float64)
    inputs, arguments = problem.inputs, problem.arguments
    names = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    result = recurrent_ops._vendor_lstm(
        *(inputs.get(name) for name in names),  # type: ignore[arg-type]
        arguments.get("batch_sizes"),
        arguments.get("reverse", False),
    )
    for ours, theirs in zip(result, reference.lstm(**inputs, **arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", ["plain", "no bias", "reverse", "packed"])
def test_the_call_of_torchs_gru(options: str) -> None:
    problem = make("gru", options, dtype=torch.float64)
    inputs, arguments = problem.inputs, problem.arguments
    names = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    result = recurrent_ops._vendor_gru(
        *(inputs.get(name) for name in names),  # type: ignore[arg-type]
        arguments.get("batch_sizes"),
        arguments.get("reverse", False),
    )
    for ours, theirs in zip(result, reference.gru(**inputs, **arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_use_backend(op: str) -> None:
    problem = make(op, "plain")
    with genfuse.use_backend("reference"):
        assert backends.forced() == "reference"
        assert genfuse.explain(op, **problem.inputs).backend == "reference"
        slow = op_of(op)(**problem.inputs)
        with genfuse.use_backend("cudnn"):
            assert backends.forced() == "cudnn"
            with pytest.raises(RuntimeError, match=r"cannot run on backend 'cudnn': x is on cpu; it runs on cuda"):
                op_of(op)(**problem.inputs)
        assert backends.forced() == "reference"
    assert backends.forced() is None
    for ours, theirs in zip(slow, reference_of(op)(**problem.inputs), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"must be one of native, cudnn.*got 'fast'"), genfuse.use_backend("fast"):
        pass


def test_use_backend_is_a_threads_own() -> None:
    seen: list[str | None] = []
    with genfuse.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_explain() -> None:
    problem = make("lstm", "plain")
    explanation = genfuse.explain(ops.lstm, **problem.inputs)
    text = str(explanation)
    assert text.startswith("genfuse.ops.lstm (cpu, float32)")
    assert "cudnn" in text
    assert "x is on cpu; it runs on cuda" in text
    if recurrent_ops._LSTM.on_cpu:
        assert explanation.backend == "native"
    with pytest.raises(TypeError, match="op must be one of"):
        genfuse.explain(torch.add, 1, 2)
    with pytest.raises(TypeError, match="missing a required argument"):
        genfuse.explain(ops.lstm, problem.inputs["x"])


# ---- layers ----------------------------------------------------------------------------------------------------------

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 3, "bias": False}),
    ("LSTM", {"bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    ("LSTM", {"dtype": torch.float64}),
    ("GRU", {}),
    ("GRU", {"num_layers": 3, "bias": False}),
    ("GRU", {"bidirectional": True, "batch_first": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
]


def pair(kind: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Torch's layer and ours, with the same parameters."""
    theirs, ours = getattr(torch.nn, kind)(4, 6, **arguments), getattr(nn, kind)(4, 6, **arguments)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(output: Any) -> list[Tensor]:
    """All tensors of a layer's result."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, PackedSequence):
        return [output.data]
    return [tensor for part in output for tensor in flat(part)]


def inputs_for(arguments: dict[str, Any]) -> dict[str, Any]:
    dtype = arguments.get("dtype", torch.float32)
    x = torch.randn(5, 3, 4, dtype=dtype)
    pieces = [torch.randn(length, 4, dtype=dtype) for length in (2, 5, 1, 4)]
    ordered = sorted(pieces, key=len, reverse=True)
    return {
        "batched": x,
        "unbatched": x[0],
        "packed": pack_sequence(ordered),
        "packed, unsorted": pack_sequence(pieces, enforce_sorted=False),
    }


@pytest.mark.parametrize("given", [False, True], ids=["zero state", "given state"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "packed", "packed, unsorted"])
@pytest.mark.parametrize(("kind", "arguments"), LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_layer_equals_torchs(kind: str, arguments: dict[str, Any], form: str, given: bool) -> None:
    theirs, ours = pair(kind, arguments)
    x = inputs_for(arguments)[form]
    data = x.data if isinstance(x, PackedSequence) else x
    data.requires_grad_()
    hx: Any = None
    if given:
        count = arguments.get("num_layers", 1) * (2 if arguments.get("bidirectional") else 1)
        if isinstance(x, PackedSequence):
            batch = [4]
        else:
            batch = [] if form == "unbatched" else [3 if not arguments.get("batch_first") else 5]
        sizes = [arguments.get("proj_size") or 6, 6][: 2 if kind == "LSTM" else 1]
        states = [torch.randn(count, *batch, size, dtype=data.dtype, requires_grad=True) for size in sizes]
        hx = tuple(states) if kind == "LSTM" else states[0]
    exact_layer = getattr(torch.nn, kind)(4, 6, **{**arguments, "dtype": torch.float64})
    exact_layer.load_state_dict(theirs.state_dict())

    def through(layer: Any, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """A layer's results and all gradients, a function applied to its inputs and to the parameters."""
        parameters = {n: function(p.detach()).detach().requires_grad_() for n, p in theirs.named_parameters()}
        features = function(data.detach()).detach().requires_grad_()
        states = [function(state.detach()).detach().requires_grad_() for state in flat(hx)] if given else []
        values: list[Any] = [PackedSequence(features, *x[1:]) if isinstance(x, PackedSequence) else features]
        if given:
            values.append(tuple(states) if kind == "LSTM" else states[0])
        results = flat(torch.func.functional_call(layer, parameters, tuple(values)))
        cotangents = [function(torch.linspace(-1, 1, r.numel(), dtype=data.dtype)).reshape(r.shape) for r in results]
        leaves = [features, *parameters.values(), *states]
        return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, cotangents))

    actual = through(ours, lambda tensor: tensor.clone())
    exact = through(exact_layer, lambda tensor: tensor.double().clone())
    eager = eager_runs(lambda nudge: through(theirs, nudge))
    assert len(actual) == len(exact)
    count = 3 if kind == "LSTM" else 2
    for index, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_as_accurate(a, b, c, f"value {index}", gradient=index >= count)


@pytest.mark.parametrize(("kind", "arguments"), LAYERS)
def test_state_dict_and_repr(kind: str, arguments: dict[str, Any]) -> None:
    theirs, ours = pair(kind, arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RNNBase)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert clone.state_dict().keys() == ours.state_dict().keys()
        x = inputs_for(arguments)["batched"]
        for a, b in zip(flat(clone(x)), flat(ours(x)), strict=True):
            assert torch.equal(a, b)


def test_repr_says_what_torch_does_not_have() -> None:
    assert repr(nn.LSTM(4, 6, forget_bias=1.0, zoneout_h=0.1)) == "LSTM(4, 6, zoneout_h=0.1, forget_bias=1.0)"
    assert repr(nn.LayerNormLSTM(4, 6, eps=1e-3, num_layers=2)) == "LayerNormLSTM(4, 6, num_layers=2, eps=0.001)"
    assert repr(nn.LayerNormLSTM(4, 6)) == "LayerNormLSTM(4, 6)"


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_initialisation_is_torchs(kind: str) -> None:
    torch.manual_seed(3)
    theirs = getattr(torch.nn, kind)(4, 6)
    torch.manual_seed(3)
    ours = getattr(nn, kind)(4, 6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("arguments", "exception"),
    [
        ({"dropout": 1.5, "num_layers": 2}, ValueError),
        ({"num_layers": 0}, ValueError),
        ({"bias": 1}, TypeError),
        ({"batch_first": "yes"}, TypeError),
        ({"zoneout_h": 1.5}, ValueError),
        ({"weight_drop": "much"}, TypeError),
        ({"surprise": 1}, TypeError),
    ],
)
def test_constructor_errors(kind: str, arguments: dict[str, Any], exception: type[Exception]) -> None:
    with pytest.raises(exception):
        getattr(nn, kind)(4, 6, **arguments)


def test_constructor_errors_of_one_kind() -> None:
    with pytest.raises(ValueError, match="proj_size"):
        nn.LSTM(4, 6, proj_size=6)
    with pytest.raises(ValueError, match="only supported for LSTM"):
        nn.GRU(4, 6, proj_size=3)
    with pytest.raises(ValueError, match="forget_bias needs bias=True"):
        nn.LSTM(4, 6, bias=False, forget_bias=1.0)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        nn.LSTM(4, 6, dropout=0.5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("shape", "state", "dtype"),
    [
        ((5, 3, 3), None, torch.float32),
        ((5,), None, torch.float32),
        ((2, 5, 3, 4), None, torch.float32),
        ((5, 3, 4), (1, 2, 6), torch.float32),
        ((5, 3, 4), (2, 3, 6), torch.float32),
        ((5, 3, 4), (3, 6), torch.float32),
        ((5, 4), (1, 3, 6), torch.float32),
        ((5, 3, 4), None, torch.float64),
        ((0, 3, 4), None, torch.float32),
    ],
)
def test_forward_errors_are_torchs(
    kind: str, shape: tuple[int, ...], state: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """The same kind of exception as torch's layer raises for the same mistake."""
    theirs, ours = pair(kind, {})
    hx: Any = None
    if state is not None:
        hx = (torch.zeros(state), torch.zeros(state)) if kind == "LSTM" else torch.zeros(state)
    raised = []
    for layer in (theirs, ours):
        with pytest.raises((RuntimeError, ValueError)) as info:
            layer(torch.zeros(shape, dtype=dtype), hx)
        raised.append(info.value)
    assert type(raised[0]) is type(raised[1])
    assert (
        str(raised[0]).split("(")[0].strip()[:20]
        == str(raised[1]).split("(")[0].removeprefix("lstm: ").removeprefix("gru: ").strip()[:20]
    )


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_cells_equal_torchs(kind: str, bias: bool, batched: bool, given: bool) -> None:
    theirs, ours = pair(kind, {"bias": bias})
    assert repr(ours) == repr(theirs)
    x = torch.randn(*((3,) if batched else ()), 4)
    h, c = (torch.randn(*((3,) if batched else ()), 6) for _ in range(2))
    hx: Any = None if not given else (h, c) if kind == "LSTMCell" else h

    def through(layer: Any, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = {n: function(p.detach()) for n, p in theirs.named_parameters()}
        state = None if hx is None else tuple(function(s) for s in hx) if kind == "LSTMCell" else function(hx)
        return flat(torch.func.functional_call(layer, parameters, (function(x), state)))

    exact_layer = copy.deepcopy(theirs).double()
    eager = eager_runs(lambda nudge: through(theirs, nudge))
    exact = through(exact_layer, lambda tensor: tensor.double())
    for a, b, c in zip(through(ours, lambda tensor: tensor), eager, exact, strict=True):
        assert_as_accurate(a, b, c)
    with pytest.raises(ValueError, match="Expected input to be 1D or 2D, got 3D instead"):
        ours(torch.zeros(1, 1, 4))
    with pytest.raises(RuntimeError):
        ours(torch.zeros(3, 5))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize(
    ("shape", "state"),
    [((3, 5), None), ((5,), None), ((3, 4), (2, 6)), ((3, 4), (1, 6)), ((3, 4), (3, 5)), ((4,), (5,))],
)
def test_a_cells_errors_are_torchs(kind: str, shape: tuple[int, ...], state: tuple[int, ...] | None) -> None:
    """In the cell's own words: not those of the operator, whose arguments the user has never seen."""
    theirs, ours = pair(kind, {})
    hx: Any = None
    if state is not None:
        hx = (torch.zeros(state), torch.zeros(state)) if kind == "LSTMCell" else torch.zeros(state)
    raised = []
    for cell in (theirs, ours):
        with pytest.raises(RuntimeError) as info:
            cell(torch.zeros(shape), hx)
        raised.append(str(info.value))
    assert raised[0] == raised[1]


STATE = torch.zeros(3, 6)
WIDE = STATE.double()


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize(
    ("kind", "hx", "error", "message"),
    [
        ("LSTM", (STATE, STATE, STATE), RuntimeError, r"hx must be a pair \(h_0, c_0\), got 3 elements"),
        ("LSTM", (STATE,), RuntimeError, r"hx must be a pair \(h_0, c_0\), got 1 elements"),
        ("LSTM", STATE, TypeError, r"hx must be a pair \(h_0, c_0\) of Tensors, got Tensor"),
        ("LSTM", (STATE, None), TypeError, r"hx\[1\] must be a Tensor, got NoneType"),
        ("LSTM", (WIDE, STATE), RuntimeError, r"hidden.*0.* torch.float32, .* got torch.float64"),
        ("LSTM", (STATE, WIDE), RuntimeError, r"hidden.*1.* torch.float32, .* got torch.float64"),
        ("GRU", (STATE,), TypeError, "hx must be a Tensor, got tuple"),
        ("GRU", WIDE, RuntimeError, r"hidden.* torch.float32, .* got torch.float64"),
    ],
)
def test_states_of_a_wrong_kind(layer: bool, kind: str, hx: Any, error: type[Exception], message: str) -> None:
    """torch's layers raise RuntimeError, too, for a wrong number or dtype of states."""
    if layer:
        hx = tuple(s if s is None else s[None] for s in hx) if isinstance(hx, tuple) else hx[None]
    theirs, ours = pair(kind if layer else f"{kind}Cell", {})
    x = torch.zeros(1, 3, 4) if layer else torch.zeros(3, 4)
    with pytest.raises(error, match=message):
        ours(x, hx)
    if error is RuntimeError and layer:  # torch's LSTMCell takes a wider cell state
        with pytest.raises((RuntimeError, IndexError)):  # and its layer indexes a tuple of one
            theirs(x, hx)


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
def test_a_wrong_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        nn.LayerNormLSTM(4, 6, eps=eps)
    with pytest.raises(TypeError, match="eps must be a number, got str"):
        nn.LayerNormLSTM(4, 6, eps="small")


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize(("shape", "state"), [((3, 4), (6,)), ((4,), (1, 6))])
def test_a_cell_and_its_state_are_both_batched_or_neither(
    kind: str, shape: tuple[int, ...], state: tuple[int, ...]
) -> None:
    hx: Any = (torch.zeros(state), torch.zeros(state)) if kind == "LSTMCell" else torch.zeros(state)
    with pytest.raises(RuntimeError, match=f"hidden0 must be {len(shape)}D, as the input is, got {len(state)}D"):
        getattr(nn, kind)(4, 6)(torch.zeros(shape), hx)


def test_a_cell_walks_like_a_layer() -> None:
    layer, cell = nn.LSTM(4, 6), nn.LSTMCell(4, 6)
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
    x = torch.randn(5, 3, 4)
    y, _ = layer(x)
    state = None
    for t in range(5):
        state = cell(x[t], state)
        torch.testing.assert_close(state[0], y[t])


def test_weights_wherever_they_are() -> None:
    """functional_call, parametrisations and plain assignment."""
    layer = nn.LSTM(4, 6)
    x = torch.randn(5, 3, 4)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in layer.named_parameters()}
    assert bool((torch.func.functional_call(layer, zeros, (x,))[0] == 0).all())
    expected = layer(x)[0]
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x)[0], expected)
    plain = nn.LSTM(4, 6)
    plain.weight_ih_l0 = torch.nn.Parameter(torch.zeros(24, 4))
    assert torch.equal(plain(x)[0], plain(torch.zeros_like(x))[0])
    assert nn.LSTM(4, 6).double()(x.double())[0].dtype == torch.float64


def test_forget_bias() -> None:
    for layer in (
        nn.LSTM(4, 6, num_layers=2, bidirectional=True, forget_bias=1.5),
        nn.LayerNormLSTM(4, 6, forget_bias=1.5),
    ):
        for _ in range(2):
            for name, parameter in layer.named_parameters():
                if name.startswith("bias_ih"):
                    assert bool((parameter[6:12] == 1.5).all())
                if name.startswith("bias_hh"):
                    assert bool((parameter[6:12] == 0).all())
            layer.reset_parameters()


def test_layer_norm_lstm_parameters() -> None:
    layer = nn.LayerNormLSTM(4, 6, num_layers=2, bidirectional=True)
    plain = torch.nn.LSTM(4, 6, num_layers=2, bidirectional=True)
    assert set(plain.state_dict()) < set(layer.state_dict())
    assert "weight_ln_ih_l0" in layer.state_dict()
    assert layer.state_dict()["bias_ln_c_l1_reverse"].shape == (6,)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = torch.randn(5, 3, 4)
        assert torch.equal(clone(x)[0], layer(x)[0])
    for arguments in ({"bias": False}, {"proj_size": 2}, {"dtype": torch.float64, "batch_first": True}):
        small = nn.LayerNormLSTM(4, 6, **arguments)
        y, (_, c_n) = small(torch.randn(5, 3, 4, dtype=arguments.get("dtype", torch.float32)))
        assert y.shape == (5, 3, arguments.get("proj_size", 6))
        assert c_n.shape[-1] == 6
    assert "bias_ln_c_l0" not in nn.LayerNormLSTM(4, 6, bias=False).state_dict()


@pytest.mark.parametrize("packed", [False, True])
def test_layer_norm_lstm_equals_its_definition(packed: bool) -> None:
    layer = nn.LayerNormLSTM(4, 6, bidirectional=True, num_layers=2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pieces = [torch.randn(length, 4, dtype=torch.float64) for length in (5, 4, 4, 1)]
    x: Any = pack_sequence(pieces) if packed else torch.randn(5, 4, 4, dtype=torch.float64)
    y, (h_n, _) = layer(x)
    state = layer.state_dict()
    zero = torch.zeros(4, 6, dtype=torch.float64)
    below = x.data if packed else x
    last = []
    for k in range(2):
        halves = []
        for direction, suffix in enumerate((f"_l{k}", f"_l{k}_reverse")):
            out, h, _ = reference.lstm(
                *(below, zero, zero, state[f"weight_ih{suffix}"], state[f"weight_hh{suffix}"]),
                *(state[f"bias_ih{suffix}"], state[f"bias_hh{suffix}"]),
                ln_ih_weight=state[f"weight_ln_ih{suffix}"],
                ln_hh_weight=state[f"weight_ln_hh{suffix}"],
                ln_c_weight=state[f"weight_ln_c{suffix}"],
                ln_c_bias=state[f"bias_ln_c{suffix}"],
                batch_sizes=x.batch_sizes if packed else None,
                reverse=direction == 1,
            )
            halves.append(out)
            last.append(h)
        below = torch.cat(halves, -1)
    torch.testing.assert_close(y.data if packed else y, below)
    torch.testing.assert_close(h_n, torch.stack(last))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LayerNormLSTM"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_cut_a_sequence(kind: str, batch_first: bool) -> None:
    """A reset is as good as a new call, in both directions."""
    layer = module(kind, bidirectional=True, batch_first=batch_first).double()
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[4] = True
    order = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    y = order(layer(order(x), resets=order(resets))[0])
    torch.testing.assert_close(y[:4], order(layer(order(x[:4]))[0]))
    torch.testing.assert_close(y[4:], order(layer(order(x[4:]))[0]))
    single = layer(x[:, 0], resets=resets[:, 0])[0]
    torch.testing.assert_close(single, y[:, 0])
    with pytest.raises(ValueError, match="resets cannot be given with a PackedSequence"):
        layer(pack_sequence([x[:, 0]]), resets=resets)


def test_dropout_between_layers_and_locked_dropout() -> None:
    layer = nn.LSTM(4, 64, num_layers=2, dropout=1.0)
    x = torch.randn(5, 3, 4)
    second = nn.LSTM(64, 64)
    second.load_state_dict({n.replace("l1", "l0"): p for n, p in layer.state_dict().items() if "l1" in n})
    torch.testing.assert_close(layer(x)[0], second(torch.zeros(5, 3, 64))[0])
    masked = nn.LSTM(4, 64, output_dropout=0.5)
    y, (h_n, _) = masked(x)
    zero = y == 0
    assert bool((zero == zero[0]).all())  # one mask for all steps
    assert 0.3 < float(zero.float().mean()) < 0.7
    assert not bool((h_n == 0).any())
    masked.eval()
    assert not bool((masked(x)[0] == 0).any())


@pytest.mark.parametrize("packed", [False, True])
def test_both_directions_read_the_same_masked_input(packed: bool) -> None:
    layer = nn.GRU(64, 6, bidirectional=True, input_dropout=0.5).double()
    x: Any = torch.ones(5, 3, 64, dtype=torch.float64)
    if packed:
        x = pack_sequence([torch.ones(length, 64, dtype=torch.float64) for length in (5, 3, 2)])
    (x.data if packed else x).requires_grad_()
    y = layer(x)[0]
    y = pad_packed_sequence(y)[0] if packed else y
    seen = []
    for half in (y[..., :6], y[..., 6:]):
        (gradient,) = torch.autograd.grad(half.sum(), x.data if packed else x, retain_graph=True)
        seen.append(gradient != 0)
    assert torch.equal(*seen)
    assert 0.3 < float(seen[0].double().mean()) < 0.7


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_regulariser_may_be_assigned_later(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that has become more than torch's is no longer left to torch's operator, wherever it runs."""
    layer = module(kind, device="meta")
    calls = []
    whole = type(layer)._torchs
    monkeypatch.setattr(type(layer), "_torchs", lambda *arguments: calls.append(1) or whole(*arguments))
    layer(torch.zeros(5, 3, 4, device="meta"))
    assert len(calls) == 1
    layer.zoneout_h = 0.1
    layer(torch.zeros(5, 3, 4, device="meta"))
    assert len(calls) == 1


def test_layers_train() -> None:
    """A few steps of SGD with everything on, and the loss goes down."""
    torch.manual_seed(0)
    layer = nn.LayerNormLSTM(
        *(8, 16),
        num_layers=2,
        dropout=0.1,
        bidirectional=True,
        zoneout_h=0.1,
        zoneout_c=0.1,
        weight_drop=0.1,
        input_dropout=0.1,
        output_dropout=0.1,
        forget_bias=1.0,
    )
    head = torch.nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.01)
    x = torch.randn(12, 16, 8)
    target = (x[0, :, 0] > 0).long()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(head(layer(x)[0].mean(0)), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# ---- the head's loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["public", "loop"])
def test_linear_cross_entropy(reduction: str, bias: bool, way: str) -> None:
    torch.manual_seed(1)
    tensors = [torch.randn(37, 8), torch.randn(50, 8), *([torch.randn(50)] if bias else [])]
    target = torch.randint(0, 50, (37,))
    target[::5] = -100

    def run(function: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [change(tensor).detach().requires_grad_() for tensor in tensors]
        loss = function(leaves[0], leaves[1], target, leaves[2] if bias else None)
        weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)]

    def ours(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        if way == "loop":
            return recurrent_ops._chunked_linear_cross_entropy(h, w, t, b, reduction, -100)
        return ops.linear_cross_entropy(h, w, t, b, reduction=reduction)

    def definition(h: Tensor, w: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
        return reference.linear_cross_entropy(h, w, t, b, reduction=reduction)

    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype) for tensor in tensors]
        exact = run(definition, lambda tensor: tensor.double())
        eager = eager_runs(lambda nudge: run(definition, nudge))
        for index, (a, b, c) in enumerate(zip(run(ours, lambda tensor: tensor), eager, exact, strict=True)):
            assert_as_accurate(a, b, c, gradient=index > 0)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest number of elements that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("way", ["public", "loop"])
def test_the_logits_never_exist_at_once(way: str) -> None:
    hidden = torch.randn(256, 4, requires_grad=True)
    weight = torch.randn(512, 4, requires_grad=True)
    target = torch.randint(0, 512, (256,))
    with LargestTensor() as seen:
        if way == "loop":
            loss = recurrent_ops._chunked_linear_cross_entropy(hidden, weight, target, None, "mean", -100)
        else:
            loss = ops.linear_cross_entropy(hidden, weight, target)
        loss.backward()
    assert seen.largest < 256 * 512 // 8


def test_linear_cross_entropy_transforms_and_autocast() -> None:
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    target = torch.randint(0, 9, (6,))
    hessian = torch.func.hessian(lambda h: ops.linear_cross_entropy(h, weight, target))(hidden)
    assert bool((hessian.reshape(24, 24).diagonal() > 0).all())
    with genfuse.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda h, w: ops.linear_cross_entropy(h, w, target), (hidden.requires_grad_(), weight.requires_grad_())
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden.detach().float(), weight.detach().float(), target)
    assert loss.dtype == torch.float32
    assert ops.linear_cross_entropy(torch.zeros(0, 4), torch.zeros(9, 4), target[:0], reduction="sum") == 0
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h: ops.linear_cross_entropy(h, weight.detach(), target), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(hidden), ops.linear_cross_entropy(hidden, weight, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["public", "loop"])
def test_second_derivatives_of_linear_cross_entropy(reduction: str, bias: bool, way: str) -> None:
    """torch's chunked operator takes its own gradient for a constant, and says nothing."""
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3), (7,))]
    target = torch.tensor([0, 6, -100, 3, 3])

    def function(hidden: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        if way == "loop":
            chosen = rest[0] if rest else None
            return recurrent_ops._chunked_linear_cross_entropy(hidden, weight, target, chosen, reduction, -100)
        return ops.linear_cross_entropy(hidden, weight, target, *rest, reduction=reduction)

    inputs = leaves if bias else leaves[:2]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    leaves[1].requires_grad_(False)  # a frozen head
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden": torch.zeros(6)}, RuntimeError, "hidden must have 2 dimensions"),
        ({"weight": torch.zeros(9, 5)}, RuntimeError, r"weight must be \[V, D\] = \[\*, 4\]"),
        ({"bias": torch.zeros(8)}, RuntimeError, r"bias must be \[V\] = \[9\]"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, RuntimeError, "weight must be torch.float32"),
        ({"target": torch.zeros(6)}, ValueError, "target must be torch.int64"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, RuntimeError, r"target must be \[N\] = \[6\]"),
        ({"target": torch.full((6,), 9)}, IndexError, r"target has class 9, out of range \[0, 9\)"),
        ({"target": torch.full((6,), -1)}, IndexError, "target has class -1"),
        ({"target": [1]}, TypeError, "target must be an int64 Tensor"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
    ],
)
def test_linear_cross_entropy_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {"hidden": torch.zeros(6, 4), "weight": torch.zeros(9, 4), "target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(kind, match=message):
        ops.linear_cross_entropy(**{**good, **change})


# ---- documentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["backends", "reference.random", "reference.recurrent", "ops.recurrent", "nn.recurrent"]
)
def test_examples(name: str) -> None:
    documented = __import__(f"genfuse.{name}", fromlist=["_"])
    outcome = doctest.testmod(documented)
    assert outcome.attempted > 0
    assert outcome.failed == 0
