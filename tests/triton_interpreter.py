"""Triton's interpreter made to serve: import this before any kernel, with TRITON_INTERPRET=1 in the environment.

Two faults of the interpreter (Triton 3.6 and before) that compiled kernels do not have are put right: it multiplies the
bit patterns of bfloat16 matrices, and it turns one-element arrays into ints in a way that NumPy 2.4 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _widened(operand: Any) -> Any:
    if operand.dtype != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *rest)


def install() -> None:
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = _dot
