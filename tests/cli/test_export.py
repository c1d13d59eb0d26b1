"""`tunefork merge` and `tunefork export`, from a run that `tunefork train` left."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import SECRET, Call


def test_a_run_is_merged_exported_and_refused(
    tunefork: Call, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    assert tunefork("train", recipe, "--out", run).status == 0

    merged = tunefork("merge", run, "--out", tmp_path / "merged", "--recipe", recipe)
    assert merged.status == 0, merged.err
    assert "mean KL" in merged.out and "6 evaluation examples of eval.jsonl" in merged.out
    assert "accuracy: " in merged.out and f"tunefork chat {tmp_path / 'merged'}" in merged.out
    assert SECRET not in (tmp_path / "merged" / "README.md").read_text()

    served = tunefork("export", run, "--to", "vllm", "--out", tmp_path / "v", "--dtype", "bf16")
    assert served.status == 0 and "run it: vllm serve" in served.out

    told = tunefork("export", run, "--to", "gguf", "--out", tmp_path / "g", "--json")
    assert told.status == 0 and json.loads(told.out)["passed"] is True

    failed = tunefork("merge", run, "--out", tmp_path / "no", "--min-top1", 1, "--max-kl", 0)
    assert failed.status == 1 and "not published" in failed.err
    assert (tmp_path / "no.failed" / "proof.json").exists() and not (tmp_path / "no").exists()

    both = tunefork("merge", run, run, "--combine", "cat", "--out", tmp_path / "both")
    assert both.status == 0 and (tmp_path / "both" / "adapter_config.json").exists()


def test_what_cannot_be_is_said(tunefork: Call, base: Path, tmp_path: Path) -> None:
    for arguments, status, message in (
        (("merge", base, "--out", tmp_path / "o"), 2, "nothing to merge"),
        (("merge", base, "--out", tmp_path / "o", "--density", 0.5), 2, "--weights, --density"),
        (("merge", base, base, "--out", tmp_path / "o"), 2, "--combine: None is none of linear"),
        (("export", base, "--to", "vllm", "--out", tmp_path / "o"), 2, "has no adapter"),
        (("export", base, "--to", "onnx", "--out", tmp_path / "o"), 2, "onnx"),
    ):
        ended = tunefork(*arguments)
        assert ended.status == status and message in ended.err, ended.err
        assert not (tmp_path / "o").exists()
