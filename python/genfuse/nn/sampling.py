"""Layers that draw or quantise: the latent variables of variational autoencoders.

All of them are thin: the arithmetic is in `genfuse.ops`, and what a layer adds is what it remembers, its options and,
for `VectorQuantizer`, the codebook and its running statistics.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from genfuse import ops

__all__ = ["GaussianReparameterization", "GumbelSoftmax", "VectorQuantizer"]

Parametrization = Literal["logvar", "log_std"]


def _check_number(module: str, name: str, value: object, low: float = 0.0, *, above: bool = False) -> None:
    """Refuse what is no finite number of at least `low` (with `above`: greater than it)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{module}: {name} must be a number, got {type(value).__name__}")
    if not (value > low if above else value >= low) or value == float("inf"):
        raise ValueError(f"{module}: {name} must be finite and {'above' if above else 'at least'} {low}, got {value}")


def _check_size(module: str, name: str, size: Any) -> int:
    """A size as an int, whatever integer it is given as."""
    wrong = f"{module}: {name} must be an int, got {type(size).__name__}"
    if isinstance(size, bool):
        raise TypeError(wrong)
    try:
        found = operator.index(size)
    except TypeError:
        raise TypeError(wrong) from None
    if found < 1:
        raise ValueError(f"{module}: {name} must be at least 1, got {size}")
    return found


class GaussianReparameterization(torch.nn.Module):
    """A sample of a diagonal Gaussian and its KL divergence from a prior, in one pass over the parameters.

    Kingma and Welling 2013 (arXiv 1312.6114), section 2.4 and appendix B; free bits: Kingma et al. 2016 (arXiv
    1606.04934), appendix C.8, here of each latent element. It samples in eval mode, too, as torch's VAEs do.

    Args:
        free_bits: nats; an element's KL counts as at least this much.
        clamp: bounds ``(low, high)`` of the log-variance (of ln std with ``"log_std"``). The gradient passes them as
            if they were not there, so that what lies outside can come back.
        parametrization: what `forward` is given beside the means: ``"logvar"``, log-variances, or ``"log_std"``,
            logarithms of standard deviations. The prior's are given in the same way.

    Raises:
        TypeError: free_bits is no number, clamp no pair.
        ValueError: free_bits negative or not finite, clamp not ascending, or an unknown parametrization.

    Example:
        >>> layer = GaussianReparameterization()
        >>> mean, logvar = torch.zeros(4, 20), torch.zeros(4, 20)
        >>> z, kl = layer(mean, logvar)
        >>> z.shape, kl
        (torch.Size([4, 20]), tensor([0., 0., 0., 0.]))
    """

    def __init__(
        self,
        *,
        free_bits: float = 0.0,
        clamp: Sequence[float] | None = None,
        parametrization: Parametrization = "logvar",
    ) -> None:
        super().__init__()
        _check_number("GaussianReparameterization", "free_bits", free_bits)
        if clamp is not None:
            if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
                raise TypeError(f"GaussianReparameterization: clamp must be a pair (low, high), got {clamp!r}")
            for bound in clamp:
                if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                    raise TypeError(f"GaussianReparameterization: clamp must hold numbers, got {type(bound).__name__}")
            if not clamp[0] <= clamp[1]:
                raise ValueError(f"GaussianReparameterization: clamp must be (low, high), got {clamp!r}")
        if parametrization not in ("logvar", "log_std"):
            raise ValueError(
                f"GaussianReparameterization: parametrization must be 'logvar' or 'log_std', got {parametrization!r}"
            )
        self.free_bits, self.parametrization = float(free_bits), parametrization
        self.clamp = None if clamp is None else (float(clamp[0]), float(clamp[1]))

    def extra_repr(self) -> str:
        return f"free_bits={self.free_bits}, clamp={self.clamp}, parametrization={self.parametrization!r}"

    def forward(
        self,
        mean: Tensor,
        logvar: Tensor,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``z = mean + std * eps`` and compute KL(N(mean, std^2) || prior).

        Args:
            mean: ``[B, *]``.
            logvar: of mean's shape: log-variances, or ln std, as `parametrization` says.
            prior_mean, prior_logvar: of the prior, broadcast to mean's shape; N(0, 1) if absent.
            eps: standard normals of mean's shape, instead of drawn ones.
            generator: where the noise is drawn from; the device's default generator otherwise.
            deterministic: take the mean as the sample; eps and generator are not looked at then.

        Returns:
            ``(z [B, *], kl [B])``; kl in nats, summed over all but the first dimension, in float32 or wider.
        """
        if deterministic:  # the operator's own broadcasting and dtypes
            eps = torch.zeros((), dtype=mean.dtype, device=mean.device).expand(
                torch.broadcast_shapes(mean.shape, logvar.shape)  # type: ignore[no-untyped-call]
            )
        if self.parametrization == "logvar":
            scales: dict[str, Any] = {"logvar": logvar, "prior_logvar": prior_logvar}
        else:
            scales = {"log_std": logvar, "prior_log_std": prior_logvar}
        return ops.gaussian_rsample_kl(
            mean,
            prior_mean=prior_mean,
            free_bits=self.free_bits,
            clamp=self.clamp,
            eps=eps,
            generator=generator,
            **scales,
        )


class GumbelSoftmax(torch.nn.Module):
    """A differentiable draw of one class of several: `genfuse.ops.gumbel_softmax` as a layer.

    Jang, Gu and Poole 2016 (arXiv 1611.01144); Maddison, Mnih and Teh 2016 (arXiv 1611.00712).

    Args:
        tau: temperature above 0. It may be assigned to, which is how it is annealed. Under torch.compile each value is
            a compilation: anneal in few steps there.
        hard: one-hot results, with the gradient of the soft ones.
        dim: the dimension that the classes lie in.

    Raises:
        TypeError: tau is no number.
        ValueError: tau is not above 0, or not finite.

    Example:
        >>> layer = GumbelSoftmax(hard=True)
        >>> layer.tau = 0.5
        >>> y = layer(torch.zeros(3, 4))
        >>> y.sum(-1)
        tensor([1., 1., 1.])
    """

    def __init__(self, tau: float = 1.0, hard: bool = False, dim: int = -1) -> None:
        super().__init__()
        _check_number("GumbelSoftmax", "tau", tau, above=True)
        self.tau, self.hard, self.dim = float(tau), hard, dim

    def extra_repr(self) -> str:
        return f"tau={self.tau}, hard={self.hard}, dim={self.dim}"

    def forward(
        self, logits: Tensor, *, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw from the classes of given logits.

        Args:
            logits: unnormalised log-probabilities, any shape.
            noise: standard Gumbel numbers of that shape, instead of drawn ones.
            generator: where the noise is drawn from; the device's default generator otherwise.

        Returns:
            Of logits' shape; sums to 1 over `dim`.
        """
        return ops.gumbel_softmax(logits, self.tau, self.hard, self.dim, noise=noise, generator=generator)


class VectorQuantizer(torch.nn.Module):
    """Replace each vector by the nearest one of a learned codebook (VQ-VAE).

    Van den Oord, Vinyals and Kavukcuoglu 2017 (arXiv 1711.00937): eq. 1 to 3, and appendix A for the codebook that
    follows the exponentially moving averages of what took each code. The gradient of what comes out goes to what came
    in, unchanged.

    In training a batch is quantised first, and then the codebook moves. ``cluster_size`` and ``embed_sum`` hold the
    raw averages, which begin at 0; a code becomes ``embed_sum / cluster_size``, where Laplace smoothing keeps the
    divisor away from 0. A code that no vector of the batch took stays where it is. A code that vectors with NaN or
    infinity took is left alone by that batch.

    Under `torch.distributed` the statistics of all processes are added up and the vectors that replace dead codes are
    those of rank 0, so that the codebook is the same everywhere. So all processes have to run a training step together.

    Args:
        num_embeddings: number of codes K.
        embedding_dim: D.
        commitment_weight: weight of the loss that draws the vectors to their codes.
        decay: of the averages.
        eps: of the smoothing, in units of a count.
        ema: whether the codebook follows the averages; otherwise it is a parameter with a loss of its own (eq. 3).
        dead_code_threshold: a code that fewer vectors take than this many a batch (by its average, corrected for its
            start at 0) is replaced by one of the batch's vectors, chosen at random from torch's default generator. So
            the first batch initialises what it does not use. None leaves dead codes as they are.
        channel_last: vectors lie in the last dimension; otherwise in dimension 1, as a convolution has them.

    Attributes:
        codebook: ``[K, D]``; a buffer with `ema`, else a parameter. Standard normals at first.
        cluster_size: ``[K]``, average number of vectors that took each code; with `ema`.
        embed_sum: ``[K, D]``, average sum of those vectors; with `ema`.
        num_updates: int64 ``[]``, how many batches the averages have seen; with `ema`.

    Raises:
        TypeError: a size is no int, or an option no number.
        ValueError: a size below 1, an option out of its range, or dead_code_threshold without `ema`.

    Example:
        >>> layer = VectorQuantizer(16, 4, channel_last=False)
        >>> quantized, indices, loss = layer(torch.randn(2, 4, 7, 7))
        >>> quantized.shape, indices.shape, loss.shape
        (torch.Size([2, 4, 7, 7]), torch.Size([2, 7, 7]), torch.Size([]))
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
        ema: bool = True,
        dead_code_threshold: float | None = None,
        channel_last: bool = True,
    ) -> None:
        super().__init__()
        num_embeddings = _check_size("VectorQuantizer", "num_embeddings", num_embeddings)
        embedding_dim = _check_size("VectorQuantizer", "embedding_dim", embedding_dim)
        _check_number("VectorQuantizer", "commitment_weight", commitment_weight)
        _check_number("VectorQuantizer", "eps", eps)
        _check_number("VectorQuantizer", "decay", decay)
        if not decay < 1.0:
            raise ValueError(f"VectorQuantizer: decay must be in [0, 1), got {decay}")
        if dead_code_threshold is not None:
            _check_number("VectorQuantizer", "dead_code_threshold", dead_code_threshold)
            if not ema:
                raise ValueError("VectorQuantizer: dead_code_threshold needs the averages that ema=True keeps")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_weight, self.decay, self.eps = float(commitment_weight), float(decay), float(eps)
        self.ema, self.dead_code_threshold, self.channel_last = ema, dead_code_threshold, channel_last
        codebook = torch.randn(num_embeddings, embedding_dim)
        if ema:
            self.register_buffer("codebook", codebook)
            self.register_buffer("cluster_size", torch.zeros(num_embeddings))
            self.register_buffer("embed_sum", torch.zeros(num_embeddings, embedding_dim))
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        else:
            self.codebook = torch.nn.Parameter(codebook)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Averages move by less than half types can tell: they stay in float32 when the module is converted.
        for name in ("cluster_size", "embed_sum") if self.ema else ():
            average = getattr(self, name)
            if average.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, average.float())
        return self

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, commitment_weight={self.commitment_weight}"]
        parts += [f"decay={self.decay}", f"ema={self.ema}", f"dead_code_threshold={self.dead_code_threshold}"]
        return ", ".join([*parts, f"channel_last={self.channel_last}"])

    def _vectors(self, x: Tensor) -> Tensor:
        """The input with its vectors in the last dimension."""
        if not isinstance(x, Tensor):
            raise TypeError(f"VectorQuantizer: x must be a Tensor, got {type(x).__name__}")
        place = -1 if self.channel_last else 1
        if x.dim() < (1 if self.channel_last else 2) or x.size(place) != self.embedding_dim:
            want = f"[..., {self.embedding_dim}]" if self.channel_last else f"[B, {self.embedding_dim}, ...]"
            raise RuntimeError(f"VectorQuantizer: x must be {want}, got {list(x.shape)}")
        return x if self.channel_last else x.movedim(1, -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise, and in training let the codebook follow.

        Args:
            x: ``[..., D]``, or ``[B, D, *]`` without `channel_last`.

        Returns:
            ``(quantized, indices, loss)``: quantized of x's shape; indices int64, of x's shape without D; loss a
            scalar, the mean over vectors and their D components: ``commitment_weight * (x - sg(code))^2``, and without
            `ema` ``(sg(x) - code)^2`` more.

        Raises:
            TypeError: x is no Tensor.
            RuntimeError: x has another shape.
        """
        vectors = self._vectors(x)
        learning = self.ema and self.training
        # Backward needs the codes as they were, and the buffer is about to be written to.
        codebook = self.codebook.clone() if learning else self.codebook
        quantized, indices, loss = ops.vector_quantize(
            vectors,
            codebook,
            commitment_weight=self.commitment_weight,
            codebook_weight=0.0 if self.ema else 1.0,
        )
        if learning:
            self._update(vectors.detach(), indices)
        if not self.channel_last:
            quantized = quantized.movedim(-1, 1)
        return quantized, indices, loss.mean() / self.embedding_dim

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The indices of the nearest codes, int64, as `forward` finds them; the codebook stays as it is, in training
        too."""
        found: Tensor = ops.vector_quantize(self._vectors(x), self.codebook).indices
        return found

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of given indices ``[*]``: ``[*, D]``, or ``[B, D, *]`` without `channel_last`."""
        codes = torch.nn.functional.embedding(indices, self.codebook)
        return codes if self.channel_last else codes.movedim(-1, 1)

    @torch.no_grad()
    def _update(self, vectors: Tensor, indices: Tensor) -> None:
        """One step of the averages, and the codebook that follows from them (appendix A of the paper).

        Whatever depends on values is arithmetic with masks: nothing waits for the device.
        """
        counts, sums = ops.vector_quantize_statistics(vectors, indices, self.num_embeddings)
        distributed = _several_processes()
        if distributed:
            both = torch.cat([counts.unsqueeze(1), sums], 1)
            torch.distributed.all_reduce(both)
            counts, sums = both[:, 0], both[:, 1:]
        unfit = ~sums.isfinite().all(-1)
        counts = counts.masked_fill(unfit, 0.0).to(self.cluster_size.dtype)
        sums = sums.masked_fill(unfit.unsqueeze(-1), 0.0).to(self.embed_sum.dtype)

        self.num_updates += 1
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1.0 - self.decay)
        self.embed_sum.mul_(self.decay).add_(sums, alpha=1.0 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) * (total / (total + self.num_embeddings * self.eps))
        # The averages of an unused code shrink alike: without smoothing it would stay, with it, it would drift to 0.
        taken = (counts > 0).unsqueeze(-1)
        self.codebook.copy_(torch.where(taken, self.embed_sum / smoothed.unsqueeze(-1), self.codebook))
        if self.dead_code_threshold is not None:
            # An average that began at 0 is short of the true one by 1 - decay^updates.
            threshold = self.dead_code_threshold * (1.0 - self.decay**self.num_updates)
            self._replace_dead_codes(vectors.reshape(-1, self.embedding_dim), threshold, total, distributed)

    def _replace_dead_codes(self, vectors: Tensor, threshold: Tensor, total: Tensor, distributed: bool) -> None:
        count, codes = vectors.size(0), self.num_embeddings
        if count >= codes:  # each vector once: two codes in one place would be one code
            fresh = vectors[torch.randperm(count, device=vectors.device)[:codes]]
        elif count > 0:
            fresh = vectors[torch.randint(count, (codes,), device=vectors.device)]
        else:
            fresh = self.codebook
        fresh = fresh.to(self.codebook.dtype, copy=True)
        if distributed:  # rank 0's; as a sum, because torch.compile does not trace broadcast
            if torch.distributed.get_rank() > 0:
                fresh.zero_()
            torch.distributed.all_reduce(fresh)
        dead = (self.cluster_size < threshold) & fresh.isfinite().all(-1)
        # It starts as a code of average use, so that it has some batches' time to find vectors.
        start = torch.maximum(total / codes, threshold.to(total.dtype))
        self.cluster_size.copy_(torch.where(dead, start, self.cluster_size))
        dead = dead.unsqueeze(-1)
        self.embed_sum.copy_(torch.where(dead, fresh * start, self.embed_sum))
        self.codebook.copy_(torch.where(dead, fresh, self.codebook))


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
