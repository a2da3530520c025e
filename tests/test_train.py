"""Training: data, files that are whole or not there, and runs that are killed, resumed, and divided among processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from genfuse.models import LSTMLanguageModel
from genfuse.train import Stopped, UserError
from genfuse.train.checkpoint import load_model, remove_unfinished, replacing
from genfuse.train.run import bleu, evaluate, held_out_loss, sample, train_language_model
from genfuse.train.settings import LanguageModelSettings
from genfuse.train.text import Text, TextData, Vocabulary, WindowOrder, default_text, load_text
from safetensors.torch import load_file, save_file

# Every kind of mask is on: what a resumed run draws must be what the uninterrupted one drew.
TINY = {
    "hidden_size": 12,
    "embedding_dim": 8,
    "layers": 2,
    "dropout": 0.1,
    "weight_drop": 0.1,
    "zoneout_h": 0.1,
    "context": 16,
    "batch_size": 8,
    "epochs": 4,
    "seed": 11,
}
TINY_OPTIONS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two; and one thread has one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(default_text()[:9000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; the other tests compare with it. It takes 4 x 63 steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(corpus, folder, save_every=9)
    torch.set_num_threads(threads)
    return folder


def train(corpus: Path, folder: Path, say: Callable[[str], None] | None = None, **options: Any) -> Any:
    resume = options.pop("resume", False)
    given = {} if resume else {**TINY, "data": str(corpus)}
    return train_language_model({**given, **options}, out=folder, resume=resume, say=say or (lambda line: None))


def start(corpus: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "genfuse", "train", "lstm", "--data", str(corpus), "--out", str(folder)]
    return subprocess.Popen(
        [*command, *TINY_OPTIONS, *options], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def checkpoint(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return loaded


def history(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = next(v for k, v in checkpoint(folder)["callbacks"].items() if k.startswith("Recorder"))
    return state


def assert_same_run(left: Path, right: Path) -> None:
    """Bit for bit: last weights, optimiser, loss history, best weights, report."""
    a, b = checkpoint(left), checkpoint(right)
    assert a["global_step"] == b["global_step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for key, state in a["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][key][name]), (key, name)
    assert a["lr_schedulers"] == b["lr_schedulers"]
    for name in ("train", "held_out", "best"):
        assert history(left)[name] == history(right)[name], name
    best_left, best_right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert all(torch.equal(best_left[name], best_right[name]) for name in best_left)
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in (left, right)]
    for name in ("held_out_bits_per_char", "held_out_perplexity", "best_step", "steps", "bleu"):
        assert reports[0][name] == reports[1][name], name
    assert (left / "sample.txt").read_text() == (right / "sample.txt").read_text()


# Data.


def test_vocabulary() -> None:
    text = "naïve 日本 🙂\n"
    characters = Vocabulary.of(text, "char")
    assert characters.decode(characters.encode(text)) == text
    assert characters.encode("xn").tolist()[0] == 0
    assert characters.unknown("nx日") == ["x"]
    assert characters.decode([0]) == "\N{REPLACEMENT CHARACTER}"
    data = Vocabulary("byte")
    assert data.size == 256
    assert data.decode(data.encode(text)) == text
    assert data.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 400)))
    assert Vocabulary.of(many, "char").encode(many).dtype == np.uint16


def test_default_text_has_no_leaks() -> None:
    """No line of the held-out part, headings and short lines apart, stands in the part that is learnt from."""
    text = default_text()
    assert 300_000 < len(text) < 500_000
    cut = int(len(text) * 0.9)
    learnt = {line.strip() for line in text[:cut].splitlines()}
    held_out = [line.strip() for line in text[cut:].splitlines() if len(line.strip()) >= 40]
    assert len(held_out) > 300
    assert sum(line in learnt for line in held_out) == 0


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zwei\r\n".encode("utf-8-sig"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.md").write_text("drei")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    found = load_text(tmp_path)
    assert found.text == "zwei\n\ndrei\n"
    assert (found.files, found.skipped) == (2, 2)
    assert load_text(tmp_path / "b.txt").text == "zwei\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n", r"is not UTF-8 text \(byte 0x89 at position 0\)"),
        ("déjà vu".encode("latin-1"), "is not UTF-8 text"),
        (b"abc\0def", "is binary"),
    ],
)
def test_data_that_is_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_text(path)
    with pytest.raises(UserError, match="none of its 1 files is UTF-8 text"):
        load_text(tmp_path)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_text(tmp_path / "missing")
    with pytest.raises(UserError, match="it has no files"):
        load_text(tmp_path)


def test_too_small_says_what_would_do() -> None:
    with pytest.raises(UserError, match=r"it has 142 characters, .* at least 143"):
        TextData(Text("x", "a" * 142), "char", context=128)
    TextData(Text("x", "a" * 143), "char", context=128)


@pytest.mark.parametrize(
    ("length", "context", "batch"), [(1000, 9, 4), (18, 9, 4), (10, 9, 3), (11, 9, 1), (5000, 7, 64)]
)
def test_window_order(length: int, context: int, batch: int) -> None:
    order, again = (WindowOrder(length, context, batch, seed=3) for _ in range(2))
    steps = 3 * order.steps_per_epoch
    batches = [order.starts(step) for step in range(steps)]
    for step in reversed(range(steps)):  # any order of asking gives the same
        assert np.array_equal(again.starts(step), batches[step])
    everything = np.concatenate(batches)
    assert everything.min() >= 0
    assert everything.max() + context + 1 <= length
    if order.windows >= batch:  # in an epoch no window comes twice, and together they leave little out
        epoch = np.concatenate(batches[: order.steps_per_epoch])
        assert len(set(epoch)) == len(epoch) > order.windows - batch
        assert set(np.diff(np.sort(epoch))) <= {context, 2 * context, 3 * context} or batch > 8
    assert not np.array_equal(WindowOrder(length, context, batch, seed=4).starts(0), batches[0]) or length < 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cell": "rnn"}, "--cell must be one of lstm, layernorm_lstm, gru"),
        ({"level": "word"}, "--level must be one of"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"dropout": 1.0}, "--dropout is a probability"),
        ({"held_out": 0.0}, "--held-out is a share"),
        ({"learning_rate": float("nan")}, "--learning-rate must be above 0"),
        ({"activation_regularization": -1.0}, "--ar must not be negative"),
        ({"cell": "gru", "zoneout_c": 0.1}, "--zoneout-c needs a cell state"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LanguageModelSettings(**values)


# Files.


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / ".file.1.unfinished").write_bytes(b"left by a killed process")
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_run_leaves_what_the_documentation_says(whole: Path) -> None:
    names = {"config.json", "model.safetensors", "last.ckpt", "loss.png", "metrics.json", "sample.txt", "tensorboard"}
    assert {path.name for path in whole.iterdir()} == names
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["steps"] == 4 * 63
    assert 0.0 <= metrics["bleu"] <= 1.0
    assert metrics["held_out_perplexity"] == pytest.approx(2.0 ** metrics["held_out_bits_per_char"])
    assert any(path.name.startswith("events") for path in (whole / "tensorboard").iterdir())
    assert [step for step, _ in history(whole)["held_out"]] == [63, 126, 189, 252]
    learnt = [nats for _, nats in history(whole)["train"]]
    assert learnt[-1] < learnt[0] - 0.5


def test_evaluate_finds_what_training_measured(whole: Path, corpus: Path) -> None:
    saved = load_model(whole)
    metrics = json.loads((whole / "metrics.json").read_text())
    result = evaluate(saved)
    assert result["bits_per_char"] == pytest.approx(metrics["held_out_bits_per_char"], rel=1e-5)
    assert result["bleu"] == metrics["bleu"]
    assert evaluate(saved, str(corpus))["characters"] == 9000
    assert float(saved.metadata["held_out_bits_per_char"]) == pytest.approx(result["bits_per_char"], rel=1e-5)


def test_evaluate_draws_the_samples_that_training_drew(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genfuse.train.run.bleu", lambda *arguments, seed: seed)
    assert evaluate(load_model(whole))["bleu"] == TINY["seed"]


def test_held_out_loss_carries_the_state(whole: Path) -> None:
    """A text of one stream: the same as its log-probability in one piece."""
    saved = load_model(whole)
    tokens = saved.vocabulary.encode(default_text()[:500])
    with torch.no_grad():
        log_prob = float(saved.model.log_prob(torch.from_numpy(tokens.astype(np.int64))[None]))
    expected = -log_prob / (len(tokens) - 1)
    assert held_out_loss(saved.model, tokens) == pytest.approx(expected, rel=1e-5)


def test_bleu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that recites a passage of the text has 1, one that writes another text's words has 0."""
    text = default_text()
    vocabulary = Vocabulary.of(text, "char")
    tokens, others = vocabulary.encode(text[:6000]), vocabulary.encode("zig zag " * 64)
    model = LSTMLanguageModel(vocabulary.size, 4, 4, 1)
    for passage, expected in ((tokens[:512], 1.0), (others, 0.0)):

        def recite(prompt: torch.Tensor, length: int, passage: Any = passage, **options: Any) -> torch.Tensor:
            return torch.from_numpy(passage[:length].astype(np.int64)).expand(len(prompt), length)

        monkeypatch.setattr(model, "generate", recite)
        assert bleu(model, vocabulary, tokens, seed=0) == pytest.approx(expected, abs=1e-6)


def test_sample(whole: Path) -> None:
    saved = load_model(whole)
    text = sample(saved, "The ", 40, temperature=0.8, top_k=20, top_p=0.95, seed=1)
    assert len(text) == 40
    assert text == sample(saved, "The ", 40, temperature=0.8, top_k=20, top_p=0.95, seed=1)
    assert sample(saved, "", 40, seed=1) != sample(saved, "", 40, seed=2)


def test_byte_level_and_tied_weights(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Füße über Äpfel. 日本語 " * 60, encoding="utf-8")
    options = {"level": "byte", "tie_weights": True, "cell": "gru", "epochs": 1}
    metrics = train(corpus, tmp_path / "run", **options)
    saved = load_model(tmp_path / "run")
    assert saved.vocabulary.size == 256
    assert saved.model.head.weight is saved.model.embedding.weight
    assert evaluate(saved)["bits_per_char"] == pytest.approx(metrics["held_out_bits_per_char"], rel=1e-5)


# Runs that do not end as planned.


@pytest.mark.parametrize("when", ["at a step", "at an evaluation"])
def test_stopped_and_resumed(when: str, whole: Path, corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C finishes the step and saves it; the rest of the run is then what it would have been."""
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if line.startswith("step 126/"):
            os.kill(os.getpid(), signal.SIGINT)

    say = None
    if when == "at an evaluation":
        say = interrupt
    else:
        from genfuse.train.module import LanguageModelModule

        original = LanguageModelModule.training_step

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 131:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, batch, batch_idx)

        patch = pytest.MonkeyPatch()
        patch.setattr(LanguageModelModule, "training_step", training_step)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stop:
        train(corpus, tmp_path, say, save_every=9)
    assert signal.getsignal(signal.SIGINT) == before
    if when == "at a step":
        patch.undo()
    assert stop.value.step == checkpoint(tmp_path)["global_step"] == (126 if when == "at an evaluation" else 132)
    train(corpus, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_killed_and_resumed(whole: Path, corpus: Path, tmp_path: Path) -> None:
    """SIGKILL twice, at moments that nothing announces; each time the run goes on from its last whole checkpoint."""
    steps = []
    for kill_after in (3, 8):
        process = start(corpus, tmp_path, "--save-every", "9", "--resume")
        seen, last, deadline = 0, None, time.monotonic() + 120
        while seen < kill_after and process.poll() is None and time.monotonic() < deadline:
            try:
                now = (tmp_path / "last.ckpt").stat().st_mtime_ns
            except FileNotFoundError:
                now = None
            seen, last = seen + (now != last), now
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        steps.append(checkpoint(tmp_path)["global_step"])  # whole, whatever the moment was
    assert 0 < steps[0] < steps[1] < 252
    load_model(tmp_path)
    train(corpus, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_killed_before_the_first_checkpoint(whole: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        train(corpus, folder, lambda line: _raise("power cut") if line.startswith("step  63") else None, save_every=99)
    assert not (folder / "last.ckpt").exists()
    train(corpus, folder, resume=True)
    for (_, left), (_, right) in zip(history(whole)["train"], history(folder)["train"], strict=True):
        assert left == right


def test_resume_refuses_what_would_change_the_run(whole: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="began with --hidden-size 12: it cannot be resumed with 13"):
        train(corpus, whole, resume=True, hidden_size=13)
    with pytest.raises(UserError, match="already holds a run"):
        train(corpus, whole)
    text = corpus.read_text()
    try:
        corpus.write_text(text + "more")
        with pytest.raises(UserError, match="has changed since the run"):
            train(corpus, whole, resume=True)
        with pytest.raises(UserError, match="has changed since the model was trained"):
            evaluate(load_model(whole))
    finally:
        corpus.write_text(text)
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((whole / "config.json").read_bytes())
    content = (whole / "last.ckpt").read_bytes()
    (damaged / "last.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        train(corpus, damaged, resume=True)


def test_resume_with_more_epochs(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, epochs=1)
    assert train(corpus, tmp_path, resume=True)["steps"] == 63  # complete: nothing happens
    assert train(corpus, tmp_path, resume=True, epochs=2)["steps"] == 126
    assert [step for step, _ in history(tmp_path)["held_out"]] == [63, 126]


def test_complete_run_reports_again(whole: Path, corpus: Path) -> None:
    before = (whole / "metrics.json").read_text()
    lines: list[str] = []
    train(corpus, whole, lines.append, resume=True)
    assert any("nothing to resume" in line for line in lines)
    assert json.loads((whole / "metrics.json").read_text())["bleu"] == json.loads(before)["bleu"]


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_run_that_diverges_says_so(save_every: int, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+: training has diverged"):
        train(corpus, tmp_path, learning_rate=1e30, save_every=save_every)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_unknown_character_is_never_drawn(whole: Path) -> None:
    saved = load_model(whole)
    bias = saved.model.head.bias
    with torch.no_grad():
        bias[0] = 1e4  # of all characters the likeliest by far
    for options in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}, {"temperature": 100.0, "top_k": 1000}):
        assert "\N{REPLACEMENT CHARACTER}" not in sample(saved, "the", 50, seed=1, **options)
    assert saved.model.head.bias is bias


# Checkpoints of others.


def test_other_models_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_model(tmp_path / "missing")
    with pytest.raises(UserError, match="holds no genfuse model"):
        load_model(tmp_path)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="saved by another program"):
        load_model(tmp_path)
    weights = (whole / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_model(tmp_path)
    config = json.loads((whole / "config.json").read_text())
    for change, message in (
        ({"model": "PixelCNN"}, "belongs to another config"),
        ({"arguments": {**config["arguments"], "hidden_size": 13}}, "belongs to another config"),
        ({"format": "something else"}, "does not describe a genfuse language model"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_model(tmp_path)


# More than one process.


@pytest.mark.slow
def test_two_processes_compute_what_one_does(corpus: Path, tmp_path: Path) -> None:
    """DDP over gloo under torchrun: the same global batch, the same loss at each step."""
    quiet = {"dropout": 0.0, "weight_drop": 0.0, "zoneout_h": 0.0, "epochs": 1}  # each process draws masks of its own
    train(corpus, tmp_path / "one", **quiet)
    options = [
        part for name, value in {**TINY, **quiet}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "genfuse"]
    done = subprocess.run(
        [
            *(*launcher, "train", "lstm", "--accelerator", "cpu", "--strategy", "ddp"),
            *("--data", str(corpus), "--out", str(tmp_path / "two"), *options),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1  # one process speaks
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for part in ("train", "held_out"):
        assert [step for step, _ in one[part]] == [step for step, _ in two[part]]
        # The same weights but for roundings, which training multiplies: below the four digits that are shown.
        np.testing.assert_allclose([nats for _, nats in one[part]], [nats for _, nats in two[part]], rtol=1e-4)
    left, right = checkpoint(tmp_path / "one")["state_dict"], checkpoint(tmp_path / "two")["state_dict"]
    # No bound can be derived here: two processes sum a gradient in another order, and AdamW divides it by its own size,
    # so where it is nearly zero its rounding decides a step of up to the learning rate. Weights may differ by half such
    # a step; if the processes' gradients were not averaged, they would by one in each of 63.
    step = LanguageModelSettings().learning_rate
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0.0, atol=0.5 * step, msg=name)


def _raise(message: str) -> None:
    raise RuntimeError(message)
