"""The Triton LSTM and GRU without a GPU: run by the interpreter against the reference, and compiled for every target.

The interpreter is chosen when a kernel is decorated, so the interpreted tests run in a process of their own, this same
file with TRITON_INTERPRET=1; what the compiler is given are the launches that the host functions really make, recorded.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

from genfuse.kernels import recurrent as kernels  # noqa: E402
from genfuse.reference import recurrent as reference  # noqa: E402
from tolerances import RUNS, assert_as_accurate  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")

SEED = torch.tensor([0x1234_5678_9ABC_DEF, 2**40 + 7])
DROPS: dict[str, float] = {"zoneout_h": 0.3, "weight_drop": 0.3, "input_dropout": 0.2, "output_dropout": 0.25}
LSTM_NAMES = (
    "x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "ln_ih_weight", "ln_hh_weight",
    "ln_c_weight", "ln_c_bias",
)  # fmt: skip
LSTM_GRADIENT_OF = (0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10)  # one gradient serves both biases
GRU_NAMES = ("x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Case:
    """One call: sizes, inputs and options, in float64; `at` gives the inputs in another dtype."""

    def __init__(
        self,
        cell: str,
        sizes: tuple[int, int, int, int],
        *,
        projection: int = 0,
        norm: bool = False,
        bias: bool = True,
        packed: bool = False,
        resets: bool = False,
        training: bool = False,
        reverse: bool = False,
        drops: dict[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(repr((cell, sizes, projection, norm, packed)).encode()))
        steps, batch, inputs, hidden = sizes
        outputs, gates = projection or hidden, 4 if cell == "lstm" else 3

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            # Rounded to the test's dtype: the exact and the eager result start from the same numbers.
            values = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
            return values.to(dtype).to(torch.float64)

        self.cell, self.dtype = cell, dtype
        self.batch_sizes = None
        if packed:
            lengths = sorted(torch.randint(1, steps + 1, (batch,), generator=generator).tolist(), reverse=True)
            lengths[0] = steps
            self.batch_sizes = torch.tensor([sum(length > t for length in lengths) for t in range(steps)])
        rows = (int(self.batch_sizes.sum()),) if self.batch_sizes is not None else (steps, batch)
        scale = 0.4
        self.inputs: list[Tensor | None] = [
            normal(*rows, inputs),
            normal(batch, outputs),
            *([normal(batch, hidden)] if cell == "lstm" else []),
            normal(gates * hidden, inputs, scale=scale),
            normal(gates * hidden, outputs, scale=scale),
            normal(gates * hidden, scale=scale) if bias else None,
            normal(gates * hidden, scale=scale) if bias else None,
        ]
        if cell == "lstm":
            self.inputs.append(normal(projection, hidden, scale=scale) if projection else None)
            gains = [normal(4 * hidden), normal(4 * hidden), normal(hidden), normal(hidden)]
            self.inputs += gains if norm else [None] * 4
        self.resets = torch.rand(steps, batch, generator=generator) < 0.3 if resets else None
        self.training, self.reverse = training, reverse
        drops = drops or {}
        names = ("zoneout_h", "zoneout_c") if cell == "lstm" else ("zoneout_h",)
        self.drops = [drops.get(name, 0.0) for name in (*names, "weight_drop", "input_dropout", "output_dropout")]
        self.results = 3 if cell == "lstm" else 2
        shapes = [(*rows, outputs), (batch, outputs), (batch, hidden)][: self.results]
        self.gradients = [normal(*shape) for shape in shapes]

    def reference(self, dtype: torch.dtype, run: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """Results and gradients at a dtype; from run 1 on with inputs moved by half a unit in its last place."""
        generator = torch.Generator().manual_seed(run)

        def moved(tensor: Tensor) -> Tensor:
            amount = (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5) * (run > 0)
            return (tensor * (1.0 + 2.0 * amount * torch.finfo(dtype).eps)).to(dtype).requires_grad_()

        inputs = [None if tensor is None else moved(tensor) for tensor in self.inputs]
        options: dict[str, Any] = {
            "batch_sizes": self.batch_sizes, "resets": self.resets, "training": self.training, "reverse": self.reverse,
            "rng": SEED,
        }  # fmt: skip
        names = ("zoneout_h", "zoneout_c") if self.cell == "lstm" else ("zoneout_h",)
        options |= dict(zip((*names, "weight_drop", "input_dropout", "output_dropout"), self.drops, strict=True))
        if self.cell == "lstm":
            results = reference.lstm(*inputs[:8], **dict(zip(LSTM_NAMES[8:], inputs[8:], strict=True)), **options)
        else:
            results = reference.gru(*inputs, **options)
        wanted = [tensor for tensor in inputs if tensor is not None]
        gradients = torch.autograd.grad(
            results, wanted, [g.to(dtype) for g in self.gradients], allow_unused=True, materialize_grads=True
        )
        return [result.detach() for result in results], list(gradients)

    def kernel(self, family: Any = kernels, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
        """Results and gradients of ``family`` (functions with the operators' arguments), on the CPU."""
        inputs = [None if tensor is None else tensor.to(device, self.dtype) for tensor in self.inputs]
        gradients = [gradient.to(device, self.dtype) for gradient in self.gradients]
        fixed = (self.batch_sizes, None if self.resets is None else self.resets.to(device), SEED.to(device))
        flags = (*self.drops, *((1e-5,) if self.cell == "lstm" else ()), self.training, self.reverse)
        if self.cell == "lstm":
            saved = family.lstm(*inputs, *fixed, *flags, True)
            bare = family.lstm(*inputs, *fixed, *flags, False)
            found = family.lstm_backward(*gradients, *inputs, *fixed, saved[0], *saved[3:], *flags, True, True)
            found = tuple(found[index] for index in LSTM_GRADIENT_OF)
        else:
            saved = family.gru(*inputs, *fixed, *flags, True)
            bare = family.gru(*inputs, *fixed, *flags, False)
            found = family.gru_backward(*gradients, *inputs, *fixed, saved[0], *saved[2:], *flags, True, True)
        for kept, without in zip(saved[: self.results], bare, strict=False):
            assert torch.allclose(kept, without, rtol=0.0, atol=0.0, equal_nan=True)
        assert all(reserve.numel() == 0 for reserve in bare[self.results :])
        wanted = [gradient.cpu() for gradient, tensor in zip(found, inputs, strict=True) if tensor is not None]
        return [result.cpu() for result in saved[: self.results]], wanted

    def check(self, monkeypatch: pytest.MonkeyPatch, family: Any = kernels, device: str = "cpu") -> None:
        exact, exact_gradients = self.reference(torch.float64)
        # Eager PyTorch at the dtype of the test: the same equations without the reference's step up to float32.
        monkeypatch.setattr(reference, "_compute_dtype", lambda dtype: dtype)
        runs = [self.reference(self.dtype, run) for run in range(RUNS)]
        found, gradients = self.kernel(family, device)
        names = LSTM_NAMES if self.cell == "lstm" else GRU_NAMES
        present = [name for name, tensor in zip(names, self.inputs, strict=True) if tensor is not None]
        for index, name in enumerate(("y", "h_n", "c_n")[: self.results]):
            assert_as_accurate(found[index], [values[index] for values, _ in runs], exact[index], name)
        for index, name in enumerate(present):
            eager = [values[index] for _, values in runs]
            assert_as_accurate(gradients[index], eager, exact_gradients[index], name, gradient=True)


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends small sizes through the step kernels, as large ones are."""
    monkeypatch.setattr(kernels, "_sequence_fits", lambda *arguments: False)


ALL = {**DROPS, "zoneout_c": 0.4}
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])


@interpreted
@CELLS
@REVERSE
def test_sequence_kernel(cell: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, (4, 3, 4, 5), reverse=reverse).check(monkeypatch)
    Case(cell, (3, 17, 2, 18), reverse=reverse, resets=True, training=True, drops=ALL).check(monkeypatch)


@interpreted
@REVERSE
def test_sequence_kernel_with_layer_norm(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Case("lstm", (3, 3, 4, 5), norm=True, bias=False, reverse=reverse).check(monkeypatch)
    options: dict[str, Any] = {"resets": True, "training": True, "drops": ALL}
    Case("lstm", (2, 17, 2, 18), norm=True, reverse=reverse, **options).check(monkeypatch)


@interpreted
@CELLS
@REVERSE
def test_step_kernels(cell: str, reverse: bool, by_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, (3, 3, 4, 18), reverse=reverse).check(monkeypatch)
    Case(cell, (3, 17, 4, 5), reverse=reverse, resets=True, training=True, drops=ALL).check(monkeypatch)


@interpreted
@pytest.mark.parametrize("projection", [0, 3], ids=["", "projection"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_step_kernels_with_options(
    projection: int, norm: bool, by_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"resets": True, "training": True, "drops": ALL}
    Case("lstm", (3, 2, 4, 18), projection=projection, norm=norm, **options).check(monkeypatch)
    Case("lstm", (2, 2, 4, 6), projection=projection, norm=norm, bias=False).check(monkeypatch)


@interpreted
@CELLS
@REVERSE
def test_packed(cell: str, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, (4, 4, 3, 5), packed=True, reverse=reverse, training=True, drops=ALL).check(monkeypatch)


@interpreted
@REVERSE
def test_packed_with_layer_norm_and_projection(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"packed": True, "training": True, "drops": ALL}
    Case("lstm", (4, 3, 3, 6), norm=True, projection=3, reverse=reverse, **options).check(monkeypatch)


@interpreted
@CELLS
def test_zoneout_in_eval(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, (3, 2, 3, 5), drops={"zoneout_h": 0.3, "zoneout_c": 0.2}).check(monkeypatch)


@interpreted
@CELLS
def test_everything_dropped(cell: str) -> None:
    case = Case(cell, (2, 2, 3, 5), training=True, drops=dict.fromkeys(ALL, 1.0))
    (y, h_n, *_), _ = case.kernel()
    h0 = case.inputs[1]
    assert h0 is not None
    assert torch.equal(h_n, h0.to(h_n.dtype))
    assert not y.any()


@interpreted
@CELLS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, (3, 3, 4, 18), dtype=dtype, training=True, drops=ALL).check(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_sequence_fits", lambda *arguments: False)
        Case(cell, (3, 3, 4, 18), dtype=dtype, training=True, drops=ALL).check(patch)


@interpreted
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (3, 0, 3, 4), (1, 1, 1, 1)], ids=str)
@CELLS
def test_smallest(cell: str, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    Case(cell, shape).check(monkeypatch)


@interpreted
@CELLS
def test_large_inputs_saturate(cell: str) -> None:
    case = Case(cell, (3, 2, 3, 5))
    assert case.inputs[0] is not None
    for sign in (1.0, -1.0):
        case.inputs[0].fill_(sign * 1e30)
        results, gradients = case.kernel()
        for result in results:
            assert bool(result.isfinite().all())
        assert not any(bool(gradient.isnan().any()) for gradient in gradients)


@interpreted
@CELLS
def test_nan_stays_in_its_row(cell: str) -> None:
    case = Case(cell, (3, 3, 3, 5), training=True)
    assert case.inputs[0] is not None
    case.inputs[0][1, 1, 0] = torch.nan
    (y, *_), _ = case.kernel()
    assert bool(y[1:, 1].isnan().all())
    assert bool(y[:, [0, 2]].isfinite().all())
    assert bool(y[0].isfinite().all())


def test_objections(monkeypatch: pytest.MonkeyPatch) -> None:
    x, state, w_ih, w_hh = torch.zeros(2, 1, 3), torch.zeros(1, 4), torch.zeros(16, 3), torch.zeros(16, 4)
    call = (x, state, state, w_ih, w_hh)
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    assert kernels.can_run_lstm(*call) is False
    with pytest.raises(RuntimeError, match="x is on cpu"):
        kernels.can_run_lstm(*call, raise_error=True)
    monkeypatch.setattr(kernels, "_interpreted", lambda: True)
    assert kernels.can_run_lstm(*call)
    with pytest.raises(RuntimeError, match=r"x is torch\.float64"):
        kernels.can_run_lstm(*(tensor.double() for tensor in call), raise_error=True)
    with pytest.raises(RuntimeError, match=r"h0 is torch\.bfloat16"):
        kernels.can_run_gru(x, state.bfloat16(), w_ih[:12], w_hh[:12], raise_error=True)


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# ---- compiling for GPUs that are not there --------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "mi300": ("hip", "gfx942", 64),
}
# Every dtype on two targets and every kernel on all four, which is what a test run has time for; GENFUSE_ALL_TARGETS=1
# compiles everything for everything.
OWN_TARGETS = {"fp32": ["sm_80", "sm_90", "mi300"], "bf16": ["sm_90", "sm_100", "mi300"], "fp16": ["sm_90", "mi300"]}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"}


def _signature(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What the launcher would hand to the compiler: types, constants, alignment, options."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    options = {name: value for name, value in kwargs.items() if name not in names}
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = "*" + TYPES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    return kernel.__name__, types, constants, aligned, options


def _launches(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """One launch of each kernel, with every option on, as the host functions make them at this dtype."""
    from triton.runtime.jit import JITFunction

    seen: dict[str, tuple[Any, ...]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _signature(self, args, kwargs)
        seen.setdefault(str((launch[0], launch[1].keys(), [k for k, v in launch[2].items() if v is None])), launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        options: dict[str, Any] = {"resets": True, "training": True, "drops": ALL, "dtype": dtype}
        patch.setattr(
            torch, "allclose", lambda *arguments, **options: True
        )  # the recorded kernels compute nothing to compare
        for norm in (False, True):
            Case("lstm", (2, 3, 4, 16), norm=norm, **options).kernel()
        Case("gru", (2, 3, 4, 16), **options).kernel()
        patch.setattr(kernels, "_sequence_fits", lambda *arguments: False)
        Case("lstm", (2, 3, 4, 130), projection=20, **options).kernel()
        Case("lstm", (2, 3, 4, 130), norm=True, **options).kernel()
        Case("lstm", (2, 3, 4, 130), **options).kernel()
        Case("gru", (2, 3, 4, 130), **options).kernel()
    # The launches with save=False differ by absent reserves alone.
    most: dict[tuple[str, Any], tuple[Any, ...]] = {}
    for launch in seen.values():
        name, types, constants = launch[0], launch[1], launch[2]
        key = (name, types.get("ln_ih"), types.get("u"))
        absent = sum(value is None for value in constants.values())
        if key not in most or absent < sum(value is None for value in most[key][2].values()):
            most[key] = launch
    return list(most.values())


def _compile(work: tuple[str, tuple[Any, ...]]) -> tuple[str, str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, (name, types, constants, aligned, options) = work
    source = ASTSource(getattr(kernels, name), types, constants, aligned)
    binary = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    return name, target, int(binary.metadata.shared)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    workers = min(4, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@compiled
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_compiles_for_every_target(dtype: str, pool: ProcessPoolExecutor) -> None:
    launches = _launches(DTYPES[dtype])
    kernel_names = {name for name, *_ in launches}
    entered = {
        name
        for name, value in vars(kernels).items()
        if hasattr(value, "params") and getattr(value, "do_not_specialize", None)
    }
    assert kernel_names == entered, "a kernel that no host function launches, or the other way round"
    targets = list(TARGETS) if os.environ.get("GENFUSE_ALL_TARGETS") else OWN_TARGETS[dtype]
    work = [(target, launch) for launch in launches for target in targets]
    most = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "mi300": 64}
    for name, target, shared in pool.map(_compile, work):
        assert shared <= most[target] * 1024, f"{name} on {target}: {shared} bytes of shared memory"
