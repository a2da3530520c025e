"""The decoding loops: exact tests from given uniforms, independence of rows, and the sampling rule by NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from genfuse import ops, reference
from genfuse.ops import recurrent as recurrent_ops
from genfuse.reference import random as reference_random
from sampling_rule import assert_log_probs, distribution, distributions
from tolerances import allowed, assert_as_accurate, eager_runs, errors
from torch import Tensor
from torch import library as registry

KINDS = ["lstm", "layer norm", "gru"]


@dataclass
class Model:
    """A small language model as bare tensors."""

    kind: str
    embedding: Tensor
    layers: list[tuple[Tensor | None, ...]]
    head_weight: Tensor
    head_bias: Tensor | None
    arguments: dict[str, Any] = field(default_factory=dict)

    def generate(self, prompt: Tensor, length: int, **arguments: Any) -> Any:
        function = ops.gru_generate if self.kind == "gru" else ops.lstm_generate
        tensors = (self.embedding, self.layers, self.head_weight, self.head_bias)
        return function(prompt, length, *tensors, **{**self.arguments, **arguments})

    def reference(self, prompt: Tensor, length: int, **arguments: Any) -> Any:
        function = reference.gru_generate if self.kind == "gru" else reference.lstm_generate
        tensors = (self.embedding, self.layers, self.head_weight, self.head_bias)
        return function(prompt, length, *tensors, **{**self.arguments, **arguments})

    def read(
        self,
        tokens: Tensor,
        change: Callable[[Tensor], Tensor],
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        bf16: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits after each token of ``[B, S]`` and the states at the end, by the layers' reference.

        Args:
            tokens: the text.
            change: applied to every weight; its dtype is that of the computation.
            zoneout_h, zoneout_c: in eval mode.
            bf16: round the matrices to bfloat16 first.

        Returns:
            ``[B, S, V]``, and h (and c) of each layer in one list.
        """

        def wide(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else change(weight)

        def matrix(weight: Tensor | None) -> Tensor | None:
            return wide(weight.bfloat16() if bf16 and weight is not None else weight)

        x: Any = torch.nn.functional.embedding(tokens, change(self.embedding)).transpose(0, 1)
        states: list[Tensor] = []
        for w_ih, w_hh, b_ih, b_hh, *norm in self.layers:
            assert w_hh is not None
            zero = torch.zeros(tokens.size(0), w_hh.size(1), dtype=x.dtype)
            weights: Any = (matrix(w_ih), matrix(w_hh), wide(b_ih), wide(b_hh))
            if self.kind == "gru":
                x, *after = reference.gru(x, zero, *weights, zoneout_h=zoneout_h)
            else:
                names = ("ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias")
                ln: Any = dict(zip(names, map(wide, norm), strict=False))
                x, *after = reference.lstm(x, zero, zero, *weights, **ln, zoneout_h=zoneout_h, zoneout_c=zoneout_c)
            states += after
        head: Any = (matrix(self.head_weight), wide(self.head_bias))
        return torch.nn.functional.linear(x.transpose(0, 1), *head), states

    def check_state(self, state: Any, tokens: Tensor) -> None:
        """Assert that a state is that after a text."""
        flat = list(state) if self.kind == "gru" else [part for layer in state for part in layer]
        eager = eager_runs(lambda nudge: self.read(tokens, nudge)[1])
        for ours, theirs, exact in zip(flat, eager, self.read(tokens, Tensor.double)[1], strict=True):
            assert_as_accurate(ours, theirs, exact, "state")


def make_model(
    kind: str,
    *,
    vocab: int = 23,
    features: int = 9,
    hidden: tuple[int, ...] = (17, 12),
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    layers: list[tuple[Tensor | None, ...]] = []
    below = features
    for size in hidden:
        gates = (3 if kind == "gru" else 4) * size
        layer: list[Tensor | None] = [draw(gates, below, scale=below**-0.5), draw(gates, size, scale=size**-0.5)]
        layer += [draw(gates, scale=0.3), draw(gates, scale=0.3)] if bias else [None, None]
        if kind == "layer norm":
            layer += [1 + draw(gates, scale=0.2), 1 + draw(gates, scale=0.2), 1 + draw(size, scale=0.2)]
            layer += [draw(size, scale=0.2)]
        layers.append(tuple(layer))
        below = size
    return Model(
        kind, draw(vocab, features), layers, draw(vocab, below, scale=2 * below**-0.5), draw(vocab) if bias else None
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the rule, once more, by NumPy (sampling_rule.py) ----------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"top_k": 7, "top_p": 0.8, "temperature": 1.3},
]


@pytest.mark.parametrize("filters", FILTERS)
def test_the_reference_rule_is_numpys(filters: dict[str, Any]) -> None:
    logits = torch.randn(64, 19)
    logits[:, 3] = logits[:, 8]  # ties
    u = torch.rand(64)
    tokens, log_probs = reference.sample_token(logits, u, **filters)
    for row in range(64):
        p = distribution(logits[row].double().numpy(), **filters)
        assert int(tokens[row]) == next(v for v in range(19) if p[: v + 1].sum() > float(u[row]))
    assert_log_probs(log_probs, tokens, lambda change: change(logits), filters)


def check_tokens(
    model: Model, prompt: Tensor, tokens: Tensor, log_probs: Tensor, u: Tensor, filters: dict[str, Any], **options: Any
) -> None:
    """Each token is what the rule draws from the float64 distribution after the tokens before it.

    The loop's logits are float32, so a cumulative sum within `margin` of u may go either way, and a token within
    `margin` of a filter's border be kept or not; such a step must be rare. The margin is what float32 PyTorch's logits
    or cumulative sums may be off by.
    """

    def logits(change: Callable[[Tensor], Tensor]) -> Tensor:
        return model.read(torch.cat([prompt, tokens], 1), change, **options)[0][:, prompt.size(1) - 1 : -1]

    greedy = filters.get("temperature") == 0.0
    exact = logits(Tensor.double)

    def decisive(logits: Tensor) -> Tensor:
        return logits if greedy else (logits / filters.get("temperature", 1.0)).softmax(-1).cumsum(-1)

    (eager,) = eager_runs(lambda nudge: [decisive(logits(lambda tensor: nudge(tensor.float())))])
    truth = decisive(exact)
    limit = allowed([errors(run, truth) for run in eager], torch.float32, truth.numel())
    margin = limit.largest * float(truth.abs().max())
    if greedy:
        assert bool((exact.gather(-1, tokens.unsqueeze(-1)) >= exact.amax(-1, keepdim=True) - margin).all())
        assert bool((log_probs == 0.0).all())
        return
    probabilities = distributions(exact, filters)
    p, above = (t.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for t in (probabilities, probabilities.cumsum(-1)))
    sure = (p > 0) & (above - p - margin <= u) & (u < above + margin)
    doubtful = int((~sure).sum())
    assert doubtful <= max(1, tokens.numel() // 200), (
        f"{doubtful} of {tokens.numel()} tokens are not what the rule draws"
    )
    assert_log_probs(log_probs, tokens, logits, filters, sure)


@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 0.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_from_given_uniforms(kind: str, filters: dict[str, Any]) -> None:
    model = make_model(kind)
    prompt = torch.randint(0, 23, (6, 4))
    u = torch.rand(6, 25)
    tokens, log_probs = model.generate(prompt, 25, u=u, return_log_probs=True, **filters)
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    check_tokens(model, prompt, tokens, log_probs, u, filters)
    expected, expected_log_probs, _ = model.reference(prompt, 25, u=u, **filters)
    assert torch.equal(tokens, expected)
    check_tokens(model, prompt, expected, expected_log_probs, u, filters)


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab": 1, "features": 1, "hidden": (1,)},
        {"vocab": 2, "features": 3, "hidden": (5, 4, 3)},
        {"vocab": 300, "features": 31, "hidden": (65,)},
        {"vocab": 97, "features": 64, "hidden": (128, 33)},
        {"bias": False},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5, 19])
def test_sizes(kind: str, sizes: dict[str, Any], batch: int) -> None:
    model = make_model(kind, **sizes)
    vocab = model.embedding.size(0)
    prompt = torch.randint(0, vocab, (batch, 3))
    u = torch.rand(batch, 12)
    tokens, log_probs = model.generate(prompt, 12, u=u, return_log_probs=True, top_k=50)
    check_tokens(model, prompt, tokens, log_probs, u, {"top_k": 50})


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_and_bf16_weights(kind: str) -> None:
    model = make_model(kind)
    prompt = torch.randint(0, 23, (4, 3))
    u = torch.rand(4, 20)
    zoneout = {"zoneout_h": 0.3} if kind == "gru" else {"zoneout_h": 0.3, "zoneout_c": 0.2}
    tokens, log_probs = model.generate(prompt, 20, u=u, return_log_probs=True, **zoneout)
    check_tokens(model, prompt, tokens, log_probs, u, {}, **zoneout)
    tokens, log_probs = model.generate(prompt, 20, u=u, return_log_probs=True, weight_dtype=torch.bfloat16)
    check_tokens(model, prompt, tokens, log_probs, u, {}, bf16=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind, dtype=dtype)
    prompt = torch.randint(0, 23, (3, 2))
    u = torch.rand(3, 15)
    tokens, log_probs = model.generate(prompt, 15, u=u, return_log_probs=True)
    assert log_probs.dtype == torch.float32
    check_tokens(model, prompt, tokens, log_probs, u, {})


# ---- seeds, rows, threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_uniforms_of_a_seed(kind: str) -> None:
    """u[b, s] is element b * 2^32 + s of the Philox stream at the offset."""
    model = make_model(kind)
    prompt = torch.randint(0, 23, (3, 2))
    rng = torch.tensor([-5, 1 << 50])
    elements = (torch.arange(3).unsqueeze(1) << 32) + torch.arange(30)
    u = reference_random.uniform_elements(rng, elements)
    assert torch.equal(model.generate(prompt, 30, rng=rng), model.generate(prompt, 30, u=u))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(kind: str, weight_dtype: torch.dtype | None) -> None:
    model = make_model(kind, vocab=50, hidden=(70, 33))
    prompt = torch.randint(0, 50, (33, 3))
    rng = torch.tensor([11, 22])
    arguments: dict[str, Any] = {"rng": rng, "top_p": 0.9, "return_log_probs": True, "weight_dtype": weight_dtype}
    tokens, log_probs = model.generate(prompt, 40, **arguments)
    for batch in (1, 2, 7, 16):
        fewer, fewer_log_probs = model.generate(prompt[:batch], 40, **arguments)
        assert torch.equal(fewer, tokens[:batch])
        torch.testing.assert_close(fewer_log_probs, log_probs[:batch])
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        again, again_log_probs = model.generate(prompt, 40, **arguments)
        assert torch.equal(again, tokens)
        assert torch.equal(again_log_probs, log_probs)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_generators_govern(kind: str) -> None:
    model = make_model(kind)
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    torch.manual_seed(3)
    first, second = model.generate(prompt, 20), model.generate(prompt, 20)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(prompt, 20))
    assert not torch.equal(first, second)
    mine = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*mine)
    before = torch.get_rng_state()
    model.generate(prompt, 5, temperature=0.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_goes_on_from_its_state(kind: str) -> None:
    model = make_model(kind)
    prompt = torch.randint(0, 23, (3, 4))
    u = torch.rand(3, 20)
    tokens, log_probs = model.generate(prompt, 20, u=u, return_log_probs=True)
    start, state = model.generate(prompt, 8, u=u[:, :8], return_state=True)
    rest, rest_log_probs = model.generate(start[:, -1:], 12, u=u[:, 8:], state=state, return_log_probs=True)
    assert torch.equal(torch.cat([start, rest], 1), tokens)
    torch.testing.assert_close(rest_log_probs, log_probs[:, 8:])
    for after in (state, model.reference(prompt, 8, u=u[:, :8])[2]):
        model.check_state(after, torch.cat([prompt, start[:, :-1]], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned(kind: str) -> None:
    model = make_model(kind)
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    assert isinstance(model.generate(prompt, 3), Tensor)
    both = model.generate(prompt, 3, return_log_probs=True)
    assert [list(part.shape) for part in both] == [[2, 3], [2, 3]]
    tokens, log_probs, state = model.generate(prompt, 3, return_log_probs=True, return_state=True)
    assert len(state) == 2
    assert not tokens.requires_grad
    assert not log_probs.requires_grad
    nothing, _, state = model.generate(prompt, 0, return_log_probs=True, return_state=True)
    assert list(nothing.shape) == [2, 0]
    for after in (state, model.reference(prompt, 0)[2]):
        model.check_state(after, prompt)
    assert list(model.generate(prompt[:0], 3).shape) == [0, 3]


# ---- the sampling rule at its edges ----------------------------------------------------------------------------------


def head_only(logits: Tensor, kind: str = "lstm") -> Model:
    """A model whose logits are given: its head's weight is zero."""
    model = make_model(kind, vocab=logits.numel(), hidden=(4,))
    model.head_weight = torch.zeros_like(model.head_weight)
    model.head_bias = logits
    return model


def draws(logits: Tensor, u: Tensor, kind: str = "lstm", **filters: Any) -> tuple[Tensor, Tensor]:
    prompt = torch.zeros(u.numel(), 1, dtype=torch.int64)
    tokens, log_probs = head_only(logits, kind).generate(prompt, 1, u=u.unsqueeze(1), return_log_probs=True, **filters)
    return tokens.squeeze(1), log_probs.squeeze(1)


GRID = torch.arange(0, 2**24, 2**24 // 997).double().mul(2.0**-24).float()
LAST = torch.tensor([1.0 - 2.0**-24])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_token_without_probability_is_never_drawn(kind: str) -> None:
    inf = float("inf")
    u = torch.cat([GRID, LAST, torch.zeros(1)])
    for logits in (
        torch.tensor([-inf, 0.0, -inf, 1.0, -inf]),
        torch.tensor([-1e4, 0.0, 1.0, -1e4, -2e4]),  # exp underflows to nothing
        torch.tensor([-inf] * 40 + [3.0] + [-inf] * 24),
    ):
        tokens, log_probs = draws(logits, u, kind)
        allowed = set((logits > logits.max() - 100).nonzero().flatten().tolist())
        assert set(tokens.tolist()) == allowed
        assert bool(log_probs.isfinite().all())
        for filters in ({"top_k": 3}, {"top_p": 0.999999}):
            assert set(draws(logits, u, kind, **filters)[0].tolist()) <= allowed


@pytest.mark.parametrize("filters", FILTERS)
def test_probabilities_sum_to_one(filters: dict[str, Any]) -> None:
    """Over all tokens that the uniforms reach, exp(log_prob) sums to 1, and the filter lets through NumPy's."""
    logits = torch.randn(12)
    tokens, log_probs = draws(logits, GRID, **filters)
    p = {int(v): float(q) for v, q in zip(tokens, log_probs.double().exp(), strict=True)}
    expected = distribution(
        logits.double().numpy(), filters.get("temperature", 1.0), filters.get("top_k"), filters.get("top_p")
    )
    for v, q in p.items():
        assert q == pytest.approx(expected[v], rel=1e-5)
    missed = sum(q for v, q in enumerate(expected) if v not in p)
    assert sum(p.values()) + missed == pytest.approx(1.0, abs=1e-5)
    assert all(q < 0.01 for v, q in enumerate(expected) if v not in p)


def test_ties() -> None:
    equal = torch.zeros(8)
    assert set(draws(equal, GRID, temperature=0.0)[0].tolist()) == {0}
    assert set(draws(equal, GRID, top_k=1)[0].tolist()) == set(range(8))  # ties of the k-th are kept
    assert set(draws(equal, GRID, top_p=0.5)[0].tolist()) == {0, 1, 2, 3}  # lower index first
    assert set(draws(equal, GRID, top_p=0.51)[0].tolist()) == {0, 1, 2, 3, 4}
    some = torch.tensor([1.0, 5.0, 2.0, 5.0, 5.0, 0.0])
    assert set(draws(some, GRID, temperature=0.0)[0].tolist()) == {1}
    assert set(draws(some, GRID, top_k=2)[0].tolist()) == {1, 3, 4}
    assert set(draws(some, GRID, top_p=0.5)[0].tolist()) == {1, 3}
    assert set(draws(some, GRID, top_k=2, top_p=0.3)[0].tolist()) == {1}


def test_extreme_temperatures_and_logits() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    assert set(draws(logits, GRID, temperature=1e-5)[0].tolist()) == {1}
    counts = torch.bincount(draws(logits, GRID, temperature=1e8)[0], minlength=4)
    assert bool((counts > 200).all())
    huge = torch.tensor([-3e38, 3e38, 0.0, 2e38])
    tokens, log_probs = draws(huge, GRID)
    assert set(tokens.tolist()) == {1}
    assert bool((log_probs == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_weights_give_tokens_in_range(kind: str) -> None:
    model = make_model(kind)
    model.head_weight = model.head_weight * float("nan")
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        tokens, log_probs = model.generate(prompt, 5, return_log_probs=True, **filters)
        assert bool(((tokens >= 0) & (tokens < 23)).all())
        if filters.get("temperature") != 0.0:
            assert bool(log_probs.isnan().all())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_frequencies(kind: str) -> None:
    """A chi-squared test of 20 000 rows' first draws against the softmax."""
    logits = torch.linspace(-1.5, 1.5, 16)
    prompt = torch.zeros(20_000, 1, dtype=torch.int64)
    tokens = head_only(logits, kind).generate(prompt, 1, rng=torch.tensor([1, 0])).flatten()
    expected = logits.double().softmax(0) * 20_000
    counts = torch.bincount(tokens, minlength=16).double()
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 45.0  # 15 degrees of freedom: passed at random with probability 1 - 8e-5
    rows = head_only(logits, kind).generate(prompt[:50], 400, rng=torch.tensor([2, 0]))
    along = torch.bincount(rows.flatten(), minlength=16).double()
    assert float(((along - expected) ** 2 / expected).sum()) < 45.0


# ---- errors and the dispatcher ---------------------------------------------------------------------------------------

I64 = torch.int64
ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": [1]}, TypeError, "prompt must be an int64 Tensor"),
    ({"prompt": torch.zeros(2, 1)}, ValueError, "prompt must be torch.int64"),
    ({"prompt": torch.zeros(2, dtype=I64)}, RuntimeError, r"prompt must be \[B, P\]"),
    ({"prompt": torch.zeros(2, 0, dtype=I64)}, RuntimeError, "P > 0"),
    ({"prompt": torch.full((2, 1), 23)}, IndexError, r"prompt has token 23, out of range \[0, 23\)"),
    ({"prompt": torch.full((2, 1), -1)}, IndexError, "prompt has token -1"),
    ({"length": -1}, ValueError, "length must not be negative"),
    ({"length": 2.0}, TypeError, "length must be an int"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
    ({"temperature": "hot"}, TypeError, "temperature must be a float"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1"),
    ({"top_k": 2.5}, TypeError, "top_k must be an int"),
    ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ({"top_p": 1.1}, ValueError, "top_p must be in"),
    ({"u": torch.zeros(2, 4)}, RuntimeError, r"u must be \[B, length\] = \[2, 5\]"),
    ({"u": torch.zeros(2, 5, dtype=I64)}, ValueError, "u must be of a floating dtype"),
    ({"u": torch.full((2, 5), 1.0)}, ValueError, r"u must be in \[0, 1\), got values from 1.0 to 1.0"),
    ({"u": torch.full((2, 5), -0.5)}, ValueError, r"u must be in \[0, 1\)"),
    ({"u": torch.full((2, 5), float("nan"))}, ValueError, r"u must be in \[0, 1\)"),
    ({"u": torch.zeros(2, 5), "rng": torch.zeros(2, dtype=I64)}, ValueError, "cannot be given together"),
    ({"rng": torch.zeros(3, dtype=I64)}, RuntimeError, r"rng must be \[2\]"),
    ({"rng": torch.zeros(2)}, ValueError, "rng must be torch.int64"),
    ({"weight_dtype": torch.float16}, ValueError, "weight_dtype must be None, torch.float32 or torch.bfloat16"),
    ({"zoneout_h": 1.5}, ValueError, "zoneout_h must be a probability"),
    ({"layers": []}, ValueError, "at least one layer"),
    ({"layers": [(torch.zeros(4, 4),)]}, ValueError, r"layers\[0\] must hold"),
    ({"head_weight": torch.zeros(23, 5)}, RuntimeError, r"head_weight must be \[V, H\] = \[23, 12\]; got \[23, 5\]"),
    ({"head_weight": torch.zeros(22, 12)}, RuntimeError, "head_weight must be"),
    ({"head_bias": torch.zeros(22)}, RuntimeError, r"head_bias must be \[V\] = \[23\]"),
    ({"embedding": torch.zeros(23, 8)}, RuntimeError, r"layers\[0\] weight_ih must be \[gates, I\]"),
    ({"embedding": torch.zeros(23, 9, dtype=I64)}, ValueError, "embedding must be of a floating dtype"),
    ({"state": []}, ValueError, "state must hold one"),
    ({"state": 5}, TypeError, "state must be a list with one .* per layer, got int"),
    ({"state": torch.zeros(2, 2, 17)}, TypeError, "state must be a list with one .* per layer, got Tensor"),
    ({"state": [5, 5]}, TypeError, r"state\[0\] must be a .*, got int"),
    ({"generator": 5}, TypeError, "generator must be a torch.Generator or None, got int"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_error_messages(cell: str, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = make_model(cell)
    arguments: dict[str, Any] = {
        "prompt": torch.zeros(2, 1, dtype=I64),
        "length": 5,
        "embedding": model.embedding,
        "layers": model.layers,
        "head_weight": model.head_weight,
        "head_bias": model.head_bias,
    }
    function = ops.gru_generate if cell == "gru" else ops.lstm_generate
    with pytest.raises(kind, match=message):
        function(**{**arguments, **change})


@pytest.mark.parametrize("kind", KINDS)
def test_errors_in_layers_and_state(kind: str) -> None:
    model = make_model(kind)
    prompt = torch.zeros(2, 1, dtype=I64)
    good = model.layers[1]
    first = good[1]
    assert first is not None
    model.layers[1] = (good[0], first[:-1], *good[2:])
    with pytest.raises(RuntimeError, match=r"layers\[1\] weight_hh must be"):
        model.generate(prompt, 3)
    model.layers[1] = (good[0], first.double(), *good[2:])
    with pytest.raises(RuntimeError, match=r"layers\[1\] weight_hh must be torch.float32"):
        model.generate(prompt, 3)
    model.layers[1] = (None, *good[1:])
    with pytest.raises(TypeError, match=r"layers\[1\] weight_ih must be a Tensor"):
        model.generate(prompt, 3)
    model.layers[1] = good

    def states(*sizes: int) -> list[Any]:
        return [torch.zeros(2, s) if kind == "gru" else (torch.zeros(2, s), torch.zeros(2, s)) for s in sizes]

    with pytest.raises(
        RuntimeError, match=r"state\[1\].* must be \[B, H\] = \[2, 12\]; got|must be \[B, H\] = \[2, 12\], got"
    ):
        model.generate(prompt, 3, state=states(17, 13))
    with pytest.raises(ValueError, match="state must hold one"):
        model.generate(prompt, 3, state=states(17))


def test_errors_of_an_lstm_alone() -> None:
    model = make_model("lstm")
    prompt = torch.zeros(2, 1, dtype=I64)
    with pytest.raises(TypeError, match=r"state\[1\] must be a pair \(h, c\), got tuple of 3"):
        model.generate(prompt, 3, state=[(torch.zeros(2, 17),) * 2, (torch.zeros(2, 12),) * 3])
    with pytest.raises(ValueError, match="eps must be finite and not negative, got -1"):
        model.generate(prompt, 3, eps=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatcher(kind: str) -> None:
    name = "gru_generate" if kind == "gru" else "lstm_generate"
    if name not in recurrent_ops._cpu_kernels:
        pytest.skip("the native library is absent")
    model = make_model(kind)
    prompt = torch.zeros(2, 1, dtype=I64)
    zeros = torch.zeros(2, 29)
    states = (zeros,) if kind == "gru" else (zeros, zeros)
    weights = [tensor for layer in model.layers for tensor in layer if tensor is not None]
    tail: tuple[Any, ...] = (0.1, False) if kind == "gru" else (kind == "layer norm", 1e-5, 0.1, 0.1, False)
    arguments = (prompt, 5, model.embedding, weights, model.head_weight, model.head_bias, *states)
    op = getattr(torch.ops.genfuse, name).default
    registry.opcheck(op, (*arguments, torch.rand(2, 5), None, 1.0, 0, 1.0, *tail))
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        op(prompt + 100, *arguments[1:], torch.rand(2, 5), None, 1.0, 0, 1.0, *tail)
    with pytest.raises(RuntimeError, match="u or rng must be given"):
        op(*arguments, None, None, 1.0, 0, 1.0, *tail)
    for rng in (None, torch.zeros(2, dtype=I64)):
        with pytest.raises(NotImplementedError, match="put the samples in the batch"):
            torch.func.vmap(lambda p, rng=rng: model.generate(p, 3, rng=rng))(prompt.unsqueeze(0))
    torch._dynamo.reset()
    rng = torch.tensor([1, 2])
    compiled = torch.compile(lambda p: model.generate(p, 7, rng=rng), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prompt), model.generate(prompt, 7, rng=rng))
