"""Every operator with any input that it takes, against its plain-torch definition in float64.

The operators are those that have compiled kernels; property_cases_<op>.py has a check for each of the op's.
FASTREG_EXAMPLES is the number of inputs per operator, 300 unless it says otherwise; the marker `long` tries
20,000.
"""

import importlib
import os
from pathlib import Path

import mask_statistics
import pytest
import torch
from helpers import threads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastreg import _registry

EXAMPLES = int(os.environ.get("FASTREG_EXAMPLES", "300"))
FILES = sorted(path.stem for path in Path(__file__).parent.glob("property_cases_*.py"))
OF_OPS = [importlib.import_module(name) for name in FILES]
KERNELS = {name: check for cases in OF_OPS for name, check in cases.CHECKS.items()}
OTHERS = {name: check for cases in OF_OPS for name, check in getattr(cases, "OTHERS", {}).items()}
CHECKS = {**KERNELS, **OTHERS}
PHASES = (Phase.generate,) if os.environ.get("FASTREG_NO_SHRINK") else tuple(Phase)
slow_is_fine = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


def check(name, examples):
    if name == "example" and not torch._C._dispatch_has_kernel_for_dispatch_key("fastreg::example", "CPU"):
        pytest.skip("an installed fastreg has no kernels of the example")

    # The examples of every run are the same in each, so that a failure is of the change that it follows.
    @settings(
        max_examples=examples,
        derandomize=examples <= 300,
        deadline=None,
        suppress_health_check=slow_is_fine,
        database=None,
        phases=PHASES,
    )
    @given(st.data())
    def run(data):
        with threads(data.draw(st.sampled_from([1, 1, 1, 3]))):
            CHECKS[name](data.draw)

    run()


def test_every_operator_has_a_check():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names())
    compiled = {
        name for name in names if name in _registry._registered and has_kernel(f"fastreg::{name}", "CPU")
    }
    assert set(KERNELS) == set(_registry.declared()) | compiled


@pytest.mark.parametrize("name", CHECKS)
def test_some_inputs(name):
    check(name, EXAMPLES)


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKS)
def test_very_many_inputs(name):
    check(name, 20_000)


@pytest.mark.long
def test_masks_are_random():
    """Of some 250 normal numbers, one beyond 5 is found in 7,000 runs; the streams never change."""
    found = mask_statistics.small()
    assert len(found) > 150 and max(map(abs, found.values())) < 5, {
        k: z for k, z in found.items() if abs(z) > 4
    }
