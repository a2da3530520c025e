"""genfuse in the place of other libraries' functions: the same numbers, exceptions, dtypes and shapes; and back."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import math
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import genfuse
import pytest
import torch
from genfuse import integrations
from genfuse.integrations import PatchReport, patching
from tolerances import FACTOR, RUNS, ULPS, assert_as_accurate, nudged
from torch import Tensor, nn

INSTALLED = [name for name in integrations.PEERS if importlib.util.find_spec(name) is not None]
DTYPES = [torch.float32, torch.float64]


def needs(peer: str) -> Any:
    return pytest.mark.skipif(peer not in INSTALLED, reason=f"{peer} is not installed")


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    left = list(integrations._in_force)
    genfuse.unpatch()
    assert not left


@contextmanager
def served(*peers: str, only: bool = True) -> Iterator[PatchReport]:
    """Patched, and it must have been worth it: calls were served and (unless not `only`) none handed back."""
    with genfuse.patched(*peers) as report:
        yield report
    assert report.calls.total > 0
    if only:
        assert not report.calls.handed_back, str(report)


def at(path: str) -> Any:
    """What a dotted name means now."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(at(owner), name)


# ---- functions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spline:
    """A spline function of a peer.

    Attributes:
        counts: sizes of the last dimension of its parameters.
        low, high: the interval on the axis of its input, of the inverse's in `inverse_low`, `inverse_high`.
        tails: whether it takes inputs outside.
    """

    peer: str
    path: str
    counts: tuple[int, ...]
    low: float
    high: float
    tails: bool
    options: dict[str, Any] = field(default_factory=dict)
    inverse: str = "inverse"
    normalize: Callable[[list[Tensor]], list[Tensor]] = list
    smooth: bool = True
    box: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        return "-".join([self.peer, self.path.rpartition(".")[2], *map(str, self.options.values())])

    def parameters(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        drawn = [torch.randn(*shape, count, dtype=torch.float64).to(torch.float32).to(dtype) for count in self.counts]
        return self.normalize(drawn)

    def interval(self, inverse: bool) -> tuple[float, float]:
        return self.box if inverse and self.box is not None else (self.low, self.high)

    def inputs(self, shape: tuple[int, ...], inverse: bool) -> Tensor:
        low, high = self.interval(inverse)
        spread = high - low
        unit = torch.rand(shape, dtype=torch.float64)
        if self.tails:
            return (low + spread * (1.5 * unit - 0.25)).float().double()
        return (low + spread * unit).float().double().clamp(low, high)

    def within(self, x: Tensor, inverse: bool) -> Tensor:
        """x, which may have been nudged out of the domain."""
        return x if self.tails else x.clamp(*self.interval(inverse))

    def call(self, x: Tensor, parameters: Sequence[Tensor], inverse: bool) -> tuple[Tensor, Tensor]:
        options = {self.inverse: inverse, **self.options}
        result: tuple[Tensor, Tensor] = at(self.path)(x, *parameters, **options)
        return result


def probabilities(parameters: list[Tensor]) -> list[Tensor]:
    widths, heights, derivatives = parameters
    return [widths.softmax(-1), heights.softmax(-1), nn.functional.softplus(derivatives)]


_N, _NF = "nflows.transforms.splines", "normflows.utils.splines"
_VITS = "transformers.models.vits.modeling_vits"
_BOX = {"left": -1.0, "right": 2.0, "bottom": 0.5, "top": 4.0}
_SAME = {"left": -1.0, "right": 2.0, "bottom": -1.0, "top": 2.0}
_STRICT = {"reverse": None, "tail_bound": 2.0, "min_bin_width": 1e-3, "min_bin_height": 1e-3, "min_derivative": 1e-3}
SPLINES = [
    Spline("nflows", f"{_N}.unconstrained_rational_quadratic_spline", (8, 8, 7), -3, 3, True, {"tail_bound": 3.0}),
    Spline("nflows", f"{_N}.rational_quadratic_spline", (8, 8, 9), 0, 1, False),
    Spline("nflows", f"{_N}.rational_quadratic_spline", (5, 5, 6), -1, 2, False, _BOX, box=(0.5, 4.0)),
    Spline("nflows", f"{_N}.unconstrained_linear_spline", (8,), -3, 3, True, {"tail_bound": 3.0}, smooth=False),
    Spline("nflows", f"{_N}.linear_spline", (8,), 0, 1, False, smooth=False),
    Spline("nflows", f"{_N}.linear_spline", (8,), -1, 2, False, _SAME, smooth=False),
    Spline("nflows", f"{_N}.unconstrained_quadratic_spline", (8, 7), -3, 3, True, {"tail_bound": 3.0}),
    Spline("nflows", f"{_N}.quadratic_spline", (8, 9), 0, 1, False),
    Spline("nflows", f"{_N}.quadratic_spline", (8, 9), -1, 2, False, _SAME),
    Spline("nflows", f"{_N}.unconstrained_cubic_spline", (8, 8, 1, 1), -3, 3, True, {"tail_bound": 3.0}),
    Spline("nflows", f"{_N}.cubic_spline", (8, 8, 1, 1), 0, 1, False),
    Spline("nflows", f"{_N}.cubic_spline", (8, 8, 1, 1), -1, 2, False, _SAME),
    Spline("normflows", f"{_NF}.unconstrained_rational_quadratic_spline", (8, 8, 7), -3, 3, True, {"tail_bound": 3.0}),
    Spline(
        "normflows",
        f"{_NF}.unconstrained_rational_quadratic_spline",
        (8, 8, 8),
        -3,
        3,
        True,
        {"tails": "circular", "tail_bound": 3.0},
    ),
    Spline("normflows", f"{_NF}.rational_quadratic_spline", (8, 8, 9), 0, 1, False),
    Spline("normflows", f"{_NF}.rational_quadratic_spline", (5, 5, 6), -1, 2, False, _BOX, box=(0.5, 4.0)),
    Spline(
        "pyro",
        "pyro.distributions.transforms.spline._monotonic_rational_spline",
        (8, 8, 7),
        -3,
        3,
        True,
        normalize=probabilities,
    ),
    Spline(
        "pyro",
        "pyro.distributions.transforms.spline._monotonic_rational_spline",
        (6, 6, 5),
        -2,
        2,
        True,
        {"bound": 2.0, "min_derivative": 0.1, "min_bin_width": 0.01},
        normalize=probabilities,
    ),
    Spline(
        "transformers",
        f"{_VITS}._unconstrained_rational_quadratic_spline",
        (10, 10, 9),
        -5,
        5,
        True,
        inverse="reverse",
    ),
    Spline(
        "transformers",
        f"{_VITS}._rational_quadratic_spline",
        (10, 10, 11),
        -2,
        2,
        False,
        {name: value for name, value in _STRICT.items() if name != "reverse"},
        inverse="reverse",
    ),
]
splines = pytest.mark.parametrize("spline", [pytest.param(one, id=one.id, marks=needs(one.peer)) for one in SPLINES])
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def check(name: str, result: Tensor, runs: Sequence[Tensor], exact: Tensor, gradient: bool = False) -> None:
    """A result is as near to the peer's in float64 as the peer's `runs` in float32 are; in float64 as much nearer as
    its rounding is finer, and what counts as exact may be off as far on the other side.
    """
    eager = list(runs)
    if result.dtype == torch.float64:
        finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        eager = [exact + (run.detach().double() - exact) * finer for run in runs]
    factor = FACTOR * (2 if result.dtype == torch.float64 else 1)
    assert_as_accurate(result, eager, exact, f"{name} in {result.dtype}", gradient=gradient, factor=factor)


def as_accurate(
    peer: str,
    compute: Callable[[list[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    gradient: bool = False,
    only: bool = True,
) -> None:
    """Patched, `compute` is as near to the peer's float64 result as the peer itself is, in float32 and float64.

    The peer runs several times, with its inputs nudged by half a unit in the last place.
    """
    single = [tensor.float() for tensor in inputs]
    double = [tensor.double() for tensor in single]
    exact = [result.detach() for result in compute(double)]
    runs = [compute([nudged(tensor, run) for tensor in single]) for run in range(RUNS)]
    with served(peer, only=only):
        found = compute(single), compute(double)
    for results in found:
        for place, result in enumerate(results):
            check(f"result {place}", result, [run[place] for run in runs], exact[place], gradient)


def skip_inverses(spline: Spline, inverse: bool) -> None:
    if inverse and "cubic" in spline.path:
        pytest.skip("the peer's root finder is further off than any tolerance: test_cubic_inverse")
    if inverse and spline.peer == "nflows" and spline.box is not None:
        pytest.skip("the peer compares an inverse's input with the domain: test_inverse_of_another_codomain")


@splines
@directions
def test_splines_are_the_peers(spline: Spline, inverse: bool) -> None:
    skip_inverses(spline, inverse)
    x = spline.inputs((200, 3), inverse)
    parameters = spline.parameters((200, 3))
    with exact_knots(spline):
        as_accurate(
            spline.peer,
            lambda tensors: spline.call(spline.within(tensors[0], inverse), tensors[1:], inverse),
            [x, *parameters],
        )


@splines
@directions
def test_gradients_of_splines_are_the_peers(spline: Spline, inverse: bool) -> None:
    skip_inverses(spline, inverse)
    x, parameters = spline.inputs((200, 3), inverse), spline.parameters((200, 3))
    weights = [torch.randn(200, 3, dtype=torch.float64) for _ in range(2)]

    def gradients(tensors: list[Tensor]) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y, log_abs_det = spline.call(spline.within(leaves[0] * 1, inverse), [leaf * 1 for leaf in leaves[1:]], inverse)
        total = (y * weights[0].to(y.dtype)).sum() + (log_abs_det * weights[1].to(y.dtype)).sum()
        return torch.autograd.grad(total, leaves)

    with exact_knots(spline):
        as_accurate(spline.peer, gradients, [x, *parameters], gradient=True)


def boundary(spline: Spline, inverse: bool, dtype: torch.dtype) -> Tensor:
    """±bound, their neighbours, the middle and, with tails, what is far outside."""
    low, high = (torch.tensor(side, dtype=dtype) for side in spline.interval(inverse))
    inside = [low, torch.nextafter(low, high), (low + high) / 2, torch.nextafter(high, low), high]
    outside = [torch.nextafter(low, low - 1), low - 100, torch.nextafter(high, high + 1), high + 100]
    return torch.stack([*inside, *(outside if spline.tails else [])])


@splines
@directions
def test_splines_at_the_ends(spline: Spline, inverse: bool) -> None:
    skip_inverses(spline, inverse)
    parameters = spline.parameters(boundary(spline, inverse, torch.float32).shape)
    for dtype in DTYPES:
        x = boundary(spline, inverse, dtype)

        def at_ends(tensors: list[Tensor], x: Tensor = x) -> Sequence[Tensor]:
            # What is just inside or outside in float64 is on the bound in float32.
            return spline.call(spline.within(x.to(tensors[0].dtype), inverse), tensors, inverse)

        with exact_knots(spline):
            as_accurate(spline.peer, at_ends, parameters)
        with served(spline.peer):
            y, log_abs_det = spline.call(x, [parameter.to(dtype) for parameter in parameters], inverse)
        if spline.tails:
            assert torch.equal(y[5:], x[5:])
            assert not log_abs_det[5:].any()
        assert y.dtype == log_abs_det.dtype == dtype


@needs("nflows")
def test_splines_at_their_knots() -> None:
    """Knots of equal bins are representable; the function and its slope do not jump there."""
    spline = SPLINES[0]
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)
    zeros = [torch.zeros(9, 8), torch.zeros(9, 8), torch.randn(9, 7)]
    as_accurate("nflows", lambda tensors: spline.call(x.to(tensors[0].dtype), tensors, False), zeros)


@needs("nflows")
@pytest.mark.parametrize("name", ["cubic_spline", "unconstrained_cubic_spline"])
@dtypes
def test_cubic_inverse(name: str, dtype: torch.dtype) -> None:
    """Through the peer's own forward map in float64 the inverse leads back, up to the rounding of x times the slope."""
    spline = next(one for one in SPLINES if one.path.endswith(f".{name}"))
    y, parameters = spline.inputs((200,), True).to(dtype), spline.parameters((200,), dtype)
    with served("nflows"):
        x, log_abs_det = spline.call(y, parameters, True)
    if not spline.tails:
        x = x.clamp(0, 1)
    back, log_slope = spline.call(x.double(), [p.double() for p in parameters], False)
    error = (back - y).abs() / log_slope.exp().clamp(min=1)
    assert float(error.max()) <= ULPS * max(abs(spline.low), abs(spline.high)) * torch.finfo(dtype).eps
    eager = [-spline.call(x, [nudged(p, run) for p in parameters], False)[1] for run in range(RUNS)]
    assert_as_accurate(log_abs_det, eager, -log_slope)


@contextmanager
def exact_knots(spline: Spline) -> Iterator[None]:
    """nflows moves the last knot by 1e-6 to search for bins, and its linear inverse then computes with it."""
    if not spline.path.endswith("linear_spline"):
        yield
        return
    utilities = importlib.import_module("nflows.utils.torchutils")
    original = utilities.searchsorted

    def searchsorted(knots: Tensor, x: Tensor) -> Tensor:
        return original(knots, x, 0.0).clamp(max=knots.shape[-1] - 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "searchsorted", searchsorted)
        yield


@splines
@directions
def test_batches_in_the_tails_alone_and_empty_ones(spline: Spline, inverse: bool) -> None:
    if spline.box is not None and inverse and spline.peer == "nflows":
        return
    for shape in ((0,), (0, 3), (4, 0)):
        x = torch.zeros(shape)
        with served(spline.peer):
            y, log_abs_det = spline.call(x, [p.float() for p in spline.parameters(shape)], inverse)
        assert y.shape == log_abs_det.shape == shape
    if spline.tails:
        x = torch.tensor([-200.0, 100.0])
        with served(spline.peer):
            y, log_abs_det = spline.call(x, [p.float() for p in spline.parameters((2,))], inverse)
        assert torch.equal(y, x)
        assert not log_abs_det.any()


@splines
def test_nan_goes_through(spline: Spline) -> None:
    x = torch.tensor([math.nan, (spline.low + spline.high) / 2])
    for inverse in (False, True):
        if spline.peer == "nflows" and inverse and spline.box is not None:
            continue
        if not spline.tails and inverse and spline.box is not None:
            x = torch.tensor([math.nan, 1.0])
        with served(spline.peer):
            y, log_abs_det = spline.call(x, [p.float() for p in spline.parameters((2,))], inverse)
        assert y.isnan().tolist() == [True, False]
        assert not log_abs_det[1].isnan()


@needs("nflows")
def test_inverse_of_another_codomain() -> None:
    """nflows compares the input of an inverse with the domain of the forward map. So it stays."""
    spline = next(one for one in SPLINES if one.peer == "nflows" and one.box is not None)
    parameters = [p.float() for p in spline.parameters((1,))]
    before = [outcome(lambda y=y: spline.call(torch.tensor([y]), parameters, True)) for y in (3.0, 0.7)]  # type: ignore[misc]
    with genfuse.patched("nflows") as report:
        after = [outcome(lambda y=y: spline.call(torch.tensor([y]), parameters, True)) for y in (3.0, 0.7)]  # type: ignore[misc]
    assert before == after
    assert before[0] is not None
    assert before[1] is None
    assert report.calls.total == 0
    assert sum(report.calls.handed_back.values()) == 2


def outcome(function: Callable[[], Any]) -> tuple[type[BaseException], str] | None:
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@splines
@directions
def test_exceptions_are_the_peers_own(spline: Spline, inverse: bool) -> None:
    """Whatever a call gets wrong, the peer says so: the same type and message, patched or not."""
    x, parameters = spline.inputs((6,), inverse).float(), [p.float() for p in spline.parameters((6,))]
    cases: dict[str, Callable[[], Any]] = {
        "shapes": lambda: spline.call(x[:4], parameters, inverse),
        "integers": lambda: spline.call(x.long(), parameters, inverse),
        "missing": lambda: at(spline.path)(x),
        "unknown": lambda: at(spline.path)(x, *parameters, nonsense=1),
        "dtypes": lambda: spline.call(x.double(), parameters, inverse),
    }
    if "linear_spline" not in spline.path:
        for name in ("min_bin_width", "min_bin_height"):
            options = {**spline.options, spline.inverse: inverse, name: 0.5}
            cases[name] = lambda options=options: at(spline.path)(x, *parameters, **options)  # type: ignore[misc]
    if not spline.tails:
        cases["outside"] = lambda: spline.call(x - 100, parameters, inverse)
    elif spline.peer in ("nflows", "normflows"):
        options_of_tails = {**spline.options, "tails": "strange"}
        cases["tails"] = lambda: at(spline.path)(x, *parameters, **options_of_tails)
    before = {name: outcome(case) for name, case in cases.items()}
    with genfuse.patched(spline.peer):
        after = {name: outcome(case) for name, case in cases.items()}
    for name in cases:
        theirs, ours = before[name], after[name]
        if name in ("missing", "unknown"):  # Python's own, which names the function called
            assert theirs is not None
            assert ours is not None
            assert ours[0] is theirs[0] is TypeError
        else:
            assert ours == theirs, name
    refused = {name for name, result in before.items() if result is not None}
    if "linear_spline" not in spline.path:
        assert {"shapes", "min_bin_width", "min_bin_height"} <= refused
    if not spline.tails:
        assert "outside" in refused
    elif "tails" in cases:
        assert before["tails"] is not None
        assert before["tails"][0] is RuntimeError


# ---- modules ---------------------------------------------------------------------------------------------------------


def randomized(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """A module whose parameters are not those of its initialisation, which often is the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale / max(parameter.shape[-1], 1) ** 0.5)
    return module.eval()


def perturbed(module: nn.Module, run: int) -> nn.Module:
    """A copy whose parameters and buffers are nudged."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(nudged(parameter, run))
    return twin


Use = Callable[[Any, Tensor], Sequence[Tensor]]


def module_as_accurate(peer: str, module: nn.Module, use: Use, x: Tensor, *, only: bool = True) -> None:
    """Patched, a module is as near to the peer's float64 result as the peer itself is, in float32 and float64."""
    module, x = module.float(), x.float()
    wide = copy.deepcopy(module).double()
    exact = [result.detach() for result in use(wide, x.double())]
    runs = [use(perturbed(module, run), nudged(x, run)) for run in range(RUNS)]
    with served(peer, only=only):
        found = use(module, x), use(wide, x.double())
    for results in found:
        assert len(results) == len(exact)
        for place, result in enumerate(results):
            check(f"result {place}", result, [run[place] for run in runs], exact[place])


def both_ways(module: Any, x: Tensor) -> Sequence[Tensor]:
    """Value and log-determinant of the forward map and of the inverse."""
    return [*module(x), *module.inverse(x)]


def slopes(module: Any, x: Tensor) -> Sequence[Tensor]:
    """Gradients of both directions by the input and all the parameters."""
    x = x.detach().requires_grad_()
    results = both_ways(module, x)
    weights = torch.Generator().manual_seed(3)
    total = sum(
        (result * torch.randn(result.shape, generator=weights, dtype=torch.float64).to(result.dtype)).sum()
        for result in results
    )
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    found = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [gradient for gradient in found if gradient is not None]


def nflows_net(width: int = 16) -> Callable[[int, int], nn.Module]:
    from nflows.nn import nets

    return lambda inputs, outputs: nets.ResidualNet(inputs, outputs, hidden_features=width, num_blocks=1)


def nflows_conv(width: int = 8) -> Callable[[int, int], nn.Module]:
    from nflows.nn import nets

    return lambda inputs, outputs: nets.ConvResidualNet(inputs, outputs, hidden_channels=width, num_blocks=1)


def nflows_modules() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    from nflows import transforms as t

    mask = [1, 0, 1, 1, 0]
    inside = lambda: torch.rand(20, 5, dtype=torch.float64) * 0.98 + 0.01  # noqa: E731
    around = lambda: 1.5 * torch.randn(20, 5, dtype=torch.float64)  # noqa: E731
    image = lambda: torch.randn(3, 5, 4, 4, dtype=torch.float64)  # noqa: E731
    cases: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "affine": lambda: (t.AffineCouplingTransform(mask, nflows_net()), around()),
        "affine image": lambda: (t.AffineCouplingTransform(mask, nflows_conv()), image()),
        "additive": lambda: (t.AdditiveCouplingTransform(mask, nflows_net()), around()),
        "rqs image": lambda: (
            t.PiecewiseRationalQuadraticCouplingTransform(mask, nflows_conv(), tails="linear", tail_bound=2.0),
            image(),
        ),
        "rqs unconditional": lambda: (
            t.PiecewiseRationalQuadraticCouplingTransform(
                mask, nflows_net(), tails="linear", tail_bound=2.0, apply_unconditional_transform=True
            ),
            around(),
        ),
        "actnorm": lambda: (t.ActNorm(5), around()),
        "actnorm image": lambda: (t.ActNorm(5), image()),
        "maf": lambda: (t.MaskedAffineAutoregressiveTransform(5, 16), around()),
        "rqs maf": lambda: (
            t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(5, 16, tails="linear", tail_bound=2.0),
            around(),
        ),
        "rqs cdf": lambda: (t.PiecewiseRationalQuadraticCDF([5], tails="linear", tail_bound=2.0), around()),
        "rqs cdf inside": lambda: (t.PiecewiseRationalQuadraticCDF([5]), inside()),
    }
    for kind in ("Linear", "Quadratic", "RationalQuadratic"):
        coupling = getattr(t, f"Piecewise{kind}CouplingTransform")
        cases[f"{kind} tails"] = lambda coupling=coupling: (  # type: ignore[misc]
            coupling(mask, nflows_net(), num_bins=8, tails="linear", tail_bound=2.0),
            around(),
        )
        cases[f"{kind} inside"] = lambda coupling=coupling: (coupling(mask, nflows_net(), num_bins=8), inside())  # type: ignore[misc]
    return cases


NFLOWS = [
    "affine",
    "affine image",
    "additive",
    "rqs image",
    "rqs unconditional",
    "actnorm",
    "actnorm image",
    "maf",
    "rqs maf",
    "rqs cdf",
    "rqs cdf inside",
    *(f"{kind} {where}" for kind in ("Linear", "Quadratic", "RationalQuadratic") for where in ("tails", "inside")),
]


@needs("nflows")
@pytest.mark.parametrize("name", NFLOWS)
def test_modules_of_nflows(name: str) -> None:
    module, x = nflows_modules()[name]()
    with exact_knots(SPLINES[4]):
        module_as_accurate("nflows", randomized(module), both_ways, x)
        module_as_accurate("nflows", randomized(module), slopes, x)


# ---- autoregressive inverses -----------------------------------------------------------------------------------------


def inverse_alone(module: Any, x: Tensor) -> Sequence[Tensor]:
    found: Sequence[Tensor] = module.inverse(x)
    return found


def with_context(context: Tensor) -> Use:
    return lambda module, x: module.inverse(x, context.to(x.dtype))


MADES: dict[str, dict[str, Any]] = {
    "residual": {},
    "residual tanh": {"activation": torch.tanh},
    "residual context": {"context_features": 3},
    "feed-forward": {"use_residual_blocks": False},
    "feed-forward random": {"use_residual_blocks": False, "random_mask": True, "activation": torch.nn.functional.elu},
    "no blocks": {"num_blocks": 0},
    "dropout at rest": {"dropout_probability": 0.5},
}


@pytest.mark.parametrize("name", MADES)
@pytest.mark.parametrize("kind", ["affine", "rqs"])
@pytest.mark.parametrize("peer", [pytest.param(peer, marks=needs(peer)) for peer in ("nflows", "normflows")])
def test_autoregressive_inverses(peer: str, kind: str, name: str) -> None:
    options = MADES[name]
    if peer == "normflows" and "context" in name:
        pytest.skip("normflows gates its blocks by the context: handed back")
    affine, rqs = {
        "nflows": (
            "nflows.transforms.MaskedAffineAutoregressiveTransform",
            "nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
        ),
        "normflows": (
            "normflows.flows.MaskedAffineAutoregressive",
            "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
        ),
    }[peer]
    if kind == "affine":
        module = at(affine)(6, 20, **options)
    else:
        module = at(rqs)(6, 20, num_bins=5, tails="linear", tail_bound=2.0, **options)
    u = torch.randn(15, 6, dtype=torch.float64)
    use = with_context(torch.randn(15, 3, dtype=torch.float64)) if "context" in name else inverse_alone
    module_as_accurate(peer, randomized(module), use, u)

    def gradients(module: Any, u: Tensor) -> Sequence[Tensor]:
        u = u.detach().requires_grad_()
        x, log_abs_det = use(module, u)
        found = torch.autograd.grad((x * x).sum() + log_abs_det.sum(), [u, *module.parameters()], allow_unused=True)
        # The peers' is 0 where ours, which never looks there, is none.
        return [
            g if g is not None else torch.zeros_like(p) for g, p in zip(found, [u, *module.parameters()], strict=True)
        ]

    module_as_accurate(peer, module, gradients, u)


@needs("normflows")
def test_autoregressive_inverse_of_permuted_columns() -> None:
    module = at("normflows.flows.AutoregressiveRationalQuadraticSpline")(5, 2, 16, permute_mask=True)
    u = torch.randn(15, 5, dtype=torch.float64)
    module_as_accurate("normflows", randomized(module), lambda module, u: module(u), u)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_probability": 0.3}, "dropout at work"),
        ({"use_batch_norm": True}, "batch normalisation"),
        ({"activation": torch.nn.functional.softplus}, "an activation that genfuse does not know"),
    ],
    ids=["dropout", "batch norm", "activation"],
)
@needs("nflows")
def test_autoregressive_inverses_left_to_the_peer(options: dict[str, Any], reason: str) -> None:
    module = at("nflows.transforms.MaskedAffineAutoregressiveTransform")(4, 12, **options)
    u = torch.randn(9, 4)
    torch.manual_seed(5)
    theirs = module.inverse(u)
    with genfuse.patched("nflows") as report:
        torch.manual_seed(5)
        ours = module.inverse(u)
    name = "nflows.transforms.autoregressive.MaskedAffineAutoregressiveTransform.inverse"
    assert report.calls.handed_back == {(name, reason): 1}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@needs("nflows")
def test_autoregressive_inverse_of_changed_masks() -> None:
    """Masks are looked at again when they have changed; one that follows from no degrees is the peer's affair."""
    module = randomized(at("nflows.transforms.MaskedAffineAutoregressiveTransform")(4, 12))
    u = torch.randn(9, 4, dtype=torch.float64)
    module_as_accurate("nflows", module, inverse_alone, u)
    mask = module.autoregressive_net.initial_layer.mask
    mask[:, 0] = torch.arange(12) % 2
    theirs = module.inverse(u.float())
    with genfuse.patched("nflows") as report:
        ours = module.inverse(u.float())
    assert [reason for _, reason in report.calls.handed_back] == ["masks that do not follow from degrees"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# ---- normflows -------------------------------------------------------------------------------------------------------


def normflows_modules() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    flows, nets = at("normflows.flows"), at("normflows.nets")
    points = lambda: 1.5 * torch.randn(60, 4, dtype=torch.float64)  # noqa: E731
    image = lambda: torch.randn(3, 4, 4, 4, dtype=torch.float64)  # noqa: E731

    def mlp(*sizes: int) -> nn.Module:
        made: nn.Module = nets.MLP(list(sizes))
        return made

    def initialized(flow: nn.Module) -> nn.Module:
        for module in flow.modules():
            if hasattr(module, "data_dep_init_done"):
                module.data_dep_init_done = torch.tensor(1.0)
        return flow

    def block(**options: Any) -> nn.Module:
        return flows.AffineCouplingBlock(mlp(2, 8, 4), **options)  # type: ignore[no-any-return]

    return {
        "exp": lambda: (block(scale_map="exp"), points()),
        "sigmoid": lambda: (block(scale_map="sigmoid"), points()),
        "sigmoid_inv": lambda: (block(scale_map="sigmoid_inv", split_mode="channel_inv"), points()),
        "odd": lambda: (flows.AffineCouplingBlock(mlp(3, 8, 4)), torch.randn(20, 5, dtype=torch.float64)),
        "masked": lambda: (
            flows.MaskedAffineFlow(torch.tensor([1.0, 0.0, 1.0, 0.0]), mlp(4, 8, 4), mlp(4, 8, 4)),
            points(),
        ),
        "masked, no scale": lambda: (flows.MaskedAffineFlow(torch.tensor([1.0, 0, 0, 1]), mlp(4, 8, 4)), points()),
        "constant": lambda: (flows.AffineConstFlow((4,)), points()),
        "actnorm": lambda: (initialized(flows.ActNorm((4, 1, 1))), image()),
        "glow": lambda: (initialized(flows.GlowBlock(4, 8)), image()),
        "glow inverted split": lambda: (initialized(flows.GlowBlock(4, 8, split_mode="channel_inv")), image()),
        "glow checkerboard": lambda: (initialized(flows.GlowBlock(4, 8, split_mode="checkerboard")), image()),
        "spline coupling": lambda: (flows.CoupledRationalQuadraticSpline(4, 1, 16), points()),
        "spline coupling, circular": lambda: (
            flows.neural_spline.coupling.PiecewiseRationalQuadraticCoupling(
                torch.tensor([1, 0, 1, 0]),
                lambda i, o: at("normflows.nets.resnet.ResidualNet")(i, o, hidden_features=16),
                tails="circular",
                tail_bound=2.0,
                apply_unconditional_transform=True,
            ),
            points(),
        ),
        "spline autoregressive": lambda: (flows.AutoregressiveRationalQuadraticSpline(4, 1, 16), points()),
        "affine autoregressive": lambda: (flows.MaskedAffineAutoregressive(4, 16), points()),
    }


NORMFLOWS = [
    "exp",
    "sigmoid",
    "sigmoid_inv",
    "odd",
    "masked",
    "masked, no scale",
    "constant",
    "actnorm",
    "glow",
    "glow inverted split",
    "glow checkerboard",
    "spline coupling",
    "spline coupling, circular",
    "spline autoregressive",
    "affine autoregressive",
]


@needs("normflows")
@pytest.mark.parametrize("name", NORMFLOWS)
def test_modules_of_normflows(name: str) -> None:
    module, x = normflows_modules()[name]()
    only = name != "glow checkerboard"  # whose split and merge stay the peer's
    module_as_accurate("normflows", randomized(module), both_ways, x, only=only)
    module_as_accurate("normflows", randomized(module), slopes, x, only=only)


@needs("normflows")
def test_shapes_that_normflows_gives_its_determinants() -> None:
    flow, x = at("normflows.flows.AffineConstFlow")((4, 1, 1)), torch.randn(3, 4, 2, 2)
    theirs = flow(x)[1].shape, flow.inverse(x)[1].shape
    with served("normflows"):
        ours = flow(x)[1].shape, flow.inverse(x)[1].shape
    assert ours == theirs == (torch.Size([]), torch.Size([]))


@needs("normflows")
def test_actnorm_initialises_as_the_peer_does() -> None:
    for direction in ("forward", "inverse"):
        flow, x = at("normflows.flows.ActNorm")((4,)), torch.randn(50, 4) * 3 + 1
        twin = copy.deepcopy(flow)
        theirs = getattr(twin, direction)(x)[0]
        with served("normflows"):
            ours = getattr(flow, direction)(x)[0]
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(flow.s, twin.s)
        assert flow.data_dep_init_done == 1.0


@needs("nflows")
def test_nflows_actnorm_initialises_as_the_peer_does() -> None:
    norm, x = at("nflows.transforms.ActNorm")(4), torch.randn(50, 4) * 3 + 1
    twin = copy.deepcopy(norm)
    theirs = twin(x)[0]
    with served("nflows"):
        ours = norm(x)[0]
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(norm.log_scale, twin.log_scale)
    assert bool(norm.initialized)


@needs("normflows")
@pytest.mark.parametrize("what", ["infinite", "not binary"])
def test_masked_flow_of_odd_values(what: str) -> None:
    """An infinite scale gives NaN, as the peer has it; a mask with other numbers than 0 and 1 is the peer's affair."""
    mask = torch.tensor([1.0, 0.0, 0.5 if what == "not binary" else 0.0])
    scale, shift = nn.Linear(3, 3), nn.Linear(3, 3)
    if what == "infinite":
        with torch.no_grad():
            scale.bias[1] = math.inf
    flow = at("normflows.flows.MaskedAffineFlow")(mask, shift, scale)
    x = torch.randn(5, 3)
    theirs = both_ways(flow, x)
    with genfuse.patched("normflows") as report:
        ours = both_ways(flow, x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert (report.calls.total > 0) == (what == "infinite")


@needs("normflows")
def test_lists_of_tails_and_tensors_of_bounds_stay_the_peers() -> None:
    for bound in (torch.tensor([2.0, 3.0, 2.5, 1.5]), 3.0):
        flow = randomized(at("normflows.flows.CircularCoupledRationalQuadraticSpline")(4, 1, 16, [1], tail_bound=bound))
        x = torch.rand(6, 4) - 0.5
        theirs = both_ways(flow, x)
        with genfuse.patched("normflows") as report:
            ours = both_ways(flow, x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert {reason for _, reason in report.calls.handed_back} <= {
            "a list of tails",
            "a bound or a least size is a tensor",
        }
        assert report.calls.handed_back


# ---- zuko ------------------------------------------------------------------------------------------------------------


def through(c: Tensor | None) -> Use:
    """Everything that a lazy transformation of zuko's gives."""

    def use(lazy: Any, x: Tensor) -> Sequence[Tensor]:
        transform = lazy(None if c is None else c.to(x.dtype))
        return [
            transform(x),
            transform.inv(x),
            transform.log_abs_det_jacobian(x, transform(x)),
            *transform.call_and_ladj(x),
            *transform.inv.call_and_ladj(x),
        ]

    return use


def zuko_slopes(c: Tensor | None) -> Use:
    def use(lazy: Any, x: Tensor) -> Sequence[Tensor]:
        x = x.detach().requires_grad_()
        y, ladj = lazy(None if c is None else c.to(x.dtype)).call_and_ladj(x)
        z, inverse_ladj = lazy(None if c is None else c.to(x.dtype)).inv.call_and_ladj(x)
        total = (y * y + z * z * z).sum() + ladj.sum() + 2 * inverse_ladj.sum()
        leaves = [x, *lazy.parameters()]
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [g if g is not None else torch.zeros_like(p) for g, p in zip(found, leaves, strict=True)]

    return use


def zuko_lazies() -> dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor | None]]]:
    flows, rqs = at("zuko.flows"), at("zuko.transforms.MonotonicRQSTransform")
    shapes = [(6,), (6,), (5,)]
    points = lambda *batch: 2 * torch.randn(*batch, 5, dtype=torch.float64)  # noqa: E731
    context = lambda *batch: torch.randn(*batch, 2, dtype=torch.float64)  # noqa: E731
    made = flows.autoregressive.MaskedAutoregressiveTransform
    coupled = flows.coupling.GeneralCouplingTransform
    small = {"hidden_features": (16, 16)}
    return {
        "maf": lambda: (made(5, **small), points(20), None),
        "maf context": lambda: (made(5, 2, **small), points(20), context(20)),
        "maf one context": lambda: (made(5, 2, **small), points(4, 3), context()),
        "maf passes": lambda: (made(5, passes=2, **small), points(20), None),
        "maf order": lambda: (made(5, order=torch.tensor([3, 1, 4, 0, 2]), **small), points(20), None),
        "maf residual": lambda: (made(5, 2, residual=True, activation=nn.ELU, **small), points(20), context(20)),
        "maf slope": lambda: (
            made(5, univariate=lambda a, b: at("zuko.transforms.MonotonicAffineTransform")(a, b, slope=1e-2), **small),
            points(20),
            None,
        ),
        "nsf": lambda: (made(5, 2, univariate=rqs, shapes=shapes, **small), points(20), context(20)),
        "coupling": lambda: (coupled(5, 2, **small), points(20), context(20)),
        "coupling rqs": lambda: (coupled(5, univariate=rqs, shapes=shapes, **small), points(20), None),
        "single": lambda: (made(5, **small), points(), None),
    }


ZUKO = [
    "maf",
    "maf context",
    "maf one context",
    "maf passes",
    "maf order",
    "maf residual",
    "maf slope",
    "nsf",
    "coupling",
    "coupling rqs",
    "single",
]


@needs("zuko")
@pytest.mark.parametrize("name", ZUKO)
def test_transformations_of_zuko(name: str) -> None:
    lazy, x, c = zuko_lazies()[name]()
    only = name != "maf slope"  # a constructor of the user's, of which nobody can know what it makes
    module_as_accurate("zuko", randomized(lazy, 1.0), through(c), x, only=only)
    if name != "single":
        module_as_accurate("zuko", lazy, zuko_slopes(c), x, only=only)


@needs("zuko")
@pytest.mark.parametrize("shape", [(7,), (4, 7), (3, 4, 7)])
def test_zuko_spline_by_itself(shape: tuple[int, ...]) -> None:
    """Parameters broadcast; every method; ends and tails."""
    edge = torch.tensor([-5.0, 5.0, 0.0, 9.0, -9.0, -4.999, 4.999], dtype=torch.float64)
    x = (2.5 * torch.randn(shape, dtype=torch.float64)).float().double()
    if len(shape) == 1:
        x = edge
    parameters = [torch.randn(7, count, dtype=torch.float64).float().double() for count in (6, 6, 5)]

    def use(tensors: list[Tensor]) -> Sequence[Tensor]:
        transform = at("zuko.transforms.MonotonicRQSTransform")(*tensors[1:])
        at_x = tensors[0] if len(shape) > 1 else x.to(tensors[0].dtype)
        y = transform(at_x)
        return [
            y,
            transform.log_abs_det_jacobian(at_x, y),
            *transform.call_and_ladj(at_x),
            transform.inv(at_x),
            *transform.inv.call_and_ladj(at_x),
            transform.horizontal,
            transform.vertical,
            transform.derivatives,
        ]

    as_accurate("zuko", use, [x, *parameters])


@needs("zuko")
def test_zuko_transformations_outlive_the_patch() -> None:
    """What was made while patched works afterwards, by the peer's own code, and keeps its graph."""
    parameters = [torch.randn(4, count, requires_grad=True) for count in (6, 6, 5)]
    make = lambda: at("zuko.transforms.MonotonicRQSTransform")(*parameters)  # noqa: E731
    affine = lambda: at("zuko.transforms.MonotonicAffineTransform")(parameters[0], parameters[1])  # noqa: E731
    x, wide = torch.randn(4), torch.randn(4, 6)
    theirs = make()(x), affine()(wide)
    with served("zuko"):
        spline, line = make(), affine()
        spline(x)
        inverse = spline.inv
    assert "horizontal" not in vars(type(spline))
    torch.testing.assert_close(spline(x), theirs[0])
    torch.testing.assert_close(line(wide), theirs[1])
    torch.testing.assert_close(inverse(x), spline.inv(x))
    assert spline.horizontal.requires_grad
    assert inverse.call_and_ladj(x)[1].shape == x.shape
    assert repr(spline) == "MonotonicRQSTransform(bins=6)"
    with genfuse.patched("zuko"):
        assert repr(make()) == "MonotonicRQSTransform(bins=6)"
        with pytest.raises(AttributeError):
            _ = make().nonsense


@needs("zuko")
def test_zuko_constructors_left_to_the_peer() -> None:
    rqs = at("zuko.transforms.MonotonicRQSTransform")
    parameters = [torch.randn(4, count) for count in (6, 6, 5)]

    class Own(rqs):  # type: ignore[misc, valid-type]
        pass

    x = torch.randn(4)
    theirs = [rqs(*parameters, slope=1e-2)(x), Own(*parameters)(x), rqs(*(p.half() for p in parameters))(x.half())]
    with genfuse.patched("zuko") as report:
        ours = [rqs(*parameters, slope=1e-2)(x), Own(*parameters)(x), rqs(*(p.half() for p in parameters))(x.half())]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert report.calls.total == 0
    reasons = {reason for name, reason in report.calls.handed_back if name.endswith("__init__")}
    assert reasons == {
        "another least slope than 0.001",
        "a subclass",
        "float16: results in half types are the peer's own",
    }


# ---- Pyro ------------------------------------------------------------------------------------------------------------


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """Pyro's inverses start from zeros of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pyro_both(transform: Any, x: Tensor) -> Sequence[Tensor]:
    with by_default(x.dtype):
        y = transform(x)
        back = transform._inverse(x)
        forward = transform.log_abs_det_jacobian(x, y)
        inverse = transform.inv(x)
        return [y, forward, back, transform.log_abs_det_jacobian(inverse, x)]


def pyro_modules() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    transforms = at("pyro.distributions.transforms")
    points = lambda *batch: 1.5 * torch.randn(*batch, 4, dtype=torch.float64)  # noqa: E731
    return {
        "spline": lambda: (transforms.Spline(4, order="quadratic"), points(20)),
        "spline batches": lambda: (transforms.Spline(4, order="quadratic", bound=2.0), points(3, 5)),
        "spline coupling": lambda: (
            transforms.SplineCoupling(4, 2, at("pyro.nn.DenseNN")(2, [16], [16, 16, 14]), order="quadratic"),
            points(20),
        ),
        "coupling": lambda: (transforms.affine_coupling(4), points(20)),
        "coupling clip": lambda: (
            transforms.affine_coupling(4, log_scale_min_clip=-0.1, log_scale_max_clip=0.2),
            points(3, 5),
        ),
        "coupling 3-d": lambda: (transforms.affine_coupling((4, 3), dim=-2), torch.randn(6, 4, 3, dtype=torch.float64)),
        "iaf": lambda: (transforms.affine_autoregressive(4), points(20)),
        "iaf skip": lambda: (
            transforms.AffineAutoregressive(at("pyro.nn.AutoRegressiveNN")(4, [12, 12], skip_connections=True)),
            points(3, 5),
        ),
    }


PYRO = ["spline", "spline batches", "spline coupling", "coupling", "coupling clip", "coupling 3-d", "iaf", "iaf skip"]


@needs("pyro")
@pytest.mark.parametrize("name", PYRO)
def test_transforms_of_pyro(name: str) -> None:
    transform, x = pyro_modules()[name]()
    module_as_accurate("pyro", randomized(transform), pyro_both, x)


@needs("pyro")
def test_pyro_conditional_inverse_and_gradients() -> None:
    transforms = at("pyro.distributions.transforms")
    transform = randomized(transforms.conditional_affine_autoregressive(4, 3))
    context = torch.randn(20, 3, dtype=torch.float64)

    def use(module: Any, y: Tensor) -> Sequence[Tensor]:
        y = y.detach().requires_grad_()
        conditioned = module.condition(context.to(y.dtype))
        x = conditioned.inv(y)
        total = (x * x).sum() + conditioned.log_abs_det_jacobian(x, y).sum()
        leaves = [y, *module.parameters()]
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [x.detach(), *(g if g is not None else torch.zeros_like(p) for g, p in zip(found, leaves, strict=True))]

    def by_dtype(module: Any, y: Tensor) -> Sequence[Tensor]:
        with by_default(y.dtype):
            return use(module, y)

    module_as_accurate("pyro", transform, by_dtype, torch.randn(20, 4, dtype=torch.float64))


@needs("pyro")
def test_pyro_orders_and_variants_left_to_the_peer() -> None:
    transforms = at("pyro.distributions.transforms")
    x = torch.randn(6, 4)
    linear, stable = transforms.Spline(4), transforms.affine_autoregressive(4, stable=True)
    theirs = linear(x), stable._inverse(x)
    with genfuse.patched("pyro") as report:
        ours = transforms.Spline._call(linear, x), stable._inverse(x)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert report.calls.total == 0
    assert any("order 'linear'" in reason for _, reason in report.calls.handed_back)


@needs("transformers")
@pytest.mark.parametrize("reverse", [False, True])
def test_vits_flow(reverse: bool) -> None:
    """The flow of the stochastic duration predictor, padding included."""
    modeling = at(_VITS)
    config = at("transformers.VitsConfig")(hidden_size=16, depth_separable_channels=2)
    flow = randomized(modeling.VitsConvFlow(config))
    mask = (torch.arange(12) < 9).double().expand(3, 1, 12)

    def use(module: Any, x: Tensor) -> Sequence[Tensor]:
        y, log_det = module(x, mask.to(x.dtype), reverse=reverse)
        return [y] if log_det is None else [y, log_det]

    module_as_accurate("transformers", flow, use, 3 * torch.randn(3, 2, 12, dtype=torch.float64))


# ---- whole models ----------------------------------------------------------------------------------------------------


def nflows_flow(transforms: Sequence[nn.Module], features: int) -> nn.Module:
    composite = at("nflows.transforms.CompositeTransform")(transforms)
    noise = at("nflows.distributions.normal.StandardNormal")([features])
    flow: nn.Module = at("nflows.flows.base.Flow")(composite, noise)
    return flow


def nflows_nsf() -> nn.Module:
    t = at("nflows.transforms")
    layers = []
    for step in range(3):
        mask = [(place + step) % 2 for place in range(4)]
        layers += [
            t.ReversePermutation(4),
            t.PiecewiseRationalQuadraticCouplingTransform(
                mask, nflows_net(), num_bins=6, tails="linear", tail_bound=3.0
            ),
        ]
    return nflows_flow(layers, 4)


def nflows_maf() -> nn.Module:
    t = at("nflows.transforms")
    layers = [one for _ in range(2) for one in (t.ReversePermutation(4), t.MaskedAffineAutoregressiveTransform(4, 16))]
    return nflows_flow(layers, 4)


def normflows_model(kind: str) -> nn.Module:
    nf = at("normflows.flows")
    layers: list[nn.Module] = []
    for step in range(3):
        if kind == "nsf":
            layers += [nf.CoupledRationalQuadraticSpline(4, 1, 16), nf.LULinearPermute(4)]
        else:
            mask = torch.tensor([(place + step) % 2 for place in range(4)]).float()
            mlp = [at("normflows.nets.MLP")([4, 16, 4]) for _ in range(2)]
            layers.append(nf.MaskedAffineFlow(mask, *mlp))
    model: nn.Module = at("normflows.NormalizingFlow")(at("normflows.distributions.DiagGaussian")(4), layers)
    return model


def normflows_glow() -> nn.Module:
    nf = at("normflows.flows")
    flows = [[nf.GlowBlock(4, 8) for _ in range(2)] + [nf.Squeeze()]]
    base = [at("normflows.distributions.DiagGaussian")((4, 2, 2))]
    model: nn.Module = at("normflows.MultiscaleFlow")(base, flows, [])
    model.log_prob(torch.randn(16, 1, 4, 4), None)  # its actnorms take their values from the first batch
    return model


def log_prob(model: Any, x: Tensor) -> Sequence[Tensor]:
    return [model.log_prob(x, None)]


def zuko_log_prob(model: Any, x: Tensor) -> Sequence[Tensor]:
    return [model().log_prob(x), model().transform.inv(x)]


def nflows_log_prob(model: Any, x: Tensor) -> Sequence[Tensor]:
    return [model.log_prob(x), model._transform.inverse(x)[0]]


def normflows_log_prob(model: Any, x: Tensor) -> Sequence[Tensor]:
    return [model.log_prob(x), model.forward(x)]


WHOLE: dict[str, tuple[str, Callable[[], nn.Module], Use, tuple[int, ...]]] = {
    "nflows NSF": ("nflows", nflows_nsf, nflows_log_prob, (4,)),
    "nflows MAF": ("nflows", nflows_maf, nflows_log_prob, (4,)),
    "normflows NSF": ("normflows", lambda: normflows_model("nsf"), normflows_log_prob, (4,)),
    "normflows RealNVP": ("normflows", lambda: normflows_model("affine"), normflows_log_prob, (4,)),
    "normflows Glow": ("normflows", normflows_glow, log_prob, (1, 4, 4)),
    "zuko NSF": ("zuko", lambda: at("zuko.flows.NSF")(4, transforms=2, hidden_features=(16,)), zuko_log_prob, (4,)),
    "zuko MAF": ("zuko", lambda: at("zuko.flows.MAF")(4, transforms=2, hidden_features=(16,)), zuko_log_prob, (4,)),
    "zuko RealNVP": (
        "zuko",
        lambda: at("zuko.flows.NICE")(4, transforms=2, hidden_features=(16,)),
        zuko_log_prob,
        (4,),
    ),
    "zuko NCSF": ("zuko", lambda: at("zuko.flows.NCSF")(4, transforms=2, hidden_features=(16,)), zuko_log_prob, (4,)),
}
models = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(one[0])) for name, one in WHOLE.items()])


@models
def test_whole_models(name: str) -> None:
    """The same log-density, and the same samples of the same noise."""
    peer, make, use, shape = WHOLE[name]
    x = torch.randn(60, *shape, dtype=torch.float64)
    only = name != "zuko NCSF"  # circular: the inverse of its autoregressive network stays the peer's
    module_as_accurate(peer, randomized(make(), 0.2), use, x.clamp(-3, 3), only=only)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name.split()[0])) for name in ("nflows NSF", "zuko NSF")]
)
def test_samples_of_the_same_seed(name: str) -> None:
    model = randomized(WHOLE[name][1](), 0.2)
    sample = (lambda: model.sample(50)) if name.startswith("nflows") else (lambda: model().sample((50,)))
    torch.manual_seed(1)
    theirs = sample()
    with served(WHOLE[name][0]):
        torch.manual_seed(1)
        ours = sample()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---- patching --------------------------------------------------------------------------------------------------------

peers = pytest.mark.parametrize("peer", [pytest.param(peer, marks=needs(peer)) for peer in integrations.PEERS])


def everything(peer: str) -> dict[str, Any]:
    """What each module and class of a library holds, by qualified name."""
    package = next(iter(integrations._peer(peer).modules)).partition(".")[0]
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != package or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{name}.{attribute}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({f"{name}.{attribute}.{key}": held for key, held in vars(value).items()})
    return found


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    ignored = ("__doc__", "__abstractmethods__", "__annotations_cache__")
    keys = {key for key in before if not key.endswith(ignored)}
    return (
        keys <= after.keys()
        and all(before[key] is after[key] for key in keys)
        and not ({key for key in after if not key.endswith(ignored)} - keys)
    )


@peers
def test_unpatching_restores_every_object(peer: str) -> None:
    for module in integrations._peer(peer).modules:
        importlib.import_module(module)
    before = everything(peer)
    report = genfuse.patch(peer)
    assert not unchanged(before, everything(peer))
    for one in report.replaced:
        for place in one.places:
            assert at(place) is not before.get(place)
    genfuse.unpatch(peer)
    assert unchanged(before, everything(peer))


@peers
def test_report(peer: str) -> None:
    with genfuse.patched(peer) as report:
        text = str(report)
    assert report.peers == {peer: importlib.metadata.version(integrations._peer(peer).distribution)}
    assert len(report.replaced) == len(integrations._peer(peer).targets)
    assert report.left
    for one in report.replaced:
        assert one.name in text
        assert one.name in one.places
    for one in report.left:
        assert one.name in text
        assert one.reason in text
    with pytest.raises(RuntimeError, match="undone already"):
        report.undo()


@peers
def test_what_is_left_is_there(peer: str) -> None:
    """The report names no function that the library does not have."""
    for name, _ in integrations._peer(peer).left:
        at(name)


@needs("nflows")
def test_names_imported_by_others_are_patched_and_reported() -> None:
    name = "genfuse_test_of_imports"
    other = types.ModuleType(name)
    original = at(f"{_N}.unconstrained_rational_quadratic_spline")
    other.spline = original  # type: ignore[attr-defined]
    sys.modules[name] = other
    try:
        with genfuse.patched("nflows") as report:
            assert other.spline is at(f"{_N}.unconstrained_rational_quadratic_spline") is not original
            assert any(f"{name}.spline" in one.places for one in report.replaced)
            other.later = other.spline  # type: ignore[attr-defined]
            held = other.spline
        assert other.spline is other.later is original
        x, parameters = torch.zeros(2), [torch.zeros(2, n) for n in (8, 8, 7)]
        held(x, *parameters)  # whoever still has the replacement calls the original through it
        assert report.calls.total == 0
    finally:
        del sys.modules[name]


@needs("nflows")
def test_patches_are_counted() -> None:
    original = at(f"{_N}.linear_spline")
    x, pdf = torch.rand(3), torch.randn(3, 8)
    first = genfuse.patch("nflows")
    replacement = at(f"{_N}.linear_spline")
    replacement(x, pdf)
    second = genfuse.patch("nflows")
    assert at(f"{_N}.linear_spline") is replacement
    replacement(x, pdf)
    assert (first.calls.total, second.calls.total) == (2, 1)
    genfuse.unpatch("nflows")
    replacement(x, pdf)
    assert (first.calls.total, second.calls.total) == (3, 1)
    with genfuse.patched("nflows") as third:
        replacement(x, pdf)
    assert third.calls.total == 1
    assert at(f"{_N}.linear_spline") is replacement
    first.undo()
    assert at(f"{_N}.linear_spline") is original
    assert first.calls.total == 4
    with pytest.raises(RuntimeError, match="nflows is not patched"):
        genfuse.unpatch("nflows")


@needs("nflows")
@needs("zuko")
def test_unpatch_takes_back_everything() -> None:
    original = at(f"{_N}.linear_spline")
    reports = [genfuse.patch("nflows"), genfuse.patch("nflows"), genfuse.patch("zuko")]
    genfuse.unpatch()
    assert at(f"{_N}.linear_spline") is original
    assert not integrations._in_force
    for report in reports:
        with pytest.raises(RuntimeError, match="undone already"):
            report.undo()


@needs("nflows")
@needs("zuko")
def test_several_libraries_at_once() -> None:
    with genfuse.patched("nflows", "zuko") as report:
        at(f"{_N}.linear_spline")(torch.rand(3), torch.randn(3, 8))
        at("zuko.transforms.MonotonicRQSTransform")(torch.randn(6), torch.randn(6), torch.randn(5))(torch.randn(4))
    assert set(report.peers) == {"nflows", "zuko"}
    assert report.calls.total == 2
    with pytest.raises(ValueError, match="name must be one of"), genfuse.patched("nflows", "numpy"):
        pass
    assert not integrations._in_force


def test_wrong_names() -> None:
    for name in ("numpy", None, 3):
        with pytest.raises(ValueError, match="patch: name must be one of nflows"):
            genfuse.patch(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give one name"), genfuse.patched():
        pass


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ModuleNotFoundError, match=r"nflows is not installed \(pip install nflows\)"):
        genfuse.patch("nflows")


@peers
def test_unknown_versions_are_refused(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in integrations._peer(peer).modules:
        importlib.import_module(module)
    before = everything(peer)
    known = integrations._peer(peer)
    if known.by_source:  # where another version with the same functions is as good
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name: "77.0")
            with genfuse.patched(peer) as report:
                assert report.peers == {peer: "77.0"}
            patch.setattr(patching.Peer, "digest", staticmethod(lambda source: "0"))
            with pytest.raises(
                RuntimeError, match=r"77\.0 is installed, but the source of .* known to genfuse \(5\.24\.0\)"
            ):
                genfuse.patch(peer)
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "77.0")
        wanted = ", ".join(known.sources)
        with pytest.raises(RuntimeError, match=f"77.0 is not known to genfuse, which knows {wanted}; left as it is"):
            genfuse.patch(peer)
    assert unchanged(before, everything(peer))


@needs("nflows")
@pytest.mark.parametrize("what", ["source", "signature", "replaced", "gone", "not a function"])
def test_changed_functions_are_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = f"{_N}.cubic", "cubic_spline"
    if what == "source":
        monkeypatch.setattr(patching.Peer, "digest", staticmethod(lambda source: "0" * 16))
        message = r"nflows 0\.14 is installed, but the source of nflows\.transforms\.autoregressive"
    elif what == "gone":
        monkeypatch.delattr(at(module), name)
        message = f"{name} is not where genfuse knows it to be"
    elif what == "not a function":
        monkeypatch.setattr(at(module), name, 3)
        message = f"{name} is 3 and not the function"
    else:

        def stranger(inputs: Tensor) -> Tensor:
            return inputs

        message = f"{name} has been replaced by"
        if what == "signature":
            stranger.__module__, stranger.__qualname__ = module, name
            message = rf"{name} takes \(inputs\), and not, as genfuse knows it"
        monkeypatch.setattr(at(module), name, stranger)
    before = everything("nflows")
    with pytest.raises(RuntimeError, match=message):
        genfuse.patch("nflows")
    assert unchanged(before, everything("nflows"))
    assert not integrations._in_force


@needs("nflows")
def test_a_patch_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything("nflows")
    swap, calls = patching._swap, []

    def failing(pairs: Any) -> Any:
        result = swap(pairs)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(patching, "_swap", failing)
    with pytest.raises(KeyboardInterrupt):
        genfuse.patch("nflows")
    assert unchanged(before, everything("nflows"))
    assert not integrations._in_force


@needs("nflows")
def test_what_somebody_else_replaces_meanwhile_stays() -> None:
    cls = at("nflows.transforms.ActNorm")
    original = vars(cls)["forward"]

    def stranger(self: Any, inputs: Tensor, context: Any = None) -> Any:
        return inputs, inputs.new_zeros(len(inputs))

    genfuse.patch("nflows")
    cls.forward = stranger
    try:
        with pytest.warns(RuntimeWarning, match="replaced by somebody else since"):
            genfuse.unpatch("nflows")
        assert vars(cls)["forward"] is stranger
    finally:
        cls.forward = original


@needs("nflows")
def test_half_types_and_other_devices_are_the_peers() -> None:
    spline = at(f"{_N}.unconstrained_rational_quadratic_spline")
    parameters = [torch.randn(4, n) for n in (8, 8, 7)]
    x = torch.randn(4)
    theirs = spline(x.bfloat16(), *(p.bfloat16() for p in parameters))
    with genfuse.patched("nflows") as report:
        ours = at(f"{_N}.unconstrained_rational_quadratic_spline")(x.bfloat16(), *(p.bfloat16() for p in parameters))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
    assert report.calls.total == 0
    from genfuse.integrations.serving import objection

    there = torch.empty(3, device="meta")
    assert objection("rational_quadratic_spline", there) == "genfuse has no proven kernel for meta"
    with genfuse.use_backend("reference"):
        assert objection("rational_quadratic_spline", there) is None


@needs("nflows")
def test_subclasses_keep_what_they_override() -> None:
    t = at("nflows.transforms")

    class Halved(t.AffineCouplingTransform):  # type: ignore[name-defined, misc]
        def _scale_and_shift(self, params: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = super()._scale_and_shift(params)
            return 0.5 * scale, shift

    class Doubled(t.PiecewiseRationalQuadraticCouplingTransform):  # type: ignore[name-defined, misc]
        def _piecewise_cdf(self, inputs: Tensor, params: Tensor, inverse: bool = False) -> Any:
            return super()._piecewise_cdf(inputs, 2 * params, inverse)

    x = torch.randn(5, 4)
    for layer in (Halved([0, 1, 0, 1], nflows_net()), Doubled([0, 1, 0, 1], nflows_net(), tails="linear")):
        theirs = both_ways(layer, x)
        with genfuse.patched("nflows") as report:
            ours = both_ways(layer, x)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert "a subclass with a transform of its own" in {reason for _, reason in report.calls.handed_back}


@needs("nflows")
def test_conditioners_run_once_whatever_they_give() -> None:
    """A network whose output the operator does not take has run by then: it does not run again."""
    t = at("nflows.transforms")
    calls = []

    class Net(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, outputs)

        def forward(self, x: Tensor, context: Any = None) -> Tensor:
            calls.append(1)
            return self.linear(x).double()

    layer, x = t.AffineCouplingTransform([0, 1, 0, 1], Net), torch.randn(5, 4)
    theirs = outcome(lambda: layer(x))
    with genfuse.patched("nflows") as report:
        ours = outcome(lambda: layer(x))
    assert ours == theirs
    assert len(calls) == 2
    assert report.calls.total == 0


@needs("nflows")
def test_warning_of_unscaled_logits_is_kept() -> None:
    t = at("nflows.transforms")

    class Net(nn.Linear):
        def forward(self, x: Tensor, context: Any = None) -> Tensor:
            return super().forward(x)

    layer, x = t.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0, 1], Net, tails="linear"), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="not scaled down"):
        theirs = layer(x)
    with served("nflows"), pytest.warns(UserWarning, match="not scaled down"):
        ours = layer(x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@needs("nflows")
def test_calls_in_several_threads_are_all_counted() -> None:
    x, pdf = torch.rand(3), torch.randn(3, 8)

    def work() -> None:
        for _ in range(200):
            at(f"{_N}.linear_spline")(x, pdf)

    with genfuse.patched("nflows") as report:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.calls.total == 800


def test_importing_genfuse_imports_no_peer() -> None:
    import subprocess

    code = "import sys, genfuse; genfuse.patch; genfuse.accelerate; print([p for p in {!r} if p in sys.modules])"
    names = ("nflows", "normflows", "zuko", "pyro", "transformers")
    result = subprocess.run([sys.executable, "-c", code.format(names)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---- one model -------------------------------------------------------------------------------------------------------


@models
def test_accelerated_models(name: str) -> None:
    """One instance is served, its twin is not; and everything is as before afterwards."""
    peer, make, use, shape = WHOLE[name]
    model = randomized(make(), 0.2)
    twin, x = copy.deepcopy(model), torch.randn(6, *shape).clamp(-3, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = [{key: value for key, value in vars(module).items() if key[0] != "_"} for module in model.modules()]
    theirs = use(model, x)
    report = genfuse.accelerate(model)
    assert peer in report.peers
    ours = use(model, x)
    served_calls = report.calls.total
    assert served_calls > 0
    use(twin, x)
    assert report.calls.total == served_calls
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(state)
    with pytest.raises(RuntimeError, match="accelerated already"):
        genfuse.accelerate(model)
    copied = copy.deepcopy(model)
    use(copied, x)
    assert report.calls.total > served_calls
    loaded = pickle.loads(pickle.dumps(model))
    for a, b in zip(use(loaded, x), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    counted = report.calls.total
    genfuse.decelerate(model)
    use(model, x)
    assert report.calls.total == counted
    after = [{key: value for key, value in vars(module).items() if key[0] != "_"} for module in model.modules()]
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] is b[key] for key in a)
    with pytest.raises(RuntimeError, match="nothing in"):
        genfuse.decelerate(model)


@needs("nflows")
@pytest.mark.parametrize("kind", ["Linear", "Quadratic", "Cubic"])
def test_accelerated_splines_of_nflows(kind: str) -> None:
    """Transforms that call the splines by name get functions of their own."""
    t = at("nflows.transforms")
    coupling = getattr(t, f"Piecewise{kind}CouplingTransform")([0, 1, 0, 1], nflows_net(), tails="linear")
    autoregressive = getattr(t, f"MaskedPiecewise{kind}AutoregressiveTransform")(
        features=4, hidden_features=8, num_bins=4, **({"tails": "linear"} if kind == "Quadratic" else {})
    )
    cdf = getattr(t, f"Piecewise{kind}CDF")([4], tails="linear")
    x = torch.rand(5, 4) * 0.9 + 0.05
    for module in (coupling, autoregressive, cdf):
        theirs = module(x)
        report = genfuse.accelerate(module)
        ours = module(x)
        assert report.calls.total == 1
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        report.undo()
        module(x)
        assert report.calls.total == 1


@needs("nflows")
def test_accelerate_under_a_patch_and_after_it() -> None:
    """The originals are the peer's, also if the whole library is patched meanwhile."""
    model, x = nflows_nsf(), torch.randn(6, 4)
    with genfuse.patched("nflows") as report:
        own = genfuse.accelerate(model)
        model.log_prob(x)
        assert report.calls.total == 0
        assert own.calls.total > 0
    model.log_prob(x.half().float())
    own.undo()


@needs("nflows")
def test_parts_of_accelerated_models() -> None:
    model, x = nflows_nsf(), torch.randn(6, 4)
    report = genfuse.accelerate(model)
    genfuse.decelerate(model._transform._transforms[1])
    model.log_prob(x)
    assert report.calls.total == 2
    with pytest.raises(RuntimeError, match="is accelerated already"):
        genfuse.accelerate(model)
    report.undo()
    genfuse.accelerate(model).undo()


def test_accelerate_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="no module of Linear is one that genfuse knows"):
        genfuse.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        genfuse.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        genfuse.decelerate(3)  # type: ignore[arg-type]
