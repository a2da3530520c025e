"""Which kernel serves a call, and why.

Each op has one `Kernel` entry per backend: the devices and dtypes it serves, whether it is proven (has passed its tests
on the hardware it is for), and a predicate that gives the reason why a particular call is not for it. Dispatch takes
the first proven kernel that can run; `use_backend` forces one; `explain` tells the whole story of one call;
`support_matrix` is the registry as a table, which a test compares with the README.

Backends: "native" (the C++ kernels, CPU), "cudnn" (the vendor's, CUDA), "triton" and "cuda" (ours on CUDA), "torch" (an
op of torch itself), "reference" (plain PyTorch, any device).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "BACKENDS",
    "Candidate",
    "Explanation",
    "Kernel",
    "can_run",
    "explain",
    "kernels_of",
    "register",
    "select",
    "support_matrix",
    "support_matrix_markdown",
    "use_backend",
]

BACKENDS = ("native", "cudnn", "triton", "cuda", "torch", "reference")

Arguments = Mapping[str, Any]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_forced: ContextVar[str | None] = ContextVar("genfuse_backend", default=None)
# All names in force in any thread, innermost last. Empty nearly always, which makes `forced` cheap; and torch.compile,
# which cannot trace a ContextVar, reads and guards this.
_in_force: tuple[str, ...] = ()
_lock = threading.Lock()


def forced() -> str | None:
    """The backend that `use_backend` forces here, None if none."""
    if not _in_force:
        return None
    if torch.compiler.is_compiling():
        return _in_force[-1]
    return _forced.get()


def _no_objection(arguments: Arguments) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One backend of one op.

    Attributes:
        op: name of the op, as in `genfuse.ops`.
        backend: one of `BACKENDS`.
        devices: device types it runs on; empty: any.
        dtypes: dtypes of the op's first floating tensor that it takes.
        proven: False for a kernel that has not run on its hardware yet: dispatch never takes it unasked.
        objection: the reason why it cannot serve a call with these arguments (by name), None if it can. Device and
            dtype are already checked then.
        note: what a reader of the support matrix should know.
    """

    op: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    proven: bool = True
    objection: Callable[[Arguments], str | None] = field(default=_no_objection, repr=False)
    note: str = ""


@dataclass(frozen=True)
class _Op:
    name: str
    function: Callable[..., Any]
    subject: str  # the argument whose device and dtype decide
    tensor: Callable[[Arguments], torch.Tensor]


_OPS: dict[str, _Op] = {}
_KERNELS: dict[str, list[Kernel]] = {}


def register_op(
    name: str,
    function: Callable[..., Any],
    subject: str,
    tensor: Callable[[Arguments], torch.Tensor] | None = None,
) -> None:
    """Enter an op: its public function and the argument whose device and dtype decide; `tensor` finds a stand-in where
    that argument may be absent.
    """

    def argument(arguments: Arguments) -> torch.Tensor:
        found: torch.Tensor = arguments[subject]
        return found

    _OPS[name] = _Op(name, function, subject, tensor or argument)
    _KERNELS.setdefault(name, [])


def subject_of(op: str) -> str:
    """The name of the argument whose device and dtype decide."""
    return _OPS[op].subject


def register(kernel: Kernel) -> None:
    """Enter a kernel; those of one op are tried in the order of entry."""
    if kernel.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {kernel.backend!r}")
    _KERNELS[kernel.op].append(kernel)


def kernels_of(op: str) -> tuple[Kernel, ...]:
    """The kernels of an op, in the order in which dispatch tries them."""
    _load_ops()
    return tuple(_KERNELS[op])


def _load_ops() -> None:
    import genfuse.ops  # noqa: F401  the ops enter themselves


def _objection(kernel: Kernel, arguments: Arguments) -> str | None:
    subject, tensor = _OPS[kernel.op].subject, _OPS[kernel.op].tensor(arguments)
    if kernel.devices and tensor.device.type not in kernel.devices:
        return f"{subject} is on {tensor.device.type}; it runs on {' or '.join(kernel.devices)}"
    if tensor.dtype not in kernel.dtypes:
        return f"{subject} is {_name(tensor.dtype)}; it takes {', '.join(map(_name, kernel.dtypes))}"
    return kernel.objection(arguments)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def can_run(op: str, backend: str, arguments: Arguments, *, raise_error: bool = False) -> bool:
    """Whether a backend can serve a call of an op.

    Args:
        op: name of the op.
        backend: name of the backend.
        arguments: the op's arguments by name, defaults included.
        raise_error: raise RuntimeError with the reason instead of returning False.

    Example:
        >>> import genfuse.ops
        >>> x, w = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> arguments = {"hidden": x, "weight": w, "target": torch.zeros(2, dtype=torch.int64), "bias": None}
        >>> can_run("linear_cross_entropy", "reference", arguments)
        True
    """
    _load_ops()
    for kernel in _KERNELS[op]:
        if kernel.backend == backend:
            reason = _objection(kernel, arguments)
            break
    else:
        has = ", ".join(kernel.backend for kernel in _KERNELS[op])
        reason = f"the op has no such backend (it has {has})"
    if reason is not None and raise_error:
        raise RuntimeError(f"genfuse.ops.{op} cannot run on backend {backend!r}: {reason}")
    return reason is None


def select(op: str, arguments: Arguments) -> str:
    """The backend that serves a call: the forced one, or the first proven one that can.

    Raises:
        RuntimeError: the forced backend cannot run this call; says why.
    """
    name = forced()
    if name is not None:
        can_run(op, name, arguments, raise_error=True)
        return name
    for kernel in _KERNELS[op]:
        if kernel.proven and _objection(kernel, arguments) is None:
            return kernel.backend
    reasons = "; ".join(f"{kernel.backend}: {_objection(kernel, arguments)}" for kernel in _KERNELS[op])
    raise RuntimeError(f"genfuse.ops.{op} has no backend for this call: {reasons}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op of genfuse called in this context (and thread).

    A call that the backend cannot serve raises RuntimeError with the reason; nothing falls back silently. Gradients
    take the backend of their forward call. Inside a compiled function the backend is the one of the time of
    compilation.

    Raises:
        ValueError: no backend of that name.

    Example:
        >>> import genfuse
        >>> with genfuse.use_backend("reference"):
        ...     loss = genfuse.ops.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]))
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    global _in_force
    token = _forced.set(name)
    with _lock:
        _in_force = (*_in_force, name)
    try:
        yield
    finally:
        with _lock:
            last = len(_in_force) - 1 - _in_force[::-1].index(name)
            _in_force = _in_force[:last] + _in_force[last + 1 :]
        _forced.reset(token)


@dataclass(frozen=True)
class Candidate:
    """One backend's part in an `Explanation`."""

    backend: str
    taken: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why not the others; `print` it."""

    op: str
    call: str
    candidates: tuple[Candidate, ...]

    @property
    def backend(self) -> str | None:
        """The backend taken, None if none can run."""
        return next((candidate.backend for candidate in self.candidates if candidate.taken), None)

    def __str__(self) -> str:
        width = max(len(candidate.backend) for candidate in self.candidates)
        lines = [
            f"  {'->' if candidate.taken else '  '} {candidate.backend:<{width}}  {candidate.reason}"
            for candidate in self.candidates
        ]
        return "\n".join([f"genfuse.ops.{self.op} ({self.call})", *lines])


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call takes, and why each of the others is not taken. Nothing is computed.

    Args:
        op: a function of `genfuse.ops`, or its name.
        *args: the op's arguments.
        **kwargs: the op's keyword arguments.

    Raises:
        TypeError: op is no op of genfuse, or the arguments do not fit its signature.

    Example:
        >>> import genfuse
        >>> x, w = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> with genfuse.use_backend("reference"):
        ...     explanation = genfuse.explain("linear_cross_entropy", x, w, torch.tensor([0, 1]))
        >>> explanation.backend
        'reference'
    """
    _load_ops()
    entry = next((entry for entry in _OPS.values() if op is entry.function or op == entry.name), None)
    if entry is None:
        raise TypeError(f"explain: op must be one of {', '.join(sorted(_OPS))} of genfuse.ops, got {op!r}")
    bound = inspect.signature(entry.function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    name = forced()
    candidates: list[Candidate] = []
    taken = False
    for kernel in _KERNELS[entry.name]:
        reason = _objection(kernel, arguments)
        if reason is not None:
            candidates.append(Candidate(kernel.backend, False, f"cannot: {reason}"))
        elif name is not None and kernel.backend != name:
            candidates.append(Candidate(kernel.backend, False, f"use_backend({name!r}) is in force"))
        elif name is None and not kernel.proven:
            why = f"unproven: not taken unless asked for, by use_backend({kernel.backend!r})"
            candidates.append(Candidate(kernel.backend, False, why))
        elif taken:
            candidates.append(Candidate(kernel.backend, False, "can, but comes later"))
        else:
            taken = True
            why = f"use_backend({name!r}) is in force" if name is not None else "the first that can run"
            candidates.append(Candidate(kernel.backend, True, why))
    tensor = entry.tensor(arguments)
    return Explanation(entry.name, f"{tensor.device}, {_name(tensor.dtype)}", tuple(candidates))


def support_matrix() -> list[dict[str, str]]:
    """The registry as rows: op, backend, device, dtypes, status ("proven", "unproven" or "vendor"), note.

    Example:
        >>> sorted(support_matrix()[0])
        ['backend', 'device', 'dtypes', 'note', 'op', 'status']
    """
    _load_ops()
    return [
        {
            "op": kernel.op,
            "backend": kernel.backend,
            "device": ", ".join(kernel.devices) or "any",
            "dtypes": ", ".join(map(_name, kernel.dtypes)),
            "status": "vendor" if kernel.backend == "cudnn" else "proven" if kernel.proven else "unproven",
            "note": kernel.note,
        }
        for kernels in _KERNELS.values()
        for kernel in kernels
    ]


def support_matrix_markdown() -> str:
    """The support matrix as the README shows it, between its `<!-- support-matrix -->` markers."""
    head = ("op", "backend", "device", "dtypes", "status", "note")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row[column] for column in head) + " |" for row in support_matrix()]
    return "\n".join(lines)


if __name__ == "__main__":
    # Not this module's own registry: run as a program it is not the module that the ops have registered with.
    from genfuse import backends

    print(backends.support_matrix_markdown())
