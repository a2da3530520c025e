"""Training steps of whole variational autoencoders, beside the model of pytorch/examples and our plain-PyTorch twins.

A step is zero_grad, loss, backward and Adam's step, on one batch. The first case is the classic 784-400-20 model on 128
images, with the optimizer as the example has it and then with Adam's fused implementation for everybody.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor


class ExampleVAE(torch.nn.Module):
    """The usual 784-400-20 model and its loss, written as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(784, 400)
        self.fc21, self.fc22 = torch.nn.Linear(400, 20), torch.nn.Linear(400, 20)
        self.fc3, self.fc4 = torch.nn.Linear(20, 400), torch.nn.Linear(400, 784)

    def loss(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x.view(-1, 784)))
        mean, logvar = self.fc21(hidden), self.fc22(hidden)
        std = torch.exp(0.5 * logvar)
        z = mean + torch.randn_like(std) * std
        pixels = torch.sigmoid(self.fc4(F.relu(self.fc3(z))))
        nll = F.binary_cross_entropy(pixels, x.view(-1, 784), reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        return (nll + kl) / x.size(0)


def step(model: torch.nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, fused: bool) -> Work:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None)

    def work() -> Any:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        return value

    return work


def contest(
    ours: Callable[[], Any], theirs: Callable[[], Any], name: str, x: Tensor, fused: bool, setting: Setting
) -> Mapping[str, Factory]:
    def build(make: Callable[[], Any], compiled: bool) -> Factory:
        def factory() -> Work:
            torch.manual_seed(0)
            model: Any = make()
            loss = torch.compile(model.loss, fullgraph=True, backend=setting.backend) if compiled else model.loss
            return step(model, loss, x, fused)

        return factory

    return {
        "genfuse": build(ours, False),
        name: build(theirs, False),
        f"torch.compile({name})": build(theirs, True),
    }


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)).bernoulli()


def classic(fused: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import models

    x = images(4 if setting.quick else 128)
    return contest(models.VAE, ExampleVAE, "pytorch/examples", x, fused, setting)


def with_twin(name: str, arguments: Mapping[str, Any], setting: Setting) -> Mapping[str, Factory]:
    from genfuse import models, reference
    from genfuse.reference import vae as twins

    # The twins' own noise is ours, in plain PyTorch, so that both can be compared: torch's is what people would take.
    twins._normal = lambda shape, like, generator: torch.randn(tuple(shape), dtype=like.dtype, device=like.device)
    x = images(4 if setting.quick else 128)
    ours, theirs = getattr(models, name), getattr(reference, name)
    return contest(lambda: ours(**arguments), lambda: theirs(**arguments), "plain-PyTorch twin", x, True, setting)


CASES: list[Case] = [
    *(
        Case(
            name=f"vae-step{'-fused-adam' if fused else ''}",
            title=f"VAE 784-400-20, B=128, training step, {'fused Adam' if fused else 'Adam'}",
            build=functools.partial(classic, fused),
            targets={"pytorch/examples": 1.3, "torch.compile(pytorch/examples)": 1.0},
            rtol=None,
            memory=fused,
        )
        for fused in (False, True)
    ),
    *(
        Case(
            name=f"{short}-step",
            title=f"{title}, B=128, training step",
            build=functools.partial(with_twin, name, arguments),
            rtol=None,
        )
        for short, title, name, arguments in (
            ("conv-vae", "VAE, convolutional", "VAE", {"architecture": "conv"}),
            ("hierarchical-vae", "HierarchicalVAE", "HierarchicalVAE", {}),
            ("vqvae", "VQVAE", "VQVAE", {}),
        )
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
