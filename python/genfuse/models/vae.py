"""The variational autoencoder: one Gaussian latent vector an image, with dense or convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from genfuse import ops

from .image import ImageModel, Likelihood, Pixels, at_least_float32, mix, standard_normal

__all__ = ["VAE"]

CHANNELS = (32, 64)  # of the two convolutions
SMALLEST = 4  # pixels that two halving convolutions leave one of


class VAE(ImageModel):
    """q(z | x) and p(x | z) by two networks, trained together on a bound of log p(x).

    Kingma and Welling 2013 (arXiv 1312.6114). With the default arguments it is the 784-400-20 model that everybody
    begins with (pytorch/examples), except that it decodes to logits: its ``fc1`` is ``encoder.1``, ``fc21`` and
    ``fc22`` are the two halves of the rows of ``posterior``, ``fc3`` is ``decoder.0`` and ``fc4`` is ``decoder.2``.

    The training objective is ``"elbo"``, the reconstruction's negative log-likelihood plus beta times the KL divergence
    (beta-VAE: Higgins et al. 2017), averaged over `num_samples` samples, or ``"iwae"``, the tighter bound of Burda,
    Grosse and Salakhutdinov 2015 (arXiv 1509.00519, eq. 8), for which `num_samples` should be above 1.

    Args:
        input_shape: (channels, height, width).
        latent_dim: of z.
        hidden_dims: widths of the encoder's dense layers; the decoder's are the same in reverse.
        architecture: ``"mlp"``, dense layers alone, or ``"conv"``, with two halving 4x4 convolutions of 32 and 64
            channels before them and two doubling ones after them; height and width must then be at least 4.
        likelihood: of a pixel given z. ``"bernoulli"``: x is a probability or a bit, and the decoder puts out a logit.
            The others see pixels as 2 x - 1, in [-1, 1], and the decoder puts out a mean and a log-variance:
            ``"gaussian"``, a density, with log-variances of at least -10; ``"discretized_gaussian"``, the probability
            of one of `levels` values, with log-variances of at least -14.
        beta: weight of the KL in the loss. It may be assigned to (warm-up).
        objective: ``"elbo"`` or ``"iwae"``, which has neither beta nor free bits.
        num_samples: of z for each image, in `loss` and `elbo`.
        free_bits: nats; in the loss each latent dimension's KL counts as at least this much.
        levels: values a pixel can have, for ``"discretized_gaussian"``.

    `genfuse.reference.VAE` is the same model in plain PyTorch, with the same ``state_dict`` and, from the same seed,
    the same noise.

    Raises:
        TypeError: a size is no int, or a weight no number.
        ValueError: a size below 1, a weight negative or not finite, an unknown architecture, likelihood or objective,
            or beta or free bits with ``"iwae"``.

    Example:
        >>> model = VAE()
        >>> x = torch.rand(16, 1, 28, 28).bernoulli()
        >>> model.loss(x).backward()
        >>> model.sample(4).shape, model.elbo(x).shape, model.nll(x[:2], num_samples=10).shape
        (torch.Size([4, 1, 28, 28]), torch.Size([16]), torch.Size([2]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 20,
        hidden_dims: Sequence[int] = (400,),
        *,
        architecture: Literal["mlp", "conv"] = "mlp",
        likelihood: Likelihood = "bernoulli",
        beta: float = 1.0,
        objective: Literal["elbo", "iwae"] = "elbo",
        num_samples: int = 1,
        free_bits: float = 0.0,
        levels: int = 256,
    ) -> None:
        if architecture not in ("mlp", "conv"):
            raise ValueError(f"VAE: architecture must be 'mlp' or 'conv', got {architecture!r}")
        super().__init__(input_shape, likelihood, levels, SMALLEST if architecture == "conv" else 1)
        self._check_size("latent_dim", latent_dim)
        hidden = self._check_sizes("hidden_dims", hidden_dims, 1)
        self._check_weight("beta", beta)
        self._check_weight("free_bits", free_bits)
        self._check_size("num_samples", num_samples)
        if objective not in ("elbo", "iwae"):
            raise ValueError(f"VAE: objective must be 'elbo' or 'iwae', got {objective!r}")
        if objective == "iwae" and (beta != 1.0 or free_bits > 0.0):
            raise ValueError(f"VAE: the objective 'iwae' has neither beta nor free bits, got {beta} and {free_bits}")
        self.latent_dim, self.architecture, self.objective = int(latent_dim), architecture, objective
        self.beta, self.free_bits, self.num_samples = float(beta), float(free_bits), int(num_samples)
        self.config = {
            "input_shape": list(self.input_shape),
            "latent_dim": self.latent_dim,
            "hidden_dims": list(hidden),
            "architecture": architecture,
            "likelihood": likelihood,
            "beta": self.beta,
            "objective": objective,
            "num_samples": self.num_samples,
            "free_bits": self.free_bits,
            "levels": self.levels,
        }
        _, height, width = self.input_shape
        encoder: list[torch.nn.Module] = []
        decoder: list[torch.nn.Module] = []
        if architecture == "conv":
            small = (CHANNELS[1], height // 4, width // 4)
            encoder, features = [*halvings(self.input_shape[0], CHANNELS), torch.nn.Flatten()], math.prod(small)
        else:
            encoder, features = [torch.nn.Flatten()], math.prod(self.input_shape)
        widths = (features, *hidden)
        for ins, outs in zip(widths, hidden, strict=False):
            encoder += [torch.nn.Linear(ins, outs), torch.nn.ReLU()]
        self.encoder = torch.nn.Sequential(*encoder)
        # Mean and log-variance as halves of one product, which is faster than two.
        self.posterior = torch.nn.Linear(hidden[-1], 2 * self.latent_dim)
        widths = (self.latent_dim, *reversed(hidden))
        for ins, outs in zip(widths, reversed(hidden), strict=False):
            decoder += [torch.nn.Linear(ins, outs), torch.nn.ReLU()]
        if architecture == "conv":
            decoder += [torch.nn.Linear(hidden[0], features), torch.nn.ReLU(), torch.nn.Unflatten(1, small)]
            decoder += doublings((*CHANNELS[::-1], self.outputs), height, width)
        else:
            shape = (self.outputs, height, width)
            decoder += [torch.nn.Linear(hidden[0], math.prod(shape)), torch.nn.Unflatten(1, shape)]
        self.decoder = torch.nn.Sequential(*decoder)

    # ---- the two networks --------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of q(z | x).

        Args:
            x: ``[B, *input_shape]`` in [0, 1]; floating, or bool.

        Returns:
            ``(mean [B, latent_dim], logvar [B, latent_dim])``.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x has another shape.
        """
        mean, logvar = self.posterior(self.encoder(self._images(x))).chunk(2, -1)
        return mean, logvar

    def decode(self, z: Tensor) -> Pixels:
        """Parameters of p(x | z).

        Args:
            z: ``[B, latent_dim]``.

        Returns:
            Logits ``[B, *input_shape]`` of the Bernoulli likelihood; of the others ``(mean, logvar)``, each
            ``[B, *input_shape]``, of pixels in [-1, 1].

        Raises:
            ValueError: z has another shape.
        """
        if z.dim() != 2 or z.size(1) != self.latent_dim:
            raise ValueError(f"VAE: z must be [B, {self.latent_dim}], got {list(z.shape)}")
        # z may be wider than the weights: it is float32 under autocast, and where the posterior is half.
        return self._pixels(self.decoder(z.to(self.posterior.weight.dtype)))

    def forward(
        self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Pixels, Tensor, Tensor]:
        """``(decode(z), mean, logvar)`` of one sample z of q(z | x) each; the arguments are those of `elbo`."""
        mean, logvar = self.encode(x)
        z = ops.gaussian_rsample(mean, logvar, eps=eps, generator=generator)
        return self.decode(z), mean, logvar

    # ---- objectives --------------------------------------------------------------------------------------------------

    def _count(self, eps: Tensor | None, batch: int) -> int | None:
        """How many samples of each image are wanted, by the shape of their noise if that is given; None: just one."""
        if eps is None:
            return None if self.num_samples == 1 else self.num_samples
        if eps.dim() not in (2, 3) or eps.shape[-2:] != (batch, self.latent_dim) or eps.size(0) < min(batch, 1):
            want = f"[{batch}, {self.latent_dim}] or [samples, {batch}, {self.latent_dim}]"
            raise ValueError(f"VAE: eps must be {want}, got {list(eps.shape)}")
        return None if eps.dim() == 2 else eps.size(0)

    def _terms(
        self, x: Tensor, free_bits: float, eps: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        x = self._images(x)
        mean, logvar = self.encode(x)
        count = self._count(eps, x.size(0))
        if count is not None:
            mean, logvar = mean.expand(count, *mean.shape), logvar.expand(count, *logvar.shape)
        z, kl = ops.gaussian_rsample_kl(
            mean, logvar, free_bits=free_bits, batch_dims=mean.dim() - 1, eps=eps, generator=generator
        )
        nll = self._pixel_nll(self.decode(z.flatten(0, -2)), x, count)
        return (nll, kl) if count is None else (nll.mean(0), kl.mean(0))

    def elbo_terms(
        self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two terms of the bound, ``-log p(x | z)`` and ``KL(q(z | x) || p(z))``, each ``[B]`` in nats.

        The arguments are those of `elbo`, which is the negative sum.
        """
        return self._terms(x, 0.0, eps, generator)

    def elbo(self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The evidence lower bound, estimated with `num_samples` samples of q(z | x); without beta or free bits.

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            eps: standard normals, ``[B, latent_dim]`` or ``[samples, B, latent_dim]``, instead of drawn ones.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            ``[B]``, nats, float32 or wider.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x or eps has another shape.
        """
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator)
        return -(nll + kl)

    def loss(self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises: the mean over the batch of the negative objective, in nats per image.

        The arguments are those of `elbo`; so are the errors.
        """
        if self.objective == "iwae":
            x = self._images(x)
            count = self._count(eps, x.size(0)) or 1
            if eps is not None and eps.dim() == 2:
                eps = eps.unsqueeze(0)
            weights = self._log_weights(x, self.encode(x), count, eps, generator)
            return (math.log(count) - weights.logsumexp(0)).mean()
        nll, kl = self._terms(x, self.free_bits, eps, generator)
        return (nll + self.beta * kl).mean()

    def _log_weights(
        self, x: Tensor, encoded: Any, count: int, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        mean, logvar = (at_least_float32(part).expand(count, *part.shape) for part in encoded)
        if eps is None:
            eps = standard_normal(mean.shape, mean, generator)
        z = ops.gaussian_rsample(mean, logvar, eps=eps)
        nll = self._pixel_nll(self.decode(z.flatten(0, 1)), x, count)
        # log p(z) - log q(z | x): with z = mean + std eps, the constants and the squares of (z - mean) / std are known.
        return 0.5 * (eps.square() + logvar - z.square()).sum(-1) - nll

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None, sample_pixels: bool = False) -> Tensor:
        """Images of the model's own: z from the prior, decoded.

        Args:
            n: how many.
            generator: where the noise is drawn from; the device's default generator otherwise.
            sample_pixels: draw the pixels, too, instead of taking their means.

        Returns:
            ``[n, *input_shape]`` in [0, 1].
        """
        weight = self.posterior.weight
        z = standard_normal((n, self.latent_dim), weight, generator)
        return self._picture(self.decode(z), sample_pixels, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels, decoded from the mean of q(z | x): ``[B, *input_shape]`` in [0, 1]."""
        return self._picture(self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """From one image to another, in equal steps between the means of their latents.

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
        latents = mix(self.encode(x0)[0], self.encode(x1)[0], steps)
        return self._picture(self.decode(latents)).view(x0.size(0), steps, *self.input_shape)


def halvings(channels: int, widths: Sequence[int]) -> list[torch.nn.Module]:
    """4x4 convolutions, each of which halves height and width (rounding down), with ReLUs."""
    layers: list[torch.nn.Module] = []
    for ins, outs in zip((channels, *widths), widths, strict=False):
        layers += [torch.nn.Conv2d(ins, outs, 4, stride=2, padding=1), torch.nn.ReLU()]
    return layers


def doublings(channels: Sequence[int], height: int, width: int) -> list[torch.nn.Module]:
    """Two transposed 4x4 convolutions up to height by width, with a ReLU between them."""
    middle, ins, outs = channels[-2], channels[0], channels[-1]
    # An odd size lost one when it was halved.
    half = (height // 2 % 2, width // 2 % 2)
    return [
        torch.nn.ConvTranspose2d(ins, middle, 4, stride=2, padding=1, output_padding=half),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(middle, outs, 4, stride=2, padding=1, output_padding=(height % 2, width % 2)),
    ]
