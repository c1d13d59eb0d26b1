"""All variants as they go: a table on a terminal, a line every few seconds anywhere else."""

import time
from dataclasses import dataclass
from typing import Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunefork.page.units import count_text
from tunefork.train.loop import StepRecord

State = Literal[
    "waiting", "training", "parked", "evaluating", "ok", "dropped", "failed", "interrupted"
]
_ENDED = ("ok", "dropped", "failed", "interrupted")
_SHOWN_FIRST: tuple[State, ...] = (
    "training",
    "evaluating",
    "failed",
    "parked",
    "ok",
    "dropped",
    "interrupted",
    "waiting",
)


@dataclass(slots=True)
class _Row:
    """What is known of one variant."""

    num_steps: int
    state: State = "waiting"
    step: int = 0
    loss: float | None = None
    validation_loss: float | None = None


class LiveView:
    """Shows each variant's state, step and losses, and the speed of all together."""

    def __init__(
        self, num_steps: dict[str, int], *, every_s: float, console: Console | None = None
    ) -> None:
        self.rows = {name: _Row(steps) for name, steps in num_steps.items()}
        self.every_s, self.console = every_s, console or Console(stderr=True)
        self.tokens, self.seconds = 0, 0.0
        """Of the passes after the first, which loads the base; evaluation is no part of them."""
        self._is_first = True
        self.last_line = time.perf_counter()
        self._seen: dict[str, int] = {}
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(
                console=self.console,
                get_renderable=self._render,
                refresh_per_second=2,
                transient=True,
            )

    def __enter__(self) -> Self:
        self.last_line = time.perf_counter()
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def begin(self, name: str, step: int, tokens: int) -> None:
        """A variant trains from now on, having taken `step` steps of `tokens` tokens before."""
        row = self.rows[name]
        row.state, row.step = "training", step
        self._seen[name] = tokens

    def on_step(self, name: str, record: StepRecord) -> None:
        """A variant took a step."""
        row = self.rows[name]
        row.step, row.loss = record.step, record.loss
        self.tokens += record.tokens - self._seen.get(name, 0)
        self._seen[name] = record.tokens

    def on_validation(self, name: str, loss: float) -> None:
        """A variant's loss on the validation examples was measured."""
        self.rows[name].validation_loss = loss

    def on_state(self, name: str, state: State, step: int | None = None) -> None:
        """A variant goes into another state, having taken `step` steps."""
        row = self.rows[name]
        row.state, row.step = state, row.step if step is None else step
        if state in _ENDED and not self.live:
            self._say(f"{name}: {self._ended(self.rows[name])}")

    def on_pass(self, seconds: float) -> None:
        """One pass is over: where there is no terminal, maybe say how far it is."""
        now = time.perf_counter()
        if self._is_first:
            self.tokens = 0
        else:
            self.seconds += seconds
        self._is_first = False
        if not self.live and now - self.last_line >= self.every_s:
            self.last_line = now
            self._say(self._summary())

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _ended(self, row: _Row) -> str:
        loss = row.validation_loss
        said = "" if loss is None else f", validation loss {loss:.4f}"
        return f"{row.state} after step {row.step}/{row.num_steps}{said}"

    def _summary(self) -> str:
        """`12 of 32 ended, 8 training (r8-s0 at 40/120, loss 1.234; ...)  5,230 tokens/s`"""
        ended = sum(row.state in _ENDED for row in self.rows.values())
        running = {name: row for name, row in self.rows.items() if row.state == "training"}
        shown = [
            f"{name} {row.step}/{row.num_steps}"
            + ("" if row.loss is None else f" loss {row.loss:.3f}")
            for name, row in list(running.items())[:4]
        ]
        more = f"; and {len(running) - 4} more" if len(running) > 4 else ""
        rate = f"  {count_text(self.tokens / self.seconds)} tokens/s" if self.seconds else ""
        return (
            f"{ended} of {len(self.rows)} ended, {len(running)} training"
            + (f" ({'; '.join(shown)}{more})" if shown else "")
            + rate
        )

    def _render(self) -> Group:
        table = Table("variant", "state", "step", "loss", "validation", box=None, pad_edge=False)
        order = sorted(self.rows.items(), key=lambda item: _SHOWN_FIRST.index(item[1].state))
        room = max(3, self.console.height - 4)
        for name, row in order[:room]:
            losses = ("" if x is None else f"{x:.4f}" for x in (row.loss, row.validation_loss))
            table.add_row(Text(name), row.state, f"{row.step}/{row.num_steps}", *losses)
        left = len(order) - room
        foot = self._summary() + (f"  ({left} more not shown)" if left > 0 else "")
        return Group(table, Text(foot))
