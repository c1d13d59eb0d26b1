import io

from rich.console import Console

from tunefork.sweep.live import LiveView
from tunefork.train.loop import StepRecord


def _record(step: int, tokens: int) -> StepRecord:
    return StepRecord(step=step, tokens=tokens, loss=1.5, learning_rate=1e-4, grad_norm=1.0)


def _run(console: Console, count: int = 2) -> LiveView:
    names = {f"v[{at}]": 4 for at in range(count)}  # markup is no markup in a name
    with LiveView(names, every_s=0.0, console=console) as view:
        view.begin("v[0]", 1, 50)
        view.on_pass(60.0)  # which loaded the base
        view.on_step("v[0]", _record(2, 90))
        view.on_validation("v[0]", 1.25)
        view.on_pass(2.0)
        if view.live:
            view.live.refresh()
        view.on_state("v[0]", "dropped")
    return view


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    view = _run(Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "0 of 2 ended, 1 training (v[0] 1/4)"
    assert lines[1] == "0 of 2 ended, 1 training (v[0] 2/4 loss 1.500)  20 tokens/s"
    assert lines[2] == "v[0]: dropped after step 2/4, validation loss 1.2500"
    assert view.tokens == 40  # of this process: those before it went on are not counted
    assert "\x1b" not in stream.getvalue()


def test_on_a_terminal_all_variants_have_a_row_while_there_is_room() -> None:
    stream = io.StringIO()
    _run(Console(file=stream, width=80, height=8, force_terminal=True, legacy_windows=False), 9)
    assert "v[0]" in stream.getvalue() and "1.2500" in stream.getvalue()
    assert "5 more not shown" in stream.getvalue()
