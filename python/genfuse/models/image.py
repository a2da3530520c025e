"""What the image models share: their arguments, the likelihood of pixels, and the importance-weighted likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops

__all__ = ["ImageModel", "Likelihood", "Pixels"]

Likelihood = Literal["bernoulli", "gaussian", "discretized_gaussian"]
Pixels = Tensor | tuple[Tensor, Tensor]  # of the likelihood: logits, or (mean, logvar)

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_gaussian")
# The lowest log-variance of a pixel in [-1, 1]. A density grows without bound on pixels that are always black: a
# standard deviation of about one of 256 levels ends that. A probability has PixelCNN++'s, ln std = -7.
LOWEST_LOGVAR = {"gaussian": -10.0, "discretized_gaussian": -14.0}


class ImageModel(torch.nn.Module):
    """Base of the image models; not a model itself.

    Attributes:
        config: the constructor's arguments, which JSON can hold: ``type(model)(**model.config)`` is the same model
            with fresh weights.
        input_shape: (channels, height, width) of an image.
        likelihood: of a pixel given the latents.
        levels: number of values a pixel can have, for ``"discretized_gaussian"``.
    """

    def __init__(self, input_shape: Sequence[int], likelihood: Likelihood, levels: int, smallest: int = 1) -> None:
        super().__init__()
        self.name = type(self).__name__
        if isinstance(input_shape, (str, bytes)) or not isinstance(input_shape, Sequence):
            raise TypeError(f"{self.name}: input_shape must be (channels, height, width), got {input_shape!r}")
        if len(input_shape) != 3:
            raise ValueError(f"{self.name}: input_shape must be (channels, height, width), got {list(input_shape)}")
        for size in input_shape:
            self._check_size("input_shape", size)
        if min(input_shape[1:]) < smallest:
            raise ValueError(
                f"{self.name}: input_shape must be at least {smallest} by {smallest} for two halving convolutions, "
                f"got {list(input_shape)}"
            )
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"{self.name}: likelihood must be one of {', '.join(LIKELIHOODS)}; got {likelihood!r}")
        self._check_size("levels", levels)
        if levels < 2:
            raise ValueError(f"{self.name}: levels must be at least 2, got {levels}")
        self.input_shape = tuple(int(size) for size in input_shape)
        self.likelihood, self.levels = likelihood, int(levels)
        self.config: dict[str, Any] = {}

    # ---- arguments ---------------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> int:
        """Channels that a decoder has to put out: an image's, twice if the likelihood has a variance."""
        return self.input_shape[0] * (1 if self.likelihood == "bernoulli" else 2)

    def _check_size(self, argument: str, size: object) -> None:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{self.name}: {argument} must be an int, got {type(size).__name__}")
        if size.__index__() < 1:
            raise ValueError(f"{self.name}: {argument} must be at least 1, got {size}")

    def _check_sizes(self, argument: str, sizes: object, least: int) -> tuple[int, ...]:
        if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
            raise TypeError(f"{self.name}: {argument} must be a sequence of ints, got {type(sizes).__name__}")
        if len(sizes) < least:
            raise ValueError(f"{self.name}: {argument} must hold at least {least}, got {list(sizes)}")
        for size in sizes:
            self._check_size(argument, size)
        return tuple(int(size) for size in sizes)

    def _check_weight(self, argument: str, weight: object) -> None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{self.name}: {argument} must be a number, got {type(weight).__name__}")
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{self.name}: {argument} must be finite and not negative, got {weight}")

    def _images(self, x: Tensor, argument: str = "x") -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: {argument} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1:] != self.input_shape:
            want = ", ".join(map(str, self.input_shape))
            raise ValueError(f"{self.name}: {argument} must be [B, {want}], got {list(x.shape)}")
        if x.dtype == torch.bool:  # bits
            return x.to(next(self.parameters()).dtype)
        if not x.is_floating_point():
            raise TypeError(f"{self.name}: {argument} must be floating, in [0, 1]; got {x.dtype}")
        return x

    def _image_pair(self, x0: Tensor, x1: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The arguments of `interpolate`, checked."""
        self._check_size("steps", steps)
        if steps < 2:
            raise ValueError(f"{self.name}: steps must be at least 2, one for each of the images; got {steps}")
        x0, x1 = self._images(x0, "x0"), self._images(x1, "x1")
        if x0.shape != x1.shape:
            raise ValueError(f"{self.name}: x0 and x1 must be as many images, got {list(x0.shape)}, {list(x1.shape)}")
        return x0, x1

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    # ---- the likelihood of pixels ------------------------------------------------------------------------------------

    def _pixels(self, outputs: Tensor) -> Pixels:
        """A decoder's output, ``[B, outputs, height, width]``, as parameters of the likelihood."""
        if self.likelihood == "bernoulli":
            return outputs
        mean, free = outputs.chunk(2, 1)
        lowest = LOWEST_LOGVAR[self.likelihood]
        return mean, lowest + F.softplus(free - lowest)

    def _pixel_nll(self, pixels: Pixels, x: Tensor, count: int | None = None) -> Tensor:
        """-log p(x | pixels), ``[B]``, nats; ``[count, B]`` if the pixels are of `count` samples of each image."""
        shape, dims = (x.shape, 1) if count is None else ((count, *x.shape), 2)
        if isinstance(pixels, Tensor):
            return ops.bernoulli_nll(pixels.view(shape), x, batch_dims=dims)
        mean, logvar = (part.view(shape) for part in pixels)
        x = 2.0 * x - 1.0
        if self.likelihood == "gaussian":
            return ops.gaussian_nll(x, mean, logvar, batch_dims=dims)
        return ops.discretized_gaussian_nll(x, mean, logvar, levels=self.levels, batch_dims=dims, unit="nats")

    def _picture(self, pixels: Pixels, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Means of pixels, or draws of them, in [0, 1]."""
        if isinstance(pixels, Tensor):
            means = torch.sigmoid(pixels)
            return torch.bernoulli(means, generator=generator) if sample else means
        mean, logvar = pixels
        values = ops.gaussian_rsample(mean, logvar, generator=generator) if sample else mean
        values = (0.5 * values + 0.5).clamp(0.0, 1.0)
        if sample and self.likelihood == "discretized_gaussian":
            values = torch.round(values * (self.levels - 1)) / (self.levels - 1)
        return values

    # ---- the likelihood of images ------------------------------------------------------------------------------------

    def _log_weights(
        self, x: Tensor, encoded: Any, count: int, eps: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """log p(x, z) - log q(z | x) of `count` samples z of each image, ``[count, B]``."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def nll(
        self,
        x: Tensor,
        num_samples: int = 5000,
        *,
        chunk_size: int = 4096,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-log p(x), estimated by importance sampling from the posterior.

        Burda, Grosse and Salakhutdinov 2015 (arXiv 1509.00519), eq. 8: an upper bound in expectation, which falls to
        the true value as `num_samples` grows. 5000 is the field's custom. No gradient.

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            num_samples: of the latents, for each image.
            chunk_size: how many images are decoded at once, which bounds the memory; the noise depends on it, too.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[B]``, nats, float32 or wider.

        Raises:
            TypeError: num_samples or chunk_size is no int, x no floating Tensor.
            ValueError: num_samples or chunk_size is below 1, or x has another shape.
        """
        x = self._images(x)
        self._check_size("num_samples", num_samples)
        self._check_size("chunk_size", chunk_size)
        rows = max(1, chunk_size // num_samples)
        at_once = max(1, min(num_samples, chunk_size // rows))
        found = []
        for part in torch.split(x, rows):
            encoded, total = self.encode(part), None
            for done in range(0, num_samples, at_once):
                count = min(at_once, num_samples - done)
                weights = self._log_weights(part, encoded, count, generator=generator).logsumexp(0)
                total = weights if total is None else torch.logaddexp(total, weights)
            assert total is not None
            found.append(math.log(num_samples) - total)
        return torch.cat(found)

    def log_prob(
        self,
        x: Tensor,
        num_samples: int = 5000,
        *,
        chunk_size: int = 4096,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """log p(x) in nats, ``[B]``: less `nll`, a lower bound in expectation."""
        return -self.nll(x, num_samples, chunk_size=chunk_size, generator=generator)


def standard_normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals of like's device, in its dtype but at least float32, drawn as `genfuse.ops` draws them."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=like.device).expand(tuple(shape))
    return ops.gaussian_rsample(zero, zero, generator=generator)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mix(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """From `first` to `second` in equal steps, both included: ``[B, *]`` to ``[B * steps, *]``, image by image."""
    share = torch.linspace(0.0, 1.0, steps, dtype=first.dtype, device=first.device)
    share = share.view(1, steps, *[1] * (first.dim() - 1))
    return torch.lerp(first.unsqueeze(1), second.unsqueeze(1), share).flatten(0, 1)
