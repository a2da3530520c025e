"""Random numbers by address and what is sampled with them, beside the formulas that people write in eager PyTorch.

torch's generator is sequential, so `torch.randn` and `torch.rand` use one thread whatever is set; NumPy's PCG64 is the
usual alternative on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

TORCH = {"normals": torch.randn, "uniforms": torch.rand}


def forward(function: Callable[[], Any]) -> Work:
    def work() -> Any:
        with torch.no_grad():
            return function()

    return work


def noise(what: str, count: int, given: bool, setting: Setting) -> Mapping[str, Factory]:
    """`count` numbers; with `given`, into memory that stays."""
    if setting.quick:
        count = 1000

    def ours() -> Work:
        from genfuse import ops

        draw = ops.philox_normal if what == "normals" else ops.philox_uniform
        out = torch.empty(count) if given else None
        return forward(lambda: draw(count, 1, 2, out=out))

    def theirs() -> Work:
        draw: Any = TORCH[what]
        if not given:
            return forward(lambda: draw(count))
        out = torch.empty(count)
        return forward(lambda: draw(count, out=out))

    def compiled() -> Work:
        draw: Any = TORCH[what]
        one = torch.compile(lambda: draw(count), fullgraph=True, backend=setting.backend)
        return forward(one)

    def numpy() -> Work:
        import numpy as np

        generator = np.random.default_rng(0)
        draw = generator.standard_normal if what == "normals" else generator.random
        if not given:
            return lambda: torch.from_numpy(draw(count, dtype=np.float32))
        out = np.empty(count, dtype=np.float32)
        return lambda: torch.from_numpy(draw(dtype=np.float32, out=out))

    name = "torch.randn" if what == "normals" else "torch.rand"
    contestants: dict[str, Factory] = {"genfuse": ours, name + ("(out=)" if given else ""): theirs}
    if not given:
        contestants[f"torch.compile({name})"] = compiled
    contestants["NumPy"] = numpy
    return contestants


def with_gradients(function: Callable[..., Any], inputs: list[Tensor], outputs: int) -> Work:
    """Forward and backward from fixed cotangents: gradients of all the inputs."""
    cotangents: list[Tensor] = []

    def work() -> Any:
        found = function(*inputs)
        results = [t for t in (found if isinstance(found, tuple) else (found,)) if t.is_floating_point()][:outputs]
        if not cotangents:
            generator = torch.Generator().manual_seed(1)
            cotangents.extend(torch.randn(t.shape, generator=generator) for t in results)
        return torch.autograd.grad(results, inputs, cotangents, allow_unused=True)

    return work


def contest(
    functions: Mapping[str, Callable[..., Any]],
    compiled: str,
    inputs: Callable[[bool], list[Tensor]],
    backward: bool,
    setting: Setting,
    outputs: int = 2,
) -> Mapping[str, Factory]:
    """The contestants of a case: functions of the same inputs, and one of them compiled.

    `inputs` makes the tensors, with gradients if asked for; every function takes them and, as `noise`, the noise of an
    exact run.
    """

    def factory(function: Callable[..., Any]) -> Factory:
        def build() -> Work:
            tensors = inputs(backward)
            return with_gradients(function, tensors, outputs) if backward else forward(lambda: function(*tensors))

        return build

    contestants = {name: factory(function) for name, function in functions.items()}
    one = functions[compiled]

    def build_compiled() -> Work:
        return factory(torch.compile(one, fullgraph=True, backend=setting.backend))()

    contestants[f"torch.compile({compiled})"] = build_compiled
    return contestants


def gaussian(sizes: tuple[int, ...], prior: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """A sample and its KL, from N(0, 1) or from a general prior."""
    shape = (4, *(min(size, 8) for size in sizes[1:])) if setting.quick else sizes
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(2)) if setting.exact else None

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).requires_grad_(gradients) for _ in range(4 if prior else 2)]

    def eager(mean: Tensor, logvar: Tensor, prior_mean: Any = None, prior_logvar: Any = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(mean) if eps is None else eps
        z = mean + torch.exp(0.5 * logvar) * noise
        if prior_mean is None:
            kl = -0.5 * (1 + logvar - mean.pow(2) - logvar.exp())
        else:
            ratio = (logvar - prior_logvar).exp() + (mean - prior_mean).pow(2) * torch.exp(-prior_logvar)
            kl = 0.5 * (prior_logvar - logvar - 1 + ratio)
        return z, kl.flatten(1).sum(1)

    def ours(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        from genfuse import ops

        return ops.gaussian_rsample_kl(*parameters, eps=eps)

    return contest({"genfuse": ours, "eager": eager}, "eager", inputs, backward, setting)


def gumbel(sizes: tuple[int, ...], backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """Hard Gumbel-softmax."""
    shape = (2, 8, 16) if setting.quick else sizes

    def inputs(gradients: bool) -> list[Tensor]:
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(gradients)]

    def ours(logits: Tensor) -> Tensor:
        from genfuse import ops

        return ops.gumbel_softmax(logits, hard=True)

    def eager(logits: Tensor) -> Tensor:
        return F.gumbel_softmax(logits, hard=True)

    return contest({"genfuse": ours, "F.gumbel_softmax": eager}, "F.gumbel_softmax", inputs, backward, setting, 1)


def categorical(rows: int, classes: int, setting: Setting) -> Mapping[str, Factory]:
    if setting.quick:
        rows, classes = 8, 16

    def inputs(gradients: bool) -> list[Tensor]:
        return [torch.randn(rows, classes, generator=torch.Generator().manual_seed(0))]

    def ours(logits: Tensor) -> Tensor:
        from genfuse import ops

        return ops.categorical_sample(logits)

    def multinomial(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)

    def gumbel_max(logits: Tensor) -> Tensor:
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)

    functions = {"genfuse": ours, "softmax + torch.multinomial": multinomial, "Gumbel-max": gumbel_max}
    return contest(functions, "Gumbel-max", inputs, False, setting)


def codes(count: int, size: int, dim: int, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    """Nearest codes, straight-through, and the commitment loss."""
    if setting.quick:
        count, size, dim = 64, 16, 8

    def inputs(gradients: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, codebook = torch.randn(count, dim, generator=generator), torch.randn(size, dim, generator=generator)
        return [x.requires_grad_(gradients), codebook.requires_grad_(gradients)]

    def ours(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        from genfuse import ops

        found = ops.vector_quantize(x, codebook)
        return found.quantized, found.loss.sum(), found.indices

    def eager(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        distances = x.pow(2).sum(1, keepdim=True) + codebook.pow(2).sum(1) - 2 * x @ codebook.t()
        indices = distances.argmin(1)
        chosen = F.embedding(indices, codebook)
        loss = (chosen - x.detach()).pow(2).sum() + 0.25 * (chosen.detach() - x).pow(2).sum()
        return x + (chosen - x).detach(), loss, indices

    contestants = dict(contest({"genfuse": ours, "eager formula": eager}, "eager formula", inputs, backward, setting))

    def peer() -> Work:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as reason:
            raise UnavailableError(f"vector-quantize-pytorch is not installed ({reason})") from reason
        x, codebook = inputs(backward)
        layer = VectorQuantize(dim=dim, codebook_size=size, commitment_weight=0.25, rotation_trick=False).eval()
        layer.codebook = codebook.detach()

        def quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
            quantized, indices, loss = layer(x[None])
            return quantized[0], loss.sum(), indices[0]

        return forward(lambda: quantize(x, codebook))

    if not backward:  # in evaluation; its training step also moves the codebook, which is another case
        contestants["vector-quantize-pytorch"] = peer
    return contestants


def quantizer_step(count: int, size: int, dim: int, setting: Setting) -> Mapping[str, Factory]:
    """The layers in training: nearest codes, loss, gradient of x, and the codebook's moving average."""
    if setting.quick:
        count, size, dim = 64, 16, 8

    def step(layer: torch.nn.Module) -> Work:
        x = torch.randn(1, count, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
        g = torch.randn(1, count, dim, generator=torch.Generator().manual_seed(1))

        def work() -> Any:
            quantized, _, loss = layer(x)
            return torch.autograd.grad([quantized, loss.sum()], [x], [g, torch.ones(())])

        return work

    def ours() -> Work:
        from genfuse import nn

        return step(nn.VectorQuantizer(size, dim, commitment_weight=0.25, decay=0.99))

    def peer() -> Work:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as reason:
            raise UnavailableError(f"vector-quantize-pytorch is not installed ({reason})") from reason
        return step(
            VectorQuantize(dim=dim, codebook_size=size, commitment_weight=0.25, decay=0.99, rotation_trick=False)
        )

    return {"genfuse": ours, "vector-quantize-pytorch": peer}


MILLION = 1_000_000

CASES: list[Case] = [
    *(
        Case(
            name=f"{what}-1m",
            title=f"1M {what}",
            build=functools.partial(noise, what, MILLION, False),
            targets={peer: 8.0},
            rtol=None,
        )
        for what, peer in (("normals", "torch.randn"), ("uniforms", "torch.rand"))
    ),
    Case(
        name="normals-16m-out",
        title="16M normals into a given tensor",
        build=functools.partial(noise, "normals", 16 * MILLION, True),
        targets={"torch.randn(out=)": 8.0},
        rtol=None,
    ),
    *(
        Case(
            name=f"rsample-kl-{'backward' if backward else 'forward'}",
            title=f"sample + KL, 1024 x 1024, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(gaussian, (1024, 1024), False, backward),
            targets={"eager": 5.0, "torch.compile(eager)": 10.0},
            random=True,
            memory=True,
        )
        for backward in (False, True)
    ),
    *(
        Case(
            name=f"hierarchical-{'backward' if backward else 'forward'}",
            title=f"hierarchical block, 32 x 16 x 32 x 32, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(gaussian, (32, 16, 32, 32), True, backward),
            targets={"eager": 5.0} if backward else {},
            random=True,
            memory=backward,
        )
        for backward in (False, True)
    ),
    *(
        Case(
            name=f"gumbel-softmax-{'backward' if backward else 'forward'}",
            title=f"Gumbel-softmax hard, 64 x 256 x 512, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(gumbel, (64, 256, 512), backward),
            targets={"F.gumbel_softmax": 5.0},
            rtol=None,
            memory=True,
        )
        for backward in (False, True)
    ),
    Case(
        name="categorical",
        title="categories, 4096 rows of 1000",
        build=functools.partial(categorical, 4096, 1000),
        rtol=None,
        memory=True,
    ),
    *(
        Case(
            name=f"vector-quantize-{'backward' if backward else 'forward'}",
            title=f"vector_quantize N=16384 K=1024 D=64, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(codes, 16384, 1024, 64, backward),
            targets={"eager formula": 1.5} if backward else {"eager formula": 1.5, "vector-quantize-pytorch": 1.5},
            memory=True,
            memory_targets={} if backward else {"eager formula": 0.05, "vector-quantize-pytorch": 0.05},
            rtol=1e-4,
            unchecked=("vector-quantize-pytorch",),  # its loss is a mean
        )
        for backward in (False, True)
    ),
    Case(
        name="vector-quantizer-step",
        title="VectorQuantizer in training, N=16384 K=1024 D=64",
        build=functools.partial(quantizer_step, 16384, 1024, 64),
        targets={"vector-quantize-pytorch": 1.5},
        rtol=None,
        memory=True,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
