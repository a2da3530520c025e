"""What the autoregressive image models share: images and levels, likelihoods of pixels, and sampling pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from genfuse import ops
from genfuse.ops.masked_conv import PixelProgram
from genfuse.ops.operator import can_look_at
from genfuse.reference.masked_conv import live_taps
from genfuse.reference.random import draw_rng

__all__ = ["AutoregressiveImageModel"]

PixelLikelihood = Literal["bernoulli", "categorical", "mixture"]
_INTEGERS = (torch.uint8, torch.int64, torch.int32, torch.bool)
_MODES = ("exact", "openai")
_ORDERS = ("contiguous", "interleaved")


class AutoregressiveImageModel(torch.nn.Module):
    r"""Base of the autoregressive image models; not a model itself.

    .. math:: p(x) = \prod_i p(x_i \mid x_{<i})

    over pixels in raster order, each given those above it and to its left (van den Oord et al. 2016, arXiv 1601.06759,
    eq. 1). A model has a `network` from images to the parameters of its head, in which no parameter of a pixel depends
    on that pixel or a later one; the rest is here.

    Images are ``[B, C, H, W]``: floating in [0, 1], where level l of L is l / (L - 1) (to the nearest level), or the
    levels themselves as uint8, int64, int32 or bool.

    Attributes:
        config: the constructor's arguments, which JSON can hold: ``type(model)(**model.config)`` is the same model
            with fresh weights.
        in_channels, image_size: C and (H, W).
        levels: how many values a pixel's channel has.
        likelihood: "bernoulli" for two levels; "categorical", with a probability for each level of each channel, which
            are predicted one after the other; or "mixture", of discretized logistics, for all channels together.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int | Sequence[int],
        levels: int,
        *,
        num_classes: int | None = None,
        nr_logistic_mix: int | None = None,
        mode: str = "exact",
        channel_order: str = "contiguous",
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.in_channels = self._check_size("in_channels", in_channels)
        if isinstance(image_size, Sequence) and not isinstance(image_size, (str, bytes)):
            if len(image_size) != 2:
                raise ValueError(f"{self.name}: image_size must be an int or (height, width), got {list(image_size)}")
            height, width = image_size
        else:
            height = width = image_size  # type: ignore[assignment]
        self.image_size = self._check_size("image_size", height), self._check_size("image_size", width)
        self.levels = self._check_size("levels", levels, 2)
        self.num_classes = None if num_classes is None else self._check_size("num_classes", num_classes)
        self.nr_logistic_mix = None if nr_logistic_mix is None else self._check_size("nr_logistic_mix", nr_logistic_mix)
        if mode not in _MODES:
            raise ValueError(f"{self.name}: mode must be 'exact' or 'openai', got {mode!r}")
        if channel_order not in _ORDERS:
            raise ValueError(f"{self.name}: channel_order must be 'contiguous' or 'interleaved', got {channel_order!r}")
        self.mode, self.channel_order = mode, channel_order
        self.likelihood: PixelLikelihood = "categorical"
        if self.levels == 2:
            self.likelihood = "bernoulli"
        elif self.nr_logistic_mix is not None:
            self.likelihood = "mixture"
            if self.in_channels not in (1, 3):
                raise ValueError(f"{self.name}: a mixture of logistics has 1 or 3 channels, got {self.in_channels}")
            if self.levels & (self.levels - 1) or self.levels > 65536:
                raise ValueError(
                    f"{self.name}: levels must be a power of two up to 65536 for a mixture of logistics, "
                    f"got {self.levels}"
                )
        self.config: dict[str, Any] = {}

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    def _check_size(self, argument: str, size: object, least: int = 1) -> int:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{self.name}: {argument} must be an int, got {type(size).__name__}")
        found = int(size.__index__())
        if found < least:
            raise ValueError(f"{self.name}: {argument} must be at least {least}, got {found}")
        return found

    def _check_sizes(self, argument: str, sizes: object) -> tuple[int, ...]:
        if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
            raise TypeError(f"{self.name}: {argument} must be a sequence of ints, got {type(sizes).__name__}")
        return tuple(self._check_size(argument, size) for size in sizes)

    def _check_kernel(self, argument: str, size: object, least: int = 1) -> int:
        found = self._check_size(argument, size, least)
        if found % 2 == 0:
            raise ValueError(f"{self.name}: {argument} must be odd, got {found}")
        return found

    def _check_dropout(self, dropout: object) -> float:
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"{self.name}: dropout must be a number, got {type(dropout).__name__}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"{self.name}: dropout must be in [0, 1), got {dropout}")
        return float(dropout)

    @property
    def outputs(self) -> int:
        """Channels of the head."""
        if self.likelihood == "mixture":
            assert self.nr_logistic_mix is not None
            return (10 if self.in_channels == 3 else 3) * self.nr_logistic_mix
        return self.in_channels * (1 if self.likelihood == "bernoulli" else self.levels)

    @property
    def draws(self) -> int:
        """How many uniforms a pixel takes: one for each channel, and one for the component of a mixture."""
        return self.in_channels + int(self.likelihood == "mixture")

    @property
    def _like(self) -> Tensor:
        return next(self.parameters())

    def _images(self, x: Tensor, argument: str = "x") -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: {argument} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1:] != (self.in_channels, *self.image_size):
            want = ", ".join(map(str, (self.in_channels, *self.image_size)))
            raise ValueError(f"{self.name}: {argument} must be [B, {want}], got {list(x.shape)}")
        if not x.is_floating_point() and x.dtype not in _INTEGERS:
            raise TypeError(f"{self.name}: {argument} must be floating, in [0, 1], or whole levels; got {x.dtype}")
        return x

    def _classes(self, labels: Tensor | int | None, batch: int) -> Tensor | None:
        """int64 labels, one for each image."""
        if self.num_classes is None:
            if labels is not None:
                raise ValueError(f"{self.name}: labels were given, and the model was built without num_classes")
            return None
        if labels is None:
            raise ValueError(f"{self.name}: labels must be [{batch}] of the {self.num_classes} classes, got None")
        if isinstance(labels, int) and not isinstance(labels, bool):
            if not 0 <= labels < self.num_classes:
                raise ValueError(f"{self.name}: labels must be below the {self.num_classes} classes, got {labels}")
            return torch.full((batch,), labels, dtype=torch.int64, device=self._like.device)
        if not isinstance(labels, Tensor):
            raise TypeError(f"{self.name}: labels must be a Tensor or an int, got {type(labels).__name__}")
        if labels.is_floating_point() or labels.dtype not in _INTEGERS[:3]:
            raise TypeError(f"{self.name}: labels must be whole numbers, got {labels.dtype}")
        if labels.shape != (batch,):
            raise ValueError(f"{self.name}: labels must be [{batch}], got {list(labels.shape)}")
        if can_look_at(labels) and not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(
                f"{self.name}: labels must be of the {self.num_classes} classes from 0 on, got {labels.tolist()}"
            )
        return labels.long()

    # ---- levels ------------------------------------------------------------------------------------------------------

    def _scaled(self, x: Tensor) -> Tensor:
        """What the network sees: values in [-1, 1] in the parameters' dtype, channels last."""
        scale = 2.0 if x.is_floating_point() else 2.0 / (self.levels - 1)
        return (x.to(self._like.dtype) * scale - 1.0).contiguous(memory_format=torch.channels_last)

    def _check_levels(self, x: Tensor) -> None:
        """Refuse what is no level, where one may look: a likelihood of it would be a number all the same."""
        most = 1.0 if x.is_floating_point() else self.levels - 1
        if not can_look_at(x) or bool(((x >= 0) & (x <= most)).all()):
            return
        wrong = x[~((x >= 0) & (x <= most))][0].item()
        raise IndexError(
            f"{self.name}: x must be floating in [0, 1], or whole levels from 0 to {self.levels - 1}; got {wrong:g} of "
            f"{x.dtype}"
        )

    def _levels_of(self, x: Tensor) -> Tensor:
        """int64 levels."""
        return (x * (self.levels - 1)).round().long() if x.is_floating_point() else x.long()

    # ---- likelihoods -------------------------------------------------------------------------------------------------

    def network(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """The head's channels ``[B, outputs, H, W]`` of images in [-1, 1] and checked labels."""
        raise NotImplementedError

    def _shaped(self, out: Tensor) -> Tensor:
        if self.likelihood != "categorical":
            return out
        if self.channel_order == "contiguous":
            return out.view(out.size(0), self.in_channels, self.levels, *out.shape[2:])
        return out.view(out.size(0), self.levels, self.in_channels, *out.shape[2:]).transpose(1, 2)

    def forward(self, x: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """Parameters of the distribution of each pixel, given those before it.

        Args:
            x: ``[B, C, H, W]``, floating in [0, 1] or whole levels.
            labels: whole numbers ``[B]``, or one for all, of a model with classes.

        Returns:
            Bernoulli: logits ``[B, C, H, W]``. Categorical: logits ``[B, C, levels, H, W]``. Mixture: ``[B, 10 M, H,
            W]`` for three channels or ``[B, 3 M, H, W]`` for one, in the layout "openai" of
            `genfuse.ops.discretized_logistic_mixture_nll`.

        Raises:
            TypeError: x or labels is no Tensor, or of a dtype that is neither.
            ValueError: another shape, or labels missing, or superfluous.
        """
        x = self._images(x)
        return self._shaped(self.network(self._scaled(x), self._classes(labels, x.size(0))))

    def log_prob(self, x: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """ln p(x), ``[B]``, nats, float32 or wider. The arguments and errors are those of `forward`.

        Raises:
            IndexError: x is not within [0, 1], or has a level that the model does not have. (Of CPU tensors; nobody
                waits for a GPU to see.)
        """
        self._check_levels(self._images(x))
        out, levels = self(x, labels), self._levels_of(x)
        if self.likelihood == "bernoulli":
            nll = ops.bernoulli_nll(out, levels.to(out.dtype), batch_dims=1)
        elif self.likelihood == "categorical":
            nll = ops.categorical_nll(out, levels, dim=2)
        else:
            nll = ops.discretized_logistic_mixture_nll(levels, out, bits=self._bits, mode=self.mode)
        return -nll

    @property
    def _bits(self) -> int:
        return self.levels.bit_length() - 1

    def loss(self, x: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """What training minimises: the mean over the batch of -ln p(x), nats per image."""
        return -self.log_prob(x, labels).mean()

    def bits_per_dim(self, x: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """-log_2 p(x) for each of an image's C H W numbers: ``[B]``."""
        return -self.log_prob(x, labels) / (math.log(2.0) * self.in_channels * math.prod(self.image_size))

    # ---- samples -----------------------------------------------------------------------------------------------------

    def _build(self, program: PixelProgram, labels: Tensor | None) -> int:
        """The network as instructions; returns the head's value."""
        raise NotImplementedError

    @torch.no_grad()
    def program(self, labels: Tensor | int | None = None) -> PixelProgram:
        """The network, without dropout, as `genfuse.ops.ancestral_sample` runs it.

        Args:
            labels: of a model with classes, one for each image that is to be drawn: the program is for these images.
        """
        if isinstance(labels, Tensor) and labels.dim() == 1:
            labels = self._classes(labels, labels.size(0))
        else:
            labels = self._classes(labels, 1)
        together = self.likelihood == "mixture" or self.in_channels == 1
        program = PixelProgram(
            self.in_channels,
            *self.image_size,
            sub_pixels=1 if together else self.in_channels,
            scale=2.0 / (self.levels - 1),
            shift=-1.0,
        )
        out = self._build(program, labels)
        if self.likelihood == "bernoulli":
            program.bernoulli(out)
        elif self.likelihood == "categorical":
            inner = self.channel_order == "contiguous"
            program.categorical(out, self.levels, "level_inner" if inner else "level_outer")
        else:
            assert self.nr_logistic_mix is not None
            program.mixture(out, self.nr_logistic_mix, bits=self._bits)
        return program

    def _given(self, n: int | None, conditioned_on: Tensor | None) -> tuple[int, Tensor | None]:
        """How many images, and the levels that are known; -1 where they are not."""
        count = None if n is None else self._check_size("n", n, 0)
        if conditioned_on is None:
            if count is None:
                raise ValueError(f"{self.name}: n must be an int where there is no conditioned_on, got None")
            return count, None
        x = self._images(conditioned_on, "conditioned_on").detach()
        if count is not None and x.size(0) != count:
            raise ValueError(f"{self.name}: conditioned_on must be {count} images, got {list(x.shape)}")
        # Levels of what is below 0 are of no account; NaN is neither given nor to be drawn.
        known, most = x >= 0, 1.0 if x.is_floating_point() else self.levels - 1
        if not bool(((x < 0) | (known & (x <= most))).all()):
            raise ValueError(
                f"{self.name}: conditioned_on must be numbers up to {most}, or negative where it is to be drawn"
            )
        given = torch.where(known, self._levels_of(x.clamp(min=0)), -1)
        return x.size(0), given.to(self._like.device)

    def _uniforms(self, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
        like, shape = self._like, (n, self.draws, *self.image_size)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{self.name}: generator must be a torch.Generator or None, got {type(generator).__name__}")
        if u is None:
            seed, offset = draw_rng(like.device, generator).tolist()
            return ops.philox_uniform(shape, seed, offset, dtype=dtype, device=like.device)
        if not isinstance(u, Tensor):
            raise TypeError(f"{self.name}: u must be a Tensor, got {type(u).__name__}")
        if tuple(u.shape) != shape:
            raise ValueError(f"{self.name}: u must be {list(shape)}, got {list(u.shape)}")
        if not u.is_floating_point():
            raise TypeError(f"{self.name}: u must be floating, got {u.dtype}")
        return u

    @torch.no_grad()
    def sample(
        self,
        n: int | None = None,
        *,
        cached: bool = True,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
        labels: Tensor | int | None = None,
        conditioned_on: Tensor | None = None,
    ) -> Tensor:
        """Draw images pixel by pixel, each from its distribution given those drawn before it.

        The model draws as in eval mode, whatever its mode is, and keeps its mode.

        Args:
            n: how many; as many as conditioned_on if that is given alone.
            cached: compute each activation once, with `genfuse.ops.ancestral_sample`. Otherwise the naive loop runs
                `forward` on the whole image for every pixel. The same uniforms give the same pixels (but where a
                rounding decides).
            u: uniform numbers in [0, 1), ``[n, draws, H, W]``, instead of drawn ones.
            generator: where they are drawn from; the device's default generator otherwise.
            labels: whole numbers ``[n]``, or one for all, of a model with classes.
            conditioned_on: ``[n, C, H, W]``, floating in [0, 1] or levels: what is below 0 is to be drawn, the rest is
                kept. Pixels know of what comes before them only. A mixture draws the channels of a pixel together and
                then keeps those that are given.

        Returns:
            ``[n, C, H, W]`` in [0, 1], on the levels' grid.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: another shape, n below 0, a number outside of its range, or labels missing or superfluous.
            RuntimeError: the network gives no distribution (NaN or infinity) for some pixel.

        Example:
            >>> from genfuse import models
            >>> model = models.PixelCNN(image_size=6, channels=8, num_layers=2, kernel_size=3, levels=2)
            >>> half = torch.full((1, 1, 6, 6), -1.0)
            >>> half[:, :, :3] = 1.0
            >>> image = model.sample(conditioned_on=half)
            >>> image.shape, bool((image[:, :, :3] == 1.0).all())
            (torch.Size([1, 1, 6, 6]), True)
        """
        count, given = self._given(n, conditioned_on)
        classes = self._classes(labels, count)
        u = self._uniforms(count, u, generator)
        if cached:
            levels = ops.ancestral_sample(self.program(classes), count, u=u, given=given)
        else:
            with _evaluating(self):
                levels = self._naive(count, u, classes, given)
        dtype = self._like.dtype
        return levels.to(dtype) / (self.levels - 1)

    def complete(
        self,
        x: Tensor,
        rows: int | None = None,
        *,
        cached: bool = True,
        u: Tensor | None = None,
        generator: torch.Generator | None = None,
        labels: Tensor | int | None = None,
    ) -> Tensor:
        """Images whose first rows are those of x, and whose others are drawn.

        Args:
            x: ``[B, C, H, W]``, floating in [0, 1] or levels.
            rows: how many are kept; the upper half by default.
            cached, u, generator, labels: as of `sample`.

        Returns:
            ``[B, C, H, W]`` in [0, 1].

        Raises:
            TypeError, ValueError: as `sample`; rows is negative or more than there are; x has no levels in them.
        """
        x = self._images(x)
        height = self.image_size[0]
        kept = height // 2 if rows is None else self._check_size("rows", rows, 0)
        if kept > height:
            raise ValueError(f"{self.name}: rows must be at most {height}, got {kept}")
        most = 1.0 if x.is_floating_point() else self.levels - 1
        if not bool(((x >= 0) & (x <= most))[:, :, :kept].all()):
            raise ValueError(f"{self.name}: the rows of x that are kept must be numbers from 0 to {most}")
        # Levels in unsigned bytes or bits have no number below 0.
        known = x.clone() if x.is_floating_point() else x.long()
        known[:, :, kept:] = -1
        return self.sample(cached=cached, u=u, generator=generator, labels=labels, conditioned_on=known)

    def _naive(self, n: int, u: Tensor, labels: Tensor | None, given: Tensor | None) -> Tensor:
        shape = (n, self.in_channels, *self.image_size)
        levels = torch.zeros(shape, dtype=torch.int64, device=u.device)
        together = self.likelihood == "mixture"
        for y in range(shape[2]):
            for x in range(shape[3]):
                for channel in range(1 if together else self.in_channels):
                    which = slice(None) if together else slice(channel, channel + 1)
                    drawn = self._draw(self(levels, labels), u, y, x, which)
                    if given is not None:
                        known = given[:, which, y, x]
                        drawn = torch.where(known >= 0, known, drawn)
                    levels[:, which, y, x] = drawn
        return levels

    def _draw(self, out: Tensor, u: Tensor, y: int, x: int, which: slice) -> Tensor:
        """Levels ``[n, C]`` of a pixel, or ``[n, 1]`` of one of its channels."""
        pixel = out[..., y, x]
        if bool(pixel.isnan().any()) or (self.likelihood == "categorical" and bool((pixel == math.inf).any())):
            raise RuntimeError(f"{self.name}: the network gives no distribution (NaN or infinity) for some pixel")
        if self.likelihood == "bernoulli":
            return (u[:, which, y, x] < torch.sigmoid(out[:, which, y, x].to(u.dtype))).long()
        if self.likelihood == "categorical":
            return ops.categorical_sample(out[:, which, :, y, x], u=u[:, which, y, x])
        values = ops.discretized_logistic_mixture_sample(
            out[:, :, y : y + 1, x : x + 1], u=u[:, :, y : y + 1, x : x + 1], bits=self._bits
        )
        return ((values[:, :, 0, 0] + 1.0) * (0.5 * (self.levels - 1))).round().long()


# ---- what the models build their programs of -------------------------------------------------------------------------


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode, and then every module's own again."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training


def masked(layer: Any, halves: int = 1) -> tuple[Tensor, Tensor]:
    """The weight of a `genfuse.nn.MaskedConv2d` with zeros for what is dead in a live tap, and ``[kh, kw]``: which taps
    are alive.

    Of a layer with `halves`, each half of the outputs has the mask by itself.
    """
    weight: Tensor = layer.weight.detach()
    kernel = tuple(weight.shape[2:])
    if layer.channel_groups == 1:  # whole taps are alive or dead, and a program visits live ones only
        return weight, live_taps(layer.mask_type, 1, layer.channel_order, 1, 1, kernel)[0, 0]
    outputs = weight.size(0) // halves
    alive = live_taps(layer.mask_type, layer.channel_groups, layer.channel_order, outputs, weight.size(1), kernel).to(
        weight.device
    )
    alive = alive.repeat(halves, 1, 1, 1)
    return torch.where(alive, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)), alive.any(0).any(0)


def add_masked(
    program: PixelProgram,
    x: int,
    layer: Any,
    bias: Tensor | None,
    *,
    halves: int = 1,
    add: int | None = None,
    activation: str | None = None,
) -> int:
    """A masked convolution of odd kernel, the size kept."""
    weight, live = masked(layer, halves)
    offset = -(weight.size(2) // 2), -(weight.size(3) // 2)
    return program.conv(x, weight, bias, offset=offset, live=live, add=add, activation=activation)
