"""The FGSM step against its three torch operations; the floor is x + g, which moves the same bytes."""

import _timing
import torch

import fastreg as fr


def cases(quick=False):
    """The rows of the table."""
    for dtype in (torch.float32, torch.bfloat16):
        for power in (20,) if quick else (20, 24):
            x = torch.rand(2**power).to(dtype)
            g = torch.randn(2**power).to(dtype)
            expected = (x.float() + 0.1 * g.float().sign()).clamp(0, 1).to(dtype)
            assert torch.equal(fr.fgsm_step(x, g, 0.1, 0, 1), expected)
            functions = {
                "fastreg": lambda x=x, g=g: fr.fgsm_step(x, g, 0.1, 0, 1),
                "torch": lambda x=x, g=g: (x + 0.1 * g.sign()).clamp(0, 1),
                "floor": lambda x=x, g=g: x + g,
            }
            yield _timing.row(f"`fgsm_step`, {str(dtype)[6:]}, 2^{power}", functions)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_timing.table(cases()))
