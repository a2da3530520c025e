"""The errors a user can mend: one clear sentence, no traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["Stopped", "UserError", "memory_for"]

# What torch says when there is no memory; it has no exception of its own for the CPU. The last is what is left of the
# message when an allocation fails below the stable ABI, in a native kernel.
_NO_MEMORY = ("out of memory", "allocate memory", "Storage size calculation overflowed", '"aten::empty"')


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


@contextlib.contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Say in one sentence that `what` needs more memory than there is, where an allocation fails.

    Raises:
        UserError: an allocation failed.

    Example:
        >>> with memory_for("this list"):
        ...     raise MemoryError
        Traceback (most recent call last):
        genfuse.train.errors.UserError: this list needs more memory than there is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise UserError(f"{what} needs more memory than there is.") from None
