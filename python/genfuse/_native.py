"""Finds and loads the native libraries. A part that is missing or does not load breaks no import: it is named on use.

`libgenfuse_ops` (the CPU operators) and, where torch has CUDA, `libgenfuse_cuda` lie beside `_C`, the pybind11 module.
In an editable install that is not where the Python files are, so `_C` tells the folder.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

_SUFFIX = ".dll" if sys.platform == "win32" else ".so"


@functools.cache
def folder() -> Path:
    """The folder of the native libraries."""
    spec = importlib.util.find_spec("genfuse._C")
    return Path(spec.origin if spec is not None and spec.origin is not None else __file__).parent


@functools.cache
def load() -> bool:
    """Load the CPU operators into `torch.ops.genfuse`, once; False if they are missing or do not load (see `error`)."""
    return error() is None


@functools.cache
def load_cuda() -> bool:
    """Load the CUDA operators, once; False where torch has no CUDA or they are missing (see `cuda_error`)."""
    return cuda_error() is None


@functools.cache
def error() -> str | None:
    """Why the CPU operators did not load, with the linker's own words; None if they are loaded."""
    return _load("genfuse_ops", "the CPU operators")


@functools.cache
def cuda_error() -> str | None:
    """Why the CUDA operators did not load; None if they are loaded."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if (reason := error()) is not None:  # the schemas are registered there
        return reason
    return _load("genfuse_cuda", "the CUDA operators")


def require() -> None:
    """Load the CPU operators or raise RuntimeError with the reason."""
    if (reason := error()) is not None:
        raise RuntimeError(reason)


def require_cuda() -> None:
    """Load the CUDA operators or raise RuntimeError with the reason."""
    if (reason := cuda_error()) is not None:
        raise RuntimeError(reason)


def _load(name: str, what: str) -> str | None:
    import torch

    path = folder() / f"lib{name}{_SUFFIX}"
    if not path.is_file():
        return (
            f"genfuse was built or installed without {what}: there is no {path}. "
            "Install genfuse with `pip install .`, or look at the build's log."
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as reason:
        return f"genfuse could not load {what} into torch {torch.__version__}. The linker said: {reason}"
    return None


def build_info() -> dict[str, Any]:
    """What was built and what of it is used here.

    Returns a dict with `version`, `compiler`, `build_type`, `torch_headers` (the torch whose headers were compiled
    against), `torch_oldest` (the oldest that the binary runs with), `isas` (instruction sets in the binary, oldest
    first), `isa` (the one in use: the best of this CPU, or less if the environment variable GENFUSE_ISA asks for less),
    `cpu_features`, `cuda` (version of the CUDA compiler, None if CUDA was not built) and `cuda_archs`. Does not import
    torch.

    Example:
        >>> import genfuse
        >>> genfuse.build_info()["isa"] in genfuse.build_info()["isas"]
        True
    """
    try:
        import genfuse._C as _C
    except ImportError as reason:
        raise RuntimeError(
            f"genfuse's native module is missing or does not load. The linker said: {reason}"
        ) from reason
    return {**_C.build_info(), "isa": _C.isa(), "cpu_features": _C.cpu_features()}
