"""What every integration asks before genfuse serves a call of a peer's function."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from genfuse import backends
from genfuse.ops.operator import on_cpu

from .patching import MARK

__all__ = ["OUTSIDE", "defined_by", "hooked", "is_number", "objection", "own"]

OUTSIDE = "an input is outside of the domain"
_EXACT = (torch.float32, torch.float64)


def objection(op: str, subject: object, *others: object) -> str | None:
    """Why genfuse does not serve a call with these tensors; None if it does.

    Half types are the peer's: it returns and rounds its log-determinants in them, and genfuse does not.
    """
    if not isinstance(subject, Tensor):
        return "an argument is not a tensor"
    dtype, device = subject.dtype, subject.device
    if dtype not in _EXACT:
        return f"{str(dtype).removeprefix('torch.')}: results in half types are the peer's own"
    for other in others:
        if not isinstance(other, Tensor):
            return "an argument is not a tensor"
        if other.dtype != dtype:
            return "arguments of different dtypes"
        if other.device != device:
            return "arguments on different devices"
    if on_cpu and device.type == "cpu":
        return None
    return _no_kernel(op, device.type, dtype) if backends.forced() is None else None


@functools.lru_cache(maxsize=256)
def _no_kernel(op: str, device: str, dtype: torch.dtype) -> str | None:
    if device == "cpu" and not on_cpu:
        return "the native library of genfuse is not loaded"
    for kernel in backends.kernels_of(op):
        if kernel.proven and kernel.backend != "reference" and device in kernel.devices and dtype in kernel.dtypes:
            return None
    return f"genfuse has no proven kernel for {device}"


def is_number(value: object) -> bool:
    """Whether it is a plain number, not a tensor that may hold one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.lru_cache(maxsize=4096)
def defined_by(kind: Hashable, name: str) -> str:
    """The qualified name of the class that a class has a method from."""
    assert isinstance(kind, type)
    for one in kind.__mro__:
        if name in vars(one):
            return f"{one.__module__}.{one.__qualname__}"
    return ""


def own(instance: Any, cls: str, *names: str) -> bool:
    """Whether an instance has these methods from the class of this qualified name: neither a subclass nor the instance
    has its own.
    """
    kind, held = type(instance), vars(instance)
    return all(
        defined_by(kind, name) == cls  # type: ignore[arg-type]  # a type is hashable
        and (name not in held or getattr(held[name], MARK, False))
        for name in names
    )


def hooked(module: torch.nn.Module) -> bool:
    """Whether a module has hooks, which run only if it is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
