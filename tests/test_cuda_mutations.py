"""That the tests of the CUDA kernels catch what goes wrong in CUDA kernels: here each is broken in one way,
and a test fails. What is broken stands as MUTATIONS in tests/test_cuda_<op>.py.
"""

import importlib
import shutil

import pytest
from cuda_machine import CSRC, OPS, Interpreted, compile_ptx, needs_nvcc

pytestmark = needs_nvcc
MUTATIONS = [
    (op, name) for op in OPS for name in getattr(importlib.import_module(f"test_cuda_{op}"), "MUTATIONS", ())
]


@pytest.mark.parametrize(("op", "name"), MUTATIONS)
def test_a_broken_kernel_is_caught(op, name, tmp_path, monkeypatch):
    module = importlib.import_module(f"test_cuda_{op}")
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
