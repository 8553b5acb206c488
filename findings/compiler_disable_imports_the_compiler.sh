#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compiler.disable, written over a function, imports the whole compiler when the function is
# defined, with sympy and torch.distributed.tensor, although nothing is compiled. A library
# that uses it once pays for that with every import. torch._disable_dynamo, which torch uses itself, waits for the
# first call.
# torch.fx.experimental.symbolic_shapes, of which compiled code needs a function, brings sympy too. Seen:
#   torch: 0 of torch._dynamo, torch.distributed.tensor, sympy
#   torch._disable_dynamo over a function: 0 of torch._dynamo, torch.distributed.tensor, sympy
#   torch.compiler.disable over a function: 3 of torch._dynamo, torch.distributed.tensor, sympy
# Users of fastreg: `import fastreg` did this, and does so no longer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" -W ignore - <<'END'
import sys

import torch

SLOW = ("torch._dynamo", "torch.distributed.tensor", "sympy")


def count(what):
    found = sum(name in sys.modules for name in SLOW)
    print(f"{what}: {found} of {', '.join(SLOW)}")
    return found


def function():
    return 1


before = count("torch")
torch._disable_dynamo(function)
lazy = count("torch._disable_dynamo over a function")
torch.compiler.disable(function)
after = count("torch.compiler.disable over a function")
assert torch.__version__.startswith("2.13.0") and (before, lazy, after) == (0, 0, 3)
END
