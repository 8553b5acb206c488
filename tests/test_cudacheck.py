"""What executes CUDA kernels without a GPU, tests/cudacheck, on a sample kernel: right results where the
kernel is right, and each kind of mistake is seen.
"""

import ctypes
import functools
import os
import subprocess

import numpy as np
import pytest
import torch
from cuda_machine import CUDACHECK, SCHEDULES, Interpreted, built, compile_ptx, needs_nvcc
from cudacheck import hostrun

N = 1003
SAMPLE = CUDACHECK / "sample.cu"


@functools.cache
def sample(mistake=None):
    """The sample's kernels, with one of the mistakes that it knows where asked for."""
    flags = [f"-D{mistake}"] if mistake else []
    build = functools.partial(compile_ptx, SAMPLE, flags=flags)
    return Interpreted(built(f"sample-{mistake}.so", [SAMPLE, hostrun.SHIM], build))


def on_the_host(mistake=None, **environment):
    """What the sample's own main says, compiled by g++ under AddressSanitizer."""
    flags = ["-std=c++20", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-DCUDAHOST", "-I", CUDACHECK / "cudahost" / "shim", *([f"-D{mistake}"] if mistake else [])]

    def build(path):
        subprocess.run(["g++", *flags, "-x", "c++", SAMPLE, "-o", path], check=True)

    program = built(f"sample-{mistake}", [SAMPLE, CUDACHECK / "cudahost" / "cudahost.h"], build)
    return subprocess.run(
        [program],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment},
    )


def pointers(x, y, count):
    """The arguments of the sample's launchers."""
    return ctypes.c_void_p(x), ctypes.c_void_p(y), ctypes.c_int64(count)


def add(kernels, n=N, readonly=True, **options):
    """(y, y's buffer, x's buffer, the report) of y = 0.5 x + y for x = 0, 1, ... and y = 1."""
    slots = []

    def arguments(machine):
        x, y = torch.arange(float(n)), torch.ones(n)
        slots[:] = machine.put(x, "x", readonly=readonly), machine.put(y, "y", readonly=False)
        return pointers(slots[0].at, slots[1].at, n)

    (report,) = kernels.call("sample_add_launch", arguments, **options)
    return slots[1].result(), slots[1].buffer, slots[0].buffer, report


def reverse(kernels, launcher="sample_reverse_launch", **options):
    slots = []

    def arguments(machine):
        x = torch.arange(256.0)
        slots[:] = [machine.room(x, "y")]
        return pointers(machine.put(x, "x").at, slots[0].at, 2)

    kernels.call(launcher, arguments, **options)
    return slots[0].result()


@needs_nvcc
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_right_kernel_gives_its_results_in_every_schedule(schedule):
    y, *_ = add(sample(), schedule=schedule)
    assert torch.equal(y, 1 + 0.5 * torch.arange(float(N)))
    expected = torch.arange(256.0).view(2, 128).flip(1).flatten()
    assert torch.equal(reverse(sample(), schedule=schedule), expected)


@needs_nvcc
def test_traffic_is_counted_in_sectors():
    _, _, _, report = add(sample(), n=1024)
    rows = report.traffic.rows
    assert rows["x", "ld"]["bytes"] == 4096 and 32 * rows["x", "ld"]["sectors"] == 4096
    assert rows["y", "st"]["requests"] == 1024 // 4 // 32


@needs_nvcc
def test_written_tells_a_kernels_write_from_the_hosts():
    _, y, x, _ = add(sample(), readonly=False, blocks=[0])
    assert x.initialised().all() and not x.written().any()
    assert (
        y.initialised().all() and y.written()[: 4 * 512].all() and not y.written()[4 * 512 : 4 * 1000].any()
    )


@needs_nvcc
def test_a_result_that_was_not_written_is_said():
    with pytest.raises(AssertionError, match="128 of 256 elements of y were never written"):
        reverse(sample(), blocks=[1])


@needs_nvcc
def test_an_access_beyond_the_end_is_seen():
    with pytest.raises(AssertionError, match=r"out-of-bounds global read.*x\[\+4012 of 4012 bytes\]"):
        add(sample("TAIL_TOO_LONG"))


@needs_nvcc
def test_a_missing_barrier_is_seen():
    with pytest.raises(AssertionError, match="shared-memory race"):
        reverse(sample("NO_BARRIER"))


@needs_nvcc
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_another_thread_wrote_is_not_read_without_a_barrier(schedule):
    """Nothing else goes from warp to warp in this kernel, so that its schedules would hide the mistake."""
    assert torch.equal(reverse(sample(), "sample_copy_launch"), torch.arange(256.0))
    with pytest.raises(AssertionError, match="written by another thread is read without a barrier"):
        reverse(sample("LATE_READ"), "sample_copy_launch", schedule=schedule)


@needs_nvcc
def test_a_write_to_a_read_only_buffer_is_seen():
    def arguments(machine):
        x = machine.put(torch.ones(N), "x")
        return pointers(x.at, x.at, N)

    with pytest.raises(AssertionError, match="write to a read-only buffer"):
        sample().call("sample_add_launch", arguments)


@needs_nvcc
def test_a_misaligned_access_is_seen():
    def arguments(machine):
        x, y = (machine.put(torch.ones(N), name, offset=4, readonly=False) for name in "xy")
        return pointers(x.at, y.at, N)

    with pytest.raises(AssertionError, match="misaligned global read"):
        sample().call("sample_add_launch", arguments)


@needs_nvcc
def test_indices_beyond_2_31():
    n, written = 2**31 + 128 * 4, []

    def arguments(machine):
        x = machine.device.virtual(4 * n, "x", lambda offsets, width: (offsets // 4 % 7).astype(np.float32))
        written[:] = [machine.device.virtual(4 * n, "y")]
        return pointers(x.addr, written[0].addr, n)

    sample().call("sample_add_launch", arguments, blocks=[0, n // 512 - 1])
    at, values = written[0].writes(np.float32)
    assert at.max() == n - 1 and len(set(at)) == len(at) == 1024
    np.testing.assert_array_equal(values, 0.5 * (at % 7))


ORDERS = ("forward", "reverse", "random:3")


@pytest.mark.parametrize("order", ORDERS)
def test_on_the_host_a_right_kernel_gives_its_results(order):
    result = on_the_host(CUDAHOST_ORDER=order)
    assert result.returncode == 0 and result.stderr == ""


def test_on_the_host_an_access_beyond_the_end_is_seen():
    result = on_the_host("TAIL_TOO_LONG")
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize("order", ORDERS)
def test_on_the_host_a_missing_barrier_changes_the_result(order):
    assert on_the_host("NO_BARRIER", CUDAHOST_ORDER=order).returncode == 2
