"""What the commands share: numbers on the command line, a folder to write to, files that are written whole."""

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
    """The folder, made if need be. Asked first: nobody should learn after minutes of work that it cannot be
    kept.
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
    """Write beside the file and rename: whoever reads it finds the old content or the new one, never half of
    one.
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
