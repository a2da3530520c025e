"""The Triton kernels of masked convolutions, gates and likelihoods of pixels on a GPU: against the reference, against
the CPU, in CUDA graphs. Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import genfuse
import pytest
import torch
import torch.nn.functional as F
from genfuse import ops
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import test_triton_masked_conv as masked_conv  # noqa: E402
import test_triton_mixture as mixture  # noqa: E402
from genfuse.kernels import likelihood as likelihood_kernels  # noqa: E402
from genfuse.kernels import masked_conv as kernels  # noqa: E402
from genfuse.reference.masked_conv import live_taps  # noqa: E402
from test_gpu_sampling import captured  # noqa: E402
from test_triton_masked_conv import LINEAR, MASKS, TANH, operands, options  # noqa: E402
from test_triton_sampling import RNG, normal  # noqa: E402

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32: what is held to float32's tolerances is computed in float32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


# ---- masked convolutions --------------------------------------------------------------------------------------------

# Outputs, inputs, kernel, (batch, height, width): blocks that are full and that are not, images smaller than a block.
SIZES = [
    (128, 3, (7, 7), (4, 32, 32)),
    (128, 128, (3, 3), (8, 32, 32)),
    (256, 128, (5, 5), (2, 32, 32)),
    (64, 64, (3, 3), (9, 28, 28)),
    (70, 33, (3, 5), (3, 13, 7)),
    (17, 130, (1, 1), (33, 3, 5)),
    (5, 2, (1, 7), (70, 1, 9)),
]


@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conv_sizes(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    padding = size[2][0] // 2, size[2][1] // 2
    x, weight, bias = operands(*size)
    for mask in ("A", "B"):
        masked_conv.conv((x, weight, bias), options(mask, padding=padding), dtype, "cuda")
        last = x.contiguous(memory_format=LAST)
        masked_conv.conv((last, weight, bias), options(mask, padding=padding), dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
@pytest.mark.parametrize("mask", MASKS)
def test_conv_channel_groups(mask: str, interleaved: bool, dtype: torch.dtype) -> None:
    for inputs in (3, 96, 100):
        masked_conv.conv(operands(120, inputs, (3, 3), (4, 17, 19)), options(mask, 3, interleaved), dtype, "cuda")


@pytest.mark.parametrize("mask", ["A", "B", "vertical_B"])
def test_conv_groups_padding_dilation(mask: str) -> None:
    for padding, dilation in (((0, 0), (1, 1)), ((2, 4), (2, 1)), ((3, 5), (3, 2))):
        for groups, channel_groups in ((1, 1), (2, 1), (2, 3)):
            tensors = operands(48, 72, (3, 3), (3, 11, 14), groups)
            chosen = options(mask, channel_groups, False, padding, dilation, groups)
            masked_conv.conv(tensors, chosen, device="cuda")


@DTYPES
@pytest.mark.parametrize("channel_groups", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_conv_does_not_look(mask: str, channel_groups: int, dtype: torch.dtype) -> None:
    live = live_taps(mask, channel_groups, "contiguous", 48, 48, (3, 3)).cuda()
    x, weight, _ = (t.to("cuda", dtype) for t in operands(48, 48, (3, 3), (1, 3, 3)))
    chosen = options(mask, channel_groups)
    clean = kernels.masked_conv2d(x, weight, None, *chosen)
    poisoned = torch.where(live, weight, torch.nan)
    assert torch.equal(kernels.masked_conv2d(x, poisoned, None, *chosen), clean)
    for output in (0, 15, 16, 32, 47):
        seen = torch.where(live[output], x[0], torch.nan)[None]
        found = kernels.masked_conv2d(seen, weight, None, *chosen)
        assert torch.equal(found[0, output, 1, 1], clean[0, output, 1, 1])
    grad_x, grad_weight, _ = kernels.masked_conv2d_backward(clean, x, poisoned, None, *chosen, 3)
    assert bool(grad_x.isfinite().all())
    assert not bool(grad_weight[~live].any())


def test_tf32_is_taken_only_where_it_is_allowed() -> None:
    x, weight = torch.randn(8, 128, 32, 32, device="cuda"), torch.randn(128, 128, 3, 3, device="cuda")
    mask = live_taps("B", 1, "contiguous", 128, 128, (3, 3)).cuda()
    exact = F.conv2d(x.double(), (weight * mask).double(), padding=1)

    def error() -> float:
        found = kernels.masked_conv2d(x, weight, None, *options("B"))
        return float((found - exact).abs().max() / exact.abs().max())

    assert error() < 1e-5
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert 1e-5 < error() < 1e-2


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_public_conv(backend: str) -> None:
    x, weight, bias = (t.float() for t in operands(64, 30, (3, 3), (4, 16, 16)))
    there = [t.cuda().requires_grad_() for t in (x, weight, bias)]
    with genfuse.use_backend(backend):
        y = ops.masked_conv2d(*there, "B", channel_groups=3)
        found = torch.autograd.grad(y.sum(), there)
    here = [t.requires_grad_() for t in (x, weight, bias)]
    y_here = ops.masked_conv2d(*here, "B", channel_groups=3)
    wanted = torch.autograd.grad(y_here.sum(), here)
    for ours, theirs in zip((y, *found), (y_here, *wanted), strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-3)


def test_conv_of_more_than_2_to_the_31_elements() -> None:
    images = 2**31 // (64 * 64 * 64) + 2
    if torch.cuda.mem_get_info()[0] < 5 * images * 64 * 64 * 64 + 2**30:
        pytest.skip("not enough memory")
    x = torch.zeros(images, 64, 64, 64, dtype=torch.bfloat16, device="cuda").to(memory_format=LAST)
    x[-2:].normal_()
    weight = torch.randn(64, 64, 3, 3, dtype=torch.bfloat16, device="cuda")
    y = kernels.masked_conv2d(x, weight, None, *options("B"))
    assert torch.equal(y[-2:], kernels.masked_conv2d(x[-2:], weight, None, *options("B")))


# ---- the gate and the concatenated ELU ------------------------------------------------------------------------------

SHAPES = [(1, 2), (300, 34), (3, 70, 1000), (2, 6, 3, 5), (16, 256, 32, 32), (2, 10, 3, 4, 5), (1, 2, 70001)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, channels, *space = shape
    x, bias = normal(*shape), normal(channels)
    short, residual = normal(batch, channels, *(1 for _ in space)), normal(batch, channels // 2, *space)
    for activation in (TANH, LINEAR):
        masked_conv.gate((x, bias, short, residual), (1, activation), dtype, "cuda")
        masked_conv.gate((x, None, normal(*shape), None), (1, activation), dtype, "cuda")
        if len(shape) == 4:
            last = [t.contiguous(memory_format=LAST) for t in (x, residual)]
            masked_conv.gate((last[0], bias, short, last[1]), (1, activation), dtype, "cuda")
    for scale in (1e-3, 3.0):
        masked_conv.concat_elu((normal(*shape, scale=scale),), (1,), dtype, "cuda")


# ---- likelihoods of pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "openai"])
@pytest.mark.parametrize("layout", range(4), ids=["openai", "pixel_models", "flax", "wavenet"])
def test_mixture(layout: int, mode: str) -> None:
    for channels in (1, 3) if layout != mixture.WAVENET else (1,):
        for space in ((), (7,), (32, 32)):
            x = mixture.levels_of(5, channels, *space)
            params = mixture.parameters(5, 10, *space, channels=channels)
            for by_pixel in (False, True):
                chosen = mixture.options(openai=mode == "openai", layout=layout, by_pixel=by_pixel)
                mixture.mixture((x, params), chosen, device="cuda")
            if len(space) == 2:
                last = [t.contiguous(memory_format=LAST) for t in (x, params)]
                mixture.mixture(last, mixture.options(openai=mode == "openai", layout=layout), device="cuda")


@pytest.mark.parametrize("level", [0, 1, 130, 254, 255])
def test_each_pixel_alone(level: int) -> None:
    """The device's exponentials and logarithms are off by about 2 units, an argument of 100 by 100 of them."""
    x, params = mixture.one_logistic()
    x = torch.full_like(x, (2.0 * level - 255) / 255)
    params[:, 1] += x[:, 0] - (2.0 * 130 - 255) / 255
    leaves = [x.double().requires_grad_(), params.double().requires_grad_()]
    (exact,) = mixture.definitions.discretized_logistic_mixture_nll(*leaves, *mixture.options())
    by_x, by_params = torch.autograd.grad(exact.sum(), leaves)
    found = likelihood_kernels.discretized_logistic_mixture_nll(x.cuda(), params.cuda(), *mixture.options())
    moved = (by_x * x).abs().sum((1, 2)) + (by_params * (params.abs() + 1.0)).abs().sum((1, 2))
    assert bool(((found.cpu().double() - exact).abs() <= 16 * mixture.EPS * (exact.abs() + moved) + 1e-44).all())


def test_probabilities_of_all_levels_sum_to_1() -> None:
    x = ((2.0 * torch.arange(256) - 255) / 255).view(1, 1, 256).cuda()
    for log_scale in (-7.0, -5.0, -2.0, 3.0):
        params = torch.randn(1, 9, 1, device="cuda").expand(1, 9, 256).clone()
        params[:, 6:] = log_scale
        nll = likelihood_kernels.discretized_logistic_mixture_nll(x, params, *mixture.options(by_pixel=True))
        assert abs(float(torch.exp(-nll.double()).sum()) - 1.0) <= 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_equals_the_cpu(channels: int) -> None:
    params = mixture.parameters(4, 10, 16, 16, channels=channels).float()
    u = torch.rand(4, 1 + channels, 16, 16)
    wanted = ops.discretized_logistic_mixture_sample(params, u=u, channels=channels, snap=False)
    with genfuse.use_backend("triton"):
        found = ops.discretized_logistic_mixture_sample(params.cuda(), u=u.cuda(), channels=channels, snap=False).cpu()
    # A component may be another where u is within a unit of the border; there are 4096 pixels.
    assert int(((found - wanted).abs() > 1e-4).any(1).sum()) <= 1


@DTYPES
def test_categorical(dtype: torch.dtype) -> None:
    flat = normal(4, 3 * 256, 8, 8, scale=3.0)
    last = flat.contiguous(memory_format=LAST)
    target = mixture.targets(4, 3, 8, 8, levels=256)
    views = [
        (flat.view(4, 3, 256, 8, 8), 2),
        (flat.view(4, 256, 3, 8, 8), 1),
        (last.permute(0, 2, 3, 1).view(4, 8, 8, 3, 256).permute(0, 3, 4, 1, 2), 2),
    ]
    for logits, dim in views:
        for by_position in (False, True):
            mixture.categorical((logits, target), (dim, by_position), dtype, "cuda")
    mixture.categorical((normal(300, 7), mixture.targets(300, levels=7)), (1, False), dtype, "cuda")


# ---- graphs ---------------------------------------------------------------------------------------------------------


def everything(x: Tensor, weight: Tensor, params: Tensor, target: Tensor) -> list[Tensor]:
    """Every kernel once. x [B, 48, H, W], weight [48, 48, 3, 3], params [B, 20, H, W], target [B, H, W]."""
    results: list[Tensor] = []
    for channel_groups in (1, 3):
        chosen = options("B", channel_groups)
        y = kernels.masked_conv2d(x, weight, weight[:, 0, 0, 0], *chosen)
        results += [y, *kernels.masked_conv2d_backward(y, x, weight, weight[:, 0, 0, 0], *chosen, 7)]
    y = kernels.gated_activation(x, weight[0, :, 0, 0], x[:, :, :1, :1], x[:, :24], 1, TANH)
    arguments = x, weight[0, :, 0, 0], x[:, :, :1, :1], x[:, :24], 1, TANH
    results += [y, *kernels.gated_activation_backward(y, *arguments, 15)]
    y = kernels.concat_elu(x, 1)
    results += [y, kernels.concat_elu_backward(y, x, 1, 1)]
    colours = x[:, :3].clamp(-1.0, 1.0)
    nll = likelihood_kernels.discretized_logistic_mixture_nll(colours, params, *mixture.options())
    back = likelihood_kernels.discretized_logistic_mixture_nll_backward(nll, colours, params, *mixture.options(), 3)
    u = x[:, :4].sigmoid()
    drawn = likelihood_kernels.discretized_logistic_mixture_sample(params, u, None, 3, 8, 0, -7.0, 1.0, True)
    results += [nll, *back, drawn]
    nll, *saved = likelihood_kernels.categorical_nll(x, target, 1, False)
    return [*results, nll, *saved, likelihood_kernels.categorical_nll_backward(nll, x, target, *saved, 1, False, 1)]


def inputs(batch: int = 33, size: int = 12) -> list[Tensor]:
    shape = batch, 48, size, size
    return [
        torch.randn(shape, device="cuda"),
        torch.randn(48, 48, 3, 3, device="cuda"),
        torch.randn(batch, 20, size, size, device="cuda"),
        torch.randint(0, 48, (batch, size, size), device="cuda"),
    ]


def test_cuda_graph_no_synchronisation_and_determinism() -> None:
    given = inputs()

    def function() -> list[Tensor]:
        return everything(*given)

    first = [tensor.clone() for tensor in function()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph, result = captured(function)
    given[0].mul_(-0.5)
    given[2].neg_()
    expected = [tensor.clone() for tensor in function()]
    for tensor in result:
        tensor.fill_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_batch_compiles_nothing_new() -> None:
    def compiled() -> int:
        launchers = [
            value
            for module in (kernels, likelihood_kernels)
            for value in vars(module).values()
            if getattr(value, "do_not_specialize", None)
        ]
        return sum(len(cache[0]) for value in launchers for cache in value.device_caches.values())

    everything(*inputs(33))
    before = compiled()
    for batch in (34, 35, 39, 57):
        everything(*inputs(batch))
    assert compiled() == before


def test_models_on_a_gpu() -> None:
    """A step of training moves the parameters as it does on the CPU, with the kernels and with the reference."""
    from genfuse import models

    x = torch.randint(0, 256, (4, 1, 12, 12))

    def step(device: str, backend: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = models.GatedPixelCNN(1, 12, channels=32, num_layers=2).to(device)
        if backend is None:
            loss = model.loss(x)
            loss.backward()
        else:
            with genfuse.use_backend(backend):
                loss = model.loss(x.to(device))
                loss.backward()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None]

    wanted = step("cpu", None)
    for backend in ("triton", "reference"):
        for ours, theirs in zip(step("cuda", backend), wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()) + 1e-7)


def test_sample_draws_by_address() -> None:
    params = mixture.parameters(3, 4, 5).float()
    here = ops.discretized_logistic_mixture_sample(params, channels=3, rng=RNG, snap=False)
    with genfuse.use_backend("triton"):
        there = ops.discretized_logistic_mixture_sample(params.cuda(), channels=3, rng=RNG.cuda(), snap=False)
    assert torch.allclose(there.cpu(), here, rtol=1e-5, atol=1e-5)
