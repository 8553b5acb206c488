"""What all tests share: one thread by default, so that a test does not depend on the machine, and the dtypes of the contract."""

import pytest
import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed, so that a failure repeats."""
    torch.manual_seed(20260101)
    yield


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    """Each dtype an op promises."""
    return request.param
