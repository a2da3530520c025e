"""Training flows: tables and images as data, runs that are stopped and resumed, what they report and draw."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

from genfuse.train import UserError
from genfuse.train.split import divide
from genfuse.train.tables import Standardization, TableData, is_table, load_table


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two; and one thread has one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
