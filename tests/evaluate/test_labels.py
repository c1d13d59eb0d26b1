"""All labels in one row against each label alone."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    MistralConfig,
    PretrainedConfig,
)

from tests.tiny import CONFIGS, VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.errors import DataError
from tunefork.evaluate import labels as module
from tunefork.evaluate.answers import ROOT, grow
from tunefork.evaluate.labels import label_columns, score_apart, score_together
from tunefork.evaluate.loss import loss_columns
from tunefork.model.attention import NAME, register

ANSWERS = [[7, 8, 2], [7, 8, 9, 2], [7, 2], [10, 2], [11, 12, 13, 14, 2], [10, 8, 2]]
LABELS = ["a", "b", "c", "d", "e", "f"]


def _examples(lengths: tuple[int, ...] = (12, 5, 20, 9)) -> list[Encoded]:
    rng = np.random.default_rng(0)
    examples = []
    for at, length in enumerate(lengths):
        answer = np.array(ANSWERS[at % len(ANSWERS)], dtype=np.int32)
        ids = np.concatenate([rng.integers(15, VOCABULARY, length, dtype=np.int32), answer])
        examples.append(
            Encoded(
                f"rows:{at + 1}",
                ids,
                np.arange(len(ids)) >= length,
                prompt_length=length,
                answer=LABELS[at % len(ANSWERS)],
                label=LABELS[at % len(ANSWERS)],
            )
        )
    return examples


def test_the_tree_shares_prefixes() -> None:
    tree = grow([[7, 8, 2], [7, 8, 9, 2], [7, 2], [10, 2]])
    assert tree.tokens == (7, 8, 9, 10) and tree.parents == (ROOT, 0, 1, ROOT)
    assert tree.depths.tolist() == [1, 2, 3, 1]
    assert tree.edges[0] == (ROOT, 7) and len(tree.edges) == 8
    assert [[tree.edges[e][1] for e in path] for path in tree.paths][1] == [7, 8, 9, 2]
    assert tree.sees[2].tolist() == [True, True, True, False]


@pytest.mark.parametrize("max_tokens", [1, 70, 1000])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", NAME])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_together_equals_apart(architecture: str, implementation: str, max_tokens: int) -> None:
    register()
    model = tiny_model(architecture, attn_implementation=implementation)
    with torch.inference_mode():
        together = score_together(model, _examples(), ANSWERS, max_tokens=max_tokens, pad_id=0)
        apart = score_apart(model, _examples(), ANSWERS, max_tokens=max_tokens, pad_id=0)
    np.testing.assert_allclose(together, apart, atol=1e-4)
    assert np.ptp(apart, axis=0).min() > 1e-3  # the prompt matters


def test_one_window_for_all_layers() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    with torch.inference_mode():
        together = score_together(model, _examples(), ANSWERS, max_tokens=1000, pad_id=0)
        apart = score_apart(model, _examples(), ANSWERS, max_tokens=1000, pad_id=0)
        model.config.sliding_window = None
        unwindowed = score_together(model, _examples(), ANSWERS, max_tokens=1000, pad_id=0)
    np.testing.assert_allclose(together, apart, atol=1e-4)
    assert np.abs(unwindowed - together).max() > 1e-3


def test_where_the_ways_differ_the_definition_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny_model("llama"), _examples()
    expected = score_apart(model, examples, ANSWERS, max_tokens=1000, pad_id=0).argmax(-1)

    def wrong(*_: object, **__: object) -> np.ndarray:
        return np.tile(np.eye(len(ANSWERS))[(expected[0] + 1) % len(ANSWERS)], (len(examples), 1))

    monkeypatch.setattr(
        module, "score_together", lambda model, examples, *a, **k: wrong()[: len(examples)]
    )
    columns = label_columns(
        model, examples, LABELS, ANSWERS, max_tokens=1000, by_token=False, pad_id=0
    )
    assert columns["predicted"].tolist() == expected.tolist()
    assert columns["gold"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_where_a_tree_is_refused_the_definition_is_used(config: PretrainedConfig) -> None:
    """ALiBi counts positions in a mask that has to be (R, T)."""
    torch.manual_seed(0)
    model, examples = AutoModelForCausalLM.from_config(config).eval(), _examples()
    with pytest.raises(ValueError, match="too many values to unpack"):
        score_together(model, examples, ANSWERS, max_tokens=1000, pad_id=0)
    expected = score_apart(model, examples, ANSWERS, max_tokens=1000, pad_id=0).argmax(-1)
    columns = label_columns(
        model, examples, LABELS, ANSWERS, max_tokens=1000, by_token=False, pad_id=0
    )
    assert columns["predicted"].tolist() == expected.tolist()


def test_memory_that_runs_out_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "score_together", full)
    with pytest.raises(torch.OutOfMemoryError):
        label_columns(
            tiny_model(), _examples(), LABELS, ANSWERS, max_tokens=99, by_token=False, pad_id=0
        )


def test_by_token_favours_long_answers() -> None:
    model, examples = tiny_model("llama"), _examples()
    options = {"max_tokens": 1000, "pad_id": 0}
    total = score_apart(model, examples, ANSWERS, **options)
    mean = total / np.array([len(answer) for answer in ANSWERS])
    by_token = label_columns(model, examples, LABELS, ANSWERS, by_token=True, **options)
    whole = label_columns(model, examples, LABELS, ANSWERS, by_token=False, **options)
    assert by_token["predicted"].tolist() == mean.argmax(-1).tolist()
    assert whole["predicted"].tolist() == total.argmax(-1).tolist()


def test_an_answer_tokenised_otherwise_is_named() -> None:
    answers = [*ANSWERS[:1], [7, 9, 2], *ANSWERS[2:]]
    with pytest.raises(DataError, match="rows:2: its answer is cut by .* or tokenised otherwise"):
        label_columns(
            tiny_model(), _examples(), LABELS, answers, max_tokens=99, by_token=False, pad_id=0
        )


def test_the_loss_is_that_of_the_answers() -> None:
    model, examples = tiny_model("llama"), _examples()
    expected = loss_columns(model, examples, max_tokens=1000, packing=True, pad_id=0)
    for by_token in (False, True):
        columns = label_columns(
            model, examples, LABELS, ANSWERS, max_tokens=1000, by_token=by_token, pad_id=0
        )
        np.testing.assert_allclose(columns["loss_sum"], expected["loss_sum"], rtol=1e-5)
        assert columns["tokens"].tolist() == expected["tokens"].tolist()
