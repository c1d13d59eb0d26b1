"""Matrices on their way to a device, through a small piece of memory."""

import torch

from tunefork.serve.engines.ferry import Ferry


def test_all_arrive_as_they_were_and_none_is_overtaken() -> None:
    """On a CPU what was carried lies in the ferry's own memory, until all of it has arrived."""
    torch.manual_seed(0)
    arrivals: list[bool] = []
    on_their_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def arrive() -> None:
        assert on_their_way
        arrivals.extend(torch.equal(sent, found) for sent, found in on_their_way)
        on_their_way.clear()

    ferry = Ferry(4096, torch.device("cpu"), arrive)
    dtypes = (torch.bfloat16, torch.float64, torch.float32)
    for at in range(30):
        sent = torch.randn(5, 3 + at).to(dtypes[at % 3])
        found = ferry.carry(sent)  # may wait for those before it
        on_their_way.append((sent, found))
    largest = torch.randn(4096 // 4)
    on_their_way.append((largest, ferry.carry(largest)))
    arrive()
    assert arrivals == [True] * 31
