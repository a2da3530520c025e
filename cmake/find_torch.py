"""Find the torch to build against, without importing it.

The build needs headers and a library to link with, nothing that runs, so torch is looked up as files. In pip's
build isolation `sys.path` names the build's own environment while `sysconfig` still names the one that genfuse is
installed into: the latter's torch is preferred, and so no second one is downloaded. Run as a script it prints the
folder of torch, its version, its CUDA version ("none" for a CPU build), and the oldest torch that the build is for, as
people write it and as TORCH_TARGET_VERSION; CMake reads that.
"""

from __future__ import annotations

import ast
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST = (2, 11)
FETCH = "torch==2.13.0"  # what an isolated build asks for where there is none: the release that CI runs


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None

    @property
    def too_old(self) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST


def environment() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def find(folders: list[str] | None = None) -> Torch | None:
    """The first torch on the way, or None. `folders` replaces the places to look in (for tests)."""
    if folders is None:
        paths = sysconfig.get_paths()
        folders = [paths["purelib"], paths["platlib"], *sys.path]
        if site.ENABLE_USER_SITE:
            folders.append(site.getusersitepackages())
    for folder in folders:
        torch = Path(folder or ".") / "torch"
        if (torch / "version.py").is_file() and (torch / "include").is_dir():
            return Torch(torch.resolve(), *_read_version(torch / "version.py"))
    return None


def _read_version(file: Path) -> tuple[str, str | None]:
    values: dict[str, str | None] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    return values.get("__version__") or "0.0", values.get("cuda")


def complaint(torch: Torch | None) -> str | None:
    """What is wrong with this torch and what to do about it, in one sentence; None if nothing is."""
    oldest = ".".join(map(str, OLDEST))
    if torch is None:
        return (
            f"genfuse is built against the torch that it will run with, and {environment()} has none: "
            f'run `pip install "torch>={oldest}"` first (any build of it, CPU or CUDA), then install genfuse again.'
        )
    if torch.too_old:
        return (
            f"genfuse needs torch {oldest} or newer, and {torch.folder} is {torch.version}: "
            f'run `pip install --upgrade "torch>={oldest}"` first, then install genfuse again.'
        )
    return None


if __name__ == "__main__":
    found = find()
    wrong = complaint(found)
    if wrong is not None or found is None:
        sys.exit(wrong)
    oldest = ".".join(map(str, OLDEST))
    target = f"0x{OLDEST[0]:02x}{OLDEST[1]:02x}000000000000"
    print(found.folder.as_posix(), found.version, found.cuda or "none", oldest, target, sep=";")
