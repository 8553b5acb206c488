"""LASSO: least squares with an L1 penalty, on data of its own, against scikit-learn."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import fastreg as fr

from ..claims import judged
from ..figures import INK, C, draw, note
from ..results import Results
from ..section import Figure, Lab, Section

TOLERANCE = 1e-3  # of the coefficients, in units of the standardised target
LEFT = 60  # of the strongest penalty, the weakest is 1 / LEFT


def diabetes() -> tuple[Tensor, Tensor, list[str]]:
    """Ten measurements of 442 patients, and the progress of their disease a year later, all standardised."""
    from sklearn.datasets import load_diabetes

    file = load_diabetes()
    x, y = (torch.from_numpy((v - v.mean(0)) / v.std(0)) for v in (file.data, file.target))
    return x, y, list(file.feature_names)


def path(x: Tensor, y: Tensor, lambdas: Sequence[float], steps: int) -> list[Tensor]:
    """fastreg's coefficients for each λ, from the strongest down, each starting where the last one ended."""
    w = torch.nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)
    lr = 1 / torch.linalg.matrix_norm(gram, 2).item()
    found = []
    for strength in lambdas:
        optimizer = fr.optim.SGD([w], lr=lr, l1=strength, l1_mode="proximal")
        for _ in range(steps):
            w.grad = gram @ w.detach() - moment  # of ||y - x w||² / 2N
            optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


def measure(lab: Lab) -> Iterator[dict]:
    if lab.seed:  # neither data nor optimum depend on the seed
        return
    from sklearn.linear_model import Lasso

    x, y, names = diabetes()
    strongest = (x.T @ y / len(x)).abs().max().item()  # from here on all coefficients are zero
    lambdas = np.geomspace(strongest, strongest / LEFT, 10 if lab.quick else 25)
    ours = path(x, y, lambdas, 700 if lab.quick else 1500)
    theirs = np.stack(
        [Lasso(alpha=a, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy()).coef_ for a in lambdas]
    )
    theirs = torch.from_numpy(theirs)
    lab.keep("lasso", lambdas=lambdas, ours=ours, theirs=theirs, names=names)
    for side, w in (("scikit-learn", theirs), ("fastreg", ours)):
        for key, strength in (("lasso_strong", 0.2), ("lasso_weak", 0.03)):
            i = int(np.abs(np.log(lambdas / strength)).argmin())
            coefficients = w[i]
            yield {
                "variant": key,
                "side": side,
                "seed": 0,
                "lasso_lambda": float(lambdas[i]),
                "lasso_kept": int((coefficients != 0).sum()),
                "lasso_error": 100 * ((y - x @ coefficients).square().mean() / y.square().mean()).item(),
                "lasso_distance": (ours[i] - theirs[i]).abs().max().item(),
            }


def agrees(found: Results) -> tuple[bool, str]:
    kept = found.keep("lasso")
    distance = (kept["ours"] - kept["theirs"]).abs().max().item()
    same = ((kept["ours"] != 0) == (kept["theirs"] != 0)).all(1)
    evidence = (
        f"largest difference of a coefficient {distance:.1e}, over {len(same)} strengths; the same "
        f"coefficients are zero in {int(same.sum())} of {len(same)}"
    )
    return distance < TOLERANCE and bool(same.all()), evidence


def strengths(axes: Axes, lambdas: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(lambdas[0], lambdas[-1])
    ticks = [t for t in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01) if lambdas[-1] < t < lambdas[0]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("λ, weaker to the right")


def picture(found: Results) -> str:
    kept = found.keep("lasso")
    lambdas, ours, theirs = kept["lambdas"], kept["ours"].numpy(), kept["theirs"].numpy()
    shown = np.abs(ours[-1]).argsort()[::-1][:5].tolist()
    hues = dict(zip(shown, ("violet", "blue", "rust", "pine", "ochre"), strict=True))

    def paint(axes) -> None:
        for j in range(ours.shape[1]):
            hue = C[hues[j]] if j in hues else C["sand"]
            axes.plot(
                lambdas,
                ours[:, j],
                color=hue,
                linewidth=1.8 if j in hues else 1.2,
                zorder=3 if j in hues else 2,
            )
            axes.plot(lambdas, theirs[:, j], "o", color=hue, mfc="none", ms=4, mew=1, zorder=3)
        low, high = ours.min(), ours.max()
        axes.set_ylim(low - 0.12 * (high - low), high + 0.04 * (high - low))
        lowest = math.inf
        for j in sorted(shown, key=lambda j: -ours[-1, j]):  # names that would cover each other move down
            lowest = min(ours[-1, j], lowest - 0.055 * (high - low))
            style = {"color": C[hues[j]], "va": "center", "weight": "bold"}
            note(axes, kept["names"][j], (lambdas[-1], lowest), (6, 0), **style)
        axes.axhline(0, color=INK, linewidth=0.8)
        strengths(axes, lambdas)
        axes.set_xlim(lambdas[0], lambdas[-1] * 0.72)
        axes.set_ylabel("coefficient")

    return draw(paint, 3.6)


def zeros(found: Results) -> str:
    kept = found.keep("lasso")
    lambdas = kept["lambdas"]

    def paint(axes) -> None:
        counts = (kept["ours"] != 0).sum(1).numpy()
        axes.step(lambdas, counts, where="mid", color=C["violet"])
        axes.fill_between(lambdas, counts, step="mid", color=C["violet"], alpha=0.15, linewidth=0)
        axes.plot(
            lambdas, (kept["theirs"] != 0).sum(1).numpy(), "o", color=C["violet"], mfc="none", ms=4, mew=1
        )
        strengths(axes, lambdas)
        axes.set_ylim(0, len(kept["names"]) + 0.5)
        axes.set_ylabel("coefficients that are not zero")

    return draw(paint, 3.6)


SECTION = Section(
    key="lasso",
    order=30,
    title="LASSO",
    colour="violet",
    formulas=(r"\min_w\;\dfrac{1}{2N}\,\Vert y - Xw\Vert_2^2 + \lambda\,\Vert w\Vert_1",),
    text="<p>On a linear model with squared error the L1 penalty is called LASSO, and it selects: the "
    "weaker the penalty, the more inputs take part. The optimum is unique, so that fastreg’s proximal "
    "gradient steps must end where scikit-learn’s coordinate descent does.</p><p><b>On data of its own:</b> "
    "scikit-learn’s diabetes data, ten measurements of 442 patients and the progress of their disease after "
    "a year, standardised.</p>",
    measure=measure,
    packages=("sklearn",),
    variants=(("lasso_strong", "Strong penalty", "violet"), ("lasso_weak", "Weak penalty", "violet")),
    plain=False,
    columns=("lasso_lambda", "lasso_kept", "lasso_error", "lasso_distance"),
    measures={
        "lasso_lambda": ("λ", "", ".3f"),
        "lasso_kept": ("inputs used", "", ",.0f"),
        "lasso_error": ("error, of the variance", "%", ".2f"),
        "lasso_distance": ("difference", "", ".0e"),
    },
    table_note="The difference is the largest between a coefficient of fastreg and the same of scikit-learn.",
    claims=(
        judged("fastreg finds scikit-learn’s solution: the coefficients and which of them are zero", agrees),
    ),
    figures=(
        Figure(
            picture,
            "Coefficients of the ten inputs against the strength of the penalty",
            "Each line is a coefficient by fastreg, the rings are scikit-learn’s. From left to right the "
            "penalty weakens and one input after the other joins.",
        ),
        Figure(
            zeros,
            "Number of inputs used against the strength of the penalty",
            "How many inputs take part (rings: scikit-learn).",
        ),
    ),
)
