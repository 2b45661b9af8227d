"""The console output of a run: a progress bar on a terminal, plain lines elsewhere."""

import os
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flax_resnet.text import printable

_COLUMNS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "top5_accuracy": "top 5",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "f1_macro": "F1",
}
_SECONDS_BETWEEN_LINES = 60  # within an epoch, if there is no bar


class _Harmless:
    """A renderable whose text is made `printable`, except undecodable bytes of file names."""

    def __init__(self, renderable):
        self._renderable = renderable

    def __rich_console__(self, console, options):
        for segment in console.render(self._renderable, options):
            words = segment.text
            if not (segment.control or words.isprintable()):
                words = "".join(map(_harmless, words))
            yield segment._replace(text=words)


def _harmless(character):
    a_byte = "\udc80" <= character <= "\udcff"
    return character if character == "\n" or a_byte else printable(character)


class _Console(Console):
    def on_broken_pipe(self):
        raise  # the default handler ends the process


class Display:
    """Prints the progress of a run. A training goes on without output if printing fails."""

    name = ""

    def __init__(self, console: Console | None = None, *, quiet: bool = False, stderr=False):
        plain = {"soft_wrap": True, "highlight": False, "emoji": False, "markup": False}
        self.console = console or _Console(**plain, quiet=quiet, stderr=stderr)
        self._bar, self._training, self._silent = None, False, False

    def of_member(self, name: str) -> "Display":
        """A display of one of several runs, on the same console; its lines begin with the name."""
        display = Display(self.console)
        display.name = name
        return display

    def say(self, text: str):
        """Print one line with control characters escaped."""
        self.show(Text(f"{self.name}: {text}" if self.name else text))

    def warn(self, warnings: Iterable[str]):
        """Print a line for each warning."""
        for warning in warnings:
            self.say(f"warning: {warning}")

    def show(self, renderable):
        """Print a Rich renderable, such as a table, with control characters escaped."""
        try:
            self.console.print(_Harmless(renderable))
        except OSError as error:
            if not (self._training or isinstance(error, BrokenPipeError)):
                raise
            self.console.quiet = True
            drop_output(self.console.file)

    def start(self, *, total_steps: int, done_steps: int, batch_size: int, silent: bool = False):
        """Start the bar of a run; a silent one shows nothing between the epochs."""
        self._training, self._silent = True, silent
        self._batch_size, self._total, self._from = batch_size, total_steps, done_steps
        self._since = self._last_line = time.monotonic()
        if silent or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(
            "compiling", total=total_steps, completed=done_steps, numbers=""
        )
        self._bar.start()

    def step(self, *, step: int, epoch: int, epochs: int, loss: float, accuracy: float):
        """Update the bar, or print a line once a minute."""
        if self._silent:
            return
        now = time.monotonic()
        rate = (step - self._from) * self._batch_size / (now - self._since)
        numbers = f"loss {loss:.4f}  accuracy {accuracy:.2%}  {rate:,.0f} images/s"
        if self._bar is None:
            if now - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = now
                self.say(
                    f"epoch {epoch:3d}/{epochs} | step {step:,} of {self._total:,} | {numbers}"
                )
            return
        self._bar.update(
            self._task, completed=step, description=f"epoch {epoch}/{epochs}", numbers=numbers
        )

    def epoch(self, row: dict, timing: dict, epochs: int):
        """Print the line of an epoch, above the bar if there is one."""
        parts = [f"epoch {row['epoch']:3d}/{epochs}"]
        for split in ("train", "validation"):
            if f"{split}_loss" in row:
                parts.append(
                    f"{split} loss {row[f'{split}_loss']:.4f}"
                    f" accuracy {row[f'{split}_accuracy']:.2%}"
                )
        parts.append(f"{timing['images_per_second']:,.0f} images/s")
        self.say(" | ".join(parts))

    def stop(self):
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def results(self, splits: dict[str, dict], num_classes: int | None = None):
        """Print the final table."""
        table = results_table(splits, num_classes)
        table.title = self.name or None
        self.show(table)


def drop_output(file: TextIO):
    """Send the rest of a stream's output to /dev/null; Python would try to write it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, file.fileno())
    os.close(null)


def results_table(splits: dict[str, dict], num_classes: int | None = None) -> Table:
    """A table of {"test": {"loss", "accuracy", ...}}, a row a split, at most 80 columns wide."""
    table = Table(caption="precision, recall and F1: means over classes", caption_justify="left")
    table.add_column("split", overflow="fold")  # names of runs may be long
    for header in _COLUMNS.values():
        if header == "top 5" and num_classes:
            header = f"top {min(5, num_classes)}"
        table.add_column(header, justify="right", no_wrap=True)
    for split, values in splits.items():
        table.add_row(split, *(f"{values[name]:.4f}" for name in _COLUMNS))
    return table
