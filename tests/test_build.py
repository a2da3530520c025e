"""What was built, what importing it costs, and what it tells when something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import genfuse
import numpy as np
import pytest
import torch
from genfuse import _native

ROOT = Path(__file__).resolve().parents[1]
needs_nm = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="reads ELF files with nm"
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        cwd=ROOT / "tests",
        check=False,
    )


@pytest.fixture(scope="module")
def find_torch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("find_torch", ROOT / "cmake" / "find_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- build info ----------------------------------------------------------------------------------------------------


def test_native_library_loads() -> None:
    assert _native.error() is None
    assert hasattr(torch.ops.genfuse, "lstm")


def test_build_info_is_complete() -> None:
    info = genfuse.build_info()
    assert info["version"] == genfuse.__version__
    assert info["isa"] in info["isas"]
    assert info["isas"][0] == "baseline"
    assert set(info) >= {
        "compiler",
        "build_type",
        "torch_headers",
        "torch_oldest",
        "cpu_features",
        "cuda",
        "cuda_archs",
    }


def test_version_has_one_place() -> None:
    assert f'version = "{genfuse.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_environment_variable_lowers_the_instruction_set() -> None:
    code = "import genfuse; print(genfuse.build_info()['isa'])"
    assert run_python(code, GENFUSE_ISA="baseline").stdout.strip() == "baseline"
    assert run_python(code, GENFUSE_ISA="no such thing").stdout.strip() == genfuse.build_info()["isa"]


# ---- import --------------------------------------------------------------------------------------------------------


def test_import_alone_loads_neither_torch_nor_anything_heavy() -> None:
    code = """
import sys
before = set(sys.modules)
import genfuse
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"genfuse"}))
print(sorted(name for name in sys.modules if name.startswith("genfuse.")))
"""
    foreign, ours = run_python(code).stdout.splitlines()
    assert foreign == "[]"
    assert ours == "['genfuse._native']"


@pytest.mark.parametrize("name", ["ops", "nn", "models", "reference", "backends"])
def test_submodule_needs_none_of_the_extras(name: str) -> None:
    """Extras may be missing, so none of them may be imported (nor what takes long, though torch needs it rarely)."""
    code = f"""
import sys
import torch
before = set(sys.modules)
import genfuse
getattr(genfuse, {name!r})
heavy = {{"lightning", "matplotlib", "pytorch_lightning", "rich", "scipy", "sklearn", "tensorboard", "torch._inductor",
         "torchmetrics", "triton", "typer"}}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    result = run_python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_dir_lists_what_is_public() -> None:
    assert dir(genfuse) == sorted(genfuse.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        genfuse.nonsense  # noqa: B018


def test_a_missing_library_breaks_no_import_and_is_named_on_use(tmp_path: Path) -> None:
    """A copy of the package without its native part."""
    shutil.copytree(
        Path(genfuse.__file__).parent, tmp_path / "genfuse", ignore=shutil.ignore_patterns("*.so", "*.pyd", "*.dll")
    )
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(type(finder)).lower()]
sys.path.insert(0, {str(tmp_path)!r})
import genfuse
assert genfuse.__file__.startswith({str(tmp_path)!r}), genfuse.__file__
import genfuse.ops, genfuse.nn
from genfuse import _native
print(_native.error())
"""
    result = run_python(code)
    assert "without the CPU operators" in result.stdout, result.stderr


def test_a_broken_library_says_what_the_linker_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / f"libgenfuse_ops{_native._SUFFIX}"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_native, "folder", lambda: tmp_path)
    reason = _native._load("genfuse_ops", "the CPU operators")
    assert reason is not None
    assert "The linker said" in reason
    assert str(broken) in reason


# ---- the binary ----------------------------------------------------------------------------------------------------


def nm(*arguments: str | Path) -> list[str]:
    return subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


def undefined_symbols(library: Path) -> dict[str, str]:
    """Symbol -> version ("" if it has none), without weak ones."""
    symbols = {}
    for line in nm("-D", "--undefined-only", library):
        kind, symbol = line.split()[-2:]
        if kind == "U":
            name, _, version = symbol.partition("@")
            symbols[name] = version.lstrip("@")
    return symbols


@needs_nm
@pytest.mark.parametrize("name", ["genfuse_ops", "genfuse_cuda"])
def test_ops_library_needs_only_the_stable_abi(name: str) -> None:
    library = _native.folder() / f"lib{name}.so"
    if not library.exists():
        assert name != "genfuse_ops"
        pytest.skip(f"{name} was not built")
    include = Path(torch.__file__).parent / "include/torch/csrc"
    shims = "".join(
        (include / shim).read_text(encoding="utf-8") for shim in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h")
    )
    for symbol, version in undefined_symbols(library).items():
        if re.match("(aoti_)?torch_", symbol):
            # Some are spelled through a macro: aoti_torch_item_##TYPE and the like do not occur in full.
            assert symbol in shims or symbol.rpartition("_")[0] in shims, f"{symbol} is not in torch's stable shims"
        else:  # the C and C++ run-time libraries version theirs, torch's C++ API does not
            assert re.match("GLIBC|GLIBCXX|CXXABI|GCC", version), f"{symbol} comes from outside the stable set"


@needs_nm
def test_python_module_knows_nothing_of_torch() -> None:
    (module,) = _native.folder().glob("_C.*.so")
    assert not [symbol for symbol in undefined_symbols(module) if "torch" in symbol or "c10" in symbol]


@needs_nm
def test_ops_library_exports_nothing_of_its_own() -> None:
    """What is exported could be replaced by a namesake in another library."""
    library = _native.folder() / "libgenfuse_ops.so"
    exported = [line.split(maxsplit=2)[2] for line in nm("-DC", "--defined-only", library)]
    assert not [name for name in exported if "genfuse" in name]


# ---- torch at build time -------------------------------------------------------------------------------------------


def fake_torch(folder: Path, version: str, cuda: str = "None") -> str:
    (folder / "torch/include").mkdir(parents=True)
    text = f"from typing import Optional\n__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    (folder / "torch/version.py").write_text(text, encoding="utf-8")
    return str(folder)


def test_finds_the_installed_torch(find_torch: ModuleType) -> None:
    found = find_torch.find()
    assert found is not None
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert find_torch.complaint(found) is None


def test_prefers_the_first_folder_and_reads_cuda(find_torch: ModuleType, tmp_path: Path) -> None:
    new = fake_torch(tmp_path / "new", "2.12.1+cu130", '"13.0"')
    old = fake_torch(tmp_path / "old", "2.9.0")
    found = find_torch.find([str(tmp_path), new, old])
    assert found.folder == Path(new).resolve() / "torch"
    assert (found.version, found.cuda) == ("2.12.1+cu130", "13.0")
    assert not found.too_old


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu126", "1.13.1"])
def test_too_old_a_torch_is_one_sentence(find_torch: ModuleType, tmp_path: Path, version: str) -> None:
    sentence = find_torch.complaint(find_torch.find([fake_torch(tmp_path, version)]))
    assert version in sentence
    assert 'pip install --upgrade "torch>=2.11"' in sentence
    assert "\n" not in sentence


def test_no_torch_is_one_sentence(find_torch: ModuleType, tmp_path: Path) -> None:
    assert find_torch.find([str(tmp_path)]) is None
    sentence = find_torch.complaint(None)
    assert 'pip install "torch>=2.11"' in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_build_stops_with_that_sentence_alone(tmp_path: Path, hook: str) -> None:
    """As pip runs it, with a stand-in for scikit-build-core: no traceback, nothing compiled."""
    stand_in = tmp_path / "scikit_build_core"
    (stand_in / "build").mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "build/__init__.py").touch()
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / "cmake")!r}]
import find_torch
find_torch.find = lambda: None
import genfuse_build
genfuse_build.{hook}("nowhere")
"""
    result = run_python(code)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("genfuse is built against the torch that it will run with")


# ---- the fixtures --------------------------------------------------------------------------------------------------


def test_fresh_memory_is_poisoned() -> None:
    x = torch.ones(3)
    for fresh in (torch.empty(5), torch.empty_like(x), x.new_empty(2, 2), torch.empty(4, dtype=torch.bfloat16)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == np.iinfo(np.int64).max).all()
