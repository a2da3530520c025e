"""Trains autoregressive image models beside their twins in plain PyTorch: how good after what time, and for one image.

    python benchmarks/train_pixelcnn.py                          # Fashion-MNIST, three runs: some minutes on two cores
    python benchmarks/train_pixelcnn.py --write                  # ... and update benchmarks/results and the README
    python benchmarks/train_pixelcnn.py --steps 10 --plus-steps 10 --test 50 --items 20 --longest 0.5          # a try
    python benchmarks/train_pixelcnn.py --only pixelcnn++

Three runs: a Gated PixelCNN of images that are binarised dynamically (a pixel of grey value v is white with probability
v, drawn anew each time an image is read), the same of 256 levels, and a small PixelCNN++ of 256 levels. In each, the
model of genfuse and its twin begin with the same weights, read the same batches with the same bits, and take the same
number of steps with the same optimiser (Adam at a constant rate after a warm-up, so that every point of a curve is a
run that could have ended there) and the same limit on the gradient's norm. They take turns of some steps in one
process, so that a slow drift of the machine meets both alike. A curve's time is that of the training steps alone. No
model is chosen: what is scored is the last one, exactly, on test images that nothing has seen.

Then each draws one image from the same uniform numbers: genfuse with every activation computed once, and by the naive
loop, which passes over the whole image for each pixel; the twin by the naive loop. Times of the cached sampler are
medians of three images; a naive loop that would take longer than --longest seconds is estimated from as many passes as
fit in, which the table then says.

With --write: a JSON with settings, figures and curves; a PNG with the curves, and samples and completions of test
images of which the upper half is given, of genfuse's models; and the table in the README. One command makes them all.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from genfuse.train.checkpoint import model_class, twin_of
from genfuse.train.grids import grid
from genfuse.train.images import load_images
from genfuse.train.order import BatchOrder
from genfuse.train.pixelcnn_module import PixelData, PixelRunData
from genfuse.train.pixelcnn_run import time_sampling
from genfuse.train.settings import GatedPixelCNNSettings, PixelCNNPlusPlusSettings, PixelSettings
from report import RESULTS, ROOT, machine, machine_slug, table, update_readme
from torch import Tensor
from train_flow import Contestant, curves, figures, race

BATCH = 16  # images that are drawn at once, for the time of one of many
SHOWN, COMPLETIONS = 12, 2  # images in the picture
POINTS = 10  # of a curve
NAMES = {"genfuse": "genfuse", "torch": "plain PyTorch"}


def settings_of(options: argparse.Namespace) -> dict[str, tuple[str, PixelSettings, int]]:
    """Title to model, settings and steps."""
    gated = {"channels": options.channels, "num_layers": options.layers}
    shared: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed}
    plus = {"nr_resnet": 1, "nr_filters": options.filters, "nr_logistic_mix": 5, "scales": 2}
    return {
        "binary": ("GatedPixelCNN", GatedPixelCNNSettings(binary=True, **gated, **shared), options.steps),
        "levels": ("GatedPixelCNN", GatedPixelCNNSettings(**gated, **shared), options.steps),
        "pixelcnn++": ("PixelCNNPlusPlus", PixelCNNPlusPlusSettings(**plus, **shared), options.plus_steps),
    }


def sizes(model: str, settings: Any) -> str:
    if model == "GatedPixelCNN":
        return f"Gated PixelCNN, {settings.num_layers} layers of {settings.channels} channels"
    return f"PixelCNN++, {settings.scales} scales of {settings.nr_resnet} block, {settings.nr_filters} filters"


def contestants_of(model: str, arguments: dict[str, Any], batch: Tensor, seed: int) -> dict[str, Contestant]:
    """genfuse's model and its twin, with the same weights; weights that a first batch sets are set by this one."""
    torch.manual_seed(seed)
    ours = model_class(model)(**arguments)
    if hasattr(ours, "initialize"):
        ours.initialize(batch)

    def contestant(one: Any) -> Contestant:
        return Contestant(one, lambda x: -one.log_prob(x), lambda n: one.sample(n))

    return {"genfuse": contestant(ours), "torch": contestant(twin_of(ours, arguments))}


@torch.no_grad()
def times_of_one_image(contestants: dict[str, Contestant], seed: int, longest: float) -> dict[str, dict[str, Any]]:
    """Seconds for one image, drawn by each contestant from the same uniform numbers."""
    ours: Any = contestants["genfuse"].model.eval()
    twin: Any = contestants["torch"].model.eval()
    found = time_sampling(ours, seed, longest)

    def many() -> float:
        began = time.perf_counter()
        ours.sample(BATCH, generator=torch.Generator().manual_seed(seed))
        return (time.perf_counter() - began) / BATCH

    many()
    found[f"seconds_cached_of_{BATCH}"] = statistics.median(many() for _ in range(3))
    # The twin's loop is timed pass by pass where it is too long, as genfuse's is.
    drawn = ours.sample(1, generator=torch.Generator().manual_seed(seed))
    levels = (drawn * (ours.levels - 1)).round().long()

    def passes(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            twin(levels)
        return time.perf_counter() - began

    passes(1)
    each, total = passes(3) / 3, found["passes"]
    if each * total <= longest:
        began = time.perf_counter()
        twin.sample(1, generator=torch.Generator().manual_seed(seed))
        seconds, timed = time.perf_counter() - began, total
    else:
        timed = max(1, int(longest / each))
        seconds = passes(timed) / timed * total
    theirs = {"seconds_naive": seconds, "passes": total, "passes_timed": timed}
    return {"genfuse": found, "torch": theirs}


@torch.no_grad()
def pictures_of(model: Any, test: Tensor, seed: int) -> Tensor:
    """``[rows, SHOWN, C, H, W]``: two rows of samples, then test images, what is given of them, and completions."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    samples = model.sample(2 * SHOWN, generator=generator).split(SHOWN)
    some = test[:SHOWN]
    images = some.float() / (model.levels - 1)
    given = images.clone()
    given[:, :, images.size(2) // 2 :] = 0.5
    completions = model.complete(some.repeat(COMPLETIONS, 1, 1, 1), generator=generator).split(len(some))
    return torch.stack([*samples, images, given, *completions])


def run(name: str, options: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """One run: its figures, and its images for the picture."""
    model, settings, steps = settings_of(options)[name]
    source = load_images(options.data)
    data = PixelData(source, settings)
    order = BatchOrder(len(data.train), settings.batch_size, settings.seed)
    stream, whole = PixelRunData(data, order), slice(0, settings.batch_size)
    arguments = settings.model_arguments(data.shape, data.seen, None)
    contestants = contestants_of(model, arguments, stream.read(0, whole), settings.seed)
    scale = 1.0 if data.seen == 2 else 1.0 / (math.prod(data.shape) * math.log(2.0))
    unit, shown = ("nats", "nats") if data.seen == 2 else ("bits_per_dim", "bits/dim")
    title = f"{sizes(model, settings)}; {'binarised' if data.seen == 2 else f'{data.seen} levels'}"
    print(f"\n{source.name}: {title}", flush=True)
    race(
        contestants,
        lambda step: stream.read(step, whole),
        data.test[: options.items],
        settings.seed,
        steps,
        options.learning_rate,
        lambda loss: f"{loss * scale:.3f} {shown}",
        points=POINTS,
        clip=settings.clip,
    )
    test = data.test[: options.test]
    found = figures(contestants, test, 0.0, scale, unit)
    for contestant, seconds in times_of_one_image(contestants, settings.seed, options.longest).items():
        found[contestant]["sampling"] = seconds
    record = {
        "data": source.name,
        "model": model,
        "title": title,
        "arguments": arguments,
        "binarized": data.binary,
        "batch_size": settings.batch_size,
        "learning_rate": options.learning_rate,
        "seed": settings.seed,
        "unit": unit,
        **found,
    }
    return record, pictures_of(contestants["genfuse"].model, data.test, settings.seed)


# --------------------------------------------------------------------------------------------------------------- report


def seconds_for_people(seconds: float, sampling: dict[str, Any]) -> str:
    text = f"{seconds:.1f} s" if seconds >= 1.0 else f"{1e3 * seconds:.3g} ms"
    return text if sampling["passes_timed"] == sampling["passes"] else f"about {text}"


def render(record: dict[str, Any]) -> str:
    """The README's part."""
    header, runs = record["machine"], record["runs"]
    rows, estimated = [], False
    for one in runs:
        for place, name in enumerate(NAMES):
            entry, unit = one[name], one["unit"]
            sampling = entry["sampling"]
            estimated = estimated or sampling["passes_timed"] < sampling["passes"]
            error, digits = entry[f"{unit}_standard_error"], 2 if unit == "nats" else 4
            score = f"{entry[unit]:.{digits}f} ± {error:.{digits}f} {unit.replace('_per_', '/')}"
            cached = (
                f"{1e3 * sampling['seconds_cached']:.3g} ms; {1e3 * sampling[f'seconds_cached_of_{BATCH}']:.3g} ms"
                if name == "genfuse"
                else ""
            )
            budget = f"{one['title']}; {entry['steps']} steps of {one['batch_size']} images"
            rows.append(
                [
                    budget if place == 0 else "",
                    NAMES[name],
                    score,
                    f"{entry['seconds']:.1f} s",
                    cached,
                    seconds_for_people(sampling["seconds_naive"], sampling),
                ]
            )
    data = {"fashion-mnist": "Fashion-MNIST"}.get(runs[0]["data"], runs[0]["data"])
    items = runs[0]["genfuse"]["items"]
    note = (
        f"{header['cpu']}, {header['cores']} cores, {header['isa']}, {header['threads']} threads; torch "
        f"{header['torch']}, Python {header['python']}, {header['system']}; commit {header['commit']}; "
        f"{header['date'][:10]}. {data}; NLL of the last model on {items:,} test images, with its standard error over "
        f"images. Time for one image: cached, alone and as one of {BATCH}, and by the naive loop over all pixels."
    )
    lines = [
        note,
        "",
        *table(
            rows,
            ["budget", "", "test NLL", "training", f"one image, cached; of {BATCH}", "one image, naive"],
            left=2,
        ),
    ]
    same = [one["genfuse"]["sampling"]["same_pixels"] for one in runs]
    least = min((share for share in same if share is not None), default=None)
    if least is not None:
        share = "all" if least == 1.0 else f"at least {least:.2%}"
        lines += [
            "",
            f"genfuse's naive loops, where run to their end, drew {share} of the pixels as its cached sampler.",
        ]
    if estimated:
        lines += ["", "Times with *about* are estimated from some of the loop's passes."]
    if "picture" in record:
        lines += ["", f"![Curves, samples and completions]({record['picture']})"]
    return "\n".join(lines)


def picture(path: Path, runs: list[dict[str, Any]], images: list[Tensor]) -> None:
    """Curves above; below them samples, and test images, their given halves and completions, of genfuse's models."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(runs), 6.4), layout="constrained")
    panels = figure.subplots(3, len(runs), squeeze=False, height_ratios=[2.6, 1.0, 2.0])
    for column, (one, rows) in enumerate(zip(runs, images, strict=True)):
        curves(panels[0, column], one, list(NAMES), "test NLL, nats" if one["unit"] == "nats" else "test bits/dim")
        panels[0, column].set_title(one["title"], fontsize=9)
        for axes, part, title in (
            (panels[1, column], rows[:2], "samples"),
            (panels[2, column], rows[2:], "test images, given halves, completions"),
        ):
            axes.imshow(grid(part), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png", dpi=110)
    path.write_bytes(content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="images, as genfuse train pixelcnn takes them")
    parser.add_argument("--only", choices=["binary", "levels", "pixelcnn++"])
    parser.add_argument("--steps", type=int, default=200, help="of a Gated PixelCNN")
    parser.add_argument("--plus-steps", type=int, default=120, help="of the PixelCNN++")
    parser.add_argument("--channels", type=int, default=32, help="of the Gated PixelCNN")
    parser.add_argument("--layers", type=int, default=6, help="of the Gated PixelCNN")
    parser.add_argument("--filters", type=int, default=24, help="of the PixelCNN++")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--test", type=int, default=1000, help="test images that are scored at the end")
    parser.add_argument("--items", type=int, default=200, help="test images that a curve is measured on")
    parser.add_argument("--longest", type=float, default=20.0, help="seconds that a naive loop may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="update benchmarks/results and the README")
    parser.add_argument("--picture", type=Path, help="write the picture here as well")
    options = parser.parse_args()
    header = machine(torch.get_num_threads(), "cpu")
    names = [options.only] if options.only else ["binary", "levels", "pixelcnn++"]
    runs, images = zip(*(run(name, options) for name in names), strict=True)
    record: dict[str, Any] = {"machine": header, "runs": list(runs)}
    path = RESULTS / f"{machine_slug(header)}-train-pixelcnn"
    if options.write:
        record["picture"] = path.with_suffix(".png").relative_to(ROOT).as_posix()
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        picture(path.with_suffix(".png"), record["runs"], list(images))
        update_readme("train_pixelcnn", render(record), ROOT / "README.md")
    if options.picture is not None:
        picture(options.picture, record["runs"], list(images))
    print("\n" + render(record))


if __name__ == "__main__":
    main()
