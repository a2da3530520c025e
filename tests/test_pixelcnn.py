"""The autoregressive image models: against their twins, causality in three ways, and as torch modules."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from genfuse import models, nn
from genfuse.nn.masked_conv.pixelcnn import causal_attention, down_shift, right_shift
from genfuse.ops.masked_conv.ancestral import run
from genfuse.reference.masked_conv import models as twins
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 3
PLAIN: dict[str, Any] = {"image_size": (5, 4), "channels": 6, "num_layers": 3, "kernel_size": 3}
GATED: dict[str, Any] = {**PLAIN, "first_kernel_size": 5}
PLUS: dict[str, Any] = {
    "image_size": (8, 4), "nr_resnet": 1, "nr_filters": 6, "nr_logistic_mix": 3, "dropout": 0.0,
}  # fmt: skip
SNAIL: dict[str, Any] = {
    "image_size": (5, 4), "nr_blocks": 2, "nr_resnet": 1, "nr_filters": 6, "nr_logistic_mix": 3, "key_channels": 4,
    "value_channels": 6, "dropout": 0.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain, bits": ("PixelCNN", {**PLAIN, "levels": 2, "head_channels": (7,)}),
    "plain, levels": ("PixelCNN", {**PLAIN, "levels": 5, "residual": True, "first_kernel_size": 5}),
    "plain, colours": ("PixelCNN", {**PLAIN, "levels": 4, "in_channels": 3, "channels": 7, "num_classes": 4}),
    "plain, interleaved": (
        "PixelCNN",
        {**PLAIN, "levels": 4, "in_channels": 3, "channel_order": "interleaved", "head_channels": (5, 8)},
    ),
    "plain, colours of bits": ("PixelCNN", {**PLAIN, "levels": 2, "in_channels": 2}),
    "gated, bits": ("GatedPixelCNN", {**GATED, "levels": 2, "num_classes": 4}),
    "gated, levels": ("GatedPixelCNN", {**GATED, "levels": 5, "skip": True, "head_channels": (7,)}),
    "gated, colours": ("GatedPixelCNN", {**GATED, "levels": 4, "in_channels": 3, "channels": 7, "num_classes": 4}),
    "gated, interleaved": (
        "GatedPixelCNN",
        {**GATED, "levels": 4, "in_channels": 3, "channel_order": "interleaved", "skip": True, "num_classes": 4},
    ),
    "plus": ("PixelCNNPlusPlus", PLUS),
    "plus, grey": (
        "PixelCNNPlusPlus",
        {**PLUS, "in_channels": 1, "scales": 2, "resnet_nonlinearity": "elu", "num_classes": 4, "levels": 16},
    ),
    "plus, openai": ("PixelCNNPlusPlus", {**PLUS, "mode": "openai", "nr_filters": 5, "num_classes": 4}),
    "plus, levels": (
        "PixelCNNPlusPlus",
        {**PLUS, "in_channels": 1, "scales": 1, "nr_logistic_mix": None, "levels": 6, "resnet_nonlinearity": "relu"},
    ),
    "plus, bits": ("PixelCNNPlusPlus", {**PLUS, "in_channels": 1, "levels": 2, "image_size": 4, "nr_resnet": 2}),
    "snail": ("PixelSNAIL", SNAIL),
    "snail, heads": (
        "PixelSNAIL",
        {**SNAIL, "in_channels": 1, "num_heads": 2, "levels": 16, "num_classes": 4, "resnet_nonlinearity": "elu"},
    ),
    "snail, bits": ("PixelSNAIL", {**SNAIL, "in_channels": 1, "levels": 2, "value_channels": None, "nr_blocks": 1}),
}
ONE_EACH = ["plain, levels", "gated, colours", "plus", "snail"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(package: Any, case: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    name, options = CASES[case]
    torch.manual_seed(1)
    return getattr(package, name)(**(options | more)).to(dtype)


def data(case: str, batch: int = BATCH) -> tuple[Tensor, ...]:
    """Levels, and labels if there are any."""
    _, options = CASES[case]
    generator = torch.Generator().manual_seed(2)
    size = options["image_size"]
    shape = (options.get("in_channels", 3 if case.startswith(("plus", "snail")) else 1),)
    shape += (size, size) if isinstance(size, int) else size
    x = torch.randint(options.get("levels", 256), (batch, *shape), generator=generator)
    return (x, torch.arange(batch) % 4) if "num_classes" in options else (x,)


def disturbed(case: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model in eval mode that is not what it starts as: its first batch seen, and every parameter moved."""
    return copy.deepcopy(_disturbed(case, tuple(more.items()))).to(dtype)


@functools.cache
def _disturbed(case: str, more: tuple[tuple[str, Any], ...]) -> Any:
    model = build(models, case, **dict(more))
    given = data(case, 8)
    model.loss(*given)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 1.0 if "condition" in name else 0.1 if "weight_v" in name else 0.3
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def twin_of(model: Any, case: str) -> Any:
    twin = build(twins, case, next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


def uniforms(model: Any, batch: int = BATCH) -> Tensor:
    shape = (batch, model.draws, *model.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def labels_of(given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"labels": given[1]} if len(given) > 1 else {}


# ---- the twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_likelihood_gradients_and_samples_are_the_twins(case: str) -> None:
    model, given = disturbed(case), data(case)
    twin = twin_of(model, case)
    assert list(model.state_dict()) == list(twin.state_dict())
    found = []
    for one in (model, twin):
        loss = one.loss(*given)
        loss.backward()
        found.append([one(*given), loss, one.log_prob(*given), one.bits_per_dim(*given)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None, name
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-10 * (1 + scale), msg=name)
    u, labels = uniforms(model), labels_of(given)
    samples = [model.sample(BATCH, u=u, cached=cached, **labels) for cached in (True, False)]
    samples.append(twin.sample(BATCH, u=u, **labels))
    for sample in samples[1:]:
        torch.testing.assert_close(samples[0], sample, rtol=0, atol=1e-12)
    assert samples[0].unique().numel() > 1


@pytest.mark.parametrize("case", ["plus", "plus, grey", "snail"])
def test_first_batch_is_the_twins(case: str) -> None:
    model, given = build(models, case), data(case, 8)
    twin = twin_of(model, case)
    for one in (model, twin):
        one.train().loss(*given)
    moved = 0
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9, msg=name)
        moved += name.endswith("weight_g") and not torch.equal(value, torch.ones_like(value))
    assert moved > 10
    before = copy.deepcopy(model.state_dict())
    model.loss(given[0].flip(0), *given[1:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", ["plain, colours", "gated, bits", "gated, levels", "plus", "snail"])
def test_float32_is_as_accurate_as_the_twin(case: str) -> None:
    model, given = disturbed(case, torch.float32), data(case, 6)
    twin = twin_of(model, case)

    def run(one: Any, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        one = copy.deepcopy(one)
        for parameter in one.parameters():
            parameter.data = change(parameter.detach())
        one.loss(*given).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in one.parameters()])
        return [one.log_prob(*given).detach(), gradients]

    eager = eager_runs(lambda nudge: run(twin, nudge))
    results = run(model, lambda tensor: tensor), run(model, Tensor.double)
    for name, actual, runs, exact in zip(("log_prob", "gradient"), results[0], eager, results[1], strict=True):
        assert_as_accurate(actual, runs, exact, name, gradient=name == "gradient")


@pytest.mark.parametrize("case", ["gated, bits", "plus, grey"])
def test_trained_side_by_side(case: str) -> None:
    """Eight steps of Adam from one state: the curves agree, and the model learns."""
    model, (x, *labels) = build(models, case), data(case, 16)
    twin = twin_of(model, case)
    x = x // (x.max() // 2 + 1) * x.max()  # two levels of the many
    curves = []
    for one in (model, twin):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
        curve = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = one.loss(x, *labels)
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-7)
    assert curves[0][-1] < 0.99 * curves[0][0]


# ---- probabilities ---------------------------------------------------------------------------------------------------

ENUMERATED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("PixelCNN", {"image_size": (3, 3), "channels": 5, "num_layers": 2, "kernel_size": 3, "levels": 2}),
    "gated colours": (
        "GatedPixelCNN",
        {"in_channels": 3, "image_size": (1, 2), "channels": 6, "num_layers": 2, "levels": 3},
    ),
    "plus": (
        "PixelCNNPlusPlus",
        {"image_size": (2, 1), "nr_resnet": 1, "nr_filters": 4, "nr_logistic_mix": 2, "levels": 4, "scales": 1},
    ),
    "snail": (
        "PixelSNAIL",
        {
            "in_channels": 1,
            "image_size": (2, 2),
            "nr_blocks": 1,
            "nr_resnet": 1,
            "nr_filters": 4,
            "nr_logistic_mix": 2,
            "levels": 4,
        },
    ),
}


@pytest.mark.parametrize("case", ENUMERATED)
def test_probabilities_of_all_images_sum_to_one(case: str) -> None:
    name, options = ENUMERATED[case]
    torch.manual_seed(0)
    model = getattr(models, name)(**options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    size = model.in_channels * math.prod(model.image_size)
    images = torch.cartesian_prod(*[torch.arange(model.levels)] * size).view(-1, model.in_channels, *model.image_size)
    with torch.no_grad():
        probabilities = model.log_prob(images).exp()
    assert abs(float(probabilities.sum()) - 1.0) < 1e-9
    assert float(probabilities.max()) > 1.5 / len(images)


def test_samples_have_the_models_probabilities() -> None:
    """Of 4096 images of four bits: chi-squared of the counts, 15 degrees of freedom."""
    torch.manual_seed(0)
    model = models.PixelCNN(1, (2, 2), channels=5, num_layers=2, kernel_size=3, levels=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    images = torch.cartesian_prod(*[torch.arange(2)] * 4)
    expected = 4096 * model.log_prob(images.view(-1, 1, 2, 2)).exp()
    drawn = model.sample(4096, generator=torch.Generator().manual_seed(1)).flatten(1)
    counts = (drawn.unsqueeze(1) == images).all(2).sum(0)
    assert int(counts.sum()) == 4096
    chi_squared = ((counts - expected).square() / expected).sum().detach()
    assert float(chi_squared) < 37.7  # exceeded once in a thousand


# ---- causality -------------------------------------------------------------------------------------------------------


def order_of(model: Any) -> Tensor:
    """When each number of an image is drawn, ``[C, H, W]``: the channels of a pixel one by one, or together."""
    channels, (height, width) = model.in_channels, model.image_size
    pixels = torch.arange(height * width).view(1, height, width).expand(channels, -1, -1)
    if model.likelihood == "mixture":
        return pixels
    return pixels * channels + torch.arange(channels).view(-1, 1, 1)


def heads_by_order(model: Any, out: Tensor) -> Tensor:
    """A head's parameters ``[B, steps, P]``, those of each step of the order together."""
    batch = out.size(0)
    if model.likelihood == "categorical":
        return out.permute(0, 3, 4, 1, 2).reshape(batch, -1, model.levels)
    if model.likelihood == "bernoulli":
        return out.permute(0, 2, 3, 1).reshape(batch, -1, 1)
    return out.permute(0, 2, 3, 1).reshape(batch, -1, out.size(1))


@pytest.mark.parametrize("case", CASES)
def test_nan_in_the_future_reaches_no_pixel(case: str) -> None:
    """Everything from some point of the order on is NaN, or infinite: what comes up to it keeps its bits."""
    model, given = disturbed(case, torch.float32), data(case)
    x, order = given[0].float() / (model.levels - 1), order_of(disturbed(case))
    steps = int(order.max()) + 1
    with torch.no_grad():
        clean = heads_by_order(model, model(x, *given[1:]))
        for poison, step in itertools.product((math.nan, math.inf), range(0, steps, max(1, steps // 7))):
            spoilt = torch.where(order >= step, torch.tensor(poison), x)
            found = heads_by_order(model, model(spoilt, *given[1:]))
            # (A product may take its sums in another order where other numbers are, but by no more than rounding.)
            torch.testing.assert_close(found[:, : step + 1], clean[:, : step + 1], rtol=1e-5, atol=1e-5)
            if step + 1 < steps and math.isnan(poison):
                assert bool(found[:, step + 1 :].isnan().any())


@pytest.mark.parametrize("case", CASES)
def test_support_of_the_jacobian(case: str) -> None:
    """No slope by what comes later; by what came before, of these deep models, one by everything that they should see.

    PixelCNN has a blind spot (van den Oord et al. 2016, arXiv 1606.05328, figure 1), the others have none.
    """
    more = {} if case.startswith(("plus", "snail")) else {"channels": 24}  # a few may be asleep behind a ReLU
    model, given = disturbed(case, **more), data(case, 1)
    x, order = given[0].double() / (model.levels - 1), order_of(model).flatten()

    def heads(x: Tensor) -> Tensor:
        """Of each step one number, by which all parameters count."""
        parameters = heads_by_order(model, model(x, *given[1:]))[0]
        return parameters @ torch.linspace(0.5, 1.5, parameters.size(1), dtype=x.dtype)

    sees = torch.autograd.functional.jacobian(heads, x).flatten(1) != 0  # steps, C H W
    before = order.unsqueeze(0) < torch.arange(len(sees)).unsqueeze(1)
    assert not bool((sees & ~before).any())
    if case.startswith(("gated", "plus", "snail")):
        assert torch.equal(sees, before)
    else:
        assert int(sees.sum()) > int(before.sum()) // 2


LAYERS: dict[str, tuple[Callable[[], Any], Callable[[int, int], tuple[int, int]]]] = {
    "down": (lambda: nn.DownShiftedConv2d(2, 3), lambda y, x: (y, 99)),
    "down 1x3": (lambda: nn.DownShiftedConv2d(2, 3, (1, 3)), lambda y, x: (y, 99)),
    "down by two": (lambda: nn.DownShiftedConv2d(2, 3, stride=2), lambda y, x: (2 * y, 99)),
    "down, transposed": (lambda: nn.DownShiftedConvTranspose2d(2, 3), lambda y, x: (y // 2, 99)),
    "down right": (lambda: nn.DownRightShiftedConv2d(2, 3), lambda y, x: (y, x)),
    "down right 2x1": (lambda: nn.DownRightShiftedConv2d(2, 3, (2, 1)), lambda y, x: (y, x)),
    "down right by two": (lambda: nn.DownRightShiftedConv2d(2, 3, stride=2), lambda y, x: (2 * y, 2 * x)),
    "down right, transposed": (lambda: nn.DownRightShiftedConvTranspose2d(2, 3), lambda y, x: (y // 2, x // 2)),
    "down shift": (lambda: down_shift, lambda y, x: (y - 1, 99)),
    "right shift": (lambda: right_shift, lambda y, x: (y, x - 1)),
    "nin": (lambda: nn.NetworkInNetwork(2, 3), lambda y, x: (y, x)),
    "down block": (lambda: nn.GatedResNet(2, "down", dropout=0.0), lambda y, x: (y, 99)),
    "down right block": (lambda: nn.GatedResNet(2, "down_right", dropout=0.0), lambda y, x: (y, x)),
    "nin block": (lambda: nn.GatedResNet(2, "nin", dropout=0.0), lambda y, x: (y, x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_see_no_more_than_they_may(name: str) -> None:
    """By NaN and by the Jacobian: row and column of the last that a position sees."""
    torch.manual_seed(0)
    make, last = LAYERS[name]
    layer = make()
    if isinstance(layer, torch.nn.Module):
        layer = layer.double().eval()
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64)
    clean = layer(x).detach()
    jacobian = torch.autograd.functional.jacobian(layer, x)[0, :, :, :, 0].abs().sum((0, 3))  # h, w, H, W
    for y, column in itertools.product(range(clean.size(2)), range(clean.size(3))):
        row, right = last(y, column)
        seen = torch.zeros(4, 6, dtype=torch.bool)
        seen[: max(row + 1, 0), : max(right + 1, 0)] = True
        assert not bool((jacobian[y, column] != 0)[~seen].any()), (y, column)
        if min(row, right) >= 0 and right < 6:
            assert bool(jacobian[y, column, row, right] != 0)
        spoilt = torch.where(seen, x, torch.tensor(math.nan, dtype=x.dtype))
        assert torch.equal(layer(spoilt)[:, :, y, column], clean[:, :, y, column]), (y, column)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 5), (16, 16)])
def test_attention_is_to_earlier_pixels_only(size: tuple[int, int], heads: int) -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    found, want = causal_attention(query, key, value, heads), twins._causal_attention(query, key, value, heads)
    torch.testing.assert_close(found, want)
    assert torch.equal(found[:, :, 0, 0], torch.zeros(2, 6, dtype=torch.float64))
    slopes = [torch.autograd.grad(one.square().sum(), (query, key, value)) for one in (found, want)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)
    pixels = math.prod(size)
    for poison, place in itertools.product((math.nan, -math.inf), {0, pixels // 2, pixels - 1}):
        for index in (1, 2):
            parts = [part.detach().clone().flatten(2) for part in (query, key, value)]
            parts[index][0, -1, place] = poison
            spoilt = causal_attention(*(part.view(2, -1, *size) for part in parts), heads).flatten(2)
            assert torch.equal(spoilt[0, :, : place + 1], found.flatten(2)[0, :, : place + 1])
            assert bool(spoilt[0, :, place + 1 :].isnan().all())
            assert torch.equal(spoilt[1], found.flatten(2)[1])


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_cached_parameters_are_those_of_forward(case: str) -> None:
    """What the sampler had computed of each pixel when it drew it, beside a pass over the image that came out."""
    model, given = disturbed(case), data(case)
    labels = labels_of(given)
    program = model.program(**labels)
    levels, recorded = run("ancestral_sample", program, BATCH, uniforms(model), None, None, record=True)
    with torch.no_grad():
        want = model.network(model._scaled(levels), labels.get("labels"))
    torch.testing.assert_close(recorded, want, rtol=1e-9, atol=1e-9)
    assert float(want.std()) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_given_pixels_are_kept_and_seen(case: str) -> None:
    model, given = disturbed(case), data(case)
    labels, u = labels_of(given), uniforms(model)
    levels = given[0].clone()
    levels[torch.rand(levels.shape, generator=torch.Generator().manual_seed(9)) < 0.5] = -1
    known = levels >= 0
    as_floats = torch.where(known, levels.double() / (model.levels - 1), -0.5)
    found = model.sample(u=u, conditioned_on=levels, **labels)
    for other in (
        model.sample(BATCH, u=u, conditioned_on=as_floats, **labels),
        model.sample(u=u, conditioned_on=levels, cached=False, **labels),
        twin_of(model, case).sample(BATCH, u=u, conditioned_on=levels, **labels),
    ):
        torch.testing.assert_close(other, found, rtol=0, atol=1e-12)
    assert torch.equal((found * (model.levels - 1)).round().long()[known], levels[known])
    if case in ONE_EACH:
        free = model.sample(BATCH, u=u, **labels)
        assert not torch.equal(free[~known], found[~known])


@pytest.mark.parametrize("case", ONE_EACH)
def test_completions(case: str) -> None:
    model, given = disturbed(case), data(case)
    labels, u = labels_of(given), uniforms(model)
    x = given[0].double() / (model.levels - 1)
    height = model.image_size[0]
    for rows in (None, 0, 1, height):
        kept = height // 2 if rows is None else rows
        found = model.complete(x, rows, u=u, **labels)
        torch.testing.assert_close(found[:, :, :kept], x[:, :, :kept])
        assert rows == height or not torch.allclose(found[:, :, kept:], x[:, :, kept:])
        bytes_too = model.complete(given[0].to(torch.uint8), rows, u=u, cached=False, **labels)
        torch.testing.assert_close(bytes_too, found, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.complete(x, 0, u=u, **labels), model.sample(BATCH, u=u, **labels))


@pytest.mark.parametrize("case", ONE_EACH)
def test_seed_and_generator_govern_the_samples(case: str) -> None:
    model, given = disturbed(case, torch.float32), data(case)
    labels = labels_of(given)
    twin = twin_of(model, case)
    torch.manual_seed(7)
    first, second = (model.sample(BATCH, **labels) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, model.sample(BATCH, **labels))
    state = torch.get_rng_state()
    drawn = [model.sample(BATCH, generator=torch.Generator().manual_seed(8), **labels) for _ in range(2)]
    drawn.append(model.sample(BATCH, generator=torch.Generator().manual_seed(8), cached=False, **labels))
    drawn.append(twin.sample(BATCH, generator=torch.Generator().manual_seed(8), **labels))
    assert torch.equal(torch.get_rng_state(), state)
    for one in drawn:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, drawn[0], rtol=0, atol=1e-6)
    levels = drawn[0] * (model.levels - 1)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert model.sample(0, **({"labels": given[1][:0]} if labels else {})).shape == (0, *first.shape[1:])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", ["plus", "snail"])
def test_sampling_is_of_eval_mode_and_keeps_the_modes(case: str, cached: bool) -> None:
    model = disturbed(case, dropout=0.9)
    given, u = data(case), uniforms(model)
    want = model.sample(BATCH, u=u, cached=cached, **labels_of(given))
    model.train()
    part = next(module for module in model.modules() if isinstance(module, nn.GatedResNet))
    part.eval()
    for module in model.modules():
        if isinstance(module, nn.WeightNormConv2d):
            module._ready = False  # whose first batch is not one that is drawn
    modes, state = [one.training for one in model.modules()], copy.deepcopy(model.state_dict())
    assert torch.equal(model.sample(BATCH, u=u, cached=cached, **labels_of(given)), want)
    assert [one.training for one in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_labels_for_all_and_for_each() -> None:
    for case in ("gated, bits", "plain, colours", "plus, grey", "snail, heads"):
        model, (x, _) = disturbed(case), data(case)
        each = torch.full((BATCH,), 2)
        assert torch.equal(model.log_prob(x, 2), model.log_prob(x, each))
        assert torch.equal(model.log_prob(x, each.to(torch.uint8)), model.log_prob(x, each))
        assert not torch.allclose(model.log_prob(x, 1), model.log_prob(x, 2))
        u = uniforms(model)
        assert torch.equal(model.sample(BATCH, u=u, labels=2), model.sample(BATCH, u=u, labels=each))
        many = model.sample(BATCH, u=u[:1].expand(u.shape), labels=torch.tensor([2, 1, 2]))
        assert torch.equal(many[0], many[2])
        assert not torch.equal(many[0], many[1])


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_floats_bytes_and_levels_are_the_same_images(case: str) -> None:
    model, given = disturbed(case), data(case)
    x, labels = given[0], given[1:]
    want = model.log_prob(x, *labels)
    for one in (x.to(torch.uint8), x.int(), x.double() / (model.levels - 1), x.float() / (model.levels - 1)):
        torch.testing.assert_close(model.log_prob(one, *labels), want, rtol=1e-6, atol=1e-6)
    if model.levels == 2:
        assert torch.equal(model.log_prob(x.bool(), *labels), want)
    bits = model.bits_per_dim(x, *labels)
    torch.testing.assert_close(bits, -want / math.log(2.0) / x[0].numel())
    torch.testing.assert_close(model.loss(x, *labels), -want.mean())
    assert model.log_prob(x[:0], *(one[:0] for one in labels)).shape == (0,)


@pytest.mark.parametrize("case", ONE_EACH)
def test_mixed_and_half_precision(case: str) -> None:
    model, given = disturbed(case, torch.float32), data(case)
    want = model.log_prob(*given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.log_prob(*given)
        mixed.mean().backward()
    assert mixed.dtype == torch.float32
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    half = disturbed(case, torch.bfloat16)
    found = half.log_prob(*given)
    assert found.dtype == torch.float32
    for one in (mixed, found):  # three digits, and the image itself has but eight bits of them
        assert float(((one - want) / want).detach().abs().max()) < 0.1
    sample = half.sample(2, labels=given[1][:2]) if len(given) > 1 else half.sample(2)
    assert sample.dtype == torch.bfloat16
    assert disturbed(case).log_prob(*given).dtype == torch.float64


# ---- weight normalisation --------------------------------------------------------------------------------------------


def test_first_batch_normalises() -> None:
    for layer in (nn.DownShiftedConv2d(2, 5, init_scale=0.1), nn.DownRightShiftedConvTranspose2d(2, 5)):
        layer.double()
        y = layer(3.0 + 2.0 * torch.randn(6, 2, 8, 8, dtype=torch.float64))
        torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5).double(), rtol=0, atol=1e-10)
        want = torch.full((5,), layer.init_scale).double()
        torch.testing.assert_close(y.std((0, 2, 3), correction=0), want, rtol=1e-5, atol=0)
        norms = layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, layer.weight_g.abs())
    same = nn.NetworkInNetwork(2, 3, init_scale=0.5)
    y = same(torch.ones(2, 2, 3, 3))  # there is no deviation to make 1 of, and 1e5 is none
    torch.testing.assert_close(same.weight_g.detach(), torch.full((3,), 0.5))
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-6)
    fresh = nn.NetworkInNetwork(2, 3).eval()
    fresh(torch.randn(4, 2, 3, 3))
    assert not bool(fresh.initialized)
    fresh.train()(torch.randn(0, 2, 3, 3))
    assert not bool(fresh.initialized)
    loaded = nn.NetworkInNetwork(2, 3)
    fresh(torch.randn(4, 2, 3, 3))
    loaded.load_state_dict(fresh.state_dict())
    before = loaded.weight_g.clone()
    loaded(torch.randn(4, 2, 3, 3))
    assert torch.equal(loaded.weight_g, before)


@pytest.mark.parametrize("case", ["plus, grey", "snail"])
def test_explicit_start_is_the_first_batch(case: str) -> None:
    model, other, given = build(models, case), build(models, case), data(case, 8)
    other.eval().initialize(*given)
    assert not other.training
    model.train().loss(*given)
    for (name, value), ours in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, ours), name
    before = copy.deepcopy(other.state_dict())
    other.train().loss(given[0].flip(0), *given[1:])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="labels"):
        other.initialize(given[0] // 2, *(one + 4 for one in given[1:] or [torch.zeros(8, dtype=torch.int64)]))
    before = copy.deepcopy(other.state_dict())
    other.loss(given[0].flip(0), *given[1:])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    other.initialize(given[0] // 2, *given[1:])  # once more, by other images
    assert not torch.equal(other.head.bias, before["head.bias"])


def test_two_levels_are_no_bytes() -> None:
    """A Bernoulli's formula has a value for any number; images in [0, 255] would give ever better ones."""
    model = models.PixelCNN(image_size=4, channels=4, num_layers=2, kernel_size=3, levels=2)
    for wrong in (torch.randint(2, 256, (2, 1, 4, 4), dtype=torch.uint8), torch.full((2, 1, 4, 4), -1.0)):
        with pytest.raises(IndexError, match="x must be floating"):
            model.loss(wrong)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_of_no_class(labels: list[int]) -> None:
    model = models.GatedPixelCNN(image_size=4, channels=4, num_layers=2, levels=3, num_classes=3)
    for call in (
        lambda given: model.loss(torch.zeros(2, 1, 4, 4), given),
        lambda given: model.sample(2, labels=given),
        lambda given: model.program(given),
    ):
        with pytest.raises(ValueError, match="labels must be of the 3 classes"):
            call(torch.tensor(labels))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("levels", [2, 5])
def test_a_network_that_gives_no_distribution(levels: int, cached: bool) -> None:
    model = models.PixelCNN(image_size=4, channels=4, num_layers=2, kernel_size=3, levels=levels)
    torch.nn.init.constant_(model.head[0].bias, math.nan)
    with pytest.raises(RuntimeError, match="the network gives no distribution"):
        model.sample(2, cached=cached)


def test_a_copied_buffer_is_believed() -> None:
    """What an average of weights copies are numbers alone, and its own first batch must not set them anew."""
    layer = nn.WeightNormConv2d(3, 4, 3)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    layer(torch.randn(8, 3, 6, 6))
    average.update_parameters(layer)
    average.train()(50.0 * torch.randn(8, 3, 6, 6))
    assert torch.equal(average.module.weight_g, layer.weight_g)
    flow = nn.ActNorm(3)
    average = torch.optim.swa_utils.AveragedModel(flow, use_buffers=True)
    flow(torch.randn(8, 3))
    average.update_parameters(flow)
    average.train()(50.0 * torch.randn(8, 3))
    assert torch.equal(average.module.log_scale, flow.log_scale)


def test_a_first_batch_that_is_not_finite_sets_nothing() -> None:
    layer, x = nn.WeightNormConv2d(3, 4, 3), torch.randn(8, 3, 6, 6)
    x[0, 0, 0, 0] = math.nan
    layer(x)
    assert not layer.initialized
    assert layer.bias.eq(0.0).all()
    layer(x.nan_to_num())
    assert layer.initialized
    assert layer.bias.isfinite().all()
    assert layer.bias.ne(0.0).any()


def test_normalised_weights_are_computed_once_while_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.DownShiftedConv2d(2, 3).eval(), torch.randn(2, 2, 4, 4)
    counts: list[int] = []
    direction = nn.WeightNormConv2d._direction
    monkeypatch.setattr(nn.WeightNormConv2d, "_direction", lambda self: (counts.append(1), direction(self))[1])

    def run() -> int:
        counts.clear()
        with torch.no_grad():
            found = layer(x)
        done = len(counts)
        assert torch.equal(found, layer(x))  # with gradients it is computed
        return done

    assert run() == 1
    assert run() == 0
    with torch.no_grad():
        layer.weight_g.mul_(2.0)
    assert run() == 1
    layer.weight_v.data[0] += 1.0  # which torch does not count as a change
    assert run() == 1
    assert run() == 0
    layer.load_state_dict(nn.DownShiftedConv2d(2, 3).state_dict())
    assert run() == 1
    torch.optim.SGD(layer.parameters(), 0.1).step()  # without having changed anything but the counts
    run()
    layer.weight_v = torch.nn.Parameter(layer.weight_v.detach() + 1.0)
    assert run() == 1
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight_v.add_(1.0)
        assert not torch.equal(copied(x), layer(x))
    assert run() == 0


def _two_steps(case: str, rank: int, file: Path) -> None:
    """Two passes over this process' part of the images; what shares them must be gone before the group is."""
    model, given = build(models, case), data(case, 8)
    both = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second one raises if a parameter had no gradient in the first
        both(*(one[5 * rank : 5 + 3 * rank] for one in given)).square().sum().backward()
    torch.save(model.state_dict(), file)


def _first_batches(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for case in ("plus, grey", "gated, bits"):
            _two_steps(case, rank, Path(folder) / f"{case} {rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_first_batch_over_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_first_batches, (str(tmp_path),), nprocs=2)
    case = "plus, grey"
    states = [torch.load(tmp_path / f"{case} {rank}.pt") for rank in range(2)]
    alone = build(models, case)
    alone(*data(case, 8))
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-7, atol=1e-8, msg=name)


# ---- as torch modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_rebuilt_copied_and_pickled(case: str) -> None:
    model, given = disturbed(case), data(case)
    rebuilt = type(model)(**json.loads(json.dumps(model.config))).double().eval()
    assert rebuilt.config == model.config
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    rebuilt.load_state_dict(torch.load(stream))
    with torch.no_grad():
        want = model.log_prob(*given)
        for one in (rebuilt, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(one.log_prob(*given), want)
    assert type(model).__name__ in repr(model)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient(case: str) -> None:
    model, given = build(models, case).train(), data(case)
    model.loss(*given).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("plain, colours", {"num_layers": 2}),
        ("gated, bits", {"num_layers": 2}),
        ("plus, grey", {"scales": 1}),
        ("snail", {"nr_blocks": 1}),
    ],
)
def test_loss_compiles_in_one_graph(case: str, more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, given = disturbed(case, torch.float32, **more).train(), data(case)
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for _ in range(2):
        ours, theirs = compiled(*given), eager.loss(*given)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1
    ours.backward()
    theirs.backward()
    for (name, left), right in zip(model.named_parameters(), eager.parameters(), strict=True):
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5 + 1e-4 * scale, msg=name)


def test_first_batch_compiles() -> None:
    torch._dynamo.reset()
    layer, x = nn.DownShiftedConv2d(2, 4), torch.randn(3, 2, 4, 4)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert bool(layer.initialized)


def test_dropout_is_of_training() -> None:
    block, x = nn.GatedResNet(4, dropout=0.5), torch.randn(2, 4, 5, 5)
    block(x)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "match", "call"),
    [
        (ValueError, "channels must be at least 3", lambda: models.PixelCNN(3, 4, channels=2)),
        (ValueError, "kernel_size must be odd", lambda: models.PixelCNN(kernel_size=4)),
        (ValueError, "first_kernel_size must be at least 3", lambda: models.GatedPixelCNN(first_kernel_size=1)),
        (ValueError, "num_layers must be at least 1", lambda: models.GatedPixelCNN(num_layers=0)),
        (ValueError, "levels must be at least 2", lambda: models.PixelCNN(levels=1)),
        (ValueError, "image_size must be an int or", lambda: models.PixelCNN(image_size=(1, 2, 3))),
        (TypeError, "channels must be an int", lambda: models.PixelCNN(channels=2.0)),
        (TypeError, "head_channels must be a sequence", lambda: models.PixelCNN(head_channels=3)),
        (ValueError, "channel_order", lambda: models.GatedPixelCNN(channel_order="mixed")),
        (
            ValueError,
            "channels must be a multiple",
            lambda: models.GatedPixelCNN(3, channels=64, channel_order="interleaved"),
        ),
        (ValueError, "multiples of 4 for 3 scales", lambda: models.PixelCNNPlusPlus(image_size=30, nr_filters=2)),
        (ValueError, "must have a mixture", lambda: models.PixelCNNPlusPlus(nr_logistic_mix=None)),
        (ValueError, "must have a mixture", lambda: models.PixelSNAIL(levels=2)),
        (ValueError, "1 or 3 channels", lambda: models.PixelCNNPlusPlus(2)),
        (ValueError, "power of two", lambda: models.PixelCNNPlusPlus(levels=100)),
        (ValueError, "dropout must be in", lambda: models.PixelCNNPlusPlus(dropout=1.0)),
        (TypeError, "dropout must be a number", lambda: models.PixelSNAIL(dropout="no")),
        (ValueError, "resnet_nonlinearity", lambda: models.PixelSNAIL(resnet_nonlinearity="tanh")),
        (ValueError, "mode must be", lambda: models.PixelSNAIL(mode="fast")),
        (ValueError, "num_heads must divide", lambda: models.PixelSNAIL(num_heads=3, nr_filters=8)),
        (ValueError, "stride must be 1 or 2", lambda: nn.DownShiftedConv2d(1, 1, stride=3)),
        (ValueError, "odd in its width", lambda: nn.DownShiftedConv2d(1, 1, (2, 2))),
        (ValueError, "at least 2", lambda: nn.DownShiftedConvTranspose2d(1, 1, (1, 3))),
        (ValueError, "conv must be", lambda: nn.GatedResNet(2, "up")),
        (ValueError, "nonlinearity must be", lambda: nn.GatedResNet(2, nonlinearity="tanh")),
        (ValueError, "aux must be given", lambda: nn.GatedResNet(2, aux_channels=2)(torch.ones(1, 2, 2, 2))),
        (
            ValueError,
            "aux must not be given",
            lambda: nn.GatedResNet(2)(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2)),
        ),
        (ValueError, "labels must be given", lambda: nn.GatedResNet(2, num_classes=2)(torch.ones(1, 2, 2, 2))),
        (ValueError, r"x must be \[B, 2, H, W\]", lambda: nn.NetworkInNetwork(2, 2)(torch.ones(1, 3, 2, 2))),
        (TypeError, "x must be a Tensor", lambda: nn.NetworkInNetwork(2, 2)([1.0])),
    ],
)
def test_wrong_arguments(kind: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.parametrize(
    ("kind", "match", "call"),
    [
        (ValueError, r"x must be \[B, 1, 5, 4\]", lambda m: m.log_prob(torch.zeros(2, 1, 4, 4))),
        (TypeError, "x must be a Tensor", lambda m: m([1.0])),
        (TypeError, "x must be floating", lambda m: m(torch.zeros(2, 1, 5, 4, dtype=torch.complex64))),
        (ValueError, "without num_classes", lambda m: m(torch.zeros(2, 1, 5, 4), 1)),
        (IndexError, "x must be floating .* 0 to 4; got 5 of", lambda m: m.log_prob(torch.full((2, 1, 5, 4), 5))),
        (IndexError, "x must be floating .* got -0.5 of", lambda m: m.loss(torch.full((2, 1, 5, 4), -0.5))),
        (IndexError, "x must be floating .* got nan of", lambda m: m.bits_per_dim(torch.full((2, 1, 5, 4), math.nan))),
        (ValueError, "rows of x that are kept", lambda m: m.complete(torch.full((2, 1, 5, 4), -0.5), 5)),
        (ValueError, "rows of x that are kept", lambda m: m.complete(torch.full((2, 1, 5, 4), 9), 1)),
        (TypeError, "generator must be a torch.Generator", lambda m: m.sample(2, generator=3)),
        (TypeError, "n must be an int", lambda m: m.sample(1.5)),
        (ValueError, "n must be at least 0", lambda m: m.sample(-1)),
        (ValueError, "n must be an int where", lambda m: m.sample()),
        (ValueError, "u must be", lambda m: m.sample(2, u=torch.zeros(2, 2, 5, 4))),
        (TypeError, "u must be a Tensor", lambda m: m.sample(2, u=0.5)),
        (TypeError, "u must be floating", lambda m: m.sample(2, u=torch.zeros(2, 1, 5, 4, dtype=torch.int64))),
        (ValueError, "conditioned_on must be 3", lambda m: m.sample(3, conditioned_on=torch.zeros(2, 1, 5, 4))),
        (ValueError, "up to 1.0", lambda m: m.sample(conditioned_on=torch.full((2, 1, 5, 4), 1.5))),
        (ValueError, "up to 4", lambda m: m.sample(conditioned_on=torch.full((2, 1, 5, 4), 5))),
        (ValueError, "up to 1.0", lambda m: m.sample(conditioned_on=torch.full((2, 1, 5, 4), math.nan))),
        (ValueError, "rows must be at most 5", lambda m: m.complete(torch.zeros(2, 1, 5, 4), 6)),
    ],
)
def test_wrong_inputs(kind: type[Exception], match: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(kind, match=match):
        call(build(models, "plain, levels", torch.float32))


@pytest.mark.parametrize(
    ("kind", "match", "labels"),
    [
        (ValueError, r"labels must be \[3\] of the 4 classes, got None", None),
        (ValueError, "below the 4 classes", 4),
        (ValueError, r"labels must be \[3\]", torch.zeros(2, dtype=torch.int64)),
        (TypeError, "labels must be whole", torch.zeros(3)),
        (TypeError, "labels must be a Tensor or an int", "cat"),
    ],
)
def test_wrong_labels(kind: type[Exception], match: str, labels: Any) -> None:
    model, (x, _) = build(models, "gated, bits", torch.float32), data("gated, bits")
    for call in (lambda: model.log_prob(x, labels), lambda: model.sample(BATCH, labels=labels)):
        with pytest.raises(kind, match=match):
            call()
