"""The support matrix: generated from the registry, and the README shows it."""

from __future__ import annotations

from pathlib import Path

import autoregressive_cases
import pytest
import torch
from ancestral_cases import any_program
from genfuse import _native, backends, ops
from genfuse.ops import operator
from genfuse.ops import recurrent as recurrent_ops
from operator_cases import VARIANTS, make

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support-matrix -->", "<!-- /support-matrix -->"


def test_readme_shows_the_support_matrix() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    shown = text.split(BEGIN)[1].split(END)[0].strip()
    assert shown == backends.support_matrix_markdown(), "run `python -m genfuse.backends` and paste its output there"


def test_every_public_op_has_kernels_and_a_reference() -> None:
    rows = backends.support_matrix()
    public = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}  # VectorQuantized is a result
    assert {row["op"] for row in rows} == public
    for op in public:
        kernels = backends.kernels_of(op)
        assert kernels[-1].backend == "reference"
        assert kernels[-1].devices == ()
        assert kernels[-1].proven


def test_unproven_kernels_are_off_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that could run but is unproven is left out by dispatch, named by explain, and taken when forced."""
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    arguments = {"hidden": x, "weight": w, "target": torch.zeros(2, dtype=torch.int64), "bias": None}
    new = backends.Kernel("linear_cross_entropy", "cuda", ("cpu",), proven=False)
    before = backends._KERNELS["linear_cross_entropy"]
    monkeypatch.setitem(backends._KERNELS, "linear_cross_entropy", [new, *before])
    assert backends.select("linear_cross_entropy", arguments) == "torch"
    explanation = backends.explain("linear_cross_entropy", x, w, arguments["target"])
    assert explanation.backend == "torch"
    assert "unproven" in explanation.candidates[0].reason
    with backends.use_backend("cuda"):
        assert backends.select("linear_cross_entropy", arguments) == "cuda"
        assert backends.explain("linear_cross_entropy", x, w, arguments["target"]).backend == "cuda"


def test_can_run_says_why_not() -> None:
    arguments = {"hidden": torch.zeros(2, 3, dtype=torch.int32), "weight": None, "target": None, "bias": None}
    assert not backends.can_run("linear_cross_entropy", "reference", arguments)
    with pytest.raises(RuntimeError, match=r"hidden is int32; it takes float32, float64, bfloat16, float16"):
        backends.can_run("linear_cross_entropy", "reference", arguments, raise_error=True)
    with pytest.raises(RuntimeError, match=r"has no such backend \(it has torch, reference\)"):
        backends.can_run("linear_cross_entropy", "native", arguments, raise_error=True)
    with pytest.raises(
        RuntimeError, match=r"linear_cross_entropy has no backend for this call: torch: hidden is int32"
    ):
        backends.select("linear_cross_entropy", arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.register(backends.Kernel("lstm", "magic", ()))


@pytest.mark.parametrize("op", ["lstm", "gru"])
def test_without_the_native_library_the_reference_serves(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = recurrent_ops._LSTM if op == "lstm" else recurrent_ops._GRU
    monkeypatch.setattr(layer, "on_cpu", False)
    monkeypatch.setattr(recurrent_ops, "_cpu_kernels", set())
    x, h = torch.randn(5, 3, 4), torch.zeros(3, 6)
    gates = 24 if op == "lstm" else 18
    arguments = (x, *((h, h) if op == "lstm" else (h,)), torch.randn(gates, 4), torch.randn(gates, 6))
    explanation = backends.explain(op, *arguments)
    assert explanation.backend == "reference"
    assert "native library" in explanation.candidates[0].reason
    expected = getattr(recurrent_ops.reference, op)(*arguments)
    for ours, theirs in zip(getattr(ops, op)(*arguments), expected, strict=True):
        assert torch.equal(ours, theirs)
    with backends.use_backend("native"), pytest.raises(RuntimeError, match="cannot run on backend 'native'"):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_the_native_library_the_reference_serves_other_operators(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make(name)
    expected = problem.results("reference")
    monkeypatch.setattr(operator, "on_cpu", False)
    monkeypatch.setattr(_native, "error", lambda: "genfuse was built or installed without the CPU operators")
    explanation = backends.explain(name, **problem.inputs, **problem.options)
    assert explanation.backend == "reference"
    assert "without the CPU operators" in explanation.candidates[0].reason
    for ours, theirs in zip(problem.results(), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="cannot run on backend 'native'"):
        problem.results("native")


@pytest.mark.parametrize("row", backends.support_matrix(), ids=lambda row: f"{row['op']}-{row['backend']}")
def test_every_row_holds(row: dict[str, str]) -> None:
    """What the matrix says of this machine's devices is so: each dtype of each proven kernel runs."""
    if row["status"] == "unproven" or row["device"] not in ("cpu", "any"):
        pytest.skip("not for this machine")
    for name in row["dtypes"].split(", "):
        dtype = getattr(torch, name)
        if row["op"].startswith("philox"):
            with backends.use_backend(row["backend"]):
                assert getattr(ops, row["op"])((3, 5), 1, dtype=dtype).dtype == dtype
            continue
        if row["op"] in VARIANTS:
            assert all(result.isfinite().all() for result in make(row["op"], dtype=dtype).results(row["backend"]))
            continue
        if row["op"] == "logit_quantize":
            with backends.use_backend(row["backend"]):
                assert ops.logit_quantize(torch.zeros(2, 3, dtype=dtype)).eq(128).all()
            continue
        if row["op"] in ("masked_linear", "autoregressive_inverse"):
            problem = autoregressive_cases.make(row["op"], dtype=dtype)
            assert all(result.isfinite().all() for result in problem.results(row["backend"]))
            continue
        if row["op"] in ("unconstrained_rational_quadratic_spline", "piecewise_rational_quadratic_transform"):
            logits = torch.zeros(2, 4, dtype=dtype)
            slopes = torch.zeros(2, 3 if row["op"].startswith("un") else 5, dtype=dtype)
            with backends.use_backend(row["backend"]):
                y, _ = getattr(ops, row["op"])(torch.full((2,), 0.5, dtype=dtype), logits, logits, slopes)
            assert y.eq(0.5).all()
            continue
        if row["op"] in ("categorical_sample", "vector_quantize_statistics"):
            x = torch.zeros(2, 3, dtype=dtype)
            with backends.use_backend(row["backend"]):
                drawn = ops.categorical_sample(x)
                assert ops.vector_quantize_statistics(x, drawn, 3)[0].sum() == 2
            continue
        if row["op"] == "ancestral_sample":
            program = any_program(0, 2, dtype)
            with backends.use_backend(row["backend"]):
                assert ops.ancestral_sample(program, 2).ge(0).all()
            continue
        if row["op"] == "discretized_logistic_mixture_sample":
            with backends.use_backend(row["backend"]):
                drawn = ops.discretized_logistic_mixture_sample(torch.zeros(2, 20, 4, dtype=dtype))
            assert drawn.shape == (2, 3, 4)
            assert drawn.abs().le(1.0).all()
            continue
        if row["op"] == "linear_cross_entropy":
            arguments: tuple[object, ...] = (
                torch.randn(4, 3, dtype=dtype),
                torch.randn(5, 3, dtype=dtype),
                torch.tensor([0, 1, 2, 3]),
            )
        else:
            gates = 24 if "lstm" in row["op"] else 18
            w_ih, w_hh = torch.randn(gates, 4, dtype=dtype), torch.randn(gates, 6, dtype=dtype)
            state = torch.zeros(2, 6, dtype=dtype)
            if "generate" in row["op"]:
                prompt = torch.zeros(2, 1, dtype=torch.int64)
                embedding, head = torch.randn(9, 4, dtype=dtype), torch.randn(9, 6, dtype=dtype)
                arguments = (prompt, 3, embedding, [(w_ih, w_hh, None, None)], head)
            else:
                x = torch.randn(3, 2, 4, dtype=dtype)
                arguments = (x, *((state, state) if row["op"] == "lstm" else (state,)), w_ih, w_hh)
        if row["backend"] == "native" and row["op"] not in recurrent_ops._cpu_kernels:
            pytest.skip("the native library is absent")
        with backends.use_backend(row["backend"]):
            result = getattr(ops, row["op"])(*arguments)
        assert result is not None
