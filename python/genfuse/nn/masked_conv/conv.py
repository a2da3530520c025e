"""The masked convolution as a layer: `torch.nn.Conv2d` that cannot see the future."""

from __future__ import annotations

import torch
from torch import Tensor

from genfuse import ops
from genfuse.ops.masked_conv.conv import check_mask

__all__ = ["MaskedConv2d"]


class MaskedConv2d(torch.nn.Conv2d):
    """A convolution that sees only the pixels before its own in raster order: `ops.masked_conv2d` with parameters.

    Van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv 1601.06759), section 3.4. Arguments, parameters, their
    initialisation and the state_dict are those of `torch.nn.Conv2d`; the dead part of the weight is there, is never
    read and has a gradient of exactly 0. A state_dict of a layer that multiplies its weight by a mask gives the same
    function, if its mask is one of these.

    Args:
        mask_type: "A", "B", "vertical_A" (or "vertical"), "vertical_B", "horizontal_A" (or "horizontal") or
            "horizontal_B": see `ops.masked_conv2d`. The first layer of a model, on the image itself, is of type A.
        in_channels, out_channels: I and O.
        kernel_size: odd, one number or ``(kh, kw)``.
        stride: 1.
        padding: zeros on each side; "same", unlike `torch.nn.Conv2d`'s 0, keeps the size.
        dilation, groups, bias, device, dtype: as of `torch.nn.Conv2d`.
        padding_mode: "zeros".
        channel_groups: into how many groups the channels of both sides fall: 3 for RGB.
        channel_order: "contiguous", thirds of the channels, or "interleaved", every third channel.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an unknown mask, an even kernel, another stride or padding mode; what `torch.nn.Conv2d` refuses.

    Example:
        >>> layer = MaskedConv2d("A", 1, 8, 7)
        >>> layer(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 8, 28, 28])
    """

    def __init__(
        self,
        mask_type: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channel_groups: int = 1,
        channel_order: str = "contiguous",
    ) -> None:
        check_mask("MaskedConv2d", mask_type, channel_groups, channel_order)
        if stride not in (1, (1, 1), [1, 1]):
            raise ValueError(f"MaskedConv2d: stride must be 1, got {stride!r}")
        if padding_mode != "zeros":
            raise ValueError(f"MaskedConv2d: padding_mode must be 'zeros', got {padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, 1, padding, dilation, groups, bias, "zeros", device, dtype
        )
        if any(size % 2 == 0 for size in self.kernel_size):
            raise ValueError(f"MaskedConv2d: kernel_size must be odd, got {kernel_size!r}")
        self.mask_type = mask_type
        self.channel_groups = channel_groups
        self.channel_order = channel_order

    def extra_repr(self) -> str:
        more = f", channel_groups={self.channel_groups}, channel_order={self.channel_order!r}"
        inherited: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{self.mask_type!r}, {inherited}{more if self.channel_groups > 1 else ''}"

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding if isinstance(self.padding, str) else (self.padding[0], self.padding[1])
        return ops.masked_conv2d(
            input,
            self.weight,
            self.bias,
            self.mask_type,
            channel_groups=self.channel_groups,
            channel_order=self.channel_order,
            padding=padding,
            dilation=(self.dilation[0], self.dilation[1]),
            groups=self.groups,
        )
