"""Putting genfuse's operators in the place of another library's functions, and taking them out again.

A peer (`Peer`) is a table: the versions that are known, the functions that can be replaced (`Target`) and those that
are left. `Patch` applies such a table to the whole process and `Acceleration` to the modules of one model. Everything
is checked before anything is changed. A replacement is an *attempt*: it returns what the peer would return, or a
string, the reason why it cannot; then the peer's own function is called with the same arguments. So whatever is wrong
with a call, it is the peer that says so, with its own exception. Every call is counted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Acceleration",
    "ByPeer",
    "Calls",
    "Left",
    "Patch",
    "PatchReport",
    "Peer",
    "Rebind",
    "Replaced",
    "Tally",
    "Target",
]

Attempt = Callable[..., Any]
MARK = "__genfuse__"  # an attribute of every replacement


class _MISSING:
    """What is not there; a class, which deepcopy leaves as it is."""


_is_compiling = torch.compiler.is_compiling
_count_lock = threading.Lock()


class Tally:
    """How the calls of one replaced function ended. `active` is False once the original is back: whoever still holds
    the replacement then calls the original through it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.active = True
        self.served = 0
        self.handed_back: dict[str, int] = {}

    def serve(self) -> None:
        """Count a call that genfuse has served. Calls inside of a compiled function are not counted."""
        if not _is_compiling():
            with _count_lock:
                self.served += 1

    def hand_back(self, reason: str) -> None:
        """Count a call that the peer's own code serves."""
        if not _is_compiling():
            with _count_lock:
                self.handed_back[reason] = self.handed_back.get(reason, 0) + 1


class ByPeer(NamedTuple):
    """What an attempt returns that had to finish with the peer's own pieces."""

    result: Any
    reason: str


def standing_in(
    original: Callable[..., Any], attempt: Attempt, tally: Tally, counts: bool = True
) -> Callable[..., Any]:
    """A function that tries `attempt`, and calls the original where that returns a reason."""

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not tally.active:
            return original(*args, **kwargs)
        result = attempt(*args, **kwargs)
        if isinstance(result, str):
            tally.hand_back(result)
            return original(*args, **kwargs)
        if isinstance(result, ByPeer):
            tally.hand_back(result.reason)
            return result.result
        if counts:
            tally.serve()
        return result

    setattr(replacement, MARK, True)
    return replacement


@dataclass(frozen=True)
class Target:
    """A function, method or attribute of a peer that genfuse replaces.

    Attributes:
        module: the module that defines it.
        name: its name there; "Class.method" for a method.
        parameters: the names of its parameters, which must be these.
        by: what replaces it, for the report.
        attempt: what is tried first, with the same parameters.
        build: makes the replacement from the original and a tally, where an attempt is not enough.
        inherited: the class inherits it: the replacement is put on the class, and deleted again afterwards.
        counts: whether a call that succeeds counts as served; of a constructor it does not.
        of: the class has no such attribute; it is made of this one, and deleted again afterwards.
    """

    module: str
    name: str
    parameters: str
    by: str
    attempt: Attempt | None = None
    build: Callable[[Any, Tally], Any] | None = None
    inherited: bool = False
    of: str = ""
    counts: bool = True

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}"

    def make(self, original: Any, tally: Tally) -> Any:
        """The replacement of an original."""
        if self.build is not None:
            return self.build(original, tally)
        assert self.attempt is not None
        return standing_in(original, self.attempt, tally, self.counts)


@dataclass(frozen=True)
class Rebind:
    """A method that calls functions of `targets` by name: an accelerated instance gets it with those names bound to
    the replacements (`through`: as attributes of this name).
    """

    module: str
    name: str
    functions: tuple[str, ...]
    through: str | None = None


@dataclass(frozen=True)
class Peer:
    """What genfuse knows of another library.

    Attributes:
        name: as `patch` takes it.
        distribution: its name on PyPI.
        sources: for each known version, digests of the sources relied upon, by module or by "module:function".
        targets: what is replaced.
        left: what is not, and why.
        rebinds: for `accelerate`.
        accelerate: replaces further things in one module of a model; returns (attribute, new value, name, by) for each.
        complete: called before the originals are put back.
        by_source: a version counts as known if its sources are those of a known one.
    """

    name: str
    distribution: str
    sources: Mapping[str, Mapping[str, str]]
    targets: tuple[Target, ...]
    left: tuple[tuple[str, str], ...] = ()
    rebinds: tuple[Rebind, ...] = ()
    accelerate: Callable[[torch.nn.Module, Callable[[str], Tally]], Sequence[tuple[str, Any, str, str]]] | None = None
    complete: Callable[[], None] | None = None
    by_source: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are touched."""
        names = [target.module for target in self.targets] + [rebind.module for rebind in self.rebinds]
        return tuple(dict.fromkeys(names))

    def version(self) -> str:
        """The installed version, a known one.

        Raises:
            ModuleNotFoundError: the peer is not installed.
            RuntimeError: the version is not known, or its sources are not those of that version.
        """
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(
                f"{self.name} is not installed (pip install {self.distribution})", name=self.name
            ) from None
        known = ", ".join(self.sources)
        if version not in self.sources and not self.by_source:
            raise RuntimeError(
                f"{self.distribution} {version} is not known to genfuse, which knows {known}; left as it is"
            )
        wanted = [self.sources[version]] if version in self.sources else list(self.sources.values())
        differing = {source for sources in wanted for source in sources}
        for sources in wanted:
            differing = {source for source, digest in sources.items() if self.digest(source) != digest} & differing
            if not differing:
                return version
        raise RuntimeError(
            f"{self.distribution} {version} is installed, but the source of {', '.join(sorted(differing))} is not that "
            f"of the version known to genfuse ({known}); left as it is"
        )

    @staticmethod
    def digest(source: str) -> str:
        """The digest of a module's file, or of a function's text; empty if there is none."""
        module, _, name = source.partition(":")
        try:
            found = importlib.import_module(module)
            if name:
                text = inspect.getsource(inspect.unwrap(getattr(found, name)))
            else:
                text = Path(str(found.__file__)).read_text(encoding="utf-8")
        except (OSError, AttributeError, TypeError):
            return ""
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def originals(self) -> list[tuple[Target, object, str, Any]]:
        """For each target: itself, the module or class that has it, the attribute there, and what that is, unpatched.

        Raises:
            RuntimeError: a target is not there, or is not what it should be.
        """
        self.version()
        found = []
        for target in self.targets:
            owner: Any = importlib.import_module(target.module)
            *classes, attribute = target.name.split(".")
            original = _MISSING
            for name in classes:
                owner = getattr(owner, name, None)
            held = vars(owner).get(attribute, _MISSING) if owner is not None else _MISSING
            if owner is None:
                pass
            elif target.of:
                original = vars(owner).get(target.of, _MISSING) if not hasattr(owner, attribute) else _MISSING
            elif target.inherited:
                original = getattr(owner, attribute, _MISSING) if held is _MISSING else _MISSING
            else:
                original = held
            if original is _MISSING:
                raise RuntimeError(f"{target.qualified} is not where genfuse knows it to be; left as it is")
            self._check(target, original)
            found.append((target, owner, attribute, original))
        return found

    @staticmethod
    def _check(target: Target, original: Any) -> None:
        if target.of:
            return  # which is checked as a target of its own
        if target.parameters == "property":
            if isinstance(original, property):
                return
            raise RuntimeError(f"{target.qualified} is not a property, as genfuse knows it to be; left as it is")
        if not isinstance(original, types.FunctionType):
            raise RuntimeError(
                f"{target.qualified} is {original!r} and not the function that genfuse knows; left as it is"
            )
        if not target.inherited and (original.__module__, original.__qualname__) != (target.module, target.name):
            raise RuntimeError(
                f"{target.qualified} has been replaced by {original.__module__}.{original.__qualname__}; left as it is"
            )
        parameters = " ".join(inspect.signature(original).parameters)
        if parameters != target.parameters:
            raise RuntimeError(
                f"{target.qualified} takes ({parameters.replace(' ', ', ')}), and not, as genfuse knows it, "
                f"({target.parameters.replace(' ', ', ')}); left as it is"
            )


# ---- what is reported ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replaced:
    """A function that genfuse now serves.

    Attributes:
        name: its qualified name.
        by: what replaces it.
        places: every attribute of a module or class that referred to it and now refers to the replacement.
    """

    name: str
    by: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """A function that stays the peer's, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Calls:
    """How the calls of replaced functions have ended.

    Attributes:
        served: the number of calls that genfuse has served, by function.
        handed_back: the number of calls handed back to the peer's own code, by (function, reason).
    """

    served: Mapping[str, int]
    handed_back: Mapping[tuple[str, str], int]

    @property
    def total(self) -> int:
        """All calls served by genfuse."""
        return sum(self.served.values())

    def __sub__(self, before: Calls) -> Calls:
        served = {name: count - before.served.get(name, 0) for name, count in self.served.items()}
        back = {key: count - before.handed_back.get(key, 0) for key, count in self.handed_back.items()}
        return Calls(
            {name: count for name, count in served.items() if count},
            {key: count for key, count in back.items() if count},
        )

    def __str__(self) -> str:
        lines = [f"  {count:>8}  {name}" for name, count in sorted(self.served.items())]
        lines += [
            f"  {count:>8}  {name}: handed back, {why}" for (name, why), count in sorted(self.handed_back.items())
        ]
        return "\n".join([f"calls served by genfuse: {self.total}", *lines])


@dataclass(eq=False)
class PatchReport:
    """What has been replaced, what has not, and how the calls since then have ended; `print` it.

    Attributes:
        peers: the version of each library.
        replaced: what genfuse now serves.
        left: what stays as it was, and why.
    """

    peers: Mapping[str, str]
    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    _tallies: tuple[Tally, ...] = field(repr=False, default=())
    _undo: Callable[[], None] | None = field(repr=False, default=None)
    _before: Calls = field(repr=False, default_factory=lambda: Calls({}, {}))
    _final: Calls | None = field(repr=False, default=None)

    def __post_init__(self) -> None:
        self._before = self._now()

    def _now(self) -> Calls:
        with _count_lock:
            return Calls(
                {tally.name: tally.served for tally in self._tallies if tally.served},
                {(tally.name, why): count for tally in self._tallies for why, count in tally.handed_back.items()},
            )

    def _close(self) -> None:
        if self._final is None:
            self._final = self._now() - self._before

    @property
    def calls(self) -> Calls:
        """The calls since this report was made, until it was undone."""
        return self._final if self._final is not None else self._now() - self._before

    def undo(self) -> None:
        """Put back what this report's call has replaced.

        Raises:
            RuntimeError: that has been done already.
        """
        if self._undo is None or self._final is not None:
            raise RuntimeError("undo: what this report is of has been undone already")
        self._undo()

    def __str__(self) -> str:
        title = ", ".join(f"{name} {version}" for name, version in self.peers.items())
        lines = [f"genfuse in {title}", f"replaced ({len(self.replaced)}):"]
        for one in self.replaced:
            lines.append(f"  {one.name}\n      by {one.by}")
            lines += [f"      also as {place}" for place in one.places if place != one.name]
        lines += [f"left ({len(self.left)}):", *(f"  {one.name}: {one.reason}" for one in self.left)]
        return "\n".join([*lines, str(self.calls)])


# ---- the whole process -----------------------------------------------------------------------------------------------


def _namespaces() -> Iterator[tuple[str, types.ModuleType]]:
    seen: set[int] = set()
    entries: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in entries:  # of which a module may have several, and which may hold anything at all
        if isinstance(module, types.ModuleType) and id(module) not in seen and not name.startswith("genfuse."):
            seen.add(id(module))
            yield name, module


def _swap(pairs: Iterable[tuple[Any, Any]]) -> dict[int, list[str]]:
    """Replace, in every module's attributes, each first by its second; the places, by the id of the first."""
    by_id = {id(old): (old, new) for old, new in pairs}
    places: dict[int, list[str]] = {identity: [] for identity in by_id}
    for name, module in _namespaces():
        for attribute, value in list(vars(module).items()):
            if id(value) in by_id:
                old, new = by_id[id(value)]
                setattr(module, attribute, new)
                places[id(old)].append(f"{name}.{attribute}")
    return places


@dataclass
class _Change:
    """One target in force."""

    target: Target
    owner: Any
    attribute: str
    original: Any
    replacement: Any

    def undo(self) -> None:
        if vars(self.owner).get(self.attribute) is not self.replacement:
            warnings.warn(
                f"{self.target.qualified} has been replaced by somebody else since and stays as it is",
                RuntimeWarning,
                stacklevel=4,
            )
        elif self.target.inherited or self.target.of:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.original)


class Patch:
    """A peer's table in force in the whole process, once however often it is asked for."""

    def __init__(self, peer: Peer) -> None:
        originals = peer.originals()  # all the checks, before the first change
        self.peer = peer
        self.version = peer.version()
        self.reports: list[PatchReport] = []
        self.tallies: list[Tally] = []
        self.changes: list[_Change] = []
        for target, owner, attribute, original in originals:
            tally = Tally(target.qualified)
            self.tallies.append(tally)
            self.changes.append(_Change(target, owner, attribute, original, target.make(original, tally)))
        done: list[_Change] = []
        try:
            places = _swap(
                (change.original, change.replacement) for change in self.changes if "." not in change.target.name
            )
            for change in self.changes:
                if "." in change.target.name:
                    setattr(change.owner, change.attribute, change.replacement)
                    done.append(change)
        except BaseException:
            for change in done:
                change.undo()
            _swap((change.replacement, change.original) for change in self.changes)
            raise
        self.replaced = tuple(
            Replaced(
                change.target.qualified,
                change.target.by,
                tuple(sorted(places.get(id(change.original), ())))
                if "." not in change.target.name
                else (change.target.qualified,),
            )
            for change in self.changes
        )

    def report(self) -> PatchReport:
        """A report that counts from now on."""
        report = PatchReport(
            {self.peer.name: self.version},
            self.replaced,
            tuple(Left(name, reason) for name, reason in self.peer.left),
            tuple(self.tallies),
        )
        self.reports.append(report)
        return report

    def restore(self) -> None:
        """Put every original back, wherever its replacement has got to."""
        if self.peer.complete is not None:
            self.peer.complete()
        for tally in self.tallies:
            tally.active = False
        for change in self.changes:
            if "." in change.target.name:
                change.undo()
        functions = [change for change in self.changes if "." not in change.target.name]
        for change in functions:
            if vars(change.owner).get(change.attribute) is not change.replacement:
                change.undo()  # which warns
        _swap((change.replacement, change.original) for change in functions)
        for report in self.reports:
            report._close()


# ---- one model -------------------------------------------------------------------------------------------------------

_RECORD = "_genfuse_acceleration"


def _resolves_to(kind: type, owner: type, attribute: str) -> bool:
    return next((one for one in kind.__mro__ if attribute in vars(one)), None) is owner


def rebound(function: types.FunctionType, names: Mapping[str, Any]) -> types.FunctionType:
    """A copy of a function for which some global names mean something else."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


class Acceleration:
    """The tables of several peers in force in the modules of one model."""

    def __init__(self, model: torch.nn.Module, peers: Sequence[Peer], in_force: Mapping[str, Patch]) -> None:
        self.tallies: dict[str, Tally] = {}
        self.touched: list[torch.nn.Module] = []
        plans: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        replaced: dict[str, tuple[str, list[str]]] = {}
        versions: dict[str, str] = {}
        left: list[Left] = []
        for peer in peers:
            package = next(iter(peer.modules)).partition(".")[0]
            if package not in sys.modules:
                continue  # no module of the model can be of it
            members = [
                (name, module)
                for name, module in model.named_modules()
                if any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__)
            ]
            if not members:
                continue
            patch = in_force.get(peer.name)
            if patch is None:
                originals, versions[peer.name] = peer.originals(), peer.version()
            else:
                originals = [(c.target, c.owner, c.attribute, c.original) for c in patch.changes]
                versions[peer.name] = patch.version
            left += [Left(name, reason) for name, reason in peer.left]
            for name, module in members:
                if _RECORD in vars(module):
                    raise RuntimeError(
                        f"accelerate: {name or 'the model'} is accelerated already; genfuse.decelerate it first"
                    )
                plan, served = self._plan(peer, module, originals)
                if plan:
                    plans.append((module, plan))
                    for what, by in served:
                        replaced.setdefault(what, (by, []))[1].append(name or "(the model)")
        if not plans:
            known = ", ".join(peer.name for peer in peers)
            raise ValueError(f"accelerate: no module of {type(model).__name__} is one that genfuse knows of {known}")
        for module, plan in plans:
            record: dict[str, Any] = {}
            for attribute, value in plan.items():
                record[attribute] = vars(module).get(attribute, _MISSING)
                vars(module)[attribute] = value
            vars(module)[_RECORD] = (self, record)
            self.touched.append(module)
        self.report = PatchReport(
            versions,
            tuple(Replaced(what, by, tuple(places)) for what, (by, places) in replaced.items()),
            tuple(left),
            tuple(self.tallies.values()),
            self.undo,
        )

    def tally(self, name: str) -> Tally:
        """The tally of a function, made when first asked for."""
        return self.tallies.setdefault(name, Tally(name))

    def _plan(
        self, peer: Peer, module: torch.nn.Module, originals: Sequence[tuple[Target, Any, str, Any]]
    ) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        plan: dict[str, Any] = {}
        served: list[tuple[str, str]] = []
        kind = type(module)
        for target, owner, attribute, original in originals:
            if "." not in target.name or not isinstance(owner, type) or not isinstance(module, owner) or target.of:
                continue
            if target.inherited:
                takes = getattr(kind, attribute) in (original, vars(owner).get(attribute))
            else:
                takes = _resolves_to(kind, owner, attribute)
            if takes and attribute not in vars(module):
                function = target.make(original, self.tally(target.qualified))
                plan[attribute] = types.MethodType(function, module)
                served.append((target.qualified, target.by))
        functions = {target.name: (target, original) for target, _, _, original in originals if "." not in target.name}
        for rebind in peer.rebinds:
            class_name, _, attribute = rebind.name.partition(".")
            owner = getattr(importlib.import_module(rebind.module), class_name)
            if not isinstance(module, owner) or not _resolves_to(kind, owner, attribute) or attribute in plan:
                continue
            names: dict[str, Any] = {}
            for function_name in rebind.functions:
                target, original = functions[function_name]
                names[function_name] = target.make(original, self.tally(target.qualified))
                served.append((target.qualified, target.by))
            method = vars(owner)[attribute]
            if rebind.through is not None:
                behind = vars(method.__globals__[rebind.through])
                names = {rebind.through: types.SimpleNamespace(**{**behind, **names})}
            plan[attribute] = types.MethodType(rebound(method, names), module)
        if peer.accelerate is not None:
            for attribute, value, what, by in peer.accelerate(module, self.tally):
                plan[attribute] = value
                served.append((what, by))
        return plan, served

    def undo(self) -> None:
        """Put back what every module had."""
        for module in self.touched:
            if vars(module).get(_RECORD, (None,))[0] is self:
                restore(module)
        self.close_if_over()

    def close_if_over(self) -> None:
        """End the report once no module is accelerated any more."""
        if not any(vars(module).get(_RECORD, (None,))[0] is self for module in self.touched):
            self.report._close()


def restore(module: torch.nn.Module) -> Acceleration | None:
    """Put back what one module had before it was accelerated; what accelerated it, None if nothing did."""
    found = vars(module).pop(_RECORD, None)
    if found is None:
        return None
    acceleration, record = found
    for attribute, value in record.items():
        if value is _MISSING:
            vars(module).pop(attribute, None)
        else:
            vars(module)[attribute] = value
    assert isinstance(acceleration, Acceleration)
    return acceleration
