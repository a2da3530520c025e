"""Training: text as data, Lightning around the models, checkpoints that survive a kill, and the command line.

`genfuse.train.run` has what the ``genfuse`` command does, for scripts. Needs the ``[train]`` extra.
"""

from __future__ import annotations

from .errors import Stopped, UserError

__all__ = ["Stopped", "UserError"]
