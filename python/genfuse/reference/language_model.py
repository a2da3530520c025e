"""The recurrent language model in plain PyTorch: the definition of `genfuse.models.LSTMLanguageModel`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recurrent import gru, gru_generate, lstm, lstm_generate

__all__ = ["LSTMLanguageModel"]

_LAYER_NORM = ("weight_ln_ih_l0", "weight_ln_hh_l0", "weight_ln_c_l0", "bias_ln_c_l0")


class LSTMLanguageModel(torch.nn.Module):
    """The plain twin of `genfuse.models.LSTMLanguageModel`: same arguments, same ``state_dict``, same random masks.

    Trained side by side from the same weights and seed, the two have the same loss curve.

    Example:
        >>> model = LSTMLanguageModel(vocab_size=100, embedding_dim=16, hidden_size=32, num_layers=2)
        >>> tokens = torch.randint(100, (4, 21))
        >>> loss, state = model.loss(tokens[:, :-1], tokens[:, 1:])
        >>> loss.shape, len(state)
        (torch.Size([]), 2)
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        num_layers: int,
        *,
        cell: str = "lstm",
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
        self.cell, self.dropout, self.embedding_dropout = cell, dropout, embedding_dropout
        self.input_dropout, self.hidden_dropout = input_dropout, hidden_dropout
        self.weight_drop, self.zoneout_h, self.zoneout_c = weight_drop, zoneout_h, zoneout_c
        self.ar, self.tar = activation_regularization, temporal_activation_regularization

        self.embedding = torch.nn.Embedding(vocab_size, embedding_dim)
        self.rnns = torch.nn.ModuleList()
        for layer in range(num_layers):
            inputs = embedding_dim if layer == 0 else hidden_size
            outputs = embedding_dim if tie_weights and layer == num_layers - 1 else hidden_size
            # torch's own layers hold the parameters; what they compute is written out in reference.recurrent.
            rnn: Any = (torch.nn.GRU if cell == "gru" else torch.nn.LSTM)(inputs, outputs)
            if cell == "layernorm_lstm":
                for name, size in zip(_LAYER_NORM, (4 * outputs, 4 * outputs, outputs, outputs), strict=True):
                    start = torch.zeros(size) if name.startswith("bias") else torch.ones(size)
                    rnn.register_parameter(name, torch.nn.Parameter(start))
                torch.nn.init.zeros_(rnn.bias_ih_l0)
                torch.nn.init.zeros_(rnn.bias_hh_l0)
            if forget_bias is not None:
                with torch.no_grad():
                    rnn.bias_ih_l0[outputs : 2 * outputs] = forget_bias
                    rnn.bias_hh_l0[outputs : 2 * outputs] = 0.0
            self.rnns.append(rnn)
        self.head = torch.nn.Linear(embedding_dim if tie_weights else hidden_size, vocab_size)
        torch.nn.init.zeros_(self.head.bias)
        if tie_weights:
            torch.nn.init.normal_(self.embedding.weight, std=embedding_dim**-0.5)
            self.head.weight = self.embedding.weight

    def _layer(self, layer: int, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        rnn: Any = self.rnns[layer]
        options: dict[str, Any] = {
            "zoneout_h": self.zoneout_h,
            "weight_drop": self.weight_drop,
            "input_dropout": self.input_dropout if layer == 0 else 0.0,
            "output_dropout": self.hidden_dropout if layer < len(self.rnns) - 1 else 0.0,
            "training": self.training,
        }
        weights = (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
        zeros = x.new_zeros(x.size(1), rnn.hidden_size)
        if self.cell == "gru":
            return gru(x, zeros if state is None else state, *weights, **options)
        if self.cell == "layernorm_lstm":
            names = ("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias")
            options |= {name: getattr(rnn, own) for name, own in zip(names, _LAYER_NORM, strict=True)}
        h, c = (zeros, zeros) if state is None else state
        y, h_n, c_n = lstm(x, h, c, *weights, zoneout_c=self.zoneout_c, **options)
        return y, (h_n, c_n)

    def _hidden(self, tokens: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        x = self.embedding(tokens.t())
        if self.training and self.embedding_dropout > 0.0:
            keep = torch.empty(self.embedding.num_embeddings, dtype=x.dtype, device=x.device)
            keep = keep.bernoulli_(1.0 - self.embedding_dropout) / (1.0 - self.embedding_dropout)
            x = x * keep[tokens.t()].unsqueeze(-1)
        after = []
        for layer in range(len(self.rnns)):
            x, new = self._layer(layer, x, None if state is None else state[layer])
            after.append(new)
        dropped = x
        if self.training and self.dropout > 0.0:
            dropped = x * (torch.empty_like(x[0]).bernoulli_(1.0 - self.dropout) / (1.0 - self.dropout))
        return x, dropped, after

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``[B, T, V]`` of the token after each of ``tokens [B, T]``, and the state after them."""
        _, hidden, state = self._hidden(tokens, state)
        return self.head(hidden).transpose(0, 1), state

    def log_prob(self, tokens: Tensor, state: Any = None) -> Tensor:
        """Log-probability ``[B]`` of ``tokens[:, 1:]`` given ``tokens[:, 0]``, in nats."""
        if tokens.size(1) < 2:
            return self.head.bias.new_zeros(tokens.size(0))
        logits, _ = self.forward(tokens[:, :-1], state)
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).sum(-1)

    def loss(self, tokens: Tensor, targets: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Mean cross entropy in nats per token plus, in training, AR and TAR (Merity et al. 2017, section 4.6)."""
        raw, hidden, state = self._hidden(tokens, state)
        loss = F.cross_entropy(self.head(hidden).flatten(0, 1), targets.t().reshape(-1))
        if self.training and self.ar > 0.0:
            loss = loss + self.ar * hidden.square().mean()
        if self.training and self.tar > 0.0 and raw.size(0) > 1:
            loss = loss + self.tar * (raw[1:] - raw[:-1]).square().mean()
        return loss, state

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, **options: Any) -> tuple[Tensor, Tensor, Any]:
        """``(tokens, log_probs, state)`` after ``prompt [B, P]``, one step of Python a token."""
        norm = _LAYER_NORM if self.cell == "layernorm_lstm" else ()
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", *norm)
        layers = [[getattr(rnn, name) for name in names] for rnn in self.rnns]
        arguments = (prompt, length, self.embedding.weight, layers, self.head.weight, self.head.bias)
        if self.cell == "gru":
            return gru_generate(*arguments, zoneout_h=self.zoneout_h, **options)
        return lstm_generate(*arguments, zoneout_h=self.zoneout_h, zoneout_c=self.zoneout_c, **options)
