"""Files that are whole or not there: atomic writes, and the saved model (weights as safetensors, config as JSON).

A saved model is two files in one folder. ``config.json`` says what the model is (class, arguments, settings, and a
language model's vocabulary) and does not change during a run; ``model.safetensors`` holds the best weights, is replaced
as a whole, and carries the SHA-256 of the model that the config describes. A pair that does not match is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from genfuse.models import LSTMLanguageModel

    from .tables import Standardization
    from .text import Vocabulary

__all__ = [
    "CONFIG",
    "LAST",
    "WEIGHTS",
    "SavedFlow",
    "SavedImageModel",
    "SavedModel",
    "SavedPixelModel",
    "load_any",
    "load_flow",
    "load_image_model",
    "load_model",
    "load_pixel_model",
    "replacing",
    "save_weights",
    "write_text",
]

CONFIG, WEIGHTS, LAST = "config.json", "model.safetensors", "last.ckpt"


@dataclass(frozen=True)
class Format:
    """One kind of saved model.

    Attributes:
        name: in the files.
        noun: what a sentence calls it.
        keys: which part of a config is the model.
        models: classes of `genfuse.models`.
        twins: the module with the same classes in plain PyTorch.
    """

    name: str
    noun: str
    keys: tuple[str, ...]
    models: tuple[str, ...]
    twins: str


LANGUAGE = Format(
    "genfuse language model 1",
    "language model",
    ("format", "model", "arguments", "vocabulary"),
    ("LSTMLanguageModel",),
    "genfuse.reference.language_model",
)
IMAGES = Format(
    "genfuse image model 1",
    "image model",
    ("format", "model", "arguments"),
    ("VAE", "HierarchicalVAE", "VQVAE"),
    "genfuse.reference.vae",
)
FLOWS = Format(
    "genfuse flow 1",
    "flow",
    ("format", "model", "arguments", "standardization"),
    ("RealNVP", "Glow", "NeuralSplineFlow", "MAF", "IAF"),
    "genfuse.reference.flow.models",
)
PIXELS = Format(
    "genfuse autoregressive image model 1",
    "autoregressive image model",
    ("format", "model", "arguments"),
    ("PixelCNN", "GatedPixelCNN", "PixelCNNPlusPlus", "PixelSNAIL"),
    "genfuse.reference.masked_conv.models",
)
FORMATS = {known.name: known for known in (LANGUAGE, IMAGES, FLOWS, PIXELS)}
_TEMPORARY = ".unfinished"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole.

    The content goes to a hidden file beside it, is flushed to the disk, and takes the name in one step.

    Example:
        >>> folder = __import__("tempfile").mkdtemp()
        >>> with replacing(Path(folder, "a.txt")) as file:
        ...     _ = file.write(b"whole")
        >>> os.listdir(folder)
        ['a.txt']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make_config(
    model: str, arguments: dict[str, Any], run: dict[str, Any], vocabulary: Any = None, standardization: Any = None
) -> dict[str, Any]:
    """The content of ``config.json``: what the model is, and how the run was set.

    Args:
        model: its class's name.
        arguments: of the class.
        run: settings, and the data's name and fingerprint.
        vocabulary: a language model's `Vocabulary`.
        standardization: a flow's `Standardization`, if it is of a table.
    """
    known = next(known for known in FORMATS.values() if model in known.models)
    config: dict[str, Any] = {"format": known.name, "model": model, "arguments": arguments}
    if vocabulary is not None:
        config["vocabulary"] = {"level": vocabulary.level, "characters": vocabulary.characters}
    if standardization is not None:
        config["standardization"] = standardization.to_json()
    return {**config, "run": run}


def model_hash(config: dict[str, Any]) -> str:
    """SHA-256 of the part of a config that says what the model is."""
    model = {name: config.get(name) for name in FORMATS[config["format"]].keys}
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def save_weights(folder: Path, state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str]) -> None:
    """Replace ``model.safetensors`` in `folder`, where ``config.json`` holds `config`.

    Tensors that share storage (tied weights) are stored once, under the first name.
    """
    from safetensors.torch import save

    unique: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if unique.setdefault(tensor.data_ptr(), name) == name or tensor.numel() == 0:
            tensors[name] = tensor.detach().cpu().contiguous()
    known = {"format": "pt", "genfuse": config["format"], "model_sha256": model_hash(config)}
    content = save(tensors, metadata={**known, **metadata})
    with replacing(folder / WEIGHTS) as file:
        file.write(content)


@dataclass(frozen=True)
class SavedModel:
    """A model read from disk, in eval mode, with its vocabulary, its config and what was measured when it was saved."""

    model: LSTMLanguageModel
    vocabulary: Vocabulary
    config: dict[str, Any]
    metadata: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class SavedImageModel:
    """A VAE, HierarchicalVAE or VQVAE read from disk, in eval mode, with its config and what was measured then."""

    model: Any
    config: dict[str, Any]
    metadata: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class SavedFlow:
    """A flow read from disk, in eval mode, with its config and what was measured then.

    Attributes:
        standardization: of the rows of the table it is of; None of a flow of images.
    """

    model: Any
    standardization: Standardization | None
    config: dict[str, Any]
    metadata: dict[str, str]
    folder: Path


@dataclass(frozen=True)
class SavedPixelModel:
    """An autoregressive model of images read from disk, in eval mode, with its config and what was measured then."""

    model: Any
    config: dict[str, Any]
    metadata: dict[str, str]
    folder: Path


Saved = SavedModel | SavedImageModel | SavedFlow | SavedPixelModel


def read_config(folder: Path, wanted: Format | None = None) -> dict[str, Any]:
    """``config.json`` of a run folder.

    Args:
        folder: the run's.
        wanted: the kind of model it must describe; any of this library's by default.

    Raises:
        UserError: it is not there, is no JSON, or is not of this library.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no genfuse model: there is no {CONFIG} in it.") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}.") from None
    except ValueError:
        raise UserError(f"{path} is not JSON: the checkpoint is damaged.") from None
    names = FORMATS if wanted is None else (wanted.name,)
    if not isinstance(config, dict) or config.get("format") not in names:
        raise UserError(f"{path} does not describe a genfuse {'model' if wanted is None else wanted.noun}.")
    return config


def load_model(path: str | os.PathLike[str], device: str = "cpu") -> SavedModel:
    """Load the best language model of a run.

    Args:
        path: the run's folder, or the ``model.safetensors`` in it.
        device: where its weights go.

    Raises:
        UserError: there is no model, it is damaged, or it is another program's or another class's.
    """
    saved = load_any(path, device)
    if not isinstance(saved, SavedModel):
        raise UserError(f"{path} holds a {saved.config['model']}, and this command wants an LSTMLanguageModel.")
    return saved


def load_image_model(path: str | os.PathLike[str], device: str = "cpu") -> SavedImageModel:
    """Load the best VAE, hierarchical VAE or VQ-VAE of a run: arguments and errors are those of `load_model`."""
    saved = load_any(path, device)
    if not isinstance(saved, SavedImageModel):
        raise UserError(f"{path} holds a {saved.config['model']}, and this command wants a model of images.")
    return saved


def load_flow(path: str | os.PathLike[str], device: str = "cpu") -> SavedFlow:
    """Load the best flow of a run: arguments and errors are those of `load_model`."""
    saved = load_any(path, device)
    if not isinstance(saved, SavedFlow):
        raise UserError(f"{path} holds a {saved.config['model']}, and this command wants a flow.")
    return saved


def load_pixel_model(path: str | os.PathLike[str], device: str = "cpu") -> SavedPixelModel:
    """Load the best PixelCNN or its kin of a run: arguments and errors are those of `load_model`."""
    saved = load_any(path, device)
    if not isinstance(saved, SavedPixelModel):
        raise UserError(f"{path} holds a {saved.config['model']}, and this command wants an {PIXELS.noun}.")
    return saved


def load_any(path: str | os.PathLike[str], device: str = "cpu") -> Saved:
    """Load the best model of a run, whatever kind it is: arguments and errors are those of `load_model`."""
    import torch
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}.")
    if path.is_file() and path.name in (LAST, CONFIG):
        path = path.parent
    weights = path / WEIGHTS if path.is_dir() else path
    folder = weights.parent
    if not weights.exists():
        if (folder / CONFIG).exists():
            raise UserError(f"the run in {folder} has not saved a model yet: let it train on, or resume it.")
        raise UserError(f"{folder} holds no genfuse model: there is no {WEIGHTS} in it.")
    try:
        with safe_open(weights, framework="pt", device=device) as file:
            metadata = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is not a whole safetensors file ({first_line(error)}).") from None
    known = FORMATS.get(metadata.get("genfuse", ""))
    if known is None:
        raise UserError(f"{weights} is not a genfuse model: it was saved by another program.")
    config = read_config(folder, known)
    if metadata.get("model_sha256") != model_hash(config):
        raise UserError(f"{weights} belongs to another {CONFIG} than the one beside it.")
    if config.get("model") not in known.models:
        raise UserError(f"{folder} holds a {config.get('model')}, which this version of genfuse does not know.")
    try:
        saved = _READERS[known.name](state, config, metadata, folder)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        why = first_line(error)
        raise UserError(f"the weights in {folder} do not fit the model its {CONFIG} describes ({why}).") from None
    try:
        saved.model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use the device {device!r} ({first_line(error)}).") from None
    return saved


def _language_model(
    state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str], folder: Path
) -> SavedModel:
    from genfuse.models import LSTMLanguageModel

    from .text import Vocabulary

    model = LSTMLanguageModel(**config["arguments"])
    if config["arguments"].get("tie_weights"):
        state.setdefault("head.weight", state["embedding.weight"])
    model.load_state_dict(state)
    vocabulary = Vocabulary(**config["vocabulary"])
    if vocabulary.size != config["arguments"]["vocab_size"]:
        raise UserError(f"the vocabulary in {folder / CONFIG} does not have the size of the model's.")
    return SavedModel(model, vocabulary, config, metadata, folder)


def _image_model(
    state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str], folder: Path
) -> SavedImageModel:
    model = model_class(config["model"])(**config["arguments"])  # a twin's weights fit as well
    model.load_state_dict(state)
    return SavedImageModel(model, config, metadata, folder)


def _flow(state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str], folder: Path) -> SavedFlow:
    from .tables import Standardization

    model = model_class(config["model"])(**config["arguments"])
    model.load_state_dict(state)
    values = config.get("standardization")
    standardization = None if values is None else Standardization.from_json(values)
    return SavedFlow(model, standardization, config, metadata, folder)


def _pixel_model(
    state: dict[str, Tensor], config: dict[str, Any], metadata: dict[str, str], folder: Path
) -> SavedPixelModel:
    model = model_class(config["model"])(**config["arguments"])
    model.load_state_dict(state)
    return SavedPixelModel(model, config, metadata, folder)


_READERS: dict[str, Callable[..., Saved]] = {
    LANGUAGE.name: _language_model,
    IMAGES.name: _image_model,
    FLOWS.name: _flow,
    PIXELS.name: _pixel_model,
}


def model_class(name: str, implementation: str = "genfuse") -> Any:
    """The class of this name: genfuse's own, or its twin in plain PyTorch where `implementation` is ``"torch"``."""
    import importlib

    known = next(known for known in FORMATS.values() if name in known.models)
    module = "genfuse.models" if implementation == "genfuse" else known.twins
    return getattr(importlib.import_module(module), name)


def twin_of(model: Any, arguments: dict[str, Any]) -> Any:
    """The model's twin in plain PyTorch, with the same weights."""
    twin = model_class(type(model).__name__, "torch")(**arguments)
    twin.load_state_dict(model.state_dict())
    return twin


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
