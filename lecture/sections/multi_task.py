"""Multi-task learning on a shared trunk, Goodfellow et al. 2016, section 7.7."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastreg as fr

from ..claims import no_worse
from ..data import Data
from ..figures import INK, C, draw
from ..results import Results
from ..section import Figure, Lab, Section
from ..train import HIDDEN, Centre, epoch_batches

LR, WEIGHTS_LR = 2e-3, 1e-2
TASKS = {"digit": "classification", "parity": "classification", "ink": "regression"}
HUES = {"digit": "pine", "parity": "rose", "ink": "ochre"}
NAMES = {"digit": "class", "parity": "parity", "ink": "ink"}
VARIANTS = (
    ("tasks_alone", "A network per task", "grey"),
    ("tasks_fixed", "Shared trunk, equal weights", "blue"),
    ("tasks_learnt", "Shared trunk, learnt weights", "indigo"),
)


class Network(nn.Module):
    """A trunk that all tasks share, and a head for each."""

    def __init__(self, data, tasks):
        super().__init__()
        first, second = HIDDEN
        outputs = {"digit": len(data.classes), "parity": 2, "ink": 1}
        self.trunk = nn.Sequential(
            Centre(data.x_train),
            nn.Linear(data.x_train.shape[1], first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(second, outputs[task]) for task in tasks})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


def targets(data: Data, part: str) -> tuple[Tensor, Tensor, Tensor]:
    """Class, parity of the class's number, and mean of the pixels, standardised by the training images."""
    x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
    ink, train = x.mean(1), data.x_train.mean(1)
    return {"digit": y, "parity": y % 2, "ink": (ink - train.mean()) / train.std().clamp_min(1e-6)}


def losses(outputs, wanted):
    return {
        task: F.mse_loss(output[:, 0], wanted[task])
        if task == "ink"
        else fr.cross_entropy(output, wanted[task])
        for task, output in outputs.items()
    }


def fit(lab, weights):
    """A network for the tasks that have a weight; with the weights after every epoch."""
    data, wanted = lab.data, targets(lab.data, "train")
    torch.manual_seed(lab.seed)
    model, total = Network(data, weights), fr.MultiTaskLoss(weights)
    groups = [{"params": model.parameters()}, {"params": total.parameters(), "lr": WEIGHTS_LR}]
    optimizer = torch.optim.Adam(groups, lr=LR)  # its steps do not grow with the weights, as those of SGD do
    history = []
    for _ in range(lab.epochs):
        for batch in epoch_batches(len(data.x_train)):
            loss = total(losses(model(data.x_train[batch]), {task: t[batch] for task, t in wanted.items()}))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(total.weights())
    return model, history


@torch.no_grad()
def errors(model, data):
    """Error of the classifications in percent, and of the regression in percent of the target's variance."""
    wanted, found = targets(data, "test"), {}
    for task, output in model.eval()(data.x_test).items():
        if task == "ink":
            found["ink_error"] = (
                100
                * F.mse_loss(output[:, 0], wanted["ink"]).item()
                / wanted["ink"].var().clamp_min(1e-12).item()
            )
        else:
            wrong = 100 * (output.argmax(1) != wanted[task]).double().mean().item()
            found["test_error" if task == "digit" else "parity_error"] = wrong
    return found


def measure(lab: Lab) -> Iterator[dict]:
    learnt, history = fit(lab, TASKS)
    lab.keep("multi-task", weights=history)
    networks = {
        "tasks_alone": [fit(lab, {task: 1.0})[0] for task in TASKS],
        "tasks_fixed": [fit(lab, dict.fromkeys(TASKS, 1.0))[0]],
        "tasks_learnt": [learnt],
    }
    for variant, models in networks.items():
        measured = {key: value for model in models for key, value in errors(model, lab.data).items()}
        size = sum(p.numel() for model in models for p in model.parameters())
        yield {
            "variant": variant,
            "side": "fastreg",
            "seed": lab.seed,
            **measured,
            "thousand_weights": size / 1000,
        }


def learnt_weights(found: Results) -> str:
    history = found.keep("multi-task")["weights"]

    def paint(axes) -> None:
        epochs = range(1, len(history) + 1)
        for task, hue in HUES.items():
            axes.plot(epochs, [weights[task] for weights in history], color=C[hue], label=NAMES[task])
        axes.axhline(1, color=C["sand"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(1, max(2, len(history)))
        axes.set_xlabel("epoch")
        axes.set_ylabel("weight of the task")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.4)

    return draw(paint)


def compared(found: Results) -> str:
    keys = ("test_error", "parity_error", "ink_error")

    def paint(axes) -> None:
        for i, (variant, title, hue) in enumerate(VARIANTS):
            values = [found.mean(variant, key) for key in keys]
            places = [j + 0.27 * (i - 1) for j in range(3)]
            axes.bar(places, values, 0.24, color=C[hue], alpha=0.85, label=title)
            for x, value in zip(places, values, strict=True):
                axes.annotate(
                    f"{value:.1f}",
                    (x, value),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=INK,
                )
        axes.set_xticks(range(3), ["class", "parity", "ink"], color=INK)
        axes.grid(False, axis="x")
        axes.set_ylabel("error [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=1, borderaxespad=0.2)

    return draw(paint, 3.5)


SECTION = Section(
    key="multi-task",
    order=100,
    title="Multi-task learning",
    colour="indigo",
    formulas=(
        r"J = \sum_t\,J_t/\sigma_t^2 + \log(1 + \sigma_t^2)",
        r"\mathrm{regression:}\ J_t/(2\sigma_t^2)",
    ),
    text="<p>Three tasks on the same images: their class, whether the number of the class is odd, and how "
    "much ink there is (the mean of the pixels, a regression). One trunk serves all of them, with a head "
    "for each, so that what one task finds is there for the others, and the trunk must suit them all. The "
    "weights of the tasks are equal, or learnt with them: σ² is the noise that the network grants a task, "
    "and the logarithm keeps it from granting ever more. The learnt weights are divided by their mean, so "
    "that the losses move the weights of the network and not its learning rate.</p>",
    measure=measure,
    variants=VARIANTS,
    plain=False,
    columns=("test_error", "parity_error", "ink_error", "thousand_weights"),
    measures={
        "parity_error": ("parity error", "%", ".2f"),
        "ink_error": ("ink, of variance", "%", ".2f"),
        "thousand_weights": ("weights", "thousand", ",.0f"),
    },
    claims=(
        no_worse(
            "One trunk for three tasks reads the class no worse than a network of its own",
            "tasks_fixed",
            "tasks_alone",
        ),
        no_worse("So does one trunk with learnt weights of the tasks", "tasks_learnt", "tasks_alone"),
    ),
    figures=(
        Figure(
            compared,
            "Errors of the three tasks, alone and with a shared trunk",
            "Mean over the seeds; for ink the mean squared error in percent of the variance.",
        ),
        Figure(
            learnt_weights,
            "Learnt weights of the three tasks against the epoch",
            "The factor of each task’s loss, first seed: it grows where the loss falls most.",
        ),
    ),
)
