"""What the terminal shows: a bar per method while it trains, then the table and the claims.

Where the output is no terminal (a file, CI), a line per finished training takes the place of the bars.
"""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from .results import NotMeasured, Results
from .section import Section
from .train import Recipe, Run

USUAL_EXAMPLES = 1000  # training examples of the packaged digits, for which the promised times hold


class Progress:
    """A context manager around the work; the methods that say what is done report from inside, `summary`
    after it.
    """

    def __init__(self, found: Results, sections: tuple[Section, ...]):
        self.console = Console(highlight=False)
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
        self.console.print()
        self.bars = Bars(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=14, complete_style="blue", finished_style="blue"),
            TextColumn("[bright_black]{task.fields[note]:<30}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
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
            self.console.print(
                f"seed {seed + 1}/{self.seeds}  {recipe.title:<24}  test error torch / fastreg {errors} %"
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
        console = self.console if self.console.is_terminal else Console(highlight=False, width=120)
        table = Table(box=box.SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in ("test", "(torch)", "gap", "zeros", "attacked", "time"):
            table.add_column(name, justify="right", style="bold" if name in ("test", "time") else None)
        keys = ("test_error", None, "gap_error", "zero_weights", "attacked_accuracy")
        for variant in dict.fromkeys(recipe.key for section in self.sections for recipe in section.trained):
            found = self.found
            try:
                cells = [
                    f"{found.mean(variant, key or 'test_error', 'fastreg' if key else 'torch'):.1f}"
                    for key in keys
                ]
                table.add_row(found.titles[variant], *cells, f"{found.time_ratio(variant):.2f}")
            except NotMeasured:
                continue
        if table.row_count:
            console.print(table)
            console.print(
                "[bright_black]Errors, zero weights and accuracy under attack in percent, means over the "
                "seeds, with fastreg; then its time per epoch as a share of torch's.[/]\n"
            )
        marks = {True: ("✓", "blue"), False: ("✗", "red"), None: ("–", "bright_black")}
        for claim in (claim for judged in claims.values() for claim in judged):
            mark, style = marks[claim.holds]
            console.print(Text(f"{mark} {claim.title}", style=style))
            console.print(Text(f"  {claim.evidence}", style="bright_black"))
        if self.found.finished < self.found.planned:
            console.print(
                f"\nInterrupted after {self.found.finished} of {self.found.planned} trainings and "
                f"measurements."
            )
        console.print(f"\nReport: {page.resolve()}", soft_wrap=True, markup=False)
