"""The ladder variational autoencoder: several layers of Gaussian latents, each with the one above it as its prior."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops

from .image import ImageModel, Likelihood, Pixels, at_least_float32, mix, standard_normal

__all__ = ["HierarchicalVAE"]

Gaussian = tuple[Tensor, Tensor]  # mean and log-variance


class HierarchicalVAE(ImageModel):
    """p(x | z_1) p(z_1 | z_2) ... p(z_L), inferred from above with what comes up from the image.

    Sonderby et al. 2016 (arXiv 1602.02282), section 2.1: a deterministic pass upwards gives each layer a Gaussian, a
    pass downwards samples from the product of that and the layer's prior (eq. 17 to 19). So each layer's posterior is
    its prior, corrected by what the image says. Networks are the paper's, two dense layers each, but with layer
    normalisation instead of batch normalisation, so that an image's bound does not depend on the rest of its batch.

    Args:
        input_shape: (channels, height, width).
        latent_dims: of z_1, which the image is decoded from, to z_L; at least two layers.
        hidden_dim: width of the dense layers.
        likelihood: of a pixel given z_1, as for `VAE`.
        beta: weight of the KL in the loss. It may be assigned to: the paper raises it from 0 to 1 in the first half of
            the training, and without that all layers may stay unused.
        free_bits: nats; in the loss each latent element's KL counts as at least this much. A little, say 0.05, keeps
            the upper layers in use.
        levels: values a pixel can have, for ``"discretized_gaussian"``.

    `genfuse.reference.HierarchicalVAE` is the same model in plain PyTorch, with the same ``state_dict`` and, from the
    same seed, the same noise.

    Raises:
        TypeError: a size is no int, or a weight no number.
        ValueError: a size below 1, fewer than two layers, a weight negative or not finite, an unknown likelihood.

    Example:
        >>> model = HierarchicalVAE(hidden_dim=32)
        >>> x = torch.rand(16, 1, 28, 28).bernoulli()
        >>> model.loss(x).backward()
        >>> nll, kl = model.elbo_terms(x)
        >>> nll.shape, kl.shape
        (torch.Size([16]), torch.Size([16, 3]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        latent_dims: Sequence[int] = (32, 16, 8),
        hidden_dim: int = 256,
        *,
        likelihood: Likelihood = "bernoulli",
        beta: float = 1.0,
        free_bits: float = 0.0,
        levels: int = 256,
    ) -> None:
        super().__init__(input_shape, likelihood, levels)
        self.latent_dims = self._check_sizes("latent_dims", latent_dims, 2)
        self._check_size("hidden_dim", hidden_dim)
        self._check_weight("beta", beta)
        self._check_weight("free_bits", free_bits)
        self.beta, self.free_bits = float(beta), float(free_bits)
        self.config = {
            "input_shape": list(self.input_shape),
            "latent_dims": list(self.latent_dims),
            "hidden_dim": int(hidden_dim),
            "likelihood": likelihood,
            "beta": self.beta,
            "free_bits": self.free_bits,
            "levels": self.levels,
        }
        dims, layers = self.latent_dims, len(self.latent_dims)
        # Lists are in the order of layers, the lowest first.
        self.up = torch.nn.ModuleList(
            mlp(math.prod(self.input_shape) if layer == 0 else hidden_dim, hidden_dim) for layer in range(layers)
        )
        self.messages = torch.nn.ModuleList(torch.nn.Linear(hidden_dim, 2 * dim) for dim in dims)
        self.priors = torch.nn.ModuleList(
            torch.nn.Sequential(mlp(above, hidden_dim), torch.nn.Linear(hidden_dim, 2 * dim))
            for dim, above in itertools.pairwise(dims)
        )
        shape = (self.outputs, *self.input_shape[1:])
        self.decoder = torch.nn.Sequential(
            mlp(dims[0], hidden_dim), torch.nn.Linear(hidden_dim, math.prod(shape)), torch.nn.Unflatten(1, shape)
        )

    @property
    def _weight(self) -> Tensor:
        """Any weight: it has the model's dtype and device."""
        weight = self.messages[0].weight
        assert isinstance(weight, Tensor)
        return weight

    # ---- the networks ------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> list[Gaussian]:
        """What the image says of each layer, before the layer's prior is heard.

        Args:
            x: ``[B, *input_shape]`` in [0, 1]; floating, or bool.

        Returns:
            ``(mean [B, d], logvar [B, d])`` of each layer, the lowest first.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x has another shape.
        """
        hidden, found = self._images(x).flatten(1), []
        for up, message in zip(self.up, self.messages, strict=True):
            hidden = up(hidden)
            mean, logvar = message(hidden).chunk(2, -1)
            found.append((mean, logvar))
        return found

    def decode(self, z: Tensor) -> Pixels:
        """Parameters of p(x | z_1), as `VAE.decode` gives them.

        Args:
            z: ``[B, latent_dims[0]]``, latents of the lowest layer.

        Raises:
            ValueError: z has another shape.
        """
        if z.dim() != 2 or z.size(1) != self.latent_dims[0]:
            raise ValueError(f"HierarchicalVAE: z must be [B, {self.latent_dims[0]}], got {list(z.shape)}")
        return self._pixels(self.decoder(z.to(self._weight.dtype)))

    def _prior(self, layer: int, above: Tensor) -> Gaussian:
        """p(z_layer | z_(layer + 1)), of latents of any number of leading dimensions."""
        mean, logvar = self.priors[layer](above.to(self._weight.dtype)).chunk(2, -1)
        return mean, logvar

    def forward(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Pixels, list[Tensor]]:
        """``(decode(z_1), [z_1, ..., z_L])`` of one sample each; the arguments are those of `elbo`."""
        encoded = self.encode(x)
        z, _ = self._descend(encoded, self._check_eps(eps, encoded), generator, 0.0)
        return self.decode(z[0]), z

    def _check_eps(self, eps: Sequence[Tensor] | None, encoded: Sequence[Gaussian]) -> Sequence[Tensor | None]:
        if eps is None:
            return [None] * len(encoded)
        if [one.shape for one in eps] != [mean.shape for mean, _ in encoded]:
            want, have = [list(mean.shape) for mean, _ in encoded], [list(one.shape) for one in eps]
            raise ValueError(f"HierarchicalVAE: eps must be Tensors of shapes {want}, the lowest first; got {have}")
        return eps

    def _descend(
        self,
        encoded: Sequence[Gaussian],
        eps: Sequence[Tensor | None],
        generator: torch.Generator | None,
        free_bits: float,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One sample of each layer and its KL, the lowest first."""
        above: Tensor | None = None
        latents, kls = [], []
        no_prior: Any = (None, None)  # N(0, 1)
        for layer in range(len(encoded) - 1, -1, -1):
            (mean, logvar), prior = encoded[layer], no_prior
            if above is not None:
                prior = self._prior(layer, above)
                mean, logvar = merge((mean, logvar), prior)
            above, kl = ops.gaussian_rsample_kl(
                mean, logvar, *prior, free_bits=free_bits, eps=eps[layer], generator=generator
            )
            latents.append(above)
            kls.append(kl)
        return latents[::-1], kls[::-1]

    # ---- objectives --------------------------------------------------------------------------------------------------

    def _terms(
        self, x: Tensor, free_bits: float, eps: Sequence[Tensor] | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        x = self._images(x)
        encoded = self.encode(x)
        latents, kls = self._descend(encoded, self._check_eps(eps, encoded), generator, free_bits)
        return self._pixel_nll(self.decode(latents[0]), x), torch.stack(kls, 1)

    def elbo_terms(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """``-log p(x | z_1)``, ``[B]``, and each layer's KL, ``[B, L]`` with the lowest first, in nats.

        The arguments are those of `elbo`, which is the negative sum. A layer whose KL is about 0 is not used.
        """
        return self._terms(x, 0.0, eps, generator)

    def elbo(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The evidence lower bound, estimated with one sample of the latents; without beta or free bits.

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            eps: standard normals of each layer, ``[B, d]``, the lowest first, instead of drawn ones.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[B]``, nats, float32 or wider.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x or eps has another shape.
        """
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator)
        return -(nll + kl.sum(1))

    def loss(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """What training minimises: the mean of reconstruction plus beta times all KLs, in nats per image.

        The arguments are those of `elbo`; so are the errors.
        """
        nll, kl = self._terms(x, self.free_bits, eps, generator)
        return (nll + self.beta * kl.sum(1)).mean()

    def _log_weights(
        self,
        x: Tensor,
        encoded: Any,
        count: int,
        eps: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        above: Tensor | None = None
        total: Any = 0.0
        for layer in range(len(encoded) - 1, -1, -1):
            message = [at_least_float32(part) for part in encoded[layer]]
            message = [part.expand(count, *part.shape) for part in message]
            if above is None:
                mean, logvar = message
                log_ratio = logvar
            else:
                prior_mean, prior_logvar = (at_least_float32(part) for part in self._prior(layer, above))
                mean, logvar = merge((message[0], message[1]), (prior_mean, prior_logvar))
                log_ratio = logvar - prior_logvar
            noise = standard_normal(mean.shape, mean, generator) if eps is None else eps[layer]
            z = ops.gaussian_rsample(mean, logvar, eps=noise)
            from_prior = z if above is None else (z - prior_mean) * torch.exp(-0.5 * prior_logvar)
            total = total + 0.5 * (noise.square() + log_ratio - from_prior.square()).sum(-1)
            above = z
        assert above is not None
        weights: Tensor = total - self._pixel_nll(self.decode(above.flatten(0, 1)), x, count)
        return weights

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, sample_pixels: bool = False) -> Tensor:
        """Images of the model's own: latents from the priors, from the top down, then decoded.

        Args:
            n: how many.
            generator: where the noise is drawn from; the device's default generator otherwise.
            sample_pixels: draw the pixels, too, instead of taking their means.

        Returns:
            ``[n, *input_shape]`` in [0, 1].
        """
        z = standard_normal((n, self.latent_dims[-1]), self._weight, generator)
        for layer in range(len(self.latent_dims) - 2, -1, -1):
            z = ops.gaussian_rsample(*self._prior(layer, z), generator=generator)
        return self._picture(self.decode(z), sample_pixels, generator)

    def _explain(self, encoded: Sequence[Gaussian]) -> Tensor:
        """The picture of the posterior's means, layer by layer."""
        z = encoded[-1][0]
        for layer in range(len(encoded) - 2, -1, -1):
            z, _ = merge(encoded[layer], self._prior(layer, z))
        return self._picture(self.decode(z))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels, decoded from the means of the posterior: ``[B, *input_shape]`` in [0, 1]."""
        return self._explain(self.encode(x))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """From one image to another, in equal steps of what they say of each layer.

        The priors have their say at each step, which keeps the lower layers in agreement with the upper ones.

        Args:
            x0, x1: ``[B, *input_shape]`` in [0, 1].
            steps: at least 2: the reconstructions of x0 and x1 are the first and the last.

        Returns:
            ``[B, steps, *input_shape]`` in [0, 1].

        Raises:
            TypeError: steps is no int, or an image no floating Tensor.
            ValueError: steps is below 2, or x0 or x1 has another shape.
        """
        x0, x1 = self._image_pair(x0, x1, steps)
        mixed = [
            (mix(mean0, mean1, steps), mix(logvar0, logvar1, steps))
            for (mean0, logvar0), (mean1, logvar1) in zip(self.encode(x0), self.encode(x1), strict=True)
        ]
        return self._explain(mixed).view(x0.size(0), steps, *self.input_shape)


def mlp(ins: int, units: int) -> torch.nn.Sequential:
    """Two dense layers with layer normalisation and the paper's leaky rectifiers."""
    layers: list[torch.nn.Module] = []
    for size in (ins, units):
        layers += [torch.nn.Linear(size, units), torch.nn.LayerNorm(units), torch.nn.LeakyReLU(0.1)]
    return torch.nn.Sequential(*layers)


def merge(message: Gaussian, prior: Gaussian) -> Gaussian:
    """The normalised product of two Gaussians: precisions add up, means are weighed by them (eq. 17 to 19).

    By the difference of the log-variances, so that no precision overflows.
    """
    (mean, logvar), (prior_mean, prior_logvar) = message, prior
    difference = prior_logvar - logvar
    share = torch.sigmoid(difference)  # the message's precision, of both together
    return prior_mean + share * (mean - prior_mean), prior_logvar - F.softplus(difference)
