"""Normalizing flows as whole models: exact densities and samples, of vectors and of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from genfuse import nn, ops
from genfuse.distributions import BaseDistribution, DiagonalNormal, StandardNormal

__all__ = ["IAF", "MAF", "FlowModel", "Glow", "NeuralSplineFlow", "RealNVP"]

Base = str | BaseDistribution


class FlowModel(torch.nn.Module):
    """A transform from data to noise, and the noise's distribution: the base of the flows here, or a flow of one's own.

    ``log p(x) = log p_base(z) + log |det dz/dx|`` with ``z = transform(x)`` (Rezende and Mohamed 2015, arXiv
    1505.05770, eq. 5). Everything takes a `context` if the model was built with `context_features`: ``[B, F]``, or
    ``[F]`` for all.

    Args:
        flow: the transform, from data to noise; most often a `genfuse.nn.Flow`.
        base: the distribution of z; its `event_shape` is z's.
        event_shape: of one x; by default the base's.
        context_features: F, if the transform takes a context.
        dequantize: for images of whole numbers, the `genfuse.nn.DequantizeLogit` that comes before `flow`.
        flatten: whether `flow` is of vectors, to which images are flattened in between.

    Attributes:
        config: of the models here, the constructor's arguments, which JSON can hold (but for a base that is an object):
            ``type(model)(**model.config)`` is the same model with fresh weights.

    Raises:
        TypeError: flow or base is no module of its kind.
        ValueError: from the methods: x of another shape, or a context missing, superfluous or of another shape.

    Example:
        >>> from genfuse import distributions
        >>> flow = nn.Flow([nn.AffineCoupling(4, hidden=(16,)), nn.LULinear(4)])
        >>> model = FlowModel(flow, distributions.GaussianMixture(4, 3))
        >>> model.log_prob(torch.randn(5, 4)).shape, model.sample(7).shape
        (torch.Size([5]), torch.Size([7, 4]))
    """

    def __init__(
        self,
        flow: nn.Transform,
        base: BaseDistribution,
        *,
        event_shape: Sequence[int] | None = None,
        context_features: int | None = None,
        dequantize: nn.DequantizeLogit | None = None,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        if not isinstance(flow, torch.nn.Module):
            raise TypeError(f"{self.name}: flow must be a Transform, got {type(flow).__name__}")
        if not isinstance(base, BaseDistribution):
            raise TypeError(f"{self.name}: base must be a BaseDistribution, got {type(base).__name__}")
        self.event_shape = base.event_shape if event_shape is None else tuple(int(size) for size in event_shape)
        self.context_features = context_features
        self.config: dict[str, Any] = {}
        self.dequantize, self.flatten = dequantize, flatten
        self.flow, self.base = flow, base

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _check(self, x: Tensor, shape: tuple[int, ...], argument: str = "x") -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: {argument} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 1 + len(shape) or x.shape[1:] != shape:
            want = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"{self.name}: {argument} must be [{want}], got {list(x.shape)}")

    def _context(self, context: Tensor | None, batch: int) -> Tensor | None:
        """The context of each of a batch."""
        features = self.context_features
        if context is None:
            if features is not None:
                raise ValueError(f"{self.name}: context must be [{batch}, {features}], got None")
            return None
        if features is None:
            raise ValueError(f"{self.name}: context was given, and the model was built without context_features")
        if not isinstance(context, Tensor):
            raise TypeError(f"{self.name}: context must be a Tensor, got {type(context).__name__}")
        if context.shape == (features,):
            return context.expand(batch, features)
        if context.shape != (batch, features):
            raise ValueError(f"{self.name}: context must be [{batch}, {features}], got {list(context.shape)}")
        return context

    def _count(self, n: object) -> int:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"{self.name}: n must be an int, got {type(n).__name__}")
        count = int(n.__index__())
        if count < 0:
            raise ValueError(f"{self.name}: n must be at least 0, got {count}")
        return count

    # ---- densities ---------------------------------------------------------------------------------------------------

    def transform(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From data to noise: ``(z, log_abs_det [B])``.

        Args:
            x: ``[B, *event_shape]``; where the model dequantises, whole numbers in [0, levels), uint8 or floating.
            context: ``[B, F]`` or ``[F]``.
            u: dequantisation noise in [0, 1), of x's shape, instead of drawn.
            generator: where that noise is drawn from; the device's default generator otherwise.
        """
        self._check(x, self.event_shape)
        context = self._context(context, x.size(0))
        if self.dequantize is None:
            return cast(tuple[Tensor, Tensor], self.flow(x, context))
        if not x.is_floating_point() and self.base.like.dtype == torch.float64:
            x = x.double()  # bytes become float32 otherwise
        y, before = self.dequantize(x, u=u, generator=generator)
        z, log_abs_det = self.flow(y.flatten(1) if self.flatten else y, context)
        return z, before + log_abs_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From noise to data: ``(x, log_abs_det [B])`` of this direction. Of images it is the level, a whole number."""
        self._check(z, self.base.event_shape, "z")
        y, log_abs_det = self.flow.inverse(z, self._context(context, z.size(0)))
        if self.dequantize is None:
            return y, log_abs_det
        x, after = self.dequantize.inverse(self._shaped(y))
        return x, log_abs_det + after

    def _shaped(self, y: Tensor) -> Tensor:
        """Of what the flow's inverse returns."""
        return y.reshape(y.size(0), *self.event_shape) if self.flatten else y

    def log_prob(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The logarithm of the density, ``[B]``, nats, float32 or wider.

        Where the model dequantises it is the density of x + u in units of a level, whose mean over u is at most the
        logarithm of the levels' probability. The arguments are those of `transform`.
        """
        z, log_abs_det = self.transform(x, context, u=u, generator=generator)
        return self.base.log_prob(z) + log_abs_det

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`log_prob`, for what calls modules (`torch.nn.parallel.DistributedDataParallel`)."""
        return self.log_prob(x, context)

    def loss(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What training minimises: the mean of the negative `log_prob`, nats."""
        return -self.log_prob(x, context, u=u, generator=generator).mean()

    def bits_per_dim(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The negative `log_prob` in bits for each number of x: ``[B]``."""
        nats = -self.log_prob(x, context, u=u, generator=generator)
        return nats / (math.prod(self.event_shape) * math.log(2.0))

    # ---- samples -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from the model.

        Args:
            n: how many.
            context: ``[n, F]``, or ``[F]`` for all.
            temperature: of the noise, whose standard deviation it multiplies (Glow's samples have 0.7).
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[n, *event_shape]``, float32 or wider; whole numbers where the model dequantises.

        Raises:
            TypeError: n is no int, or temperature no number.
            ValueError: n or temperature is negative, or the context has another shape.
        """
        z = self.base.sample(self._count(n), temperature=temperature, generator=generator)
        return self.inverse(z, context)[0]

    def rsample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples with gradients, and their log-densities in one pass, as variational inference needs them.

        The arguments are those of `sample`; the density is the model's, whatever the temperature. Where the model
        dequantises, samples are not rounded down: numbers between 0 and levels.

        Returns:
            ``(x [n, *event_shape], log_prob [n])``.
        """
        z = self.base.rsample(self._count(n), temperature=temperature, generator=generator)
        x, log_abs_det = self.flow.inverse(z, self._context(context, z.size(0)))
        if self.dequantize is not None:
            x, after = self.dequantize.continuous(self._shaped(x))
            log_abs_det = log_abs_det + after
        return x, self.base.log_prob(z) - log_abs_det


def _features(name: str, features: object) -> tuple[int, tuple[int, ...] | None]:
    """The number of features, and the shape of the images that they are the pixels of."""
    if isinstance(features, Sequence) and not isinstance(features, (str, bytes)):
        shape = tuple(_size(name, "features", size) for size in features)
        if len(shape) != 3:
            raise ValueError(f"{name}: features must be an int, or C, H and W of images; got {list(shape)}")
        return math.prod(shape), shape
    return _size(name, "features", features), None


def _pixels(shape: tuple[int, ...] | None, levels: int, alpha: float) -> dict[str, Any]:
    """What makes a flow of vectors one of images."""
    if shape is None:
        return {}
    return {"event_shape": shape, "dequantize": nn.DequantizeLogit(levels, alpha), "flatten": True}


def _base(name: str, base: Base, shape: int | Sequence[int]) -> BaseDistribution:
    if isinstance(base, BaseDistribution):
        want = (shape,) if isinstance(shape, int) else tuple(shape)
        if base.event_shape != want:
            raise ValueError(f"{name}: base must be of {list(want)}, got {list(base.event_shape)}")
        return base
    if base == "standard":
        return StandardNormal(shape)
    if base == "diagonal":
        return DiagonalNormal(shape)
    raise ValueError(f"{name}: base must be 'standard', 'diagonal' or a BaseDistribution, got {base!r}")


def _size(name: str, argument: str, size: object) -> int:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"{name}: {argument} must be an int, got {type(size).__name__}")
    if size.__index__() < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {size}")
    return int(size.__index__())


def _image_shape(name: str, shape: Sequence[int], scales: int) -> tuple[int, int, int]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"{name}: input_shape must be (channels, height, width), got {shape!r}")
    if len(shape) != 3:
        raise ValueError(f"{name}: input_shape must be (channels, height, width), got {list(shape)}")
    channels, height, width = (_size(name, "input_shape", size) for size in shape)
    if height % 2**scales or width % 2**scales:
        raise ValueError(f"{name}: height and width must be multiples of {2**scales}, got {height} and {width}")
    return channels, height, width


class RealNVP(FlowModel):
    """Affine couplings of alternating halves; of images, at several scales, on checkerboards and then on channels.

    Dinh, Sohl-Dickstein and Bengio 2017 (arXiv 1605.08803). For vectors, `transforms` couplings, each after an actnorm
    in the place of the paper's batch normalisation. For images (section 3.6 and figure 4) each scale but the last has
    three couplings on checkerboards, a squeeze, three couplings on channels, and factors out half of them; the last has
    four on checkerboards.

    Args:
        input_shape: the number of features of vectors, or (channels, height, width) of images.
        transforms: couplings; of vectors only.
        hidden: units of the couplings' dense networks; of vectors only.
        channels: of the couplings' convolutions; of images only.
        scales: of images only; height and width must be multiples of 2^(scales - 1).
        scale: how the couplings' scales are made, as for `genfuse.nn.AffineCoupling`.
        actnorm: one before each coupling.
        context_features: F of the context, if there is one.
        base: ``"standard"``, ``"diagonal"`` (learnt), or a `genfuse.distributions.BaseDistribution`; of images, of
            vectors of all numbers.
        dequantize: images are whole numbers in [0, levels), dequantised and put through a logit; otherwise real ones.
        levels, alpha: of the dequantisation.
        reversible: recompute activations in backward, as `genfuse.nn.Flow` does.

    `genfuse.reference.flow.models.RealNVP` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, fewer than 2 features, or a height or width that cannot be halved so often.

    Example:
        >>> model = RealNVP(2, hidden=(32,), transforms=4)
        >>> model.loss(torch.randn(16, 2)).backward()
        >>> images = RealNVP((1, 8, 8), channels=8)
        >>> x = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
        >>> images.bits_per_dim(x).shape, images.sample(3).shape
        (torch.Size([4]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        transforms: int = 8,
        hidden: Sequence[int] = (128, 128),
        channels: int = 64,
        scales: int = 2,
        scale: str = "tanh",
        actnorm: bool = True,
        context_features: int | None = None,
        base: Base = "standard",
        dequantize: bool = True,
        levels: int = 256,
        alpha: float = 0.05,
        reversible: bool = False,
    ) -> None:
        more: Any = {"scale": scale, "context_features": context_features}
        first: nn.DequantizeLogit | None = None
        flow: nn.Transform
        event: tuple[int, ...]
        if isinstance(input_shape, Sequence):
            scales = _size("RealNVP", "scales", scales)
            event = _image_shape("RealNVP", input_shape, scales - 1)
            channels = _size("RealNVP", "channels", channels)
            first = nn.DequantizeLogit(levels, alpha) if dequantize else None
            flow = _real_nvp_of_images(event, channels, scales, actnorm, context_features, more, reversible)
        else:
            event = (_size("RealNVP", "input_shape", input_shape),)
            steps: list[nn.Transform] = []
            for index in range(_size("RealNVP", "transforms", transforms)):
                steps += [nn.ActNorm(event[0])] if actnorm else []
                steps.append(nn.AffineCoupling(event[0], hidden=hidden, split=_half(index), **more))
            flow = nn.Flow(steps, reversible=reversible)
        super().__init__(
            flow,
            _base("RealNVP", base, (math.prod(event),)),
            event_shape=event,
            context_features=context_features,
            dequantize=first,
        )
        self.config = {
            "input_shape": list(event) if first is not None or len(event) > 1 else event[0],
            "transforms": int(transforms),
            "hidden": list(hidden),
            "channels": int(channels),
            "scales": int(scales),
            "scale": scale,
            "actnorm": bool(actnorm),
            "context_features": context_features,
            "base": base,
            "dequantize": bool(dequantize),
            "levels": int(levels),
            "alpha": float(alpha),
            "reversible": bool(reversible),
        }


def _half(index: int) -> str:
    return "first" if index % 2 else "second"


def _real_nvp_of_images(
    shape: tuple[int, ...],
    hidden: int,
    scales: int,
    actnorm: bool,
    context_features: int | None,
    more: Any,
    reversible: bool,
) -> nn.MultiScale:
    channels, height, width = shape
    levels: list[nn.Transform] = []
    splits: list[nn.Split] = []

    def net(ins: int, outs: int) -> nn.ConvNet:
        return nn.ConvNet(ins, outs, hidden, context_features=context_features)

    for scale in range(scales):
        last = scale == scales - 1
        steps: list[nn.Transform] = []
        for index in range(4 if last else 3):
            steps += [nn.ActNorm(channels)] if actnorm else []
            mask = nn.checkerboard_mask(height, width, invert=index % 2 == 1)
            steps.append(nn.AffineCoupling(channels, net, split=mask, **more))
        if not last:
            steps.append(nn.Squeeze())
            channels, height, width = 4 * channels, height // 2, width // 2
            for index in range(3):
                steps += [nn.ActNorm(channels)] if actnorm else []
                steps.append(nn.AffineCoupling(channels, net, split=_half(index), **more))
            splits.append(nn.Split(channels, prior="standard"))
            channels = splits[-1].kept
        levels.append(nn.Flow(steps, reversible=reversible))
    return nn.MultiScale(levels, splits, shape)


class TopPrior(nn.Transform):
    """The learnt prior of what is left at Glow's top, as the transform that whitens it: ``(x - mean) / std`` of each
    channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(channels))
        self.log_std = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(x, self.log_std, self.mean, inverse=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(z, self.log_std, self.mean)


class Glow(FlowModel):
    """Levels of a squeeze and steps of actnorm, invertible 1x1 convolution and coupling; half goes out at each level.

    Kingma and Dhariwal 2018 (arXiv 1807.03039), figure 2. What is factored out has a Gaussian with parameters from what
    goes on, and what is left at the top a Gaussian with learnt mean and standard deviation of each channel: both as
    whitening transforms, so that z ``[B, D]`` is standard normal.

    Args:
        input_shape: (channels, height, width); height and width must be multiples of 2^levels.
        levels: L of the paper.
        steps: K of the paper, of each level.
        channels: of the couplings' convolutions (the paper's have 512).
        additive: additive couplings instead of affine ones.
        lu: the convolutions by their triangular factors.
        learn_top: learn the top's Gaussian.
        context_features: F of the context, if there is one.
        base: as for `RealNVP`.
        dequantize, alpha, reversible: as for `RealNVP`.
        pixel_levels: number of values a pixel can have.

    `genfuse.reference.flow.models.Glow` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, or a height or width that cannot be halved so often.

    Example:
        >>> model = Glow((1, 8, 8), levels=2, steps=2, channels=8)
        >>> x = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
        >>> model.loss(x).backward()
        >>> model.bits_per_dim(x).shape, model.sample(3, temperature=0.7).shape
        (torch.Size([4]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        levels: int = 3,
        steps: int = 16,
        channels: int = 128,
        additive: bool = False,
        lu: bool = True,
        learn_top: bool = True,
        context_features: int | None = None,
        base: Base = "standard",
        dequantize: bool = True,
        pixel_levels: int = 256,
        alpha: float = 0.05,
        reversible: bool = False,
    ) -> None:
        levels, steps = _size("Glow", "levels", levels), _size("Glow", "steps", steps)
        hidden = _size("Glow", "channels", channels)
        event = _image_shape("Glow", input_shape, levels)

        def net(ins: int, outs: int) -> nn.ConvNet:
            return nn.ConvNet(ins, outs, hidden, context_features=context_features)

        size = event[0]
        chains: list[nn.Transform] = []
        splits: list[nn.Split] = []
        for level in range(levels):
            size *= 4
            chain: list[nn.Transform] = [nn.Squeeze()]
            for _ in range(steps):
                chain.append(nn.GlowStep(size, net, lu=lu, additive=additive, context_features=context_features))
            if level < levels - 1:
                splits.append(nn.Split(size))
                size = splits[-1].kept
            elif learn_top:
                chain.append(TopPrior(size))
            chains.append(nn.Flow(chain, reversible=reversible))
        super().__init__(
            nn.MultiScale(chains, splits, event),
            _base("Glow", base, (math.prod(event),)),
            event_shape=event,
            context_features=context_features,
            dequantize=nn.DequantizeLogit(pixel_levels, alpha) if dequantize else None,
        )
        self.config = {
            "input_shape": list(event),
            "levels": levels,
            "steps": steps,
            "channels": hidden,
            "additive": bool(additive),
            "lu": bool(lu),
            "learn_top": bool(learn_top),
            "context_features": context_features,
            "base": base,
            "dequantize": bool(dequantize),
            "pixel_levels": int(pixel_levels),
            "alpha": float(alpha),
            "reversible": bool(reversible),
        }


class NeuralSplineFlow(FlowModel):
    """Monotone rational-quadratic splines, in couplings or autoregressively.

    Durkan et al. 2019 (arXiv 1906.04032): RQ-NSF (C) and RQ-NSF (AR). Couplings transform alternating halves;
    autoregressive layers see the features in alternating order. Data should be of about unit scale: outside of
    [-tail_bound, tail_bound] a spline is the identity.

    Args:
        features: D of x ``[B, D]``; or C, H and W of images ``[B, C, H, W]`` of whole numbers in [0, levels), which are
            dequantised, taken through a logit and flattened first.
        transforms: splines.
        hidden: units of the networks' layers.
        num_bins, tail_bound, normalizer: of the splines, as for `genfuse.nn.SplineCoupling`.
        coupling: couplings; otherwise autoregressive.
        linear: before each spline: ``"lu"``, the paper's, an invertible matrix; ``"permutation"``, a random one; None,
            nothing.
        residual: couplings by `genfuse.nn.ResidualNet`, the paper's, of ``hidden[0]`` units and as many blocks as
            `hidden` has layers; otherwise by `genfuse.nn.MLP`.
        context_features: F of the context, if there is one.
        base: ``"standard"``, ``"diagonal"`` (learnt), or a `genfuse.distributions.BaseDistribution`.
        reversible: as for `RealNVP`.
        levels, alpha: of images, as for `genfuse.nn.DequantizeLogit`.

    `genfuse.reference.flow.models.NeuralSplineFlow` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, couplings of 1 feature, residual without coupling, or an unknown linear.

    Example:
        >>> model = NeuralSplineFlow(3, hidden=(32, 32), transforms=2)
        >>> model.loss(torch.randn(16, 3)).backward()
        >>> model.log_prob(torch.randn(5, 3)).shape, model.sample(7).shape
        (torch.Size([5]), torch.Size([7, 3]))
    """

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (128, 128),
        num_bins: int = 8,
        tail_bound: float = 3.0,
        normalizer: str = "softmax",
        coupling: bool = True,
        linear: str | None = None,
        residual: bool = False,
        context_features: int | None = None,
        base: Base = "standard",
        reversible: bool = False,
        levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        name = "NeuralSplineFlow"
        features, shape = _features(name, features)
        transforms = _size(name, "transforms", transforms)
        if linear not in ("lu", "permutation", None):
            raise ValueError(f"{name}: linear must be 'lu', 'permutation' or None, got {linear!r}")
        if residual and not coupling:
            raise ValueError(f"{name}: residual networks are for couplings")
        more: Any = {
            "num_bins": num_bins,
            "tail_bound": tail_bound,
            "normalizer": normalizer,
            "context_features": context_features,
        }

        def net(ins: int, outs: int) -> nn.ResidualNet:
            return nn.ResidualNet(ins, outs, hidden[0], blocks=len(hidden), context_features=context_features)

        steps: list[nn.Transform] = []
        for index in range(transforms):
            if linear == "lu":
                steps.append(nn.LULinear(features))
            elif linear == "permutation":
                steps.append(nn.Permutation(features, "random"))
            if coupling:
                chosen = net if residual else None
                steps.append(nn.SplineCoupling(features, chosen, hidden=hidden, split=_half(index), **more))
            else:
                steps.append(nn.MaskedSplineAutoregressive(features, hidden=hidden, **more))
                if linear is None and index < transforms - 1:
                    steps.append(nn.Permutation(features, "reverse"))
        super().__init__(
            nn.Flow(steps, reversible=reversible),
            _base(name, base, features),
            context_features=context_features,
            **_pixels(shape, levels, alpha),
        )
        self.config = {
            "features": features if shape is None else list(shape),
            "transforms": transforms,
            "hidden": list(hidden),
            "num_bins": int(num_bins),
            "tail_bound": float(tail_bound),
            "normalizer": normalizer,
            "coupling": bool(coupling),
            "linear": linear,
            "residual": bool(residual),
            "context_features": context_features,
            "base": base,
            "reversible": bool(reversible),
        }
        if shape is not None:
            self.config |= {"levels": int(levels), "alpha": float(alpha)}


class _AffineAutoregressive(FlowModel):
    normalised: bool  # whether there are actnorms by default

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        scale: str = "sigmoid",
        actnorm: bool | None = None,
        context_features: int | None = None,
        base: Base = "standard",
        reversible: bool = False,
        levels: int = 256,
        alpha: float = 0.05,
    ) -> None:
        name = type(self).__name__
        features, shape = _features(name, features)
        transforms = _size(name, "transforms", transforms)
        actnorm = self.normalised if actnorm is None else bool(actnorm)
        steps: list[nn.Transform] = []
        for index in range(transforms):
            if actnorm:
                steps.append(nn.ActNorm(features))
            layer = nn.MaskedAffineAutoregressive(
                features, hidden, context_features=context_features, activation=activation, scale=scale
            )
            steps.append(self._directed(layer))
            if index < transforms - 1:
                steps.append(nn.Permutation(features, "reverse"))
        super().__init__(
            nn.Flow(steps, reversible=reversible),
            _base(name, base, features),
            context_features=context_features,
            **_pixels(shape, levels, alpha),
        )
        self.config = {
            "features": features if shape is None else list(shape),
            "transforms": transforms,
            "hidden": list(hidden),
            "activation": activation,
            "scale": scale,
            "actnorm": actnorm,
            "context_features": context_features,
            "base": base,
            "reversible": bool(reversible),
        }
        if shape is not None:
            self.config |= {"levels": int(levels), "alpha": float(alpha)}

    @staticmethod
    def _directed(layer: nn.MaskedAffineAutoregressive) -> nn.Transform:
        raise NotImplementedError


class MAF(_AffineAutoregressive):
    """The masked autoregressive flow: affine layers in alternating orders, whose density takes one pass each.

    Papamakarios, Pavlakou and Murray 2017 (arXiv 1705.07057), section 3. Sampling finds the features one after the
    other, in one operator for each layer.

    Args:
        features: D of x ``[B, D]``; or C, H and W of images ``[B, C, H, W]`` of whole numbers in [0, levels), which are
            dequantised, taken through a logit and flattened first.
        transforms: layers.
        hidden: units of each layer's `genfuse.nn.MADE`.
        activation, scale: as for `genfuse.nn.MaskedAffineAutoregressive`.
        actnorm: one before each layer, in the place of the paper's batch normalisation; by default there is one.
        context_features: F of the context, if there is one.
        base: ``"standard"``, ``"diagonal"`` (learnt), or a `genfuse.distributions.BaseDistribution` (a
            `GaussianMixture` makes it the paper's MAF MoG, nearly).
        reversible: as for `RealNVP`.
        levels, alpha: of images, as for `genfuse.nn.DequantizeLogit`.

    `genfuse.reference.flow.models.MAF` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int.
        ValueError: a size below 1, an unknown activation or scale.

    Example:
        >>> model = MAF(3, hidden=(32,), transforms=2)
        >>> model.loss(torch.randn(16, 3)).backward()
        >>> model.log_prob(torch.randn(5, 3)).shape, model.sample(7).shape
        (torch.Size([5]), torch.Size([7, 3]))
    """

    normalised = True

    @staticmethod
    def _directed(layer: nn.MaskedAffineAutoregressive) -> nn.Transform:
        return layer


class IAF(_AffineAutoregressive):
    """The inverse autoregressive flow: `MAF` with its directions exchanged, whose samples take one pass each.

    Kingma et al. 2016 (arXiv 1606.04934). `rsample_and_log_prob` is the fast way round, as a variational posterior
    needs it; the density of given points finds the features one after the other, in one operator for each layer. The
    arguments are those of `MAF`, but there are no actnorms by default: trained by its samples it would meet its first
    batch of data, which sets them, when it has learnt already. `genfuse.reference.flow.models.IAF` is its twin.

    Example:
        >>> model = IAF(3, hidden=(32,), transforms=2)
        >>> x, log_prob = model.rsample_and_log_prob(16)
        >>> bool((model.log_prob(x) - log_prob).abs().max() < 1e-3)
        True
    """

    normalised = False

    @staticmethod
    def _directed(layer: nn.MaskedAffineAutoregressive) -> nn.Transform:
        return nn.Inverse(layer)
