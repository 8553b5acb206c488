"""Parameter sharing, Goodfellow et al. 2016, section 7.9: one detector at every place of the image, or one
per place.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

import fastreg as fr

from ..claims import changed, judged
from ..figures import WEIGHTS, C, draw, error_bars
from ..results import Results
from ..section import Figure, Lab, Section
from ..train import LR, MOMENTUM, Centre, batches, evaluate

FILTERS = 24
VARIANTS = (("sharing_own", "Own weights", "grey"), ("sharing_shared", "Shared weights", "umber"))


class Places(nn.Module):
    """A linear layer with ReLU on each of the overlapping patches of the image, then a linear classifier."""

    def __init__(self, data, share):
        super().__init__()
        shape = data.picture_shape
        self.height, self.width, self.channels = (*shape, 1)[:3]
        self.kernel = [max(1, round(0.3 * side)) for side in (self.height, self.width)]
        self.stride = [max(1, side // 2) for side in self.kernel]
        self.centre = Centre(data.x_train)
        with torch.no_grad():
            patches = self.patches(data.x_train[:1])
        self.layers = nn.ModuleList(nn.Linear(patches.shape[2], FILTERS) for _ in range(patches.shape[1]))
        self.head = nn.Linear(patches.shape[1] * FILTERS, len(data.classes))
        if share and len(self.layers) > 1:
            fr.share_parameters(*self.layers)

    def patches(self, x):
        """[B, places, pixels of a patch]"""
        x = self.centre(x).view(len(x), self.height, self.width, self.channels).movedim(3, 1)
        return F.unfold(x, self.kernel, stride=self.stride).transpose(1, 2)

    def forward(self, x):
        found = [
            layer(patch).relu() for layer, patch in zip(self.layers, self.patches(x).unbind(1), strict=True)
        ]
        return self.head(torch.cat(found, 1))


def measure(lab: Lab) -> Iterator[dict]:
    data = lab.data
    for variant, _, _ in VARIANTS:
        torch.manual_seed(lab.seed)
        model = Places(data, share=variant == "sharing_shared")
        optimizer = fr.optim.SGD(model.parameters(), lr=LR / 5, momentum=MOMENTUM)
        for batch in batches(len(data.x_train), lab.epochs):
            optimizer.zero_grad()
            fr.cross_entropy(model.train()(data.x_train[batch]), data.y_train[batch]).backward()
            optimizer.step()
        lab.keep("parameter-sharing", **{variant: model})
        measured = evaluate(model, data, "train") | evaluate(model, data, "test")
        yield {
            "variant": variant,
            "side": "fastreg",
            "seed": lab.seed,
            **measured,
            "gap_loss": measured["test_loss"] - measured["train_loss"],
            "detector_weights": sum(p.numel() for p in model.layers.parameters()),
        }


def fewer(found: Results) -> tuple[bool, str]:
    own, shared = (found.mean(variant, "detector_weights") for variant, _, _ in VARIANTS)
    return shared < own, f"{own:,.0f} weights and biases in the detectors, {shared:,.0f} when they are shared"


def detectors(found: Results) -> str:
    """The strongest detectors of two places, and those that all places share."""
    models = found.keep("parameter-sharing")
    own, shared = (models[variant] for variant, _, _ in VARIANTS)
    if own.height == 1:
        return ""
    middle = len(own.layers) // 2
    rows = [
        ("own, top left", "grey", own.layers[0]),
        ("own, in the middle", "grey", own.layers[middle]),
        ("shared by all", "umber", shared.layers[0]),
    ]

    def paint(axes) -> None:
        for each, (title, hue, layer) in zip(axes, rows, strict=True):
            w = layer.weight.detach()
            w = w[w.norm(dim=1).argsort(descending=True)[:8]]
            w = w.view(len(w), own.channels, *own.kernel).mean(1)
            w = F.pad(w / w.abs().max().clamp_min(1e-12), (1, 1, 1, 1), value=float("nan"))
            each.imshow(torch.cat(list(w), 1).numpy(), cmap=WEIGHTS, vmin=-1, vmax=1, interpolation="none")
            each.set_title(title, color=C[hue])
            each.set_axis_off()

    return draw(paint, 3.0, nrows=3)


SECTION = Section(
    key="parameter-sharing",
    order=110,
    title="Parameter sharing",
    colour="umber",
    formulas=(r"w^{(1)} = w^{(2)} = \ldots = w", r"\nabla_{\!w}J = \sum_i\,\nabla_{\!w^{(i)}}J"),
    text=f"<p>{FILTERS} detectors look at overlapping patches of the image. Each place may have detectors "
    "of its own, or all places hold one and the same tensor, as a convolution does: what is learnt at one "
    "place is known at all, and far fewer weights must be learnt. The gradient of the shared weights is the "
    "sum over the places; a penalty counts them once.</p>",
    measure=measure,
    variants=VARIANTS,
    plain=False,
    columns=("test_error", "test_loss", "gap_loss", "detector_weights"),
    measures={"detector_weights": ("weights of detectors", "", ",.0f")},
    claims=(
        judged("Shared weights are fewer", fewer),
        changed("Sharing lowers the test error", "sharing_shared", "sharing_own", "test_error", -1),
    ),
    figures=(
        Figure(
            error_bars(*VARIANTS),
            "Test error with own and with shared weights",
            "Mean over the seeds; a tick per seed.",
        ),
        Figure(
            detectors,
            "Weights of eight detectors at two places, and of those shared by all",
            "The eight strongest detectors, first seed: positive weights in rust, negative in blue.",
        ),
    ),
)
