"""The flow family on an NVIDIA GPU: our Triton kernels against torch.compile of the reference and a plain copy.

    python benchmarks/report.py flow_gpu [--write]

Without CUDA every contestant is unavailable. Ours are called by name (`genfuse.use_backend`), because a kernel that has
no results here yet is off in the default dispatch (docs/design/gpu.md says what switches it on). A copy of as many
bytes as the operator has to move is the limit that it is held against. A training step of 512 rows is bound by its
launches, so ours is also captured in a CUDA graph, which nflows' step, with its reads on the host, cannot be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from bench_flow import BINS, BOUND, genfuse_spline, peer, reference_spline
from bench_sampling_gpu import contest, need_cuda
from cases import Case, Factory, Setting, Work, benchmark_tests
from torch import Tensor

SIZES = {"64x192x100": (64, 192, 100), "16m": (1 << 24,)}
NUMBERS = 3 * BINS - 1


def splines(shape: tuple[int, ...], inverse: bool, backward: bool, setting: Setting) -> Mapping[str, Factory]:
    if setting.quick:
        shape = (4, 8)
    count = torch.Size(shape).numel()

    def make() -> list[Tensor]:
        return [1.5 * torch.randn(shape), torch.randn(*shape, NUMBERS)]

    # Read: x and parameters. Written: y, log. Backward also reads all four, and writes two gradients.
    forward = 4 * (NUMBERS + 3)
    moved = (forward + backward * 4 * (2 * NUMBERS + 4)) * count
    return contest(
        make,
        functools.partial(genfuse_spline, inverse=inverse),
        functools.partial(reference_spline, inverse=inverse),
        moved,
        backward,
        setting,
    )


def coupling(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops
    from genfuse.reference.flow import affine_coupling

    shape = (2, 4, 2, 2) if setting.quick else (256, 48, 64, 64)
    options: dict[str, Any] = {"scale": "sigmoid", "layout": "interleaved_shift_scale", "split": "second"}

    def make() -> list[Tensor]:
        return [torch.randn(shape), torch.randn(shape)]

    count = torch.Size(shape).numel()
    return contest(
        make,
        lambda x, params: ops.affine_coupling(x, params, **options),
        lambda x, params: affine_coupling(x, params, **options),
        (12 + backward * 20) * count,
        backward,
        setting,
    )


def actnorm(backward: bool, setting: Setting) -> Mapping[str, Factory]:
    from genfuse import ops
    from genfuse.reference.flow import actnorm as reference

    shape = (2, 4, 2, 2) if setting.quick else (256, 48, 64, 64)

    def make() -> list[Tensor]:
        return [torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])]

    count = torch.Size(shape).numel()
    return contest(make, ops.actnorm, reference, (8 + backward * 12) * count, backward, setting)


def training_step(setting: Setting) -> Mapping[str, Factory]:
    """Five coupling transforms of 32 features with networks of two hidden layers of 128 units."""
    batch, features, hidden = (4, 4, 8) if setting.quick else (512, 32, 128)
    config: dict[str, Any] = {"hidden": (hidden, hidden), "num_bins": BINS, "tail_bound": BOUND}

    def stepping(model: torch.nn.Module, log_prob: Callable[[Tensor], Tensor]) -> Work:
        x = torch.randn(batch, features, device="cuda")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)

        def step() -> Any:
            optimizer.zero_grad(set_to_none=False)
            loss = -log_prob(x).mean()
            loss.backward()
            optimizer.step()
            return loss

        return step

    def ours(captured: bool) -> Work:
        import genfuse
        from genfuse import models

        need_cuda()
        model = models.NeuralSplineFlow(features, transforms=5, **config).cuda()
        step = stepping(model, model.log_prob)

        def work() -> Any:
            with genfuse.use_backend("triton"):
                return step()

        return graph_of(work) if captured else work

    def twin(compiled: bool) -> Work:
        from genfuse.reference.flow import models as twins

        need_cuda()
        model = twins.NeuralSplineFlow(features, transforms=5, **config).cuda()
        log_prob = torch.compile(model.log_prob, backend=setting.backend) if compiled else model.log_prob
        return stepping(model, log_prob)

    def nflows() -> Work:
        need_cuda()
        transforms, nets = peer("nflows.transforms"), peer("nflows.nn.nets")
        flows, distributions, utils = peer("nflows.flows"), peer("nflows.distributions"), peer("nflows.utils")
        chain = [
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                utils.create_alternating_binary_mask(features, even=index % 2 == 0),
                lambda ins, outs: nets.MLP((ins,), (outs,), [hidden, hidden]),
                num_bins=BINS,
                tails="linear",
                tail_bound=BOUND,
            )
            for index in range(5)
        ]
        model = flows.Flow(transforms.CompositeTransform(chain), distributions.StandardNormal([features])).cuda()
        return stepping(model, model.log_prob)

    return {
        "genfuse": functools.partial(ours, True),
        "genfuse without a graph": functools.partial(ours, False),
        "nflows": nflows,
        "plain-PyTorch twin": functools.partial(twin, False),
        "torch.compile(plain-PyTorch twin)": functools.partial(twin, True),
    }


def graph_of(work: Work) -> Work:
    """The work, captured; its results are written anew by each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


COPY = "a copy of as many bytes"
CASES: list[Case] = [
    *(
        Case(
            name=f"spline-{size}-{direction}",
            title=f"RQ spline {size}, K=8, {direction}",
            build=functools.partial(splines, shape, direction == "inverse", direction == "forward+backward"),
            targets={COPY: 0.7, "torch.compile(eager)": 3.0},
            rtol=None,
            memory=True,
            device="cuda",
        )
        for size, shape in SIZES.items()
        for direction in ("forward", "inverse", "forward+backward")
    ),
    *(
        Case(
            name=f"{name}-{'forward-backward' if backward else 'forward'}",
            title=f"{title} 256x48x64x64, {'forward+backward' if backward else 'forward'}",
            build=functools.partial(build, backward),
            targets={COPY: 0.85},
            rtol=None,
            memory=True,
            device="cuda",
        )
        for name, title, build in (("coupling", "affine coupling", coupling), ("actnorm", "actnorm", actnorm))
        for backward in (False, True)
    ),
    Case(
        name="nsf-step",
        title="NSF (coupling) training step, D=32, 5 transforms, networks 128-128, B=512",
        build=training_step,
        targets={"nflows": 5.0},
        rtol=None,
        device="cuda",
    ),
]

test_speed, test_agree = benchmark_tests(CASES)
