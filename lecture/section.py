"""What a section of the report is: one method of the lecture.

A section is declared, not programmed: trainings (`recipes`), further measurements (`measure`), and what the
page says of them. Every module of `sections/` declares one, and is found there by itself: a copy of such a
module with its own `key` and `order` is a new section, which also appears in the contents, the table, the
terminal and `--only`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .claims import Claim
from .data import Data
from .results import Results
from .train import PLAIN, Recipe, Run


@dataclass
class Lab:
    """What a measurement finds: the data, the seed, and the trainings of this seed."""

    data: Data
    seed: int
    epochs: int
    quick: bool
    results: Results
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)  # (recipe, side): run

    def keep(self, section: str, **things) -> None:
        """Keep things of the first seed for the pictures."""
        if self.seed == 0:
            self.results.kept.setdefault(section, {}).update(things)


@dataclass(frozen=True)
class Figure:
    """A picture; `draw` gives the drawing, or nothing where the data have none to show."""

    draw: Callable[[Results], str]
    alt: str
    caption: str


@dataclass(frozen=True, eq=False)
class Section:
    """See the module. `formulas` are in TeX, `text` in HTML."""

    key: str  # in the address of the section and for --only
    order: int  # its place in the lecture; steps of ten leave room between two
    title: str
    colour: str  # a name in style.PALETTE
    formulas: tuple[str, ...]
    text: str
    # Trainings, with torch and with fastreg, from the same weights on the same batches.
    recipes: tuple[Recipe, ...] = ()
    measure: Callable[[Lab], Iterator[dict]] | None = None  # records of what no recipe gives, for one seed
    variants: tuple[tuple[str, str, str], ...] = ()  # (key, title, colour) of those records
    plain: bool = True  # whether the section compares with the network without regularisation
    columns: tuple[str, ...] = ("test_error",)  # of the table
    table_note: str = ""
    claims: tuple[Claim, ...] = ()
    figures: tuple[Figure, ...] = ()
    packages: tuple[str, ...] = ()  # that are imported for it alone
    code: tuple[str, ...] = ()  # names of functions of train.Torch and train.Fastreg to show side by side
    # Columns of this section alone, in the form of results.MEASURES.
    measures: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[Recipe, ...]:
        """The trainings the section rests on."""
        return (PLAIN, *self.recipes) if self.plain else self.recipes

    @property
    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """(key, title, colour) of every variant in the table."""
        return (*((r.key, r.title, r.colour) for r in self.trained), *self.variants)
