"""The build backend: scikit-build-core's, and a look at torch before anything is compiled.

torch is no entry of `build-system.requires`: pip would put a second one, with gigabytes of CUDA packages, into its
build environment although one is installed already. It is asked for only where there is none.
"""

from __future__ import annotations

from typing import Any

import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

Settings = dict[str, Any] | None


def _torch_requirement() -> list[str]:
    torch = find_torch.find()
    if torch is None:
        return [find_torch.FETCH]
    _require_torch(torch)
    return []


def _require_torch(torch: find_torch.Torch | None) -> None:
    wrong = find_torch.complaint(torch)
    if wrong is not None:
        raise SystemExit(wrong)  # an exception would bury the sentence under a traceback


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _require_torch(find_torch.find())
    return _build.build_wheel(directory, config_settings, metadata_directory)


def build_editable(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _require_torch(find_torch.find())
    return _build.build_editable(directory, config_settings, metadata_directory)
