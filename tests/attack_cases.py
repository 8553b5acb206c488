"""What tests/test_fgsm.py and tests/test_attacks.py share."""

import torch

INF, NAN = float("inf"), float("nan")


def reference_step(x, grad, eps, lower=None, upper=None, origin=None, radius=None):
    """clamp(x + eps sign(grad)), in float64, one rounding; with an origin first into its ball."""

    def wide(v):
        return v.double() if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=torch.float64)

    out = wide(x) + wide(eps) * wide(grad).nan_to_num(0).sign()
    if origin is not None:
        out = torch.minimum(torch.maximum(out, wide(origin) - wide(radius)), wide(origin) + wide(radius))
    out = torch.maximum(out, wide(-INF if lower is None else lower))
    return torch.minimum(out, wide(INF if upper is None else upper))


def assert_step(got, want, dtype):
    """Equal up to float32's rounding of the sum before the one of the dtype; exact in float64 up to 1 ulp."""
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.double().nan_to_num(0), want.nan_to_num(0)
    room = (want.to(dtype).double() - want).abs() + want.abs().clamp(min=1) * (
        2e-16 if dtype == torch.float64 else 2e-7
    )
    assert ((got - want).abs() <= room).all(), (got - want).abs().max()


def batch(n=6, dtype=torch.float32):
    return torch.rand(n, 3, 6, 6).to(dtype), torch.randint(5, (n,))
