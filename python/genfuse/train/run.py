"""Training, evaluating and sampling a language model: what the command line calls, and a script can call as well."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfuse.models import LSTMLanguageModel

from .checkpoint import CONFIG, LANGUAGE, WEIGHTS, SavedModel, load_model, make_config, model_hash, write_text
from .engine import Job, Outcome, choose_folder, duration, train
from .errors import UserError, memory_for
from .measure import Measure
from .settings import LanguageModelSettings
from .text import DEFAULT_DATA, Text, TextData, Tokens, Vocabulary, load_text

__all__ = ["choose_folder", "evaluate", "held_out_loss", "sample", "train_language_model"]


def train_language_model(given: dict[str, Any], **options: Any) -> dict[str, Any] | None:
    """Train a language model on a text, keep the best one, and report how good it is.

    Args:
        given: settings that differ from the defaults of `LanguageModelSettings`. With `resume`, the saved ones hold,
            and only `epochs` may be given another value.
        options: ``out``, ``resume``, ``accelerator``, ``devices``, ``nodes``, ``strategy``, ``precision``, ``say``,
            ``progress``: see `genfuse.train.engine.train`.

    Returns:
        What ``metrics.json`` holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.

    Example:
        >>> train_language_model({"epochs": 1, "hidden_size": 16}, out=Path("runs/tiny"))  # doctest: +SKIP
    """
    return train(LanguageModelJob, given, **options)


class LanguageModelJob(Job):
    """A run of ``genfuse train lstm``."""

    name = "lstm"
    format = LANGUAGE
    model = "LSTMLanguageModel"
    settings_class = LanguageModelSettings
    data_names = (None, DEFAULT_DATA)
    report = "metrics.json"
    model_sizes = ("hidden_size", "embedding_dim", "layers")
    step_sizes = ("batch_size", "context", "hidden_size")

    @classmethod
    def read(cls, settings: LanguageModelSettings) -> Text:
        return load_text(settings.data)

    def __init__(self, settings: LanguageModelSettings, source: Text) -> None:
        from .module import LanguageModelPlan

        self.settings = settings
        self.data = data = TextData(source, settings.level, held_out=settings.held_out, context=settings.context)
        self.arguments = settings.model_arguments(data.vocabulary.size)
        run = {"settings": settings.to_json(), "data": source.name, "fingerprint": source.fingerprint}
        self.config = make_config(self.model, self.arguments, run, data.vocabulary)
        self.plan = self.windows = LanguageModelPlan(len(data.train), settings)
        bits = data.tokens_per_char / math.log(2.0)  # bits per character of one nat per token
        self.measures = [
            Measure(
                unit="bits/char",
                key="bits_per_char",
                scale=bits,
                axis="bits per character",
                held_out="text",
                items="tokens",
                items_per_step=settings.batch_size * settings.context,
                more=lambda nats: {"perplexity": math.exp(min(nats * data.tokens_per_char, 700.0))},
            )
        ]

    def build(self) -> LSTMLanguageModel:
        return LSTMLanguageModel(**self.arguments)

    def training(self, model: LSTMLanguageModel) -> Any:
        from .module import LanguageModelData, LanguageModelModule

        return LanguageModelModule(model, self.settings, self.plan), LanguageModelData(self.data, self.windows)

    def introduction(self) -> list[str]:
        source, settings, vocabulary = self.data.source, self.settings, self.data.vocabulary
        files = f" ({source.files} files, {source.skipped} passed over)" if source.files > 1 or source.skipped else ""
        kind = f"{vocabulary.size} characters" if vocabulary.level == "char" else "bytes"
        steps = f"{self.plan.total_steps} steps of {settings.batch_size} x {settings.context}"
        kept = len(self.data.held_out_text)
        return [
            f"data      {source.name}{files}: {len(source.text):,} characters, {kept:,} held out",
            f"model     {settings.layers} x {settings.hidden_size} {settings.cell} over {kind}",
            f"training  {settings.epochs} epochs, {steps}",
        ]

    def finish(self, outcome: Outcome) -> dict[str, Any]:
        folder, say, best, seconds = outcome.folder, outcome.say, outcome.best, outcome.seconds
        settings, data, plan = self.settings, self.data, self.plan
        saved = load_model(folder)
        nats_per_char = best[1] * data.tokens_per_char
        tokens = plan.total_steps * settings.batch_size * settings.context
        metrics = {
            "held_out_bits_per_char": nats_per_char / math.log(2.0),
            "held_out_perplexity": math.exp(nats_per_char),
            "best_step": best[0],
            "steps": plan.total_steps,
            "bleu": bleu(saved.model, saved.vocabulary, data.held_out, seed=settings.seed),
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / max(seconds, 1e-9)),
        }
        prompt = _first_words(data.held_out_text)
        text = prompt + sample(saved, prompt, 600, temperature=0.7, seed=settings.seed)
        write_text(folder / "sample.txt", text + "\n")
        write_text(folder / self.report, json.dumps(metrics, indent=2) + "\n")
        say("")
        say(f"best model at step {best[0]}, on held-out text:")
        say(f"  {metrics['held_out_bits_per_char']:.4f} bits/char")
        say(f"  perplexity {metrics['held_out_perplexity']:.3f} per character")
        say(f"  BLEU-4 of samples {metrics['bleu']:.4f}")
        say(f"  {duration(seconds)} of training, {metrics['tokens_per_second']:,} tokens/s")
        say("")
        say(f"a sample after {prompt!r}:")
        say("")
        say(text)
        say("")
        say(f"saved in {folder}: {WEIGHTS}, {CONFIG}, loss.png, {self.report}, sample.txt, tensorboard/")
        say(f"more text: genfuse sample {folder} --prompt '...'")
        return metrics


JOBS = (LanguageModelJob,)


def _first_words(text: str, most: int = 24) -> str:
    """The first line with letters in it, to begin a sample with."""
    line = next((line.strip() for line in text.splitlines()[1:] if len(line.split()) > 2), text.strip() or text)
    return line[:most].rsplit(" ", 1)[0] if " " in line[:most] else line[:most]


# Scoring and sampling.


def held_out_loss(model: LSTMLanguageModel, tokens: Tokens) -> float:
    """Cross entropy of a text under a model, in nats per token, with the state carried through the text.

    Args:
        model: in eval mode.
        tokens: at least two.
    """
    from .module import EvaluationStreams

    device = model.head.weight.device
    total, count, state = 0.0, 0, None
    with torch.no_grad():
        for window in EvaluationStreams(tokens):
            window = window.to(device)
            nll, _, state = model.loss_parts(window[:, :-1], window[:, 1:], state)
            total += float(nll) * window[:, 1:].numel()
            count += window[:, 1:].numel()
    return total / count


def bleu(
    model: LSTMLanguageModel, vocabulary: Vocabulary, tokens: Tokens, *, seed: int, samples: int = 32, length: int = 512
) -> float:
    """BLEU-4 (Papineni et al. 2002) of sampled passages, with passages of the text itself as references.

    Each sample continues a stretch of the text at temperature 0.7; its words are compared with all references at once,
    as Yu et al. 2016 (SeqGAN, arXiv 1609.05473, section 5) do to judge generators.

    Args:
        model: in eval mode.
        vocabulary: of the model.
        tokens: the text.
        seed: of the samples.
        samples: how many.
        length: of each, and of each reference, in tokens.
    """
    from torchmetrics.text import BLEUScore

    length = max(1, min(length, len(tokens) // 2))
    prompt_length = max(1, min(64, len(tokens) - length))
    starts = np.linspace(0, len(tokens) - prompt_length, samples).astype(np.int64)
    prompts = torch.from_numpy(tokens[starts[:, None] + np.arange(prompt_length)].astype(np.int64))
    generated = model.generate(prompts, length, temperature=0.7, generator=torch.Generator().manual_seed(seed))
    candidates = [vocabulary.decode(row) for row in generated.numpy()]
    begins = np.linspace(0, len(tokens) - length, min(128, len(tokens) // length)).astype(np.int64)
    references = [vocabulary.decode(tokens[begin : begin + length]) for begin in begins]
    return float(BLEUScore()(candidates, [references] * len(candidates)))


def sample(
    saved: SavedModel,
    prompt: str,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> str:
    """Continue a prompt with `length` tokens (characters, or bytes at byte level); none is an unknown character.

    Args:
        saved: the model.
        prompt: empty to begin after a new line.
        seed: None draws another text each time.

    Raises:
        UserError: an option is out of its range, or the text would not fit into memory.
    """
    if length < 1:
        raise UserError(f"--length must be at least 1, not {length}.")
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise UserError(f"--temperature must not be negative, and was {temperature}.")
    if top_k is not None and top_k < 1:
        raise UserError(f"--top-k must be at least 1, not {top_k}.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"--top-p is a probability: it must be in (0, 1], not {top_p}.")
    if seed is not None and not -(2**63) <= seed < 2**64:  # what torch takes
        raise UserError(f"--seed must be a number of 64 bits, not {seed}.")
    generator = torch.Generator(saved.model.head.weight.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    tokens = torch.from_numpy(saved.vocabulary.encode(prompt or "\n").astype(np.int64))
    with memory_for(f"a text of --length {length}"), _never_unknown(saved):
        drawn: Tensor = saved.model.generate(
            tokens.unsqueeze(0).to(saved.model.head.weight.device),
            length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        return saved.vocabulary.decode(drawn[0].cpu().numpy())


@contextlib.contextmanager
def _never_unknown(saved: SavedModel) -> Iterator[None]:
    """Give the placeholder for unknown characters a probability of 0: it can be read, but is nothing to write."""
    head, bias = saved.model.head, saved.model.head.bias
    if saved.vocabulary.level != "char" or saved.vocabulary.size == 1:
        yield
        return
    masked = bias.detach().clone()
    masked[0] = -math.inf
    try:
        head.bias = torch.nn.Parameter(masked)
        yield
    finally:
        head.bias = bias


def evaluate(saved: SavedModel, data: str | None = None) -> dict[str, Any]:
    """Score a saved model on the held-out part of its own data, or on all of another text.

    Returns:
        ``text`` (what was scored), ``characters``, ``unknown`` (share of characters the model does not know),
        ``bits_per_char``, ``perplexity`` (per character), ``bleu``.

    Raises:
        UserError: the text cannot be read, is too small, or the run's own data has changed.
    """
    run = saved.config.get("run", {})
    seed = 0
    if data is None:
        settings = LanguageModelSettings.from_json(run["settings"])
        seed = settings.seed  # the samples that training was judged by
        source = load_text(settings.data)
        if source.fingerprint != run["fingerprint"]:
            raise UserError(f"{source.name} has changed since the model was trained: name a text with --data.")
        parts = TextData(
            source,
            settings.level,
            held_out=settings.held_out,
            context=settings.context,
            vocabulary=saved.vocabulary,
        )
        text, name = parts.held_out_text, f"held-out part of {source.name}"
    else:
        source = load_text(data)
        text, name = source.text, source.name
    tokens = saved.vocabulary.encode(text)
    if len(tokens) < 2:
        raise UserError(f"{name} is too small to score: it has {len(tokens)} token, and at least 2 are needed.")
    unknown = float((tokens == 0).mean()) if saved.vocabulary.level == "char" else 0.0
    nats = held_out_loss(saved.model, tokens) * len(tokens) / len(text)
    return {
        "text": name,
        "characters": len(text),
        "unknown": unknown,
        "bits_per_char": nats / math.log(2.0),
        "perplexity": math.exp(nats),
        "bleu": bleu(saved.model.cpu(), saved.vocabulary, tokens, seed=seed),
    }


def describe(saved: SavedModel) -> dict[str, Any]:
    """What ``genfuse info CHECKPOINT`` says."""
    arguments = saved.config["arguments"]
    return {
        "model": saved.config["model"],
        "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
        "vocabulary": f"{saved.vocabulary.size} {'characters' if saved.vocabulary.level == 'char' else 'bytes'}",
        **arguments,
        "data": saved.config.get("run", {}).get("data"),
        "step": saved.metadata.get("step"),
        "held-out bits/char": saved.metadata.get("held_out_bits_per_char"),
        "model hash": model_hash(saved.config)[:16],
    }
