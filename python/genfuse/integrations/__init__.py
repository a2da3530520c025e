"""genfuse inside of other libraries: their functions served by genfuse's operators, and put back.

`patch`, `patched` and `unpatch` do it for the whole process, `accelerate` and `decelerate` for one model. Each library
has a module here, which imports that library only when it is asked for. See docs/adoption.md.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .patching import Acceleration, Calls, Left, Patch, PatchReport, Peer, Replaced, restore

__all__ = [
    "PEERS",
    "Calls",
    "Left",
    "PatchReport",
    "Replaced",
    "accelerate",
    "decelerate",
    "patch",
    "patched",
    "unpatch",
]

PEERS = ("nflows", "normflows", "zuko", "pyro", "transformers")
_WHOLE_MODELS = ("nflows", "normflows", "zuko")  # whose layers are modules, or are made by modules

_lock = threading.RLock()
_in_force: dict[str, Patch] = {}


def _peer(name: object) -> Peer:
    if not isinstance(name, str) or name not in PEERS:
        raise ValueError(f"patch: name must be one of {', '.join(PEERS)}, got {name!r}")
    found = importlib.import_module(f"{__name__}.{name}").PEER
    assert isinstance(found, Peer)
    return found


def patch(name: str) -> PatchReport:
    """Let genfuse serve the functions of a library, in the whole process, until `unpatch`.

    Every attribute of every imported module that refers to one of those functions is changed, so also what somebody has
    imported from the library by name. Calls that genfuse does not serve as the library would (another dtype or device,
    tails it does not know, an argument that the library refuses) go to the library's own code; the report counts both.
    All is checked before anything is changed.

    May be repeated: the library is restored by as many calls of `unpatch`. Each report counts from its own call on.
    Patching takes a lock; calls that run in other threads meanwhile are served by either.

    Args:
        name: "nflows", "normflows", "zuko", "pyro" or "transformers" (its VITS).

    Returns:
        What has been replaced and what has not, with the reason; and how calls end from now on.

    Raises:
        ValueError: no library of that name.
        ModuleNotFoundError: it is not installed.
        RuntimeError: its version is not one that genfuse knows (the message says which), or its functions are not what
            they are in that version. Nothing has been changed then.

    Example:
        >>> import genfuse
        >>> with genfuse.patched("nflows") as report:  # doctest: +SKIP
        ...     loss = -flow.log_prob(x).mean()
        >>> print(report)  # doctest: +SKIP
    """
    peer = _peer(name)
    with _lock:
        found = _in_force.get(name)
        if found is None:
            found = _in_force[name] = Patch(peer)
        report = found.report()
        report._undo = lambda: _retire(name, report)
        return report


def _retire(name: str, report: PatchReport) -> None:
    with _lock:
        found = _in_force[name]
        found.reports.remove(report)
        report._close()
        if not found.reports:
            del _in_force[name]
            found.restore()


def unpatch(name: str | None = None) -> None:
    """Take back one `patch` of a library; without a name take back all of all libraries.

    With the last one every original object is back in its place, also where its replacement was imported by name since.

    Raises:
        ValueError: no library of that name.
        RuntimeError: that library is not patched.

    Example:
        >>> unpatch()
    """
    with _lock:
        if name is None:
            for one, found in list(_in_force.items()):
                del _in_force[one]
                found.restore()
            return
        _peer(name)
        if name not in _in_force:
            raise RuntimeError(f"unpatch: {name} is not patched")
        _retire(name, _in_force[name].reports[-1])


@contextmanager
def patched(*names: str) -> Iterator[PatchReport]:
    """`patch` for as long as the context lasts (in all threads).

    Args:
        *names: libraries, one or more; of several, one that cannot be patched keeps all from being patched.

    Yields:
        The report of the library, or of all of them together.

    Raises:
        ValueError, ModuleNotFoundError, RuntimeError: as `patch`.

    Example:
        >>> import genfuse
        >>> with genfuse.patched("nflows", "zuko") as report:  # doctest: +SKIP
        ...     train()
        >>> report.calls.total  # doctest: +SKIP
        4096
    """
    if not names:
        raise ValueError(f"patched: give one name or more of {', '.join(PEERS)}")
    reports: list[PatchReport] = []
    try:
        with _lock:
            for name in names:
                reports.append(patch(name))
        together = reports[0] if len(reports) == 1 else _together(reports)
        yield together
    finally:
        for report in reversed(reports):
            if report._final is None:
                report.undo()
        if len(reports) > 1:
            together._close()


def _together(reports: Sequence[PatchReport]) -> PatchReport:
    return PatchReport(
        {name: version for report in reports for name, version in report.peers.items()},
        tuple(one for report in reports for one in report.replaced),
        tuple(one for report in reports for one in report.left),
        tuple(tally for report in reports for tally in report._tallies),
    )


def accelerate(model: torch.nn.Module) -> PatchReport:
    """Let genfuse serve one model of nflows, normflows or zuko; every other model stays as it is.

    The modules of the model get methods of their own. Parameters, buffers and state_dict do not change; a copy made by
    copy.deepcopy is accelerated too, and one that is pickled and loaded is not.

    Args:
        model: a module that holds modules of those libraries, at any depth, or is one.

    Returns:
        What has been replaced, in which modules; `report.undo()`, or `decelerate`, takes it back.

    Raises:
        TypeError: model is no module.
        ValueError: it holds no module that genfuse knows.
        RuntimeError: it, or a part of it, is accelerated already; or a library's version is not one that genfuse knows.

    Example:
        >>> import genfuse
        >>> report = genfuse.accelerate(flow)  # doctest: +SKIP
        >>> flow.log_prob(x)  # doctest: +SKIP
        >>> report.calls.total  # doctest: +SKIP
        5
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    with _lock:
        return Acceleration(model, [_peer(name) for name in _WHOLE_MODELS], _in_force).report


def decelerate(model: torch.nn.Module) -> None:
    """Take back `accelerate` from a model, or from a part of one.

    Raises:
        TypeError: model is no module.
        RuntimeError: nothing in it is accelerated.

    Example:
        >>> import genfuse
        >>> genfuse.decelerate(flow)  # doctest: +SKIP
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"decelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    with _lock:
        found = [one for module in model.modules() if (one := restore(module)) is not None]
        if not found:
            raise RuntimeError(f"decelerate: nothing in {type(model).__name__} is accelerated")
        for acceleration in found:
            acceleration.close_if_over()
