"""The questions asked on a terminal: a table. An empty answer leaves a fact unsaid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunefork.advise.situation import CHANGES, TASKS, SituationError, load_situation

Ask = Callable[[str], str]
Say = Callable[[str], None]


YES_NO = ("yes", "no")


@dataclass(frozen=True, slots=True)
class Question:
    """One question, and the situation's key that its answer fills."""

    key: str
    text: str
    choices: tuple[str, ...] = ()


QUESTIONS: tuple[Question, ...] = (
    Question("model", "Which model? (hub id, folder, recipe file or size, e.g. 8B)"),
    Question("task", "What is it to do?", TASKS),
    Question("change", "What must change about it?", CHANGES),
    Question("examples", "How many training examples are there? (e.g. 5000, 50k)"),
    Question("tokens", "How many tokens are they together, if you know? (e.g. 10M)"),
    Question("tenants", "How many customers need a behaviour of their own?"),
    Question(
        "quality_point_value_usd", "What is one more percentage point of quality worth, US $?"
    ),
    Question("distribute", "Are the weights handed to others?", YES_NO),
    Question("gpus", "Which GPUs are at hand? (e.g. l40s, or h100 h100 for two)"),
    Question("budget_usd", "What may the training cost, US $?"),
    Question("deadline_hours", "In how many hours must it be done?"),
    Question("data_may_leave", "May the data leave the house?", YES_NO),
)
TRUTH = {"yes": True, "y": True, "no": False, "n": False}


def ask_all(ask: Ask, say: Say) -> dict[str, Any]:
    """Ask every question by `ask`; a wrong answer is explained by `say` and asked again."""
    say("Press Enter where you do not know: the advice then says what it assumes.\n")
    given = {question.key: _answer(question, ask, say) for question in QUESTIONS}
    return {key: value for key, value in given.items() if value is not None}


def _answer(question: Question, ask: Ask, say: Say) -> Any:
    """The answer to one question, None where it was left empty."""
    choices = f" [{', '.join(question.choices)}]" if question.choices else ""
    while True:
        text = ask(f"{question.text}{choices}").strip()
        if not text:
            return None
        is_truth = question.choices == YES_NO
        value: Any = TRUTH.get(text.lower(), text) if is_truth else text
        try:
            load_situation(None, {question.key: value})
        except SituationError as error:
            say(str(error).replace("situation: ", ""))
            continue
        return value
