"""A device that fastreg has no kernel for, made of torch's own hooks: its tensors say that they are on
another device, and their data are on the CPU.

Run as a program it carries out `CHECKS` on that device and prints {name: None or the error} as JSON. It needs
a process of its own, because a device cannot be taken back.
"""

import functools
import json
import traceback

import torch

import fastreg as fr

DEVICE = "foreign"


class Foreign:
    """Sends every operator that the device gets to the CPU."""

    def __init__(self):
        self.storages = {}  # address of the device's storage -> (that storage, the CPU's storage)

    def to_cpu(self, tensor):
        """The CPU's view of the same memory."""
        storage = self.storages[tensor.untyped_storage()._cdata][1]
        return torch.empty(0, dtype=tensor.dtype).set_(
            storage, tensor.storage_offset(), tensor.size(), tensor.stride()
        )

    def from_cpu(self, tensor):
        """A tensor of the device for one of the CPU."""
        flat = torch._C._acc.create_empty_tensor((1,), tensor.dtype)
        self.storages[flat.untyped_storage()._cdata] = (flat.untyped_storage(), tensor.untyped_storage())
        return self.view(
            torch.ops.aten.as_strided.default, flat, tensor.size(), tensor.stride(), tensor.storage_offset()
        )

    @staticmethod
    def view(op, *args, **kwargs):
        """A view has the storage of its base: only sizes and strides are computed."""
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.Meta), *args, **kwargs)

    @staticmethod
    def number_as_tensor(argument, value, args):
        """A number arrives as such where the operator takes a tensor: x * 2."""
        if str(argument.type) != "Tensor" or isinstance(value, torch.Tensor):
            return value
        like = next(a for a in args if isinstance(a, torch.Tensor))
        floating = like.dtype.is_floating_point or isinstance(value, (bool, int))
        return torch.tensor(value, dtype=like.dtype if floating else torch.float32)

    def __call__(self, op, *args, **kwargs):
        """Run an operator of torch on the CPU; what is changed in place is returned as it came."""
        if op in (torch.ops.aten.as_strided.default, torch.ops.aten.view.default):
            return self.view(op, *args, **kwargs)
        came = {}

        def enter(value):
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if isinstance(value, torch.Tensor) and value.device.type == DEVICE:
                inside = self.to_cpu(value)
                came[id(inside)] = inside, value
                return inside
            return value

        def leave(value):
            if not isinstance(value, torch.Tensor):
                return value
            return came[id(value)][1] if id(value) in came else self.from_cpu(value)

        args, kwargs = torch.utils._pytree.tree_map(enter, (args, kwargs))
        args = [
            self.number_as_tensor(a, value, args)
            for a, value in zip(op._schema.arguments, args, strict=False)
        ]
        results = op(*args, **kwargs)
        for inside, value in came.values():
            if inside.shape != value.shape:  # an empty tensor that was given to be filled
                value.data = self.from_cpu(inside)
        return torch.utils._pytree.tree_map(leave, results)


def install():
    """Make the device; gives what its operators are sent to, and the libraries that must stay alive."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    foreign = Foreign()
    anything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    anything.fallback(foreign, "PrivateUse1")
    # torch has a copy_ for every device, which asks for a copy within it.
    aten.impl("copy_", functools.partial(foreign, torch.ops.aten.copy_.default), "PrivateUse1")
    return foreign, (anything, aten)


def check_tensors_move_and_are_views():
    x = torch.arange(12.0).view(3, 4)
    there = x.to(DEVICE)
    assert there.device.type == DEVICE and torch.equal(there.t()[1:].cpu(), x.t()[1:])
    there[0] += 1
    assert torch.equal(there.cpu(), torch.cat((x[:1] + 1, x[1:])))


def near(got, want):
    """Whether float32 sums of some hundred terms agree that were taken in another order."""
    return torch.allclose(got, want, rtol=2e-5, atol=2e-6)


def on_both(function, *tensors, same=torch.equal):
    """(function(tensors), the gradients of its sum) on the CPU and on the device, from the same state of the
    generator; both must be the `same`.
    """
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(3)  # the device has no generator and draws its seed from the CPU's
        leaves = [t if t is None else t.detach().clone().to(device).requires_grad_() for t in tensors]
        output = function(*leaves)
        assert output.device.type == device
        output.sum().backward()
        grads = [None if t is None else t.grad.cpu() for t in leaves]
        results.append((output.detach().cpu(), *grads))
    for want, got in zip(*results, strict=True):
        assert want is got is None or (same(got, want) and got.dtype == want.dtype), (got, want)
    return results[0]


def check_dropout():
    for dtype in fr._checks.DTYPES:
        for p in (0.3, 0.5, 1.0):
            output, grad = on_both(lambda x, p=p: fr.dropout(x, p), torch.randn(13, 37).to(dtype))
            assert (output == 0).any() and torch.equal(output == 0, grad == 0)


def check_the_family_of_dropout():
    x = torch.randn(5, 7, 6, 2)
    on_both(lambda x: fr.dropout2d(x, 0.4), x)
    on_both(lambda x: fr.drop_path(x, 0.4), x)
    on_both(lambda x: fr.alpha_dropout(x, 0.4, True), x)
    on_both(lambda x: fr.feature_alpha_dropout(x, 0.4, True), x)
    on_both(lambda x: fr.dropout(x * 1, 0.4, inplace=True), x)
    on_both(lambda x: fr.dropout(x.transpose(0, 1), 0.4, generator=torch.Generator().manual_seed(5)), x)


def check_dropout_second_derivative():
    def second(x):
        grad = torch.autograd.grad((fr.dropout(x, 0.3) ** 3).sum(), x, create_graph=True)[0]
        return grad * x

    on_both(second, torch.rand(6, 9) + 1)


def check_dropout_with_mask():
    x = torch.randn(1000)
    want = fr.dropout_with_mask(x, 0.2, seed=-5, offset=13)
    got = fr.dropout_with_mask(x.to(DEVICE), 0.2, seed=-5, offset=13)
    for a, b in zip(want, got, strict=True):
        assert b.device.type == DEVICE and torch.equal(b.cpu(), a)
    kept = fr.unpack_mask(got[1], x.shape)
    assert torch.equal(fr.pack_mask(kept).cpu(), want[1])


def check_dropout_in_place():
    x = torch.randn(40)
    torch.manual_seed(1)
    want = fr.dropout(x, 0.5)
    torch.manual_seed(1)
    there = x.to(DEVICE)
    version = there._version
    assert fr.dropout(there, 0.5, inplace=True) is there
    assert torch.equal(there.cpu(), want) and there._version > version


def check_dropout_add():
    x, residual, bias = torch.randn(9, 8), torch.randn(9, 8), torch.randn(8)
    for p in (0.0, 0.3, 1.0):
        on_both(lambda x, r, b, p=p: fr.dropout_add(x, r, p, b), x, residual, bias)
    on_both(lambda x, r: fr.dropout_add(x, r, 0.3), x, residual)


def check_fgsm_step():
    x, grad = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    eps = torch.tensor([0.1, 0.2, 0.3])
    for numbers in ((0.1,), (0.1, 0.0, 1.0), (eps, 0.2, torch.rand(4, 1, 1, 1) + 0.2)):
        got = fr.fgsm_step(x.to(DEVICE), grad.to(DEVICE), *numbers)
        assert got.device.type == DEVICE and torch.equal(got.cpu(), fr.fgsm_step(x, grad, *numbers))


def stepped(cls, **options):
    """For each dtype, (parameter, its state) after three steps on the CPU and on the device."""
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, True)):
        w, grad = torch.randn(31, 7).to(dtype), torch.randn(31, 7).to(dtype)
        results = []
        for device in ("cpu", DEVICE):
            torch.manual_seed(4)
            p = torch.nn.Parameter(w.clone().to(device))
            optimizer = cls([p], 0.1, l1=0.01, stochastic_rounding=stochastic, **options)
            for _ in range(3):
                p.grad = grad.to(device)
                optimizer.step()
            results.append((p.detach().cpu(), optimizer.state[p]))
        yield results


def check_sgd():
    for both in stepped(fr.optim.SGD, momentum=0.9, weight_decay=0.02):
        results = [(p, state["momentum_buffer"].cpu()) for p, state in both]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_adamw():
    for both in stepped(fr.optim.AdamW, cautious=True, amsgrad=True, ema=0.9):
        results = []
        for p, state in both:
            moments = [state[name].cpu() for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
            results.append((moments, [p, state["ema"].cpu()]))
        (moments, weights), (same_moments, near_weights) = results
        assert all(map(torch.equal, moments, same_moments))
        # The device takes its roots by torch's sqrt, of which _optimizer_math.square_root says what is wrong.
        assert all(map(near, near_weights, weights))


def check_sum_of_squares():
    tensors = [torch.randn(shape).to(dtype) for shape in ((), (0,), (31, 7)) for dtype in fr._checks.DTYPES]
    for dtype in fr._checks.DTYPES:
        own = [t for t in tensors if t.dtype == dtype]
        want = torch.ops.fastreg.sum_of_squares(own)
        got = torch.ops.fastreg.sum_of_squares([t.to(DEVICE) for t in own])
        assert got.device.type == DEVICE and got.dtype == want.dtype
        assert torch.allclose(got.cpu(), want, rtol=2e-5)


def check_clipping():
    results = []
    for device in ("cpu", DEVICE):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 33).to(device))
        sgd = fr.optim.SGD([p], 0.1, max_norm=0.5)
        p.grad = torch.linspace(2, -1, 33).to(device)
        sgd.step()
        results.append((p.detach().cpu(), sgd.grad_norm.cpu()))
    assert all(map(near, *results))


def check_attention():
    query, key, value = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 4)
    for p, is_causal in ((0.0, False), (0.3, False), (0.3, True)):

        def attended(q, k, v, p=p, is_causal=is_causal):
            return fr.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=is_causal)

        on_both(attended, query, key, value, same=near)


def check_cross_entropy():
    logits, target = torch.randn(9, 7) * 3, torch.tensor([0, 6, 2, -100, 1, 5, 3, 3, 2])
    weight = torch.rand(7) + 0.5
    for options in (
        {},
        dict(label_smoothing=0.1),
        dict(label_smoothing=0.2, smoothing="others", z_loss=0.01),
    ):
        for reduction in ("mean", "sum", "none"):

            def loss(x, options=options, reduction=reduction):
                given = dict(weight=weight.to(x.device), reduction=reduction, **options)
                return fr.cross_entropy(x, target.to(x.device), **given)

            on_both(loss, logits, same=near)
    soft = torch.softmax(torch.randn(9, 7), 1)
    on_both(lambda x: fr.cross_entropy(x, soft.to(x.device)), logits, same=near)


def check_linear_cross_entropy():
    hidden, weight, bias = torch.randn(9, 5), torch.randn(7, 5), torch.randn(7)
    target = torch.tensor([0, 6, 2, -100, 1, 5, 3, 3, 2])

    def loss(h, w, b):
        return fr.linear_cross_entropy(h, w, target.to(h.device), b, label_smoothing=0.1)

    on_both(loss, hidden, weight, bias, same=near)


def check_augment():
    images = torch.rand(5, 3, 17, 23)
    augment = fr.augment.Augment(hflip=0.5, rotate=20, shear=5, brightness=0.3, contrast=0.3, erase=0.5)

    def augmented(x):
        return fr.augment.apply(x, augment.sample(x, seed=3, offset=7))

    on_both(augmented, images, same=lambda got, want: torch.allclose(got, want, rtol=1e-4, atol=1e-4))


def check_attacks():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    x, y = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 3, 1])
    want = fr.pgd(model, x, y, 0.1, 0.05, 3, random_start=False)
    got = fr.pgd(model.to(DEVICE), x.to(DEVICE), y.to(DEVICE), 0.1, 0.05, 3, random_start=False)
    assert got.device.type == DEVICE and torch.equal(got.cpu(), want)


def refuses(kind, text, function, *args, **options):
    """Whether a call raises an error of that kind that says that."""
    try:
        function(*args, **options)
    except kind as error:
        return text in str(error)
    return False


def check_errors_are_those_of_the_kernels():
    there = torch.ones(8).to(DEVICE)
    assert refuses(ValueError, "dropout: input must be float32", fr.dropout, there.to(torch.int64))
    expanded = there[:1].expand(8)
    assert refuses(ValueError, "must not share memory", fr.dropout, expanded, inplace=True)
    leaf = there.clone().requires_grad_()
    assert refuses(ValueError, "cannot overwrite a leaf", fr.dropout, leaf, inplace=True)
    assert refuses(ValueError, "residual must be", fr.dropout_add, there, torch.ones(8))
    assert refuses(ValueError, "device of x", fr.fgsm_step, there, torch.ones(8), 0.1)
    assert refuses(ValueError, "x must be float32", fr.fgsm_step, there.int(), there.int(), 0.1)
    seed = torch.zeros(1, dtype=torch.int64)
    assert refuses(ValueError, "seed must be on", fr.dropout_with_mask, there, seed=seed)


def check_there_is_no_kernel():
    for name in fr._registry.declared():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastreg::{name}", "PrivateUse1")


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


def main():
    """Run all checks."""
    keep = install()
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))
    del keep


if __name__ == "__main__":
    main()
