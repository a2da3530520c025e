"""Trains flows beside their twins in plain PyTorch and unpatched peers, and writes how good each is after what time.

    python benchmarks/train_flow.py                          # Fashion-MNIST and two half moons
    python benchmarks/train_flow.py --write                  # ... and update benchmarks/results
    python benchmarks/train_flow.py --steps 20 --points-steps 50 --items 500                 # a try
    python benchmarks/train_flow.py --only moons

Images: a Glow of genfuse, its twin in plain PyTorch, and normflows' Glow (MultiscaleFlow of GlowBlocks) of as many
levels, steps and hidden channels, on Fashion-MNIST in bits per dimension. Points: a neural spline flow of couplings of
genfuse, its twin, and nflows' with the same number of couplings, bins and hidden units, on two half moons in nats.

All contestants read the same batches in the same order and take the same number of steps with the same optimiser (Adam
at a constant rate after a warm-up, so that every point of a curve is a run that could have ended there) and the same
limit on the gradient's norm. genfuse and its twin begin with the same weights; a peer has an initialisation of its own.
Dequantisation noise is drawn anew by each. No model is chosen: what is scored is the last one, on test data that
nothing has seen, all of them by the density that the model defines.

The contestants take turns of some steps in one process, so that a slow drift of the machine meets all of them alike.
A curve's time is that of the training steps alone: scoring is left out of it. The models are not quite the same
functions: both Glows have a learnt mean and deviation of every place of the noise, but genfuse's has Glow's convolution
for the prior of what is factored out besides. So between libraries bits/dim is a comparison of models, and only between
genfuse and its twin one of arithmetic. The splines are the same functions.

With --write: a JSON with settings, figures and curves, and a PNG with the curves, samples, and densities.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genfuse.train.checkpoint import model_class
from genfuse.train.flow_module import FlowData, seeded_losses
from genfuse.train.flow_run import twin_of
from genfuse.train.grids import grid
from genfuse.train.images import load_images
from genfuse.train.order import BatchOrder
from genfuse.train.settings import GlowSettings, NSFSettings
from genfuse.train.tables import load_table
from report import RESULTS, machine, machine_slug
from torch import Tensor

TURN = 10  # steps before the next contestant's turn
WARMUP = 50
CLIP = 5.0
SEED = 20230706
SHOWN = 20  # samples of each in the picture
COLOURS = {"genfuse": "#d94801", "torch": "#777777", "normflows": "#2171b5", "nflows": "#2171b5"}


@dataclass
class Contestant:
    """A model that is trained, and what became of it.

    Attributes:
        nll: -log p of each item, nats.
        sample: items of its own: images in [0, 1], or standardised points.
        curve: (seconds of training, steps, test loss).
    """

    model: torch.nn.Module
    nll: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]
    seconds: float = 0.0
    curve: list[tuple[float, int, float]] = field(default_factory=list)


class NLL(torch.nn.Module):
    """A peer's -log p as a `log_prob`, which `seeded_losses` asks for."""

    def __init__(self, nll: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.nll = nll

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.nll(x)


# ---------------------------------------------------------------------------------------------------------- contestants


def of_genfuse(name: str, arguments: dict[str, Any], scale: float, seed: int) -> dict[str, Contestant]:
    """genfuse's model and its twin, with the same weights."""
    torch.manual_seed(seed)
    ours = model_class(name)(**arguments)
    twin = twin_of(ours, arguments)

    def contestant(model: Any) -> Contestant:
        return Contestant(model, lambda x: -model.log_prob(x), lambda n: model.sample(n).float() / scale)

    return {"genfuse": contestant(ours), "torch": contestant(twin)}


def normflows_glow(shape: tuple[int, int, int], levels: int, steps: int, hidden: int, seed: int) -> Contestant:
    """normflows' example of a Glow, without classes, in the numbers that genfuse's has."""
    import normflows as nf

    torch.manual_seed(seed)
    channels, height, width = shape
    bases, flows, merges = [], [], []
    for level in range(levels):  # from the noise to the data
        factor = 2 ** (levels - level)
        blocks = [nf.flows.GlowBlock(channels * 2 ** (levels + 1 - level), hidden) for _ in range(steps)]
        flows.append([*blocks, nf.flows.Squeeze()])
        if level > 0:
            merges.append(nf.flows.Merge())
        latent = channels * 2 ** (levels + (1 if level == 0 else 0) - level)
        bases.append(nf.distributions.DiagGaussian((latent, height // factor, width // factor)))
    model = nf.MultiscaleFlow(bases, flows, merges, transform=nf.transforms.Logit(0.05), class_cond=False)
    volume = math.prod(shape) * math.log(256.0)  # from numbers in [0, 1] to whole ones

    def nll(x: Tensor) -> Tensor:
        x = x.float()
        result: Tensor = volume - model.log_prob((x + torch.rand_like(x)) / 256.0, None)
        return result

    return Contestant(model, nll, lambda n: (model.sample(n)[0] * 256.0).floor().clamp(0.0, 255.0) / 255.0)


class Layers(torch.nn.Sequential):
    """Dense layers as nflows calls them; they take no context."""

    def __init__(self, ins: int, outs: int, hidden: tuple[int, ...]) -> None:
        widths = (ins, *hidden)
        layers: list[torch.nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
        super().__init__(*layers, torch.nn.Linear(widths[-1], outs))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        result: Tensor = super().forward(x)
        return result


def nflows_spline(settings: NSFSettings, seed: int) -> Contestant:
    """A chain of nflows' spline couplings of two features, the halves exchanged from one to the next."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform

    torch.manual_seed(seed)
    couplings = [
        PiecewiseRationalQuadraticCouplingTransform(
            mask=[place % 2, (place + 1) % 2],
            transform_net_create_fn=lambda ins, outs: Layers(ins, outs, settings.hidden),
            num_bins=settings.bins,
            tails="linear",
            tail_bound=settings.tail_bound,
        )
        for place in range(settings.flows)
    ]
    model = Flow(CompositeTransform(couplings), StandardNormal([2]))
    return Contestant(model, lambda x: -model.log_prob(x), lambda n: model.sample(n))


# ------------------------------------------------------------------------------------------------------------- training


def score(contestant: Contestant, items: Tensor) -> Tensor:
    """-log p of each item, nats, float64, with the same dequantisation noise each time."""
    contestant.model.eval()
    density = NLL(contestant.nll)
    losses = [seeded_losses(density, part, SEED + place) for place, part in enumerate(torch.split(items, 500))]
    contestant.model.train()
    return torch.cat(losses).double()


def race(
    contestants: dict[str, Contestant],
    read: Callable[[int], Tensor],
    some: Tensor,
    seed: int,
    steps: int,
    rate: float,
    show: Callable[[float], str],
    points: int = 20,
    clip: float = CLIP,
) -> None:
    """Train all contestants for `steps` steps, in turns, and follow what they score on `some` of the test data.

    Args:
        read: gives the batch of a step.
        points: of a curve, about.
    """
    optimizers = {
        name: torch.optim.Adam(contestant.model.parameters(), lr=rate, fused=True)
        for name, contestant in contestants.items()
    }
    apart = max(TURN, steps // points // TURN * TURN)
    names = list(contestants)
    for start in range(0, steps, TURN):
        end = min(steps, start + TURN)
        batches = [read(step) for step in range(start, end)]
        for name in names:
            contestant, optimizer = contestants[name], optimizers[name]
            torch.manual_seed(seed + start)
            began = time.perf_counter()
            for step, rows in zip(range(start, end), batches, strict=True):
                optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP)
                optimizer.zero_grad(set_to_none=True)
                contestant.nll(rows).mean().backward()
                torch.nn.utils.clip_grad_norm_(contestant.model.parameters(), clip)
                optimizer.step()
            contestant.seconds += time.perf_counter() - began
        names = names[1:] + names[:1]
        if end % apart == 0 or end == steps or start == 0:
            line = f"step {end:>5}/{steps}"
            for name, contestant in contestants.items():
                loss = float(score(contestant, some).mean())
                contestant.curve.append((contestant.seconds, end, loss))
                line += f"   {name} {show(loss)} {contestant.seconds:6.1f} s"
            print(line, flush=True)


def figures(contestants: dict[str, Contestant], test: Tensor, offset: float, scale: float, unit: str) -> dict[str, Any]:
    """What each contestant has come to: its score on all of the test data, its time, and its curve."""
    soonest = min(contestant.seconds for contestant in contestants.values())
    found: dict[str, Any] = {}
    for name, contestant in contestants.items():
        nll = (score(contestant, test) + offset) * scale
        times, losses = zip(*((seconds, loss) for seconds, _, loss in contestant.curve), strict=True)
        found[name] = {
            unit: float(nll.mean()),
            f"{unit}_standard_error": float(nll.std() / math.sqrt(len(nll))),
            f"{unit}_when_the_first_had_finished": (float(np.interp(soonest, times, losses)) + offset) * scale,
            "items": len(nll),
            "steps": contestant.curve[-1][1],
            "seconds": round(contestant.seconds, 2),
            "parameters": sum(parameter.numel() for parameter in contestant.model.parameters()),
            "curve": [[round(t, 2), step, round((loss + offset) * scale, 4)] for t, step, loss in contestant.curve],
        }
    return found


def batches_of(data: FlowData, batch: int, seed: int) -> Callable[[int], Tensor]:
    order = BatchOrder(len(data.train), batch, seed)
    return lambda step: data.train[torch.from_numpy(order.rows(step))]


def race_images(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Contestant]]:
    source = load_images(options.data)
    data = FlowData(source, None, 0)
    settings = GlowSettings(levels=options.levels, steps=options.depth, channels=options.hidden)
    # With a learnt mean and deviation of every place of z, as normflows' bases have.
    arguments = {**settings.model_arguments(data.shape, source.levels), "base": "diagonal"}
    contestants = of_genfuse("Glow", arguments, source.levels - 1, options.seed)
    contestants["normflows"] = normflows_glow(source.shape, options.levels, options.depth, options.hidden, options.seed)
    scale = 1.0 / (math.prod(data.shape) * math.log(2.0))
    race(
        contestants,
        batches_of(data, options.batch_size, options.seed),
        data.test[: options.items],
        options.seed,
        options.steps,
        options.learning_rate,
        lambda loss: f"{loss * scale:.3f} bits/dim",
    )
    run = {
        "data": source.name,
        "model": "Glow",
        "peer": "normflows: MultiscaleFlow of GlowBlock",
        **{
            name: getattr(options, name)
            for name in ("levels", "depth", "hidden", "batch_size", "learning_rate", "seed")
        },
    }
    return {**run, **figures(contestants, data.test, 0.0, scale, "bits_per_dim")}, contestants


def race_points(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Contestant], FlowData]:
    data = FlowData(load_table("moons"), None, 0)
    assert data.standardization is not None
    settings = NSFSettings(linear="none")  # as the peer's chain below, whose halves are exchanged instead
    contestants = of_genfuse("NeuralSplineFlow", settings.model_arguments(data.shape, 0), 1.0, options.seed)
    contestants["nflows"] = nflows_spline(settings, options.seed)
    offset = data.log_volume
    race(
        contestants,
        batches_of(data, settings.batch_size, options.seed),
        data.test,
        options.seed,
        options.points_steps,
        settings.learning_rate,
        lambda loss: f"{loss + offset:.4f} nats",
    )
    run = {
        "data": "moons",
        "model": "NeuralSplineFlow",
        "peer": "nflows: PiecewiseRationalQuadraticCouplingTransform",
        "flows": settings.flows,
        "bins": settings.bins,
        "hidden": list(settings.hidden),
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "seed": options.seed,
    }
    return {**run, **figures(contestants, data.test, offset, 1.0, "nats")}, contestants, data


# -------------------------------------------------------------------------------------------------------------- picture


def curves(axes: Any, run: dict[str, Any], names: list[str], ylabel: str) -> None:
    for name in names:
        seconds, _, losses = zip(*run[name]["curve"], strict=True)
        axes.plot(seconds, losses, color=COLOURS[name], marker="o", markersize=2.5, linewidth=1.3, label=label(name))
    # The first steps are off the scale on which the contestants differ.
    ends = [loss for name in names for _, _, loss in run[name]["curve"][len(run[name]["curve"]) // 4 :]]
    low, high = min(ends), max(ends)
    axes.set_ylim(low - 0.08 * (high - low + 1e-9), high + 0.25 * (high - low + 1e-9))
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(ylabel)
    axes.set_title(f"{run['model']}, {run['data']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def label(name: str) -> str:
    return {"torch": "the same in plain PyTorch"}.get(name, name)


@torch.no_grad()
def picture(path: Path, images: Any, points: Any) -> None:
    """Curves above, and below them samples of images and densities of points, of genfuse and of the peer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [part for part in (images, points) if part is not None]
    figure = Figure(figsize=(6.0 * len(columns), 7.6), layout="constrained")
    panels = figure.subplots(3, len(columns), squeeze=False, height_ratios=[2.2, 1.0, 1.0])
    for column, part in enumerate(columns):
        run, contestants = part[0], part[1]
        names = list(contestants)
        is_images = "bits_per_dim" in run["genfuse"]
        curves(panels[0, column], run, names, "test bits per dimension" if is_images else "test NLL, nats")
        for row, name in enumerate((names[0], names[-1]), 1):
            axes = panels[row, column]
            contestants[name].model.eval()
            if is_images:
                torch.manual_seed(SEED)
                drawn = contestants[name].sample(2 * SHOWN)
                axes.imshow(
                    grid(drawn.view(2, SHOWN, *drawn.shape[1:])), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
                )
            else:
                across, up = (np.linspace(-2.4, 2.4, 200), np.linspace(-2.4, 2.4, 100))
                places = torch.from_numpy(np.stack(np.meshgrid(across, up), -1).reshape(-1, 2).astype(np.float32))
                density = torch.exp(-contestants[name].nll(places)).view(100, 200).numpy()
                axes.pcolormesh(across, up, density, cmap="viridis", vmin=0.0, rasterized=True)
            axes.set_title(f"{'samples' if is_images else 'density'}: {label(name)}", fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=110)
    path.write_bytes(content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="images of 256 levels whose sides 2^levels divides")
    parser.add_argument("--only", choices=["images", "moons"])
    parser.add_argument("--steps", type=int, default=500, help="of training on images")
    parser.add_argument("--points-steps", type=int, default=2000, help="of training on points")
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--depth", type=int, default=8, help="steps of flow in each level")
    parser.add_argument("--hidden", type=int, default=64, help="channels of a coupling's network")
    parser.add_argument("--batch-size", type=int, default=64, help="of images")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="on images")
    parser.add_argument("--items", type=int, default=1000, help="test images that the curve is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="update benchmarks/results")
    parser.add_argument("--picture", type=Path, help="write the picture here as well")
    options = parser.parse_args()
    header = machine(torch.get_num_threads(), "cpu")
    images = race_images(options) if options.only != "moons" else None
    points = race_points(options) if options.only != "images" else None
    runs = [part[0] for part in (images, points) if part is not None]
    stem = f"{machine_slug(header)}-train-flow"
    if options.write:
        record = {"machine": header, "runs": runs}
        (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        picture(RESULTS / f"{stem}.png", images, points)
    if options.picture is not None:
        picture(options.picture, images, points)
    print(f"\n{'data':<16}{'model':<18}{'':<11}{'test NLL':>18}{'+-':>8}{'training':>11}{'when one was done':>20}")
    for run in runs:
        for name in [name for name in run if isinstance(run[name], dict)]:
            unit = "bits_per_dim" if "bits_per_dim" in run[name] else "nats"
            shown = f"{run[name][unit]:.4f} {unit.replace('_per_', '/')}"
            print(
                f"{run['data']:<16}{run['model']:<18}{name:<11}{shown:>18}{run[name][unit + '_standard_error']:>8.4f}"
                f"{run[name]['seconds']:>9.1f} s{run[name][unit + '_when_the_first_had_finished']:>20.4f}"
            )


if __name__ == "__main__":
    main()
