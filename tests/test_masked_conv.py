"""The masked convolution: equal to the convolution with a masked weight, blind to the future, indifferent to layout,
size and threads.

(What is asked of every operator is in test_operators.py, the options in masked_conv_cases.py.)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from genfuse import nn, ops
from genfuse.reference.masked_conv import live_taps
from operator_cases import Problem, check
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

close = torch.testing.assert_close
MASKS = ("A", "B", "vertical", "vertical_A", "vertical_B", "horizontal", "horizontal_A", "horizontal_B")
LAST = torch.channels_last


def mask_of(
    weight: Tensor, mask_type: str, channel_groups: int = 1, channel_order: str = "contiguous", groups: int = 1
) -> Tensor:
    """`live_taps` for a weight [O, I / groups, kh, kw]."""
    outputs, each, *size = weight.shape
    live = live_taps(mask_type, channel_groups, channel_order, outputs, each * groups, size)
    count = outputs // groups
    return torch.cat([live[g * count : (g + 1) * count, g * each : (g + 1) * each] for g in range(groups)])


def masked(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, **options: Any) -> Tensor:
    """What everybody writes."""
    return F.conv2d(x, weight * mask, bias, **options)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """The result and the gradients of all inputs."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    there = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, there, cotangent, materialize_grads=True)]


def compose(last: Callable[[Tensor], Tensor], first: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: last(first(*tensors, **options))


# ---- the masks -------------------------------------------------------------------------------------------------------


def rows(mask: Tensor) -> list[str]:
    return ["".join(str(int(tap)) for tap in row) for row in mask]


def test_the_masks_of_the_papers() -> None:
    """Figure 2 of arXiv 1601.06759, figure 1 of 1606.05328. (A type B without the centre's row is j-min/PixelCNN#3.)"""
    expected = {
        "A": ["11111", "11111", "11000", "00000", "00000"],
        "B": ["11111", "11111", "11100", "00000", "00000"],
        "vertical_A": ["11111", "11111", "00000", "00000", "00000"],
        "vertical_B": ["11111", "11111", "11111", "00000", "00000"],
        "horizontal_A": ["00000", "00000", "11000", "00000", "00000"],
        "horizontal_B": ["00000", "00000", "11100", "00000", "00000"],
    }
    expected |= {"vertical": expected["vertical_A"], "horizontal": expected["horizontal_A"]}
    for mask_type in MASKS:
        for kernel in (5, (5, 5), [5, 5], torch.Size((5, 5))):
            assert rows(live_taps(mask_type, 1, "contiguous", 1, 1, kernel)[0, 0]) == expected[mask_type]
    assert rows(live_taps("A", 1, "contiguous", 1, 1, (1, 3))[0, 0]) == ["100"]
    assert rows(live_taps("B", 1, "contiguous", 1, 1, (3, 1))[0, 0]) == ["1", "1", "0"]


def test_the_colours_of_the_papers() -> None:
    """R sees nothing of its pixel, G sees R, B sees both; by thirds, and every third (anordertoreclaim/PixelCNN)."""
    thirds = ["000000", "000000", "110000", "110000", "111100", "111100"]
    assert rows(live_taps("A", 3, "contiguous", 6, 6, 3)[:, :, 1, 1]) == thirds
    thirds = ["110000", "110000", "111100", "111100", "111111", "111111"]
    assert rows(live_taps("B", 3, "contiguous", 6, 6, 1)[:, :, 0, 0]) == thirds
    every = ["000000", "100100", "110110", "000000", "100100", "110110"]
    assert rows(live_taps("A", 3, "interleaved", 6, 6, 3)[:, :, 1, 1]) == every
    every = ["100100", "110110", "111111", "100100", "110110", "111111"]
    assert rows(live_taps("horizontal_B", 3, "interleaved", 6, 6, 3)[:, :, 1, 1]) == every
    for mask_type in MASKS:  # only the centre knows colours
        live, one = live_taps(mask_type, 3, "interleaved", 6, 6, 3), live_taps(mask_type, 1, "contiguous", 6, 6, 3)
        live[:, :, 1, 1] = one[:, :, 1, 1] = True
        assert torch.equal(live, one)
    # Channels that are no multiple of the groups: channel c of C is of group c G // C.
    assert rows(live_taps("B", 3, "contiguous", 4, 4, 1)[:, :, 0, 0]) == ["1100", "1100", "1110", "1111"]
    assert rows(live_taps("A", 3, "contiguous", 6, 3, 1)[:, :, 0, 0]) == ["000", "000", "100", "100", "110", "110"]


# ---- equal to a masked weight ----------------------------------------------------------------------------------------


def any_problem(pick: random.Random) -> dict[str, Any] | None:
    """A convolution by chance: small and large kernels, channels around the widths of vectors, narrow images."""
    groups = pick.choice([1, 1, 1, 2, 3])
    each_in, each_out = pick.choice([1, 2, 3, 5, 8, 9, 16, 17, 33]), pick.choice([1, 2, 3, 5, 16, 17, 40, 65])
    kernel = pick.choice([1, 3, 5, 7]), pick.choice([1, 3, 5])
    dilation = pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2])
    padding: Any = pick.choice(["same", "same", "valid", (pick.randrange(9), pick.randrange(9))])
    size = pick.choice([1, 2, 3, 7, 11, 20]), pick.choice([1, 2, 3, 8, 13, 17, 33])
    if padding != "same":
        border = (0, 0) if padding == "valid" else padding
        if any(n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, border, dilation, kernel, strict=True)):
            return None
    shape = (pick.choice([1, 2, 5]), groups * each_in, *size)
    wide = (shape[0], 2 * shape[1], *size)
    x = {
        "contiguous": lambda: torch.randn(shape, dtype=torch.float64),
        "last": lambda: torch.randn(shape, dtype=torch.float64).to(memory_format=LAST),
        "half": lambda: torch.randn(wide, dtype=torch.float64)[:, shape[1] :],
        "half, last": lambda: torch.randn(wide, dtype=torch.float64).to(memory_format=LAST)[:, : shape[1]],
        "turned": lambda: torch.randn(shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0),
    }[pick.choice(["contiguous", "last", "half", "half, last", "turned"])]()
    return {
        "x": x,
        "weight": torch.randn(groups * each_out, each_in, *kernel, dtype=torch.float64),
        "bias": torch.randn(groups * each_out, dtype=torch.float64) if pick.random() < 0.7 else None,
        "mask_type": pick.choice(MASKS),
        "channel_groups": pick.choice([1, 1, 2, 3]),
        "channel_order": pick.choice(["contiguous", "interleaved"]),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


@pytest.mark.parametrize("seed", range(3))
def test_any_problem_equals_the_masked_weight(seed: int) -> None:
    """Forward and every gradient. Dead weights are NaN, and have gradients of exactly 0."""
    pick = random.Random(seed)
    for _ in range(25):
        problem = any_problem(pick)
        if problem is None:
            continue
        x, weight, bias = problem.pop("x"), problem.pop("weight"), problem.pop("bias")
        names = ("mask_type", "channel_groups", "channel_order", "groups")
        mask = mask_of(weight, **{name: problem[name] for name in names})
        padding, dilation = problem["padding"], problem["dilation"]
        if padding == "same":
            padding = tuple(d * (k // 2) for d, k in zip(dilation, weight.shape[2:], strict=True))
        options = {"padding": 0 if padding == "valid" else padding, "dilation": dilation, "groups": problem["groups"]}
        last = pick.random() < 0.5

        def turned(y: Tensor, last: bool = last) -> Tensor:
            """So that the gradient arrives channels last, or not."""
            return y.to(memory_format=LAST if last else torch.contiguous_format)

        poisoned = torch.where(mask, weight, torch.nan)
        ours = with_gradients(compose(turned, ops.masked_conv2d, **problem), x, poisoned, bias)
        theirs = with_gradients(compose(turned, masked, mask=mask, **options), x, weight, bias)
        close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert not ours[2][~mask].any()


LAYERS = [  # that people use, and what a tile, a strip and a part of a batch leave over
    ("A", (3, 3, 9, 11), (20, 3, 7, 7), torch.float32),
    ("A", (1, 1, 28, 28), (64, 1, 7, 7), torch.float32),
    ("B", (2, 64, 7, 9), (64, 64, 3, 3), torch.float32),
    ("B", (1, 96, 24, 33), (40, 96, 3, 3), torch.float32),
    ("B", (2, 20, 7, 9), (30, 20, 3, 3), torch.bfloat16),
    ("vertical_B", (1, 32, 14, 14), (64, 32, 3, 3), torch.float32),
    ("horizontal_B", (1, 32, 14, 14), (64, 32, 1, 3), torch.float16),
    ("B", (2, 40, 7, 7), (130, 40, 1, 1), torch.float32),
]


@pytest.mark.parametrize(("mask_type", "image", "kernel", "dtype"), LAYERS)
def test_layers_are_as_accurate_as_pytorch(
    mask_type: str, image: tuple[int, ...], kernel: tuple[int, ...], dtype: torch.dtype
) -> None:
    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(size, dtype=torch.float64)).to(dtype)

    inputs = {"x": normal(*image), "weight": normal(*kernel, std=0.1), "bias": normal(kernel[0])}
    check(Problem("masked_conv2d", inputs, {"mask_type": mask_type}))


@pytest.mark.parametrize("threads", [2, 5, 13])
def test_threads_make_no_difference(threads: int) -> None:
    """With strips, parts of the batch, and more threads than parts."""
    before = torch.get_num_threads()
    cases = [
        ((9, 24, 17, 19), (40, 24, 3, 3), 1),
        ((1, 130, 41, 33), (33, 130, 3, 3), 1),
        ((11, 3, 12, 12), (24, 3, 5, 5), 3),
    ]
    try:
        for image, kernel, colours in cases:
            x, weight, bias = torch.randn(image), torch.randn(kernel), torch.randn(kernel[0])
            found = []
            for count in (1, threads):
                torch.set_num_threads(count)
                found.append(
                    with_gradients(
                        lambda x, w, b, g=colours: ops.masked_conv2d(x, w, b, channel_groups=g), x, weight, bias
                    )
                )
            assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- causality -------------------------------------------------------------------------------------------------------

CAUSAL = [
    (mask_type, colours, order, kernel)
    for mask_type, kernel in (
        ("A", (3, 3)),
        ("B", (5, 3)),
        ("vertical_A", (3, 5)),
        ("vertical_B", (3, 3)),
        ("horizontal_A", (3, 3)),
        ("horizontal_B", (1, 5)),
        ("B", (1, 1)),
    )
    for colours, order in ((1, "contiguous"), (3, "contiguous"), (3, "interleaved"))
]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("mask_type", "colours", "order", "kernel"), CAUSAL)
def test_no_number_from_the_future(
    mask_type: str, colours: int, order: str, kernel: tuple[int, int], poison: float
) -> None:
    """One element of x is NaN or infinite, and what does not see it keeps its bits; backward, one of y's gradient is,
    and what it does not see does."""
    x, weight, bias = torch.randn(2, 6, 5, 4), torch.randn(7, 6, *kernel), torch.randn(7)
    options = {"mask_type": mask_type, "channel_groups": colours, "channel_order": order}
    mask = mask_of(weight, mask_type, colours, order).double()
    x.requires_grad_()
    y = ops.masked_conv2d(x, weight, bias, **options)
    cotangent = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    border = (kernel[0] // 2, kernel[1] // 2)
    for c, r, s in ((0, 0, 0), (3, 2, 1), (5, 2, 2), (2, 4, 3), (4, 3, 0)):
        one = torch.zeros(2, 6, 5, 4, dtype=torch.float64)
        one[1, c, r, s] = 1.0
        sees = F.conv2d(one, mask, padding=border) > 0
        spoiled = x.detach().clone()
        spoiled[1, c, r, s] = poison
        for layout in (torch.contiguous_format, LAST):
            found = ops.masked_conv2d(spoiled.contiguous(memory_format=layout), weight, bias, **options)
            assert torch.equal(found[~sees], y[~sees])
            assert not found[sees].isfinite().any()
        one = torch.zeros(2, 7, 5, 4, dtype=torch.float64)
        one[1, c, r, s] = 1.0
        seen = F.conv_transpose2d(one, mask, padding=border) > 0
        spoiled = cotangent.clone()
        spoiled[1, c, r, s] = poison
        (found,) = torch.autograd.grad(y, x, spoiled, retain_graph=True)
        assert torch.equal(found[~seen], gradient[~seen])
        assert not found[seen].isfinite().any()


@pytest.mark.parametrize(("mask_type", "colours", "order", "kernel"), CAUSAL)
def test_the_support_of_the_jacobian_is_the_mask(
    mask_type: str, colours: int, order: str, kernel: tuple[int, int]
) -> None:
    x, weight = torch.randn(1, 3, 4, 3, dtype=torch.float64), torch.randn(6, 3, *kernel, dtype=torch.float64)
    options = {"mask_type": mask_type, "channel_groups": colours, "channel_order": order}
    jacobian = torch.autograd.functional.jacobian(lambda x: ops.masked_conv2d(x, weight, **options), x)[0, :, :, :, 0]
    reach = (kernel[0] // 2, kernel[1] // 2)
    expected = torch.zeros(6, 4, 3, 3, 4, 3, dtype=torch.bool)
    live = live_taps(mask_type, colours, order, 6, 3, kernel)
    for r in range(4):
        for s in range(3):
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    row, column = r + i - reach[0], s + j - reach[1]
                    if 0 <= row < 4 and 0 <= column < 3:
                        expected[:, r, s, :, row, column] = live[:, :, i, j]
    assert torch.equal(jacobian != 0, expected)


# ---- taps beyond the image -------------------------------------------------------------------------------------------

FAR = [  # dilation, padding, image
    ((9, 9), "same", (8, 8)),
    ((7, 9), "same", (8, 8)),
    ((9, 5), (12, 7), (8, 6)),  # rows of the result that see the image through the outer taps alone
    ((9, 1), (6, 1), (8, 8)),  # the rows at the border of the image are not seen
    ((8192, 8192), "same", (8, 8)),
    ((8192, 1), "same", (8, 8)),
    ((1, 1 << 20), "same", (5, 8)),
    ((1 << 20, 1 << 20), ((1 << 20) + 3, (1 << 20) - 2), (8, 9)),
    ((1 << 24, 1 << 24), "same", (8, 8)),
    ((1 << 24, 2), "same", (1, 9)),
]


def near(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """A convolution of 3 x 3 whose outer taps are left out where they are far off: the centre's row or column alone."""
    weight, border, step = weight * mask, list(padding), list(dilation)
    for axis in (0, 1):
        if dilation[axis] > 1000:
            weight = weight.narrow(2 + axis, 1, 1)
            border[axis] -= dilation[axis]
            step[axis] = 1
    x = F.pad(x, (border[1], border[1], border[0], border[0]))  # a negative one is cut off
    return F.conv2d(x, weight, bias, dilation=step)


@pytest.mark.parametrize("mask_type", ["A", "B", "vertical_A", "vertical_B", "horizontal_B"])
@pytest.mark.parametrize(("dilation", "padding", "image"), FAR)
def test_taps_beyond_the_image(
    dilation: tuple[int, int], padding: str | tuple[int, int], image: tuple[int, int], mask_type: str
) -> None:
    """They see nothing but padding: they take no memory, and their gradients are exactly 0."""
    border = dilation if isinstance(padding, str) else padding
    for channels, outputs, colours in ((2, 4, 1), (20, 33, 1), (3, 6, 3)):
        x, bias = torch.randn(2, channels, *image, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)
        weight = torch.randn(outputs, channels, 3, 3, dtype=torch.float64)
        mask = mask_of(weight, mask_type, colours)
        options = {"mask_type": mask_type, "channel_groups": colours, "padding": padding, "dilation": dilation}
        ours = with_gradients(lambda *t, o=options: ops.masked_conv2d(*t, **o), x, weight, bias)
        theirs = with_gradients(lambda *t, m=mask: near(*t, mask=m, padding=border, dilation=dilation), x, weight, bias)
        close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert not ours[2][theirs[2] == 0].any()


# ---- where the numbers lie -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 40])
def test_the_memory_format_is_kept(channels: int, compiled: bool) -> None:
    torch._dynamo.reset()
    call = torch.compile(ops.masked_conv2d, backend="aot_eager", fullgraph=True) if compiled else ops.masked_conv2d
    for x_last, weight_last in ((False, False), (True, False), (False, True), (True, True)):
        x = torch.randn(2, channels, 6, 5).contiguous(memory_format=LAST if x_last else torch.contiguous_format)
        weight = torch.randn(8, channels, 3, 3)
        weight = weight.contiguous(memory_format=LAST if weight_last else torch.contiguous_format)
        with FakeTensorMode() as mode:
            fake = ops.masked_conv2d(mode.from_tensor(x), mode.from_tensor(weight))
        x.requires_grad_()
        y = call(x, weight)
        assert fake.stride() == y.stride()
        last = (x_last and channels > 1) or (weight_last and channels > 1)
        assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.stride() == x.stride() or channels == 1
        close(y, masked(x, weight, None, mask_of(weight, "B"), padding=1))


def test_a_part_of_the_channels_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk, a slice of the batch, a crop: read where they lie, in both formats."""
    weight = torch.randn(3, 4, 3, 3)
    for layout in (torch.contiguous_format, LAST):
        whole = torch.randn(4, 8, 7, 9).contiguous(memory_format=layout)
        for part in (whole[:, 4:], whole[::2, :4], whole[:, 2:6, 1:-1, 2:], whole[:1, :4].expand(3, -1, -1, -1)):
            expected = ops.masked_conv2d(part.contiguous(), weight)
            with torch.profiler.profile() as profile:
                y = ops.masked_conv2d(part, weight)
            assert torch.equal(y, expected)
            assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {e.key for e in profile.key_averages()}


def test_the_parameter_is_never_written_and_backward_keeps_the_inputs_alone() -> None:
    x, weight, bias = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    before, version = weight.clone(), weight._version
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.masked_conv2d(*leaves)
    y.sum().backward()
    assert torch.equal(weight, before)
    assert weight._version == version
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in leaves}


# ---- dtypes, compilers, errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_lowers_as_a_convolution_is_lowered(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 5, 6, 6), torch.randn(7, 5, 3, 3), torch.randn(7)
    expected = ops.masked_conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    with torch.autocast("cpu", dtype=dtype):
        assert F.conv2d(x, weight).dtype == dtype
        y = ops.masked_conv2d(*leaves)
        mixed = ops.masked_conv2d(x.to(dtype), weight, bias)  # as float32 parameters meet a half activation
        direct = torch.ops.genfuse.masked_conv2d(*leaves, 1, 1, False, 1, 1, 1, 1, 1)
        assert ops.masked_conv2d(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(direct, expected)
    assert torch.equal(mixed, expected)
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3


def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.masked_conv2d(x, weight, bias, "A", channel_groups=3).relu()
    return ops.masked_conv2d(y, weight.transpose(0, 1), padding=(2, 1), dilation=(2, 1))


def test_compiles_once_for_all_sizes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(6, 3, 3, 3), torch.randn(6)
    for shape in ((2, 3, 8, 9), (5, 3, 8, 9), (4, 3, 12, 7), (3, 3, 5, 31)):
        x = torch.randn(shape)
        close(with_gradients(compiled, x, weight, bias), with_gradients(step, x, weight, bias))
    assert counter.frame_count == 1


def test_exports_with_a_dynamic_batch() -> None:
    layer = torch.nn.Sequential(nn.MaskedConv2d("A", 1, 4, 5), torch.nn.ReLU(), nn.MaskedConv2d("B", 4, 2, 3))
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(3, 1, 6, 6),), dynamic_shapes=({0: batch},))
        for size in (2, 9):
            x = torch.randn(size, 1, 6, 6)
            close(program.module()(x), layer(x))


X, W = torch.zeros(2, 4, 5, 6), torch.zeros(3, 4, 3, 3)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "x must be a Tensor, got list", lambda: ops.masked_conv2d([1.0], W)),
        (TypeError, "weight must be a Tensor, got NoneType", lambda: ops.masked_conv2d(X, None)),
        (ValueError, "x must be of a floating dtype .*got torch.int64", lambda: ops.masked_conv2d(X.long(), W)),
        (RuntimeError, "weight must be torch.float32, the dtype of x", lambda: ops.masked_conv2d(X, W.double())),
        (RuntimeError, r"x must be \[B, I, H, W\] or \[I, H, W\], got \[5, 6\]", lambda: ops.masked_conv2d(X[0, 0], W)),
        (RuntimeError, r"weight must be \[O, 4, kh, kw\].*got \[3, 2, 3, 3\]", lambda: ops.masked_conv2d(X, W[:, :2])),
        (RuntimeError, r"weight must be \[O, 2, kh, kw\]", lambda: ops.masked_conv2d(X, W, groups=2)),
        (RuntimeError, "groups must divide the 4 channels of x, got 3", lambda: ops.masked_conv2d(X, W, groups=3)),
        (RuntimeError, "groups must divide the 3 outputs", lambda: ops.masked_conv2d(X, W[:, :2], groups=2)),
        (ValueError, "groups must be at least 1, got 0", lambda: ops.masked_conv2d(X, W, groups=0)),
        (TypeError, "groups must be an int, got float", lambda: ops.masked_conv2d(X, W, groups=1.0)),
        (ValueError, "weight must have an odd kernel.*got 3 x 2", lambda: ops.masked_conv2d(X, W[..., :2])),
        (RuntimeError, r"bias must be \[3\].*got \[4\]", lambda: ops.masked_conv2d(X, W, X[0, :, 0, 0])),
        (RuntimeError, "bias must be torch.float32", lambda: ops.masked_conv2d(X, W, torch.zeros(3).half())),
        (ValueError, "mask_type must be one of 'A', 'B'.*got 'C'", lambda: ops.masked_conv2d(X, W, mask_type="C")),
        (ValueError, "mask_type must be one of.*got 1", lambda: ops.masked_conv2d(X, W, mask_type=1)),
        (ValueError, "channel_order must be 'contiguous' or 'interleaved', got 'rgb'",
         lambda: ops.masked_conv2d(X, W, channel_order="rgb")),
        (ValueError, "channel_groups must be at least 1, got 0", lambda: ops.masked_conv2d(X, W, channel_groups=0)),
        (ValueError, "channel_groups must be at most 65536, got 65537",
         lambda: ops.masked_conv2d(X, W, channel_groups=65537)),
        (TypeError, "channel_groups must be an int, got bool", lambda: ops.masked_conv2d(X, W, channel_groups=True)),
        (ValueError, "padding must be at least 0, got -1", lambda: ops.masked_conv2d(X, W, padding=-1)),
        (ValueError, "padding must be 'same', 'valid', an int", lambda: ops.masked_conv2d(X, W, padding="full")),
        (ValueError, "padding must be.*got \\(1, 1, 1\\)", lambda: ops.masked_conv2d(X, W, padding=(1, 1, 1))),
        (TypeError, "padding must be.*got float", lambda: ops.masked_conv2d(X, W, padding=1.0)),
        (TypeError, "dilation must be an int, got str", lambda: ops.masked_conv2d(X, W, dilation=(1, "1"))),
        (ValueError, "dilation must be at least 1, got 0", lambda: ops.masked_conv2d(X, W, dilation=(0, 1))),
        (RuntimeError, "x must have at least the kernel's extent 7 in H with its padding 0 on both sides, got 5",
         lambda: ops.masked_conv2d(X, W, dilation=3, padding=0)),
        (ValueError, "dilation must be at most 16777216, got 16777217",
         lambda: ops.masked_conv2d(X, W, dilation=(1, (1 << 24) + 1))),
        (ValueError, "dilation must be at most 16777216, got", lambda: ops.masked_conv2d(X, W, dilation=1 << 61)),
        (ValueError, "dilation must be at most 16777216, got", lambda: ops.masked_conv2d(X, W, dilation=1 << 80)),
        (ValueError, "padding must be at most 16777216, got", lambda: ops.masked_conv2d(X, W, padding=(1 << 62, 1))),
        (ValueError, "padding must be at most 16777216, got 33554432",
         lambda: ops.masked_conv2d(X, torch.zeros(3, 4, 1, 5), dilation=1 << 24)),
    ],
)  # fmt: skip
def test_what_is_wrong(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=f"masked_conv2d: {message}"):
        call()


def test_the_operators_check_for_themselves() -> None:
    op, backward = torch.ops.genfuse.masked_conv2d.default, torch.ops.genfuse.masked_conv2d_backward.default
    good: tuple[Any, ...] = (1, 1, False, 1, 1, 1, 1, 1)
    assert op(X, W, None, *good).shape == (2, 3, 5, 6)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("x must have shape", (X[0], W, None, *good)),
        ("weight must have shape", (X, W[:, :2], None, *good)),
        ("weight must have shape", (X, W[0], None, *good)),
        ("an odd kernel", (X, W[..., :2], None, *good)),
        ("bias must have shape", (X, W, torch.zeros(4), *good)),
        ("weight must have the dtype of x", (X, W.double(), None, *good)),
        ("mask must be from 0 to 5", (X, W, None, 6, *good[1:])),
        ("mask must be from 0 to 5", (X, W, None, -1, *good[1:])),
        ("channel_groups must be from 1", (X, W, None, 1, 0, *good[2:])),
        ("channel_groups must be from 1", (X, W, None, 1, 1 << 40, *good[2:])),
        ("padding must not be negative", (X, W, None, 1, 1, False, -1, 1, 1, 1, 1)),
        ("dilation be positive", (X, W, None, 1, 1, False, 1, 1, 1, 0, 1)),
        ("dilation must be at most 16777216, got 1 and 16777217", (X, W, None, 1, 1, False, 1, 1, 1, (1 << 24) + 1, 1)),
        ("dilation must be at most", (X, W, None, 1, 1, False, 1 << 61, 1 << 61, 1 << 61, 1 << 61, 1)),
        ("dilation must be at most", (X, W, None, 1, 1, False, 1 << 58, 8, 1 << 58, 8, 1)),
        ("padding must be at most 16777216, got 1 and 16777217", (X, W, None, 1, 1, False, 1, (1 << 24) + 1, 1, 1, 1)),
        ("padding must be at most", (X, W, None, 1, 1, False, 1 << 62, 1, 1, 1, 1)),
        ("a kernel of at most 16777216", (X, torch.zeros(0, 4, 1, (1 << 24) + 1), None, 1, 1, False, 0, 0, 1, 1, 1)),
        ("groups must divide", (X, W, None, 1, 1, False, 1, 1, 1, 1, 3)),
        ("groups must divide", (X, W, None, 1, 1, False, 1, 1, 1, 1, 0)),
        ("the kernel's extent", (X, W, None, 1, 1, False, 0, 0, 3, 1, 1)),
    ]
    for message, arguments in wrong:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
        with pytest.raises(RuntimeError, match=message):
            backward(None, *arguments, 7)
    with pytest.raises(RuntimeError, match="grad_y must have shape"):
        backward(torch.zeros(2, 3, 5, 5), X, W, None, *good, 7)


# ---- the layer -------------------------------------------------------------------------------------------------------


def test_the_layer_is_a_convolution_with_a_mask() -> None:
    plain = torch.nn.Conv2d(6, 9, (3, 5), padding="same", groups=3)
    layer = nn.MaskedConv2d("B", 6, 9, (3, 5), groups=3, channel_groups=3)
    assert isinstance(layer, torch.nn.Conv2d)
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 6, 7, 4)
    mask = mask_of(plain.weight, "B", 3, groups=3)
    expected = masked(x, plain.weight, plain.bias, mask, padding=(1, 2), groups=3)
    close(layer(x), expected)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~mask].any()
    assert layer.weight.grad[mask].all()
    close(copy.deepcopy(layer)(x), expected)
    close(layer(x[1]), expected[1])  # one image, as torch's layer takes it
    torch.manual_seed(3)
    first = nn.MaskedConv2d("A", 3, 4, 5, dilation=2, padding=3, bias=False, dtype=torch.float64)
    torch.manual_seed(3)
    second = torch.nn.Conv2d(3, 4, 5, dilation=2, padding=3, bias=False, dtype=torch.float64)
    assert torch.equal(first.weight, second.weight)
    assert first.bias is None
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    close(first(x), masked(x, second.weight, None, mask_of(second.weight, "A"), dilation=2, padding=3))
    last = first.to(memory_format=LAST)
    assert last(x).is_contiguous(memory_format=LAST)
    assert repr(first).startswith("MaskedConv2d('A', 3, 4, kernel_size=(5, 5), stride=(1, 1)")
    assert "channel_groups=3, channel_order='contiguous'" in repr(layer)
    assert genfuse.explain("masked_conv2d", x, last.weight).backend == "native"


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "MaskedConv2d: mask_type must be one of", {"mask_type": "b"}),
        (ValueError, "MaskedConv2d: stride must be 1, got 2", {"stride": 2}),
        (ValueError, "MaskedConv2d: padding_mode must be 'zeros', got 'reflect'", {"padding_mode": "reflect"}),
        (ValueError, "MaskedConv2d: kernel_size must be odd, got 4", {"kernel_size": 4}),
        (ValueError, "MaskedConv2d: channel_groups must be at least 1", {"channel_groups": 0}),
        (ValueError, "in_channels must be divisible by groups", {"groups": 2}),
    ],
)
def test_what_is_wrong_with_a_layer(kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"mask_type": "B", "in_channels": 3, "out_channels": 4, "kernel_size": 3, **options}
    with pytest.raises(kind, match=message):
        nn.MaskedConv2d(**arguments)


def test_positional_arguments_are_those_of_conv2d() -> None:
    x = torch.randn(1, 1, 12, 12)
    for rest in ((1, 3), (1, 4, 2), (1, 2, 1, 1, False)):
        theirs = torch.nn.Conv2d(1, 4, 7, *rest)
        ours = nn.MaskedConv2d("A", 1, 4, 7, *rest)
        assert ours(x).shape == theirs(x).shape
        assert (ours.bias is None) == (theirs.bias is None)
