"""Random numbers by address: the cipher's known answers, the same numbers behind every door, distributions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import genfuse
import numpy as np
import pytest
import torch
from genfuse import _C, ops
from genfuse.reference import sampling as reference
from scipy import stats
from torch import Tensor
from torch import library as registry

NOISES = ("uniform", "normal", "gumbel", "logistic")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEEDS = [(0, 0), (1, 0), (2**64 - 1, 2**63), (-3, 5), (0x1234_5678_9ABC_DEF0, -(2**35))]


def draw(noise: str, *arguments: Any, **options: Any) -> Tensor:
    result: Tensor = getattr(ops, f"philox_{noise}")(*arguments, **options)
    return result


def rng_of(seed: int, offset: int) -> Tensor:
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in (seed, offset)])


def exact(noise: str, shape: tuple[int, ...], seed: int, offset: int) -> Tensor:
    result: Tensor = getattr(reference, f"philox_{noise}")(shape, rng_of(seed, offset), torch.float64)
    return result


# ---- the cipher ------------------------------------------------------------------------------------------------------


def test_known_answer() -> None:
    """Random123's first vector for philox4x32-10; the others have blocks beyond any tensor, and are asked of the cipher
    itself in test_recurrent.py.
    """
    assert [f"{word:08x}" for word in ops.philox_bits(4, 0).tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]


@pytest.mark.parametrize(("seed", "offset"), SEEDS)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 31, 64, 65, 1000])
def test_bits_are_the_references(seed: int, offset: int, count: int) -> None:
    assert torch.equal(ops.philox_bits(count, seed, offset), reference.philox_bits((count,), rng_of(seed, offset)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniforms_are_the_references(dtype: torch.dtype) -> None:
    found = ops.philox_uniform((3, 777), 5, 6, dtype=dtype)
    assert torch.equal(found, reference.philox_uniform((3, 777), rng_of(5, 6), dtype))
    assert float(found.min()) >= 0
    assert float(found.max()) < 1


@pytest.mark.parametrize("noise", NOISES[1:])
def test_float32_is_near_the_exact_number(noise: str) -> None:
    count = 200_001
    found, true = draw(noise, count, 7, 8, dtype=torch.float32), exact(noise, (count,), 7, 8)
    # The docstrings' 4 ulp; of 1, for the two that are differences or logarithms near 1 and so cross 0.
    scale = true.abs() if noise == "normal" else true.abs().clamp(min=1.0)
    assert float(((found - true).abs() / scale).max()) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("noise", NOISES[1:])
def test_float64_is_the_exact_number(noise: str) -> None:
    found, true = draw(noise, 5001, 7, 8, dtype=torch.float64), exact(noise, (5001,), 7, 8)
    assert float(((found - true).abs() / true.abs().clamp(min=1e-3)).max()) <= 1e-13


@pytest.mark.parametrize("noise", NOISES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_float32(noise: str, dtype: torch.dtype) -> None:
    wide = draw(noise, 1001, 3, dtype=torch.float32)
    assert torch.equal(draw(noise, 1001, 3, dtype=dtype), wide.to(dtype))


# ---- the ends of the words' range ------------------------------------------------------------------------------------


def test_the_extreme_words_give_finite_numbers(tmp_path: Path) -> None:
    """Nobody meets the words 0 and 2^32 - 1 by chance: the formulas are compiled alone, and asked."""
    source = tmp_path / "ends.cpp"
    root = Path(__file__).resolve().parents[1] / "csrc"
    source.write_text(
        """
#include <cstdio>
#include "sampling/noise_simd.h"
using namespace genfuse; using namespace genfuse::GENFUSE_ISA;
int main() {
  const uint32_t words[] = {0u, 1u, 2u, 0x3fffffffu, 0x40000000u, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xbfffffffu,
                            0xc0000000u, 0xfffffffeu, 0xffffffffu};
  for (uint32_t w : words) {
    VecWord v = VecWord{} + w;
    VecFloat even, odd;
    normal_pair(v, v, even, odd);
    double e, o;
    normal_pair(w, w, e, o);
    std::printf("%.17g %.17g %.17g %.17g %.17g %.17g %.17g %.17g %.17g %.17g\\n", (double)log_of_word(v)[0],
                log_of_word(w), (double)even[0], e, (double)odd[0], o, (double)gumbel(v)[0], gumbel(w),
                (double)logistic(v)[0], logistic(w));
  }
}
"""
    )
    binary = tmp_path / "ends"
    flags = ["-std=c++20", "-O2", "-w", "-ffp-contract=fast", "-DGENFUSE_ISA=baseline", f"-I{root}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(binary)], check=True)
    rows = [list(map(float, line.split())) for line in subprocess.check_output([str(binary)], text=True).splitlines()]
    for row in rows:
        assert all(math.isfinite(value) for value in row)
        for single, double in zip(row[::2], row[1::2], strict=True):
            assert abs(single - double) <= 4 * 2.0**-23 * max(abs(double), 0.5)
        assert abs(row[0] - row[1]) <= 2 * 2.0**-23 * abs(row[1])  # the logarithm, relatively, at both ends


# ---- where and how they are drawn makes no difference ----------------------------------------------------------------


@pytest.mark.parametrize("noise", NOISES)
def test_threads_make_no_difference(noise: str) -> None:
    count = 500_003
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = draw(noise, count, 11, 12)
        for more in (2, 3, 5):
            torch.set_num_threads(more)
            assert torch.equal(draw(noise, count, 11, 12), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(isa: str) -> None:
    """Bits and uniforms exactly; the others to the last places, because of fused multiply-adds."""
    program = (
        "import genfuse, torch; from genfuse import ops; print(ops.philox_bits(1001, 3, 4).sum().item(), "
        "ops.philox_uniform(1001, 3, 4).double().sum().item(), ops.philox_normal(1001, 3, 4).double().sum().item())"
    )
    environment = {**os.environ, "GENFUSE_ISA": isa}
    found = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split()
    assert int(found[0]) == int(ops.philox_bits(1001, 3, 4).sum())
    assert float(found[1]) == float(ops.philox_uniform(1001, 3, 4).double().sum())
    assert abs(float(found[2]) - float(ops.philox_normal(1001, 3, 4).double().sum())) < 1001 * 4 * 2.0**-23


@pytest.mark.parametrize("noise", ["bits", *NOISES])
def test_shape_and_strides_make_no_difference(noise: str) -> None:
    flat = draw(noise, 60, 1, 2)
    assert torch.equal(draw(noise, (3, 4, 5), 1, 2).flatten(), flat)
    out = torch.zeros(5, 4, 3, dtype=flat.dtype).permute(2, 1, 0)
    assert draw(noise, (3, 4, 5), 1, 2, out=out) is out
    assert torch.equal(out.flatten(), flat)
    strided = torch.zeros(120, dtype=flat.dtype)
    draw(noise, 60, 1, 2, out=strided[::2])
    assert torch.equal(strided[::2], flat)
    assert not strided[1::2].any()


@pytest.mark.parametrize("noise", ["bits", *NOISES])
def test_longer_draws_begin_alike(noise: str) -> None:
    long = draw(noise, 4096, 9)
    for count in (1, 2, 5, 63, 64, 127, 1000):
        assert torch.equal(draw(noise, count, 9), long[:count])


@pytest.mark.parametrize("noise", ["bits", *NOISES])
def test_arrays_are_the_operators(noise: str) -> None:
    for dtype in (np.int64,) if noise == "bits" else (np.float32, np.float64):
        array = _C.philox((7, 9), 2**64 - 1, 3, noise=noise, dtype=np.dtype(dtype).name, threads=2)
        assert array.dtype == dtype
        assert torch.equal(
            torch.from_numpy(array), draw(noise, (7, 9), 2**64 - 1, 3, dtype=torch.from_numpy(array).dtype)
        )


@pytest.mark.parametrize("noise", ["bits", *NOISES])
def test_the_reference_backend(noise: str) -> None:
    with genfuse.use_backend("reference"):
        slow = draw(noise, (3, 5), 4)
    fast = draw(noise, (3, 5), 4)
    assert torch.allclose(slow.double(), fast.double(), rtol=1e-6, atol=1e-6)
    assert genfuse.explain(f"philox_{noise}", (3, 5), 4).backend == "native"


# ---- distributions ---------------------------------------------------------------------------------------------------

COUNT = 1_000_000
CDF: dict[str, Callable[..., Any]] = {
    "uniform": stats.uniform.cdf,
    "normal": stats.norm.cdf,
    "gumbel": stats.gumbel_r.cdf,
    "logistic": stats.logistic.cdf,
}
# The seeds are fixed, so that a p-value is always the same: below 1e-4 in one of these few would be no accident.
LEAST = 1e-4


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", [0, 2**63 + 12345])
def test_kolmogorov_smirnov(noise: str, seed: int) -> None:
    assert stats.kstest(draw(noise, COUNT, seed, dtype=torch.float64).numpy(), CDF[noise]).pvalue > LEAST


@pytest.mark.parametrize("noise", NOISES)
def test_moments(noise: str) -> None:
    """Mean and variance, within five of their standard errors."""
    frozen = {"uniform": stats.uniform, "normal": stats.norm, "gumbel": stats.gumbel_r, "logistic": stats.logistic}
    mean, variance, _, kurtosis = (float(value) for value in frozen[noise].stats(moments="mvsk"))
    found = draw(noise, COUNT, 21)
    assert abs(float(found.double().mean()) - mean) < 5 * (variance / COUNT) ** 0.5
    error = variance * ((kurtosis + 2) / COUNT) ** 0.5
    assert abs(float(found.double().var()) - variance) < 5 * error


def test_normal_moments_to_the_eighth() -> None:
    found = ops.philox_normal(COUNT, 5, dtype=torch.float64)
    for order in range(1, 9):
        true = 0.0 if order % 2 else float(math.prod(range(1, order, 2)))
        error = (float(math.prod(range(1, 2 * order, 2))) - true**2) ** 0.5 / COUNT**0.5
        assert abs(float((found**order).mean()) - true) < 5 * error, order


def test_bits_chi_squared() -> None:
    words = ops.philox_bits(COUNT, 13)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((words >> shift) & 255, minlength=256).numpy()
        assert stats.chisquare(counts).pvalue > LEAST, shift


def test_pairs_chi_squared() -> None:
    """Neighbours are independent: Box and Muller's two, and the uniforms of a block."""
    for noise in ("uniform", "normal"):
        values = CDF[noise](draw(noise, COUNT, 17, dtype=torch.float64).numpy()).reshape(-1, 2)
        cells = (values * 16).astype(int).clip(0, 15)
        counts = np.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256)
        assert stats.chisquare(counts).pvalue > LEAST


def test_neighbouring_streams_are_uncorrelated() -> None:
    base = ops.philox_normal(COUNT, 100, 7).double()
    for seed, offset in ((101, 7), (100, 8), (100 + 2**32, 7), (100, 7 + 2**32), (100 ^ 2**63, 7)):
        other = ops.philox_normal(COUNT, seed, offset).double()
        correlation = float(torch.corrcoef(torch.stack((base, other)))[0, 1])
        assert abs(correlation) < 5 / COUNT**0.5
    shifted = float(torch.corrcoef(torch.stack((base[:-1], base[1:])))[0, 1])
    assert abs(shifted) < 5 / COUNT**0.5


# ---- as torch's users expect -----------------------------------------------------------------------------------------


def test_default_dtype_and_device() -> None:
    assert ops.philox_normal((2,), 0).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert ops.philox_normal((2,), 0).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert ops.philox_normal((2, 3), 0, device="meta").is_meta


@pytest.mark.parametrize("noise", ["bits", *NOISES])
def test_opcheck(noise: str) -> None:
    out = torch.empty(3, 5, dtype=torch.int64 if noise == "bits" else torch.float32)
    index = ("bits", *NOISES).index(noise)
    registry.opcheck(torch.ops.genfuse.philox_.default, (out, torch.tensor([1, 2]), index))


def test_compile_without_a_graph_break_or_a_recompile_for_each_size() -> None:
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def twice(x: Tensor) -> Tensor:
        return x + 2 * ops.philox_normal(x.shape, 3, 4)

    for count in (3, 17, 40):
        x = torch.randn(count, 2)
        assert torch.equal(twice(x), x + 2 * ops.philox_normal((count, 2), 3, 4))
    assert counter.frame_count == 1


def test_export() -> None:
    class Noisy(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + ops.philox_uniform(x.shape, 3)

    x = torch.zeros(4, 5)
    program = torch.export.export(Noisy(), (x,))
    assert torch.equal(program.module()(x), ops.philox_uniform((4, 5), 3))


def test_inside_vmap_every_example_has_the_same_numbers() -> None:
    found = torch.vmap(lambda x: x + ops.philox_normal(x.shape, 3))(torch.zeros(4, 5))
    assert torch.equal(found, ops.philox_normal((5,), 3).expand(4, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.philox_normal((2, -1), 0), RuntimeError, r"shape must not hold negative sizes, got \[2, -1\]"),
        (lambda: ops.philox_normal((2, 1.5), 0), TypeError, "shape must hold integers, got float"),
        (lambda: ops.philox_normal(3, 1.0), TypeError, "seed must be an integer, got float"),
        (lambda: ops.philox_normal(3, 2**64), ValueError, "seed must fit 64 bits"),
        (lambda: ops.philox_normal(3, 0, -(2**63) - 1), ValueError, "offset must fit 64 bits"),
        (lambda: ops.philox_normal(3, 0, dtype=torch.int64), TypeError, "dtype must be float32 or .*, got int64"),
        (lambda: ops.philox_bits(3, 0, dtype=torch.float32), TypeError, "dtype must be int64, got float32"),
        (lambda: ops.philox_normal(3, 0, out=torch.empty(4)), RuntimeError, r"out must have shape \[3\], got \[4\]"),
        (lambda: ops.philox_normal(3, 0, out=[0.0]), TypeError, "out must be a Tensor, got list"),
        (
            lambda: ops.philox_normal(3, 0, dtype=torch.float64, out=torch.empty(3)),
            RuntimeError,
            "dtype is torch.float64, but out has torch.float32",
        ),
        (
            lambda: ops.philox_normal(3, 0, device="meta", out=torch.empty(3)),
            RuntimeError,
            "device is meta, but out is on cpu",
        ),
        (
            lambda: ops.philox_normal(3, 0, out=torch.empty(3, requires_grad=True)),
            RuntimeError,
            "out must not require grad",
        ),
        (
            lambda: torch.ops.genfuse.philox_(torch.empty(3), torch.zeros(2), 1),
            RuntimeError,
            "rng must be a contiguous int64 tensor",
        ),
        (lambda: torch.ops.genfuse.philox_(torch.empty(3), torch.tensor([0, 0]), 5), RuntimeError, "noise must be"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
