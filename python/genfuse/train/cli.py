"""The ``genfuse`` command: what a user did wrong is one sentence on stderr and exit code 2, never a traceback.

Exit codes: 0 done; 1 the system failed (disk full, ...) or the reader of a pipe has gone, which Typer passes over in
silence; 2 wrong input; 130 stopped by Ctrl-C, 143 by SIGTERM.
This file imports nothing that an extra installs, so that a missing extra, too, is one sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .errors import Stopped, UserError
from .settings import process_rank

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; ``sys.argv[1:]`` by default.
    """
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    try:
        from .commands import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        return _fail(f"the command line needs {error.name}, which is not installed: pip install 'genfuse[train]'.")
    try:
        code = app(args=arguments, prog_name="genfuse", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error))
    except Stopped as stop:
        if process_rank() == 0:
            print(f"Stopped after step {stop.step}; add --resume to go on from there.", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{(error.strerror or str(error)).lower()}{where}.", code=1)
    except Exception as error:
        # Typer's errors about options and arguments; which module they come from depends on its version.
        if hasattr(error, "format_message"):
            return _fail(_sentence(error.format_message()))
        if type(error).__name__ == "Abort":
            return 130
        raise


def _fail(sentence: str, code: int = 2) -> int:
    print(f"genfuse: {sentence}", file=sys.stderr)
    return code


def _sentence(message: str) -> str:
    message = " ".join(message.split())
    return message if message.endswith((".", "?", "!")) else message + "."
