"""Linear invertible layers: per-channel scales, invertible matrices, permutations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfuse import ops
from genfuse.nn.sampling import _check_size, _several_processes

from .base import Transform, zero_log_det

__all__ = ["ActNorm", "InvertibleConv2d", "LULinear", "Permutation"]

_functorch_top = torch._C._functorch.peek_interpreter_stack


def check_channels(module: str, x: Tensor, channels: int, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{module}: {argument} must be a Tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.size(1) != channels:
        raise ValueError(f"{module}: {argument} must be [B, {channels}, ...], got {list(x.shape)}")


class ActNorm(Transform):
    """A scale and a bias for each channel, which the first batch sets: after it, channels have mean 0 and variance 1.

    ``z = x e^log_scale + bias``. Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.1.

    The first batch that `forward` sees in training mode sets the parameters, with or without gradients, and no later
    one does, nor after loading a state_dict of a model that had its first batch (the buffer `initialized`). Whether the
    layer has had it is remembered in Python, too, so no step waits for the device. In eval mode, and by `inverse`,
    nothing is set; until then both are the identity. With several processes (`torch.distributed`) the batch is that of
    all of them, and all have the same parameters. A channel that is constant gets the scale 1 / 1e-6.

    Under `torch.compile` the first batch has a graph of its own, without a break. Give it to the layer before compiling
    and there is one graph only.

    Args:
        num_features: channels C of x ``[B, C, *]``.

    Raises:
        TypeError: num_features is no int, x no Tensor.
        ValueError: num_features is below 1, or x has other channels.

    Example:
        >>> layer = ActNorm(3)
        >>> z, log_abs_det = layer(5.0 + 2.0 * torch.randn(1000, 3))
        >>> bool(z.mean().abs() < 1e-4), bool((z.std() - 1).abs() < 1e-2), log_abs_det.shape
        (True, True, torch.Size([1000]))
    """

    initialized: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = _check_size("ActNorm", "num_features", num_features)
        self.log_scale = torch.nn.Parameter(torch.zeros(self.num_features))
        self.bias = torch.nn.Parameter(torch.zeros(self.num_features))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._ready = False

    def extra_repr(self) -> str:
        return str(self.num_features)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initialized.is_meta:
            self._ready = bool(self.initialized)

    def initialize(self, x: Tensor) -> None:
        """Set the parameters by a batch, whatever the mode and whether they were set before.

        Args:
            x: ``[B, C, *]``, of all processes together. Where there are no numbers in it nothing is set.
        """
        check_channels("ActNorm", x, self.num_features)
        self._initialize(x, anew=True)

    @torch.no_grad()
    def _initialize(self, x: Tensor, anew: bool) -> None:
        values = x.detach().transpose(0, 1).flatten(1).double()
        count = values.new_full((1,), values.size(1))
        total = values.sum(1)
        several = _several_processes()
        if several:
            both = torch.cat([count, total])
            torch.distributed.all_reduce(both)
            count, total = both[:1], both[1:]
        elif values.size(1) == 0:
            return
        # No process may stay behind, so an empty batch of all is told by its count.
        some = count > 0
        mean = total / count.clamp(min=1.0)
        square = (values - mean.unsqueeze(1)).square().sum(1)  # of differences: squares less their mean would cancel
        if several:
            torch.distributed.all_reduce(square)
        scale = 1.0 / ((square / count.clamp(min=1.0)).sqrt() + 1e-6)
        if not anew:  # the buffer may have been copied from a layer that was set, which nothing tells
            some = some & ~self.initialized
        self.log_scale.copy_(torch.where(some, scale.log(), self.log_scale.double()))
        self.bias.copy_(torch.where(some, -mean * scale, self.bias.double()))
        self.initialized.logical_or_(some.squeeze(0))
        self._ready = bool(self.initialized) if several else True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("ActNorm", x, self.num_features)
        if self.training and not self._ready:
            self._initialize(x, anew=False)
        return ops.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("ActNorm", z, self.num_features, "z")
        return ops.actnorm(z, self.log_scale, self.bias, inverse=True)


class _Remembered:
    """A value computed of tensors, until they change.

    What torch counts as a change is seen on every device (in-place writes, other tensors, other storage). Writes
    through ``.data`` or NumPy are not counted; on CPU the numbers are compared, too, so they are seen there.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.copies: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.value: Any = None

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _functorch_top() is not None
            or any(tensor.is_inference() for tensor in tensors)
        ):
            return compute()
        key = [(id(tensor), tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if self.key == key and all(
            not tensor.is_cpu or torch.equal(tensor, copy) for tensor, copy in zip(tensors, self.copies, strict=True)
        ):
            return self.value
        # The second keeps the storage, so that no other tensor can come to lie at its address.
        self.key, self.copies = key, [tensor.clone() if tensor.is_cpu else tensor.detach() for tensor in tensors]
        self.kept = [tensor.detach() for tensor in tensors]
        self.value = compute()
        return self.value

    def __deepcopy__(self, memo: Any) -> _Remembered:
        return _Remembered()

    def __reduce__(self) -> Any:
        return _Remembered, ()


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _Matrix(Transform):
    """An invertible matrix over channels: P (L + 1) (U + diag(sign e^log_s)), or just a weight."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int, start: Tensor, lu: bool) -> None:
        super().__init__()
        self.lu = bool(lu)
        self._assembled, self._inverted = _Remembered(), _Remembered()
        if not self.lu:
            self.weight = torch.nn.Parameter(start)
            return
        p, lower, upper = torch.linalg.lu(start.double())
        diagonal = upper.diagonal()
        self.register_buffer("permutation", p.argmax(1))  # row i of the product is row permutation[i] of L U
        self.register_buffer("sign", diagonal.sign().to(start.dtype))
        self.lower = torch.nn.Parameter(lower.tril(-1).to(start.dtype))
        self.upper = torch.nn.Parameter(upper.triu(1).to(start.dtype))
        self.log_s = torch.nn.Parameter(diagonal.abs().log().to(start.dtype))

    def _sources(self) -> list[Tensor]:
        return [self.lower, self.upper, self.log_s, self.permutation, self.sign] if self.lu else [self.weight]

    def _assemble(self) -> Tensor:
        """The matrix, float32 or wider."""
        if not self.lu:
            return at_least_float32(self.weight)
        lower, upper, log_s = (at_least_float32(part) for part in (self.lower, self.upper, self.log_s))
        upper = upper.triu(1) + torch.diag_embed(self.sign.to(log_s.dtype) * log_s.exp())
        weight: Tensor = torch.addmm(upper, lower.tril(-1), upper).index_select(0, self.permutation)
        return weight

    def _matrix(self) -> Tensor:
        weight: Tensor = self._assembled.get(self._sources(), self._assemble_exactly)
        return weight

    def _assemble_exactly(self) -> Tensor:
        with torch.autocast(self._sources()[0].device.type, enabled=False):
            return self._assemble()

    def _matrix_inverse(self) -> Tensor:
        """Of the matrix as it is used, by float64: in float32, the error at 48 channels is what limits the flow."""

        def compute() -> Tensor:
            weight = self._assemble_exactly()
            found: Tensor = torch.linalg.inv(weight.double()).to(weight.dtype)
            return found

        inverse: Tensor = self._inverted.get(self._sources(), compute)
        return inverse

    def _log_det(self) -> Tensor:
        """ln |det| of the matrix, a scalar."""
        if self.lu:
            return at_least_float32(self.log_s).sum()
        weight = at_least_float32(self.weight)
        log_det: Tensor = torch.linalg.slogdet(weight.double())[1].to(weight.dtype)
        return log_det


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A matrix over the channels of ``[B, C, *]``, in float32 or wider whatever autocast says: an inverse in half
    precision would not be one."""
    with torch.autocast(x.device.type, enabled=False):
        wide = at_least_float32(x)
        dtype = torch.promote_types(wide.dtype, weight.dtype)
        wide, weight = wide.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        y = F.linear(wide, weight, bias) if x.dim() == 2 else ops.conv1x1(wide, weight, bias)
        return y.to(x.dtype)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A product that autocast does not touch."""
    with torch.autocast(matrix.device.type, enabled=False):
        return matrix @ vector.to(matrix.dtype)


def positions(x: Tensor) -> int:
    return math.prod(x.shape[2:])


class InvertibleConv2d(_Matrix):
    """An invertible 1x1 convolution: a learned mixing of channels, in place of a permutation.

    Kingma and Dhariwal 2018 (arXiv 1807.03039), section 3.2. With `lu` the weight is ``P L (U + diag(s))`` with a fixed
    permutation P and signs of s (eq. 10), and ``log_abs_det`` the sum of ``log |s|`` times the number of positions;
    otherwise any matrix, whose determinant is computed in float64. It starts as a random rotation. The weight and, in
    float64, its inverse are computed once while parameters stay as they are and no gradient is wanted. Autocast does
    not touch it.

    Args:
        channels: C of x ``[B, C]`` or ``[B, C, *]`` with any number of further dimensions.
        lu: by the factors.

    Raises:
        TypeError: channels is no int, x no Tensor.
        ValueError: channels is below 1, or x has other channels.

    Example:
        >>> layer = InvertibleConv2d(4)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> z, log_abs_det = layer(x)
        >>> bool((layer.inverse(z)[0] - x).abs().max() < 1e-5), log_abs_det.shape
        (True, torch.Size([2]))
    """

    def __init__(self, channels: int, *, lu: bool = True) -> None:
        channels = _check_size("InvertibleConv2d", "channels", channels)
        super().__init__(channels, torch.linalg.qr(torch.randn(channels, channels))[0], lu)
        self.channels = channels

    def extra_repr(self) -> str:
        return f"{self.channels}, lu={self.lu}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("InvertibleConv2d", x, self.channels)
        return multiply(x, self._matrix(), None), (positions(x) * self._log_det()).expand(x.size(0))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("InvertibleConv2d", z, self.channels, "z")
        return multiply(z, self._matrix_inverse(), None), (-positions(z) * self._log_det()).expand(z.size(0))


class LULinear(_Matrix):
    """An invertible linear map ``z = W x + bias`` of vectors, by W's triangular factors.

    Durkan et al. 2019 (arXiv 1906.04032), section 4.1, who have one between any two couplings: ``W = L (U + diag(s))``
    with ones on L's diagonal.

    Args:
        features: D of x ``[B, D]`` (or channels of ``[B, D, *]``).
        bias: learn one.
        identity_init: start as the identity; otherwise as a random rotation, whose pivoting adds a permutation.

    Raises:
        TypeError: features is no int, x no Tensor.
        ValueError: features is below 1, or x has other features.

    Example:
        >>> layer = LULinear(4)
        >>> x = torch.randn(5, 4)
        >>> z, log_abs_det = layer(x)
        >>> bool(torch.equal(z, x)), log_abs_det
        (True, tensor([0., 0., 0., 0., 0.], grad_fn=<ExpandBackward0>))
    """

    def __init__(self, features: int, *, bias: bool = True, identity_init: bool = True) -> None:
        features = _check_size("LULinear", "features", features)
        start = torch.eye(features) if identity_init else torch.linalg.qr(torch.randn(features, features))[0]
        super().__init__(features, start, True)
        self.features = features
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(features)) if bias else None)

    bias: torch.nn.Parameter | None

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("LULinear", x, self.features)
        return multiply(x, self._matrix(), self.bias), (positions(x) * self._log_det()).expand(x.size(0))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_channels("LULinear", z, self.features, "z")
        log_abs_det = (-positions(z) * self._log_det()).expand(z.size(0))
        inverse, bias = self._matrix_inverse(), None
        if self.bias is not None:  # W^-1 (z - b): one product and no copy of z
            bias = -times(inverse, self.bias)
        return multiply(z, inverse, bias), log_abs_det


class Permutation(Transform):
    """A fixed permutation of a dimension: ``z[i] = x[permutation[i]]``.

    Args:
        features: size of the dimension.
        permutation: ``"reverse"``, ``"random"`` (drawn here and kept in the state_dict), or the indices themselves.
        dim: which dimension of x; not the batch's.

    Raises:
        TypeError: features or dim is no int.
        ValueError: features is below 1, dim is 0, the indices are no permutation, or x has another size there.

    Example:
        >>> Permutation(3, [2, 0, 1])(torch.tensor([[5.0, 6.0, 7.0]]))
        (tensor([[7., 5., 6.]]), tensor([0.]))
    """

    permutation: Tensor
    back: Tensor

    def __init__(self, features: int, permutation: str | Sequence[int] | Tensor = "random", *, dim: int = 1) -> None:
        super().__init__()
        self.features = _check_size("Permutation", "features", features)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"Permutation: dim must be an int, got {type(dim).__name__}")
        if dim == 0:
            raise ValueError("Permutation: dim 0 is the batch's")
        self.dim = dim
        if isinstance(permutation, str):
            if permutation not in ("reverse", "random"):
                raise ValueError(
                    f"Permutation: permutation must be 'reverse', 'random' or indices, got {permutation!r}"
                )
            order = torch.arange(self.features).flip(0) if permutation == "reverse" else torch.randperm(self.features)
        else:
            order = torch.as_tensor(permutation, dtype=torch.int64).clone()
            if order.shape != (self.features,) or not torch.equal(order.sort().values, torch.arange(self.features)):
                want = f"the numbers from 0 to {self.features - 1}"
                raise ValueError(f"Permutation: permutation must hold {want}, got {order.tolist()}")
        self.register_buffer("permutation", order)
        self.register_buffer("back", order.argsort(), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.back = self.permutation.argsort()

    def _permute(self, x: Tensor, order: Tensor, argument: str) -> tuple[Tensor, Tensor]:
        if x.dim() <= self.dim or x.size(self.dim) != self.features:
            want = f"{self.features} in dimension {self.dim}"
            raise ValueError(f"Permutation: {argument} must have {want}, got {list(x.shape)}")
        return x.index_select(self.dim, order), zero_log_det(x)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._permute(x, self.permutation, "x")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._permute(z, self.back, "z")
