"""A step of SGD with momentum, L1 and L2 against torch's with the usual L1 line; the floor is torch's fused SGD without L1."""

import _timing
import torch

import fastreg as fr

OPTIONS = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
L1 = 1e-5


def _parameters(shapes):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def _torch_step(parameters, optimizer):
    with torch.no_grad():
        for p in parameters:
            p.grad.add_(p.sign(), alpha=L1)
    optimizer.step()


def cases(quick=False):
    """The rows of the table."""
    for name, shapes in (
        ("one tensor of 2^20", [(2**20,)]),
        *(() if quick else (("one tensor of 2^24", [(2**24,)]),)),
        ("256 tensors of 4,096", [(4096,)] * 256),
    ):
        ours, theirs, plain = (_parameters(shapes) for _ in range(3))
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a.data)
            b.grad.copy_(a.grad)
        our_sgd = fr.optim.SGD(ours, l1=L1, **OPTIONS)
        torch_sgd = torch.optim.SGD(theirs, **OPTIONS)
        fused = torch.optim.SGD(plain, fused=True, **OPTIONS)
        our_sgd.step()
        _torch_step(theirs, torch_sgd)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        functions = {
            "fastreg": our_sgd.step,
            "torch": lambda p=theirs, o=torch_sgd: _torch_step(p, o),
            "floor": fused.step,
        }
        yield _timing.row(f"SGD momentum + L1 + L2, float32, {name}", functions)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_timing.table(cases()))
