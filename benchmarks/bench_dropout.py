"""Dropout forward and backward against torch.nn.functional.dropout; the floor is x * 2, forward and backward."""

import _timing
import torch

import fastreg as fr


def cases(quick=False):
    """The rows of the table."""
    for dtype in (torch.float32, torch.bfloat16):
        for power in (14, 20) if quick else (14, 20, 24):
            x = torch.randn(2**power).to(dtype).requires_grad_()
            g = torch.ones_like(x)

            def run(f, x=x, g=g):
                x.grad = None
                f(x).backward(g)

            y, mask = fr.dropout_with_mask(x.detach(), 0.3)
            assert torch.equal(y != 0, fr.unpack_mask(mask, x.shape) & (x != 0))
            assert abs(fr.unpack_mask(mask, x.shape).float().mean() - 0.7) < 0.02
            functions = {
                "fastreg": lambda run=run: run(lambda v: fr.dropout(v, 0.3)),
                "torch": lambda run=run: run(lambda v: torch.nn.functional.dropout(v, 0.3)),
                "floor": lambda run=run: run(lambda v: v * 2),
            }
            ours = _timing.saved_bytes(lambda x=x: fr.dropout(x, 0.3))
            theirs = _timing.saved_bytes(lambda x=x: torch.nn.functional.dropout(x, 0.3))
            name = f"dropout forward + backward, {str(dtype)[6:]}, 2^{power}"
            yield _timing.row(name, functions, (ours, theirs))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_timing.table(cases()))
