"""The errors a user can mend: one clear sentence, no traceback."""

from __future__ import annotations

__all__ = ["Stopped", "UserError"]


class UserError(ValueError):
    """A wrong input (data, option, checkpoint). Its text is one sentence: what is wrong, what would be right.

    The command line prints that sentence on stderr and exits with code 2.
    """


class Stopped(Exception):  # noqa: N818  it is no error: somebody asked for it
    """Training was asked to stop (Ctrl-C, SIGTERM) and did so after a whole step and a whole checkpoint.

    Args:
        signal_number: the signal that asked.
        step: the global step that the checkpoint holds.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal_number = signal_number
        self.step = step
