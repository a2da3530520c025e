"""The variational autoencoders in plain PyTorch: the definitions of `genfuse.models.VAE`, `HierarchicalVAE`, `VQVAE`.

Each twin has its original's arguments, ``state_dict`` and methods, and from the same seed the same weights and noise:
noise is drawn as `genfuse.reference.sampling` defines it, from a pair that torch's generator gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .language_model import LSTMLanguageModel
from .likelihood import discretized_gaussian_nll
from .random import draw_rng
from .sampling import philox_normal

__all__ = ["VAE", "VQVAE", "HierarchicalVAE", "VectorQuantizer"]

_LOWEST_LOGVAR = {"gaussian": -10.0, "discretized_gaussian": -14.0}


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return philox_normal(tuple(shape), draw_rng(like.device, generator), like.dtype)


class _ImageModel(torch.nn.Module):
    """The likelihood of pixels, and of images by importance sampling (Burda et al. 2015, arXiv 1509.00519, eq. 8)."""

    def __init__(self, input_shape: Sequence[int], likelihood: str, levels: int) -> None:
        super().__init__()
        self.input_shape, self.likelihood, self.levels = tuple(input_shape), likelihood, levels
        self.outputs = self.input_shape[0] * (1 if likelihood == "bernoulli" else 2)

    def pixels(self, outputs: Tensor) -> Any:
        """Logits, or means and log-variances, from what a decoder puts out."""
        if self.likelihood == "bernoulli":
            return outputs
        mean, free = outputs.chunk(2, 1)
        lowest = _LOWEST_LOGVAR[self.likelihood]
        return mean, lowest + F.softplus(free - lowest)

    def pixel_nll(self, pixels: Any, x: Tensor) -> Tensor:
        """-log p(x | pixels), ``[B]``."""
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(pixels, x, reduction="none").flatten(1).sum(1)
        mean: Tensor = pixels[0]
        logvar: Tensor = pixels[1]
        if self.likelihood == "gaussian":
            nll = 0.5 * (math.log(2 * math.pi) + logvar) + 0.5 * (2 * x - 1 - mean).square() / logvar.exp()
            return nll.flatten(1).sum(1)
        return discretized_gaussian_nll(2 * x - 1, mean, logvar, 1, False, self.levels)[0]

    def picture(self, pixels: Any) -> Tensor:
        """Means of pixels in [0, 1]."""
        bits = self.likelihood == "bernoulli"
        means: Tensor = torch.sigmoid(pixels) if bits else (0.5 * pixels[0] + 0.5).clamp(0, 1)
        return means

    def encode(self, x: Tensor) -> Any:
        raise NotImplementedError

    def log_weight(self, x: Tensor, encoded: Any, eps: Any) -> Tensor:
        """log p(x, z) - log q(z | x) of one sample of each image, ``[B]``."""
        raise NotImplementedError

    def noise(self, batch: int, like: Tensor, generator: torch.Generator | None) -> Any:
        """Standard normals for one sample of each image."""
        raise NotImplementedError

    @torch.no_grad()
    def nll(self, x: Tensor, num_samples: int = 5000, *, generator: torch.Generator | None = None) -> Tensor:
        """-log p(x), one sample of each image at a time."""
        encoded = self.encode(x)
        weights = [self.log_weight(x, encoded, self.noise(x.size(0), x, generator)) for _ in range(num_samples)]
        return math.log(num_samples) - torch.stack(weights).logsumexp(0)


def _halvings(channels: int, widths: tuple[int, int] = (32, 64)) -> list[torch.nn.Module]:
    return [
        torch.nn.Conv2d(channels, widths[0], 4, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(widths[0], widths[1], 4, stride=2, padding=1),
        torch.nn.ReLU(),
    ]


def _doublings(channels: Sequence[int], height: int, width: int) -> list[torch.nn.Module]:
    extra = (height // 2 % 2, width // 2 % 2), (height % 2, width % 2)
    return [
        torch.nn.ConvTranspose2d(channels[0], channels[1], 4, stride=2, padding=1, output_padding=extra[0]),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(channels[1], channels[2], 4, stride=2, padding=1, output_padding=extra[1]),
    ]


class VAE(_ImageModel):
    """The plain twin of `genfuse.models.VAE` (Kingma and Welling 2013, arXiv 1312.6114).

    Example:
        >>> model = VAE()
        >>> model.loss(torch.rand(2, 1, 28, 28)).shape, model.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 28, 28]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 20,
        hidden_dims: Sequence[int] = (400,),
        *,
        architecture: str = "mlp",
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        objective: str = "elbo",
        num_samples: int = 1,
        free_bits: float = 0.0,
        levels: int = 256,
    ) -> None:
        super().__init__(input_shape, likelihood, levels)
        self.latent_dim, self.objective, self.num_samples = latent_dim, objective, num_samples
        self.beta, self.free_bits = beta, free_bits
        channels, height, width = self.input_shape
        conv = architecture == "conv"
        features = 64 * (height // 4) * (width // 4) if conv else channels * height * width
        encoder = [*(_halvings(channels) if conv else []), torch.nn.Flatten()]
        before = features
        for units in hidden_dims:
            encoder += [torch.nn.Linear(before, units), torch.nn.ReLU()]
            before = units
        self.encoder = torch.nn.Sequential(*encoder)
        self.posterior = torch.nn.Linear(before, 2 * latent_dim)
        decoder: list[torch.nn.Module] = []
        before = latent_dim
        for units in reversed(hidden_dims):
            decoder += [torch.nn.Linear(before, units), torch.nn.ReLU()]
            before = units
        if conv:
            decoder += [torch.nn.Linear(before, features), torch.nn.ReLU()]
            decoder += [torch.nn.Unflatten(1, (64, height // 4, width // 4))]
            decoder += _doublings((64, 32, self.outputs), height, width)
        else:
            decoder += [torch.nn.Linear(before, self.outputs * height * width)]
            decoder += [torch.nn.Unflatten(1, (self.outputs, height, width))]
        self.decoder = torch.nn.Sequential(*decoder)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x)."""
        mean, logvar = self.posterior(self.encoder(x)).chunk(2, 1)
        return mean, logvar

    def decode(self, z: Tensor) -> Any:
        """Logits of the pixels, or their means and log-variances."""
        return self.pixels(self.decoder(z))

    def noise(self, batch: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return _normal((batch, self.latent_dim), like, generator)

    def _eps(self, x: Tensor, eps: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if eps is None:
            return _normal((self.num_samples, x.size(0), self.latent_dim), x, generator)
        return eps if eps.dim() == 3 else eps.unsqueeze(0)

    def elbo_terms(
        self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None, free_bits: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL (eq. 10 of the paper), each ``[B]``."""
        mean, logvar = self.encode(x)
        nll = [
            self.pixel_nll(self.decode(mean + torch.exp(0.5 * logvar) * noise), x)
            for noise in self._eps(x, eps, generator)
        ]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return torch.stack(nll).mean(0), kl.clamp(min=free_bits).sum(1)

    def elbo(self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The evidence lower bound, ``[B]``."""
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator)
        return -(nll + kl)

    def log_weight(self, x: Tensor, encoded: Any, eps: Tensor) -> Tensor:
        mean: Tensor = encoded[0]
        logvar: Tensor = encoded[1]
        std = torch.exp(0.5 * logvar)
        z = mean + std * eps
        log_p = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        log_q = -0.5 * (((z - mean) / std).square() + logvar + math.log(2 * math.pi)).sum(1)
        return log_p - log_q - self.pixel_nll(self.decode(z), x)

    def loss(self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The mean negative objective."""
        if self.objective == "iwae":
            encoded, noise = self.encode(x), self._eps(x, eps, generator)
            weights = torch.stack([self.log_weight(x, encoded, one) for one in noise])
            return (math.log(len(noise)) - weights.logsumexp(0)).mean()
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator, free_bits=self.free_bits)
        return (nll + self.beta * kl).mean()

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Means of `n` images of the model's own."""
        return self.picture(self.decode(self.noise(n, self.posterior.weight, generator)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels from the posterior's mean."""
        return self.picture(self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """``[B, steps, *input_shape]`` from x0 to x1."""
        z0, z1 = self.encode(x0)[0], self.encode(x1)[0]
        images = [self.picture(self.decode(z0 + (z1 - z0) * (i / (steps - 1)))) for i in range(steps)]
        return torch.stack(images, 1)


def _mlp(before: int, units: int) -> torch.nn.Sequential:
    first = [torch.nn.Linear(before, units), torch.nn.LayerNorm(units), torch.nn.LeakyReLU(0.1)]
    return torch.nn.Sequential(
        *first, torch.nn.Linear(units, units), torch.nn.LayerNorm(units), torch.nn.LeakyReLU(0.1)
    )


class HierarchicalVAE(_ImageModel):
    """The plain twin of `genfuse.models.HierarchicalVAE` (Sonderby et al. 2016, arXiv 1602.02282).

    Example:
        >>> model = HierarchicalVAE(hidden_dim=8)
        >>> model.loss(torch.rand(2, 1, 28, 28)).shape, model.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 28, 28]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        latent_dims: Sequence[int] = (32, 16, 8),
        hidden_dim: int = 256,
        *,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        free_bits: float = 0.0,
        levels: int = 256,
    ) -> None:
        super().__init__(input_shape, likelihood, levels)
        self.latent_dims, self.beta, self.free_bits = tuple(latent_dims), beta, free_bits
        dims, pixels = self.latent_dims, math.prod(self.input_shape)
        befores = [pixels] + [hidden_dim] * (len(dims) - 1)
        self.up = torch.nn.ModuleList([_mlp(before, hidden_dim) for before in befores])
        self.messages = torch.nn.ModuleList([torch.nn.Linear(hidden_dim, 2 * dim) for dim in dims])
        self.priors = torch.nn.ModuleList()
        for layer in range(len(dims) - 1):
            prior = _mlp(dims[layer + 1], hidden_dim), torch.nn.Linear(hidden_dim, 2 * dims[layer])
            self.priors.append(torch.nn.Sequential(*prior))
        shape = (self.outputs, *self.input_shape[1:])
        self.decoder = torch.nn.Sequential(
            _mlp(dims[0], hidden_dim), torch.nn.Linear(hidden_dim, math.prod(shape)), torch.nn.Unflatten(1, shape)
        )

    def encode(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and log-variance that the image gives each layer, the lowest first."""
        hidden, found = x.flatten(1), []
        for up, message in zip(self.up, self.messages, strict=True):
            hidden = up(hidden)
            mean, logvar = message(hidden).chunk(2, 1)
            found.append((mean, logvar))
        return found

    def decode(self, z: Tensor) -> Any:
        """Parameters of p(x | z_1)."""
        return self.pixels(self.decoder(z))

    def prior(self, layer: int, above: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(z_layer | z_above); 0 and 0 of the top layer."""
        if above is None:
            return torch.zeros_like(like), torch.zeros_like(like)
        mean, logvar = self.priors[layer](above).chunk(2, 1)
        return mean, logvar

    def posteriors(
        self, encoded: list[tuple[Tensor, Tensor]], eps: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """z, mean, variance, prior's mean and prior's variance of each layer, the lowest first (eq. 17 to 19)."""
        found: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        z: Tensor | None = None
        for layer in reversed(range(len(encoded))):
            mean, logvar = encoded[layer]
            prior_mean, prior_logvar = self.prior(layer, z, mean)
            variance, prior_variance = logvar.exp(), prior_logvar.exp()
            if z is not None:
                precision, prior_precision = 1 / variance, 1 / prior_variance
                variance = 1 / (precision + prior_precision)
                mean = (mean * precision + prior_mean * prior_precision) * variance
            z = mean + variance.sqrt() * eps[layer]
            found.insert(0, (z, mean, variance, prior_mean, prior_variance))
        return found

    def noise(self, batch: int, like: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        drawn = [_normal((batch, dim), like, generator) for dim in reversed(self.latent_dims)]
        return drawn[::-1]  # the upper layers come first

    def elbo_terms(
        self,
        x: Tensor,
        *,
        eps: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        free_bits: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction ``[B]``, and KL of each layer ``[B, L]``."""
        layers = self.posteriors(self.encode(x), self.noise(x.size(0), x, generator) if eps is None else eps)
        kls = []
        for _, mean, variance, prior_mean, prior_variance in layers:
            ratio = variance / prior_variance
            kl = 0.5 * (ratio - 1 - ratio.log() + (mean - prior_mean).square() / prior_variance)
            kls.append(kl.clamp(min=free_bits).sum(1))
        return self.pixel_nll(self.decode(layers[0][0]), x), torch.stack(kls, 1)

    def elbo(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The evidence lower bound, ``[B]``."""
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator)
        return -(nll + kl.sum(1))

    def log_weight(self, x: Tensor, encoded: Any, eps: Sequence[Tensor]) -> Tensor:
        layers = self.posteriors(encoded, eps)
        total = -self.pixel_nll(self.decode(layers[0][0]), x)
        for z, mean, variance, prior_mean, prior_variance in layers:
            log_p = -0.5 * ((z - prior_mean).square() / prior_variance + prior_variance.log())
            log_q = -0.5 * ((z - mean).square() / variance + variance.log())
            total = total + (log_p - log_q).sum(1)
        return total

    def loss(
        self, x: Tensor, *, eps: Sequence[Tensor] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean of reconstruction plus beta times all KLs."""
        nll, kl = self.elbo_terms(x, eps=eps, generator=generator, free_bits=self.free_bits)
        return (nll + self.beta * kl.sum(1)).mean()

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Means of `n` images of the model's own."""
        noise = self.noise(n, next(self.parameters()), generator)
        z: Tensor | None = None
        for layer in reversed(range(len(self.latent_dims))):
            mean, logvar = self.prior(layer, z, noise[layer])
            z = mean + torch.exp(0.5 * logvar) * noise[layer]
        assert z is not None
        return self.picture(self.decode(z))

    def _explain(self, encoded: list[tuple[Tensor, Tensor]]) -> Tensor:
        means = self.posteriors(encoded, [torch.zeros_like(mean) for mean, _ in encoded])
        return self.picture(self.decode(means[0][0]))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels from the posteriors' means."""
        return self._explain(self.encode(x))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """``[B, steps, *input_shape]`` from x0 to x1, by what the images say of each layer."""
        ends, images = (self.encode(x0), self.encode(x1)), []
        for share in [step / (steps - 1) for step in range(steps)]:
            pairs = zip(*ends, strict=True)
            mixed = [(m0 + (m1 - m0) * share, v0 + (v1 - v0) * share) for (m0, v0), (m1, v1) in pairs]
            images.append(self._explain(mixed))
        return torch.stack(images, 1)


class VectorQuantizer(torch.nn.Module):
    """The plain twin of `genfuse.nn.VectorQuantizer` with its averages, in one process, vectors in dimension 1.

    Van den Oord et al. 2017 (arXiv 1711.00937), eq. 1 to 3 and appendix A.

    Example:
        >>> quantized, indices, loss = VectorQuantizer(4, 3)(torch.randn(2, 3, 5))
        >>> quantized.shape, indices.shape, loss.shape
        (torch.Size([2, 3, 5]), torch.Size([2, 5]), torch.Size([]))
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_sum: Tensor
    num_updates: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        dead_code_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.commitment_weight, self.decay, self.eps = commitment_weight, decay, eps
        self.dead_code_threshold = dead_code_threshold
        self.register_buffer("codebook", torch.randn(num_embeddings, embedding_dim))
        self.register_buffer("cluster_size", torch.zeros(num_embeddings))
        self.register_buffer("embed_sum", torch.zeros(num_embeddings, embedding_dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest code of each vector of ``x [B, D, *]``."""
        vectors = x.detach().movedim(1, -1)
        distances = (vectors.unsqueeze(-2) - self.codebook).square().sum(-1)
        return distances.argmin(-1)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes ``[B, D, *]`` of indices ``[B, *]``."""
        return self.codebook[indices].movedim(-1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(quantized, indices, loss)``; in training the codebook follows, after the batch has been quantised."""
        indices = self.encode(x)
        codes = self.decode(indices)
        loss = self.commitment_weight * (x - codes).square().mean()
        if self.training:
            self._update(x.detach().movedim(1, -1).reshape(-1, x.size(1)), indices.flatten())
        return x + (codes - x).detach(), indices, loss

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        codes = self.codebook.size(0)
        taken = F.one_hot(indices, codes).to(vectors.dtype)  # [N, K]
        self.num_updates += 1
        self.cluster_size = self.decay * self.cluster_size + (1 - self.decay) * taken.sum(0)
        self.embed_sum = self.decay * self.embed_sum + (1 - self.decay) * taken.T @ vectors
        # Laplace smoothing: as if each code had been taken eps times more, at the same total.
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + codes * self.eps) * total
        used = taken.sum(0) > 0
        self.codebook = self.codebook.clone()
        self.codebook[used] = self.embed_sum[used] / smoothed[used, None]
        if self.dead_code_threshold is not None:
            count = vectors.size(0)
            rows = torch.randperm(count)[:codes] if count >= codes else torch.randint(count, (codes,))
            threshold = self.dead_code_threshold * (1 - self.decay ** int(self.num_updates))
            dead = self.cluster_size < threshold
            self.cluster_size[dead] = (total / codes).clamp(min=threshold)
            self.codebook[dead] = vectors[rows][dead]
            self.embed_sum[dead] = self.codebook[dead] * self.cluster_size[dead, None]


class _Residual(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.pointwise = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(F.relu(self.spatial(F.relu(x))))
        return x + y


class VQVAE(_ImageModel):
    """The plain twin of `genfuse.models.VQVAE` (van den Oord et al. 2017, arXiv 1711.00937).

    Example:
        >>> model = VQVAE(hidden_dim=8, prior_hidden_size=8)
        >>> model.loss(torch.rand(2, 1, 28, 28)).shape, model.sample(3).shape
        (torch.Size([]), torch.Size([3, 1, 28, 28]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_embeddings: int = 128,
        embedding_dim: int = 32,
        hidden_dim: int = 64,
        *,
        likelihood: str = "bernoulli",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        prior_hidden_size: int = 256,
        dead_code_threshold: float | None = 0.1,
        levels: int = 256,
    ) -> None:
        super().__init__(input_shape, likelihood, levels)
        channels, height, width = self.input_shape
        self.grid, self.start = (height // 4, width // 4), num_embeddings
        self.encoder = torch.nn.Sequential(
            *_halvings(channels, (hidden_dim, hidden_dim)),
            _Residual(hidden_dim),
            _Residual(hidden_dim),
            torch.nn.ReLU(),
            torch.nn.Conv2d(hidden_dim, embedding_dim, 1),
        )
        self.quantizer = VectorQuantizer(
            num_embeddings,
            embedding_dim,
            commitment_weight=commitment_weight,
            decay=decay,
            dead_code_threshold=dead_code_threshold,
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Conv2d(embedding_dim, hidden_dim, 1),
            _Residual(hidden_dim),
            _Residual(hidden_dim),
            torch.nn.ReLU(),
            *_doublings((hidden_dim, hidden_dim, self.outputs), height, width),
        )
        self.prior = LSTMLanguageModel(num_embeddings + 1, embedding_dim, prior_hidden_size, 1)
        with torch.no_grad():
            self.prior.head.bias[self.start] = -1e4

    def encode(self, x: Tensor) -> Tensor:
        """Codes ``[B, height // 4, width // 4]``."""
        return self.quantizer.encode(self.encoder(x))

    def decode(self, codes: Tensor) -> Any:
        """Parameters of p(x | codes)."""
        return self.pixels(self.decoder(self.quantizer.decode(codes)))

    def loss(self, x: Tensor) -> Tensor:
        """Reconstruction and commitment, summed over pixels and latents (eq. 3)."""
        quantized, _, loss = self.quantizer(self.encoder(x))
        nll = self.pixel_nll(self.pixels(self.decoder(quantized)), x).mean()
        total: Tensor = nll + loss * quantized[0].numel()
        return total

    def prior_log_prob(self, codes: Tensor) -> Tensor:
        """log p(codes), ``[B]``."""
        codes = codes.flatten(1)
        log_prob: Tensor = self.prior.log_prob(F.pad(codes, (1, 0), value=self.start))
        return log_prob

    def prior_loss(self, x: Tensor) -> Tensor:
        """The mean of -log p(codes)."""
        return -self.prior_log_prob(self.encode(x)).mean()

    def elbo(self, x: Tensor) -> Tensor:
        """log p(x | codes) + log p(codes), ``[B]``."""
        codes = self.encode(x)
        return self.prior_log_prob(codes) - self.pixel_nll(self.decode(codes), x)

    @torch.no_grad()
    def nll(self, x: Tensor, num_samples: int = 5000, *, generator: torch.Generator | None = None) -> Tensor:
        """Less `elbo`; nothing is drawn."""
        return -self.elbo(x)

    @torch.no_grad()
    def sample(self, n: int, **options: Any) -> Tensor:
        """Means of `n` images of the model's own; options are those of the prior's ``generate``."""
        prompt = torch.full((n, 1), self.start, device=self.prior.head.bias.device)
        codes, _, _ = self.prior.generate(prompt, math.prod(self.grid), **options)
        return self.picture(self.decode(codes.view(n, *self.grid)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels from the codes."""
        return self.picture(self.decode(self.encode(x)))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """``[B, steps, *input_shape]`` from x0 to x1, by the encoder's vectors."""
        v0, v1 = self.encoder(x0), self.encoder(x1)
        images = [
            self.picture(self.decode(self.quantizer.encode(v0 + (v1 - v0) * (step / (steps - 1)))))
            for step in range(steps)
        ]
        return torch.stack(images, 1)
