"""The command line, as a beginner meets it: what is wrong is one sentence on stderr and exit code 2."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("lightning")

from genfuse.train import cli
from genfuse.train.text import default_text

TINY = ["--hidden-size", "8", "--embedding-dim", "4", "--context", "16", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(default_text()[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert cli.run(["train", "lstm", "--data", str(corpus), "--out", str(folder), *TINY]) == 0
    torch.set_num_threads(threads)
    return folder


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a wrong command prints; checks that there is nothing else, and the exit code."""
    assert cli.run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("genfuse: ")
    assert said.err.count("\n") == 1
    assert said.err.rstrip().endswith((".", "?"))
    return said.err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], ["train", "sample", "evaluate", "info"]),
        (["--help"], ["train", "sample", "evaluate", "info"]),
        (["train"], ["lstm"]),
        (["train", "lstm", "--help"], ["--data", "--resume", "--cell", "--devices", "--seed"]),
        (["train", "vae", "--help"], ["--data", "--resume", "--likelihood", "--objective", "--devices", "--seed"]),
        (["train", "hvae", "--help"], ["--latent-dims", "--kl-warmup", "--implementation"]),
        (["train", "vqvae", "--help"], ["--prior-epochs", "--num-embeddings", "--binarize"]),
        (["sample", "--help"], ["--prompt", "--length", "--temperature", "--top-k", "--top-p", "--seed", "--count"]),
        (["evaluate", "--help"], ["--data", "--nll-samples", "--limit"]),
    ):
        assert cli.run(arguments) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words), said
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_more_memory_than_there_is(
    corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes beyond the address space, which torch refuses at once; and a run that cannot be leaves no folder."""
    out = tmp_path / "run"
    command = ["train", "lstm", "--data", str(corpus), "--out", str(out), *TINY]
    said = fails([*command, "--hidden-size", "3000000", "--embedding-dim", "1"], capsys)
    assert "--hidden-size 3000000, --embedding-dim 1 and --layers 1 needs more memory" in said
    assert not out.exists()
    assert "--length 100000000000000 needs more memory" in fails(
        ["sample", str(trained), "--length", "100000000000000"], capsys
    )


def test_help_is_light() -> None:
    """Neither torch nor Lightning is loaded to print a help text or to refuse an option."""
    for arguments in (["train", "lstm", "--help"], ["train", "lstm", "--no-such-option"], ["train", "vae", "--help"]):
        code = (
            "import sys; from genfuse.train import cli; cli.run(sys.argv[1:]); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'matplotlib', 'numpy')))"
        )
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "lstm", "--epoch", "3"], "No such option"),
        (["train", "gpt"], "No such command"),
        (["train", "lstm", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["train", "lstm", "--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["train", "lstm", "--cell", "rnn"], "--cell must be one of lstm, layernorm_lstm, gru, not 'rnn'"),
        (["train", "lstm", "--level", "word"], "--level must be one of char, byte"),
        (["train", "lstm", "--data", "nowhere.txt"], "cannot read"),
        (["train", "lstm", "--resume"], "there is no run in"),
        (["train", "lstm", "--accelerator", "quantum"], "this machine cannot train that way"),
        (["train", "lstm", "--strategy", "magic"], "this machine cannot train that way"),
        (["train", "lstm", "--devices", "none"], "this machine cannot train that way"),
        (["train", "lstm", "extra"], "extra"),
        (["train", "vae", "--data", "mnist"], "there is no such file, nor a data set of that name (digits, mnist5k"),
        (["train", "vae", "--hidden-dims", "4x"], "--hidden-dims is whole numbers separated by commas"),
        (["train", "vae", "--samples", "0"], "--samples must be at least 1, not 0"),
        (["train", "vae", "--latent-dim", "1000000000000"], "--latent-dim 1000000000000 needs more memory"),
        (["train", "hvae", "--latent-dims", "8"], "latent_dims must hold at least 2"),
        (["train", "vqvae", "--resume"], "there is no run in"),
        (["train", "vqvae", "--devices", "none"], "this machine cannot train that way"),
        (["sample"], "Missing argument 'CHECKPOINT'"),
        (["sample", "nowhere"], "there is no checkpoint at nowhere"),
        (["evaluate", "nowhere"], "there is no checkpoint at nowhere"),
        (["info", "nowhere"], "there is no checkpoint at nowhere"),
        (["paint"], "No such command"),
    ],
)
def test_mistakes(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"\0\1\2", "is binary"), (b"\xff\xfe", "is not UTF-8 text"), (b"abc", "is too small")],
)
def test_wrong_data(content: bytes, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_bytes(content)
    assert words in fails(["train", "lstm", "--data", str(data), "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_unreadable_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("secret")
    data.chmod(0)
    if os.access(data, os.R_OK):
        pytest.skip("this user may read everything")
    assert "permission denied" in fails(["train", "lstm", "--data", str(data)], capsys)


def test_wrong_folder(corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("")
    command = ["train", "lstm", "--data", str(corpus), *TINY, "--out"]
    assert "cannot write to" in fails([*command, str(a_file)], capsys)
    assert "already holds a run" in fails([*command, str(trained)], capsys)
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "last.ckpt").write_bytes((trained / "last.ckpt").read_bytes())
    for option in ([], ["--resume"]):
        assert "holds last.ckpt but no config.json" in fails([*command, str(lost), *option], capsys)
    assert "cannot be resumed with 9" in fails([*command, str(trained), "--resume", "--hidden-size", "9"], capsys)


def test_numbered_folders(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.run(["train", "lstm", "--data", str(corpus), *TINY]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["lstm", "lstm-2"]
    assert cli.run(["train", "lstm", "--resume"]) == 0


def test_sample(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command = ["sample", str(trained), "--prompt", "The ", "--length", "30", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert cli.run(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The ")
    assert len(texts[0]) == 4 + 30 + 1
    assert cli.run(["sample", str(trained / "model.safetensors"), "--prompt", "日", "--length", "3"]) == 0
    assert "'日'" in capsys.readouterr().err
    assert cli.run([*command, "--top-k", "5", "--top-p", "0.9", "--temperature", "0"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--length", "0", "--length must be at least 1"),
        ("--temperature", "-1", "--temperature must not be negative"),
        ("--temperature", "nan", "--temperature must not be negative"),
        ("--top-k", "0", "--top-k must be at least 1"),
        ("--top-p", "0", "--top-p is a probability"),
        ("--top-p", "1.5", "--top-p is a probability"),
        ("--seed", "18446744073709551616", "--seed must be a number of 64 bits"),
    ],
)
def test_sample_mistakes(
    option: str, value: str, words: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert words in fails(["sample", str(trained), option, value], capsys)


def test_evaluate_and_info(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.run(["evaluate", str(trained)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("held-out part of", "bits/char", "perplexity", "BLEU-4"))
    other = corpus.with_name("other.txt")
    other.write_text("Ünbekännt " * 40)
    assert cli.run(["evaluate", str(trained), "--data", str(other)]) == 0
    assert "new to the model" in capsys.readouterr().out
    assert cli.run(["info", str(trained)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("LSTMLanguageModel", "hidden size", "held-out bits/char"))
    assert cli.run(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_images_from_beginning_to_end(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train, sample, evaluate, info; and the options that belong to the other kind of model."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    command = ["train", "vae", "--epochs", "2", "--hidden-dims", "9,8", "--latent-dim", "2", "--nll-samples", "4"]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    for words in ("1,797 images of 8 x 8, 180 held out (drawn with seed 0)", "ELBO  -", "NLL   ", "with 4 samples"):
        assert words in said
    assert cli.run([*command[:4], "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert cli.run(["sample", "runs/vae", "--count", "5", "--seed", "1", "--out", "five.png"]) == 0
    assert Path("five.png").read_bytes().startswith(b"\x89PNG")
    assert cli.run(["evaluate", "runs/vae/model.safetensors", "--nll-samples", "3", "--limit", "7"]) == 0
    said = capsys.readouterr().out
    assert "held-out part of digits: 7, binarised" in said
    assert "with 3 samples" in said
    assert cli.run(["info", "runs/vae"]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("model", "VAE", "hidden dims", "9 8", "held-out NLL", "model hash"))
    assert "--prompt is not for models of the class VAE" in fails(["sample", "runs/vae", "--prompt", "a"], capsys)
    assert "--count is not for models" in fails(["sample", str(trained), "--count", "2"], capsys)
    assert "--limit is not for models" in fails(["evaluate", str(trained), "--limit", "2"], capsys)
    assert "--limit must be at least 1" in fails(["evaluate", "runs/vae", "--limit", "0"], capsys)
    assert "--nll-samples must be at least 1" in fails(["evaluate", "runs/vae", "--nll-samples", "0"], capsys)
    assert "must be a .png file" in fails(["sample", "runs/vae", "--out", "a.jpg"], capsys)
    assert "cannot write no/a.png: no such file" in fails(["sample", "runs/vae", "--out", "no/a.png"], capsys)
    assert "describe a genfuse image model" in fails(["train", "vae", "--resume", "--out", str(trained)], capsys)
    assert "describe a genfuse language model" in fails(["train", "lstm", "--resume", "--out", "runs/vae"], capsys)
    torch.set_num_threads(threads)


def test_missing_extras(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    capsys.readouterr()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("lightning", "safetensors") else find(name, *rest),
    )
    assert "training needs lightning, which is not installed" in fails(["train", "lstm"], capsys)
    assert "sampling needs safetensors" in fails(["sample", str(trained)], capsys)


def test_missing_typer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "genfuse.train.commands", raising=False)
    assert "needs typer, which is not installed: pip install 'genfuse[train]'" in fails(["--help"], capsys)


def test_a_reader_that_goes_is_no_traceback(trained: Path) -> None:
    command = [sys.executable, "-m", "genfuse", "sample", str(trained), "--length", "200000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "genfuse", "train", "lstm", "--data", str(corpus), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, *TINY[:-2], "--epochs", "100000", "--save-every", "50"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("Stopped after step ")
    assert said.count("\n") == 1
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert f"after step {checkpoint['global_step']};" in said
