"""The name under which fastreg is distributed, and the commands that install it.

The import name is `fastreg`. On the package index that name belongs to an unrelated project, so the
distribution has another one, and every text that tells somebody what to install takes it from here.
"""

import importlib.metadata
import importlib.util
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

    A checkout is built from its folder; what came as a wheel is built from the source distribution. Without
    build isolation pip fetches nothing to build with, so that what is missing comes first.
    """
    command = f"pip install --no-build-isolation --force-reinstall --no-deps{options and ' ' + options}"
    if not all(map(importlib.util.find_spec, ("scikit_build_core", "pybind11"))):
        command = f"pip install scikit-build-core pybind11 cmake ninja && {command}"
    folder, editable = origin()
    if folder is None:
        return f"{command} --no-binary {NAME} {NAME}"
    return f"{command} {'-e ' if editable else ''}{folder}"


def strangers() -> list[str]:
    """A sentence for each installed distribution that brings, or has brought, another package `fastreg`."""
    folder, editable = origin()
    from_there = f"pip install --no-build-isolation {folder}" if folder else install()
    sentences = []
    for found in importlib.metadata.distributions(name=STRANGER):
        summary = found.metadata["Summary"] or "no summary"
        remedy = (
            f"this checkout hides it; run: pip uninstall -y {STRANGER}"
            if editable
            else f"whichever was installed last has overwritten the other; run: "
            f"pip uninstall -y {STRANGER} {NAME}; {from_there}"
        )
        sentences.append(
            f"the distribution {STRANGER} {found.version} ({summary}) is installed too, with the same import "
            f"name; {remedy}"
        )
    return sentences


def origin() -> tuple[str | None, bool]:
    """(the folder that fastreg was installed from, whether it is editable, so that it runs from there).

    The folder is None where fastreg came as a wheel or from an index, or where that folder is gone.
    """
    try:
        text = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        # No metadata: a bare copy of the package, such as the source tree on sys.path.
        return ".", False
    found = json.loads(text) if text else {}
    if "dir_info" not in found:
        return None, False
    path = urllib.request.url2pathname(urllib.parse.urlsplit(found["url"]).path)
    if not pathlib.Path(path).is_dir():
        return None, False
    folder = f'"{path}"' if " " in path else str(pathlib.Path(path))
    return folder, bool(found["dir_info"].get("editable"))
