"""Dataset augmentation, Goodfellow et al. 2016, section 7.4: new training images from those there are, the
class kept.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

import fastreg as fr

from .. import gallery
from ..claims import changed
from ..data import Data, labelled_images
from ..figures import AT_HEIGHT, INK, C, colour, compared_curves, draw, image, note, png
from ..results import NotMeasured, Results
from ..section import Figure, Lab, Section
from ..train import (
    LR,
    MOMENTUM,
    PLAIN,
    POLICY,
    Fastreg,
    Recipe,
    Torch,
    augmented,
    batch_size,
    evaluate,
    network,
)

RECIPE = Recipe("augmentation", "Augmentation", "leaf", augment=True)
MIRRORED = POLICY | {"hflip": 0.5, "vflip": 0.5}  # which digits do not allow
SHARES, QUICK_SHARES = (10, 5, 1), (10, 1)  # one of so many training images
STEPS, QUICK_STEPS = 250, 160
BATCH = 50
TURNS = range(-40, 41, 5)  # degrees, of the test images in the picture
ROUNDS = 5  # of timing
SHOWN, DRAWS = 6, 3  # images, and how often each is transformed
SIDE, COLUMNS = 112, 7  # of the photograph, and how many stand in a row
SKY, HORIZON = 175, 70  # what is brighter, above that line, is the photograph's sky
PAVILION = [17.0, 5.0, 98.0, 97.0]  # in pixels of the small photograph
VARIANTS = (
    ("augmentation_few_plain", "A tenth of the images", "grey"),
    ("augmentation_few", "A tenth, augmented", "leaf"),
    ("augmentation_mirrored", "A tenth, mirrored too", "rust"),
)


def learn(data: Data, policy: dict, lab: Lab) -> dict[str, float]:
    """A network that has seen these training images only, as they are or under a policy, for a fixed number
    of steps.
    """
    torch.manual_seed(lab.seed)
    model, shuffle = network(Fastreg, PLAIN, data), torch.Generator().manual_seed(lab.seed)
    optimizer = fr.optim.SGD(model.parameters(), lr=LR / 2, momentum=MOMENTUM)
    augment = Fastreg.augmentation(**policy)
    for _ in range(QUICK_STEPS if lab.quick else STEPS):
        batch = torch.randint(len(data.x_train), (BATCH,), generator=shuffle)
        x, y = data.x_train[batch], data.y_train[batch]
        optimizer.zero_grad()
        fr.cross_entropy(model(augmented(x, data, augment) if policy else x), y).backward()
        optimizer.step()
    measured = evaluate(model, data, "train") | evaluate(model, data, "test")
    return measured | {"gap_error": measured["test_error"] - measured["train_error"]}


def milliseconds(data: Data) -> dict[str, float]:
    """How long an epoch's augmentation takes on each side, which are measured in turn."""
    policies = {side.name: side.augmentation(**POLICY) for side in (Torch, Fastreg)}
    times = {name: [] for name in policies}
    for _ in range(ROUNDS):
        for name, augment in policies.items():
            start = time.perf_counter()
            for x in data.x_train.split(batch_size(len(data.x_train))):
                augmented(x, data, augment)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(lab: Lab) -> Iterator[dict]:
    data, base = lab.data, {"side": "fastreg", "seed": lab.seed}
    if data.picture_shape[0] == 1:  # features that are no images have no turns and shifts
        return
    for side, value in milliseconds(data).items():
        yield {"variant": RECIPE.key, "side": side, "seed": lab.seed, "augment_ms": value}
    torch.manual_seed(lab.seed)
    parts = []
    for share in QUICK_SHARES if lab.quick else SHARES:
        images = labelled_images(data, share)
        parts.append(replace(data, x_train=data.x_train[images], y_train=data.y_train[images]))
    for (variant, _, _), policy in zip(VARIANTS, ({}, POLICY, MIRRORED), strict=True):
        used = parts[:1] if policy is MIRRORED else parts
        found = [learn(part, policy, lab) for part in used]
        curve = [[len(part.y_train), each["test_error"]] for part, each in zip(used, found, strict=True)]
        yield {"variant": variant, **base, **found[0], "test_error_by_images": curve}
    if lab.seed == 0:
        models = {recipe: lab.runs[recipe.key, "fastreg"].model for recipe in (PLAIN, RECIPE)}
        lab.keep(
            "augmentation",
            turned={recipe: [turned(model, data, a) for a in TURNS] for recipe, model in models.items()},
        )


def turned(model: nn.Module, data: Data, angle: float) -> float:
    """Test error in percent on images that are turned by this angle."""
    turn = fr.augment.Augment(rotate=(angle, angle), padding="border")
    with torch.no_grad():
        return (
            100
            * (model.eval()(augmented(data.x_test, data, turn)).argmax(1) != data.y_test)
            .double()
            .mean()
            .item()
        )


def turns(found: Results) -> str:
    kept = found.keep("augmentation")["turned"]

    def paint(axes) -> None:
        axes.axvspan(*POLICY["rotate"], color=C["sand"], alpha=0.3, linewidth=0)
        note(axes, "trained for", (0, 1), (0, -3), coords=AT_HEIGHT, color=C["muted"], ha="center", va="top")
        for recipe, errors in kept.items():
            axes.plot(TURNS, errors, "o-", color=colour(recipe), ms=4.5, label=recipe.title)
        axes.set_xlim(TURNS[0], TURNS[-1])
        axes.set_ylim(0, 1.12 * max(map(max, kept.values())) or 1)
        axes.set_xticks(TURNS[2::3], [f"{a}°".replace("-", "−") for a in TURNS[2::3]])
        axes.set_xlabel("turn of the test images", color=INK)
        axes.set_ylabel("test error [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4)

    return draw(paint)


def sizes(found: Results) -> str:
    """Test error against the number of training images."""
    curves = []
    for (key, _, hue), title in zip(VARIANTS[:2], ("as they are", "augmented"), strict=True):
        curves.append((title, C[hue], [record["test_error_by_images"] for record in found.of(key)]))

    def paint(axes) -> None:
        for title, hue, seeds in curves:
            counts = [count for count, _ in seeds[0]]
            columns = [[error for _, error in points] for points in zip(*seeds, strict=True)]
            axes.plot(
                counts, [statistics.fmean(errors) for errors in columns], "o-", color=hue, ms=6, label=title
            )
            for count, errors in zip(counts, columns, strict=True):
                axes.plot([count] * len(errors), errors, "_", color=hue, ms=9, mew=1)
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
        axes.set_ylim(
            0, 1.1 * max(error for _, _, seeds in curves for points in seeds for _, error in points) or 1
        )
        axes.set_xlabel("training images", color=INK)
        axes.set_ylabel("test error [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4)

    return draw(paint)


def own_images(found: Results) -> str:
    """Training images of different classes, and what the network saw of them in three steps."""
    data = found.data
    if data.picture_shape[0] == 1 or RECIPE.key not in found.runs:
        raise NotMeasured(RECIPE.key)
    chosen = torch.stack([(data.y_train == y).nonzero()[0, 0] for y in range(min(SHOWN, len(data.classes)))])
    x = data.x_train[chosen]
    torch.manual_seed(0)
    augment = Fastreg.augmentation(**POLICY)
    rows = [("as it is", x), *((f"step {i + 1}", augmented(x, data, augment)) for i in range(DRAWS))]
    cells = [
        f'<p class="head">{name}</p>'
        + "".join(f'<img src="{image(each, data.picture_shape)}" alt="{name}">' for each in row)
        for name, row in rows
    ]
    return f'<div class="strip" style="--n: {len(x)}">{"".join(cells)}</div>'


def photograph(found: Results) -> str:
    """A photograph under each step, a batch of it under the policy that is usual on ImageNet, and a mask of
    its sky and a box around its pavilion that move with it.
    """
    from sklearn.datasets import load_sample_image

    pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)
    height = pixels.shape[1]
    photo = fr.augment.Augment(size=SIDE, antialias=True).eval()(pixels[:, :, :height])
    policy = fr.augment.Augment.imagenet(size=SIDE)

    def cell(pixels, title):
        name, read_out = f"<p>{title}</p>" if title else "", title or "under the policy"
        return f'<div><img src="{png(pixels.permute(1, 2, 0).numpy())}" alt="{read_out}">{name}</div>'

    alone = "".join(cell(pixels, title) for title, pixels in gallery.steps(photo))
    batch = "".join(
        cell(pixels, "") for pixels in (255 * gallery.batch(photo / 255, policy, COLUMNS)).round().byte()
    )
    sky = (photo.float().mean(0) > SKY) & (torch.arange(SIDE)[:, None] < HORIZON)
    moves = fr.augment.Augment.imagenet(size=SIDE, crop=(0.3, 1.0), rotate=15)
    drawn = gallery.with_targets(photo, moves, sky, torch.tensor([PAVILION]), COLUMNS)
    targets = "".join(
        f'<div><img src="{png(each.numpy())}" alt="with its mask and its box"></div>' for each in drawn
    )
    title = "A batch of it under <code>Augment.imagenet()</code>: every image draws its own parameters"
    return (
        f'<div class="gallery"><p class="head">One step alone</p>{alone}'
        f'<p class="head">{title}</p>{batch}'
        f'<p class="head">Masks, boxes and key points move by the same numbers</p>{targets}</div>'
    )


SECTION = Section(
    key="augmentation",
    order=60,
    title="Dataset augmentation",
    colour="leaf",
    formulas=(
        r"\tilde{x}(u) = x(Mu),\;\; \tilde{y} = y",
        r"\tilde{J} = \mathbb{E}_{M}\;J(\tilde{x},\,y)",
    ),
    text="<p>More images are the best regulariser, and some can be made from those there are: transformed "
    "so that the class stays, drawn anew for each image in each step. The network then minimises its "
    "expected error under the transformations. Here they are turns and shears by up to "
    f"{POLICY['rotate'][1]}°, a vertical stretch of {POLICY['stretch'][0]} to {POLICY['stretch'][1]}, and "
    f"shifts by up to {100 * POLICY['translate'][0]:g}&nbsp;% of the side, on photographs also mirror "
    "images, crops, colours and blur. <b>The class must not change:</b> a mirrored pagoda is a pagoda, but "
    "a 6 upside down is nearly a 9 and a mirrored 5 nearly a 2: the last network of the table learns from "
    "such digits too. fastreg makes one matrix M of all geometric steps and resamples once; the colours "
    "follow in the same pass.</p>",
    recipes=(RECIPE,),
    measure=measure,
    variants=VARIANTS,
    columns=("test_error", "gap_error", "epoch_ms", "augment_ms"),
    measures={"augment_ms": ("of it augmenting", "ms", ".1f")},
    table_note=f"The networks of a tenth of the images learn from as many images of each class, {STEPS} "
    f"steps of {BATCH} images ({QUICK_STEPS} with <code>--quick</code>).",
    claims=(
        changed("Augmentation lowers the test error", "augmentation", "none", "test_error", -1),
        changed(
            "Augmentation narrows the gap between test and training error",
            "augmentation",
            "none",
            "gap_error",
            -1,
        ),
        changed(
            "Augmentation of a tenth of the images lowers the test error",
            "augmentation_few",
            "augmentation_few_plain",
            "test_error",
            -1,
        ),
        changed(
            "Mirroring too, which changes the class of digits, raises the test error",
            "augmentation_mirrored",
            "augmentation_few",
            "test_error",
            +1,
        ),
    ),
    figures=(
        Figure(
            photograph,
            "A photograph under each step of augmentation, and a batch of it under a policy",
            "A photograph that comes with scikit-learn.",
        ),
        Figure(
            compared_curves(RECIPE),
            "Cross-entropy with and without augmentation on training and validation data",
            "Training (dotted, measured on the images as they are) and validation (solid), first seed. The "
            "bars at the right are the gap that is left.",
        ),
        Figure(
            own_images,
            "Training images as they are and as the network sees them in three steps",
            "Training images, and what the network saw of them in different steps.",
        ),
        Figure(
            sizes,
            "Test error with and without augmentation against the number of training images",
            "Mean over the seeds, a tick per seed. Every network takes the same number of steps.",
        ),
        Figure(
            turns,
            "Test error with and without augmentation against the angle by which the test images are turned",
            "Both networks on turned test images, first seed: augmentation teaches what it shows.",
        ),
    ),
    packages=("sklearn",),
    code=("augmentation",),
)
