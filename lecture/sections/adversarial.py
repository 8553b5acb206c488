"""Adversarial training, Goodfellow et al. 2016, section 7.13; attacked harder than it was trained for."""

from collections.abc import Iterator
from html import escape

import torch
from torch import Tensor, nn

import fastreg as fr

from ..claims import changed
from ..figures import AT_HEIGHT, INK, C, draw, image, note, sign_image
from ..results import NotMeasured, Results
from ..section import Figure, Lab, Section
from ..train import EPS, PLAIN, Fastreg, Recipe, Torch, attacked_accuracy, batches, descend, evaluate, network

RECIPE = Recipe("adversarial", "Adversarial training", "rust", eps=EPS)
STEPS, RESTARTS = 20, 3
IMAGES = 500  # test images attacked with PGD
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # of the attacks in the picture, in units of EPS
REPLAYS = 4


def free(lab: Lab) -> nn.Module:
    """A network trained adversarially at the price of plain training: each batch replayed, a fraction of the
    epochs.
    """
    data = lab.data
    torch.manual_seed(lab.seed)
    model = network(Fastreg, RECIPE, data)
    optimizer, attack = Fastreg.optimizer(model, RECIPE), fr.FreeAdversarial(EPS, replays=REPLAYS)
    for batch in batches(len(data.x_train), max(1, lab.epochs // REPLAYS)):
        for x in attack(data.x_train[batch]):
            descend(Fastreg, model, optimizer, fr.cross_entropy(model(x), data.y_train[batch]))
    return model


def robust_accuracy(model: nn.Module, lab: Lab, eps: float = EPS) -> float:
    every = max(1, len(lab.data.y_test) // IMAGES)  # the parts are sorted by class
    examples = lab.data.x_test[::every], lab.data.y_test[::every]
    generator = torch.Generator().manual_seed(lab.seed)
    return 100 * fr.robust_accuracy(model, examples, eps, steps=STEPS, restarts=RESTARTS, generator=generator)


def measure(lab: Lab) -> Iterator[dict]:
    for recipe in (PLAIN, RECIPE):
        for side in (Torch, Fastreg):
            accuracy = robust_accuracy(lab.runs[recipe.key, side.name].model, lab)
            yield {"variant": recipe.key, "side": side.name, "seed": lab.seed, "robust_accuracy": accuracy}
    model = free(lab)
    yield {
        "variant": "adversarial_free",
        "side": "fastreg",
        "seed": lab.seed,
        **evaluate(model, lab.data, "test"),
        "attacked_accuracy": attacked_accuracy(Fastreg, model, lab.data),
        "robust_accuracy": robust_accuracy(model, lab),
    }
    if lab.seed == 0:
        models = {recipe.key: lab.runs[recipe.key, "fastreg"].model for recipe in (PLAIN, RECIPE)}
        curves = {
            key: [robust_accuracy(model, lab, EPS * s) for s in STRENGTHS] for key, model in models.items()
        }
        lab.keep("adversarial", curves=curves)


def strengths(found: Results) -> str:
    curves = found.keep("adversarial")["curves"]

    def paint(axes) -> None:
        for recipe in (PLAIN, RECIPE):
            axes.plot(
                [EPS * s for s in STRENGTHS],
                curves[recipe.key],
                "o-",
                color=C[recipe.colour],
                ms=5,
                label=recipe.title,
            )
        axes.axvline(EPS, color=C["sand"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        note(axes, "trained for", (EPS, 1), (4, -2), coords=AT_HEIGHT, color=C["muted"], va="top")
        axes.set_ylim(-2, 102)
        axes.set_xlim(0, EPS * STRENGTHS[-1] * 1.03)
        axes.set_xlabel("ε of the attack", color=INK)
        axes.set_ylabel("accuracy [%]")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2, columnspacing=1.4)

    return draw(paint, 3.4)


def examples(found: Results) -> str:
    """Three test images that the plain network reads rightly until it is attacked."""
    data, model = found.data, found.run(PLAIN.key).model.eval()
    try:
        trained = found.run(RECIPE.key).model.eval()
    except NotMeasured:
        trained = None
    attacked = Fastreg.attack(model, data.x_test, data.y_test, EPS)
    with torch.no_grad():
        clean_p, attacked_p = model(data.x_test).softmax(1), model(attacked).softmax(1)
    fooled = (clean_p.argmax(1) == data.y_test) & (attacked_p.argmax(1) != data.y_test)
    chosen, classes = [], len(data.classes)
    for y in sorted({0, classes // 3, 2 * classes // 3}):
        chosen += (fooled & (data.y_test == y)).nonzero()[:1, 0].tolist()
    if not chosen:
        return ""

    def reading(source, probabilities, y, sign=""):
        confidence, predicted = probabilities.max(0)
        name, kind = escape(data.classes[predicted]), "" if predicted == y else ' class="wrong"'
        return (
            f'<div class="reading" data-sign="{sign}"><img src="{source}" alt="read as {name}">'
            f"<p{kind}>“{name}”, {100 * confidence:.0f} %</p></div>"
        )

    heads = [
        "clean",
        f"{EPS:g} × sign of gradient",
        "adversarial",
        "the same, trained for it" if trained else "",
    ]
    cells = [f'<p class="head">{head}</p>' for head in heads]
    for index in chosen:
        x, y, shape = data.x_test[index], data.y_test[index], data.picture_shape
        sign = gradient_sign(model, x[None], y[None])[0]
        with torch.no_grad():
            sign_p = model((sign[None] + 1) / 2).softmax(1)[0]
        cells += [
            reading(image(x, shape), clean_p[index], y),
            reading(sign_image(sign, shape), sign_p, y, "+"),
            reading(image(attacked[index], shape), attacked_p[index], y, "="),
        ]
        if trained is None:
            cells.append("<p></p>")
            continue
        own = Fastreg.attack(trained, x[None], y[None], EPS)
        with torch.no_grad():
            cells.append(reading(image(own[0], shape), trained(own).softmax(1)[0], y))
    return f'<div class="attack">{"".join(cells)}</div>'


def gradient_sign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(fr.cross_entropy(model(x), y), x)[0].sign()


SECTION = Section(
    key="adversarial",
    order=70,
    title="Adversarial training",
    colour="rust",
    formulas=(
        r"x_{\mathrm{adv}} = \mathrm{clamp}(x + \varepsilon\,\mathrm{sign}\,\nabla_{\!x}J(x,y),\;0,\;1)",
        r"\tilde{J} = \dfrac{1}{2}\,J(x,y) + \dfrac{1}{2}\,J(x_{\mathrm{adv}},y)",
    ),
    text=f"<p>A step of ε = {EPS:g} per pixel along the sign of the gradient (FGSM) changes what the "
    "network reads, not what a person reads. Training on such images beside the clean ones teaches the "
    "network to stand its ground. Every network is attacked through its own gradient, also with PGD: "
    f"{STEPS} small steps from a random start, {RESTARTS} times, on {IMAGES} test images; an image counts "
    "only if it withstands every attempt. The free variant takes the gradient of the image from the "
    "backward pass of the weights, at the price of plain training.</p>",
    recipes=(RECIPE,),
    measure=measure,
    variants=(("adversarial_free", "Free adversarial", "rust"),),
    columns=("test_error", "attacked_accuracy", "robust_accuracy", "gap_loss", "epoch_ms"),
    claims=(
        changed(
            "Adversarial training raises accuracy under FGSM", "adversarial", "none", "attacked_accuracy", +1
        ),
        changed(
            "Adversarial training raises accuracy under PGD", "adversarial", "none", "robust_accuracy", +1
        ),
    ),
    figures=(
        Figure(
            examples,
            "Test images, the perturbation, and the attacked images",
            "Below each picture: what the network reads in it and how confidently, bold where it is wrong. "
            "The sign picture is read alone, at full contrast; rust pixels are brightened, blue ones "
            "darkened.",
        ),
        Figure(
            strengths,
            "Accuracy under PGD against the strength of the attack",
            f"PGD with {STEPS} steps and {RESTARTS} restarts on {IMAGES} test images, first seed.",
        ),
    ),
    code=("attack", "loss"),
)
