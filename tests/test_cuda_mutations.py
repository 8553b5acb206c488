"""That the tests of the CUDA kernels catch what goes wrong in CUDA kernels: here each is broken in one way,
and a test fails. What is broken stands as MUTATIONS in tests/test_cuda_<op>.py.
"""

import importlib
import shutil

import pytest
from cuda_machine import CSRC, Interpreted, compile_ptx, needs_nvcc
from helpers import ROOT

pytestmark = needs_nvcc
MODULES = [
    importlib.import_module(path.stem)
    for path in sorted((ROOT / "tests").glob("test_cuda_*.py"))
    if path.stem != "test_cuda_mutations"
]
MUTATIONS = [(module.__name__, name) for module in MODULES for name in getattr(module, "MUTATIONS", ())]


@pytest.mark.parametrize(("module", "name"), MUTATIONS)
def test_a_broken_kernel_is_caught(module, name, tmp_path, monkeypatch):
    """Of the op that the module names as OP, or is named after."""
    module = importlib.import_module(module)
    op = getattr(module, "OP", module.__name__.removeprefix("test_cuda_"))
    old, new, check, message = module.MUTATIONS[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    places = [path for path in (tmp_path / "csrc" / op).glob("*") if old in path.read_text()]
    assert len(places) == 1, f"not one file of {op} says {old!r}: choose another place to break"
    text = places[0].read_text()
    assert text.count(old) == 1, f"{places[0].name} does not say {old!r} once: choose another place to break"
    places[0].write_text(text.replace(old, new))
    source = tmp_path / "csrc" / op / f"{op}_cuda.cu"
    compile_ptx(source, tmp_path / "mutant.so", flags=["-DFASTREG_FLOAT32_ONLY"])
    mutant = Interpreted(tmp_path / "mutant.so")
    monkeypatch.setattr(module, "interpreted", lambda _: mutant)
    with pytest.raises(AssertionError) as caught:
        check()
    assert message in str(caught.value)
