"""Smoothed cross-entropy forward and backward against torch's; the floor is z * 2, which reads and writes each logit once."""

import _timing
import torch

import fastreg as fr


def cases(quick=False):
    """The rows of the table."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in ((128, 10), (256, 1000)) if quick else ((128, 10), (256, 1000), (512, 32000)):
            z = torch.randn(rows, classes).to(dtype).requires_grad_()
            y = torch.randint(0, classes, (rows,))

            def run(f, z=z, y=y):
                z.grad = None
                f(z, y, label_smoothing=0.1).backward()

            reference = torch.nn.functional.cross_entropy(z.detach().double(), y, label_smoothing=0.1)
            ours = fr.cross_entropy(z, y, label_smoothing=0.1, loss_dtype=torch.float32)
            torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
            functions = {
                "fastreg": lambda run=run: run(fr.cross_entropy),
                "torch": lambda run=run: run(torch.nn.functional.cross_entropy),
                "floor": lambda z=z: z.detach() * 2,
            }
            saved = [
                _timing.saved_bytes(lambda f=f, z=z, y=y: f(z, y, label_smoothing=0.1))
                for f in (fr.cross_entropy, torch.nn.functional.cross_entropy)
            ]
            name = f"smoothed cross-entropy forward + backward, {str(dtype)[6:]}, {rows} × {classes}"
            yield _timing.row(name, functions, saved)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_timing.table(cases()))
