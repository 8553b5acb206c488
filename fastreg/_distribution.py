"""The name under which fastreg is distributed, and the commands that install it.

The import name is `fastreg`. On the package index that name belongs to an unrelated project, so the
distribution has another one, and every text that tells somebody what to install takes it from here.
"""

import importlib.metadata
import json
import pathlib
import urllib.parse
import urllib.request

NAME = "torch-fastreg"
STRANGER = "fastreg"


def install(extra: str = "") -> str:
    """The command that installs fastreg, or what one of its extras needs."""
    return f'pip install "{NAME}[{extra}]"' if extra else f"pip install {NAME}"


def rebuild(options: str = "") -> str:
    """The command that builds fastreg anew with the torch that is installed.

    A checkout is built from its folder; what came as a wheel is built from the source distribution.
    """
    command = f"pip install --no-build-isolation --force-reinstall --no-deps{options and ' ' + options}"
    folder = _folder()
    return f"{command} {folder}" if folder else f"{command} --no-binary {NAME} {NAME}"


def strangers() -> list[str]:
    """A sentence for each installed distribution that brings, or has brought, another package `fastreg`."""
    sentences = []
    for found in importlib.metadata.distributions(name=STRANGER):
        summary = found.metadata["Summary"] or "no summary"
        sentences.append(
            f"the distribution {STRANGER} {found.version} ({summary}) is installed too, with the same import "
            f"name; whichever was installed last has overwritten the other; run: "
            f"pip uninstall -y {STRANGER} {NAME}; {install()}"
        )
    return sentences


def _folder() -> str | None:
    """The folder that fastreg was installed from; None where that was a wheel or an index."""
    try:
        text = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        # No metadata: a bare copy of the package, such as the source tree on sys.path.
        return "."
    origin = json.loads(text) if text else {}
    if "dir_info" not in origin:
        return None
    path = urllib.request.url2pathname(urllib.parse.urlsplit(origin["url"]).path)
    return f'"{path}"' if " " in path else str(pathlib.Path(path))
