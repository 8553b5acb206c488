"""What the terminal shows: a bar while the cases run, then the table. Where the output is no terminal, a line
per case.
"""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from . import table


class Progress:
    """A context manager around the cases; `summary` after it."""

    def __init__(self, results: dict, cases: int):
        self.console = Console(highlight=False)
        self.console.print(f"[bold]fastreg bench[/]  {escape(table.machine(results))}\n")
        self.bars = Bars(
            BarColumn(bar_width=28, complete_style="blue", finished_style="blue"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[bright_black]{task.description}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bars.add_task("", total=cases)

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *exception):
        self.bars.update(self.task, description="")
        self.bars.stop()

    def begins(self, case) -> None:
        """A case is next."""
        self.bars.update(self.task, description=escape(case.name))

    def finished(self, row: dict) -> None:
        """A case has its row."""
        self.bars.advance(self.task)
        if not self.console.is_terminal:
            compiled = f", torch.compile {table.times(row, 'compile')}" if row["against_compile"] else ""
            others = f", {table.others(row)}" if row["against_others"] else ""
            self.console.print(
                Text(f"{table.name(row)}: torch {table.times(row, 'eager')}{compiled}{others}"),
                soft_wrap=True,
            )

    def failed(self, message: str) -> None:
        """A case has none."""
        self.bars.advance(self.task)
        self.console.print(Text(message, style="red"), soft_wrap=True)

    def summary(self, results: dict, folder: Path, written: list[str]) -> None:
        """The table, what it means and where the files are."""
        console = self.console if self.console.is_terminal else Console(highlight=False, width=150)
        shown = table.columns(results)
        if console.width >= 130:
            shown.insert(1, ("quartiles", table.quartiles))
        else:  # the file has them
            shown = shown[:3]
        grid = Table(box=box.SIMPLE_HEAD, header_style="bright_black", pad_edge=False)
        grid.add_column("")
        for title, _ in shown:
            grid.add_column(title, justify="right", style="bright_black" if title == "quartiles" else None)
        before = None
        for row in table.ordered(results):
            if before != row["work"]:
                if before:
                    grid.add_section()
                grid.add_row(Text(row["work"], style="bold"))
                before = row["work"]
            label = f"{row['size']}, {row['dtype']}"
            grid.add_row(label, *(Text(text := cell(row), style=_style(text)) for _, cell in shown))
        if results["rows"]:
            console.print(grid)
            console.print(f"{table.reached(results)} {table.spread(results)}")
            console.print(
                "[bright_black]Ratios are medians, quartiles are of the ratio to torch; memory is ours : "
                "torch's.[/]"
            )
        for row in table.ordered(results):
            if row["against_others"]:
                console.print(Text(f"{table.name(row)}: {table.others(row)}"), soft_wrap=True)
        for note in dict.fromkeys(note for row in results["rows"] for note in row["notes"]):
            console.print(Text(note, style="bright_black"), soft_wrap=True)
        if results["partial"]:
            console.print(f"\nInterrupted after {len(results['rows'])} of {results['planned']} cases.")
        console.print(f"\nIn {folder.resolve()}: {', '.join(written)}", soft_wrap=True, markup=False)


def _style(text: str) -> str:
    slower = text.endswith("×") and float(text[:-1]) < 1
    return "red" if "✗" in text or slower else "blue" if "✓" in text else ""
