"""Rounding at random in SGD and AdamW: a function of the seed, the step, the parameter and the place of an
element in the whole parameter, so that replicas, shards and resumed training have the same bits.
"""

import io
import itertools

import pytest
import torch
from helpers import same_values
from sgd_reference import parameter

import fastreg as fr
from fastreg import _registry
from fastreg._seeds import mix_seed, mixed_seed
from fastreg._shards import place_in_whole

KINDS = {
    fr.optim.SGD: dict(lr=0.01, momentum=0.9, ema=0.5),
    fr.optim.AdamW: dict(lr=0.01, amsgrad=True, ema=0.5),
}
# An odd number of elements, more than a block of 1024, less than a group of Philox's words, no dimension.
SHAPES = [(5, 7), (1030,), (3,), ()]


def start():
    generator = torch.Generator().manual_seed(1)
    return [parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]


def train(params, optimizer, first=0, steps=4):
    """The second parameter's first gradient comes late, the third one's never again."""
    for n in range(first, first + steps):
        for i, p in enumerate(params):
            has = {1: n > 1, 2: n == 0}.get(i, True)
            generator = torch.Generator().manual_seed(10 * n + i)
            p.grad = torch.randn(p.shape, generator=generator).bfloat16() if has else None
        optimizer.step()


def all_tensors(params, optimizer):
    return [p.detach() for p in params] + [v for p in params for v in optimizer.state[p].values()]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.fixture(params=KINDS, ids=lambda cls: cls.__name__)
def make(request):
    def make(params, **options):
        return request.param(params, stochastic_rounding=True, **KINDS[request.param], **options)

    return make


def test_replicas_agree_whatever_their_generators(make):
    """And no generator moves."""
    results = []
    for rank in range(2):
        torch.manual_seed(rank)
        params = start()
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])
        before = torch.get_rng_state()
        train(params, optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(all_tensors(params, optimizer))
    assert_equal(*results)
    params = start()
    other = make(params, rounding_seed=5)
    train(params, other)
    assert not torch.equal(params[1], results[0][1])


def test_resumed_training_has_the_same_bits(make):
    """The seed is in state_dict, as the counts are; torch's classes take both."""
    params = start()
    optimizer = make(
        [{"params": params[:1]}, {"params": params[1:], "rounding_seed": -(2**63)}], rounding_seed=7
    )
    train(params, optimizer)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    train(params, optimizer, first=4)
    for again in range(2):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        others = [parameter(p.detach()) for p in saved["params"]]
        other = make([{"params": others[:1]}, {"params": others[1:]}], rounding_seed=again)
        other.load_state_dict(saved["optimizer"])
        assert [group["rounding_seed"] for group in other.param_groups] == [7, -(2**63)]
        train(others, other, first=4)
        assert_equal(all_tensors(params, optimizer), all_tensors(others, other))


def test_checkpoints_of_torch(make):
    """Both ways: torch's own keeps what it does not know, and ours keeps its own seed."""
    params = start()
    optimizer = make(params, rounding_seed=3)
    train(params, optimizer, steps=2)
    is_sgd = isinstance(optimizer, fr.optim.SGD)
    torchs, options = (torch.optim.SGD, dict(momentum=0.9)) if is_sgd else (torch.optim.AdamW, {})
    theirs = torchs(start(), lr=0.1, **options)
    theirs.load_state_dict(optimizer.state_dict())
    train(theirs.param_groups[0]["params"], theirs, first=2)
    plain = torchs(params := start(), lr=0.1, **options)
    train(params, plain, steps=3)
    own = make(again := start(), rounding_seed=4)
    own.load_state_dict(plain.state_dict())
    assert own.param_groups[0]["rounding_seed"] == 4 and own.param_groups[0]["stochastic_rounding"]
    train(again, own, first=3)
    assert own.state[again[0]]["step"] == (5 if is_sgd else 7)  # a buffer tells of one step at least


def test_every_step_and_parameter_draws_anew(make):
    """A step from the same weights by the same gradient, at another step or as another parameter."""
    w = torch.full((4096,), 0.75, dtype=torch.bfloat16)
    seen, params = [], [parameter(w.clone()) for _ in range(2)]
    optimizer = type(make(start()))(params, lr=2.0**-10, stochastic_rounding=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
            with torch.no_grad():
                p.copy_(w)
        optimizer.step()
        seen += [p.detach().clone() for p in params]
    for a, b in itertools.combinations(seen, 2):
        assert 0.2 < (a != b).double().mean() < 0.8


# No dimension, no element, and one to three dimensions.
@pytest.mark.parametrize("shape", [(), (0, 3), (6,), (4, 6), (3, 4, 5)], ids=str)
def test_places_of_parts(shape):
    """Every part of every dimension, against the indices themselves."""
    size = torch.Size(shape)
    index = torch.arange(size.numel()).reshape(shape)
    told = 0
    cuts = [[slice(a, b) for a in range(n + 1) for b in range(a, n + 1)] for n in shape]
    for part in itertools.product(*cuts):
        own = index[part].flatten()
        place = place_in_whole(size, part)
        if place is None:
            cut = [k for k, s in enumerate(part) if s.stop - s.start < shape[k]]
            assert len(cut) > 1 and cut != [0, 1]
            continue
        told += 1
        first, columns, row = place
        i = torch.arange(own.numel())
        assert torch.equal(first + i // columns * row + i % columns, own) and columns >= 1
    assert told


def operator_lists(op, tensors):
    count = torch.tensor(3.0)
    w, g, m, v = (t.clone() for t in tensors)
    if op == "sgd":
        return [[w], [g], [m], [count], [], []]
    return [[w], [g], [m], [v.abs()], [], [count], [], []]


NUMBERS = {
    "sgd": (0.1, 0.9, 0.0, 0.01, 0.0, 0.0, False, False, False, False),
    "adamw": (0.1, 0.9, 0.99, 1e-8, 0.01, 0.0, 0.0, False, False, False),
}


@pytest.mark.parametrize("op", NUMBERS)
def test_shards_have_the_bits_of_the_whole(op):
    """Rows, whose first is no multiple of 8, columns, and both; in the kernels and in plain torch."""
    torch.manual_seed(0)
    shape, seed = torch.Size((37, 45)), torch.tensor([-99])
    tensors = [torch.randn(shape).bfloat16() for _ in range(4)]
    kernel = getattr(torch.ops.fastreg, f"{op}_")
    plain = _registry.plain_definition(f"{op}_")

    def stepped(run, part, places):
        lists = operator_lists(op, [t[part] for t in tensors])
        run(*lists, *NUMBERS[op], seed=seed, places=places)
        return lists[0][0]

    whole = stepped(kernel, (slice(0, 37), slice(0, 45)), [6, 0, shape.numel(), 0])
    parts = [(slice(3, 20), slice(0, 45)), (slice(0, 37), slice(11, 31)), (slice(5, 9), slice(44, 45))]
    for part in [*parts, (slice(0, 37), slice(0, 45))]:
        places = [6, *place_in_whole(shape, part)]
        for run in (kernel, plain):
            assert same_values(stepped(run, part, places), whole[part]), (part, run)
    assert not same_values(stepped(kernel, parts[0], []), whole[parts[0]])


def test_seeds_of_tensors():
    for seed, step in itertools.product((0, -1, 2**63 - 1, -(2**63), 77), (0, 1, 2**24)):
        assert mixed_seed(torch.tensor(seed), torch.tensor(step)) == mix_seed(seed, step)


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("steps", [float("inf"), float("nan"), -3.0, 2.0**63, 2.0**62], ids=str)
def test_what_is_no_count_of_steps_draws_as_none(op, steps):
    """Infinity as an integer is whatever the processor makes of it."""

    def drawn(steps, definition):
        tensors = [torch.full((64,), v, dtype=torch.bfloat16) for v in (1.0, 1e-3, 0.0, 0.0)]
        lists = operator_lists(op, tensors)
        for counts in lists:
            if len(counts) and counts[0].dim() == 0:
                counts[0].fill_(steps)
        step = _registry.plain_definition(f"{op}_") if definition else getattr(torch.ops.fastreg, f"{op}_")
        step(*lists, *NUMBERS[op], seed=torch.tensor([5]))
        return lists[0][0]

    assert same_values(drawn(steps, False), drawn(steps, True))


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("places", [[1, 2, 3], [0, -1, 4, 0], [0, 0, 0, 0]], ids=str)
def test_wrong_places(op, places):
    lists = operator_lists(op, [torch.ones(4, dtype=torch.bfloat16)] * 4)
    with pytest.raises(ValueError, match="places must"):
        getattr(torch.ops.fastreg, f"{op}_").default(
            *lists, *NUMBERS[op], seed=torch.tensor([1]), places=places
        )


@pytest.mark.parametrize(
    "seed, error, text",
    [
        (0.5, TypeError, "must be an int, got float"),
        (True, TypeError, "got bool"),
        (2**63, ValueError, "an int64"),
    ],
)
def test_wrong_seeds(make, seed, error, text):
    with pytest.raises(error, match=f"rounding_seed must be {text}|{text}"):
        make([parameter(torch.ones(2))], rounding_seed=seed)


def test_skipped_steps_draw_nothing(make):
    """An overflow leaves the count, by which the next step draws, on whatever rank it was found."""
    results = []
    for skips in (False, True):
        params = start()
        optimizer = make(params, max_norm=1e9)
        if skips:
            for p in params:
                p.grad = torch.full_like(p, torch.inf)
            optimizer.step()
        train(params, optimizer)
        results.append([p.detach() for p in params])
    assert_equal(*results)


def test_compiled(make):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = [parameter(torch.linspace(-1, 1, 50).bfloat16()) for _ in range(2)]
        optimizer = make(params)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for n in range(4):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * (n + i))
            step()
        results.append(all_tensors(params, optimizer))
    assert_equal(*results)
