"""The language model against its twin in plain PyTorch: same parameters, same masks, same numbers, same loss curve."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from genfuse import models, reference
from sampling_rule import assert_log_probs
from tolerances import assert_as_accurate, eager_runs
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = ("lstm", "layernorm_lstm", "gru")
REGULARISERS = {
    "dropout": 0.2,
    "input_dropout": 0.1,
    "hidden_dropout": 0.15,
    "embedding_dropout": 0.1,
    "weight_drop": 0.3,
    "zoneout_h": 0.1,
    "activation_regularization": 2.0,
    "temporal_activation_regularization": 1.0,
}
V, E, H, L, B, T = 17, 6, 10, 2, 4, 9


@pytest.fixture
def one_thread() -> Iterator[None]:
    """These models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(cell: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and its twin, built from the same seed."""
    both = []
    for package in (models, reference):
        torch.manual_seed(1)
        both.append(package.LSTMLanguageModel(V, E, H, L, cell=cell, **options).to(dtype))
    return both[0], both[1]


def some_tokens(batch: int = B, steps: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, steps + 1), generator=torch.Generator().manual_seed(seed))


def changed(model: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> torch.nn.Module:
    """A copy of a model, its parameters changed."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = change(parameter.detach())
    return model


def logits_of(model: torch.nn.Module, prompt: Tensor, tokens: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits that tokens were drawn by after a prompt, by a model whose parameters are changed."""
    with torch.no_grad():
        logits, _ = changed(model, change)(torch.cat([prompt, tokens], 1))
    return logits[:, prompt.size(1) - 1 : -1]


def regularisers(cell: str) -> dict[str, float]:
    return REGULARISERS if cell == "gru" else REGULARISERS | {"zoneout_c": 0.2}


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_is_the_twins(cell: str, tie_weights: bool) -> None:
    ours, twin = pair(cell, tie_weights=tie_weights)
    left, right = ours.state_dict(), twin.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)  # one seed, one initialisation
    twin.load_state_dict(ours.state_dict())
    ours.load_state_dict(twin.state_dict())
    assert (ours.head.weight is ours.embedding.weight) == tie_weights


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_forward_loss_and_gradients(cell: str, tie_weights: bool) -> None:
    ours, twin = pair(cell, tie_weights=tie_weights, **regularisers(cell))
    tokens = some_tokens()
    for training in (False, True):
        losses = []
        for model in (ours, twin):
            model.train(training).zero_grad()
            torch.manual_seed(5)
            loss, state = model.loss(tokens[:, :-1], tokens[:, 1:])
            torch.manual_seed(6)
            loss_again, _ = model.loss(tokens[:, :-1], tokens[:, 1:], state)  # from the state that the first left
            (loss + loss_again).backward()
            losses.append(torch.stack([loss, loss_again]))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
        for (name, left), right in zip(ours.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                left.grad, right.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
            )
    ours.eval(), twin.eval()
    torch.testing.assert_close(ours(tokens)[0], twin(tokens)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.log_prob(tokens), twin.log_prob(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_are_the_twins(cell: str, tie_weights: bool) -> None:
    tokens = some_tokens()
    found = []
    for model in pair(cell, tie_weights=tie_weights):
        parameters = list(model.parameters())
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        found.append(torch.autograd.grad(penalty, parameters))
    for ours, twins in zip(*found, strict=True):
        torch.testing.assert_close(ours, twins, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("regularised", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_trained_side_by_side(cell: str, regularised: bool) -> None:
    """Thirty steps of Adam on one text from one seed: the curves agree, and both learn.

    Training layer norm over ten units multiplies any difference by about ten a step (two float64 runs of the twin whose
    weights differ by 1e-16 do so too), so it is compared in float64 and with smaller steps.
    """
    chaotic = cell == "layernorm_lstm"
    text = some_tokens(8, 12, seed=3).repeat(1, 2)
    curves = []
    for model in pair(cell, torch.float64 if chaotic else torch.float32, **(regularisers(cell) if regularised else {})):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.005 if chaotic else 0.02)
        torch.manual_seed(2)
        curve = []
        for _ in range(30):
            loss, _ = model.loss(text[:, :-1], text[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-5, atol=1e-5)
    assert curves[0][-5:].mean() < curves[0][:5].mean() - 0.05


@pytest.mark.parametrize("cell", CELLS)
def test_log_prob_is_a_distribution(cell: str) -> None:
    """Over all texts of three tokens after a given one, probabilities sum to one."""
    torch.manual_seed(0)
    model = models.LSTMLanguageModel(3, 4, 5, 1, cell=cell).double()
    texts = torch.tensor([(1, *rest) for rest in itertools.product(range(3), repeat=3)])
    torch.testing.assert_close(model.log_prob(texts).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(model.log_prob(texts[:, :1]), torch.zeros(27, dtype=torch.float64))


@pytest.mark.parametrize("cell", CELLS)
def test_state_carries_the_text(cell: str) -> None:
    model, _ = pair(cell)
    tokens = some_tokens()
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    second, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_generate_is_the_twins(cell: str) -> None:
    ours, twin = pair(cell, torch.float32, zoneout_h=0.1)
    ours.eval(), twin.eval()
    prompt, u = some_tokens(3, 4), torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "u": u}
    tokens, log_probs, state = ours.generate(prompt, 12, return_log_probs=True, return_state=True, **options)
    expected, expected_log_probs, _ = twin.generate(prompt, 12, **options)
    assert torch.equal(tokens, expected)
    filters = {name: options[name] for name in ("temperature", "top_k", "top_p")}
    for found in (log_probs, expected_log_probs):
        assert_log_probs(found, tokens, lambda change: logits_of(twin, prompt, tokens, change), filters)
    # The state lets the text go on where it stopped.
    longer = ours.generate(prompt, 20, temperature=0.0)
    start, state = ours.generate(prompt, 12, temperature=0.0, return_state=True)
    rest = ours.generate(start[:, -1:], 8, temperature=0.0, state=state)
    assert torch.equal(torch.cat([start, rest], 1), longer)


def test_generate_depends_on_the_seed_alone() -> None:
    model, _ = pair("lstm", torch.float32, dropout=0.5)
    prompt = some_tokens(3, 4)

    def draw(rows: int) -> Tensor:
        return model.generate(prompt[:rows], 10, generator=torch.Generator().manual_seed(8))

    assert torch.equal(draw(3), draw(3))
    assert torch.equal(draw(3)[:2], draw(2))
    assert not torch.equal(draw(3), model.generate(prompt, 10, generator=torch.Generator().manual_seed(9)))
    assert torch.equal(model.generate(prompt, 5, temperature=0.0), model.eval().generate(prompt, 5, temperature=0.0))


def test_log_probs_of_a_sample_are_the_models() -> None:
    model, twin = pair("lstm", torch.float32)
    prompt = some_tokens(3, 4)
    tokens, log_probs = model.generate(prompt, 10, return_log_probs=True)
    whole = torch.cat([prompt, tokens], 1)

    def expected(change: Callable[[Tensor], Tensor]) -> Tensor:
        other = changed(twin, change)
        return other.log_prob(whole) - other.log_prob(prompt)

    (eager,) = eager_runs(lambda nudge: [expected(nudge)])
    assert_as_accurate(log_probs.sum(1), eager, expected(Tensor.double), "log_probs")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"cell": "rnn"}, "cell must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"cell": "gru", "zoneout_c": 0.1}, "GRU has neither"),
        ({"weight_drop": 1.5}, "weight_drop"),
        ({"activation_regularization": -1.0}, "activation_regularization must be finite and not negative, got -1.0"),
        ({"temporal_activation_regularization": float("nan")}, "temporal_activation_regularization must be finite"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    arguments = {"vocab_size": V, "embedding_dim": E, "hidden_size": H, "num_layers": L} | options
    with pytest.raises(ValueError, match=message):
        models.LSTMLanguageModel(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size must be an int, got str"),
        ({"hidden_size": 10.0}, "hidden_size must be an int, got float"),
        ({"num_layers": None}, "num_layers must be an int, got NoneType"),
        ({"dropout": "much"}, "dropout must be a number, got str"),
        ({"activation_regularization": None}, "activation_regularization must be a number, got NoneType"),
    ],
)
def test_arguments_of_a_wrong_type(options: dict[str, object], message: str) -> None:
    arguments = {"vocab_size": V, "embedding_dim": E, "hidden_size": H, "num_layers": L} | options
    with pytest.raises(TypeError, match=message):
        models.LSTMLanguageModel(**arguments)


def test_generate_says_why_it_takes_no_vmap() -> None:
    model, _ = pair("lstm", torch.float32)
    with pytest.raises(NotImplementedError, match="put the samples in the batch"):
        torch.func.vmap(lambda prompt: model.generate(prompt, 3))(some_tokens()[None])


def test_wrong_tokens() -> None:
    model, _ = pair("lstm")
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], got \[3\]"):
        model.log_prob(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        model(torch.full((1, 2), V))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens, \[2, 5\]; got \[5, 2\]"):
        model.loss(tokens, tokens.t())  # as many targets as tokens, but not theirs
