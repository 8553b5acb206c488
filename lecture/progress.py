"""What the terminal shows: a bar per method while it trains, then the table and the claims.

Where the output is no terminal (a file, CI), a line per finished training takes the place of the bars.
"""

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from .results import LEARNED, NotMeasured, Results
from .section import Section
from .train import Recipe, Run

WIDE = 120  # columns of a file, where nobody has named a width
NARROW, VERY_NARROW = 80, 54  # columns below which notes and some numbers are left out
USUAL_EXAMPLES = 1000  # training examples of the packaged digits, for which the promised times hold


class Progress:
    """A context manager around the work; the methods that say what is done report from inside, `summary`
    after it.
    """

    def __init__(self, found: Results, sections: tuple[Section, ...]):
        width = None if Console().is_terminal or "COLUMNS" in os.environ else WIDE
        self.console = Console(highlight=False, width=width)
        self.found, self.sections, data = found, sections, found.data
        self.seeds, self.epochs = found.settings["seeds"], found.settings["epochs"]
        plural = "s" if self.seeds > 1 else ""
        self.console.print(
            f"[bold]fastreg demo[/]  {escape(data.name)}\n{len(data.y_train):,} to train, "
            f"{len(data.y_validation):,} to validate, {len(data.y_test):,} to test · {len(sections)} "
            f"section{'s' if len(sections) > 1 else ''} × {self.seeds} seed{plural} · {self.epochs} epochs"
        )
        times = len(data.y_train) / USUAL_EXAMPLES
        if times >= 2:
            self.console.print(
                f"This is {times:.0f} times the usual number of images and takes as much longer."
            )
        for phrase in data.prepared:
            self.console.print(Padding(f"[bright_black]{escape(phrase)}[/]", (0, 0, 0, 2), expand=False))
        self.console.print()
        wide = self.console.width >= NARROW
        columns: list[ProgressColumn] = [
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=14 if wide else 6, complete_style="blue", finished_style="blue"),
            TimeElapsedColumn(),
        ]
        if wide:
            columns.insert(2, TextColumn("[bright_black]{task.fields[note]:<30}"))
        self.bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.tasks, trained = {}, set()
        for section in sections:
            work = len({r.key for r in section.trained} - trained) * self.epochs
            work += self.epochs * (len(section.variants) or 1) if section.measure else 0
            trained |= {r.key for r in section.trained}
            self.tasks[section] = self.bars.add_task(
                section.title, total=max(1, self.seeds * work), note="", start=False
            )

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *exception):
        for task in self.tasks.values():
            self.bars.stop_task(task)
        self.bars.stop()

    def _show(self, section: Section, note: str, advance: float) -> None:
        self.bars.start_task(self.tasks[section])
        self.bars.update(self.tasks[section], advance=advance, note=note)

    def epoch(self, section: Section, seed: int, recipe: Recipe, pair: list[Run]) -> None:
        """One more epoch of both sides."""
        errors = " / ".join(f"{run.curves['validation_error'][-1]:.1f}" for run in pair)
        self._show(section, f"validation error {errors} %", 1)

    def trained(self, section: Section, seed: int, recipe: Recipe, pair: list[Run]) -> None:
        """Both sides of a method and a seed are done."""
        errors = " / ".join(f"{run.measured['test_error']:.1f}" for run in pair)
        self._show(section, f"test error {errors} %", 0)
        if not self.console.is_terminal:
            failed = [
                f"{run.side.name} {outcome}"
                for run in pair
                if (outcome := self.found.outcome(recipe.key, run.side.name, seed)) != LEARNED
            ]
            self.console.print(
                f"seed {seed + 1}/{self.seeds}  {recipe.title:<24}  test error torch / fastreg {errors} %"
                + (f": {', '.join(failed)}" if failed else "")
            )

    def measured(self, section: Section, seed: int, record: dict) -> None:
        """One more record of a section's own measurements."""
        title = self.found.titles.get(record["variant"], record["variant"])
        self._show(section, title, self.epochs)

    def finished(self, section: Section, seed: int) -> None:
        """A section is done with this seed."""
        total = self.bars.tasks[self.tasks[section]].total
        self.bars.update(self.tasks[section], completed=(seed + 1) / self.seeds * total)
        if seed + 1 == self.seeds:
            self.bars.update(self.tasks[section], note="")
            self.bars.stop_task(self.tasks[section])
        if not self.console.is_terminal and section.measure is not None:
            self.console.print(f"seed {seed + 1}/{self.seeds}  {section.title}: measured")

    def summary(self, claims: dict, page: Path) -> None:
        """The table, the claims and where the page is."""
        console = self.console
        self._table()
        failures = self.found.failures()
        if failures:
            console.print(
                f"[bold red]These networks learned nothing[/], and no claim is decided on them (–). The "
                f"constant guess has a test error of {self.found.data.guess_error:.1f} %."
            )
            for text in failures:
                console.print(Padding(Text(text, style="red"), (0, 0, 0, 2), expand=False))
            console.print()
        marks = {True: ("✓", "blue"), False: ("✗", "red"), None: ("–", "bright_black")}
        for claim in (claim for judged in claims.values() for claim in judged):
            mark, style = marks[claim.holds]
            console.print(Text(f"{mark} {claim.title}", style=style))
            console.print(Padding(Text(claim.evidence, style="bright_black"), (0, 0, 0, 2), expand=False))
        if self.found.finished < self.found.planned:
            console.print(
                f"\nInterrupted after {self.found.finished} of {self.found.planned} trainings and "
                f"measurements."
            )
        if self.found.settings["quick"]:
            console.print(
                "\nThis was the quick form: one seed, fewer epochs. `fastreg demo` trains longer and repeats "
                "everything with five seeds, which takes some minutes.",
                markup=False,
            )
        console.print(f"\nReport: {page.resolve()}", soft_wrap=True, markup=False)

    def _table(self) -> None:
        """The numbers of every training, as many as the width has room for."""
        columns = {  # heading: (key, side)
            "test": ("test_error", "fastreg"),
            "(torch)": ("test_error", "torch"),
            "gap": ("gap_error", "fastreg"),
            "zeros": ("zero_weights", "fastreg"),
            "attacked": ("attacked_accuracy", "fastreg"),
        }
        what = "Errors, zero weights and accuracy under attack in percent"
        if self.console.width < NARROW:
            shown = ("test", "(torch)") if self.console.width < VERY_NARROW else ("test", "(torch)", "gap")
            columns, what = {heading: columns[heading] for heading in shown}, "Errors in percent"
        table = Table(box=box.SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
        table.add_column("", no_wrap=self.console.width >= VERY_NARROW)
        for name in (*columns, "time"):
            style = "bold" if name in ("test", "time") else None
            table.add_column(name, justify="right", style=style, no_wrap=True)
        found = self.found
        for variant in dict.fromkeys(recipe.key for section in self.sections for recipe in section.trained):
            try:
                cells = [f"{found.mean(variant, *column):.1f}" for column in columns.values()]
                cells = [cell.replace("-", "−") for cell in cells]
                style = None if found.failure(variant) is None else "red"
                row = (found.titles[variant], *cells, f"{found.time_ratio(variant):.2f}")
            except NotMeasured:
                continue
            table.add_row(*row, style=style)
        if table.row_count:
            self.console.print(table)
            self.console.print(
                f"[bright_black]{what}, means over the seeds, with fastreg; then its time per epoch as a "
                "share of torch's.[/]\n"
            )
