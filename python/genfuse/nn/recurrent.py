"""Recurrent layers that take the place of torch's of the same name.

Constructor arguments, parameters, state_dict keys, initialisation and errors of `LSTM`, `GRU`, `LSTMCell` and `GRUCell`
are torch's own; only `forward` is ours, one `genfuse.ops` call per layer and direction. `LSTM` and `GRU` derive from
`torch.nn.RNNBase`, not from torch's classes of their names, because `torch.compile` refuses to trace instances of
those. They also take the regularisers of the fused operators. On a device for which genfuse has no kernel of its own, a
plain layer is left to torch (on CUDA: cuDNN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from genfuse import backends, ops

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell", "LayerNormLSTM"]

_VF: Any = torch._VF
_forced_backend = backends.forced
_REGULARIZERS = ("zoneout_h", "zoneout_c", "weight_drop", "input_dropout", "output_dropout")


def _check_probabilities(**probabilities: float) -> None:
    for name, p in probabilities.items():
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"{name} must be a number in [0, 1], got {type(p).__name__}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{name} must be a number in [0, 1], got {p}")


def _check_states(name: str, hx: object, pair: bool) -> None:
    """Check what kind of thing `hx` is; for what is no pair, torch raises RuntimeError."""
    if pair and not isinstance(hx, (tuple, list)):
        raise TypeError(f"{name}: hx must be a pair (h_0, c_0) of Tensors, got {type(hx).__name__}")
    if pair and len(cast("Sequence[object]", hx)) != 2:
        raise RuntimeError(f"{name}: hx must be a pair (h_0, c_0), got {len(cast('Sequence[object]', hx))} elements")
    for index, state in enumerate(cast("Sequence[object]", hx) if pair else (hx,)):
        if not isinstance(state, Tensor):
            label = f"hx[{index}]" if pair else "hx"
            raise TypeError(f"{name}: {label} must be a Tensor, got {type(state).__name__}")


def _shift(resets: Tensor) -> Tensor:
    """Resets as the backward direction sees them: a sequence that begins at t ends, read from behind, before t - 1."""
    return torch.cat([resets[1:], torch.zeros_like(resets[:1])])


class _Stack(torch.nn.RNNBase):
    """What LSTM and GRU share: the walk over layers and directions."""

    zoneout_h: float
    zoneout_c: float
    weight_drop: float
    input_dropout: float
    output_dropout: float

    @property
    def _plain(self) -> bool:
        """Whether torch's own layer computes the same; asked anew, since the probabilities may be assigned to."""
        return not any(getattr(self, name) for name in _REGULARIZERS)

    def _set_regularizers(self, **probabilities: float) -> None:
        _check_probabilities(**probabilities)
        for name in _REGULARIZERS:
            setattr(self, name, float(probabilities.get(name, 0.0)))

    def extra_repr(self) -> str:
        extra = [f"{name}={getattr(self, name)}" for name in _REGULARIZERS if getattr(self, name) != 0.0]
        return ", ".join([super().extra_repr(), *extra])

    def _layer_weights(self, index: int) -> Sequence[Tensor]:
        """(w_ih, w_hh[, b_ih, b_hh][, w_hr]) of one layer and direction, wherever parametrisations have put them."""
        parameters = self._parameters
        names = self._all_weights[index]
        if names[-1] in parameters and names[0] in parameters and names[1] in parameters:
            return [cast(Tensor, parameters[name] if name in parameters else getattr(self, name)) for name in names]
        return [cast(Tensor, getattr(self, name)) for name in names]

    def _call(
        self,
        index: int,
        x: Tensor,
        states: Sequence[Tensor],
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        input_dropout: float,
        output_dropout: float,
    ) -> tuple[Tensor, ...]:
        """One layer in one direction: (y, *states)."""
        raise NotImplementedError

    def _torchs(
        self, x: Tensor, batch: int, states: Sequence[Tensor] | None, batch_sizes: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The whole stack by torch's operator (on CUDA: cuDNN)."""
        self._update_flat_weights()
        if states is None:
            count = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
            states = [torch.zeros(count, batch, size, dtype=x.dtype, device=x.device) for size in sizes]
        function = _VF.lstm if self.mode == "LSTM" else _VF.gru
        state = tuple(states) if self.mode == "LSTM" else states[0]
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if batch_sizes is not None:
            y, *last = function(x, batch_sizes, state, self._flat_weights, *options)
        else:
            y, *last = function(x, state, self._flat_weights, *options, False)
        return y, tuple(last)

    def _check(self, x: Tensor, states: Sequence[Tensor] | None, batch: int, packed: bool) -> None:
        """torch's checks, with torch's messages."""
        if x.dim() != (2 if packed else 3):
            raise RuntimeError(f"input must have {2 if packed else 3} dimensions, got {x.dim()}")
        if x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}"
            )
        first = self._all_weights[0][0]
        weight: Any = self._parameters.get(first)
        if weight is None:
            weight = getattr(self, first)
        if x.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if states is None:
            return
        count = self.num_layers * (2 if self.bidirectional else 1)
        features = (self.proj_size or self.hidden_size, self.hidden_size)
        for place, state in enumerate(states):
            expected = (count, batch, features[place])
            which = f"hidden[{place}]" if len(states) == 2 else "hidden"
            if state.shape != expected:
                raise RuntimeError(f"Expected {which} size {expected}, got {list(state.shape)}")
            if state.dtype != x.dtype and not torch._C._is_any_autocast_enabled():
                raise RuntimeError(f"Expected {which} dtype {x.dtype}, that of the input, got {state.dtype}")

    def _walk(
        self, x: Tensor, batch: int, states: Sequence[Tensor] | None, batch_sizes: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers over time-major ``x``. ``states``: (h,) or (h, c), each ``[L * D, B, ...]``, or None for zeros."""
        if not x.is_cpu and self._plain and resets is None and _forced_backend() in (None, "cudnn"):
            return self._torchs(x, batch, states, batch_sizes)
        layers, training = self.num_layers, self.training
        kinds = 2 if self.mode == "LSTM" else 1
        if states is None:
            cell = torch.zeros(batch, self.hidden_size, dtype=x.dtype, device=x.device)
            hidden = cell
            if self.proj_size > 0:
                hidden = torch.zeros(batch, self.proj_size, dtype=x.dtype, device=x.device)
            zeros = (hidden, cell)[:kinds]
        if not self.bidirectional and layers == 1:
            first = zeros if states is None else [state.squeeze(0) for state in states]
            y, *last = self._call(0, x, first, batch_sizes, resets, self.input_dropout, self.output_dropout)
            return y, tuple(state.unsqueeze(0) for state in last)

        directions = 2 if self.bidirectional else 1
        input_dropout = self.input_dropout
        if input_dropout > 0.0 and training and directions == 2:  # both directions read the same masked input
            mask = F.dropout(torch.ones(batch, x.size(-1), dtype=x.dtype, device=x.device), input_dropout)
            if batch_sizes is not None:
                mask = torch.cat([mask[:count] for count in batch_sizes.tolist()])
            x, input_dropout = x * mask, 0.0
        finals: list[list[Tensor]] = [[] for _ in range(kinds)]
        for layer in range(layers):
            ys = []
            for direction in range(directions):
                index = layer * directions + direction
                first = zeros if states is None else [state[index] for state in states]
                y, *last = self._call(
                    *(index, x, first, batch_sizes),
                    resets if resets is None or direction == 0 else _shift(resets),
                    input_dropout if layer == 0 else 0.0,
                    self.output_dropout if layer == layers - 1 else 0.0,
                )
                ys.append(y)
                for final, state in zip(finals, last, strict=True):
                    final.append(state)
            x = ys[0] if directions == 1 else torch.cat(ys, -1)
            if self.dropout > 0.0 and training and layer < layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(final) for final in finals)

    def _forward_packed(
        self, packed: PackedSequence, states: Sequence[Tensor] | None, resets: Tensor | None
    ) -> tuple[PackedSequence, tuple[Tensor, ...]]:
        if resets is not None:
            raise ValueError("resets cannot be given with a PackedSequence: pack each piece as a sequence of its own")
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        if sorted_indices is not None:
            batch = sorted_indices.size(0)
            if states is not None:
                states = [state.index_select(1, sorted_indices) for state in states]
        else:
            batch = int(batch_sizes[0])
        self._check(x, states, batch, packed=True)
        y, last = self._walk(x, batch, states, batch_sizes, None)
        if unsorted_indices is not None:
            last = tuple(state.index_select(1, unsorted_indices) for state in last)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), last

    def _forward_dense(
        self, input: Tensor, states: Sequence[Tensor] | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        batched = input.dim() == 3
        x = input
        if not batched:
            if input.dim() != 2:
                raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
            x = input.unsqueeze(1)
            states = None if states is None else [state.unsqueeze(1) for state in states]
            resets = None if resets is None else resets.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        batch = x.size(1)
        self._check(x, states, batch, packed=False)
        y, last = self._walk(x, batch, states, None, resets)
        if not batched:
            return y.squeeze(1), tuple(state.squeeze(1) for state in last)
        return (y.transpose(0, 1) if self.batch_first else y), last


class LSTM(_Stack):
    """`torch.nn.LSTM`, with the same constructor, parameters and results, and with the regularisers of
    `genfuse.ops.lstm`.

    It derives from `torch.nn.RNNBase` and not from `torch.nn.LSTM`, which `torch.compile` refuses to trace. For a graph
    without Python use `torch.export`: `torch.jit.script`, which is deprecated, does not take it.

    Letters: L = T steps, N = B rows, D directions, k layers, H = hidden_size, Hy = proj_size or H.

    Args:
        *args: torch.nn.LSTM's: input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            proj_size, device, dtype.
        zoneout_h: zoneout of the hidden state, in every layer (Krueger et al. 2016, arXiv 1606.01305).
        zoneout_c: zoneout of the cell state, in every layer.
        weight_drop: DropConnect on ``weight_hh``, in every layer (Merity, Keskar and Socher 2017, arXiv 1708.02182).
        input_dropout: locked dropout of the first layer's input (Gal and Ghahramani 2016, arXiv 1512.05287).
        output_dropout: locked dropout of the last layer's output.
        forget_bias: what the two biases of the forget gate begin with, in sum (Gers et al. 2000; 1 is usual); None: as
            torch.
        **kwargs: torch.nn.LSTM's, by keyword.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM, and for a probability outside [0, 1].

    Example:
        >>> layer = LSTM(4, 6, num_layers=2, bidirectional=True, zoneout_h=0.1)
        >>> y, (h_n, c_n) = layer(torch.randn(5, 3, 4))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 12]), torch.Size([4, 3, 6]))
    """

    forget_bias: float | None = None

    def __init__(
        self,
        *args: Any,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        weight_drop: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__("LSTM", *args, **kwargs)
        self._set_regularizers(
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            weight_drop=weight_drop,
            input_dropout=input_dropout,
            output_dropout=output_dropout,
        )
        if forget_bias is not None:
            if not self.bias:
                raise ValueError("forget_bias needs bias=True")
            self.forget_bias = float(forget_bias)
            self._set_forget_bias()

    def extra_repr(self) -> str:
        extra = [] if self.forget_bias is None else [f"forget_bias={self.forget_bias}"]
        return ", ".join([super().extra_repr(), *extra])

    def _set_forget_bias(self) -> None:
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("bias_ih"):
                    parameter[forget] = self.forget_bias or 0.0
                elif name.startswith("bias_hh"):
                    parameter[forget] = 0.0

    def reset_parameters(self) -> None:
        """Initialise as torch does, then set the forget gate's bias if one was asked for."""
        super().reset_parameters()
        if self.forget_bias is not None:
            self._set_forget_bias()

    def _call(
        self,
        index: int,
        x: Tensor,
        states: Sequence[Tensor],
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        input_dropout: float,
        output_dropout: float,
    ) -> tuple[Tensor, ...]:
        h, c = states
        w_ih, w_hh, *rest = self._layer_weights(index)
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        return ops.lstm(
            x,
            h,
            c,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            rest[-1] if self.proj_size > 0 else None,
            batch_sizes=batch_sizes,
            resets=resets,
            zoneout_h=self.zoneout_h,
            zoneout_c=self.zoneout_c,
            weight_drop=self.weight_drop,
            input_dropout=input_dropout,
            output_dropout=output_dropout,
            training=self.training,
            reverse=self.bidirectional and index % 2 == 1,
        )

    @overload
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, resets: None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layers over a sequence.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence.
            hx: ``(h_0 [D k, B, Hy], c_0 [D k, B, H])`` (without B if unbatched); default zeros.
            resets: bool ``[T, B]`` (``[B, T]`` with batch_first, ``[T]`` unbatched), true where a new sequence begins:
                the states are 0 before that step, and after it in the backward direction. Not with a PackedSequence.

        Returns:
            ``(output, (h_n, c_n))``, as torch.nn.LSTM.
        """
        if hx is not None:
            _check_states("LSTM", hx, pair=True)
        if isinstance(input, PackedSequence):
            return cast("tuple[PackedSequence, tuple[Tensor, Tensor]]", self._forward_packed(input, hx, resets))
        if hx is not None and (hx[0].dim() != input.dim() or hx[1].dim() != input.dim()):
            kind = "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {input.dim()}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        return cast("tuple[Tensor, tuple[Tensor, Tensor]]", self._forward_dense(input, hx, resets))


class LayerNormLSTM(LSTM):
    """The layer-normalised LSTM of Ba, Kiros and Hinton (2016, arXiv 1607.06450, eq. 20-22), as a layer like `LSTM`.

    Both products are normalised over all 4H gates, the cell over its H units; the two biases are the normalisations'
    offsets. Beside torch's parameters a layer k has the gains ``weight_ln_ih_l{k} [4H]``, ``weight_ln_hh_l{k} [4H]``,
    ``weight_ln_c_l{k} [H]`` and the cell's offset ``bias_ln_c_l{k} [H]`` (with ``_reverse`` for the backward
    direction). Gains begin at 1, offsets and biases at 0.

    Args:
        *args: as `LSTM`.
        eps: added to the variances.
        **kwargs: as `LSTM`. ``bias=False`` leaves out every offset.

    Example:
        >>> layer = LayerNormLSTM(4, 6, batch_first=True, forget_bias=1.0)
        >>> y, (h_n, c_n) = layer(torch.randn(3, 5, 4))
        >>> y.shape
        torch.Size([3, 5, 6])
    """

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"eps must be a number, got {type(eps).__name__}")
        if not 0.0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {eps}")
        super().__init__(*args, **kwargs)
        self.eps = eps
        like = self._layer_weights(0)[0]
        self._norm_names: list[tuple[str, str, str, str]] = []
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            norm = (f"weight_ln_ih{suffix}", f"weight_ln_hh{suffix}", f"weight_ln_c{suffix}", f"bias_ln_c{suffix}")
            self._norm_names.append(norm)
            for name, factor in zip(norm, (4, 4, 1, 1), strict=True):
                size = factor * self.hidden_size
                absent = name.startswith("bias") and not self.bias
                value = None if absent else torch.empty(size, device=like.device, dtype=like.dtype)
                self.register_parameter(name, None if value is None else torch.nn.Parameter(value))
        self._reset_norm()

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", eps={self.eps}" if self.eps != 1e-5 else "")

    @property
    def _plain(self) -> bool:
        return False

    def _reset_norm(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_ln"):
                torch.nn.init.ones_(parameter)
            elif name.startswith("bias"):
                torch.nn.init.zeros_(parameter)
        if self.forget_bias is not None:
            self._set_forget_bias()

    def reset_parameters(self) -> None:
        """Products' weights as torch's LSTM, gains 1, biases 0, the forget gate's as asked."""
        super().reset_parameters()
        self._reset_norm()

    def _call(
        self,
        index: int,
        x: Tensor,
        states: Sequence[Tensor],
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        input_dropout: float,
        output_dropout: float,
    ) -> tuple[Tensor, ...]:
        h, c = states
        w_ih, w_hh, *rest = self._layer_weights(index)
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        ln_ih, ln_hh, ln_c, ln_c_bias = (getattr(self, name) for name in self._norm_names[index])
        return ops.lstm(
            x,
            h,
            c,
            w_ih,
            w_hh,
            b_ih,
            b_hh,
            rest[-1] if self.proj_size > 0 else None,
            ln_ih_weight=ln_ih,
            ln_hh_weight=ln_hh,
            ln_c_weight=ln_c,
            ln_c_bias=torch.zeros_like(ln_c) if ln_c_bias is None else ln_c_bias,
            eps=self.eps,
            batch_sizes=batch_sizes,
            resets=resets,
            zoneout_h=self.zoneout_h,
            zoneout_c=self.zoneout_c,
            weight_drop=self.weight_drop,
            input_dropout=input_dropout,
            output_dropout=output_dropout,
            training=self.training,
            reverse=self.bidirectional and index % 2 == 1,
        )


class GRU(_Stack):
    """`torch.nn.GRU`, with the same constructor, parameters and results, and with the regularisers of
    `genfuse.ops.gru`.

    It derives from `torch.nn.RNNBase`, as `LSTM` does. Under autocast on the CPU the results are of autocast's dtype,
    as any LSTM's are; torch's GRU stays in float32 there.

    Args:
        *args: torch.nn.GRU's: input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype.
        zoneout_h: zoneout of the hidden state, in every layer (Krueger et al. 2016, arXiv 1606.01305).
        weight_drop: DropConnect on ``weight_hh``, in every layer (Merity, Keskar and Socher 2017, arXiv 1708.02182).
        input_dropout: locked dropout of the first layer's input (Gal and Ghahramani 2016, arXiv 1512.05287).
        output_dropout: locked dropout of the last layer's output.
        **kwargs: torch.nn.GRU's, by keyword.

    Raises:
        ValueError, TypeError: as torch.nn.GRU, and for a probability outside [0, 1].

    Example:
        >>> y, h_n = GRU(4, 6)(torch.randn(5, 3, 4))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 6]), torch.Size([1, 3, 6]))
    """

    def __init__(
        self,
        *args: Any,
        zoneout_h: float = 0.0,
        weight_drop: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
        self._set_regularizers(
            zoneout_h=zoneout_h, weight_drop=weight_drop, input_dropout=input_dropout, output_dropout=output_dropout
        )

    def _call(
        self,
        index: int,
        x: Tensor,
        states: Sequence[Tensor],
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        input_dropout: float,
        output_dropout: float,
    ) -> tuple[Tensor, ...]:
        return ops.gru(
            *(x, *states, *self._layer_weights(index)),
            batch_sizes=batch_sizes,
            resets=resets,
            zoneout_h=self.zoneout_h,
            weight_drop=self.weight_drop,
            input_dropout=input_dropout,
            output_dropout=output_dropout,
            training=self.training,
            reverse=self.bidirectional and index % 2 == 1,
        )

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, resets: None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, resets: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layers over a sequence.

        Args:
            input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence.
            hx: ``h_0 [D k, B, H]`` (without B if unbatched); default zeros.
            resets: bool, true where a new sequence begins; see `LSTM`.

        Returns:
            ``(output, h_n)``, as torch.nn.GRU.
        """
        if hx is not None:
            _check_states("GRU", hx, pair=False)
        states = None if hx is None else (hx,)
        if isinstance(input, PackedSequence):
            packed, (h_n,) = self._forward_packed(input, states, resets)
            return packed, h_n
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
            raise RuntimeError(f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        output, (h_n,) = self._forward_dense(input, states, resets)
        return output, h_n


class LSTMCell(torch.nn.LSTMCell):
    """`torch.nn.LSTMCell`, served by one step of `genfuse.ops.lstm`.

    Example:
        >>> h, c = LSTMCell(4, 6)(torch.randn(3, 4))
        >>> h.shape, c.shape
        (torch.Size([3, 6]), torch.Size([3, 6]))
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: ``input [B, I]`` or ``[I]``, ``hx = (h [B, H], c [B, H])`` or without B; returns ``(h', c')``."""
        if not input.is_cpu and _forced_backend() is None:
            return super().forward(input, hx)
        if hx is not None:
            _check_states("LSTMCell", hx, pair=True)
        batched = _check_cell(self, input, hx)
        x = input.unsqueeze(0) if batched else input.view(1, 1, -1)
        if hx is None:
            h = c = torch.zeros(x.size(1), self.hidden_size, dtype=input.dtype, device=input.device)
        else:
            h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        _, h, c = ops.lstm(x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(torch.nn.GRUCell):
    """`torch.nn.GRUCell`, served by one step of `genfuse.ops.gru`.

    Example:
        >>> GRUCell(4, 6)(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: ``input [B, I]`` or ``[I]``, ``hx [B, H]`` or ``[H]``; returns the next h."""
        if not input.is_cpu and _forced_backend() is None:
            return super().forward(input, hx)
        if hx is not None:
            _check_states("GRUCell", hx, pair=False)
        batched = _check_cell(self, input, None if hx is None else (hx,))
        x = input.unsqueeze(0) if batched else input.view(1, 1, -1)
        if hx is None:
            h = torch.zeros(x.size(1), self.hidden_size, dtype=input.dtype, device=input.device)
        else:
            h = hx if batched else hx.unsqueeze(0)
        _, h = ops.gru(x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return h if batched else h.squeeze(0)


def _check_cell(cell: torch.nn.RNNCellBase, input: Tensor, states: Sequence[Tensor] | None) -> bool:
    """Whether the input is batched; raises if a shape does not fit."""
    shape = input.shape
    batched = len(shape) == 2
    wanted = (shape[0], cell.hidden_size) if batched else (cell.hidden_size,)
    if not (batched or len(shape) == 1) or shape[-1] != cell.input_size:
        _explain_cell(cell, input, states or ())
    for state in states or ():
        if state.shape != wanted or state.dtype != input.dtype:
            _explain_cell(cell, input, states or ())
    return batched


def _explain_cell(cell: torch.nn.RNNCellBase, input: Tensor, states: Sequence[Tensor]) -> None:
    """Raise for the first shape or dtype that does not fit, with torch's messages."""
    name = type(cell).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if input.size(-1) != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {cell.input_size}")
    for index, state in enumerate(states):
        if state.dim() not in (1, 2):
            label = f"hx[{index}]" if isinstance(cell, LSTMCell) else "hidden"
            raise ValueError(f"{name}: Expected {label} to be 1D or 2D, got {state.dim()}D instead")
        if state.dim() != input.dim():
            raise RuntimeError(f"hidden{index} must be {input.dim()}D, as the input is, got {state.dim()}D instead")
        if state.size(-1) != cell.hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.size(-1)}, expected {cell.hidden_size}"
            )
        if state.size(0) != input.size(0) and input.dim() == 2:
            raise RuntimeError(
                f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {state.size(0)}"
            )
        if state.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(f"hidden{index} must be {input.dtype}, as the input is, got {state.dtype}")
