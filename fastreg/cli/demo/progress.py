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

from .data import Data
from .train import Recipe, Run

USUAL_EXAMPLES = 1000  # training examples of the packaged digits, for which the promised times hold


class Progress:
    """A context manager around the training; `epoch` and `finished` report from inside, `summary` after it."""

    def __init__(self, data: Data, recipes: tuple[Recipe, ...], seeds: int, epochs: int):
        self.console = Console(highlight=False)
        self.seeds, self.epochs = seeds, epochs
        plural = "s" if seeds > 1 else ""
        self.console.print(
            f"[bold]fastreg demo[/]  {escape(data.name)}\n"
            f"{len(data.y_train):,} to train, {len(data.y_validation):,} to validate, {len(data.y_test):,} to test · "
            f"{len(recipes)} methods × {seeds} seed{plural} × {{torch, fastreg}} · {epochs} epochs"
        )
        times = len(data.y_train) / USUAL_EXAMPLES
        if times >= 2:
            self.console.print(f"This is {times:.0f} times the usual number of images and takes as much longer.")
        self.console.print()
        self.bars = Bars(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=28, complete_style="blue", finished_style="blue"),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("[bright_black]{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks = {r: self.bars.add_task(r.title, total=seeds * epochs, note="", start=False) for r in recipes}

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *exception):
        for task in self.tasks.values():
            self.bars.stop_task(task)
        self.bars.stop()

    def epoch(self, recipe: Recipe, pair: list[Run]) -> None:
        """One more epoch of both sides."""
        errors = " / ".join(f"{run.curves['validation_error'][-1]:.1f}" for run in pair)
        task = self.tasks[recipe]
        self.bars.start_task(task)
        completed = pair[0].seed * self.epochs + max(len(run.epoch_ms) for run in pair)
        self.bars.update(task, completed=completed, note=f"validation error {errors} %")

    def finished(self, recipe: Recipe, pair: list[Run]) -> None:
        """Both sides of a method and a seed are done."""
        task, done = self.tasks[recipe], pair[0].seed + 1
        errors = " / ".join(f"{run.measured['test_error']:.1f}" for run in pair)
        self.bars.update(task, completed=done * self.epochs, note=f"test error {errors} %")
        if done == self.seeds:
            self.bars.stop_task(task)
        if not self.console.is_terminal:
            self.console.print(f"seed {done}/{self.seeds}  {recipe.title:<20}  test error torch / fastreg {errors} %")

    def summary(self, results: dict, page: Path) -> None:
        """The table, the claims and where the page is."""
        console = self.console if self.console.is_terminal else Console(highlight=False, width=120)
        table = Table(box=box.SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
        table.add_column("")
        for name in ("train", "valid.", "test", "(torch)", "gap", "zeros", "attacked", "torch", "fastreg", "ratio"):
            table.add_column(name, justify="right", style="bold" if name in ("test", "ratio") else None)
        keys = ("train_error", "validation_error", "test_error", None, "gap_error", "zero_weights", "attacked_accuracy")
        for row in results["summary"]:
            ours, theirs = row.get("fastreg"), row.get("torch")
            if ours and theirs:
                cells = [f"{ours[key]:.1f}" if key else f"{theirs['test_error']:.1f}" for key in keys]
                cells += [f"{theirs['epoch_ms']:.0f} ms", f"{ours['epoch_ms']:.0f} ms", f"{row['time_ratio']:.2f}"]
                table.add_row(row["title"], *cells)
        if results["runs"]:
            console.print(table)
            console.print(
                "[bright_black]Errors, zero weights and accuracy under attack in percent, means over the seeds, with fastreg; "
                "then the median time of an epoch.[/]\n"
            )
        marks = {True: ("✓", "blue"), False: ("✗", "red"), None: ("–", "bright_black")}
        for claim in results["claims"]:
            mark, style = marks[claim["holds"]]
            line = Text(f"{mark} {claim['title']}", style=style)
            console.print(line)
            console.print(Text(f"  {claim['evidence']}", style="bright_black"))
        if results["partial"]:
            console.print(f"\nInterrupted after {results['runs_finished']} of {results['runs_planned']} trainings.")
        console.print(f"\nReport: {page.resolve()}", soft_wrap=True, markup=False)
