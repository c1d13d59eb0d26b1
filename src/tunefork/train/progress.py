"""Progress of a run: a bar on a terminal, one line every few seconds anywhere else.

A bar in a log file is thousands of lines of noise; silence in one is worse.
"""

import time
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tunefork.model.device import used_bytes
from tunefork.train.loop import StepRecord
from tunefork.train.state import Progress as RunProgress


class TrainProgress:
    """Shows loss, tokens/s, memory and time left of a run of `num_steps` steps.

    Rates are those of this process, which went on from `start`.
    """

    def __init__(
        self,
        label: str,
        *,
        num_steps: int,
        device: torch.device,
        every_s: float,
        start: RunProgress | None = None,
        console: Console | None = None,
    ) -> None:
        self.label, self.num_steps, self.device, self.every_s = label, num_steps, device, every_s
        self.done = start or RunProgress()
        self.console = console or Console(stderr=True)
        self.started = self.last_line = time.perf_counter()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}  {task.fields[facts]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(
                label, total=num_steps, completed=self.done.step, facts="first step ..."
            )

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def restart(self) -> None:
        """Rates are counted from now: what came before was no step."""
        self.started = self.last_line = time.perf_counter()

    def on_step(self, record: StepRecord) -> None:
        """Show one finished step."""
        now = time.perf_counter()
        facts = self._facts(record, now - self.started)
        if self.bar:
            self.bar.update(self.task, completed=record.step, facts=facts)
        elif now - self.last_line >= self.every_s or record.step == self.num_steps:
            self.last_line = now
            line = f"{self.label}: step {record.step}/{self.num_steps}  {facts}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _facts(self, record: StepRecord, seconds: float) -> str:
        steps, tokens = record.step - self.done.step, record.tokens - self.done.tokens
        left_s = seconds / steps * (self.num_steps - record.step)
        return (
            f"loss {record.loss:.3f}  {tokens / seconds:,.0f} tokens/s  "
            f"{used_bytes(self.device) / 2**30:.1f} GiB  {duration(left_s)} left"
        )


def duration(seconds: float) -> str:
    """`47 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
