"""Which tiles a product takes on a Hopper GPU."""

import pytest

from tunefork.kernels.narrow_product import columns_on


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [
        (16_384, 4096, 256),  # many tiles: the wide ones read less
        (16_384, 28_672, 256),
        (512, 4096, 128),  # 32 wide tiles for 66 clusters, or 64 slim ones
        (512, 28_672, 256),
        (1, 16, 128),
    ],
)
def test_tiles_are_slim_where_wide_ones_leave_processors_idle(
    rows: int, columns: int, width: int
) -> None:
    assert columns_on(rows, columns, processors=132) == width
