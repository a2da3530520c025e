"""The masked convolution beside what everybody writes, `F.conv2d(x, weight * mask)`, eager and compiled; and beside the
dense convolution without its mask, which is what the library underneath can do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from bench_sampling import forward
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def contest(
    mask_type: str,
    kernel: tuple[int, int],
    channels: tuple[int, int],
    batch: int,
    side: int,
    last: bool,
    backward: bool,
    of_image: bool,
    setting: Setting,
) -> Mapping[str, Factory]:
    """`of_image`: with the gradient of x; the first layer of a model needs none."""
    inputs, outputs = channels
    if setting.quick:
        inputs, outputs, batch, side = min(inputs, 4), 6, 2, 5

    from genfuse import ops
    from genfuse.reference.masked_conv import live_taps

    mask = live_taps(mask_type, 1, "contiguous", outputs, inputs, kernel).float()
    padding = (kernel[0] // 2, kernel[1] // 2)

    def work(function: Function) -> Work:
        generator = torch.Generator().manual_seed(0)
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch, inputs, side, side, generator=generator).contiguous(memory_format=layout)
        weight = torch.randn(outputs, inputs, *kernel, generator=generator) / (inputs * kernel[0] * kernel[1]) ** 0.5
        bias = torch.randn(outputs, generator=generator)
        if not backward:
            return forward(lambda: function(x, weight, bias))
        cotangent = torch.randn(batch, outputs, side, side, generator=generator).contiguous(memory_format=layout)
        leaves = [tensor.requires_grad_() for tensor in ((x, weight, bias) if of_image else (weight, bias))]
        return lambda: torch.autograd.grad(function(x, weight, bias), leaves, cotangent)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, bias, mask_type)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight * mask, bias, padding=padding)

    def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding)

    def compiled() -> Work:
        torch._dynamo.reset()  # one function is compiled for more shapes, over all the cases, than Dynamo allows
        return work(torch.compile(eager, fullgraph=True, backend=setting.backend))

    return {
        "genfuse": lambda: work(ours),
        "eager": lambda: work(eager),
        "torch.compile(eager)": compiled,
        "dense, unmasked": lambda: work(dense),
    }


def overhead(setting: Setting) -> Mapping[str, Factory]:
    """One number: nothing to compute, so this is dispatch, checks, allocation and autograd bookkeeping."""
    del setting
    x, weight, y = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    leaf = torch.ones(1, 1, 1, 1).requires_grad_()

    from genfuse import ops

    op = torch.ops.genfuse.masked_conv2d.default
    return {
        "torch.ops.genfuse.masked_conv2d": lambda: forward(lambda: op(x, weight, None, 1, 1, False, 0, 0, 1, 1, 1)),
        "genfuse.ops.masked_conv2d": lambda: forward(lambda: ops.masked_conv2d(x, weight)),
        "genfuse.ops.masked_conv2d, forward+backward": lambda: (
            lambda: torch.autograd.grad(ops.masked_conv2d(leaf, weight), leaf, y)
        ),
        "F.conv2d": lambda: forward(lambda: F.conv2d(x, weight)),
        "F.conv2d, forward+backward": lambda: lambda: torch.autograd.grad(F.conv2d(leaf, weight), leaf, y),
    }


# name, mask, kernel, channels, batch, side, whether x has a gradient, the project's promise for forward+backward
LAYERS = [
    ("a-7x7", "A", (7, 7), (3, 128), 16, 32, True, 1.5),
    ("a-7x7-image", "A", (7, 7), (3, 128), 16, 32, False, 1.5),
    ("b-3x3-128", "B", (3, 3), (128, 128), 16, 32, True, 1.5),
    ("b-5x5-256", "B", (5, 5), (128, 256), 8, 32, True, 1.5),
    ("b-3x3-64", "B", (3, 3), (64, 64), 32, 28, True, 1.5),
    ("vertical-3x3", "vertical_B", (3, 3), (64, 128), 32, 28, True, None),
    ("horizontal-1x3", "horizontal_B", (1, 3), (64, 128), 32, 28, True, None),
    ("b-1x1", "B", (1, 1), (64, 64), 32, 28, True, None),
]

CASES: list[Case] = [
    *(
        Case(
            name=f"{name}-{'last' if last else 'first'}-{'backward' if backward else 'forward'}",
            title=f"{mask_type} {kernel[0]}x{kernel[1]}, {channels[0]} -> {channels[1]} channels, {batch} x {side} x "
            f"{side}, channels {'last' if last else 'first'}, "
            f"{'forward' if not backward else 'forward+backward' if of_image else 'forward+backward but for x'}",
            build=functools.partial(contest, mask_type, kernel, channels, batch, side, last, backward, of_image),
            targets={"eager": target} if backward and target is not None else {},
            memory=name == "b-3x3-128" and backward,
            rtol=1e-3,
            unchecked={"dense, unmasked"},
        )
        for name, mask_type, kernel, channels, batch, side, of_image, target in LAYERS
        for last in (False, True)
        for backward in (False, True)
        if backward or of_image
    ),
    Case(
        name="overhead-masked-conv",
        title="One call of a masked convolution of one number",
        build=overhead,
        ours=None,
        group="overhead_us",
        # Room for a machine of half this speed, as of bench_recurrent's.
        bounds_us={
            "torch.ops.genfuse.masked_conv2d": 25.0,
            "genfuse.ops.masked_conv2d": 50.0,
            "genfuse.ops.masked_conv2d, forward+backward": 200.0,
        },
        rtol=None,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
