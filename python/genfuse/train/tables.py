"""Tables of numbers as training data: reading them from text and NumPy files, splitting and standardising them.

A table is rows of real numbers, of which a flow learns the joint density. What is wrong with a file is said in one
sentence that names the line and the column. The rows that a step reads are a function of the seed and the step.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import first_line
from .errors import UserError
from .settings import TABLE_SETS
from .split import divide

__all__ = ["Standardization", "Table", "TableData", "is_table", "load_table"]

Numbers = NDArray[np.float64]

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat")
ARRAYS = ("x", "train", "x_train", "data", "X", "arr_0")  # names of a .npz file's rows to learn from,
VALIDATION_ARRAYS = ("validation", "val", "x_val")  # of those that choose the best model,
TEST_ARRAYS = ("test", "x_test")  # and of those to score it on
FEWEST_ROWS = 20
FEWEST_VALUES = 20  # a column with fewer distinct values than this is perhaps not continuous
MOONS_ROWS, MOONS_NOISE, MOONS_SEED = 12_000, 0.1, 0


@dataclass(frozen=True)
class Table:
    """What was read.

    Attributes:
        name: for messages.
        rows: float64 ``[N, D]``.
        columns: D names.
        validation, test: rows that the data themselves set apart for choosing and for scoring.
    """

    name: str
    rows: Numbers
    columns: tuple[str, ...]
    validation: Numbers | None = None
    test: Numbers | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the rows, by which a resumed run knows its data."""
        digest = hashlib.sha256(f"table {self.rows.shape}".encode())
        for part in (self.rows, self.validation, self.test):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def is_table(data: str) -> bool:
    """Whether data of this name or path are a table, and not images.

    Text files are; of NumPy's files, those whose array (of a .npz file: the one that would be read) has two
    dimensions or fewer.

    Example:
        >>> is_table("moons"), is_table("measurements.csv"), is_table("digits")
        (True, True, False)
    """
    path = Path(data)
    if data in TABLE_SETS or path.name.lower().removesuffix(".gz").endswith(TEXT_SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(6)
            if start.startswith(b"\x93NUMPY"):
                return bool(np.load(path, mmap_mode="r", allow_pickle=False).ndim <= 2)
            if start.startswith(b"PK\x03\x04"):
                with np.load(path, allow_pickle=False) as arrays:
                    chosen = _first(arrays.files, ARRAYS)
                    return chosen is not None and bool(arrays[chosen].ndim <= 2)
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, KeyError):
        pass  # whoever reads it as images says what is wrong
    return False


def load_table(data: str) -> Table:
    """Read a table to learn from.

    Args:
        data: ``"moons"`` (12 000 points of scikit-learn's two half moons with noise 0.1), a text file (commas,
            semicolons, tabs or blanks between numbers, with a line of names or without, gzipped or not), or a .npy or
            .npz file of an array ``[rows, columns]``, called ``x``, or ``train`` and ``test``.

    Raises:
        UserError: the data cannot be read, or are no table of finite numbers.

    Example:
        >>> moons = load_table("moons")
        >>> moons.rows.shape, moons.columns
        ((12000, 2), ('x', 'y'))
    """
    if data in TABLE_SETS:
        return _moons()
    path = Path(data)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"cannot read {path}: there is no such file.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}.") from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is.") from None
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path} is a gzip file that is cut off or damaged.") from None
    if content.startswith(b"\x93NUMPY"):
        return _checked(Table(str(path), *_array(_load(content, path), str(path))))
    if content.startswith(b"PK\x03\x04"):
        return _checked(_npz(content, path))
    return _checked(_text(content, path))


def _moons() -> Table:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise UserError(
            "the data set moons needs scikit-learn, which is not installed: pip install 'genfuse[train]'."
        ) from None
    rows, _ = datasets.make_moons(MOONS_ROWS, noise=MOONS_NOISE, random_state=MOONS_SEED)
    return Table("moons", np.asarray(rows, np.float64), ("x", "y"))


def _checked(table: Table) -> Table:
    """The table, if it has enough rows, all of them finite."""
    for what, rows in (("", table.rows), ("validation ", table.validation), ("test ", table.test)):
        if rows is None:
            continue
        if rows.shape[1] != len(table.columns):
            raise UserError(f"{table.name} has {len(table.columns)} columns, and its {what}rows have {rows.shape[1]}.")
        wrong = np.argwhere(~np.isfinite(rows))
        if len(wrong):
            row, column = wrong[0]
            raise UserError(
                f"{table.name} holds {rows[row, column]} in {what}row {row + 1} of column {table.columns[column]!r}: "
                "leave out or fill the rows where a value is missing."
            )
    fewest = FEWEST_ROWS if table.test is None else 2
    if len(table.rows) < fewest:
        rows_there = "1 row" if len(table.rows) == 1 else f"{len(table.rows)} rows"
        raise UserError(f"{table.name} is too small: it has {rows_there}, and at least {fewest} are needed.")
    return table


# NumPy's files.


def _load(content: bytes, path: Path) -> NDArray[np.float64]:
    try:
        loaded: NDArray[np.float64] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a whole NumPy file of numbers ({first_line(error)}).") from None
    return loaded


def _npz(content: bytes, path: Path) -> Table:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            names = list(file.files)
            chosen = _first(names, ARRAYS)
            if chosen is None:
                listed = ", ".join(names) or "nothing"
                raise UserError(
                    f"{path} holds {listed}: call the array of rows 'x', or two of them 'train' and 'test'."
                )
            others = [_first(names, part, among_all=False) for part in (VALIDATION_ARRAYS, TEST_ARRAYS)]
            arrays = [None if name is None else file[name] for name in (chosen, *others)]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, SyntaxError) as error:
        raise UserError(f"{path} is a .npz file that is cut off or damaged ({first_line(error)}).") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not hold arrays of numbers alone ({first_line(error)}).") from None
    assert arrays[0] is not None
    rows, columns = _array(arrays[0], f"{chosen!r} in {path}")
    validation, test = (
        None if array is None else _array(array, f"{name!r} in {path}")[0]
        for name, array in zip(others, arrays[1:], strict=True)
    )
    return Table(str(path), rows, columns, validation, test)


def _first(there: Sequence[str], wanted: Sequence[str], among_all: bool = True) -> str | None:
    chosen = next((name for name in wanted if name in there), None)
    return there[0] if chosen is None and among_all and len(there) == 1 else chosen


def _array(array: NDArray[np.float64], name: str) -> tuple[Numbers, tuple[str, ...]]:
    """An array as rows of numbers, and names for its columns."""
    if array.dtype.kind not in "buif":
        raise UserError(f"{name} is no table: its values are {array.dtype}, no numbers.")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.size == 0:
        shape = " x ".join(map(str, array.shape)) or "that of one number"
        raise UserError(f"{name} is no table: its shape is {shape}, and a table is rows x columns.")
    return array.astype(np.float64), tuple(f"x{column + 1}" for column in range(array.shape[1]))


# Text files.


def _text(content: bytes, path: Path) -> Table:
    if not content.strip():
        raise UserError(f"{path} is empty: give a table of numbers.")
    try:
        if b"\0" in content:
            raise UnicodeDecodeError("utf-8", content, 0, 1, "binary")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no table: it is neither UTF-8 text nor a NumPy file.") from None
    separator = _separator(next(line for line in text.splitlines() if line.strip()))
    lines = _cells(text, separator)
    try:
        (first_number, first), second = next(lines), next(lines, None)
    except csv.Error as error:
        raise UserError(f"{path} is no table of numbers ({first_line(error)}).") from None
    header = not any(_is_number(cell) for cell in first)
    columns = tuple(cell or f"column {column + 1}" for column, cell in enumerate(first)) if header else None
    if columns is None:
        columns = tuple(f"x{column + 1}" for column in range(len(first)))
    elif second is None:
        raise UserError(f"{path} is too small: it has a line of names and no rows.")
    try:
        # NumPy's reader is fast; where it stops, the slow one below says why.
        rows = np.loadtxt(
            io.StringIO(text, newline=None),
            delimiter=separator,
            skiprows=first_number if header else 0,
            comments=None,
            quotechar='"',
            ndmin=2,
        )
    except ValueError:
        rows = None
    if rows is None or rows.shape[1] != len(columns):
        try:
            raise _why(_cells(text, separator), path, first_number, len(first), columns, header)
        except csv.Error as error:
            raise UserError(f"{path} is no table of numbers ({first_line(error)}).") from None
    if header and first[0] == "" and np.array_equal(rows[:, 0], np.arange(len(rows))):
        raise UserError(
            f"the first column of {path} has no name and counts the rows, which is no datum: leave it out "
            "(pandas' to_csv does with index=False)."
        )
    return Table(str(path), rows.astype(np.float64), columns)


def _separator(line: str) -> str | None:
    """What stands between the cells of a line; None for blanks."""
    return next((character for character in "\t;," if character in line), None)


def _cells(text: str, separator: str | None) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not empty, as their number (from 1) and their cells."""
    if separator is None:
        for number, line in enumerate(io.StringIO(text, newline=None), 1):
            if line.strip():
                yield number, line.split()
        return
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True)
    for cells in reader:
        if any(cell.strip() for cell in cells) or len(cells) > 1:
            yield reader.line_num, [cell.strip() for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell  # which Python takes between digits, and NumPy does not


def _why(
    lines: Iterator[tuple[int, list[str]]],
    path: Path,
    first_number: int,
    width: int,
    columns: tuple[str, ...],
    header: bool,
) -> UserError:
    """What is wrong with lines that NumPy could not read."""
    for number, cells in lines:
        if header and number == first_number:
            continue
        if len(cells) != width:
            many = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
            return UserError(f"line {number} of {path} has {many}, and line {first_number} has {width}.")
        for column, cell in enumerate(cells):
            if _is_number(cell):
                continue
            where = f"line {number} of {path}"
            if not cell:
                return UserError(
                    f"{where} has nothing in column {columns[column]!r}: leave out or fill the rows where a value is "
                    "missing."
                )
            shown = cell if len(cell) <= 20 else cell[:20] + "..."
            return UserError(
                f"{where} has the text {shown!r} in column {columns[column]!r}: a table is of numbers alone, with a "
                "decimal point; leave out the columns that are not."
            )
    return UserError(f"{path} is no table of numbers.")


# What a run sees of them.


@dataclass(frozen=True)
class Standardization:
    """``(x - mean) / std``, column by column, of the rows that are learnt from.

    Args:
        mean, std: D numbers each.
        columns: D names.

    Example:
        >>> both = Standardization((1.0, 2.0), (2.0, 4.0), ("a", "b"))
        >>> both.apply(np.array([[3.0, 6.0]])), both.undo(torch.ones(1, 2))
        (tensor([[1., 1.]]), array([[3., 6.]]))
        >>> both.log_volume == math.log(8)
        True
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    columns: tuple[str, ...]

    @classmethod
    def of(cls, rows: Numbers, columns: tuple[str, ...], name: str) -> Standardization:
        mean, std = rows.mean(0), rows.std(0)
        for column, spread, middle in zip(columns, std, mean, strict=True):
            if not spread > 1e-12 * abs(middle):
                raise UserError(
                    f"column {column!r} of {name} has one value in all rows that are learnt from, which has no "
                    "density: leave it out."
                )
            if not (math.isfinite(spread) and math.isfinite(middle)):
                raise UserError(f"column {column!r} of {name} has values too large to compute with.")
        return cls(tuple(mean.tolist()), tuple(std.tolist()), columns)

    @property
    def log_volume(self) -> float:
        """``-log p(x)`` in the data's units, less that of the standardised row: the sum of ``log std``."""
        return float(np.log(self.std).sum())

    def apply(self, rows: Numbers) -> Tensor:
        """Float32 ``[N, D]``, as the model sees them."""
        return torch.from_numpy(((rows - np.array(self.mean)) / np.array(self.std)).astype(np.float32))

    def undo(self, rows: Tensor) -> Numbers:
        """Float64 ``[N, D]`` in the data's units."""
        undone: Numbers = rows.detach().double().cpu().numpy() * np.array(self.std) + np.array(self.mean)
        return undone

    def to_json(self) -> dict[str, list[float] | list[str]]:
        return {"mean": list(self.mean), "std": list(self.std), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, values: dict[str, list[float] | list[str]]) -> Standardization:
        mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
        return cls(mean, std, tuple(str(name) for name in values["columns"]))


class TableData:
    """A table divided into rows to learn from, to choose the best model by, and to score it on; standardised.

    Parts that the data do not set apart themselves are drawn with `split_seed`, `held_out` of the rows each.

    Args:
        source: the table.
        held_out: share, in (0, 0.5); None for a tenth.
        split_seed: of the division.

    Attributes:
        parts: the rows, in the data's units.
        train, validation, test: float32 ``[N, D]``.
        standardization: by the mean and the standard deviation of the rows that are learnt from.

    Raises:
        UserError: a column is constant, or there is nothing to divide.

    Example:
        >>> data = TableData(load_table("moons"), None, split_seed=0)
        >>> len(data.train), len(data.validation), len(data.test)
        (9600, 1200, 1200)
    """

    def __init__(self, source: Table, held_out: float | None, split_seed: int) -> None:
        self.source = source
        self.parts = divide(source.name, source.rows, source.validation, source.test, held_out, split_seed)
        self.standardization = Standardization.of(self.parts.train, source.columns, source.name)
        self.train, self.validation, self.test = (
            self.standardization.apply(part) for part in (self.parts.train, self.parts.validation, self.parts.test)
        )

    def doubtful(self) -> list[str]:
        """The columns that do not look continuous, whose density can grow without bound."""
        few = (len(np.unique(column)) < min(FEWEST_VALUES, len(column)) for column in self.parts.train.T)
        return [name for name, is_so in zip(self.source.columns, few, strict=True) if is_so]
