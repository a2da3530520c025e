"""Splines, Glow's pieces and whole training steps of flows, beside nflows, normflows and zuko as they are installed.

Where a peer's normalisation of parameters is another one (zuko's splines, the nets' initial weights), it does the same
kind of work on the same sizes, and its results are not compared here; tests compare them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from cases import Case, Factory, Setting, UnavailableError, Work, benchmark_tests
from torch import Tensor

Function = Callable[..., tuple[Tensor, Tensor]]
BINS, BOUND = 8, 3.0


def peer(name: str) -> Any:
    """An installed peer, whose absence is no failure."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise UnavailableError(f"{name} is not installed ({reason})") from None


# ---- splines ---------------------------------------------------------------------------------------------------------


def spline_problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(*shape, generator=generator)
    params = torch.randn(*shape, 3 * BINS - 1, generator=generator)
    return x, params, torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def genfuse_spline(x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    from genfuse import ops

    return ops.rational_quadratic_spline(x, params, inverse=inverse, tail_bound=BOUND)


def reference_spline(x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    from genfuse.reference.flow.spline import spline

    sides = (-BOUND, BOUND, -BOUND, BOUND)
    least = (1e-3, 1e-3, 1e-3)
    kind = ("rational_quadratic", "softmax", "one", True)
    return spline(x, params, None, None, *kind, inverse, *sides, *least, 1.0, BINS, x.dim())


def nflows_spline(x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    module = peer("nflows.transforms.splines.rational_quadratic")
    found: tuple[Tensor, Tensor] = module.unconstrained_rational_quadratic_spline(
        x,
        params[..., :BINS],
        params[..., BINS : 2 * BINS],
        params[..., 2 * BINS :],
        inverse=inverse,
        tail_bound=BOUND,
    )
    return found


def zuko_spline(x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    transforms = peer("zuko.transforms")
    transform = transforms.MonotonicRQSTransform(*params.split([BINS, BINS, BINS - 1], -1), bound=BOUND)
    found: tuple[Tensor, Tensor] = (transform.inv if inverse else transform).call_and_ladj(x)
    return found


def spline_work(function: Function, shape: tuple[int, ...], inverse: bool, backward: bool) -> Work:
    x, params, by_y, by_log = spline_problem(shape)
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return function(x, params, inverse)

        return forward
    x.requires_grad_()
    params.requires_grad_()

    def both() -> Any:
        x.grad = params.grad = None
        y, log_abs_det = function(x, params, inverse)
        torch.autograd.backward((y, log_abs_det), (by_y, by_log))
        return y, log_abs_det, x.grad, params.grad

    return both


def splines(
    shape: tuple[int, ...], inverse: bool, backward: bool, names: tuple[str, ...], setting: Setting
) -> Mapping[str, Factory]:
    functions: dict[str, Function] = {
        "genfuse": genfuse_spline,
        "nflows": nflows_spline,
        "zuko": zuko_spline,
        "reference": reference_spline,
    }
    shape = (5, 4) if setting.quick else shape

    def factory(name: str) -> Work:
        plain = name.removeprefix("torch.compile(").removesuffix(")")
        function = functions[plain]
        if plain in ("nflows", "zuko"):
            peer(plain)
        if plain != name:
            function = torch.compile(function, backend=setting.backend, dynamic=False)
        return spline_work(function, shape, inverse, backward)

    return {name: functools.partial(factory, name) for name in names}


def spline_cases() -> list[Case]:
    cases = []
    every = ("genfuse", "nflows", "zuko", "torch.compile(zuko)", "torch.compile(reference)")
    for name, title, inverse, backward, least in (
        ("forward", "forward", False, False, 25.0),
        ("inverse", "inverse", True, False, 20.0),
        ("forward_backward", "forward+backward", False, True, 20.0),
    ):
        cases.append(
            Case(
                name=f"spline_512x32_{name}",
                title=f"RQ spline 512 x 32, K=8, {title}",
                build=functools.partial(splines, (512, 32), inverse, backward, every),
                targets={"nflows": least, "zuko": 20.0, "torch.compile(zuko)": 5.0},
                unchecked=("zuko", "torch.compile(zuko)"),
                memory=backward,
                rtol=1e-3,
            )
        )
    few = ("genfuse", "nflows", "torch.compile(reference)")
    for name, size, shape in (
        ("speech", "64 x 192 x 100", (64, 192, 100)),
        ("1m", "1M elements", (1 << 20,)),
    ):
        for what, title, inverse, backward in (
            ("forward", "forward", False, False),
            ("inverse", "inverse", True, False),
            ("forward_backward", "forward+backward", False, True),
        ):
            cases.append(
                Case(
                    name=f"spline_{name}_{what}",
                    title=f"RQ spline {size}, K=8, {title}",
                    build=functools.partial(splines, shape, inverse, backward, few),
                    targets={"nflows": 20.0, "torch.compile(reference)": 4.0},
                    memory=backward and name == "speech",
                    rtol=1e-2,  # among a million bins some are so steep that float32 keeps few digits of the slope
                )
            )
    return cases


# ---- Glow ------------------------------------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """Stands for a coupling's network, whose time is not to count: returns parameters of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.given = torch.nn.Parameter(0.1 * torch.randn(*shape))

    def forward(self, *inputs: Any) -> Tensor:
        return self.given


def gradients(module: torch.nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Work:
    by = torch.randn_like(x)

    def work() -> Any:
        module.zero_grad()
        x.grad = None
        z, log_abs_det = run(x)
        torch.autograd.backward((z, log_abs_det), (by, torch.ones_like(log_abs_det)))
        return z, x.grad

    return work


def glow_step(setting: Setting) -> Mapping[str, Factory]:
    batch, channels, side = (2, 4, 4) if setting.quick else (64, 48, 16)

    def problem() -> Tensor:
        torch.manual_seed(0)
        return torch.randn(batch, channels, side, side).requires_grad_()

    def ours() -> Work:
        from genfuse import nn

        x = problem()
        step = nn.GlowStep(channels, Given(batch, channels, side, side))
        return gradients(step, step, x)

    def normflows() -> Work:
        nf = peer("normflows")
        x = problem()
        parts = torch.nn.ModuleList(
            [
                nf.flows.ActNorm((channels, 1, 1)),
                nf.flows.Invertible1x1Conv(channels, True),
                nf.flows.AffineCouplingBlock(Given(batch, channels, side, side), True, "sigmoid", "channel"),
            ]
        )

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros(x.shape[0])
            for part in parts:
                x, log_abs_det = part.inverse(x)
                total = total + log_abs_det
            return x, total

        return gradients(parts, run, x)

    def nflows() -> Work:
        transforms = peer("nflows.transforms")
        x = problem()
        mask = torch.arange(channels) >= channels // 2
        chain = transforms.CompositeTransform(
            [
                transforms.ActNorm(channels),
                transforms.OneByOneConvolution(channels),
                transforms.AffineCouplingTransform(mask.int(), lambda ins, outs: Given(batch, outs, side, side)),
            ]
        )
        return gradients(chain, chain, x)

    return {"genfuse": ours, "normflows": normflows, "nflows": nflows}


def deep_glow(setting: Setting) -> Mapping[str, Factory]:
    batch, channels, side, hidden, depth = (2, 4, 4, 4, 3) if setting.quick else (16, 12, 32, 64, 32)

    def problem() -> Tensor:
        torch.manual_seed(0)
        return torch.randn(batch, channels, side, side).requires_grad_()

    def ours(reversible: bool) -> Work:
        from genfuse import nn

        x = problem()
        steps = [nn.GlowStep(channels, lambda i, o: nn.ConvNet(i, o, hidden)) for _ in range(depth)]
        flow = nn.Flow(steps, reversible=reversible)
        return gradients(flow, flow, x)

    def normflows() -> Work:
        nf = peer("normflows")
        x = problem()
        blocks = torch.nn.ModuleList([nf.flows.GlowBlock(channels, hidden) for _ in range(depth)])

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros(x.shape[0])
            for block in blocks:
                x, log_abs_det = block.inverse(x)
                total = total + log_abs_det
            return x, total

        return gradients(blocks, run, x)

    return {
        "genfuse": functools.partial(ours, True),
        "genfuse, activations stored": functools.partial(ours, False),
        "normflows": normflows,
    }


# ---- whole training steps --------------------------------------------------------------------------------------------


def training_step(model: torch.nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Work:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def work() -> Any:
        optimizer.zero_grad()
        loss = -log_prob(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    return work


class WithoutContext(torch.nn.Module):
    """nflows' couplings hand a context to their network, which its MLP does not take."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.hidden_features = net._hidden_sizes[
            -1
        ]  # by whose root the couplings divide logits, as for its ResidualNet

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        found: Tensor = self.net(x)
        return found


def nsf_step(residual: bool, setting: Setting) -> Mapping[str, Factory]:
    """Five coupling transforms of 32 features with networks of two hidden layers, or blocks, of 128 units."""
    batch, features, hidden = (4, 4, 8) if setting.quick else (512, 32, 128)
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(0))
    config: dict[str, Any] = {"hidden": (hidden, hidden), "num_bins": BINS, "tail_bound": BOUND, "residual": residual}

    def ours() -> Work:
        from genfuse import models

        torch.manual_seed(0)
        model = models.NeuralSplineFlow(features, transforms=5, **config)
        return training_step(model, model.log_prob, x)

    def twin(compiled: bool) -> Work:
        from genfuse.reference.flow import models as twins

        torch.manual_seed(0)
        model = twins.NeuralSplineFlow(features, transforms=5, **config)
        log_prob = torch.compile(model.log_prob, backend=setting.backend) if compiled else model.log_prob
        return training_step(model, log_prob, x)

    def nflows_model() -> torch.nn.Module:
        transforms, nets = peer("nflows.transforms"), peer("nflows.nn.nets")
        flows, distributions, utils = peer("nflows.flows"), peer("nflows.distributions"), peer("nflows.utils")
        torch.manual_seed(0)

        def net(ins: int, outs: int) -> torch.nn.Module:
            if residual:
                made: torch.nn.Module = nets.ResidualNet(ins, outs, hidden_features=hidden, num_blocks=2)
            else:
                made = WithoutContext(nets.MLP((ins,), (outs,), [hidden, hidden]))
            return made

        chain = [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                utils.create_alternating_binary_mask(features, even=index % 2 == 0),
                net,
                num_bins=BINS,
                tails="linear",
                tail_bound=BOUND,
            )
            for index in range(5)
        ]
        model: torch.nn.Module = flows.Flow(
            transforms.CompositeTransform(chain), distributions.StandardNormal([features])
        )
        return model

    def nflows() -> Work:
        model: Any = nflows_model()
        return training_step(model, model.log_prob, x)

    def patched() -> Work:
        import genfuse

        model: Any = nflows_model()
        genfuse.accelerate(model)
        return training_step(model, model.log_prob, x)

    def normflows() -> Work:
        nf = peer("normflows")
        torch.manual_seed(0)
        chain = [
            nf.flows.CoupledRationalQuadraticSpline(
                features, 2, hidden, num_bins=BINS, tail_bound=BOUND, reverse_mask=index % 2 == 1
            )
            for index in range(5)
        ]
        model = nf.NormalizingFlow(nf.distributions.DiagGaussian(features, trainable=False), chain)
        return training_step(model, model.log_prob, x)

    def zuko() -> Work:
        flows = peer("zuko.flows")
        torch.manual_seed(0)
        model = flows.NSF(features, transforms=5, bins=BINS, passes=2, hidden_features=(hidden, hidden))
        return training_step(model, lambda x: model().log_prob(x), x)

    contestants: dict[str, Factory] = {"genfuse": ours, "genfuse in nflows": patched, "nflows": nflows}
    if residual:
        return contestants | {"normflows": normflows}
    return contestants | {
        "zuko": zuko,
        "plain-PyTorch twin": functools.partial(twin, False),
        "torch.compile(plain-PyTorch twin)": functools.partial(twin, True),
    }


CASES = [
    *spline_cases(),
    Case(
        name="glow_step",
        title="Glow step 64 x 48 x 16 x 16 without its network, forward+backward",
        build=glow_step,
        targets={"normflows": 3.0},
        rtol=None,  # matrices and parameters are drawn by each
    ),
    Case(
        name="glow_32",
        title="Glow of 32 steps, 16 x 12 x 32 x 32, networks of 64, forward+backward",
        build=deep_glow,
        memory=True,
        memory_targets={"normflows": 0.25},
        rtol=None,
    ),
    Case(
        name="nsf_step",
        title="NSF (coupling) training step, D=32, 5 transforms, networks 128-128, B=512",
        build=functools.partial(nsf_step, False),
        targets={"nflows": 3.0, "zuko": 3.0},
        rtol=None,  # weights are drawn by each
    ),
    Case(
        name="nsf_residual_step",
        title="the same with residual networks of 2 blocks of 128",
        build=functools.partial(nsf_step, True),
        targets={"nflows": 3.0, "normflows": 3.0},
        rtol=None,
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
