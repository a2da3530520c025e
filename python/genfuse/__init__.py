"""Fused kernels for generative models in PyTorch.

`genfuse.ops` has the operators, `genfuse.nn` layers, `genfuse.distributions` a Gaussian for `torch.distributions`,
`genfuse.models` whole models, `genfuse.reference` the definition of each in plain PyTorch. `explain` says which kernel
a call takes and why, `use_backend` forces one, `build_info` tells what was built. `patch`, `patched` and `accelerate`
let these operators serve nflows, normflows, zuko, Pyro and transformers. Everything is imported on first use:
`import genfuse` alone loads neither torch nor the native library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from genfuse._native import build_info

if TYPE_CHECKING:
    from genfuse import backends, distributions, integrations, models, nn, ops, reference, train
    from genfuse.backends import explain, use_backend
    from genfuse.integrations import accelerate, decelerate, patch, patched, unpatch

    __version__: str

__all__ = [
    "__version__",
    "accelerate",
    "backends",
    "build_info",
    "decelerate",
    "distributions",
    "explain",
    "integrations",
    "models",
    "nn",
    "ops",
    "patch",
    "patched",
    "reference",
    "train",
    "unpatch",
    "use_backend",
]

_SUBMODULES = frozenset(
    {"backends", "distributions", "integrations", "kernels", "models", "nn", "ops", "reference", "train"}
)
_FROM_BACKENDS = frozenset({"explain", "use_backend"})
_FROM_INTEGRATIONS = frozenset({"accelerate", "decelerate", "patch", "patched", "unpatch"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"genfuse.{name}")
    if name in _FROM_BACKENDS:
        return getattr(importlib.import_module("genfuse.backends"), name)
    if name in _FROM_INTEGRATIONS:
        return getattr(importlib.import_module("genfuse.integrations"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("genfuse")
    raise AttributeError(f"module 'genfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
