"""What a person sees of a run: one progress bar on a terminal, plain lines elsewhere."""

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
_SECONDS_BETWEEN_LINES = 60  # within an epoch, where there is no bar


class _Harmless:
    """A renderable whose words have passed through `printable`; bytes of file names stay."""

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
        raise  # by default it ends the process


class Display:
    """Prints; where the console is no terminal, in plain lines. What nobody can or wants to read
    does not stop a training: it goes on without its output."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False, stderr=False):
        plain = {"soft_wrap": True, "highlight": False, "emoji": False, "markup": False}
        self.console = console or _Console(**plain, quiet=quiet, stderr=stderr)
        self._bar, self._training = None, False

    def say(self, text: str):
        """One line, without the characters that steer a terminal."""
        self.show(Text(text))

    def warn(self, warnings: Iterable[str]):
        """A line for each warning."""
        for warning in warnings:
            self.say(f"warning: {warning}")

    def show(self, renderable):
        """A table, the same way."""
        try:
            self.console.print(_Harmless(renderable))
        except OSError as error:
            if not (self._training or isinstance(error, BrokenPipeError)):
                raise
            self.console.quiet = True
            drop_output(self.console.file)

    def start(self, *, total_steps: int, done_steps: int, batch_size: int):
        """Begin the bar of a run."""
        self._training = True
        self._batch_size, self._total, self._from = batch_size, total_steps, done_steps
        self._since = self._last_line = time.monotonic()
        if not self.console.is_terminal:
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
        """Move the bar."""
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
        """One line an epoch, above the bar if there is one."""
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
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def results(self, splits: dict[str, dict], num_classes: int | None = None):
        """The final table: a row a split."""
        self.show(results_table(splits, num_classes))


def drop_output(file: TextIO):
    """What is still to be printed goes nowhere; Python would try again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, file.fileno())
    os.close(null)


def results_table(splits: dict[str, dict], num_classes: int | None = None) -> Table:
    """{"test": {"loss", "accuracy", ...}} -> a row a split, no wider than 80 characters."""
    table = Table(caption="precision, recall and F1: means over classes", caption_justify="left")
    table.add_column("split", no_wrap=True)
    for header in _COLUMNS.values():
        if header == "top 5" and num_classes:
            header = f"top {min(5, num_classes)}"
        table.add_column(header, justify="right", no_wrap=True)
    for split, values in splits.items():
        table.add_row(split, *(f"{values[name]:.4f}" for name in _COLUMNS))
    return table
