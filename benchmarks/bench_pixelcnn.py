"""Sampling from autoregressive image models, beside the naive loop that runs the network on the whole image for every
pixel, and whole training steps beside the plain-torch twins.

A naive loop takes minutes, and each of its steps is the same: at full size one step is timed, and multiplied.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

TARGETS = {1: 150.0, 16: 400.0}
PIXELCNN: dict[str, Any] = {"channels": 64, "num_layers": 8, "kernel_size": 7, "levels": 256}
GATED: dict[str, Any] = {"channels": 64, "num_layers": 8, "kernel_size": 3, "levels": 256}
PLUS_PLUS: dict[str, Any] = {"in_channels": 3, "nr_resnet": 1, "nr_filters": 32, "nr_logistic_mix": 10}


def pair(name: str, arguments: Mapping[str, Any], quick: bool) -> tuple[Any, Any]:
    """A model and its twin with the same weights."""
    from genfuse import models
    from genfuse.reference.masked_conv import models as twins

    small: dict[str, Any] = {}
    if quick and name == "PixelCNNPlusPlus":
        small = {"image_size": 4, "nr_filters": 4}
    elif quick:
        small = {"image_size": 5, "channels": 8, "num_layers": 2, "levels": 16}
    torch.manual_seed(0)
    model = getattr(models, name)(**{**arguments, **small})
    twin = getattr(twins, name)(**{**arguments, **small})
    twin.load_state_dict(model.state_dict())
    return model.eval(), twin.eval()


def sampling(name: str, arguments: Mapping[str, Any], batch: int, setting: Setting) -> Mapping[str, Factory]:
    model, twin = pair(name, arguments, setting.quick)
    shape = (batch, arguments.get("in_channels", 1), *model.image_size)
    u = torch.rand(batch, model.draws, *model.image_size, generator=torch.Generator().manual_seed(1))

    def ours() -> Work:
        return lambda: model.sample(batch, u=u)

    def naive(network: Any) -> Work:
        if setting.quick:  # the whole loop
            return lambda: twin.sample(batch, u=u)
        levels = torch.randint(256, shape, generator=torch.Generator().manual_seed(2))
        y, x = (size // 2 for size in model.image_size)

        @torch.no_grad()
        def step() -> Tensor:
            out = network(levels)
            if name != "PixelCNNPlusPlus":
                drawn = torch.multinomial(torch.softmax(out[:, 0, :, y, x], 1), 1)
            else:  # as published: a component by Gumbel noise, then its logistics, channel by channel
                drawn = draw_mixture(out[:, :, y, x], 10)
            levels[:, :, y, x] = drawn
            return drawn

        return step

    def compiled() -> Work:
        return naive(torch.compile(twin, backend=setting.backend))

    return {
        "genfuse": ours,
        "eager, naive loop": functools.partial(naive, twin),
        "torch.compile, naive loop": compiled,
    }


def draw_mixture(params: Tensor, components: int) -> Tensor:
    """Levels of RGB pixels, in plain torch."""
    logits, rest = params[:, :components], params[:, components:].view(-1, 3, 3, components)
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-5, 1 - 1e-5)))
    chosen = (logits + noise).argmax(1).view(-1, 1, 1, 1).expand(-1, 3, 3, 1)
    mean, log_scale, raw = rest.gather(3, chosen)[..., 0].unbind(2)
    coefficient = raw.tanh()
    u = torch.rand_like(mean).clamp(1e-5, 1 - 1e-5)
    drawn = mean + torch.exp(log_scale.clamp(min=-7)) * (u.log() - (-u).log1p())
    red = drawn[:, 0].clamp(-1, 1)
    green = (drawn[:, 1] + coefficient[:, 0] * red).clamp(-1, 1)
    blue = (drawn[:, 2] + coefficient[:, 1] * red + coefficient[:, 2] * green).clamp(-1, 1)
    return ((torch.stack([red, green, blue], 1) + 1) * 127.5).round().long()


def training(name: str, arguments: Mapping[str, Any], batch: int, setting: Setting) -> Mapping[str, Factory]:
    """A whole step: forward, backward and Adam."""
    batch = 2 if setting.quick else batch

    def work(index: int, compiled: bool = False) -> Work:
        net = pair(name, arguments, setting.quick)[index].train()
        loss_of = torch.compile(net.loss, backend=setting.backend) if compiled else net.loss
        shape = (batch, arguments.get("in_channels", 1), *net.image_size)
        levels = 16 if setting.quick else arguments["levels"]
        images = torch.randint(levels, shape, generator=torch.Generator().manual_seed(2))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.0)  # every step does the same, so results can be compared

        def step() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = loss_of(images)
            loss.backward()
            optimizer.step()
            return loss

        return step

    return {
        "genfuse": functools.partial(work, 0),
        "eager": functools.partial(work, 1),
        "torch.compile(eager)": functools.partial(work, 1, True),
    }


def sampling_case(slug: str, title: str, name: str, arguments: dict[str, Any], batch: int, least: float) -> Case:
    pixels = 32 * 32 if name == "PixelCNNPlusPlus" else 28 * 28
    naive = {"eager, naive loop": pixels, "torch.compile, naive loop": pixels}
    return Case(
        name=slug,
        title=title,
        build=functools.partial(sampling, name, arguments, batch),
        targets={"eager, naive loop": least},
        parts=naive,
        random=True,
    )


CASES = [
    *(
        sampling_case(
            f"sample_b{batch}", f"sample {batch} of 28x28, 8 masked 7x7 layers", "PixelCNN", PIXELCNN, batch, least
        )
        for batch, least in TARGETS.items()
    ),
    sampling_case(
        "sample_plus_plus",
        "sample 16 of 3x32x32, PixelCNN++ of 32 filters",
        "PixelCNNPlusPlus",
        {**PLUS_PLUS, "image_size": 32},
        16,
        50.0,
    ),
    Case(
        name="train_gated",
        title="training step, Gated PixelCNN 28x28, 64 channels, B=32",
        build=functools.partial(training, "GatedPixelCNN", GATED, 32),
        targets={"eager": 1.5, "torch.compile(eager)": 1.1},
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
