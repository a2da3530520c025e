"""Masked convolutions, gates and likelihoods of pixels on an NVIDIA GPU: our Triton kernels against cuDNN's dense
convolution of masked weights, eager PyTorch, torch.compile and a plain copy.

    python benchmarks/report.py masked_conv_gpu [--write]

Without CUDA every contestant is unavailable. Ours are called by name (`genfuse.use_backend`), because a kernel that has
no results here yet is off in the default dispatch (docs/design/masked_conv-gpu.md). A copy of as many bytes as the
operator has to move is the limit that the layers bound by memory are held against. Convolutions are in the precisions
that people train in: bfloat16, and float32 by TF32, which torch allows in convolutions unless told otherwise; in
channels_last, which tensor cores read as it lies, and contiguous, where the contiguous cases end in "contiguous".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from bench_sampling_gpu import contest, need_cuda
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

# Name: mask, kernel, inputs, outputs, size, batch.
CONVOLUTIONS: dict[str, tuple[str, int, int, int, int, int]] = {
    "A-7x7-3-128": ("A", 7, 3, 128, 32, 16),
    "B-3x3-128-128": ("B", 3, 128, 128, 32, 16),
    "B-5x5-128-256": ("B", 5, 128, 256, 32, 8),
    "B-3x3-64-64": ("B", 3, 64, 64, 28, 32),
}


def convolution(name: str, dtype: torch.dtype, last: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops
    from genfuse.reference.masked_conv import live_taps

    mask, kernel, inputs, outputs, size, batch = CONVOLUTIONS[name]
    if setting.quick:
        outputs, inputs, size, batch = 8, min(inputs, 8), 6, 2
    layout = torch.channels_last if last else torch.contiguous_format

    def make() -> list[Tensor]:
        x, weight = torch.randn(batch, inputs, size, size), 0.1 * torch.randn(outputs, inputs, kernel, kernel)
        return [x.to(dtype, memory_format=layout), weight.to(dtype), torch.randn(outputs).to(dtype)]

    @functools.cache
    def live() -> Tensor:
        return live_taps(mask, 1, "contiguous", outputs, inputs, (kernel, kernel)).to("cuda", dtype)

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight * live(), bias, padding=kernel // 2)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, bias, mask)

    # x and y once forward; backward x, y's gradient twice, and the gradient of x.
    numbers = batch * size * size * (inputs + outputs)
    moved = numbers * dtype.itemsize * (3 if backward else 1)
    return contest(make, ours, dense, moved, backward, setting)


def gate(last: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    batch, channels, size = (
        (2, 8, 4)
        if setting.quick
        else (
            128,
            256,
            32,
        )
    )
    layout = torch.channels_last if last else torch.contiguous_format
    shape = batch, channels, size, size

    def eager(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    count = torch.Size(shape).numel()
    # x and half of it; backward x, half of it, and x's gradient.
    moved = 4 * count * 3 // 2 + backward * 4 * count * 5 // 2
    return contest(
        lambda: [torch.randn(shape).contiguous(memory_format=layout)],
        ops.gated_activation, eager, moved, backward, setting,
    )  # fmt: skip


def concat_elu(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    shape = (2, 8, 4, 4) if setting.quick else (128, 160, 32, 32)
    count = torch.Size(shape).numel()
    return contest(
        lambda: [torch.randn(shape)],
        ops.concat_elu,
        lambda x: F.elu(torch.cat([x, -x], 1)),
        4 * count * (3 + 4 * backward),
        backward,
        setting,
    )


def mixture(batch: int, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """Pixels of RGB under ten components; only the parameters take a gradient."""
    from genfuse import ops
    from genfuse.reference.likelihood import discretized_logistic_mixture_nll as reference

    size, components = (3, 2) if setting.quick else (32, 10)
    batch = 2 if setting.quick else batch

    @functools.cache
    def pixels() -> Tensor:
        need_cuda()
        return (torch.randint(0, 256, (batch, 3, size, size), device="cuda") * 2.0 - 255.0) / 255.0

    count = batch * size * size
    moved = 4 * count * (3 + 10 * components) + backward * 4 * count * (3 + 20 * components)
    return contest(
        lambda: [torch.randn(batch, 10 * components, size, size)],
        lambda params: ops.discretized_logistic_mixture_nll(pixels(), params),
        lambda params: reference(pixels(), params, 8, False, "openai", -7.0, False)[0],
        moved,
        backward,
        setting,
    )


def categorical(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops

    batch, levels, size = (2, 8, 3) if setting.quick else (64, 256, 28)

    @functools.cache
    def target() -> Tensor:
        need_cuda()
        return torch.randint(0, levels, (batch, size, size), device="cuda")

    def eager(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, target(), reduction="none").flatten(1).sum(1)

    count = batch * levels * size * size
    return contest(
        lambda: [torch.randn(batch, levels, size, size)],
        lambda logits: ops.categorical_nll(logits, target()),
        eager,
        4 * count * (1 + 2 * backward),
        backward,
        setting,
    )


def training_step(setting: Setting) -> Mapping[str, Factory]:
    """A Gated PixelCNN of 28 x 28 pixels and 64 channels, 32 images."""
    config: dict[str, Any] = {"channels": 8, "num_layers": 2} if setting.quick else {"channels": 64, "num_layers": 8}
    batch, size = (2, 8) if setting.quick else (32, 28)

    def stepping(model: torch.nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Work:
        x = torch.randint(0, 256, (batch, 1, size, size), device="cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

        def step() -> Any:
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(x)
            loss.backward()
            optimizer.step()
            return loss

        return step

    def ours() -> Work:
        import genfuse
        from genfuse import models

        need_cuda()
        model = models.GatedPixelCNN(1, size, **config).cuda()
        step = stepping(model, model.loss)

        def work() -> Any:
            with genfuse.use_backend("triton"):
                return step()

        return work

    def twin(compiled: bool) -> Work:
        from genfuse.reference.masked_conv import models as twins

        need_cuda()
        model = twins.GatedPixelCNN(1, size, **config).cuda()
        loss = torch.compile(model.loss, backend=setting.backend) if compiled else model.loss
        return stepping(model, loss)

    return {
        "genfuse": ours,
        "plain-PyTorch twin": functools.partial(twin, False),
        "torch.compile(plain-PyTorch twin)": functools.partial(twin, True),
    }


DENSE, COPY, COMPILED = "eager", "a copy of as many bytes", "torch.compile(eager)"
DIRECTIONS = ((False, "forward"), (True, "forward+backward"))


def case(name: str, title: str, build: Callable[..., Any], targets: dict[str, float]) -> Case:
    return Case(name=name, title=title, build=build, targets=targets, rtol=None, memory=True, device="cuda")


CASES: list[Case] = [
    *(
        case(
            f"conv-{name}-{str(dtype).removeprefix('torch.')}-{direction}{'' if last else '-contiguous'}",
            f"masked conv {name}, {'bfloat16' if dtype == torch.bfloat16 else 'TF32'}, {direction}"
            f"{'' if last else ', contiguous'}",
            functools.partial(convolution, name, dtype, last, backward),
            {DENSE: 1.0},
        )
        for name in CONVOLUTIONS
        for dtype in (torch.bfloat16, torch.float32)
        for last in (True, False)
        for backward, direction in DIRECTIONS
        if last or name == "B-3x3-128-128"
    ),
    *(
        case(
            f"gate-{direction}{'-channels-last' if last else ''}",
            f"gate 128x256x32x32, {direction}{', channels last' if last else ''}",
            functools.partial(gate, last, backward),
            {COPY: 0.8},
        )
        for last in (False, True)
        for backward, direction in DIRECTIONS
    ),
    *(
        case(
            f"concat-elu-{direction}",
            f"concat_elu 128x160x32x32, {direction}",
            functools.partial(concat_elu, backward),
            {COPY: 0.8},
        )
        for backward, direction in DIRECTIONS
    ),
    *(
        case(
            f"mixture-{batch}-{direction}",
            f"mixture of logistics {batch}x3x32x32, M=10, {direction}",
            functools.partial(mixture, batch, backward),
            {COMPILED: 3.0},
        )
        for batch in (16, 256)
        for backward, direction in DIRECTIONS
    ),
    *(
        case(
            f"categorical-{direction}",
            f"256 levels 64x28x28, {direction}",
            functools.partial(categorical, backward),
            {COPY: 0.8},
        )
        for backward, direction in DIRECTIONS
    ),
    Case(
        name="gated-pixelcnn-step",
        title="Gated PixelCNN training step, 28x28, 64 channels, 8 layers, B=32",
        build=training_step,
        targets={"plain-PyTorch twin": 1.5, "torch.compile(plain-PyTorch twin)": 1.1},
        rtol=None,
        device="cuda",
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
