"""zuko: the rational-quadratic spline, the affine transformation, and inverses with their log-determinant.

zuko builds a transformation anew from a network's output at every call, and its constructor normalises the parameters
at once. Ours keeps them as they are, for the operator to normalise, and computes the attributes that the peer's has
(`horizontal`, `vertical`, `derivatives`; `log_scale`, `scale`) when somebody asks for them.
"""

from __future__ import annotations

import copyreg
import gc
import importlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from genfuse import ops

from .networks import Network, activation, is_exactly, masked_layers, plain
from .patching import Peer, Tally, Target, rebound
from .serving import is_number, objection

__all__ = ["PEER"]

Pair = tuple[Tensor, Tensor]

_MODULE = "zuko.transforms"
_SLOPE = 1e-3  # the one that the operators know
_RAW = "_genfuse_raw"
_SHAPES = "shapes that the peer refuses or broadcasts"
_EAGER = "made by the peer's own constructor"

# Transformations that have none of the peer's attributes yet, by identity (they cannot be hashed): they get them when
# the patch is taken back.
_LAZY: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Attribute:
    """An attribute that the peer's constructor would have set: computed at the first look, then the instance's own."""

    def __init__(self, name: str, complete: Callable[[Any], None]) -> None:
        self.name = name
        self.complete = complete

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if _RAW not in vars(instance):
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")
        self.complete(instance)
        return vars(instance)[self.name]


def _completer(constructor: Callable[..., None], names: Sequence[str]) -> Callable[[Any], None]:
    """A function that sets what the peer's constructor sets."""

    def complete(instance: Any) -> None:
        arguments, options, grad = vars(instance)[_RAW]
        made = object.__new__(type(instance))
        with torch.set_grad_enabled(grad):
            constructor(made, *arguments, **options)
        for name in names:
            vars(instance).setdefault(name, vars(made)[name])

    return complete


def _keep(instance: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    vars(instance)[_RAW] = (arguments, options, torch.is_grad_enabled())
    if not torch.compiler.is_compiling():
        _LAZY[id(instance)] = instance


# ---- the spline ------------------------------------------------------------------------------------------------------

_SPLINE, _SPLINE_NAMES = "MonotonicRQSTransform", ("horizontal", "vertical", "derivatives")


def _spline_init(
    self: Any,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    bound: float = 5.0,
    slope: float = _SLOPE,
    **kwargs: Any,
) -> object:
    """MonotonicRQSTransform.__init__"""
    if (type(self).__module__, type(self).__name__) != (_MODULE, _SPLINE):
        return "a subclass"
    reason = objection("rational_quadratic_spline", widths, heights, derivatives)
    if reason is not None:
        return reason
    if not is_number(slope) or slope != _SLOPE:
        return "another least slope than 0.001"
    if not is_number(bound) or not bound > 0:
        return "a bound that is not a positive number"
    if min(widths.dim(), heights.dim(), derivatives.dim()) < 1:
        return _SHAPES
    bins = widths.shape[-1]
    if bins < 1 or heights.shape[-1] != bins or derivatives.shape[-1] != bins - 1:
        return _SHAPES
    Transform.__init__(self, **kwargs)
    _keep(self, (widths, heights, derivatives, bound, slope), {})
    return None


def _spline(self: Any, x: Tensor, inverse: bool) -> Pair | str:
    if _RAW not in vars(self):
        return _EAGER
    widths, heights, derivatives, bound, _ = vars(self)[_RAW][0]
    reason = objection("rational_quadratic_spline", x, widths)
    if reason is not None:
        return reason
    return ops.rational_quadratic_spline(
        x, widths, heights, derivatives, inverse=inverse, tail_bound=bound, normalizer="zuko"
    )


def _spline_call(self: Any, x: Tensor) -> Tensor | str:
    """MonotonicRQSTransform._call"""
    result = _spline(self, x, False)
    return result if isinstance(result, str) else result[0]


def _spline_inverse(self: Any, y: Tensor) -> Tensor | str:
    """MonotonicRQSTransform._inverse"""
    result = _spline(self, y, True)
    return result if isinstance(result, str) else result[0]


def _spline_call_and_ladj(self: Any, x: Tensor) -> Pair | str:
    """MonotonicRQSTransform.call_and_ladj"""
    return _spline(self, x, False)


# ---- the affine transformation ---------------------------------------------------------------------------------------

_AFFINE, _AFFINE_NAMES = "MonotonicAffineTransform", ("log_scale", "scale")


def _affine_init(self: Any, shift: Tensor, scale: Tensor, slope: float = _SLOPE, **kwargs: Any) -> object:
    """MonotonicAffineTransform.__init__"""
    if (type(self).__module__, type(self).__name__) != (_MODULE, _AFFINE):
        return "a subclass"
    reason = objection("affine_coupling", shift, scale)
    if reason is not None:
        return reason
    if not is_number(slope) or not 0.0 < slope < 1.0:
        return "a least slope outside of (0, 1)"
    if shift.shape != scale.shape or shift.dim() < 1:
        return _SHAPES
    Transform.__init__(self, **kwargs)
    self.shift = shift
    _keep(self, (shift, scale, slope), {})
    return None


def _affine(self: Any, x: Tensor, inverse: bool) -> Pair | str:
    if _RAW not in vars(self):
        return _EAGER
    shift, scale, slope = vars(self)[_RAW][0]
    reason = objection("affine_coupling", x, scale)
    if reason is not None:
        return reason
    if x.shape != shift.shape:
        return _SHAPES
    if x.dim() == 1:
        x, shift, scale = x[None], shift[None], scale[None]
        y, ladj = ops.affine_coupling(x, scale, shift, scale="softclip", clamp=slope, inverse=inverse, reduce=False)
        return y[0], ladj[0]
    return ops.affine_coupling(x, scale, shift, scale="softclip", clamp=slope, inverse=inverse, reduce=False)


def _affine_call(self: Any, x: Tensor) -> Tensor | str:
    """MonotonicAffineTransform._call"""
    result = _affine(self, x, False)
    return result if isinstance(result, str) else result[0]


def _affine_inverse(self: Any, y: Tensor) -> Tensor | str:
    """MonotonicAffineTransform._inverse"""
    result = _affine(self, y, True)
    return result if isinstance(result, str) else result[0]


def _affine_call_and_ladj(self: Any, x: Tensor) -> Pair | str:
    """MonotonicAffineTransform.call_and_ladj"""
    return _affine(self, x, False)


# ---- inverses with their log-determinant -----------------------------------------------------------------------------


class Inverse(_InverseTransform):
    """An inverse that gives its log-determinant with its value; the peer's computes the forward map again for it."""

    _tally: Tally
    _attempt: Callable[[Any, Tensor], Pair | str]

    def call_and_ladj(self, y: Tensor) -> Pair:
        base: Any = self._inv
        if self._tally.active:
            result = self._attempt(base, y) if base._cache_size == 0 else "a transformation with a cache"
            if not isinstance(result, str):
                self._tally.serve()
                return result
            self._tally.hand_back(result)
        found: Pair = super().call_and_ladj(y)  # type: ignore[misc]  # zuko gives it to all transforms
        return found


def _inverse_property(attempt: Callable[[Any, Tensor], Pair | str]) -> Callable[[Any, Tally], Any]:
    def build(original: property, tally: Tally) -> property:
        def inv(self: Any) -> Any:
            if not tally.active:
                return original.__get__(self)
            found: Any = original.__get__(self)
            if type(found) is _InverseTransform:  # torch has made it and keeps it, how depends on its version
                found.__class__ = Inverse
                vars(found).update(_tally=tally, _attempt=attempt)
            return found

        return property(inv)

    return build


def _spline_inverse_and_ladj(self: Any, y: Tensor) -> Pair | str:
    return _spline(self, y, True)


def _affine_inverse_and_ladj(self: Any, y: Tensor) -> Pair | str:
    return _affine(self, y, True)


def _coupling_inverse_and_ladj(self: Any, y: Tensor) -> Pair | str:
    """The network runs once, where the peer's runs for the value and again for the log-determinant."""
    y_a, y_b = self.split(y)
    x_b, ladj = self.meta(y_a).inv.call_and_ladj(y_b)
    return self.merge(y_a, x_b, y.shape), ladj


# ---- the autoregressive transformation -------------------------------------------------------------------------------

_LAZY_AUTOREGRESSIVE = "zuko.flows.autoregressive.MaskedAutoregressiveTransform"


def _univariate_options(lazy: Any) -> dict[str, Any] | str:
    """The operator's arguments for what a lazy transformation builds; the reason if it is nothing of ours."""
    given = lazy.univariate
    options: dict[str, Any] = {}
    while isinstance(given, partial):
        if given.args:
            return "a transformation with fixed arguments"
        options = {**given.keywords, **options}
        given = given.func
    shapes = [tuple(shape) for shape in lazy.shapes]
    name = (getattr(given, "__module__", ""), getattr(given, "__name__", ""))
    slope = options.pop("slope", _SLOPE)
    if not is_number(slope) or not 0.0 < slope < 1.0:
        return "a least slope outside of (0, 1)"
    if name == (_MODULE, _AFFINE) and shapes == [(), ()] and not options:
        return {"scale": "softclip", "clamp": float(slope)}
    if name == (_MODULE, _SPLINE):
        bound = options.pop("bound", 5.0)
        if options or not is_number(bound) or not bound > 0:
            return "a bound that is not a positive number"
        if slope != _SLOPE:
            return "another least slope than 0.001"
        bins = shapes[0][0] if shapes and len(shapes[0]) == 1 else 0
        if bins < 1 or shapes != [(bins,), (bins,), (bins - 1,)]:
            return _SHAPES
        return {
            "transform": "rational_quadratic",
            "num_bins": bins,
            "tail_bound": float(bound),
            "min_bin_width": 0.0,
            "min_bin_height": 0.0,
            "min_derivative": 0.0,
            "normalizer": "zuko",
        }
    return "a transformation that the operator does not have"


def _network(lazy: Any, context: int) -> Network | str:
    """A MaskedMLP as a network of masked layers."""
    net, linear = lazy.hyper, "zuko.nn.MaskedLinear"
    if not is_exactly(net, "zuko.nn.MaskedMLP") or not plain(net, linear):
        return "a network of another class"
    if lazy.order is None:
        return "an adjacency matrix of the user's"
    modules: list[torch.nn.Module] = []
    sources: list[int] = []
    activations: list[str] = []
    residuals: list[int | None] = []
    applied = "none"

    def add(module: torch.nn.Module, before: str, residual: int | None = None) -> None:
        modules.append(module)
        sources.append(len(modules) - 2)
        activations.append(before)
        residuals.append(residual)

    for part in net:
        if is_exactly(part, linear):
            add(part, applied)
            applied = "none"
        elif is_exactly(part, "zuko.nn.Residual"):
            pieces = list(part)
            name = activation(pieces[1]) if len(pieces) == 3 else None
            if name is None or applied != "none" or not all(is_exactly(one, linear) for one in pieces[::2]):
                return "a block of another class"
            below = len(modules) - 1
            add(pieces[0], "none")
            add(pieces[2], name, below)
        else:
            name = activation(part)
            if name is None or applied != "none":
                return "an activation that genfuse does not know"
            applied = name
    if applied != "none" or not modules:
        return "a network of another class"
    return Network(modules, sources, activations, residuals, lazy.order, context=context)


def _autoregressive(self: Any, y: Tensor) -> Pair | str:
    """x and ln |det dx/dy| of each row, each column once."""
    reason = objection("autoregressive_inverse", y)
    if reason is not None:
        return reason
    if y.dim() < 1:
        return _SHAPES
    meta = self.meta
    lazy = getattr(getattr(meta, "func", None), "__self__", None)
    if not isinstance(meta, partial) or meta.keywords or len(meta.args) != 1 or lazy is None:
        return "a transformation that is not of a masked network"
    if f"{type(lazy).__module__}.{type(lazy).__qualname__}" != _LAZY_AUTOREGRESSIVE or "meta" in vars(lazy):
        return "a transformation that is not of a masked network"
    context, columns = meta.args[0], len(lazy.order) if lazy.order is not None else 0
    batch = y.shape[:-1]
    if columns != y.shape[-1] or columns < 1:
        return _SHAPES
    rows: Tensor | None = None
    if context is not None:
        reason = objection("autoregressive_inverse", y, context)
        if reason is not None:
            return reason
        try:
            rows = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        except (RuntimeError, IndexError):
            return _SHAPES
    options = _univariate_options(lazy)
    if isinstance(options, str):
        return options
    network = _network(lazy, 0 if rows is None else rows.shape[1])
    if isinstance(network, str):
        return network
    if network.modules[0].in_features != columns + network.context:
        return _SHAPES
    layers = masked_layers(lazy.hyper, network, rows)
    if isinstance(layers, str):
        return layers
    reason = objection("autoregressive_inverse", y, *(layer.weight for layer in layers))
    if reason is not None:
        return reason
    x, log_abs_det = ops.autoregressive_inverse(y.reshape(-1, columns), layers, degrees=lazy.order, **options)
    return x.view(y.shape), log_abs_det.view(batch)


def _autoregressive_inverse(self: Any, y: Tensor) -> Tensor | str:
    """AutoregressiveTransform._inverse"""
    result = _autoregressive(self, y)
    return result if isinstance(result, str) else result[0]


# ---- the table -------------------------------------------------------------------------------------------------------


def _attributes(cls: str, names: Sequence[str]) -> tuple[Target, ...]:
    def build(original: Any, tally: Tally, name: str) -> _Attribute:
        return _Attribute(name, _completer(original, names))

    return tuple(
        Target(
            _MODULE,
            f"{cls}.{name}",
            "",
            "the same, computed when asked for",
            build=partial(build, name=name),
            of="__init__",
        )
        for name in names
    )


_RQS, _COUPLING = "genfuse.ops.rational_quadratic_spline", "genfuse.ops.affine_coupling"
_INV = "the same object, whose call_and_ladj evaluates the inverse alone"


class _Faster(type):
    """The type of a class whose methods are ours; it is pickled as the peer's."""


def _peers(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _peers_class(name: str) -> Any:
    return _peers(_MODULE, name)


def _reduced(cls: _Faster) -> Any:
    return _peers_class, (cls.__name__,)


copyreg.pickle(_Faster, _reduced)


class _FasterFunction:
    """A function of the peer's that makes our transformations; it is pickled as the peer's."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> _FasterFunction:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _peers, (self.function.__module__, self.function.__name__)


def _faster(name: str, tally_of: Callable[[str], Tally]) -> type:
    """A class of the peer's with our methods, for the transformations of one model."""
    base = _peers_class(name)
    members: dict[str, Any] = {"__module__": _MODULE, "__doc__": base.__doc__}
    for target in PEER.targets:
        owner, _, attribute = target.name.partition(".")
        if owner == name:
            original = vars(base).get(target.of or attribute) or getattr(base, attribute)
            # The class itself may be patched.
            original = getattr(original, "__wrapped__", original)
            members[attribute] = target.make(original, tally_of(target.qualified))
    return _Faster(name, (base,), members)


def _faster_univariate(given: Any, tally_of: Callable[[str], Tally]) -> Any:
    """A constructor of transformations with ours in place of the peer's; None if there is nothing to replace."""
    if isinstance(given, partial):
        inner = _faster_univariate(given.func, tally_of)
        return None if inner is None else partial(inner, *given.args, **given.keywords)
    for name in (_SPLINE, _AFFINE):
        if given is _peers_class(name):
            return _faster(name, tally_of)
    if isinstance(given, FunctionType) and (given.__module__, given.__name__) == (
        "zuko.flows.spline",
        "CircularRQSTransform",
    ):
        return _FasterFunction(rebound(given, {_SPLINE: _faster(_SPLINE, tally_of)}))
    return None


def _accelerate(module: torch.nn.Module, tally_of: Callable[[str], Tally]) -> list[tuple[str, Any, str, str]]:
    """The attributes of a lazy transformation that make it build ours."""
    found: list[tuple[str, Any, str, str]] = []
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    for attribute in ("univariate", "f"):
        given = getattr(module, attribute, None)
        if given is not None and not isinstance(given, torch.nn.Module):
            ours = _faster_univariate(given, tally_of)
            if ours is not None:
                found.append((attribute, ours, f"{kind}.{attribute}", "the same transformation, served by genfuse"))
    made = {
        "zuko.flows.coupling.GeneralCouplingTransform": "CouplingTransform",
        "zuko.flows.autoregressive.MaskedAutoregressiveTransform": "AutoregressiveTransform",
    }.get(kind)
    if made is not None and "forward" not in vars(module):
        faster, forward = _faster(made, tally_of), type(module).forward

        def build(self: torch.nn.Module, c: Tensor | None = None) -> Any:
            transform = forward(self, c)
            transform.__class__ = faster
            return transform

        build.__name__ = "forward"
        found.append(("forward", MethodType(build, module), f"{_MODULE}.{made}", "the same, with inverses of genfuse"))
    return found


def _complete_all() -> None:
    """Give every transformation that outlives the patch what the peer's own code needs."""
    gc.collect()  # a transformation and its inverse may hold each other
    for instance in list(_LAZY.values()):
        names = _SPLINE_NAMES if type(instance).__name__ == _SPLINE else _AFFINE_NAMES
        for name in names:
            getattr(instance, name)
    _LAZY.clear()


PEER = Peer(
    name="zuko",
    distribution="zuko",
    sources={
        "1.6.0": {
            "zuko.transforms": "e05f1239529c3630",
            "zuko.nn": "e29f63154e7ab70d",
            "zuko.flows.autoregressive": "1575d5fe979a9436",
            "zuko.flows.coupling": "e01df7e9b289b4de",
            "zuko.flows.spline": "0d655bf398c0c193",
        },
    },
    targets=(
        Target(
            _MODULE,
            f"{_SPLINE}.__init__",
            "self widths heights derivatives bound slope kwargs",
            "a constructor that keeps the parameters as they are",
            attempt=_spline_init,
            counts=False,
        ),
        *_attributes(_SPLINE, _SPLINE_NAMES),
        Target(_MODULE, f"{_SPLINE}._call", "self x", _RQS, _spline_call),
        Target(_MODULE, f"{_SPLINE}._inverse", "self y", _RQS, _spline_inverse),
        Target(_MODULE, f"{_SPLINE}.call_and_ladj", "self x", _RQS, _spline_call_and_ladj),
        Target(
            _MODULE,
            f"{_SPLINE}.inv",
            "property",
            _INV,
            build=_inverse_property(_spline_inverse_and_ladj),
            inherited=True,
        ),
        Target(
            _MODULE,
            f"{_AFFINE}.__init__",
            "self shift scale slope kwargs",
            "a constructor that keeps the parameters as they are",
            attempt=_affine_init,
            counts=False,
        ),
        *_attributes(_AFFINE, _AFFINE_NAMES),
        Target(_MODULE, f"{_AFFINE}._call", "self x", _COUPLING, _affine_call),
        Target(_MODULE, f"{_AFFINE}._inverse", "self y", _COUPLING, _affine_inverse),
        Target(_MODULE, f"{_AFFINE}.call_and_ladj", "self x", _COUPLING, _affine_call_and_ladj, inherited=True),
        Target(
            _MODULE,
            f"{_AFFINE}.inv",
            "property",
            _INV,
            build=_inverse_property(_affine_inverse_and_ladj),
            inherited=True,
        ),
        Target(
            _MODULE,
            "AutoregressiveTransform._inverse",
            "self y",
            "genfuse.ops.autoregressive_inverse, each column once",
            _autoregressive_inverse,
        ),
        Target(
            _MODULE,
            "AutoregressiveTransform.inv",
            "property",
            _INV,
            build=_inverse_property(_autoregressive),
            inherited=True,
        ),
        Target(
            _MODULE,
            "CouplingTransform.inv",
            "property",
            "the same object, whose call_and_ladj runs the network once",
            build=_inverse_property(_coupling_inverse_and_ladj),
            inherited=True,
        ),
    ),
    left=(
        ("zuko.transforms.CouplingTransform._call", "split and merge: indexing"),
        ("zuko.transforms.LULinearTransform", "matrix products, which the vendor's BLAS serves"),
        ("zuko.transforms.RotationTransform", "matrix products, which the vendor's BLAS serves"),
        ("zuko.transforms.BernsteinTransform", "genfuse has no operator for it"),
        ("zuko.transforms.SOSPolynomialTransform", "genfuse has no operator for it"),
        ("zuko.transforms.UnconstrainedMonotonicTransform", "genfuse has no operator for it"),
        ("zuko.transforms.GaussianizationTransform", "genfuse has no operator for it"),
        ("zuko.transforms.FreeFormJacobianTransform", "genfuse has no operator for it"),
    ),
    accelerate=_accelerate,
    complete=_complete_all,
)
