"""Training: text and images as data, Lightning around the models, checkpoints that survive a kill, the command line.

`genfuse.train.run` (language models) and `genfuse.train.image_run` have what the ``genfuse`` command does, for scripts.
Needs the ``[train]`` extra.
"""

from __future__ import annotations

from .errors import Stopped, UserError

__all__ = ["Stopped", "UserError"]
