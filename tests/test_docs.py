"""What the documentation shows, runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import genfuse
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def documented_modules() -> list[str]:
    """Everything that imports without an extra, and the command line's package, which the tests' extras cover."""
    names = [name for _, name, _ in pkgutil.walk_packages(genfuse.__path__, "genfuse.", onerror=lambda _: None)]
    return [
        "genfuse",
        *(name for name in names if not name.startswith(("genfuse.kernels", "genfuse.lib", "genfuse.__main__"))),
    ]


@pytest.mark.parametrize("name", documented_modules())
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def code_blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_examples_in_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    blocks = code_blocks(ROOT / "README.md", "python")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert torch.is_tensor(namespace["text"])


def test_every_link_to_a_file_leads_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), ROOT / "csrc" / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", file.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}"


def test_readme_commands_name_extras_that_exist() -> None:
    from importlib.metadata import metadata

    extras = set(metadata("genfuse").get_all("Provides-Extra") or [])
    for block in code_blocks(ROOT / "README.md", "bash"):
        for word in shlex.split(block):
            for extra in re.findall(r"^\.\[(.*)\]$", word):
                assert set(extra.split(",")) <= extras
