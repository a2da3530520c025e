"""The Triton kernels of masked convolutions and what surrounds them, without a GPU: run by the interpreter against the
reference, and compiled for every target.

The interpreted tests run in a process of their own, as those of test_triton_sampling.py.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is optional")

from genfuse.kernels import masked_conv as kernels
from genfuse.ops.masked_conv import conv as conv_ops
from genfuse.ops.masked_conv import gate as gate_ops
from genfuse.reference.masked_conv import live_taps
from test_triton_flow import Definitions
from test_triton_sampling import (
    DTYPES,
    HALVES,
    NAN,
    Check,
    check_compilation,
    compiled,
    interpreted,
    normal,
    pool,
    recorded,
    run_interpreted,
)

__all__ = ["pool"]

definitions = Definitions(conv_ops._MASKED_CONV2D, gate_ops._GATED, gate_ops._CONCAT_ELU)


def check(name: str, differentiable: int) -> Check:
    return Check(name, differentiable, family=kernels, definition=definitions)


conv, gate, concat_elu = check("masked_conv2d", 3), check("gated_activation", 4), check("concat_elu", 1)
TANH, LINEAR = 0, 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and many blocks a program, from few elements."""
    monkeypatch.setattr(kernels, "_TILE", 32)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)


# ---- masked convolutions --------------------------------------------------------------------------------------------

MASKS = conv_ops._MASKS


def options(
    mask: str = "B",
    channel_groups: int = 1,
    interleaved: bool = False,
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> tuple[object, ...]:
    return (MASKS.index(mask), channel_groups, interleaved, *padding, *dilation, groups)


def operands(outputs: int, inputs: int, kernel: tuple[int, int], size: tuple[int, int, int], groups: int = 1) -> tuple:
    batch, height, width = size
    x, weight = normal(batch, inputs, height, width), normal(outputs, inputs // groups, *kernel)
    return x, weight, normal(outputs)


@interpreted
@pytest.mark.parametrize("channel_groups", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_conv_masks(mask: str, channel_groups: int) -> None:
    for inputs, interleaved in ((3, False), (20, True), (17, False)):
        conv(operands(6, inputs, (3, 3), (2, 4, 5)), options(mask, channel_groups, interleaved))


@interpreted
@pytest.mark.parametrize("kernel", [(1, 1), (3, 5), (5, 1), (1, 7)], ids=str)
def test_conv_kernels(kernel: tuple[int, int]) -> None:
    for mask in ("A", "B"):
        padding = (kernel[0] // 2, kernel[1] // 2)
        conv(operands(5, 4, kernel, (1, 6, 7)), options(mask, padding=padding))
        conv(operands(5, 18, kernel, (1, 6, 7)), options(mask, padding=padding))


@interpreted
@pytest.mark.parametrize("inputs", [2, 32])
def test_conv_padding_and_dilation(inputs: int) -> None:
    for padding, dilation in (((0, 0), (1, 1)), ((2, 4), (2, 1)), ((1, 0), (1, 2)), ((3, 5), (3, 2))):
        conv(operands(3, inputs, (3, 3), (2, 7, 9)), options("B", padding=padding, dilation=dilation))


@interpreted
@pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
@pytest.mark.parametrize("mask", ["A", "B"])
def test_conv_groups(mask: str, interleaved: bool) -> None:
    """Torch's groups alone, and with channel groups across them."""
    for inputs, outputs, groups, channel_groups in ((6, 4, 2, 1), (12, 12, 3, 2), (40, 8, 2, 3), (36, 12, 2, 6)):
        tensors = operands(outputs, inputs, (3, 3), (1, 3, 4), groups)
        conv(tensors, options(mask, channel_groups, interleaved, groups=groups))


@interpreted
@HALVES
def test_conv_half(dtype: torch.dtype) -> None:
    for inputs in (3, 24):
        conv(operands(6, inputs, (3, 3), (2, 4, 5)), options("B", 3), dtype)


@interpreted
def test_conv_blocks_and_shares() -> None:
    """More than one block in every direction, and shares of the pixels that end within a row of an image."""
    x, weight, bias = operands(70, 40, (3, 3), (2, 9, 11))
    conv((x, weight, bias), options("A", 2))
    conv((x[:, :5], weight[:, :5].contiguous(), None), options("B"))


@interpreted
def test_conv_layouts() -> None:
    x, weight, bias = operands(6, 20, (3, 3), (2, 4, 5))
    last = x.contiguous(memory_format=torch.channels_last)
    for given in (last, x.transpose(2, 3), last[:, ::2].expand(2, 10, 4, 5), x[:1].expand(2, 20, 4, 5)):
        conv((given, weight[:, : given.size(1)], bias), options("B", 2))
    given = last.float().requires_grad_(False)
    y = kernels.masked_conv2d(given, weight.float(), None, *options())
    assert y.is_contiguous(memory_format=torch.channels_last)
    back = kernels.masked_conv2d_backward(y, given, weight.float(), None, *options(), 3)
    assert back[0].is_contiguous(memory_format=torch.channels_last)
    assert back[1].is_contiguous()


@interpreted
@pytest.mark.parametrize("channel_groups", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_conv_does_not_look(mask: str, channel_groups: int) -> None:
    """NaN where nothing may be read: in dead weights, and in each pixel that a given one does not see."""
    for inputs, interleaved in ((6, True), (18, False)):
        live = live_taps(mask, channel_groups, "interleaved" if interleaved else "contiguous", 6, inputs, (3, 3))
        x, weight, _ = (t.float() for t in operands(6, inputs, (3, 3), (1, 3, 3)))
        chosen = options(mask, channel_groups, interleaved)
        clean = kernels.masked_conv2d(x, weight, None, *chosen)
        poisoned = torch.where(live, weight, NAN)
        assert torch.equal(kernels.masked_conv2d(x, poisoned, None, *chosen), clean)
        for output in range(6):
            seen = torch.where(live[output], x[0], NAN)[None]
            found = kernels.masked_conv2d(seen, weight, None, *chosen)
            assert torch.equal(found[0, output, 1, 1], clean[0, output, 1, 1])
        grad = torch.randn_like(clean)
        grad_x, grad_weight, _ = kernels.masked_conv2d_backward(grad, x, poisoned, None, *chosen, 3)
        assert bool(grad_x.isfinite().all())
        assert torch.equal(grad_weight[~live], torch.zeros(int((~live).sum())))
        # The gradient that comes in where a pixel is not seen is none of its own.
        for channel in range(inputs):
            seen = torch.where(live[:, channel].flip(1, 2), grad[0], NAN)[None]
            found = kernels.masked_conv2d_backward(seen, x, weight, None, *chosen, 1)[0]
            assert torch.equal(found[0, channel, 1, 1], grad_x[0, channel, 1, 1])


@interpreted
def test_conv_empty() -> None:
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    for shape in ((0, 3, 5, 5), (2, 3, 0, 5)):
        x = torch.empty(shape)
        y = kernels.masked_conv2d(x, weight, bias, *options())
        assert y.numel() == 0
        back = kernels.masked_conv2d_backward(y, x, weight, bias, *options(), 7)
        assert back[0].shape == shape
        assert torch.equal(back[1], torch.zeros_like(weight))
        assert torch.equal(back[2], torch.zeros(4))
    y = kernels.masked_conv2d(torch.empty(1, 0, 2, 2), torch.empty(4, 0, 3, 3), bias, *options())
    assert torch.equal(y, bias[None, :, None, None].expand(1, 4, 2, 2))
    y = kernels.masked_conv2d(torch.randn(1, 3, 2, 2), weight, bias, *options(padding=(2, 2), dilation=(1, 1)))
    assert y.shape == (1, 4, 4, 4)
    back = kernels.masked_conv2d_backward(None, torch.randn(1, 3, 2, 2), weight, bias, *options(), 7)
    assert [float(gradient.abs().sum()) for gradient in back] == [0, 0, 0]


# ---- the gate -------------------------------------------------------------------------------------------------------

SHAPES = [(3, 8), (2, 6, 5), (1, 2, 1), (2, 6, 3, 5), (1, 10, 2, 3, 2), (1, 18, 9), (1, 4, 101)]


@interpreted
@pytest.mark.parametrize("activation", [TANH, LINEAR], ids=["tanh", "linear"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape: tuple[int, ...], activation: int, request: pytest.FixtureRequest) -> None:
    batch, channels, *space = shape
    x, bias, full = normal(*shape), normal(channels), normal(*shape)
    short = normal(batch, channels, *(1 for _ in space))
    residual = normal(batch, channels // 2, *space)
    gate((x, bias, full, residual), (1, activation))
    request.getfixturevalue("small")
    gate((x, None if activation == TANH else bias, short, None), (1, activation))


@interpreted
def test_gate_layouts(small: None) -> None:
    x, residual = normal(2, 6, 3, 5), normal(2, 3, 3, 5)
    last, last_residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    bias, short = normal(6), normal(2, 6, 1, 1)
    views = [
        last,
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x[:1].expand(2, 6, 3, 5),
        normal(2, 12, 3, 5)[:, ::2],
    ]
    for given in views:
        gate((given, bias, short, last_residual), (1, LINEAR))
    gate((last, bias, x, residual), (1, LINEAR))
    # What broadcasts to some of space only, or to the batch: expanded, but not all of it.
    for part in (normal(1, 6, 3, 1).expand(2, 6, 3, 5), normal(1, 1, 1, 5).expand(2, 6, 3, 5)):
        gate((x, bias, part, None), (1, LINEAR))
    for dim in (0, 3):
        x = normal(4, 3, 5, 2)
        gate((x, normal(x.size(dim)), None, None), (dim, TANH))
    gate((normal(3, 4, 6), normal(6), normal(3, 4, 6), normal(3, 4, 3)), (2, TANH))
    gate((normal(3, 4, 6), normal(6), normal(3, 1, 6), None), (2, TANH))
    y = kernels.gated_activation(last.float(), None, None, None, 1, TANH)
    assert y.is_contiguous(memory_format=torch.channels_last)
    back = kernels.gated_activation_backward(y, last.float(), None, None, None, 1, TANH, 1)
    assert back[0].is_contiguous(memory_format=torch.channels_last)


@interpreted
@HALVES
def test_gate_half(dtype: torch.dtype) -> None:
    tensors = normal(3, 8, 37), normal(8), normal(3, 8, 1), normal(3, 4, 37)
    gate(tensors, (1, TANH), dtype)
    gate(tensors, (1, LINEAR), dtype)
    # A residual that is wider makes the result wider.
    half = [t.to(dtype) for t in tensors[:3]]
    y = kernels.gated_activation(*half, tensors[3].float(), 1, TANH)
    (exact,) = gate_ops._GATED.run_reference((*half, tensors[3].float(), 1, TANH))
    assert y.dtype == exact.dtype == torch.float32
    assert torch.allclose(y, exact, rtol=1e-6, atol=1e-6)


@interpreted
def test_gate_empty_and_nothing_coming_in() -> None:
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 3)):
        x, bias = torch.empty(shape), torch.randn(shape[1])
        y = kernels.gated_activation(x, bias, None, None, 1, TANH)
        assert y.shape == (shape[0], shape[1] // 2, shape[2])
        back = kernels.gated_activation_backward(y, x, bias, x, y, 1, TANH, 15)
        assert [gradient.shape for gradient in back] == [x.shape, bias.shape, x.shape, y.shape]
        assert torch.equal(back[1], torch.zeros_like(bias))
    x, y = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    back = kernels.gated_activation_backward(None, x, bias.new_ones(4), x, y, 1, TANH, 15)
    assert all(not bool(gradient.any()) for gradient in back)


@interpreted
def test_gate_far_out_and_nan() -> None:
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4, NAN, 1.0], [-1e4, 1e4, 0.0, -200.0, 200.0, 1.0, NAN]])[None]
    y = kernels.gated_activation(x, None, None, None, 1, TANH)
    (exact,) = gate_ops._GATED.run_reference((x, None, None, None, 1, TANH))
    assert torch.allclose(y, exact, rtol=1e-6, atol=1e-30, equal_nan=True)
    back = kernels.gated_activation_backward(torch.ones_like(y), x, None, None, None, 1, LINEAR, 1)[0]
    assert back.isnan()[0].tolist() == [[False] * 6 + [True], [False] * 5 + [True] * 2]


# ---- concatenated ELU -----------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_concat_elu(shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    for scale in (1e-3, 2.0):
        concat_elu((normal(*shape, scale=scale),), (1,))
    request.getfixturevalue("small")
    for dim in {0, len(shape) - 1}:
        concat_elu((normal(*shape),), (dim,))
    if len(shape) == 4:
        concat_elu((normal(*shape).contiguous(memory_format=torch.channels_last),), (1,))
        last = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        assert kernels.concat_elu(last, 1).is_contiguous(memory_format=torch.channels_last)


@interpreted
@HALVES
def test_concat_elu_half(dtype: torch.dtype) -> None:
    concat_elu((normal(3, 5, 37),), (1,), dtype)


@interpreted
def test_concat_elu_at_its_ends() -> None:
    x = torch.tensor([[0.0, -0.0, 100.0, -100.0, 1e-20, NAN, float("inf")]])
    y = kernels.concat_elu(x, 0)
    (exact,) = gate_ops._CONCAT_ELU.run_reference((x, 0))
    assert torch.allclose(y, exact, rtol=1e-6, atol=0.0, equal_nan=True)
    back = kernels.concat_elu_backward(torch.ones_like(y), x, 0, 1)
    assert torch.equal(back[0, :2], torch.zeros(2))
    assert back.isnan()[0].tolist() == [False] * 5 + [True, False]
    for empty in (torch.empty(0, 3), torch.empty(3, 0)):
        assert kernels.concat_elu(empty, 1).shape == (empty.size(0), 2 * empty.size(1))
        assert kernels.concat_elu_backward(None, empty, 1, 1).shape == empty.shape
    assert torch.equal(kernels.concat_elu_backward(None, x, 0, 1), torch.zeros_like(x))


@compiled
def test_interpreted_in_a_process_of_its_own() -> None:
    """Every test above."""
    run_interpreted(__file__)


# ---- compiling for GPUs that are not there --------------------------------------------------------------------------


def calls(dtype: torch.dtype) -> None:
    """Every operator, with the options whose code differs most."""

    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def convolve(batch: int, outputs: int, inputs: int, kernel: int, size: int, mask: str, channel_groups: int) -> None:
        tensors = of(batch, inputs, size, size), of(outputs, inputs, kernel, kernel), of(outputs)
        chosen = options(mask, channel_groups, padding=(kernel // 2, kernel // 2))
        y = kernels.masked_conv2d(*tensors, *chosen)
        kernels.masked_conv2d_backward(y, *tensors, *chosen, 7 if inputs > 3 else 6)

    convolve(16, 128, 3, 7, 32, "A", 1)
    convolve(16, 128, 128, 3, 32, "B", 1)
    if dtype == torch.bfloat16:
        convolve(2, 96, 96, 3, 8, "B", 3)
    if dtype == torch.float32:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_precision", lambda dtype: "ieee")
            kernels.masked_conv2d(of(2, 64, 16, 16), of(64, 64, 3, 3), None, *options("B"))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = of(8, 64, 16, 16).contiguous(memory_format=layout)
        residual = of(8, 32, 16, 16).contiguous(memory_format=layout)
        y = kernels.gated_activation(x, of(64), of(8, 64, 1, 1), residual, 1, TANH)
        kernels.gated_activation_backward(y, x, of(64), of(8, 64, 1, 1), residual, 1, TANH, 7)
        y = kernels.concat_elu(x, 1)
        kernels.concat_elu_backward(y, x, 1, 1)
    kernels.gated_activation(of(8, 64), None, of(8, 64), None, 1, LINEAR)


@compiled
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_compiles_for_every_target(dtype: str, pool: ProcessPoolExecutor) -> None:
    check_compilation(kernels, recorded(lambda: calls(DTYPES[dtype])), dtype, pool)
