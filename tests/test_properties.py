"""Every operator with any input that it takes, against its plain-torch definition in float64.

The operators are those that have compiled kernels; property_cases.py and its like have a check for each.
FASTREG_EXAMPLES is the number of inputs per operator: CI takes few, for its time; 300 are for a change of an
operator, and the marker `long` tries 20,000.
"""

import os

import mask_statistics
import property_cases as cases
import property_cases_attention
import property_cases_augment
import pytest
import torch
from helpers import threads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastreg import _example, _registry  # noqa: F401  The example declares its operator.

# Of 19 checks, 100 inputs each take some 25 s of CPU.
EXAMPLES = int(os.environ.get("FASTREG_EXAMPLES", "100"))
KERNELS = {
    "adamw_": cases.adamw,
    "dropout": cases.dropout,
    "dropout_": cases.dropout_in_place,
    "dropout_apply": cases.dropout_apply,
    "dropout_mask": cases.dropout_mask,
    "dropout_add": cases.dropout_add,
    "example": cases.example,
    "fgsm_step": cases.fgsm_step,
    "pgd_step": cases.pgd_step,
    "sgd_": cases.sgd,
    "sum_of_squares": cases.sum_of_squares,
    "cross_entropy": cases.cross_entropy,
    "cross_entropy_": cases.cross_entropy_in_place,
    "cross_entropy_scale_": cases.cross_entropy_scale,
    **property_cases_attention.CHECKS,
    **property_cases_augment.CHECKS,
}
OTHERS = {
    **property_cases_attention.OTHERS,
    "linear_cross_entropy": cases.linear_cross_entropy,
    "sgd_numbers_": cases.sgd_numbers,
}
CHECKS = {**KERNELS, **OTHERS}
PHASES = (Phase.generate,) if os.environ.get("FASTREG_NO_SHRINK") else tuple(Phase)
slow_is_fine = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


def check(name, examples):
    if name == "example" and not torch._C._dispatch_has_kernel_for_dispatch_key("fastreg::example", "CPU"):
        pytest.skip("an installed fastreg has no kernels of the example")

    # The few examples of every run are the same in each, so that a failure is of the change that it follows.
    @settings(
        max_examples=examples,
        derandomize=examples <= 100,
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
