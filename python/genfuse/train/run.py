"""Training, evaluating and sampling a language model: what the command line calls, and a script can call as well."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import (
    CONFIG,
    LAST,
    WEIGHTS,
    SavedModel,
    first_line,
    load_model,
    make_config,
    model_hash,
    read_config,
    remove_unfinished,
    write_json,
    write_text,
)
from .errors import UserError, memory_for
from .settings import OPTION_NAMES, LanguageModelSettings, process_rank
from .text import DEFAULT_DATA, TextData, Tokens, Vocabulary, load_text

if TYPE_CHECKING:
    from genfuse.models import LSTMLanguageModel

__all__ = ["choose_folder", "evaluate", "held_out_loss", "sample", "train_language_model"]

RUNS = Path("runs")
Say = Callable[[str], None]


def choose_folder(name: str, out: Path | None, resume: bool, processes: bool) -> Path:
    """The run's folder: `out`, or a new one under ``runs/``, or with `resume` the newest there.

    Args:
        name: of the kind of run, e.g. ``"lstm"``: folders are ``runs/lstm``, ``runs/lstm-2``, ...
        out: given by the user.
        resume: continue a run.
        processes: there are several, which must agree without talking: then the name is not numbered.
    """
    if out is not None:
        return out
    if resume:
        found = [path for path in (RUNS / name, *RUNS.glob(f"{name}-*")) if (path / CONFIG).exists()]
        if not found:
            raise UserError(f"there is no run in {RUNS / name} to resume: leave out --resume, or name it with --out.")
        return max(found, key=lambda path: (path / CONFIG).stat().st_mtime)
    folder, number = RUNS / name, 1
    while not processes and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def train_language_model(
    given: dict[str, Any],
    *,
    out: Path | None = None,
    resume: bool = False,
    accelerator: str = "auto",
    devices: str = "auto",
    nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    say: Say = print,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Train a language model on a text, keep the best one, and report how good it is.

    Args:
        given: settings that differ from the defaults of `LanguageModelSettings`. With `resume`, the saved ones hold,
            and only `epochs` may be given another value.
        out: the run's folder; see `choose_folder`.
        resume: continue from the folder's ``last.ckpt``: with the same result as if the run had not been interrupted.
        accelerator, devices, nodes, strategy, precision: as `lightning.pytorch.Trainer` takes them; ``devices="auto"``
            is one device, or under torchrun one for each of its processes.
        say: prints a line for the user; called in the first process only.
        progress: show a progress bar.

    Returns:
        What ``metrics.json`` holds; None in processes other than the first.

    Raises:
        UserError: data, settings, folder or devices will not do.
        Stopped: SIGINT or SIGTERM came; ``last.ckpt`` holds the last step.

    Example:
        >>> train_language_model({"epochs": 1, "hidden_size": 16}, out=Path("runs/tiny"))  # doctest: +SKIP
    """
    _quieten()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices == "auto":
        devices = str(local)
        nodes = (
            max(nodes, int(os.environ.get("WORLD_SIZE", 1)) // local) if "TORCHELASTIC_RUN_ID" in os.environ else nodes
        )
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"  # other devices have no kernels of ours
    first = process_rank() == 0
    say = say if first else _silent
    folder = choose_folder("lstm", out, resume, processes=devices != "1" or nodes > 1)

    settings = _settings(given, folder, resume)
    begun = (folder / CONFIG).exists()
    anew, resume = resume and not begun, resume and begun
    source = load_text(settings.data)
    saved = read_config(folder) if resume else None
    if saved is not None and saved["run"]["fingerprint"] != source.fingerprint:
        raise UserError(
            f"{source.name} has changed since the run in {folder} began, which cannot go on with other text."
        )
    data = TextData(source, settings.level, held_out=settings.held_out, context=settings.context)
    arguments = settings.model_arguments(data.vocabulary.size)
    run = {"settings": settings.to_json(), "data": source.name, "fingerprint": source.fingerprint}
    config = make_config("LSTMLanguageModel", arguments, data.vocabulary, run)

    from genfuse.models import LSTMLanguageModel

    from .module import Plan

    plan = Plan(len(data.train), settings)
    done = _checkpoint_step(folder, config) if resume else 0
    machine = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": precision,
    }
    # Before anything is written or said: a machine that cannot do it leaves no trace of the attempt.
    trainer, recorder = _trainer(folder, data, settings, plan, config, done, say, progress, machine)
    model = None
    if done < plan.total_steps:
        torch.manual_seed(settings.seed)
        with memory_for(f"a model with {_sizes(settings, 'hidden_size', 'embedding_dim', 'layers')}"):
            model = LSTMLanguageModel(**arguments)
    if first:
        _prepare_folder(folder, config, resume)
    if anew:
        say(f"There is no run in {folder} yet: beginning one.")
    _introduce(say, folder, data, settings, plan, done if resume else None)
    if model is not None:
        with memory_for(f"training with {_sizes(settings, 'batch_size', 'context', 'hidden_size')}"):
            _fit(trainer, model, data, settings, plan, folder / LAST if done else None)
    if not first:
        return None
    return _finish(folder, data, settings, plan, None if model is None else recorder, say)


def _settings(given: dict[str, Any], folder: Path, resume: bool) -> LanguageModelSettings:
    given = dict(given)
    if given.get("data") not in (None, DEFAULT_DATA):
        given["data"] = os.path.abspath(given["data"])
    if not resume or not (folder / CONFIG).exists():
        return LanguageModelSettings(**given)
    config = read_config(folder)
    try:
        saved = LanguageModelSettings.from_json(config["run"]["settings"])
    except (KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} does not hold the settings of a run.") from None
    for name, value in given.items():
        before = getattr(saved, name)
        if value != before and name != "epochs":
            option = "--" + OPTION_NAMES.get(name, name).replace("_", "-")
            raise UserError(f"the run in {folder} began with {option} {before}: it cannot be resumed with {value}.")
    return LanguageModelSettings(**{**saved.to_json(), "epochs": given.get("epochs", saved.epochs)})


def _sizes(settings: LanguageModelSettings, *names: str) -> str:
    """Settings as options: ``--layers 2 and --context 3``."""
    *rest, last = (f"--{name.replace('_', '-')} {getattr(settings, name)}" for name in names)
    return f"{', '.join(rest)} and {last}"


def _prepare_folder(folder: Path, config: dict[str, Any], resume: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        if not resume:
            taken = [name for name in (CONFIG, WEIGHTS, LAST) if (folder / name).exists()]
            if taken and CONFIG not in taken:
                raise UserError(f"{folder} holds {taken[0]} but no {CONFIG}: name another folder with --out.")
            if taken:
                raise UserError(f"{folder} already holds a run: continue it with --resume, or name another with --out.")
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {(error.strerror or str(error)).lower()}.") from None


def _checkpoint_step(folder: Path, config: dict[str, Any]) -> int:
    """The global step of ``last.ckpt``, 0 if there is none yet."""
    path = folder / LAST
    if not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = int(checkpoint["global_step"])
        shapes = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    except Exception as error:  # torch.load raises whatever its many readers raise
        raise UserError(f"{path} is damaged or no checkpoint of this program ({first_line(error)}).") from None
    from genfuse.models import LSTMLanguageModel

    with torch.device("meta"):
        model = LSTMLanguageModel(**config["arguments"])
    if shapes != {f"model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}:
        raise UserError(f"{path} is the checkpoint of another model than {folder / CONFIG} describes.")
    return step


def _introduce(
    say: Say, folder: Path, data: TextData, settings: LanguageModelSettings, plan: Any, done: int | None
) -> None:
    source = data.source
    files = f" ({source.files} files, {source.skipped} passed over)" if source.files > 1 or source.skipped else ""
    say(f"data      {source.name}{files}: {len(source.text):,} characters, {len(data.held_out_text):,} held out")
    vocabulary = data.vocabulary
    kind = f"{vocabulary.size} characters" if vocabulary.level == "char" else "bytes"
    say(f"model     {settings.layers} x {settings.hidden_size} {settings.cell} over {kind}")
    say(f"training  {settings.epochs} epochs, {plan.total_steps} steps of {settings.batch_size} x {settings.context}")
    if done is None:
        say(f"folder    {folder}")
    elif done == 0:
        say(f"folder    {folder}: there is no {LAST} yet, beginning at step 0")
    else:
        say(f"folder    {folder}: resuming at step {done}")


def _trainer(
    folder: Path,
    data: TextData,
    settings: LanguageModelSettings,
    plan: Any,
    config: dict[str, Any],
    done: int,
    say: Say,
    progress: bool,
    machine: dict[str, Any],
) -> tuple[Any, Any]:
    """Lightning's trainer, and the recorder in it."""
    import lightning.pytorch as pl
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.loggers import TensorBoardLogger

    from .callbacks import AtomicCheckpointIO, ProgressBar, Recorder

    recorder = Recorder(folder, config, plan, settings.save_every, data.tokens_per_char, say)
    # What a killed process logged after its last checkpoint is logged again: drop the first account of it.
    logger = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=done + 1 if done else None)
    try:
        trainer = pl.Trainer(
            **machine,
            plugins=[AtomicCheckpointIO()],
            callbacks=[recorder, *([ProgressBar(recorder)] if progress else [])],
            logger=logger,
            max_steps=plan.total_steps,
            max_epochs=-1,
            val_check_interval=plan.evaluate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_progress_bar=progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"this machine cannot train that way: {first_line(error)}.") from None
    if settings.batch_size % trainer.world_size != 0:
        raise UserError(
            f"--batch-size {settings.batch_size} cannot be divided among {trainer.world_size} processes: "
            "make it a multiple of their number."
        )
    return trainer, recorder


def _fit(
    trainer: Any,
    model: LSTMLanguageModel,
    data: TextData,
    settings: LanguageModelSettings,
    plan: Any,
    resume_from: Path | None,
) -> None:
    from .module import LanguageModelData, LanguageModelModule

    module = LanguageModelModule(model, settings, plan.total_steps)
    try:
        trainer.fit(
            module,
            datamodule=LanguageModelData(data, plan),
            ckpt_path=None if resume_from is None else str(resume_from),
            weights_only=True,
        )
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to a KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise


def _finish(
    folder: Path, data: TextData, settings: LanguageModelSettings, plan: Any, recorder: Any, say: Say
) -> dict[str, Any]:
    """The report at the end: a function of the best model and the history, so it survives a kill as well."""
    import json

    from .plot import draw_curve

    report = folder / "metrics.json"
    if recorder is None:
        checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
        history = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Recorder"))
        train, held_out, best, seconds = (history[name] for name in ("train", "held_out", "best", "seconds"))
        if report.exists():
            say("the run is complete: there is nothing to resume.")
    else:
        recorder.state_dict()  # brings the clock up to date
        train, held_out, best, seconds = recorder.train, recorder.held_out, recorder.best, recorder.seconds
    draw_curve(folder / "loss.png", train, held_out, data.tokens_per_char / math.log(2.0))
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
    write_text(report, json.dumps(metrics, indent=2) + "\n")
    say("")
    say(f"best model at step {best[0]}, on held-out text:")
    say(f"  {metrics['held_out_bits_per_char']:.4f} bits/char")
    say(f"  perplexity {metrics['held_out_perplexity']:.3f} per character")
    say(f"  BLEU-4 of samples {metrics['bleu']:.4f}")
    say(f"  {_duration(seconds)} of training, {metrics['tokens_per_second']:,} tokens/s")
    say("")
    say(f"a sample after {prompt!r}:")
    say("")
    say(text)
    say("")
    say(f"saved in {folder}: {WEIGHTS}, {CONFIG}, loss.png, metrics.json, sample.txt, tensorboard/")
    say(f"more text: genfuse sample {folder} --prompt '...'")
    return metrics


def _first_words(text: str, most: int = 24) -> str:
    """The first line with letters in it, to begin a sample with."""
    line = next((line.strip() for line in text.splitlines()[1:] if len(line.split()) > 2), text.strip() or text)
    return line[:most].rsplit(" ", 1)[0] if " " in line[:most] else line[:most]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _silent(line: str) -> None:
    pass


def _quieten() -> None:
    """Lightning's hints are for who writes training code, not for who runs it."""
    import lightning.pytorch  # noqa: F401  it sets the levels of its loggers when it is imported

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\.optim\.lr_scheduler")


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
