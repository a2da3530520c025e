"""genfuse in the place of other libraries' functions: the same numbers, exceptions, dtypes and shapes; and back."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import genfuse
import pytest
import torch
from genfuse import integrations
from genfuse.integrations import PatchReport
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
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(at(module), name)


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


def as_accurate(
    peer: str,
    compute: Callable[[list[Tensor]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    only: bool = True,
) -> None:
    """Patched, `compute` is as near to the peer's float64 result as the peer itself is at this dtype.

    The peer runs several times, with its inputs nudged by half a unit in the last place.
    """
    at_dtype = [tensor.to(dtype) for tensor in inputs]
    exact = compute([tensor.double() for tensor in inputs])
    runs = [compute([nudged(tensor, run) for tensor in at_dtype]) for run in range(RUNS)]
    with served(peer, only=only):
        actual = compute(at_dtype)
    for place, result in enumerate(actual):
        eager = [run[place] for run in runs]
        # In float64 what counts as exact is off as far as any of the runs, and on the other side perhaps.
        factor = FACTOR * (2 if dtype == torch.float64 else 1)
        assert_as_accurate(result, eager, exact[place], f"result {place}", gradient=gradient, factor=factor)


def skip_inverses(spline: Spline, inverse: bool) -> None:
    if inverse and "cubic" in spline.path:
        pytest.skip("the peer's root finder is further off than any tolerance: test_cubic_inverse")
    if inverse and spline.peer == "nflows" and spline.box is not None:
        pytest.skip("the peer compares an inverse's input with the domain: test_inverse_of_another_codomain")


@splines
@directions
@dtypes
def test_splines_are_the_peers(spline: Spline, inverse: bool, dtype: torch.dtype) -> None:
    skip_inverses(spline, inverse)
    x = spline.inputs((200, 3), inverse)
    parameters = spline.parameters((200, 3))
    with exact_knots(spline):
        as_accurate(
            spline.peer,
            lambda tensors: spline.call(spline.within(tensors[0], inverse), tensors[1:], inverse),
            [x, *parameters],
            dtype,
        )


@splines
@directions
@dtypes
def test_gradients_of_splines_are_the_peers(spline: Spline, inverse: bool, dtype: torch.dtype) -> None:
    skip_inverses(spline, inverse)
    x, parameters = spline.inputs((200, 3), inverse), spline.parameters((200, 3))
    weights = [torch.randn(200, 3, dtype=torch.float64) for _ in range(2)]

    def gradients(tensors: list[Tensor]) -> Sequence[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y, log_abs_det = spline.call(spline.within(leaves[0] * 1, inverse), [leaf * 1 for leaf in leaves[1:]], inverse)
        total = (y * weights[0].to(y.dtype)).sum() + (log_abs_det * weights[1].to(y.dtype)).sum()
        return torch.autograd.grad(total, leaves)

    with exact_knots(spline):
        as_accurate(spline.peer, gradients, [x, *parameters], dtype, gradient=True)


def boundary(spline: Spline, inverse: bool, dtype: torch.dtype) -> Tensor:
    """±bound, their neighbours, the middle and, with tails, what is far outside."""
    low, high = (torch.tensor(side, dtype=dtype) for side in spline.interval(inverse))
    inside = [low, torch.nextafter(low, high), (low + high) / 2, torch.nextafter(high, low), high]
    outside = [torch.nextafter(low, low - 1), low - 100, torch.nextafter(high, high + 1), high + 100]
    return torch.stack([*inside, *(outside if spline.tails else [])])


@splines
@directions
@dtypes
def test_splines_at_the_ends(spline: Spline, inverse: bool, dtype: torch.dtype) -> None:
    skip_inverses(spline, inverse)
    x = boundary(spline, inverse, dtype)
    parameters = spline.parameters(x.shape)
    with exact_knots(spline):
        as_accurate(
            spline.peer,
            lambda tensors: spline.call(x.to(tensors[0].dtype), tensors, inverse),
            parameters,
            dtype,
        )
    with served(spline.peer):
        y, log_abs_det = spline.call(x, [parameter.to(dtype) for parameter in parameters], inverse)
    if spline.tails:
        assert torch.equal(y[5:], x[5:])
        assert not log_abs_det[5:].any()
    assert y.dtype == log_abs_det.dtype == dtype


@needs("nflows")
@dtypes
def test_splines_at_their_knots(dtype: torch.dtype) -> None:
    """Knots of equal bins are representable; the function and its slope do not jump there."""
    spline = SPLINES[0]
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)
    zeros = [torch.zeros(9, 8), torch.zeros(9, 8), torch.randn(9, 7)]
    as_accurate("nflows", lambda tensors: spline.call(x.to(tensors[0].dtype), tensors, False), zeros, dtype)


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


def module_as_accurate(
    peer: str, module: nn.Module, use: Use, x: Tensor, dtype: torch.dtype = torch.float32, only: bool = True
) -> None:
    """Patched, a module is as near to the peer's float64 result as the peer itself is at this dtype."""
    module = module.to(dtype)
    x = x.to(dtype)
    exact = [result.detach() for result in use(copy.deepcopy(module).double(), x.double())]
    runs = [use(perturbed(module, run), nudged(x, run)) for run in range(RUNS)]
    with served(peer, only=only):
        actual = use(module, x)
    assert len(actual) == len(exact)
    for place, result in enumerate(actual):
        factor = FACTOR * (2 if dtype == torch.float64 else 1)
        eager = [run[place] for run in runs]
        assert_as_accurate(result, eager, exact[place], f"result {place}", factor=factor)


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
@dtypes
def test_modules_of_nflows(name: str, dtype: torch.dtype) -> None:
    module, x = nflows_modules()[name]()
    with exact_knots(SPLINES[4]):
        module_as_accurate("nflows", randomized(module), both_ways, x, dtype)
        module_as_accurate("nflows", randomized(module), slopes, x, dtype)


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
        return [g if g is not None else torch.zeros_like(p) for g, p in zip(found, [u, *module.parameters()], strict=True)]

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
