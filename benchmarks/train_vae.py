"""Trains image models and their twins in plain PyTorch for one budget, and writes how likely they find test images.

    python benchmarks/train_vae.py                                  # Fashion-MNIST and MNIST-5k, both implementations
    python benchmarks/train_vae.py --data digits --epochs 20        # a try
    python benchmarks/train_vae.py --write                          # ... and update benchmarks/results

Both begin with the same weights, read the same batches with the same bits, and add the same noise to the latents, so
what differs is the arithmetic; their best models are scored by the same estimator, with the same noise. The figures are
about likelihood. The seconds are those of the training loop with its evaluations, one implementation after the other:
they are no measurement of speed, which report.py makes.

With --write: a JSON with the settings, the figures and the held-out loss over the steps, and for each data set a
picture: test images, their reconstructions, samples, and interpolations between test images, of genfuse's model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from genfuse.train.checkpoint import load_image_model
from genfuse.train.grids import grid, write_png
from genfuse.train.image_run import JOBS, how_pixels_are_modelled, train_image_model
from genfuse.train.images import ImageData
from report import RESULTS, machine, machine_slug

COLUMNS = 12
KEPT = (
    *("nll_nats", "nll_standard_error_nats", "nll_samples", "elbo_nats", "reconstruction_nats", "kl_nats", "images"),
    *("best_step", "steps", "seconds", "parameters", "likelihood", "binarized"),
)


def train(options: argparse.Namespace, data: str, implementation: str, folder: Path) -> dict[str, Any]:
    """One run: its figures, and the held-out loss over the steps."""
    given = {
        "data": data,
        "epochs": options.epochs,
        "nll_samples": options.nll_samples,
        "seed": options.seed,
        "implementation": implementation,
    }
    if options.model == "vae":
        given["architecture"] = options.architecture
    figures = train_image_model(options.model, given, out=folder)
    assert figures is not None
    checkpoint = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)
    history = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Recorder"))
    kept = {name: figures[name] for name in KEPT if name in figures}
    return {**kept, "held_out_loss": [[step, round(loss, 3)] for step, loss in history["held_out"]]}


@torch.no_grad()
def picture(folder: Path, path: Path, seed: int) -> None:
    """Test images, reconstructions, two rows of samples, two interpolations; 64 greys, which keeps the file small."""
    saved = load_image_model(folder)
    job = next(job for job in JOBS if job.model == saved.config["model"])
    settings: Any = job.settings_class.from_json(saved.config["run"]["settings"])
    source = job.read(settings)
    _, binary = how_pixels_are_modelled(settings, source)
    images = ImageData(source, settings.held_out, settings.split_seed, binary).held_out[: 2 * COLUMNS]
    model, shape = saved.model, images.shape[1:]
    rows = [images[:COLUMNS], model.reconstruct(images[:COLUMNS])]
    rows += model.sample(2 * COLUMNS, generator=torch.Generator().manual_seed(seed)).split(COLUMNS)
    rows += list(model.interpolate(images[:2], images[COLUMNS : COLUMNS + 2], COLUMNS))
    drawn = grid(torch.stack([row.reshape(COLUMNS, *shape) for row in rows]))
    write_png(path, drawn // 4 * 4 + 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["fashion-mnist", "mnist5k"])
    parser.add_argument("--model", choices=[job.name for job in JOBS], default="vae")
    parser.add_argument("--architecture", choices=["mlp", "conv"], default="mlp", help="of the VAE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[20, 100], help="one number, or one for each data set")
    parser.add_argument("--nll-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="update benchmarks/results")
    options = parser.parse_args()
    epochs = options.epochs if len(options.epochs) == len(options.data) else options.epochs[:1] * len(options.data)
    header = machine(torch.get_num_threads(), "cpu")
    record: dict[str, Any] = {"machine": header, "model": options.model, "runs": []}
    stem = f"{machine_slug(header)}-train-{options.model}"
    with tempfile.TemporaryDirectory() as scratch:
        for data, number in zip(options.data, epochs, strict=True):
            options.epochs = number
            run: dict[str, Any] = {"data": data, "epochs": number, "seed": options.seed}
            for implementation in ("genfuse", "torch"):
                folder = Path(scratch, data.replace("/", "_"), implementation)
                run[implementation] = train(options, data, implementation, folder)
            record["runs"].append(run)
            if options.write:
                ours = Path(scratch, data.replace("/", "_"), "genfuse")
                picture(ours, RESULTS / f"{stem}-{Path(data).name}.png", options.seed)
    if options.write:
        (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{'data':<16}{'epochs':>7}  {'':<8}{'NLL':>10}{'+-':>7}{'ELBO':>11}{'training':>11}")
    for run in record["runs"]:
        for implementation in ("genfuse", "torch"):
            figures = run[implementation]
            print(
                f"{run['data']:<16}{run['epochs']:>7}  {implementation:<8}{figures['nll_nats']:>10.3f}"
                f"{figures['nll_standard_error_nats']:>7.3f}{figures['elbo_nats']:>11.3f}{figures['seconds']:>9.1f} s"
            )


if __name__ == "__main__":
    main()
