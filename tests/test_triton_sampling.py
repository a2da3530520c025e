"""The Triton noise without a GPU: run by the interpreter against the reference, and compiled for every target.

The interpreter is chosen when a kernel is decorated, so the interpreted tests run in a process of their own, this same
file with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is optional")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

from genfuse.kernels import sampling as kernels  # noqa: E402
from genfuse.reference import sampling as reference  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
RNG = torch.tensor([0x1234_5678_9ABC_DEF, -(2**40) - 7])
NOISES = {"uniform": 1, "normal": 2, "gumbel": 3, "logistic": 4}


@interpreted
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_bits(count: int) -> None:
    out = torch.full((count,), -1)
    kernels.philox_(out, RNG, 0)
    assert torch.equal(out, reference.philox_bits((count,), RNG))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", NOISES)
def test_noise(noise: str, dtype: torch.dtype) -> None:
    out = torch.full((3, 1001), torch.nan, dtype=dtype).t()
    kernels.philox_(out, RNG, NOISES[noise])
    exact = getattr(reference, f"philox_{noise}")((1001, 3), RNG, torch.float64 if noise != "uniform" else dtype)
    if noise == "uniform":
        assert torch.equal(out, exact)
        return
    # Four units in the last place, of 1 where the number is smaller: the difference of two logarithms near 0.
    error = (out.double() - exact).abs() / exact.abs().clamp(min=1.0)
    assert float(error.max()) <= 4 * torch.finfo(dtype).eps


@interpreted
def test_launches_of_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_LAUNCH", 2)
    out = torch.empty(5000)
    kernels.philox_(out, RNG, 2)
    monkeypatch.undo()
    whole = torch.empty(5000)
    kernels.philox_(whole, RNG, 2)
    assert torch.equal(out, whole)


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


TARGETS: dict[str, tuple[Any, Any, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "mi300": ("hip", "gfx942", 64),
}


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for noise in range(5):
        for kind in ("i64",) if noise == 0 else ("fp32", "bf16", "fp16"):
            types = {"out": f"*{kind}", "rng": "*i64", "count": "i64", "first": "i64"}
            types |= dict.fromkeys(("NOISE", "BITS", "BLOCKS"), "constexpr")
            constants = {(4,): noise, (5,): 24, (6,): kernels._BLOCKS}
            source = ASTSource(kernels._philox_kernel, types, constants)
            binary = triton.compile(source, target=GPUTarget(*TARGETS[target]))
            assert binary.metadata.shared <= 64 * 1024
