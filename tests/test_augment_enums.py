"""What the operators of augmentation number in Python and in C++ alike: the lists of fastreg/augment
against the enumerations of csrc/augment, which static_assert ties to each other.
"""

import re
from pathlib import Path

import pytest
import torch

from fastreg.augment import _op

CSRC = Path(__file__).parent.parent / "csrc" / "augment"


def enumerators(header, name):
    """{name without its k: number} of an enumeration, without what only counts or stands for all of them."""
    text = re.sub(r"//[^\n]*", "", (CSRC / header).read_text())
    body = re.search(rf"enum (?:class )?{name}\b[^{{]*{{([^}}]*)}}", text)[1]
    numbers, next_number = {}, 0
    for entry in filter(None, map(str.strip, body.split(","))):
        key, _, value = (part.strip() for part in entry.partition("="))
        value = numbers.get(value, value)
        next_number = int(value) if value != "" else next_number
        numbers[key] = next_number
        next_number += 1
    counts = ("kCount", "kColourColumns", "kAllColourSteps", "kGeometryColumns", "kParamColumns")
    return {key.removeprefix("k"): number for key, number in numbers.items() if key not in counts}


def camel(name):
    return "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize(
    ("name", "names"), [("Interpolation", _op.INTERPOLATIONS), ("Padding", _op.PADDINGS)]
)
def test_choices(name, names):
    assert enumerators("augment_math.h", name) == {camel(n): i for i, n in enumerate(names)}


def test_colour_steps_and_their_columns():
    assert enumerators("augment_math.h", "ColourStep") == {camel(n): bit for n, bit in _op.STEPS.items()}
    columns = enumerators("augment_math.h", "ColourColumn")
    assert columns == {f"{camel(n)}Column": i for i, n in enumerate(_op.STEPS)}


def test_columns_of_the_parameters():
    spelt = {"Hflip": "HFlip", "Vflip": "VFlip"}
    spelt |= {camel(n): f"{camel(n)}Param" for n in _op.STEPS}
    names = [spelt.get(camel(n), camel(n)) for n in _op.COLUMNS]
    assert enumerators("augment_draw.h", "ParamColumn") == {n: i for i, n in enumerate(names)}


@pytest.mark.parametrize("choice", ["interpolation", "padding", "crop"])
def test_a_number_beyond_the_enumeration_is_refused(choice):
    x = torch.zeros(1, 1, 2, 2)
    if choice == "crop":
        low = [0.0] * len(_op.COLUMNS)
        with pytest.raises((RuntimeError, ValueError), match="augment_draw: "):
            _op.augment_draw(
                x, torch.tensor([1]), 0, 1, [0.0] * 3, low, low, 3, [0.0] * 5, [0.0] * 4, [2] * 4, 1, 1
            )
        return
    numbers = {"interpolation": 1, "padding": 0, choice: 4 if choice == "padding" else 3}
    with pytest.raises((RuntimeError, ValueError), match="unknown interpolation or padding"):
        torch.ops.fastreg.augment(
            x, None, None, None, None, None, [0.0, 0.0, 1.0, 0.0], 2, 2, 1, 1, 0,
            numbers["interpolation"], numbers["padding"], False, False, torch.float32,
        )  # fmt: skip
