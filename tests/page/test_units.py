import pytest

from tunefork.page.estimate import Estimate
from tunefork.page.units import (
    bytes_text,
    count_text,
    counted,
    difference_text,
    figure_text,
    rate_text,
    ratio_text,
    seconds_text,
    usd_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bytes_text(999), "999 B"),
        (bytes_text(999_960), "1.00 MB"),
        (bytes_text(19_600_000), "19.6 MB"),
        (bytes_text(2_910_000_000), "2.91 GB"),
        (bytes_text(5e15), "5,000.0 TB"),
        (count_text(9_999), "9,999"),
        (count_text(134_515_008), "134.5M"),
        (count_text(8_030_261_248), "8.03B"),
        (counted(1, "example"), "1 example"),
        (counted(50_000, "example"), "50,000 examples"),
        (counted(0.5, "epoch"), "0.5 epochs"),
        (counted(1.0, "epoch"), "1 epoch"),
        (seconds_text(4.21), "4.2 s"),
        (seconds_text(171), "171 s"),
        (seconds_text(1470), "24.5 min"),
        (seconds_text(18_720), "5.2 h"),
        (usd_text(0.0062), "$0.0062"),
        (usd_text(0.1), "$0.10"),
        (usd_text(1240), "$1,240"),
        (rate_text(0.0003), "3e-4"),
        (rate_text(2.5e-5), "2.5e-5"),
        (ratio_text(0.067), "0.07 times"),
        (ratio_text(1.04), "1.0 times"),
        (ratio_text(13.7), "14 times"),
        (
            figure_text("accuracy", Estimate(value=0.912, low=0.885, high=1.0)),
            "91.2 % (88.5 to 100.0)",
        ),
        (figure_text("loss", Estimate(value=0.5, low=0.4, high=0.6)), "0.5000 (0.4000 to 0.6000)"),
        (difference_text("accuracy", 0.018, signed=True), "+1.8 points"),
        (difference_text("accuracy", -0.01), "-1.0 point"),
        (difference_text("loss", 0.01), "0.0100"),
    ],
)
def test_quantities_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
