"""The operator of AdamW: its kernels on the CPU.

Proven here: a step equals the definition in plain torch bit for bit, for every option, dtype, layout and
thread count; the float64 formula of the papers within the rounding, over many steps, and torch's class; what
is skipped, counted, flushed, rounded at random and refused.
"""

import hashlib
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from adamw_reference import NAMES, USUAL, reference, step_case
from helpers import on_each_instruction_set, same_bits, threads

import fastreg as fr
from fastreg import _registry

OP = torch.ops.fastreg.adamw_.default
# No dimension, one element, none, ends of vectors of 16 and 8, and more than one block of 1024.
SHAPES = ((), (1,), (3, 5), (0, 3), (33, 2), (1030,), (70, 31))


def state(w, average=False, amsgrad=False, step=0.0):
    """The lists of one parameter, without its gradient."""
    lists = dict.fromkeys(NAMES, ())
    lists |= {name: [torch.zeros_like(w)] for name in ("exp_avgs", "exp_avg_sqs")}
    lists |= dict(params=[w], steps=[torch.tensor(step)])
    if amsgrad:
        lists["max_exp_avg_sqs"] = [torch.zeros_like(w)]
    if average:
        lists |= dict(averages=[torch.zeros_like(w)], n_averaged=[torch.zeros(())])
    return lists


def run(lists, grad, **options):
    """One step; the lists come back."""
    OP(**{**lists, "grads": [grad]}, **{**USUAL, **options})
    return lists


def copies(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def test_bits_of_the_definition():
    torch.manual_seed(0)
    choose = random.Random(3).choice
    for _ in range(250):
        lists, options = step_case(choose, SHAPES)
        got, want = copies(lists), copies(lists)
        OP(*got, **options)
        _registry.plain_definition("adamw_")(*want, **options)
        for name, mine, theirs in zip(NAMES, got, want, strict=True):
            assert all(map(same_bits, mine, theirs)), (name, options)


@pytest.mark.parametrize("form", [{}, dict(l1=0.05), dict(l1=0.05, proximal=True), dict(cautious=True)])
def test_the_formula_of_the_papers(form, dtype):
    """Ten steps in float32 and float64; one of 16 bits, whose state is rounded once."""
    close = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    steps = 10 if dtype in (torch.float32, torch.float64) else 1
    for maximize in (False, True):
        options = USUAL | form | dict(maximize=maximize)
        w = torch.randn(1037).to(dtype)
        want = w.double(), torch.zeros(1037).double(), torch.zeros(1037).double()
        lists = state(w.clone())
        for t in range(1, steps + 1):
            g = torch.randn(1037).to(dtype)
            run(lists, g, **options)
            want = reference(want[0], g.double(), want[1], want[2], t, **options)
        got = (lists[name][0].double() for name in ("params", "exp_avgs", "exp_avg_sqs"))
        for mine, theirs in zip(got, want, strict=True):
            near = (mine - theirs).abs() <= close * (1 + theirs.abs())
            assert near.double().mean() > 0.99  # sign(w) beside 0 may differ


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.5), (0.0, 0.0)])
def test_the_way_of_torch(betas, amsgrad):
    """float64, as torch.optim.AdamW over ten steps, state included."""
    w = torch.randn(40, 7, dtype=torch.float64)
    p = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([p], lr=0.01, betas=betas, weight_decay=0.1, amsgrad=amsgrad, foreach=False)
    lists = state(w, amsgrad=amsgrad)
    for _ in range(10):
        p.grad = torch.randn_like(w)
        optimizer.step()
        run(lists, p.grad, beta1=betas[0], beta2=betas[1])
    theirs = optimizer.state[p]
    pairs = [(p.detach(), w), (theirs["exp_avg"], lists["exp_avgs"][0])]
    pairs += [(theirs["exp_avg_sq"], lists["exp_avg_sqs"][0]), (theirs["step"], lists["steps"][0])]
    pairs += [(theirs["max_exp_avg_sq"], lists["max_exp_avg_sqs"][0])] if amsgrad else []
    for mine, want in pairs:
        torch.testing.assert_close(mine, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", [1, 15, 31, 32, 33, 1023, 1025, 32767, 32769, 2 * 32768 + 5])
def test_sizes_and_threads(n, dtype):
    """Borders of the vector, of the block and of the span that one thread takes."""
    w, g, options = torch.randn(n).to(dtype), torch.randn(n).to(dtype), dict(l1=0.1, proximal=True, ema=0.9)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(run(state(w.clone(), average=True, amsgrad=True), g, **options))
    plain = {**state(w.clone(), average=True, amsgrad=True), "grads": [g]}
    _registry.plain_definition("adamw_")(**plain, **{**USUAL, **options})
    for name, lists in itertools.product(NAMES, results):
        if name != "grads":
            assert all(map(same_bits, lists[name], plain[name])), name


def test_the_average():
    """As torch.optim.swa_utils.AveragedModel has it: a copy of the weights after the first step."""
    model = torch.nn.Linear(9, 5)
    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    w = model.weight.detach()
    lists = state(w, average=True)
    lists["averages"][0].fill_(math.nan)  # a first step does not look at it
    for i in range(5):
        run(
            lists,
            torch.randn(5, 9),
            ema=0.0 if i % 2 else 0.9,
            ema_tensor=torch.tensor(0.9) if i % 2 else None,
        )
        theirs.update_parameters(model)
    torch.testing.assert_close(lists["averages"][0], theirs.module.weight.detach(), rtol=1e-6, atol=1e-7)
    assert lists["n_averaged"][0] == 5


def test_a_skipped_step_changes_nothing():
    lists = state(torch.randn(40), average=True, amsgrad=True)
    before = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    run(lists, torch.full((40,), math.inf), found_inf=torch.ones(()), l1=0.1)
    assert all(same_bits(a, b) for name in NAMES for a, b in zip(lists[name], before[name], strict=True))
    run(lists, torch.ones(40), found_inf=torch.zeros(()))
    assert lists["steps"][0] == 1 and lists["n_averaged"][0] == 1


def test_proximal_zeros_and_their_metric():
    """A weight becomes +0 where the step leaves it within lr * l1 / d of 0, and d is that of the weight."""
    w, g = torch.tensor([0.02, 0.02, -0.02, 5.0]), torch.tensor([1.0, 100.0, -0.01, 0.0])
    lists = run(state(w), g, weight_decay=0.0, l1=1.0, proximal=True)
    # The first step is lr * sign(g), and d is |g|: thresholds of 0.01, 0.0001, 1 and 1e6.
    expected = torch.tensor([0.0, 0.0099, 0.0, 0.0])
    torch.testing.assert_close(lists["params"][0], expected, rtol=0, atol=1e-6)
    assert not lists["params"][0][2:].signbit().any()


def test_cautious_decay():
    """It acts where update and weight agree in sign, or where there is no update."""
    w, g = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    decayed = run(state(w.clone()), g, cautious=True)["params"][0]
    plain = run(state(w.clone()), g, weight_decay=0.0)["params"][0]
    assert torch.equal((decayed != plain), torch.tensor([True, False, False, True, True]))


def test_state_below_the_normal_numbers_is_zero():
    tiny = 1e-38
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.ones(70).to(dtype)
        lists = state(w, average=True)
        lists["exp_avgs"][0].fill_(tiny)
        lists["exp_avg_sqs"][0].fill_(tiny)
        w.fill_(tiny)
        run(lists, torch.zeros_like(w), weight_decay=0.0)
        assert not lists["exp_avgs"][0].any() and not lists["exp_avg_sqs"][0].any()
        assert not lists["averages"][0].any() and w.all()  # the weight itself stays


def test_stochastic_rounding_is_unbiased():
    """Of the weights and of their average, which to nearest would never move."""
    n = 40_000
    lists = state(torch.ones(n).bfloat16(), average=True)
    lists["averages"][0].fill_(1)
    lists["n_averaged"][0].fill_(1)
    g = torch.ones(n).bfloat16()
    for i in range(20):
        run(lists, g, lr=1e-4, weight_decay=0.0, ema=0.9, seed=torch.tensor([i]))
    w = average = 1.0
    for _ in range(20):
        w -= 1e-4
        average = 0.9 * average + 0.1 * w
    assert abs(lists["params"][0].double().mean() - w) < 5e-5
    assert abs(lists["averages"][0].double().mean() - average) < 5e-5
    assert len(lists["params"][0].unique()) > 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(grads=[]), "expected one gradient"),
        (
            dict(exp_avgs=[torch.zeros(4)]),
            r"exp_avg must have the shape of its parameter, \(3,\), got \(4,\)",
        ),
        (dict(exp_avg_sqs=[torch.zeros(3).double()]), "exp_avg_sq must have the dtype"),
        (dict(max_exp_avg_sqs=[torch.zeros(3), torch.zeros(3)]), "expected one gradient"),
        (dict(steps=[torch.zeros((), dtype=torch.float64)]), "a step must be one float32"),
        (dict(averages=[torch.zeros(3)]), "expected an average and its count"),
        (dict(averages=[torch.zeros(3)], n_averaged=[torch.zeros(2)]), "n_averaged must be one float32"),
        (dict(averages=[torch.zeros(1).expand(3)], n_averaged=[torch.zeros(())]), "must not share memory"),
        (dict(lr=-1.0), "at least 0, got -1"),
        (dict(lr_tensor=torch.tensor(math.nan)), "finite and at least 0, got nan"),
        (dict(beta1=1.0), r"must be in \[0, 1\), got 1"),
        (dict(eps=-1.0), "eps must be finite"),
        (dict(ema=1.5), r"ema must be in \[0, 1\]"),
        (dict(clip=torch.ones(2)), "clip must be one number"),
        (dict(seed=torch.ones(1)), "seed must be one int64"),
        (dict(params=[torch.ones(3, dtype=torch.int32)]), "a parameter must be float32"),
    ],
)
def test_refuses(change, text):
    """Everything is checked before anything is written."""
    w = torch.ones(3)
    arguments = {**state(w), "grads": [torch.ones(3)], **USUAL}
    with pytest.raises(ValueError, match=text):
        OP(**{**arguments, **change})
    assert torch.equal(w, torch.ones(3))


def test_opcheck(dtype):
    make = lambda: torch.rand(3, 4).to(dtype)  # noqa: E731
    ones = lambda: torch.ones(())  # noqa: E731
    lists = [[make()] for _ in range(5)] + [[ones()], [make()], [ones()]]
    values = [0.1, 0.9, 0.99, 1e-8, 0.1, 0.02, 0.9]
    torch.library.opcheck(OP, (*lists, *values, True, True, False))
    scaled = dict(grad_scale=ones(), found_inf=ones(), clip=ones(), lr_tensor=ones())
    torch.library.opcheck(OP, (*copies(lists), *values, False, False, True), scaled)
    numbers = torch.tensor(values, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastreg.adamw_numbers_.default, (*lists, numbers, True, False, True))
    got, want = copies(lists), copies(lists)
    torch.ops.fastreg.adamw_numbers_(*got, numbers, True, False, True)
    OP(*want, *values, True, False, True)
    assert all(same_bits(a[0], b[0]) for a, b in zip(got, want, strict=True))


def digest():
    """Printed by a process of its own: the instruction set and a hash over the results of many steps."""
    torch.manual_seed(5)
    choose, result = random.Random(5).choice, hashlib.sha256()
    for _ in range(60):
        lists, options = step_case(choose, SHAPES)
        OP(*lists, **options)
        for tensor in itertools.chain(*lists):
            bits = tensor.contiguous()
            bits[bits.isnan()] = math.nan  # which NaN it is, is the processor's affair
            result.update(bits.view(-1).view(torch.uint8).numpy().tobytes())
    print(fr._C.build_info()["instruction_set"], result.hexdigest())


@pytest.mark.slow  # processes that import torch
def test_bits_for_any_instruction_set():
    printed = on_each_instruction_set(
        "import sys; sys.path.insert(0, sys.argv[1]); import test_adamw; test_adamw.digest()",
        Path(__file__).parent,
    )
    lines = dict(line.split() for line in printed.values())
    assert lines.keys() == printed.keys() and len(set(lines.values())) == 1
