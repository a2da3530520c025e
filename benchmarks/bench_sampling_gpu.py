"""The sampling family on an NVIDIA GPU: our Triton kernels against eager PyTorch, torch.compile and a plain copy.

    python benchmarks/report.py sampling_gpu [--write]

Without CUDA every contestant is unavailable. Ours are called by name (`genfuse.use_backend`), because a kernel that has
no results here yet is off in the default dispatch (docs/design/gpu.md says what switches it on). A copy of as many
bytes as the operator has to move is the limit that it is held against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

MILLION = 1 << 20


def need_cuda() -> None:
    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA device")


def on_gpu(make: Callable[[], list[Tensor]], function: Callable[..., Any], backward: bool, ours: bool) -> Work:
    import genfuse

    need_cuda()
    inputs = [tensor.cuda().requires_grad_(backward) for tensor in make()]
    cotangents: list[Tensor] = []

    def call() -> Any:
        if not ours:
            return function(*inputs)
        with genfuse.use_backend("triton"):
            return function(*inputs)

    def work() -> Any:
        if not backward:
            with torch.no_grad():
                return call()
        found = call()
        results = [t for t in (found if isinstance(found, tuple) else (found,)) if t.is_floating_point()]
        if not cotangents:
            cotangents.extend(torch.ones_like(t) for t in results)
        return torch.autograd.grad(results, inputs, cotangents, allow_unused=True)

    return work


def contest(
    make: Callable[[], list[Tensor]],
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    moved: int,
    backward: bool,
    setting: Setting,
) -> Mapping[str, Factory]:
    """`moved`: bytes that the operator has to read and write."""

    def compiled() -> Work:
        need_cuda()
        return on_gpu(make, torch.compile(eager, backend=setting.backend), backward, False)

    def copy() -> Work:
        need_cuda()
        source = torch.empty(max(moved // 8, 1), device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return {
        "genfuse": lambda: on_gpu(make, ours, backward, True),
        "eager": lambda: on_gpu(make, eager, backward, False),
        "torch.compile(eager)": compiled,
        "a copy of as many bytes": copy,
    }


def normals(setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    count = 1000 if setting.quick else 64 * MILLION
    return contest(
        list,
        lambda: ops.philox_normal(count, 1, 2, device="cuda"),
        lambda: torch.randn(count, device="cuda"),
        4 * count,
        False,
        setting,
    )


def gaussian(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    shape = (4, 8) if setting.quick else (8192, 8192)

    def eager(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return z, -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1)

    count = shape[0] * shape[1]
    return contest(
        lambda: [torch.randn(shape), torch.randn(shape)],
        ops.gaussian_rsample_kl,
        eager,
        (12 + 20 * backward) * count,
        backward,
        setting,
    )


def gumbel(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    shape = (2, 4, 8) if setting.quick else (64, 1024, 512)
    count = shape[0] * shape[1] * shape[2]
    return contest(
        lambda: [torch.randn(shape)],
        lambda logits: ops.gumbel_softmax(logits, hard=True),
        lambda logits: F.gumbel_softmax(logits, hard=True),
        (8 + 12 * backward) * count,
        backward,
        setting,
    )


def codes(setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    count, size, dim = (16, 8, 4) if setting.quick else (131072, 1024, 64)

    def eager(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        distances = x.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * x @ codebook.t()
        indices = distances.argmin(1)
        return F.embedding(indices, codebook), indices

    return contest(
        lambda: [torch.randn(count, dim), torch.randn(size, dim)],
        lambda x, codebook: tuple(ops.vector_quantize(x, codebook))[:2],
        eager,
        8 * count * dim,
        False,
        setting,
    )


COPY = {"a copy of as many bytes": 0.85, "torch.compile(eager)": 1.0}
CASES: list[Case] = [
    Case(name="normals-64m", title="64M normals", build=normals, targets=COPY, rtol=None, device="cuda"),
    *(
        Case(
            name=f"rsample-kl-{'backward' if backward else 'forward'}",
            title=f"sample + KL, 8192 x 8192, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(gaussian, backward),
            targets=COPY,
            rtol=None,
            memory=True,
            device="cuda",
        )
        for backward in (False, True)
    ),
    *(
        Case(
            name=f"gumbel-softmax-{'backward' if backward else 'forward'}",
            title=f"Gumbel-softmax hard, 64 x 1024 x 512, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(gumbel, backward),
            targets={"eager": 2.0},
            rtol=None,
            memory=True,
            device="cuda",
        )
        for backward in (False, True)
    ),
    Case(
        name="vector-quantize",
        title="vector_quantize N=131072 K=1024 D=64",
        build=codes,
        targets={"eager": 2.0},
        memory=True,
        memory_targets={"eager": 0.05},
        rtol=None,
        device="cuda",
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
