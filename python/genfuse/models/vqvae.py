"""The VQ-VAE: images as small grids of discrete codes, and a language model of the codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfuse import nn

from .image import ImageModel, Likelihood, Pixels, mix
from .language_model import LSTMLanguageModel
from .vae import SMALLEST, doublings, halvings

__all__ = ["VQVAE"]

# The logit of the prior's start symbol, which never follows anything: low enough for a probability, and a gradient, of
# exactly 0, and yet finite.
NEVER = -1e4


class VQVAE(ImageModel):
    """A convolutional autoencoder whose latents are codes of a learned codebook, with an autoregressive prior.

    Van den Oord, Vinyals and Kavukcuoglu 2017 (arXiv 1711.00937). Two halving convolutions and two residual blocks
    make a grid of vectors, 7 by 7 of an image of 28 by 28; `genfuse.nn.VectorQuantizer` takes each to its nearest code;
    the decoder mirrors the encoder. The prior over codes in raster order is a `genfuse.models.LSTMLanguageModel`.

    They are trained by two losses, `loss` and `prior_loss`, which share no parameter: one after the other, as in the
    paper, or their sum at once.

    Args:
        input_shape: (channels, height, width); height and width at least 4.
        num_embeddings: number of codes K.
        embedding_dim: D, of a code.
        hidden_dim: channels of the convolutions.
        likelihood: of a pixel given the codes, as for `VAE`.
        commitment_weight: weight of the term that draws the encoder's vectors to their codes.
        decay: of the codebook's moving averages.
        prior_hidden_size: of the prior's LSTM.
        dead_code_threshold: codes that fewer vectors a batch take than this are replaced, as in
            `genfuse.nn.VectorQuantizer`; None leaves them.
        levels: values a pixel can have, for ``"discretized_gaussian"``.

    `genfuse.reference.VQVAE` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int, or a weight no number.
        ValueError: a size below 1, images too small, a weight out of its range, an unknown likelihood.

    Example:
        >>> model = VQVAE(hidden_dim=16, prior_hidden_size=32)
        >>> x = torch.rand(8, 1, 28, 28)
        >>> (model.loss(x) + model.prior_loss(x)).backward()
        >>> model.encode(x).shape, model.sample(2).shape
        (torch.Size([8, 7, 7]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_embeddings: int = 128,
        embedding_dim: int = 32,
        hidden_dim: int = 64,
        *,
        likelihood: Likelihood = "bernoulli",
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        prior_hidden_size: int = 256,
        dead_code_threshold: float | None = 0.1,
        levels: int = 256,
    ) -> None:
        super().__init__(input_shape, likelihood, levels, SMALLEST)
        for argument, size in (
            ("num_embeddings", num_embeddings),
            ("embedding_dim", embedding_dim),
            ("hidden_dim", hidden_dim),
            ("prior_hidden_size", prior_hidden_size),
        ):
            self._check_size(argument, size)
        self.config = {
            "input_shape": list(self.input_shape),
            "num_embeddings": int(num_embeddings),
            "embedding_dim": int(embedding_dim),
            "hidden_dim": int(hidden_dim),
            "likelihood": likelihood,
            "commitment_weight": float(commitment_weight),
            "decay": float(decay),
            "prior_hidden_size": int(prior_hidden_size),
            "dead_code_threshold": dead_code_threshold,
            "levels": self.levels,
        }
        _, height, width = self.input_shape
        self.grid = (height // 4, width // 4)
        self.start = int(num_embeddings)  # the symbol that every sequence of codes begins with
        self.encoder = torch.nn.Sequential(
            *halvings(self.input_shape[0], (hidden_dim, hidden_dim)),
            Residual(hidden_dim),
            Residual(hidden_dim),
            torch.nn.ReLU(),
            torch.nn.Conv2d(hidden_dim, embedding_dim, 1),
        )
        self.quantizer = nn.VectorQuantizer(
            num_embeddings,
            embedding_dim,
            commitment_weight=commitment_weight,
            decay=decay,
            dead_code_threshold=dead_code_threshold,
            channel_last=False,
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Conv2d(embedding_dim, hidden_dim, 1),
            Residual(hidden_dim),
            Residual(hidden_dim),
            torch.nn.ReLU(),
            *doublings((hidden_dim, hidden_dim, self.outputs), height, width),
        )
        self.prior = LSTMLanguageModel(self.start + 1, embedding_dim, prior_hidden_size, 1)
        with torch.no_grad():
            self.prior.head.bias[self.start] = NEVER

    # ---- codes -------------------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Codes of images; the codebook stays as it is, in training too.

        Args:
            x: ``[B, *input_shape]`` in [0, 1]; floating, or bool.

        Returns:
            int64 ``[B, height // 4, width // 4]`` in [0, K).

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x has another shape.
        """
        return self.quantizer.encode(self.encoder(self._images(x)))

    def decode(self, codes: Tensor) -> Pixels:
        """Parameters of p(x | codes), as `VAE.decode` gives them.

        Args:
            codes: int64 ``[B, height // 4, width // 4]`` in [0, K).

        Raises:
            ValueError: codes have another shape.
            IndexError: a code is outside [0, K).
        """
        if codes.dim() != 3 or codes.shape[1:] != self.grid:
            raise ValueError(f"VQVAE: codes must be [B, {self.grid[0]}, {self.grid[1]}], got {list(codes.shape)}")
        return self._pixels(self.decoder(self.quantizer.decode(codes)))

    def forward(self, x: Tensor) -> tuple[Pixels, Tensor, Tensor]:
        """``(pixels, codes, loss)``: what the decoder makes of the codes, and the loss of `VectorQuantizer`.

        In training the codebook follows.
        """
        quantized, codes, loss = self.quantizer(self.encoder(self._images(x)))
        return self._pixels(self.decoder(quantized)), codes, loss

    # ---- objectives --------------------------------------------------------------------------------------------------

    def loss_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `loss` consists of, and the codes.

        Returns:
            ``(nll [B], commitment [], codes [B, height // 4, width // 4])``: ``-log p(x | codes)`` in nats, and the
            commitment loss, summed over an image's vectors and averaged over the batch.
        """
        pixels, codes, loss = self(x)
        # Summed over the latents, as the likelihood is over the pixels; the quantiser's is their mean.
        return (
            self._pixel_nll(pixels, self._images(x)),
            loss * (math.prod(self.grid) * self.quantizer.embedding_dim),
            codes,
        )

    def loss(self, x: Tensor, *, eps: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """What training the autoencoder minimises: the mean of ``-log p(x | codes)`` in nats per image, plus the
        commitment loss (eq. 3 of the paper; the codebook follows its averages).

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            eps, generator: not used, because nothing is drawn (but for dead codes); as the other models have them.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x has another shape.
        """
        nll, commitment, _ = self.loss_parts(x)
        return nll.mean() + commitment

    def prior_log_prob(self, codes: Tensor) -> Tensor:
        """log p(codes) of the prior, ``[B]`` in nats; codes as from `encode`."""
        codes = codes.flatten(1)
        return self.prior.log_prob(torch.cat([codes.new_full((codes.size(0), 1), self.start), codes], 1))

    def prior_loss(self, x: Tensor) -> Tensor:
        """What training the prior minimises: the mean of ``-log p(codes of x)`` in nats per image."""
        with torch.no_grad():
            codes = self.encode(x)
        return -self.prior_log_prob(codes).mean()

    def elbo(self, x: Tensor, *, eps: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """log p(x | codes) + log p(codes) of an image's own codes: a lower bound of log p(x), a sum over all codes.

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            eps, generator: not used, because nothing is drawn; as the other models have them.

        Returns:
            ``[B]``, nats, float32 or wider.

        Raises:
            TypeError: x is no Tensor, or neither floating nor bool.
            ValueError: x has another shape.
        """
        x = self._images(x)
        codes = self.encode(x)
        return self.prior_log_prob(codes) - self._pixel_nll(self.decode(codes), x)

    @torch.no_grad()
    def nll(
        self,
        x: Tensor,
        num_samples: int = 5000,
        *,
        chunk_size: int = 4096,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Less `elbo`: an upper bound of -log p(x), without a gradient.

        Args:
            x: ``[B, *input_shape]`` in [0, 1].
            num_samples, generator: not used, because there is one posterior code; as the other models have them.
            chunk_size: how many images are decoded at once.

        Returns:
            ``[B]``, nats, float32 or wider.

        Raises:
            TypeError: chunk_size is no int, x no floating Tensor.
            ValueError: chunk_size is below 1, or x has another shape.
        """
        self._check_size("chunk_size", chunk_size)
        return torch.cat([-self.elbo(part) for part in torch.split(self._images(x), chunk_size)])

    # ---- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_codes(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Codes from the prior, int64 ``[n, height // 4, width // 4]``."""
        prompt = torch.full((n, 1), self.start, device=self.prior.head.bias.device)
        codes: Tensor = self.prior.generate(prompt, math.prod(self.grid), temperature=temperature, generator=generator)
        return codes.view(n, *self.grid)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        sample_pixels: bool = False,
    ) -> Tensor:
        """Images of the model's own: codes from the prior, decoded.

        Args:
            n: how many.
            temperature: of the prior.
            generator: where the codes, and then the pixels, are drawn from; the device's default generator otherwise.
            sample_pixels: draw the pixels, too, instead of taking their means.

        Returns:
            ``[n, *input_shape]`` in [0, 1].
        """
        codes = self.sample_codes(n, temperature=temperature, generator=generator)
        return self._picture(self.decode(codes), sample_pixels, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the pixels, decoded from the codes: ``[B, *input_shape]`` in [0, 1]."""
        return self._picture(self.decode(self.encode(x)))

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
        """From one image to another, in equal steps of the encoder's vectors, each taken to its nearest code.

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
        codes = self.quantizer.encode(mix(self.encoder(x0), self.encoder(x1), steps))
        return self._picture(self.decode(codes)).view(x0.size(0), steps, *self.input_shape)


class Residual(torch.nn.Module):
    """x plus a 3x3 and a 1x1 convolution of it, with ReLUs before them (section 4.1 of the paper)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.pointwise = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(torch.relu(self.spatial(torch.relu(x))))
        return x + y
