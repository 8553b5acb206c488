"""That the tests of the CUDA kernels catch what goes wrong in CUDA kernels: here each is broken in one way,
and a test fails.
"""

import shutil

import pytest
import test_cuda_augment
import test_cuda_cross_entropy
import test_cuda_dropout
import torch
from cuda_machine import CSRC, Interpreted, compile_ptx, needs_cudacheck, needs_nvcc

pytestmark = [needs_cudacheck, needs_nvcc]


def dropout_tail():
    test_cuda_dropout.test_the_same_bits_as_on_the_cpu(5003, torch.float32, "min-pc")


def dropout_unaligned():
    test_cuda_dropout.test_unaligned(torch.float32, 8)


def dropout_large():
    test_cuda_dropout.test_more_than_2_31_elements()


def sums():
    test_cuda_cross_entropy.test_sums_of_many_rows()


def blur():
    test_cuda_augment.test_blur((3, 3), torch.float32)


def two_samples():
    test_cuda_augment.test_more_items_than_blocks()


MUTATIONS = {
    "tail off by one": (
        "dropout",
        "if (i >= w.numel) continue;",
        "if (i > w.numel) continue;",
        dropout_tail,
        "out-of-bounds",
    ),
    "misaligned vector load": (
        "dropout",
        "word_aligned(a.input, a.output)",
        "true",
        dropout_unaligned,
        "misaligned",
    ),
    "missing barrier": (
        "cross_entropy",
        "  __syncthreads();\n  if (threadIdx.x >= kLanes) return;",
        "  if (threadIdx.x >= kLanes) return;",
        sums,
        "race",
    ),
    "missing barrier in shared memory": (
        "augment",
        "    __syncthreads();\n    for_each_in(made_height, width,",
        "    for_each_in(made_height, width,",
        blur,
        "race",
    ),
    "no barrier between two samples": (
        "augment",
        "  __syncthreads();  // no thread is at work on the last item\n  A mean = 0;",
        "  A mean = 0;",
        two_samples,
        "race",
    ),
    "int32 index": (
        "dropout",
        "base = chunk * kChunk,",
        "base = int32_t(chunk * kChunk),",
        dropout_large,
        "",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name, tmp_path, monkeypatch):
    op, old, new, check, message = MUTATIONS[name]
    shutil.copytree(CSRC, tmp_path / "csrc")
    source = tmp_path / "csrc" / op / f"{op}_cuda.cu"
    text = source.read_text()
    assert text.count(old) == 1, f"{source.name} no longer says {old!r} once: choose another place to break"
    source.write_text(text.replace(old, new))
    compile_ptx(source, tmp_path / "mutant.so")
    mutant = Interpreted(tmp_path / "mutant.so")
    monkeypatch.setattr(f"test_cuda_{op}.interpreted", lambda _: mutant)
    with pytest.raises(AssertionError) as caught:
        check()
    assert message in str(caught.value)
