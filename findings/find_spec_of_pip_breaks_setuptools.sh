#!/usr/bin/env bash
# setuptools 80.9.0 and torch 2.13.0 on Python 3.11 (before 3.12): importlib.util.find_spec("pip"), which only asks
# whether pip is there, makes setuptools take the process for pip itself and leave its distutils aside. The first
# import of setuptools after that fails, in torch.utils.cpp_extension, which inductor imports when it compiles
# for the CPU. Seen:
#   AssertionError .../distutils/core.py
# Users of fastreg: ask importlib.metadata whether pip is installed, in programs that compile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy setuptools==80.9.0
"$folder/venv/bin/python" -W ignore - <<'END'
import importlib.metadata
import importlib.util
import sys

import torch

assert importlib.util.find_spec("pip") is not None
try:
    import torch.utils.cpp_extension
except AssertionError as error:
    print("AssertionError", str(error).replace(sys.base_prefix, "..."))
    seen = True
else:
    seen = False
assert torch.__version__.startswith("2.13.0") and importlib.metadata.version("setuptools") == "80.9.0"
assert sys.version_info < (3, 12), "the behaviour is that of Python before 3.12"
assert seen, "setuptools can be imported"
END
