"""A recurrent language model over the fused layers: trained as whole sequences, sampled by one native decoding loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from genfuse import nn, ops

__all__ = ["LSTMLanguageModel"]

Cell = Literal["lstm", "layernorm_lstm", "gru"]
State = list[tuple[Tensor, Tensor]] | list[Tensor]


class LSTMLanguageModel(torch.nn.Module):
    """Embedding, recurrent layers, output head, and the regularisers of AWD-LSTM.

    Merity, Keskar and Socher 2017, "Regularizing and optimizing LSTM language models" (arXiv 1708.02182), section 4;
    zoneout: Krueger et al. 2016 (arXiv 1606.01305); layer norm: Ba, Kiros and Hinton 2016 (arXiv 1607.06450). Every
    dropout but that of words is locked: one mask per sequence, the same at each step (Gal and Ghahramani 2015,
    arXiv 1512.05287).

    Args:
        vocab_size: number of tokens V.
        embedding_dim: E.
        hidden_size: H of every layer (of all but the last with `tie_weights`).
        num_layers: L.
        cell: ``"lstm"``, ``"layernorm_lstm"`` or ``"gru"``.
        tie_weights: the head's weight is the embedding's; the last layer then has E cells.
        dropout: on the last layer's output.
        input_dropout: on the embedded tokens.
        hidden_dropout: on the outputs of the layers below the last.
        embedding_dropout: on whole words: all occurrences of a token in the batch at once.
        weight_drop: DropConnect on the recurrent weights.
        zoneout_h, zoneout_c: probability that a hidden (cell) unit keeps its old value.
        activation_regularization: alpha of AR, which adds ``alpha * mean(h_dropped ** 2)`` to the loss.
        temporal_activation_regularization: beta of TAR, which adds ``beta * mean((h[t + 1] - h[t]) ** 2)``.
        forget_bias: initial value of the forget gate's bias; None leaves torch's. No GRU has one.

    The masks are drawn from torch's default generator of the device, so `torch.manual_seed` governs them.
    `genfuse.reference.LSTMLanguageModel` is the same model in plain PyTorch, with the same ``state_dict``.

    Raises:
        TypeError: a size is no int, or a regulariser no number.
        ValueError: a size below 1, a regulariser out of its range, an unknown cell, or `zoneout_c` or `forget_bias`
            with a GRU.

    Example:
        >>> model = LSTMLanguageModel(vocab_size=100, embedding_dim=16, hidden_size=32, num_layers=2)
        >>> tokens = torch.randint(100, (4, 21))
        >>> loss, state = model.loss(tokens[:, :-1], tokens[:, 1:])
        >>> loss.backward()
        >>> model.generate(tokens[:, :5], length=7, temperature=0.8, top_k=40).shape
        torch.Size([4, 7])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int,
        *,
        cell: Cell = "lstm",
        tie_weights: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        weight_drop: float = 0.0,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        activation_regularization: float = 0.0,
        temporal_activation_regularization: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("vocab_size", vocab_size),
            ("embedding_dim", embedding_dim),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if not hasattr(size, "__index__"):  # NumPy's integers will do
                raise TypeError(f"LSTMLanguageModel: {name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"LSTMLanguageModel: {name} must be at least 1, got {size}")
        for name, probability in (("dropout", dropout), ("embedding_dropout", embedding_dropout)):
            _check_number(name, probability)
            if not 0.0 <= probability < 1.0:
                raise ValueError(f"LSTMLanguageModel: {name} must be in [0, 1), got {probability}")
        for name, weight in (
            ("activation_regularization", activation_regularization),
            ("temporal_activation_regularization", temporal_activation_regularization),
        ):
            _check_number(name, weight)
            if not 0.0 <= weight < float("inf"):
                raise ValueError(f"LSTMLanguageModel: {name} must be finite and not negative, got {weight}")
        if cell not in ("lstm", "layernorm_lstm", "gru"):
            raise ValueError(f"LSTMLanguageModel: cell must be 'lstm', 'layernorm_lstm' or 'gru', got {cell!r}")
        if cell == "gru" and (zoneout_c > 0.0 or forget_bias is not None):
            raise ValueError("LSTMLanguageModel: a GRU has neither a cell state to zone out nor a forget bias")
        self.vocab_size, self.embedding_dim, self.hidden_size = vocab_size, embedding_dim, hidden_size
        self.num_layers, self.cell, self.tie_weights = num_layers, cell, tie_weights
        self.dropout, self.embedding_dropout = dropout, embedding_dropout
        self.zoneout_h, self.zoneout_c = zoneout_h, zoneout_c
        self.activation_regularization = activation_regularization
        self.temporal_activation_regularization = temporal_activation_regularization

        self.embedding = torch.nn.Embedding(vocab_size, embedding_dim)
        self.rnns = torch.nn.ModuleList()
        for layer in range(num_layers):
            last = layer == num_layers - 1
            options: dict[str, Any] = {
                "zoneout_h": zoneout_h,
                "weight_drop": weight_drop,
                "input_dropout": input_dropout if layer == 0 else 0.0,
                # The last layer's is applied here, because TAR looks at the output before dropout.
                "output_dropout": 0.0 if last else hidden_dropout,
            }
            if cell != "gru":
                options |= {"zoneout_c": zoneout_c, "forget_bias": forget_bias}
            kind = {"lstm": nn.LSTM, "layernorm_lstm": nn.LayerNormLSTM, "gru": nn.GRU}[cell]
            inputs = embedding_dim if layer == 0 else hidden_size
            self.rnns.append(kind(inputs, embedding_dim if tie_weights and last else hidden_size, **options))
        outputs = embedding_dim if tie_weights else hidden_size
        self.head = torch.nn.Linear(outputs, vocab_size)
        torch.nn.init.zeros_(self.head.bias)
        if tie_weights:
            # Logits of unit scale want rows of unit length, which the embedding's default is not.
            torch.nn.init.normal_(self.embedding.weight, std=embedding_dim**-0.5)
            self.head.weight = self.embedding.weight

    def extra_repr(self) -> str:
        return f"cell={self.cell}, tie_weights={self.tie_weights}, dropout={self.dropout}"

    def _hidden(self, tokens: Tensor, state: State | None) -> tuple[Tensor, Tensor, State]:
        """The last layer's output ``[T, B, D]``, the same after dropout, and the state after it."""
        _check_tokens(tokens)
        steps_first = tokens.t()
        x = self.embedding(steps_first)
        if self.training and self.embedding_dropout > 0.0:
            x = x * _keep((self.vocab_size,), self.embedding_dropout, x)[steps_first].unsqueeze(-1)
        after: list[Any] = []
        for layer, rnn in enumerate(self.rnns):
            x, new = rnn(x, None if state is None else _unsqueeze(state[layer]))
            after.append(_squeeze(new))
        dropped = x
        if self.training and self.dropout > 0.0:
            dropped = x * _keep((x.size(1), x.size(2)), self.dropout, x)
        return x, dropped, after

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the token after each token.

        Args:
            tokens: int64 ``[B, T]``.
            state: per layer ``(h, c)`` (of a GRU: ``h``), each ``[B, H_l]``; zeros by default.

        Returns:
            ``(logits [B, T, V], state)``.
        """
        _, hidden, state = self._hidden(tokens, state)
        return self.head(hidden).transpose(0, 1), state

    def log_prob(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """Log-probability of ``tokens[:, 1:]`` given ``tokens[:, 0]`` (and the state before it).

        Args:
            tokens: int64 ``[B, T]``.
            state: as in `forward`.

        Returns:
            ``[B]``, nats, float32 or wider; zeros if T is 1.

        Example:
            >>> model = LSTMLanguageModel(vocab_size=5, embedding_dim=4, hidden_size=8, num_layers=1)
            >>> model.log_prob(torch.tensor([[0, 1, 2], [0, 3, 4]])).shape
            torch.Size([2])
        """
        _check_tokens(tokens)
        if tokens.size(1) < 2:
            return self.head.bias.new_zeros(tokens.size(0))
        _, hidden, _ = self._hidden(tokens[:, :-1], state)
        targets = tokens[:, 1:].t()
        nll = ops.linear_cross_entropy(
            hidden.flatten(0, 1), self.head.weight, targets.reshape(-1), self.head.bias, reduction="none"
        )
        return -nll.view(targets.shape).sum(0)

    def loss(self, tokens: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mean cross entropy in nats per token, plus AR and TAR while training.

        Args:
            tokens: int64 ``[B, T]``.
            targets: int64 ``[B, T]``: the token after each of `tokens`.
            state: as in `forward`.

        Returns:
            ``(loss [], state)``.

        Raises:
            ValueError: the tokens are not ``[B, T]``, or the targets not of their shape.
            IndexError: a token or target is outside the vocabulary.
        """
        nll, penalty, state = self.loss_parts(tokens, targets, state)
        return nll + penalty, state

    def loss_parts(self, tokens: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """`loss` in two parts: ``(cross entropy [], AR + TAR [], state)``; their sum is the loss."""
        _check_tokens(tokens)
        if targets.shape != tokens.shape:
            want, have = list(tokens.shape), list(targets.shape)
            raise ValueError(f"LSTMLanguageModel: targets must have the shape of tokens, {want}; got {have}")
        raw, hidden, state = self._hidden(tokens, state)
        nll = ops.linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, targets.t().reshape(-1), self.head.bias)
        penalty = torch.zeros_like(nll)
        if self.training and self.activation_regularization > 0.0:
            penalty = penalty + self.activation_regularization * hidden.square().mean()
        if self.training and self.temporal_activation_regularization > 0.0 and raw.size(0) > 1:
            penalty = penalty + self.temporal_activation_regularization * (raw[1:] - raw[:-1]).square().mean()
        return nll, penalty, state

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        state: State | None = None,
        generator: torch.Generator | None = None,
        u: Tensor | None = None,
        weight_dtype: torch.dtype | None = None,
        return_log_probs: bool = False,
        return_state: bool = False,
    ) -> Any:
        """Continue a prompt: the whole decoding loop runs natively (`genfuse.ops.lstm_generate`, `gru_generate`).

        Row b of the result depends on the seed and on b alone, not on the batch size or the number of threads. No
        dropout is applied, whatever the mode of the module.

        Args:
            prompt: int64 ``[B, P]``, P at least 1.
            length: tokens to draw.
            temperature: 0 takes the most probable token each time.
            top_k, top_p: keep the k most probable tokens, then the smallest set of probability `top_p`.
            state: the state before the prompt, as in `forward`.
            generator: where the seed is drawn from; the device's default generator otherwise.
            u: the uniforms themselves, ``[B, length]`` in [0, 1).
            weight_dtype: ``torch.bfloat16`` reads the weights at half the size, with float32 sums.
            return_log_probs, return_state: return these, too.

        Returns:
            tokens int64 ``[B, length]``; if asked, a tuple with their log-probabilities float32 ``[B, length]`` and
            the state that has read everything but the last token.
        """
        layers = [_layer_weights(rnn, self.cell) for rnn in self.rnns]
        options: dict[str, Any] = {
            "state": state,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "zoneout_h": self.zoneout_h,
            "generator": generator,
            "u": u,
            "weight_dtype": weight_dtype,
            "return_log_probs": return_log_probs,
            "return_state": return_state,
        }
        if self.cell == "gru":
            decode: Any = ops.gru_generate
        else:
            decode = ops.lstm_generate
            options["zoneout_c"] = self.zoneout_c
        return decode(prompt, length, self.embedding.weight, layers, self.head.weight, self.head.bias, **options)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"LSTMLanguageModel: {name} must be a number, got {type(value).__name__}")


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"LSTMLanguageModel: tokens must be [B, T], got {list(tokens.shape)}")


def _keep(shape: Sequence[int], probability: float, like: Tensor) -> Tensor:
    """A dropout mask: 0 with `probability`, else ``1 / (1 - probability)``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1.0 - probability) / (1.0 - probability)


def _unsqueeze(state: Any) -> Any:
    """A layer's state as torch's modules take it: ``[1, B, H]``."""
    return tuple(part.unsqueeze(0) for part in state) if isinstance(state, tuple) else state.unsqueeze(0)


def _squeeze(state: Any) -> Any:
    return tuple(part.squeeze(0) for part in state) if isinstance(state, tuple) else state.squeeze(0)


def _layer_weights(rnn: torch.nn.Module, cell: Cell) -> list[Tensor]:
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    if cell == "layernorm_lstm":
        names += ["weight_ln_ih_l0", "weight_ln_hh_l0", "weight_ln_c_l0", "bias_ln_c_l0"]
    return [getattr(rnn, name) for name in names]
