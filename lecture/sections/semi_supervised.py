"""Semi-supervised learning, Goodfellow et al. 2016, section 7.6: pseudo-labels, and a representation from
unlabelled data.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastreg as fr

from ..claims import changed
from ..data import Data, labelled_images
from ..figures import error_bars, image
from ..results import Results
from ..section import Figure, Lab, Section
from ..train import HIDDEN, Centre, evaluate

LABELLED = 10  # one of so many training images keeps its label: 100 of the 1,000 digits
STEPS, QUICK_STEPS = 400, 250
BATCH = 50  # labelled images; four times as many unlabelled ones
THRESHOLD = 0.9
CORRUPTION = 0.5
SHOWN = 6  # images that the autoencoder restores
VARIANTS = (
    ("semi_supervised", "Few labels", "grey"),
    ("semi_pseudo", "+ pseudo-labels", "pine"),
    ("semi_autoencoder", "+ autoencoder", "indigo"),
    ("semi_both", "+ both", "teal"),
    ("semi_all", "All labels", "ink"),
)


def measure(lab: Lab) -> Iterator[dict]:
    # The images, few of them with labels.
    data, steps = lab.data, QUICK_STEPS if lab.quick else STEPS
    unlabelled = torch.cat([data.x_train, data.x_validation])
    centre, (first, second) = Centre(data.x_train), HIDDEN
    torch.manual_seed(lab.seed)
    few, everything = labelled_images(data, LABELLED), torch.arange(len(data.y_train))

    # The parts that all variants share.
    def encoder():
        torch.manual_seed(lab.seed)
        return nn.Sequential(
            *(nn.Linear(data.x_train.shape[1], first), nn.ReLU(), fr.nn.Dropout(0.3)),
            *(nn.Linear(first, second), nn.ReLU(), fr.nn.Dropout(0.3)),
        )

    def classifier(encode, indices, pseudo):
        """Train on the labels of these images and, by pseudo-labels, on all images there are."""
        torch.manual_seed(1000 + lab.seed)  # the same batches for all
        model = nn.Sequential(centre, fr.nn.Dropout(0.2), encode, nn.Linear(second, len(data.classes)))
        optimizer = fr.optim.SGD(fr.optim.penalty_groups(model, l2=1e-3), lr=0.05, momentum=0.9)
        for step in range(steps):
            labelled = indices[torch.randint(len(indices), (BATCH,))]
            others = unlabelled[torch.randint(len(unlabelled), (4 * BATCH,))]
            loss = fr.cross_entropy(model.train()(data.x_train[labelled]), data.y_train[labelled])
            if pseudo:
                with torch.no_grad():
                    weak = model.eval()(others)  # as it is; the other view has dropout, on the pixels too
                strong = model.train()(others)
                loss = loss + min(1, 2 * step / steps) * fr.pseudo_label_loss(
                    strong, weak, threshold=THRESHOLD
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    # The representation, from images without labels.
    pretrained = encoder()
    decoder = fr.TiedDecoder(pretrained)
    epochs = 8 if lab.quick else 20
    generator = torch.Generator().manual_seed(lab.seed)
    fr.pretrain_autoencoder(
        pretrained, centre(unlabelled), decoder, epochs=epochs, corruption=CORRUPTION, generator=generator
    )
    lab.keep("semi-supervised", restored=restoration(data, centre, pretrained, decoder))
    start = {name: value.clone() for name, value in pretrained.state_dict().items()}
    # The variants: which labels, and which of the two methods.
    for variant, indices, pretraining, pseudo in (
        ("semi_supervised", few, False, False),
        ("semi_pseudo", few, False, True),
        ("semi_autoencoder", few, True, False),
        ("semi_both", few, True, True),
        ("semi_all", everything, False, False),
    ):
        encode = encoder()
        if pretraining:
            encode.load_state_dict(start)
        model = classifier(encode, indices, pseudo)
        yield {
            "variant": variant,
            "side": "fastreg",
            "seed": lab.seed,
            "labels": len(indices),
            **evaluate(model, data, "test"),
        }


@torch.no_grad()
def restoration(data: Data, centre: Centre, encode: nn.Module, decoder: nn.Module) -> list[Tensor]:
    """Test images of different classes, the same with half of their pixels lost, and what the autoencoder
    makes of these.
    """
    chosen = torch.stack([(data.y_test == y).nonzero()[0, 0] for y in range(min(SHOWN, len(data.classes)))])
    clean = centre(data.x_test[chosen])
    lost = fr.dropout(clean, CORRUPTION, generator=torch.Generator().manual_seed(0))
    encode.eval()
    rows = [clean, lost * (1 - CORRUPTION), decoder(encode(lost))]
    return [row / centre.scale + centre.mean for row in rows]


def restored_images(found: Results) -> str:
    rows, shape = found.keep("semi-supervised")["restored"], found.data.picture_shape
    if shape[0] == 1:
        return ""
    cells = [
        f'<p class="head">{name}</p>' + "".join(f'<img src="{image(x, shape)}" alt="{name}">' for x in row)
        for name, row in zip(("clean", "half lost", "restored"), rows, strict=True)
    ]
    return f'<div class="strip" style="--n: {len(rows[0])}">{"".join(cells)}</div>'


SECTION = Section(
    key="semi-supervised",
    order=90,
    title="Semi-supervised learning",
    colour="pine",
    formulas=(
        r"J = H(y, p) + \dfrac{\alpha_t}{M}\sum_j\,[\max p_j \geq \tau]\;H(\hat{y}_j,\,\tilde{p}_j)",
        r"\min_{f,g}\;\Vert g(f(\tilde{x})) - x\Vert^2",
    ),
    text=f"<p>Only one of {LABELLED} training images keeps its label (on the digits 100 of 1,000), all the "
    "others and the validation images come without. <b>Pseudo-labels:</b> where the network is sure of an "
    f"unlabelled image (probability p of at least τ = {THRESHOLD:g}), its own reading is the target for the "
    "same image seen through dropout. <b>Autoencoder:</b> the hidden layers first learn to restore images "
    "half of whose pixels are lost, which needs no labels, and the classifier starts from there.</p>",
    measure=measure,
    variants=VARIANTS,
    plain=False,
    columns=("labels", "test_error", "test_loss"),
    measures={"labels": ("labels", "", ",.0f")},
    table_note="The labelled images are drawn anew with every seed; all networks of a seed take the same "
    "steps.",
    claims=(
        changed("Pseudo-labels beat the labels alone", "semi_pseudo", "semi_supervised", "test_error", -1),
        changed(
            "A representation from unlabelled images beats the labels alone",
            "semi_autoencoder",
            "semi_supervised",
            "test_error",
            -1,
        ),
    ),
    figures=(
        Figure(
            error_bars(*VARIANTS),
            "Test error with few labels, with unlabelled images besides, and with all labels",
            "Mean over the seeds; a tick per seed.",
        ),
        Figure(
            restored_images,
            "Images, the same with half of the pixels lost, and restored by the autoencoder",
            "Test images that the autoencoder has not seen, first seed.",
        ),
    ),
)
