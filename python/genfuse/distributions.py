"""Distributions of `torch.distributions`' kind over the fused operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence
from torch.distributions.kl import register_kl

from genfuse import ops

__all__ = ["DiagonalGaussian", "kl_divergence"]

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
