"""One network, trained with every method twice: in plain PyTorch (`Torch`) and with fastreg (`Fastreg`).

The two classes hold the same functions. Reading them side by side shows what a user changes in a training
script to switch; everything below them is common to both. Both start from the same weights, see the same
batches and train epoch by epoch in turn, so that whatever else the machine is doing slows both alike.
"""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import fastreg as fr

from .data import Data

LR, MOMENTUM = 0.1, 0.9
ADAMW_LR = 1e-3
HIDDEN = (256, 128)
BATCH = 100
CLIP = 3.0  # norm of the gradient; the digits never reach it, dropout on 20 examples diverges without it
FEWEST_STEPS = 10  # of an epoch: few examples are passed several times in one
LENGTH = 9.0  # of an average input of the first layer
EPS = 0.1  # of the attack, in units of the pixel range [0, 1]
BINS = 10  # of the reliability diagram
POLICY = {  # transformations that do not change the class of a digit
    "rotate": (-15, 15),
    "shear": (-10, 10),
    "stretch": (0.8, 1.2),
    "translate": (0.04, 0.04),
}
SETTINGS = {
    "lr": LR,
    "momentum": MOMENTUM,
    "adamw_lr": ADAMW_LR,
    "hidden": HIDDEN,
    "batch": BATCH,
    "clip": CLIP,
    "attack_eps": EPS,
    "augmentation": POLICY,
}


@dataclass(frozen=True)
class Recipe:
    """One training: which methods are on, and how strongly. Each is strong enough to show on the digits."""

    key: str
    title: str
    colour: str = "grey"  # in every picture
    l2: float = 0.0
    l1: float = 0.0
    dropout: float = 0.0  # of the hidden units; 0.4 times as much of the inputs
    rescale: str = "train"  # "inference": dropout in the textbook form
    smoothing: float = 0.0
    convention: str = "uniform"  # "others": no smoothing mass on the class itself
    augment: bool = False  # whether every step sees the images transformed anew, by POLICY
    eps: float = 0.0  # of the adversarial examples in the loss
    patience: int = 0
    adamw: bool = False  # in place of SGD; l2 is then the decay beside the gradient
    ema: float = 0.0  # decay of a moving average of the weights, which is what is measured


PLAIN = Recipe("none", "No regularisation")


class Torch:
    """The methods in plain PyTorch, as one writes them by hand."""

    name = "torch"

    @staticmethod
    def dropout(p, rescale="train"):
        return nn.Dropout(p) if rescale == "train" else TextbookDropout(p)

    @staticmethod
    def optimizer(model, recipe):
        weights = [p for p in model.parameters() if p.ndim > 1]
        biases = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": weights, "weight_decay": recipe.l2, "l1": recipe.l1, "ema": recipe.ema},
            {"params": biases, "weight_decay": 0.0, "l1": 0.0, "ema": recipe.ema},
        ]
        if recipe.adamw:
            return torch.optim.AdamW(groups, lr=ADAMW_LR)
        return torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)

    @staticmethod
    @torch.no_grad()
    def step(optimizer):
        optimizer.step()
        for group in optimizer.param_groups:
            for w in group["params"]:
                state = optimizer.state[w]
                if group["l1"]:  # the proximal step: weights smaller than lr * l1 become 0
                    threshold = group["lr"] * group["l1"]
                    if "betas" in group:  # in the metric of AdamW's step
                        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
                        threshold = threshold / (v.sqrt() + group["eps"])
                    w.copy_(w.sign() * (w.abs() - threshold).clamp(min=0))
                if group["ema"]:
                    average = state.setdefault("ema", w.clone())
                    average.lerp_(w, 1 - group["ema"])

    @staticmethod
    @contextlib.contextmanager
    def averaged(optimizer):
        params = [w for group in optimizer.param_groups for w in group["params"]]
        kept = [w.detach().clone() for w in params]
        with torch.no_grad():
            for w in params:
                w.copy_(optimizer.state[w]["ema"])
        yield
        with torch.no_grad():
            for w, before in zip(params, kept, strict=True):
                w.copy_(before)

    @staticmethod
    def smoothed(logits, y, recipe):
        if recipe.convention == "uniform":
            return F.cross_entropy(logits, y, label_smoothing=recipe.smoothing)
        k = logits.shape[1]
        q = torch.full_like(logits, recipe.smoothing / (k - 1))
        return F.cross_entropy(logits, q.scatter(1, y[:, None], 1 - recipe.smoothing))

    @staticmethod
    def loss(model, x, y, recipe):
        clean = Torch.smoothed(model(x), y, recipe)
        if not recipe.eps:
            return clean
        x_adv = Torch.attack(model, x, y, recipe.eps, recipe.smoothing)
        return 0.5 * clean + 0.5 * Torch.smoothed(model(x_adv), y, recipe)

    @staticmethod
    def attack(model, x, y, eps, smoothing=0.0):
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y, label_smoothing=smoothing), x)
        return (x + eps * grad.sign()).clamp(0, 1).detach()

    class augmentation:
        def __init__(self, rotate, shear, stretch, translate):
            self.rotate, self.shear, self.stretch, self.translate = rotate, shear, stretch, translate

        def __call__(self, images):
            batch, _, height, width = images.shape
            half = torch.tensor([width, height]) / 2
            shift = [
                (side * draw(batch, -t, t)).round()
                for side, t in zip((width, height), self.translate, strict=True)
            ]
            turn, slant = draw(batch, *self.rotate).deg2rad(), draw(batch, *self.shear).deg2rad().tan()
            cos, sin, factor = turn.cos(), turn.sin(), draw(batch, *self.stretch)
            there = torch.stack(
                [cos, -(cos * slant + sin) * factor, sin, (cos - sin * slant) * factor], 1
            ).view(-1, 2, 2)
            back = torch.linalg.inv(there)  # from a pixel of the result to its place in the image
            theta = torch.cat([back * half, -back @ torch.stack(shift, 1)[..., None]], 2) / half[:, None]
            grid = F.affine_grid(theta, images.shape, align_corners=False)
            return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    class early_stopping:
        def __init__(self, model, patience):
            self.model, self.patience, self.epoch = model, patience, -1
            self.best, self.best_epoch = float("inf"), -1

        def step(self, error):
            self.epoch += 1
            if error < self.best:
                self.best, self.best_epoch = error, self.epoch
                self.state = copy.deepcopy(self.model.state_dict())
            return self.epoch - self.best_epoch >= self.patience

        def restore(self):
            self.model.load_state_dict(self.state)


def draw(count, low, high):
    return torch.empty(count).uniform_(low, high)


class TextbookDropout(nn.Module):
    """Training zeroes, evaluation scales."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return x * (torch.rand_like(x) >= self.p) if self.training else x * (1 - self.p)


class Fastreg:
    """The same methods with fastreg."""

    name = "fastreg"

    @staticmethod
    def dropout(p, rescale="train"):
        return fr.nn.Dropout(p, rescale=rescale)

    @staticmethod
    def optimizer(model, recipe):
        groups = fr.optim.penalty_groups(model, l1=recipe.l1, l2=recipe.l2)
        ema = recipe.ema or None
        if recipe.adamw:
            return fr.optim.AdamW(groups, lr=ADAMW_LR, ema=ema)
        return fr.optim.SGD(groups, lr=LR, momentum=MOMENTUM, l1_mode="proximal", ema=ema)

    @staticmethod
    def step(optimizer):
        optimizer.step()

    @staticmethod
    def averaged(optimizer):
        return optimizer.averaged()

    @staticmethod
    def smoothed(logits, y, recipe):
        return fr.cross_entropy(logits, y, label_smoothing=recipe.smoothing, smoothing=recipe.convention)

    @staticmethod
    def loss(model, x, y, recipe):
        def loss(logits, y):
            return Fastreg.smoothed(logits, y, recipe)

        if not recipe.eps:
            return loss(model(x), y)
        return fr.adversarial_loss(model, x, y, recipe.eps, weight=0.5, loss=loss)

    @staticmethod
    def attack(model, x, y, eps):
        return fr.fgsm(model, x, y, eps, bounds=(0.0, 1.0))

    @staticmethod
    def augmentation(**policy):
        return fr.augment.Augment(**policy, padding="border")

    @staticmethod
    def early_stopping(model, patience):
        return fr.EarlyStopping(model, patience=patience)


class Centre(nn.Module):
    """Subtract the average grey of the training images and scale the rest to an average square of LENGTH², so
    that one learning rate suits dark digits and bright photographs alike. This layer is a part of the
    network, so that attacks see pixels in [0, 1].
    """

    def __init__(self, x_train: torch.Tensor):
        super().__init__()
        mean = x_train.mean()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", LENGTH / (x_train - mean).square().sum(1).mean().sqrt().clamp_min(1e-6))

    def forward(self, x):
        return (x - self.mean) * self.scale


def network(side, recipe: Recipe, data: Data) -> nn.Sequential:
    """A perceptron with two hidden layers. Dropout that drops nothing is left out, so that the weights have
    the same names in every network.
    """

    def dropout(p):
        return side.dropout(p, recipe.rescale) if p else nn.Identity()

    first, second = HIDDEN
    model = nn.Sequential(
        Centre(data.x_train),
        dropout(0.4 * recipe.dropout),
        nn.Linear(data.x_train.shape[1], first),
        nn.ReLU(),
        dropout(recipe.dropout),
        nn.Linear(first, second),
        nn.ReLU(),
        dropout(recipe.dropout),
        nn.Linear(second, len(data.classes)),
    )
    if recipe.rescale == "inference":  # its units are smaller by 1 - p; larger weights make up for it
        with torch.no_grad():
            for drop, layer in zip(model[1::3], model[2::3], strict=True):
                layer.weight /= 1 - getattr(drop, "p", 0.0)
    return model


@dataclass
class Run:
    """One training of one network: the model, what was measured, and what the pictures need."""

    side: type
    recipe: Recipe
    seed: int
    data: Data
    model: nn.Module
    curves: dict[str, list[float]] = field(default_factory=dict)
    epoch_ms: list[float] = field(default_factory=list)
    stop_epoch: int | None = None  # the epochs count from 0 here and from 1 in the report
    best_epoch: int | None = None
    measured: dict = field(default_factory=dict)

    def __post_init__(self):
        self.optimizer = self.side.optimizer(self.model, self.recipe)
        self.augment = self.side.augmentation(**POLICY) if self.recipe.augment else None
        self.stopper = None
        if self.recipe.patience:
            self.stopper = self.side.early_stopping(self.model, patience=self.recipe.patience)

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended this training."""
        return self.stop_epoch is not None

    def epoch(self, batches: list[torch.Tensor]) -> None:
        """Train on every batch once (timed), then measure both curves (not timed) and ask whether to stop."""
        data = self.data
        self.model.train()
        start = time.perf_counter()
        for batch in batches:
            x, y = data.x_train[batch], data.y_train[batch]
            if self.augment is not None:
                x = augmented(x, data, self.augment)
            descend(self.side, self.model, self.optimizer, self.side.loss(self.model, x, y, self.recipe))
        self.epoch_ms.append(1e3 * (time.perf_counter() - start))
        with self.weights():
            for part in ("train", "validation"):
                for key, value in evaluate(self.model, data, part).items():
                    self.curves.setdefault(key, []).append(value)
            if self.stopper is not None and self.stopper.step(self.curves["validation_error"][-1]):
                self.stop_epoch = len(self.epoch_ms) - 1

    def weights(self):
        """Within it the model has the weights that are measured: their averages, if there are any."""
        return self.side.averaged(self.optimizer) if self.recipe.ema else contextlib.nullcontext()

    def finish(self) -> None:
        """Restore the best epoch if early stopping is on, then measure what the table shows, once, on test
        data.
        """
        if self.stopper is not None:
            self.stopper.restore()
            self.best_epoch = self.stopper.best_epoch
            self.measure()
        else:
            with self.weights():
                self.measure()
        self.optimizer = self.stopper = None  # the pictures need the run, but not these, which hold memory

    def measure(self) -> None:
        """What the table shows."""
        measured = self.measured
        for part in ("train", "validation", "test"):
            measured |= evaluate(self.model, self.data, part)
        with torch.no_grad():
            logits = self.model(self.data.x_test)
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters() if p.ndim > 1])
        count, accuracy, confidence = fr.calibration_curve(logits, self.data.y_test, bins=BINS)
        measured |= {
            "gap_error": measured["test_error"] - measured["train_error"],
            "gap_loss": measured["test_loss"] - measured["train_loss"],
            "zero_weights": 100 * (weights == 0).double().mean().item(),
            "weight_size": weights[weights != 0].abs().double().mean().item(),
            "attacked_accuracy": attacked_accuracy(self.side, self.model, self.data),
            "confidence": 100 * logits.softmax(1).amax(1).double().mean().item(),
            "calibration_error": 100 * fr.calibration_error(logits, self.data.y_test, bins=BINS).item(),
            "reliability": [
                {
                    "bin": i,
                    "count": int(count[i]),
                    "accuracy": accuracy[i].item(),
                    "confidence": confidence[i].item(),
                }
                for i in range(BINS)
                if count[i]
            ],
            "epoch_ms": statistics.median(self.epoch_ms),
        }

    def record(self) -> dict:
        """What `results.json` holds of this training."""
        return {
            "variant": self.recipe.key,
            "side": self.side.name,
            "seed": self.seed,
            **self.measured,
            "best_epoch": None if self.best_epoch is None else self.best_epoch + 1,
            "stop_epoch": None if self.stop_epoch is None else self.stop_epoch + 1,
            "epochs_ms": self.epoch_ms,
            "curves": self.curves,
        }


def descend(side, model: nn.Module, optimizer, loss: torch.Tensor) -> None:
    """One step down the gradient of `loss`, whose norm is clipped."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    side.step(optimizer)


def augmented(x: torch.Tensor, data: Data, augment) -> torch.Tensor:
    """Rows of pixels, [B, D], after `augment`, which takes images [B, C, H, W]. Features that are no images
    stay as they are.
    """
    height, width = data.picture_shape[:2]
    if height == 1:
        return x
    return augment(x.view(len(x), height, width, -1).movedim(3, 1)).movedim(1, 3).reshape(x.shape)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, part: str) -> dict[str, float]:
    """Error in percent and cross-entropy in nats on a part of the data, without dropout or smoothing."""
    y = getattr(data, f"y_{part}")
    logits = model.eval()(getattr(data, f"x_{part}"))
    error = 100 * (logits.argmax(1) != y).double().mean().item()
    return {f"{part}_error": error, f"{part}_loss": F.cross_entropy(logits, y).item()}


def attacked_accuracy(side, model: nn.Module, data: Data) -> float:
    """Accuracy in percent on test images after one step of EPS along the sign of the network's gradient."""
    attacked = side.attack(model.eval(), data.x_test, data.y_test, EPS)
    with torch.no_grad():
        return 100 * (model(attacked).argmax(1) == data.y_test).double().mean().item()


def batch_size(examples: int) -> int:
    """BATCH, or as near to it as batches of one size come, and all examples where these are fewer. With a
    smaller batch the gradients are noisier, and at this learning rate dropout would diverge.
    """
    return math.ceil(examples / steps(examples))


def steps(examples: int) -> int:
    """How many batches one pass over the examples takes."""
    return max(1, round(examples / BATCH))


def passes(examples: int) -> int:
    """How often an epoch passes over the examples: once, or until there are FEWEST_STEPS steps."""
    return math.ceil(FEWEST_STEPS / steps(examples))


def epoch_batches(examples: int, generator: torch.Generator | None = None) -> list[torch.Tensor]:
    """The indices of the batches of one epoch, each pass shuffled anew; their sizes differ by one at most."""
    return [
        batch
        for _ in range(passes(examples))
        for batch in torch.randperm(examples, generator=generator).tensor_split(steps(examples))
    ]


def batches(examples: int, epochs: int) -> Iterator[torch.Tensor]:
    """The indices of the batches of some epochs."""
    for _ in range(epochs):
        yield from epoch_batches(examples)


def train(data: Data, recipe: Recipe, seed: int, epochs: int) -> Iterator[list[Run]]:
    """Train `recipe` on both sides, yielding the two runs after every epoch (for the progress bar) and
    finished at the end. The order of the two alternates, so that neither always finds the caches warm."""
    torch.manual_seed(seed)
    start = network(Torch, recipe, data).state_dict()
    runs = []
    for side in (Torch, Fastreg):
        model = network(side, recipe, data)
        model.load_state_dict(start)
        runs.append(Run(side, recipe, seed, data, model))
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        batches = epoch_batches(len(data.x_train), shuffle)
        for run in runs if epoch % 2 == 0 else reversed(runs):
            if not run.stopped:
                run.epoch(batches)
        yield runs
        if all(run.stopped for run in runs):
            break
    for run in runs:
        run.finish()
    yield runs
