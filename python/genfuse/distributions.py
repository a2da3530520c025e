"""Distributions of `torch.distributions`' kind over the fused operators, and the base distributions of flows, which are
modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence
from torch.distributions.kl import register_kl

from genfuse import ops

__all__ = [
    "BaseDistribution",
    "DiagonalGaussian",
    "DiagonalNormal",
    "GaussianMixture",
    "StandardNormal",
    "UniformBox",
    "kl_divergence",
]

_Size = torch.Size()


class DiagonalGaussian(Distribution):
    """A Gaussian with independent components, by its log-variances or the logarithms of its standard deviations.

    As ``Independent(Normal(mean, std), event_dims)``, but `log_prob`, `rsample` and `kl_divergence` are one pass each
    (`genfuse.ops.gaussian_nll`, `gaussian_rsample`, `gaussian_kl`), and no standard deviation is formed that could
    overflow or vanish. `log_prob` and KL divergences are float32 for narrower parameters.

    KL divergences are registered to and from itself, ``Normal`` (of a shape that broadcasts to the event's, or with a
    batch before that; summed over the event) and ``Independent(Normal)`` of the same event shape.

    Args:
        mean: ``[*batch, *event]``.
        logvar: log-variances; mean and this broadcast. Either this or `log_std`.
        log_std: logarithms of standard deviations.
        event_dims: how many of the last dimensions are the event; the rest are the batch.
        validate_args: as in `torch.distributions.Distribution`.

    Raises:
        TypeError: a parameter is no Tensor, both or none of logvar and log_std are given, or event_dims is no int.
        ValueError: event_dims is negative or above the number of dimensions; with `validate_args`, a NaN.
        RuntimeError: the parameters do not broadcast.

    Example:
        >>> q = DiagonalGaussian(torch.zeros(4, 20), torch.zeros(4, 20))
        >>> q.batch_shape, q.event_shape, q.rsample((3,)).shape
        (torch.Size([4]), torch.Size([20]), torch.Size([3, 4, 20]))
        >>> kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        tensor([0., 0., 0., 0.])
    """

    has_rsample = True

    _mean: Tensor
    _scale: Tensor
    _by_log_std: bool
    event_dims: int

    def __init__(
        self,
        mean: Tensor,
        logvar: Tensor | None = None,
        *,
        log_std: Tensor | None = None,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if (logvar is None) == (log_std is None):
            raise TypeError("DiagonalGaussian: give one of logvar and log_std")
        scale = log_std if logvar is None else logvar
        for name, value in (("mean", mean), ("logvar" if log_std is None else "log_std", scale)):
            if not isinstance(value, Tensor):
                raise TypeError(f"DiagonalGaussian: {name} must be a Tensor, got {type(value).__name__}")
        if isinstance(event_dims, bool) or not isinstance(event_dims, int):
            raise TypeError(f"DiagonalGaussian: event_dims must be an int, got {type(event_dims).__name__}")
        assert scale is not None
        dtype = torch.promote_types(mean.dtype, scale.dtype)
        broadcast: Any = torch.broadcast_tensors
        self._mean, self._scale = broadcast(mean.to(dtype), scale.to(dtype))
        self._by_log_std = log_std is not None
        dims = self._mean.dim()
        if not 0 <= event_dims <= dims:
            raise ValueError(f"DiagonalGaussian: event_dims must be between 0 and {dims}, got {event_dims}")
        self.event_dims = event_dims
        shape = self._mean.shape
        super().__init__(shape[: dims - event_dims], shape[dims - event_dims :], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        real = constraints.independent(constraints.real, self.event_dims)  # type: ignore[no-untyped-call]
        return {"mean": real, "log_std" if self._by_log_std else "logvar": real}

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dims)  # type: ignore[no-untyped-call]

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def mode(self) -> Tensor:
        return self._mean

    @property
    def logvar(self) -> Tensor:
        return 2.0 * self._scale if self._by_log_std else self._scale

    @property
    def log_std(self) -> Tensor:
        return self._scale if self._by_log_std else 0.5 * self._scale

    @property
    def stddev(self) -> Tensor:
        return self.log_std.exp()

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def __repr__(self) -> str:
        return f"DiagonalGaussian(batch_shape={list(self.batch_shape)}, event_shape={list(self.event_shape)})"

    def _by_name(self, scale: Tensor) -> Any:
        return {"log_std" if self._by_log_std else "logvar": scale}

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalGaussian:
        """The same distribution with its batch expanded to `batch_shape`."""
        get_instance: Any = self._get_checked_instance
        new: DiagonalGaussian = get_instance(DiagonalGaussian, _instance)
        batch_shape = torch.Size(batch_shape)
        shape = batch_shape + self.event_shape
        new._mean, new._scale = self._mean.expand(shape), self._scale.expand(shape)
        new._by_log_std, new.event_dims = self._by_log_std, self.event_dims
        super(DiagonalGaussian, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(
        self,
        sample_shape: Any = _Size,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Reparametrised samples.

        Args:
            sample_shape: of the samples of each Gaussian.
            eps: standard normals ``[*sample_shape, *batch, *event]``, instead of drawn ones.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[*sample_shape, *batch, *event]``.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        scale = self._by_name(self._scale.expand(shape))
        return ops.gaussian_rsample(self._mean.expand(shape), **scale, eps=eps, generator=generator)

    @torch.no_grad()
    def sample(
        self, sample_shape: Any = _Size, *, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """`rsample` without a gradient."""
        return self.rsample(sample_shape, eps=eps, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value [*sample, *batch, *event]``: ``[*sample, *batch]``, float32 or wider."""
        if self._validate_args:
            self._validate_sample(value)
        dims = max(value.dim(), self._mean.dim()) - self.event_dims
        dtype = torch.promote_types(value.dtype, self._mean.dtype)
        value, mean, scale = (tensor.to(dtype) for tensor in (value, self._mean, self._scale))
        return -ops.gaussian_nll(value, mean, **self._by_name(scale), batch_dims=dims)

    def entropy(self) -> Tensor:
        """Differential entropy ``[*batch]``, nats."""
        log_std = self.log_std if self._mean.dtype == torch.float64 else self.log_std.float()
        each = log_std + 0.5 * (1.0 + math.log(2.0 * math.pi))
        return each if self.event_dims == 0 else each.flatten(-self.event_dims).sum(-1)


def _one_period(tensor: Tensor) -> Tensor:
    """An expanded tensor as it was: what is computed of a view is not one."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor[once] if 0 in tensor.stride() else tensor


def _parts(distribution: Any) -> tuple[Tensor, bool, Tensor]:
    """Mean, and whether the scale is ln std and no log-variance, and the scale."""
    if isinstance(distribution, DiagonalGaussian):
        return distribution._mean, distribution._by_log_std, distribution._scale
    return distribution.loc, True, _one_period(distribution.scale).log()


def _kl(p: Any, q: Any, event_shape: torch.Size) -> Tensor:
    """KL between diagonal Gaussians of broadcast batches and dtypes, summed over the event."""
    (mean, by_log_std, scale), (prior_mean, prior_by_log_std, prior_scale) = _parts(p), _parts(q)
    first, second = p.batch_shape + p.event_shape, q.batch_shape + q.event_shape
    broadcast: Any = torch.broadcast_shapes
    shape = torch.Size(broadcast(first, second, event_shape))
    event_dims = len(event_shape)
    if shape[len(shape) - event_dims :] != event_shape:
        raise ValueError(
            f"KL-divergence between Gaussians of shapes {list(first)} and {list(second)} cannot be computed: the event "
            f"{list(event_shape)} would be repeated"
        )
    dtype = torch.promote_types(mean.dtype, prior_mean.dtype)
    # The prior is expanded by the operator, and only as a view.
    mean, scale = mean.to(dtype).expand(shape), scale.to(dtype).expand(shape)
    prior_mean, prior_scale = _one_period(prior_mean).to(dtype), _one_period(prior_scale).to(dtype)
    options: Any = {
        "log_std" if by_log_std else "logvar": scale,
        "prior_log_std" if prior_by_log_std else "prior_logvar": prior_scale,
    }
    return ops.gaussian_kl(mean, prior_mean=prior_mean, **options, batch_dims=len(shape) - event_dims)


def _base(independent: Any, gaussian: DiagonalGaussian) -> Any:
    """The base of an `Independent`, if it is a Normal with the Gaussian's event shape."""
    base = independent.base_dist
    if not isinstance(base, Normal) or independent.reinterpreted_batch_ndims != gaussian.event_dims:
        raise NotImplementedError(
            f"the KL divergence between {gaussian} and {independent} is none of Gaussians of one event shape"
        )
    _check_event(independent, gaussian)
    return base


def _check_event(p: Any, q: Any) -> None:
    if p.event_shape != q.event_shape:
        raise ValueError(
            "KL-divergence between Gaussians of different event shapes cannot be computed: "
            f"{list(p.event_shape)} and {list(q.event_shape)}"
        )


def _same_event(p: Any, q: Any) -> Tensor:
    _check_event(p, q)
    return _kl(p, q, p.event_shape)


for _p, _q, _rule in (
    (DiagonalGaussian, DiagonalGaussian, _same_event),
    (DiagonalGaussian, Normal, lambda p, q: _kl(p, q, p.event_shape)),
    (Normal, DiagonalGaussian, lambda p, q: _kl(p, q, q.event_shape)),
    (DiagonalGaussian, Independent, lambda p, q: _kl(p, _base(q, p), p.event_shape)),
    (Independent, DiagonalGaussian, lambda p, q: _kl(_base(p, q), q, q.event_shape)),
):
    register_kl(_p, _q)(_rule)  # type: ignore[no-untyped-call]


# ---- base distributions of flows -------------------------------------------------------------------------------------

_LOG_2PI = math.log(2.0 * math.pi)


def _event_shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if hasattr(shape, "__index__") else shape
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(f"{name}: shape must be an int or a sequence of ints, got {type(shape).__name__}")
    for size in sizes:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{name}: shape must hold ints, got {type(size).__name__}")
        if size.__index__() < 1:
            raise ValueError(f"{name}: shape must be at least 1, got {size}")
    return tuple(int(size) for size in sizes)


class BaseDistribution(torch.nn.Module):
    """Base of the distributions that flows start from; not a distribution itself.

    Attributes:
        event_shape: of one sample.
    """

    like: Tensor

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = _event_shape(type(self).__name__, shape)
        # It knows the device and the dtype, whatever else the distribution has.
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.event_shape))

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
        if x.dim() != 1 + len(self.event_shape) or x.shape[1:] != self.event_shape:
            want = ", ".join(map(str, ("B", *self.event_shape)))
            raise ValueError(f"{name}: x must be [{want}], got {list(x.shape)}")

    def _check_temperature(self, temperature: float) -> None:
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"{type(self).__name__}: temperature must be a number, got {type(temperature).__name__}")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"{type(self).__name__}: temperature must be finite and not negative, got {temperature}")

    def _normal(self, n: int, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Normals of standard deviation `temperature`, at least float32, drawn as `genfuse.ops` draws them."""
        self._check_temperature(temperature)
        zero = _wide(self.like).expand(n, *self.event_shape)
        noise = ops.gaussian_rsample(zero, zero, generator=generator)
        return noise if temperature == 1.0 else noise * temperature

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x ``[B, *event_shape]``: ``[B]``, float32 or wider.

        Raises:
            TypeError: x is no Tensor.
            ValueError: x has another shape.
        """
        raise NotImplementedError

    def rsample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Reparametrised samples.

        Args:
            n: how many.
            temperature: standard deviations are multiplied by it.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[n, *event_shape]``.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """`rsample` without a gradient."""
        return self.rsample(n, temperature=temperature, generator=generator)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class StandardNormal(BaseDistribution):
    """Independent N(0, 1).

    Args:
        shape: of one sample.

    Example:
        >>> base = StandardNormal(2)
        >>> base.log_prob(torch.zeros(1, 2)), base.sample(3).shape
        (tensor([-1.8379]), torch.Size([3, 2]))
    """

    def log_prob(self, x: Tensor) -> Tensor:
        self._check(x)
        x = _wide(x).flatten(1)
        return -0.5 * (x.square().sum(1) + x.size(1) * _LOG_2PI)

    def rsample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        return self._normal(n, temperature, generator)


class DiagonalNormal(BaseDistribution):
    """Independent normals with learnt means and standard deviations, which start at 0 and 1.

    Args:
        shape: of one sample.

    Example:
        >>> base = DiagonalNormal(2)
        >>> base.log_prob(torch.zeros(1, 2)).shape, base.sample(3).shape
        (torch.Size([1]), torch.Size([3, 2]))
    """

    def __init__(self, shape: int | Sequence[int]) -> None:
        super().__init__(shape)
        self.mean = torch.nn.Parameter(torch.zeros(self.event_shape))
        self.log_std = torch.nn.Parameter(torch.zeros(self.event_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        self._check(x)
        dtype = torch.promote_types(x.dtype, self.mean.dtype)
        mean, log_std = self.mean.to(dtype).expand_as(x), self.log_std.to(dtype).expand_as(x)
        return -ops.gaussian_nll(x.to(dtype), mean, log_std=log_std, batch_dims=1)

    def rsample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        return _wide(self.mean) + _wide(self.log_std).exp() * self._normal(n, temperature, generator)


class GaussianMixture(BaseDistribution):
    """A mixture of normals with independent components, all learnt.

    `rsample` draws the component and differentiates through that component's normal, which is no estimate of the
    weights' gradient: where they want one it refuses.

    Args:
        features: D of one sample.
        components: K. Means start spread like N(0, 1), standard deviations at 1, weights equal.

    Raises:
        RuntimeError: from `rsample`, where the weights require a gradient (``logits.requires_grad_(False)`` fixes
            them).

    Example:
        >>> base = GaussianMixture(2, 5)
        >>> base.log_prob(torch.zeros(1, 2)).shape, base.sample(3).shape
        (torch.Size([1]), torch.Size([3, 2]))
    """

    def __init__(self, features: int, components: int) -> None:
        super().__init__(features)
        if isinstance(components, bool) or not hasattr(components, "__index__"):
            raise TypeError(f"GaussianMixture: components must be an int, got {type(components).__name__}")
        if components.__index__() < 1:
            raise ValueError(f"GaussianMixture: components must be at least 1, got {components}")
        self.components = int(components)
        self.logits = torch.nn.Parameter(torch.zeros(self.components))
        self.mean = torch.nn.Parameter(torch.randn(self.components, *self.event_shape))
        self.log_std = torch.nn.Parameter(torch.zeros(self.components, *self.event_shape))

    def log_prob(self, x: Tensor) -> Tensor:
        self._check(x)
        mean, log_std = _wide(self.mean), _wide(self.log_std)
        whitened = (_wide(x).unsqueeze(1) - mean) * torch.exp(-log_std)
        each = -0.5 * (whitened.square().sum(2) + x.size(1) * _LOG_2PI) - log_std.sum(1)
        return torch.logsumexp(each + _wide(self.logits).log_softmax(0), 1)

    def rsample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        if torch.is_grad_enabled() and self.logits.requires_grad:
            raise RuntimeError(
                "GaussianMixture: samples have no gradient by the weights; use sample, or logits.requires_grad_(False)"
            )
        weights = _wide(self.logits.detach()).softmax(0)
        if n == 0:
            return self._normal(0, temperature, generator)
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        mean, std = _wide(self.mean).index_select(0, which), _wide(self.log_std).index_select(0, which).exp()
        return mean + std * self._normal(n, temperature, generator)


class UniformBox(BaseDistribution):
    """Uniform between two corners; the density outside is 0.

    Args:
        low: the lower corner, of the event's shape; or a number, with the shape from high.
        high: the upper corner, likewise.

    Raises:
        ValueError: both are numbers, or low is not below high everywhere; from `rsample`, a temperature other than 1.

    Example:
        >>> base = UniformBox(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 1.0]))
        >>> base.log_prob(torch.tensor([[0.5, 0.5], [2.0, 0.5]])), base.sample(3).shape
        (tensor([-0.6931,    -inf]), torch.Size([3, 2]))
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        broadcast: Any = torch.broadcast_tensors
        lows, highs = broadcast(torch.as_tensor(low).float(), torch.as_tensor(high).float())
        if lows.dim() == 0:
            raise ValueError("UniformBox: one of low and high must have the shape of a sample, got two numbers")
        if not bool((lows < highs).all()):
            raise ValueError("UniformBox: low must be below high everywhere")
        super().__init__(tuple(lows.shape))
        self.register_buffer("low", lows.clone())
        self.register_buffer("high", highs.clone())

    def log_prob(self, x: Tensor) -> Tensor:
        self._check(x)
        inside = ((x >= self.low) & (x <= self.high)).flatten(1).all(1)
        volume = _wide(self.high - self.low).log().sum()
        found = torch.where(inside, -volume, -math.inf)
        return torch.where(x.isnan().flatten(1).any(1), math.nan, found)

    def rsample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        if temperature != 1.0:
            raise ValueError(f"UniformBox: temperature must be 1, got {temperature}")
        low, high = _wide(self.low), _wide(self.high)
        u = torch.rand((n, *self.event_shape), dtype=low.dtype, device=low.device, generator=generator)
        return low + (high - low) * u
