"""Pretraining against a loop and a decoder written by hand, and against principal components."""

import copy
import itertools
import math

import pytest
import torch
from helpers import has_state, state_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastreg as fr

INF, NAN = math.inf, math.nan


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def encoder_of(*widths):
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers)


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


# ---------------------------------------------------------------------------------------------- what it
# computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# One sample; a last batch that is smaller; one batch of all; a batch that is never full.
@pytest.mark.parametrize("size, batch_size", [(1, 1), (7, 3), (20, 20), (20, 64)])
def test_training_is_the_loop_written_by_hand(dtype, size, batch_size):
    x = torch.randn(size, 6, dtype=dtype)
    encoder = encoder_of(6, 5, 3).to(dtype)
    (w1, b1, w2, b2) = (p.detach().clone().requires_grad_() for p in encoder.parameters())
    c2, c1 = torch.zeros(5, dtype=dtype, requires_grad=True), torch.zeros(6, dtype=dtype, requires_grad=True)
    returned, history = fr.pretrain_autoencoder(
        encoder,
        x,
        epochs=3,
        batch_size=batch_size,
        corruption=0,
        generator=seeded(5),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    expected = []
    generator = seeded(int(torch.randint(2**62, (), generator=seeded(5))))
    for _ in range(3):
        total = 0.0
        for batch in torch.randperm(size, generator=generator).split(batch_size):
            code = torch.tanh(torch.tanh(x[batch] @ w1.T + b1) @ w2.T + b2)
            loss = ((torch.tanh(code @ w2 + c2) @ w1 + c1 - x[batch]) ** 2).mean()
            grads = torch.autograd.grad(loss, (w1, b1, w2, b2, c1, c2))
            with torch.no_grad():
                for p, g in zip((w1, b1, w2, b2, c1, c2), grads, strict=True):
                    p -= 0.5 * g
            total += loss.item() * len(batch)
        expected.append(total / size)
    assert returned is encoder
    assert history == pytest.approx(expected, rel=1e-5)
    for p, want in zip(encoder.parameters(), (w1, b1, w2, b2), strict=True):
        torch.testing.assert_close(p.detach(), want.detach())


def test_a_linear_autoencoder_finds_the_principal_components():
    x = torch.randn(60, 5, dtype=torch.float64) @ torch.diag(
        torch.tensor([3.0, 2.0, 1.0, 0.5, 0.3], dtype=torch.float64)
    )
    x = (x - x.mean(0)) @ torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    residual = torch.linalg.svdvals(x)[2:].square().sum() / x.numel()  # what two components cannot say
    encoder = nn.Sequential(nn.Linear(5, 2)).double()
    _, history = fr.pretrain_autoencoder(
        encoder,
        x,
        epochs=400,
        corruption=0,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        generator=seeded(0),
    )
    assert history[-1] == pytest.approx(residual.item(), rel=1e-3)
    weight = encoder[0].weight.detach()
    plane = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    torch.testing.assert_close(weight @ plane.T @ plane, weight, atol=0.02, rtol=0)


def test_the_input_is_corrupted_and_the_target_is_not():
    seen, targets = [], []

    class Encoder(nn.Linear):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    def loss(reconstruction, x):
        targets.append(x)
        return (reconstruction - x).square().mean()

    x = torch.ones(50, 40)
    fr.pretrain_autoencoder(
        Encoder(40, 3),
        x,
        nn.Linear(3, 40),
        epochs=1,
        batch_size=50,
        corruption=0.75,
        loss=loss,
        generator=seeded(1),
    )
    assert set(seen[0].unique().tolist()) == {0.0, 4.0}
    assert 0.2 < (seen[0] == 4).double().mean() < 0.3
    assert torch.equal(targets[0], x)


def test_the_mean_is_taken_of_a_loss_with_several_values():
    start, x = encoder_of(6, 5, 3), torch.randn(20, 6)

    def train(loss):
        return fr.pretrain_autoencoder(
            copy.deepcopy(start), x, epochs=2, batch_size=7, loss=loss, generator=seeded(3)
        )

    encoder, history = train(None)
    for each in (
        lambda z, x: (z - x).square().mean(1),  # (B,)
        lambda z, x: (z - x).square(),  # (B, elements)
    ):
        other, losses = train(each)
        assert losses == pytest.approx(history, rel=1e-5)
        for p, want in zip(other.parameters(), encoder.parameters(), strict=True):
            torch.testing.assert_close(p, want)
    with pytest.raises(ValueError, match=r"pretrain_autoencoder: loss must give one number or .*\(7, ...\)"):
        train(lambda z, x: (z - x).square().mean(0))
    with pytest.raises(TypeError, match="pretrain_autoencoder: loss must give a tensor, got float"):
        train(lambda z, x: (z - x).square().mean().item())


@pytest.mark.parametrize(
    "kind", ["tensor", "dataset", "labelled dataset", "loader", "stream", "list of batches in a loader"]
)
def test_kinds_of_data(kind):
    x, y = torch.randn(20, 1, 2, 3), torch.arange(20)
    seen = []
    data = {
        "tensor": x,
        "dataset": TensorDataset(x),
        "labelled dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=6),
        "stream": Stream(x),
        "list of batches in a loader": DataLoader([(x[:10], y[:10]), (x[10:], y[10:])], batch_size=None),
    }[kind]

    def loss(reconstruction, x):
        seen.append(x)
        return (reconstruction - x).square().mean()

    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU())
    _, history = fr.pretrain_autoencoder(
        encoder, data, epochs=2, batch_size=6, loss=loss, generator=seeded(0)
    )
    sizes = [10, 10] if kind.startswith("list") else [6, 6, 6, 2]
    assert [len(s) for s in seen] == 2 * sizes and len(history) == 2
    for epoch in (seen[: len(sizes)], seen[len(sizes) :]):  # each sample once in each epoch
        rows = torch.cat(epoch)
        assert torch.equal(rows[rows[:, 0].argsort()], x.flatten(1)[x.flatten(1)[:, 0].argsort()])
    if kind in ("tensor", "dataset"):
        assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))


def test_convolutions_take_a_decoder_of_their_own():
    encoder = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    decoder = nn.Linear(3 * 16, 16)
    before = state_of(decoder)
    _, history = fr.pretrain_autoencoder(
        encoder, torch.randn(30, 1, 4, 4), decoder, epochs=5, generator=seeded(0)
    )
    assert history[-1] < history[0] and not has_state(decoder, before)
    assert encoder[1].num_batches_tracked == 5


def test_optimiser_of_the_user_and_frozen_layers():
    encoder = encoder_of(6, 5, 3)
    encoder[0].requires_grad_(False)
    given, before = [], state_of(encoder)

    def optimizer(parameters):
        given.extend(parameters)
        return fr.optim.SGD(given, lr=0.1, momentum=0.9)

    fr.pretrain_autoencoder(encoder, torch.randn(20, 6), optimizer=optimizer, epochs=2, generator=seeded(0))
    assert len(given) == len(set(given)) == 4  # the second layer, and two biases of the decoder
    assert torch.equal(encoder[0].weight, before["0.weight"]) and not torch.equal(
        encoder[2].weight, before["2.weight"]
    )


# ---------------------------------------------------------------------------------------------- what it
# leaves alone


@pytest.mark.parametrize("random", ["generator", "neither"])
def test_generators_modes_and_gradients_stay(random):
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.1)))
    encoder[2].eval()
    encoder[0].weight.grad = gradient = torch.ones(5, 6)
    modes = [module.training for module in encoder.modules()]
    options = {"generator": dict(generator=seeded(3)), "neither": {}}[random]
    state, before = torch.get_rng_state(), state_of(encoder)
    with torch.no_grad():
        fr.pretrain_autoencoder(
            encoder, TensorDataset(torch.randn(20, 6, generator=torch.Generator())), epochs=2, **options
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in encoder.modules()] == modes
    assert encoder[0].weight.grad is gradient and gradient.eq(1).all() and encoder[2][0].weight.grad is None
    assert not torch.equal(encoder[0].weight, before["0.weight"]) and encoder[0].weight.requires_grad


@pytest.mark.parametrize("corruption", [0.0, 0.5])
def test_in_inference_mode(corruption):
    encoder = nn.Linear(6, 3)
    with torch.inference_mode():
        _, history = fr.pretrain_autoencoder(
            encoder, torch.randn(20, 6), epochs=40, corruption=corruption, generator=seeded(0)
        )
    assert history[-1] < history[0]


def test_generators_in_the_same_state_give_the_same_encoder():
    x, start = torch.randn(30, 6), nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU())

    def train(world=0, **options):
        torch.manual_seed(world)
        encoder = copy.deepcopy(start)
        fr.pretrain_autoencoder(encoder, x, epochs=2, batch_size=7, **options)
        return encoder[0].weight

    one, other = train(0, generator=seeded(1)), train(5, generator=seeded(1))
    assert torch.equal(one, other) and not torch.equal(one, train(generator=seeded(2)))
    assert torch.equal(train(0), train(0)) and not torch.equal(train(0), train(1))
    generator = seeded(1)
    one, other = (train(generator=generator) for _ in range(2))
    assert not torch.equal(one, other)  # the generator has moved on


@pytest.mark.parametrize("what", ["nan in the data", "divergence", "interrupted"])
def test_failed_training_leaves_the_encoder_as_it_was(what):
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    decoder, x = nn.Linear(5, 6), torch.randn(30, 6)
    before, mode = (state_of(encoder), state_of(decoder)), encoder.eval().training
    options, error, words = {}, ValueError, "the loss is nan in epoch 0; look for NaN"
    if what == "nan in the data":
        x[11, 2] = NAN
    elif what == "divergence":
        options, words = (
            dict(optimizer=lambda p: torch.optim.SGD(p, lr=1e30), epochs=5),
            "the loss is (nan|inf) in epoch",
        )
    else:
        calls, error, words = [], KeyboardInterrupt, None

        def loss(reconstruction, x):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return (reconstruction - x).square().mean()

        options = dict(loss=loss)
    with pytest.raises(error, match=words):
        fr.pretrain_autoencoder(encoder, x, decoder, batch_size=10, **options)
    assert has_state(encoder, before[0]) and has_state(decoder, before[1]) and encoder.training == mode


# ---------------------------------------------------------------------------------------------- the tied
# decoder


def test_the_tied_decoder_mirrors_the_encoder():
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Sequential(nn.Linear(12, 7), nn.Tanh()),
        fr.nn.Dropout(0.2),
        nn.Linear(7, 3),
        nn.ReLU(),
    ).double()
    decoder = fr.TiedDecoder(encoder)
    with torch.no_grad():
        for bias in decoder.biases:
            bias.normal_()
    code = torch.randn(4, 3, dtype=torch.float64)
    c2, c1 = decoder.biases
    want = torch.tanh(code @ encoder[4].weight + c2) @ encoder[2][0].weight + c1
    torch.testing.assert_close(decoder(code), want)
    assert len({*encoder.parameters(), *decoder.parameters()}) == 4 + 2
    assert [tuple(b.shape) for b in decoder.biases] == [(7,), (12,)]


@pytest.mark.parametrize(
    "encoder, words",
    [
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "got BatchNorm1d at '1'"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3))), "got Conv2d at '0.0'"),
        (nn.Sequential(nn.Linear(4, 3), nn.PReLU()), "got PReLU"),
        (nn.GRU(3, 4), "got GRU at 'the top'"),
        (nn.Sequential(nn.ReLU()), "an encoder with Linear layers, got none"),
    ],
)
def test_encoders_without_a_mirror(encoder, words):
    with pytest.raises(ValueError, match=f"TiedDecoder: .*{words}.*decoder of your own"):
        fr.pretrain_autoencoder(encoder, torch.randn(3, 4))


# ---------------------------------------------------------------------------------------------- errors

X = torch.zeros(8, 4)


@pytest.mark.parametrize(
    "error, words, arguments",
    [
        (TypeError, "encoder must be a torch.nn.Module, got function", dict(encoder=lambda x: x)),
        (TypeError, "decoder must be a torch.nn.Module, got str", dict(decoder="tied")),
        (TypeError, "data must be a tensor, a Dataset or a DataLoader, got list", dict(data=[X])),
        (TypeError, "data must be floating-point tensors.*got torch.uint8", dict(data=X.byte())),
        (TypeError, "data must be floating-point tensors.*got str", dict(data=DataLoader(["a"]))),
        (ValueError, r"at least one sample.*got \(0, 4\)", dict(data=torch.zeros(0, 4))),
        (ValueError, r"at least one sample.*got \(4,\)", dict(data=torch.zeros(4))),
        (ValueError, "at least one sample", dict(data=TensorDataset(torch.zeros(0, 4)))),
        (ValueError, "there are no data in epoch 0", dict(data=Stream([]))),
        (ValueError, r"needs the elements of x, \(8, 4\), got \(8, 5\)", dict(decoder=nn.Linear(2, 5))),
        (TypeError, "epochs must be an int, got float", dict(epochs=1.5)),
        (ValueError, "epochs must be .* got 0", dict(epochs=0)),
        (ValueError, "batch_size must be .* got 0", dict(batch_size=0)),
        (TypeError, "batch_size must be an int, got bool", dict(batch_size=True)),
        (ValueError, r"corruption must be in \[0, 1\], got 1.5", dict(corruption=1.5)),
        (ValueError, "corruption must be .* got nan", dict(corruption=NAN)),
    ],
)
def test_errors_say_what_was_expected(error, words, arguments):
    encoder = nn.Linear(4, 2)
    before = state_of(encoder)
    with pytest.raises(error, match=f"pretrain_autoencoder: .*{words}"):
        fr.pretrain_autoencoder(**{"encoder": encoder, "data": X, **arguments})
    assert has_state(encoder, before)


def test_lazy_layers():
    with pytest.raises(ValueError, match="a lazy layer has no shape yet; run encoder"):
        fr.pretrain_autoencoder(nn.LazyLinear(2), X)


def test_nothing_to_train():
    encoder = nn.Sequential(nn.Linear(4, 2)).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fr.pretrain_autoencoder(encoder, X, nn.Linear(2, 4).requires_grad_(False))
