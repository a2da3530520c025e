"""Text as training data: reading it, splitting it, numbering its characters or bytes, and cutting it into windows.

The order in which windows are read is a pure function of the seed and the global step (`WindowOrder`).
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .order import BatchOrder

__all__ = ["DEFAULT_DATA", "TextData", "Vocabulary", "WindowOrder", "load_text"]

Level = Literal["char", "byte"]
Tokens = NDArray[np.integer[Any]]

DEFAULT_DATA = "pydoc_data.topics"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a text: its characters, or the 256 bytes of its UTF-8 encoding.

    At character level token 0 stands for every character that is not in `characters` and reads as U+FFFD; token k is
    ``characters[k - 1]``.

    Example:
        >>> vocabulary = Vocabulary.of("abba", "char")
        >>> vocabulary.size, vocabulary.encode("bax").tolist(), vocabulary.decode([2, 1])
        (3, [2, 1, 0], 'ba')
    """

    level: Level
    characters: str = ""

    @classmethod
    def of(cls, text: str, level: Level) -> Vocabulary:
        """The vocabulary of `text`: its characters in order of code point, or all bytes."""
        if level == "byte":
            return cls("byte")
        return cls("char", "".join(sorted(set(text) - {UNKNOWN})))

    @property
    def size(self) -> int:
        return 256 if self.level == "byte" else len(self.characters) + 1

    def encode(self, text: str) -> Tokens:
        """Tokens of `text`, in the smallest unsigned type that holds them."""
        if self.level == "byte":
            return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        table = np.frombuffer(self.characters.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        small = np.min_scalar_type(self.size - 1)
        if table.size == 0:
            return np.zeros(points.size, dtype=small)
        index = np.minimum(np.searchsorted(table, points), table.size - 1)
        return np.where(table[index] == points, index + 1, 0).astype(small)

    def decode(self, tokens: Any) -> str:
        """The text of a sequence of tokens; bytes that are no UTF-8 read as U+FFFD."""
        numbers = np.asarray(tokens, dtype=np.int64)
        if self.level == "byte":
            return numbers.astype(np.uint8).tobytes().decode("utf-8", "replace")
        table = UNKNOWN + self.characters
        return "".join(table[number] for number in numbers)

    def unknown(self, text: str) -> list[str]:
        """The characters of `text` that this vocabulary does not have, each once."""
        return [] if self.level == "byte" else sorted(set(text) - set(self.characters))


@dataclass(frozen=True)
class Text:
    """What was read: the text, a name for messages, and how many files of a folder were passed over."""

    name: str
    text: str
    files: int = 1
    skipped: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the text, by which a resumed run knows its data."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogateescape")).hexdigest()


def load_text(path: str | os.PathLike[str] | None) -> Text:
    """Read the text to learn from: a UTF-8 file, every UTF-8 file in a folder, or the default text.

    In a folder, files are read in the order of their paths, at any depth; hidden files and folders, and files that are
    empty or no UTF-8 text, are passed over. The default, ``None`` or ``"pydoc_data.topics"``, is the language
    reference that comes with Python (`default_text`).

    Raises:
        UserError: the path cannot be read, or there is no text in it.
    """
    if path is None or os.fspath(path) == DEFAULT_DATA:
        return Text(DEFAULT_DATA, default_text())
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        content = _read_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}.") from None
    if not content:
        raise UserError(f"{path} is empty: give a file or folder with UTF-8 text.")
    return Text(str(path), content)


def _read_file(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{raw[error.start]:02x} at position {error.start}): "
            "convert it to UTF-8 or give another file."
        ) from None
    if "\0" in text:
        raise UserError(f"{path} is binary, not text (a zero byte at position {raw.index(0)}): give a UTF-8 text file.")
    return text.replace("\r\n", "\n")


def _read_folder(folder: Path) -> Text:
    parts: list[str] = []
    skipped = 0
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or not path.is_file():
                continue
            try:
                content = _read_file(path)
            except (UserError, OSError):
                content = ""
            if content.strip():
                parts.append(content if content.endswith("\n") else content + "\n")
            else:
                skipped += 1
    if not parts:
        why = f"none of its {skipped} files is UTF-8 text" if skipped else "it has no files"
        raise UserError(f"there is no text in {folder}: {why}.")
    return Text(str(folder), "\n".join(parts), files=len(parts), skipped=skipped)


def default_text() -> str:
    """The topics of Python's help system (``pydoc_data.topics``): 370 000 characters of technical English.

    Many topics repeat paragraphs of others word for word. Each paragraph is kept once, so that held-out text is text
    that training has not seen; a topic that loses more than half of itself that way is left out.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in re.split(r"\n{2,}", topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if len(words) < 40 or words not in seen:  # headings and short lines recur in any text
                paragraphs.append(paragraph)
                seen.add(words)
        content = "\n\n".join(paragraphs)
        if 2 * len(content) >= len(topics[name]):
            kept[name] = content
    return "\n\n\n".join(kept[name] for name in sorted(kept)) + "\n"


class TextData:
    """A text divided into a part to learn from and a held-out part (its end), both as tokens.

    Args:
        source: the text.
        level: ``"char"`` or ``"byte"``.
        held_out: share of the characters that is held out, in (0, 1).
        context: window length in tokens; the text must have at least one window to learn from.
        vocabulary: use this one; by default that of the part to learn from, so that nothing is known of the rest.

    Attributes:
        train, held_out: tokens.
        tokens_per_char: of the held-out part; 1 at character level.

    Raises:
        UserError: the text is too small for the window.

    Example:
        >>> data = TextData(Text("example", "to be or not to be, " * 10), "char", held_out=0.1, context=16)
        >>> len(data.train), len(data.held_out), data.vocabulary.size
        (180, 20, 9)
    """

    def __init__(
        self,
        source: Text,
        level: Level = "char",
        *,
        held_out: float = 0.1,
        context: int = 128,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        cut = len(source.text) - max(int(len(source.text) * held_out), 2)
        learn, keep = source.text[: max(cut, 0)], source.text[max(cut, 0) :]
        self.source = source
        self.vocabulary = Vocabulary.of(learn, level) if vocabulary is None else vocabulary
        self.train = self.vocabulary.encode(learn)
        self.held_out = self.vocabulary.encode(keep)
        self.held_out_text = keep
        self.tokens_per_char = len(self.held_out) / max(len(keep), 1)
        if len(self.train) < context + 1:
            needed = int(np.ceil((context + 2) / (1.0 - held_out))) + 2
            while needed - 1 - max(int((needed - 1) * held_out), 2) > context:
                needed -= 1
            raise UserError(
                f"{source.name} is too small: it has {len(source.text)} characters, and training with windows of "
                f"{context} needs at least {needed}; give more text or a smaller --context."
            )


class WindowOrder(BatchOrder):
    """Which windows of the text make up the batch of each global step: a pure function of (seed, step).

    Every epoch shifts the grid of windows by a random amount and reads each window once, in a random order.

    Args:
        length: tokens in the text, at least ``context + 1``.
        context: tokens in a window; a window is followed by one more token, the last target.
        batch_size: windows a step.
        seed: 64-bit.
        evaluations: as in `BatchOrder`.

    Example:
        >>> order = WindowOrder(length=100, context=9, batch_size=5, seed=0)
        >>> order.steps_per_epoch, len({*order.starts(0).tolist(), *order.starts(1).tolist()})
        (2, 10)
    """

    def __init__(self, length: int, context: int, batch_size: int, seed: int, evaluations: int = 1) -> None:
        super().__init__(max(1, length // context - 1), batch_size, seed, evaluations)
        self.context, self.windows = context, self.items
        self._shifts = min(context, length - self.windows * context)
        self._shift = 0

    def starts(self, step: int) -> NDArray[np.int64]:
        """First tokens of the windows of global step `step`: ``[batch_size]``."""
        rows = self.rows(step)  # an epoch's first step draws the shift as well
        return self._shift + self.context * rows

    def _begin_epoch(self, random: np.random.Generator) -> None:
        self._shift = int(random.integers(self._shifts))
