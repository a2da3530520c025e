"""Training flows: tables and images as data, runs that are stopped and resumed, what they report and draw."""

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

from genfuse.train import Stopped, UserError, cli, flow_run
from genfuse.train.checkpoint import SavedFlow, load_any, load_flow, load_image_model
from genfuse.train.flow_module import FlowData, FlowModule
from genfuse.train.flow_run import JOBS, bits_per_dim, evaluate_flow, round_trip, sample_flow, score_flow, train_flow
from genfuse.train.images import Images
from genfuse.train.split import divide
from genfuse.train.tables import Standardization, TableData, is_table, load_table
from PIL import Image
from safetensors.torch import load_file

SHARED: dict[str, Any] = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2, "seed": 11, "save_every": 7}
TINY: dict[str, dict[str, Any]] = {
    "realnvp": {**SHARED, "flows": 2, "hidden": (8,)},
    "realnvp-images": {**SHARED, "channels": 4},
    "glow": {**SHARED, "levels": 2, "steps": 1, "channels": 4},
    "nsf": {**SHARED, "flows": 2, "hidden": (8,), "bins": 4},
    "nsf-autoregressive": {**SHARED, "flows": 2, "hidden": (8,), "bins": 4, "autoregressive": True},
    "maf": {**SHARED, "flows": 2, "hidden": (8,)},
    "iaf": {**SHARED, "flows": 2, "hidden": (8,)},
    "nsf-images": {**SHARED, "flows": 2, "hidden": (8,), "bins": 4},
    "maf-images": {**SHARED, "flows": 2, "hidden": (64,)},
}
KINDS = tuple(TINY)
OF_IMAGES = ("realnvp-images", "glow", "nsf-images", "maf-images")
DRAWN = ("nsf", "glow")  # the runs whose pictures are drawn, which takes longer than these models train
STEPS = 20  # two epochs of 320 items
SIZES = {
    "loss.png": (840, 504),
    "samples.png": (1008, 504),
    "temperatures.png": (1608, 360),
    "density.png": (900, 900),
    "roundtrip.png": (768, 456),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two; and one thread has one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """400 rows of three columns, and 400 grey images of 8 x 8."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(5)
    rows = random.normal(size=(400, 3)) @ random.normal(size=(3, 3)) * [1.0, 10.0, 0.1] + [0.0, 100.0, 5.0]
    (folder / "rows.csv").write_text(text(rows, header="length,mass,age"))
    np.save(folder / "images.npy", random.integers(0, 200, (400, 8, 8), dtype=np.uint8))
    return {"rows": folder / "rows.csv", "images": folder / "images.npy"}


@pytest.fixture(scope="module")
def whole(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs, each made once; the other tests compare with them."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                if kind not in DRAWN:
                    patch.setattr(flow_run, "draw_pictures", lambda *arguments: [])
                train(kind, files, made[kind])
        return made[kind]

    return run


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_run, "draw_pictures", lambda *arguments: [])


def train(
    kind: str, files: dict[str, Path], folder: Path, say: Callable[[str], None] | None = None, **options: Any
) -> Any:
    resume = options.pop("resume", False)
    data = files["images" if kind in OF_IMAGES else "rows"]
    given = {} if resume else {**TINY[kind], "data": str(data)}
    name = kind.partition("-")[0]
    return train_flow(name, {**given, **options}, out=folder, resume=resume, say=say or (lambda line: None))


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return loaded


def history(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = next(v for k, v in checkpoint(folder)["callbacks"].items() if k.startswith("Recorder"))
    return state


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def pictures(kind: str) -> set[str]:
    if kind not in DRAWN:
        return set()
    return {"samples.png", "temperatures.png", "roundtrip.png"} | (set() if kind in OF_IMAGES else {"density.png"})


# Tables.

ROWS = np.random.default_rng(7).normal(size=(30, 3)).round(4)


def text(rows: Any = ROWS, separator: str = ",", header: str = "", end: str = "\n") -> str:
    lines = [header] if header else []
    return end.join([*lines, *(separator.join(repr(float(value)) for value in row) for row in rows)]) + end


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (text(), ("x1", "x2", "x3")),
        (text(header="a,b,c"), ("a", "b", "c")),
        (text(header='"speed, m/s",b,"c"'), ("speed, m/s", "b", "c")),
        (text(header="\ufeffa,b,c"), ("a", "b", "c")),
        (text(separator=";", header="a;b;c"), ("a", "b", "c")),
        (text(separator="\t", header="a\tb\tc"), ("a", "b", "c")),
        (text(separator="  ", header="a b c"), ("a", "b", "c")),
        (text(separator=" "), ("x1", "x2", "x3")),
        (text(separator=", ", header="a, b, c"), ("a", "b", "c")),
        (text(header="a,b,c", end="\r\n"), ("a", "b", "c")),
        (text(header="a,b,c", end="\r"), ("a", "b", "c")),
        ("\n\n" + text(header="a,b,c", end="\n\n"), ("a", "b", "c")),
        (text(header="a,b,c").rstrip(), ("a", "b", "c")),
        (text().replace(",", '","').replace("\n", '"\n"').rstrip('"').join(['"', ""]), ("x1", "x2", "x3")),
        (text(header="a,,c"), ("a", "column 2", "c")),
    ],
)
def test_kinds_of_text(content: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode())
    found = load_table(str(path))
    assert found.columns == columns
    np.testing.assert_array_equal(found.rows, ROWS)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(content.encode()))
    np.testing.assert_array_equal(load_table(str(path.with_suffix(".csv.gz"))).rows, ROWS)


def test_numbers_in_all_spellings(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text() + "1,-2.5e-3,+.5\n 7. ,1E2,-0\n")
    np.testing.assert_array_equal(load_table(str(path)).rows[-2:], [[1.0, -0.0025, 0.5], [7.0, 100.0, 0.0]])


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    for names in (("x",), ("train",), ("anything",), ("X", "y")):
        np.savez(path, **dict.fromkeys(names, ROWS))
        found = load_table(str(path))
        assert (found.columns, found.test) == (("x1", "x2", "x3"), None)
        np.testing.assert_array_equal(found.rows, ROWS)
    np.savez(path, train=ROWS, test=ROWS[:4] + 1, val=ROWS[:3] + 2)
    found = load_table(str(path))
    assert found.test is not None
    assert found.validation is not None
    np.testing.assert_array_equal(found.test, ROWS[:4] + 1)
    np.testing.assert_array_equal(found.validation, ROWS[:3] + 2)
    np.save(tmp_path / "table.npy", ROWS[:, 0])
    assert load_table(str(tmp_path / "table.npy")).rows.shape == (30, 1)
    np.save(tmp_path / "table.npy", (ROWS * 100).astype(np.int16))
    assert load_table(str(tmp_path / "table.npy")).rows.dtype == np.float64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        ("a,b,c\n", "has a line of names and no rows"),
        (text(ROWS[:7]), "is too small: it has 7 rows, and at least 20 are needed"),
        (text(ROWS[:1]), "is too small: it has 1 row, and"),
        (text() + "1,2\n", "line 31 of .* has 2 cells, and line 1 has 3"),
        (text() + "1,2,3,4\n", "line 31 of .* has 4 cells, and line 1 has 3"),
        (text(header="a,b"), "line 2 of .* has 3 cells, and line 1 has 2"),
        (text() + "1,,3\n", "line 31 of .* has nothing in column 'x2'"),
        (text(header="a,b,c") + "\n1,red,3\n", "line 33 of .* has the text 'red' in column 'b'"),
        ("1.5,setosa,2\n" * 30, "line 1 of .* has the text 'setosa' in column 'x2'"),
        (text() + "1,1_000,3\n", "has the text '1_000'"),
        ("1,5;2,5\n" * 30, "has the text '1,5' in column 'a'|has the text '1,5'"),
        (text() + "1,nan,3\n", "holds nan in row 31 of column 'x2'"),
        (text(header="a,b,c") + "1,2,-inf\n", "holds -inf in row 31 of column 'c'"),
        (text() + "1,2,1e999\n", "holds inf in row 31"),
        ("\0\1\2", "neither UTF-8 text nor a NumPy file"),
        (
            "," + text(header="a,b,c").replace("\n", "\n{}").format(*(f"{row}," for row in range(30)), ""),
            "has no name and counts the rows",
        ),
        ('"' + "x" * 200_000 + '",2\n' + text(), "is no table of numbers"),
        (text() + '"' + "x" * 200_000 + '",2\n', "is no table of numbers"),
        (text() + "x" * 90 + ",2,3\n", "has the text 'xxxxxxxxxxxxxxxxxxxx...'"),
    ],
)
def test_texts_that_are_no_tables(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_table(str(path))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for content, message in (
        ("täble,b\n1,2\n".encode("latin-1"), "neither UTF-8 text"),
        (gzip.compress(text().encode())[:-9], "is a gzip file that is cut off or damaged"),
        (b"PK\x03\x04nothing", "is a .npz file that is cut off or damaged"),
        (b"\x93NUMPY\x01\x00", "is not a whole NumPy file of numbers"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_table(str(path))
    for array, message in (
        (np.zeros((4, 5, 5)), "its shape is 4 x 5 x 5, and a table is rows x columns"),
        (np.zeros((0, 5)), "its shape is 0 x 5"),
        (np.float64(3.0), "that of one number"),
        (np.full((40, 2), "a"), "its values are <U1, no numbers"),
        (np.full((40, 2), np.nan), "holds nan in row 1 of column 'x1'"),
        (np.array([None, {}]), "is not a whole NumPy file of numbers"),
    ):
        np.save(tmp_path / "table.npy", array, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            load_table(str(tmp_path / "table.npy"))
    np.savez(tmp_path / "two.npz", one=ROWS, two=ROWS)
    with pytest.raises(UserError, match="holds one, two: call the array of rows 'x'"):
        load_table(str(tmp_path / "two.npz"))
    np.savez(tmp_path / "two.npz", train=ROWS, test=ROWS[:, :2])
    with pytest.raises(UserError, match="has 3 columns, and its test rows have 2"):
        load_table(str(tmp_path / "two.npz"))
    with pytest.raises(UserError, match="there is no such file"):
        load_table(str(tmp_path / "missing.csv"))
    with pytest.raises(UserError, match="is a directory"):
        load_table(str(tmp_path))


def test_tables_and_images_are_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 5, 5)))
    np.save(tmp_path / "rows.npy", ROWS)
    np.savez(tmp_path / "images.npz", x_train=np.zeros((4, 5, 5)))
    np.savez(tmp_path / "rows.npz", train=ROWS, test=ROWS)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nothing")
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_table(str(path))] == ["rows.npy", "rows.npz"]
    assert all(is_table(name) for name in ("moons", "a.csv", "a.TSV", "b.txt.gz"))
    assert not any(is_table(name) for name in ("digits", "nowhere", str(tmp_path)))


def test_moons(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load_table("moons"), load_table("moons")
    assert first.fingerprint == second.fingerprint
    assert first.rows.shape == (12000, 2)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="the data set moons needs scikit-learn, which is not installed"):
        load_table("moons")


def test_parts_have_nothing_in_common() -> None:
    items = np.arange(1000)
    parts = divide("numbers", items, None, None, 0.2, seed=3)
    assert sorted([*parts.train, *parts.validation, *parts.test]) == list(range(1000))
    assert (len(parts.validation), len(parts.test)) == (200, 200)
    again = divide("numbers", items, None, None, 0.2, seed=3)
    other = divide("numbers", items, None, None, 0.2, seed=4)
    assert np.array_equal(parts.test, again.test)
    assert not np.array_equal(parts.test, other.test)
    own = divide("numbers", items, None, items[:10], None, seed=0)
    assert np.array_equal(own.test, items[:10])
    assert (len(own.train), len(own.validation)) == (900, 100)
    assert own.how == "its own test set, validation drawn with seed 0"
    both = divide("numbers", items, items[:7], items[:10], None, seed=0)
    assert (len(both.train), both.how) == (1000, "its own test set")
    with pytest.raises(UserError, match="has validation and test sets of its own"):
        divide("numbers", items, items[:7], items[:10], 0.1, seed=0)
    with pytest.raises(UserError, match="is too small"):
        divide("numbers", items[:2], None, None, None, seed=0)


def test_standardization(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).normal([5.0, -1e6, 1e-9], [2.0, 1e3, 1e-10], size=(400, 3))
    np.save(tmp_path / "rows.npy", rows)
    data = TableData(load_table(str(tmp_path / "rows.npy")), None, split_seed=0)
    assert torch.allclose(data.train.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(data.train.std(0, correction=0), torch.ones(3), atol=1e-5)
    assert not torch.allclose(data.test.mean(0), torch.zeros(3), atol=1e-4)  # the training rows' numbers, not its own
    restored = data.standardization.undo(data.test)
    np.testing.assert_allclose(restored, data.parts.test, rtol=1e-6)
    # A change of variables: the density of the data's units is that of the standardised rows over the volume.
    normal = torch.distributions.Normal(
        torch.tensor([5.0, -1e6, 1e-9]).double(), torch.tensor([2.0, 1e3, 1e-10]).double()
    )
    scaled = torch.distributions.Normal(
        (normal.mean - torch.tensor(data.standardization.mean)) / torch.tensor(data.standardization.std),
        normal.stddev / torch.tensor(data.standardization.std),
    )
    exact = normal.log_prob(torch.from_numpy(data.parts.test)).sum(1)
    seen = scaled.log_prob(data.test.double()).sum(1) - data.standardization.log_volume
    assert torch.allclose(exact, seen, rtol=1e-5)
    again = Standardization.from_json(data.standardization.to_json())
    assert again == data.standardization
    rows[:, 1] = 3.25
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(UserError, match=r"column 'x2' of .* has one value in all rows"):
        TableData(load_table(str(tmp_path / "rows.npy")), None, split_seed=0)
    rows[:, 1] = np.arange(400) % 3
    np.save(tmp_path / "rows.npy", rows)
    assert TableData(load_table(str(tmp_path / "rows.npy")), None, split_seed=0).doubtful() == ["x2"]


# Runs.


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_what_it_promises(kind: str, whole: Callable[[str], Path]) -> None:
    folder, figures = whole(kind), results(whole(kind))
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "last.ckpt", "model.safetensors", "results.json", "loss.png", "tensorboard"),
        *pictures(kind),
    }
    assert figures["steps"] == checkpoint(folder)["global_step"] == STEPS
    learnt = [loss for _, loss in history(folder)["train"]]
    assert learnt[-1] < learnt[0]
    best = min(loss for _, loss in history(folder)["held_out"])
    scale = bits_per_dim((1, 8, 8)) if kind in OF_IMAGES else 1.0
    assert figures["validation_bits_per_dim" if kind in OF_IMAGES else "validation_nats"] == pytest.approx(best * scale)
    assert figures["round_trip_largest"] < (0.05 if kind in OF_IMAGES else 1e-3)
    for picture in (*pictures(kind), "loss.png"):
        with Image.open(folder / picture) as drawn:
            colours = np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)
            assert len(colours) > 20, picture
            if kind not in OF_IMAGES:
                assert drawn.size == SIZES[picture], picture
    saved = load_flow(folder)
    assert not saved.model.training
    assert (saved.standardization is None) == (kind in OF_IMAGES)
    if saved.standardization is not None:
        assert saved.standardization.columns == ("length", "mass", "age")
    with pytest.raises(UserError, match="and this command wants a model of images"):
        load_image_model(folder)


@pytest.mark.parametrize(("kind", "at"), [*((kind, 13) for kind in KINDS), ("nsf", 6), ("glow", 1)])
def test_stopped_and_resumed(
    kind: str,
    at: int,
    whole: Callable[[str], Path],
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C finishes the step and saves it; the rest of the run is then what it would have been, bit for bit."""
    original = FlowModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    draws = at == 13 and kind in DRAWN
    whole(kind)
    if not draws:
        monkeypatch.setattr(flow_run, "draw_pictures", lambda *arguments: [])
    with monkeypatch.context() as patch:
        patch.setattr(FlowModule, "training_step", training_step)
        with pytest.raises(Stopped) as stop:
            train(kind, files, tmp_path)
    assert stop.value.step == checkpoint(tmp_path)["global_step"] == at
    train(kind, files, tmp_path, resume=True)
    a, b = checkpoint(whole(kind)), checkpoint(tmp_path)
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for key, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][key][name]), (key, name)
    for name in ("train", "held_out", "best"):
        assert history(whole(kind))[name] == history(tmp_path)[name], name
    best = load_file(whole(kind) / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in load_file(tmp_path / "model.safetensors").items())
    timed = {"seconds", "rows_per_second", "images_per_second"}
    figures = [results(folder) for folder in (whole(kind), tmp_path)]
    assert {k: v for k, v in figures[0].items() if k not in timed} == {
        k: v for k, v in figures[1].items() if k not in timed
    }
    for picture in pictures(kind) if draws else ():
        assert (whole(kind) / picture).read_bytes() == (tmp_path / picture).read_bytes(), picture


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_trains_alike(
    kind: str, whole: Callable[[str], Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights at the beginning, batches and noise: the first loss agrees to rounding, the rest nearly."""
    whole(kind)
    monkeypatch.setattr(flow_run, "draw_pictures", lambda *arguments: [])
    train(kind, files, tmp_path, implementation="torch")
    ours, twins = history(whole(kind))["train"], history(tmp_path)["train"]
    for (step, loss), (_, twin) in zip(ours, twins, strict=True):
        assert twin == pytest.approx(loss, rel=1e-3), step
    assert results(tmp_path)["implementation"] == "torch"
    assert results(tmp_path)["nll_nats"] == pytest.approx(results(whole(kind))["nll_nats"], rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_finds_what_training_measured(kind: str, whole: Callable[[str], Path]) -> None:
    figures, wanted = evaluate_flow(load_flow(whole(kind))), results(whole(kind))
    for name in figures.keys() - {"data"}:
        assert figures[name] == pytest.approx(wanted[name], rel=1e-6), name
    assert figures["data"].startswith("test part of")
    assert figures["images" if kind in OF_IMAGES else "rows"] == 40


def test_evaluate_other_data(whole: Callable[[str], Path], files: dict[str, Path], tmp_path: Path) -> None:
    saved = load_flow(whole("nsf"))
    assert evaluate_flow(saved, str(files["rows"]))["rows"] == 400
    assert evaluate_flow(saved, limit=7)["rows"] == 7
    far = tmp_path / "far.npz"
    np.savez(far, train=np.zeros((30, 3)), test=np.full((4, 3), 1e3))
    figures = evaluate_flow(saved, str(far))
    assert (figures["rows"], figures["data"]) == (4, f"test set of {far}")
    assert figures["nll_nats"] > results(whole("nsf"))["nll_nats"] + 100.0
    np.save(tmp_path / "two.npy", np.ones((30, 2)))
    with pytest.raises(UserError, match="has 2 columns, and the model is of 3"):
        evaluate_flow(saved, str(tmp_path / "two.npy"))
    with pytest.raises(UserError, match="holds images, and the model is of a table"):
        evaluate_flow(saved, str(files["images"]))
    of_images = load_flow(whole("glow"))
    assert evaluate_flow(of_images, str(files["images"]), limit=9)["images"] == 9
    with pytest.raises(UserError, match="holds a table, and the model is of images"):
        evaluate_flow(of_images, str(files["rows"]))
    np.save(tmp_path / "small.npy", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(UserError, match="holds images of 1 x 4 x 4, and the model is of images of 1 x 8 x 8"):
        evaluate_flow(of_images, str(tmp_path / "small.npy"))
    with pytest.raises(UserError, match="has pixels of 17 values, and the model is of 256"):
        evaluate_flow(of_images, "digits")
    with pytest.raises(UserError, match="--limit must be at least 1, not 0"):
        evaluate_flow(saved, limit=0)
    content = files["rows"].read_text()
    try:
        files["rows"].write_text(content + "1,2,3\n")
        with pytest.raises(UserError, match="has changed since the model was trained"):
            evaluate_flow(saved)
        with pytest.raises(UserError, match=r"has changed since the run .* cannot go on with other data"):
            train("nsf", files, whole("nsf"), resume=True)
    finally:
        files["rows"].write_text(content)


def test_score_of_a_density_that_is_known(tmp_path: Path) -> None:
    """A model that is a standard normal whatever its weights: nats of the table's units, by the change of variables."""
    rows = np.random.default_rng(2).normal([1.0, -50.0], [3.0, 0.2], size=(500, 2))
    np.save(tmp_path / "rows.npy", rows)
    data = FlowData(load_table(str(tmp_path / "rows.npy")), None, 0)

    class Normal(torch.nn.Module):
        def log_prob(self, x: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)

    model = Normal()
    model.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    figures = score_flow(SavedFlow(model, data.standardization, {}, {}, Path()), data.test, seed=0)
    table = TableData(load_table(str(tmp_path / "rows.npy")), None, 0)
    mean, std = table.parts.train.mean(0), table.parts.train.std(0)
    exact = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(std))
    losses = -exact.log_prob(torch.from_numpy(table.parts.test)).sum(1)
    assert figures["nll_nats"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert figures["nll_nats_standardized"] == pytest.approx(float(losses.mean()) - math.log(std.prod()), rel=1e-5)
    assert figures["nll_standard_error_nats"] == pytest.approx(float(losses.std()) / math.sqrt(50), rel=1e-5)
    assert figures["rows"] == 50


def test_the_score_of_images_is_a_bound_in_bits(whole: Callable[[str], Path], files: dict[str, Path]) -> None:
    saved = load_flow(whole("glow"))
    source = Images("noise", np.load(files["images"])[:, None])
    data = FlowData(source, None, 0)
    assert data.test.dtype == torch.uint8
    figures = score_flow(saved, data.test, seed=1)
    assert figures["bits_per_dim"] == pytest.approx(figures["nll_nats"] / (64 * math.log(2)))
    # 200 values of equal chance have log2 200 bits, which no model beats but by chance.
    assert math.log2(200) - 0.2 < figures["bits_per_dim"] < 9.5
    other = score_flow(saved, data.test, seed=2)
    assert other["bits_per_dim"] != figures["bits_per_dim"]  # other dequantisation noise
    before = torch.get_rng_state()
    score_flow(saved, data.test, seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["nsf", "glow", "iaf"])
def test_round_trip(kind: str, whole: Callable[[str], Path], files: dict[str, Path]) -> None:
    saved = load_flow(whole(kind))
    job = next(job for job in JOBS if job.model == saved.config["model"])
    settings = job.settings_class.from_json(saved.config["run"]["settings"])
    items = FlowData(job.read(settings), None, 0).test
    errors = round_trip(saved.model, items)
    assert set(errors) == {"float32", "float64"}
    assert all(values.shape == (40,) and values.dtype == np.float64 for values in errors.values())
    assert 0.0 < errors["float32"].max() < 0.05
    assert errors["float64"].max() < 1e-6 * max(errors["float32"].max(), 1e-5)
    assert next(saved.model.parameters()).dtype == torch.float32  # a copy was converted


def test_sample(whole: Callable[[str], Path], tmp_path: Path) -> None:
    saved = load_flow(whole("nsf"))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        for suffix in (".csv", ".npy", ".png"):
            sample_flow(saved, tmp_path / f"{out}{suffix}", count=70, seed=seed)
    for suffix in (".csv", ".npy", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        assert (tmp_path / f"a{suffix}").read_bytes() != (tmp_path / f"c{suffix}").read_bytes()
    rows = np.load(tmp_path / "a.npy")
    again = load_table(str(tmp_path / "a.csv"))
    assert again.columns == ("length", "mass", "age")
    np.testing.assert_array_equal(again.rows, rows)
    assert abs(rows[:, 1].mean() - 100.0) < 20.0  # the data's units
    sample_flow(saved, tmp_path / "cold.npy", count=70, seed=1, temperature=0.0)
    assert np.ptp(np.load(tmp_path / "cold.npy"), axis=0).max() < 1e-3
    for kind in OF_IMAGES:
        sample_flow(load_flow(whole(kind)), tmp_path / "images.png", count=7, seed=1)
        with Image.open(tmp_path / "images.png") as drawn:
            assert drawn.mode == "L"
            assert drawn.size == (3 * 58 + 2, 3 * 58 + 2)
    for arguments, words in (
        ({"count": 0}, "--count must be at least 1, not 0"),
        ({"temperature": -1.0}, "--temperature must not be negative"),
        ({"temperature": math.nan}, "--temperature must not be negative"),
        ({"seed": 2**64}, "--seed must be a number of 64 bits"),
        ({"out": tmp_path / "a.jpg"}, "must be a .csv, .npy or .png file"),
        ({"out": tmp_path / "no" / "a.csv"}, "cannot write .*no such file"),
    ):
        with pytest.raises(UserError, match=words):
            sample_flow(saved, **{"out": tmp_path / "x.png", **arguments})
    with pytest.raises(UserError, match=r"must be a \.png file"):
        sample_flow(load_flow(whole("glow")), tmp_path / "a.csv")


def test_tables_of_one_and_two_columns(tmp_path: Path) -> None:
    """Their densities are drawn on a line and on a grid; what couples columns needs two of them."""
    random = np.random.default_rng(3)
    for columns in (1, 2):
        data = tmp_path / f"{columns}.csv"
        np.savetxt(data, random.normal(size=(200, columns)), delimiter=",")
        figures = train_flow(
            "nsf",
            {**TINY["nsf-autoregressive"], "data": str(data), "linear": "none"},
            out=tmp_path / f"run{columns}",
            say=lambda line: None,
        )
        assert figures is not None
        assert figures["nll_nats"] == pytest.approx(columns * 0.5 * math.log(2 * math.pi * math.e), abs=0.6 * columns)
        with Image.open(tmp_path / f"run{columns}" / "density.png") as drawn:
            assert drawn.size == ((720, 480) if columns == 1 else (1080, 504))
    with pytest.raises(UserError, match="the model will not do"):
        train_flow("nsf", {"data": str(tmp_path / "1.csv")}, out=tmp_path / "no", say=lambda line: None)
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("no_pictures")
def test_images_of_the_datas_own_test_set_and_levels(tmp_path: Path) -> None:
    data = tmp_path / "bits.npz"
    images = np.random.default_rng(1).integers(0, 2, (70, 4, 4), dtype=np.uint8)
    np.savez(data, x_train=images[:60], x_test=images[60:])
    lines: list[str] = []
    given = {**TINY["glow"], "data": str(data), "levels": 1}
    figures = train_flow("glow", given, out=tmp_path / "run", say=lines.append)
    assert figures is not None
    assert figures["images"] == 10
    assert any("54 + 6 + 10 images of 4 x 4, 2 levels" in line for line in lines)
    assert any("its own test set, validation drawn with seed 0" in line for line in lines)
    assert load_flow(tmp_path / "run").model.dequantize.levels == 2


def test_reversible_and_more_epochs(
    files: dict[str, Path], whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole("glow")
    monkeypatch.setattr(flow_run, "draw_pictures", lambda *arguments: [])
    train("glow", files, tmp_path / "a", reversible=True)
    left, right = results(whole("glow")), results(tmp_path / "a")
    assert right["bits_per_dim"] == pytest.approx(left["bits_per_dim"], rel=1e-3)
    train("maf", files, tmp_path / "b", epochs=1)
    assert train("maf", files, tmp_path / "b", resume=True, epochs=2)["steps"] == STEPS
    with pytest.raises(UserError, match="began with --flows 2: it cannot be resumed with 3"):
        train("maf", files, tmp_path / "b", resume=True, flows=3)
    with pytest.raises(UserError, match="trains a MAF, not a IAF"):
        train("iaf", files, tmp_path / "b", resume=True)
    lines: list[str] = []
    train("maf", files, tmp_path / "b", lines.append, resume=True)
    assert any("nothing to resume" in line for line in lines)


@pytest.mark.usefixtures("no_pictures")
def test_a_column_that_is_not_continuous_gets_a_warning(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    random = np.random.default_rng(1)
    np.savetxt(data, np.stack([random.normal(size=100), random.integers(0, 3, 100)], 1), delimiter=",")
    lines: list[str] = []
    train_flow("maf", {**TINY["maf"], "data": str(data), "epochs": 1}, out=tmp_path / "run", say=lines.append)
    assert any(line.startswith("warning") and "column 'x2' has few distinct values" in line for line in lines)


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
        (["glow", "--data", "moons"], "genfuse train glow learns images, and moons holds tables"),
        (["glow", "--data", "moons"], "they are for genfuse train realnvp or nsf or maf or iaf"),
        (["maf", "--data", "moon"], "nor a data set of that name (moons, digits, mnist5k, fashion-mnist)"),
        (["maf", "--data", "text.csv"], "has the text 'red' in column 'b'"),
        (["maf", "--data", "missing.csv"], "line 3 of"),
        (["maf", "--data", "short.csv"], "is too small: it has 2 rows"),
        (["maf", "--data", "ragged.csv"], "has 1 cell, and line 1 has 2"),
        (["maf", "--data", "nan.csv"], "holds nan in row 2 of column 'b'"),
        (["nsf", "--bins", "0"], "--bins must be at least 1, not 0"),
        (["nsf", "--tail-bound", "0"], "--tail-bound must be above 0"),
        (["nsf", "--linear", "qr"], "--linear must be one of lu, permutation, none"),
        (["nsf", "--hidden", "a"], "--hidden is whole numbers separated by commas"),
        (["nsf", "--held-out", "0.5"], "--held-out is kept twice"),
        (["nsf", "--held-out", "0"], "--held-out is a share"),
        (["realnvp", "--flows", "0"], "--flows must be at least 1, not 0"),
        (["realnvp", "--grey"], "--image-size and --grey are for images, and moons is a table"),
        (["glow", "--levels", "4"], "the model will not do"),
        (["glow", "--channels", "1000000000000"], "needs more memory"),
        (["glow", "--lr", "0"], "--learning-rate must be above 0"),
        (["glow", "--clip", "-1"], "--clip must not be negative"),
        (["iaf", "--resume"], "there is no run in"),
        (["iaf", "--precision", "8"], "this machine cannot train that way"),
        (["glow", "--bins", "3"], "No such option"),
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
    Path("text.csv").write_text("a,b\n1,red\n")
    Path("missing.csv").write_text("a,b\n1,2\n3,\n")
    Path("short.csv").write_text("a,b\n1,2\n3,4\n")
    Path("ragged.csv").write_text("a,b\n1,2\n3\n")
    Path("nan.csv").write_text("a,b\n1,2\n3,nan\n")
    assert words in fails(["train", *arguments], capsys)
    assert not Path("runs").exists()


def test_from_beginning_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, resume, sample, evaluate, info, by the command line; and options that belong to other models."""
    monkeypatch.chdir(tmp_path)
    command = ["train", "nsf", "--epochs", "1", "--flows", "1", "--hidden", "8", "--bins", "4"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    for words in (
        "moons: 9,600 + 1,200 + 1,200 rows of 2 columns",
        "validation ",
        "on the test rows",
        "density in the data's units",
        "density.png",
    ):
        assert words in said, words
    nll = f"{results(Path('runs/nsf'))['nll_nats']:.4f} nats"
    assert cli.run(["train", "nsf", "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert cli.run(["evaluate", "runs/nsf"]) == 0
    said = capsys.readouterr().out
    assert "test part of moons: 1,200 rows" in said
    assert nll in said
    assert cli.run(["sample", "runs/nsf", "--count", "30", "--temperature", "0.5", "--out", "rows.csv"]) == 0
    assert capsys.readouterr().out == "30 rows in rows.csv\n"
    assert cli.run(["evaluate", "runs/nsf/model.safetensors", "--data", "rows.csv", "--limit", "9"]) == 0
    assert "rows.csv: 9 rows" in capsys.readouterr().out
    assert cli.run(["info", "runs/nsf"]) == 0
    said = capsys.readouterr().out
    for words in ("NeuralSplineFlow", "num bins", "columns", "x y", "test NLL", nll, "model hash"):
        assert words in said, words
    assert "--prompt is not for models of the class NeuralSplineFlow" in fails(
        ["sample", "runs/nsf", "--prompt", "a"], capsys
    )
    assert "--nll-samples is not for models" in fails(["evaluate", "runs/nsf", "--nll-samples", "3"], capsys)
    assert "describe a genfuse image model" in fails(["train", "vae", "--resume", "--out", "runs/nsf"], capsys)
    assert isinstance(load_any("runs/nsf").config["standardization"]["mean"][0], float)
    for name in ("realnvp", "glow", "nsf", "maf", "iaf"):
        assert cli.run(["train", name, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(words in said for words in ("--data", "--resume", "--clip", "--precision", "--held-out")), name


def test_a_damaged_standardization_is_refused(whole: Callable[[str], Path], tmp_path: Path) -> None:
    """It decides what the numbers mean, so it belongs to the model that the weights name."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((whole("maf") / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["standardization"]["mean"][0] += 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"belongs to another config\.json"):
        load_flow(tmp_path)
