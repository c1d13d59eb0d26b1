"""`tunefork chat --server` against our own gateway, and what it says where there is none."""

import pytest

from tests.cli.conftest import Call, tunefork
from tests.serve.fake_engine import FakeEngine
from tests.serve.servers import Running

__all__ = ["tunefork"]


def test_answers_are_streamed_and_turns_are_kept(
    server: Running, tunefork: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "and again", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    ended = tunefork(
        "chat", "--server", server.url + "/v1", "--model", "tiny-base", "--system", "Be brief"
    )
    assert ended.status == 0, ended.err
    first, _ = ended.out.splitlines()
    assert first.startswith("base was asked ")
    engine = server.gateway.engine
    assert isinstance(engine, FakeEngine)
    one, two = engine.seen[-2:]
    assert two.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids
    assert len(two.prompt_ids) > len(one.prompt_ids)
    assert one.sampling.temperature == 0.0


def test_what_goes_wrong_is_said_without_a_traceback(
    server: Running, tunefork: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("chat", "-m", "hi", "--server")
    missing = tunefork(*asked, server.url, "--model", "nobody")
    assert (missing.status, "does not exist" in missing.err) == (2, True)
    nowhere = tunefork(*asked, "http://127.0.0.1:1", "--model", "tiny-base")
    assert (nowhere.status, "does not answer" in nowhere.err) == (1, True)
    for arguments, said in (
        (("chat", "-m", "hi"), "RUN_OR_MODEL"),
        (("chat", "x", "-m", "hi", "--server", server.url, "--model", "tiny-base"), "one of both"),
        ((*asked, server.url), "--model"),
        ((*asked, "localhost", "--model", "tiny-base"), "http://127.0.0.1:8000"),
        ((*asked, server.url, "--model", "tiny-base", "--key-env", "UNSET_KEY"), "UNSET_KEY"),
        (("chat", "x", "-m", "hi", "--key-env", "HOME"), "--key-env"),
    ):
        ended = tunefork(*arguments)
        assert (ended.status, said in ended.err) == (2, True), (arguments, ended.err)
