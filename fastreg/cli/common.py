"""What the commands share: numbers on the command line, a folder to write to, and files that are written
whole. `lecture/` and `benchmarks/` use it too.
"""

import argparse
import os
import tempfile
from pathlib import Path

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class UsageError(ValueError):
    """What is wrong with the user's data or options, in one sentence that names the remedy."""


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def writable_folder(name: str) -> Path:
    """The folder of this name, made where it is missing.

    A command asks for it first, so that nobody learns after minutes of work that the work cannot be kept.

    Raises:
        UsageError: no file can be written there.
    """
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"--out: {name} is no folder to write to ({reason}); choose another with --out"
        ) from error
    return folder


def write(path: Path, content: str | bytes) -> None:
    """Write a file beside `path` and rename it: a reader of `path` finds the old content or the new one, and
    never a part of either.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
