"""The packaged rows, the user's rows over them, and what is said of wrong ones."""

from datetime import date
from pathlib import Path

import pytest

from tunefork.home import HOME
from tunefork.plan.catalogue import CatalogueError, load_catalogue

IDS = [
    "rtx3090",
    "rtx4090",
    "rtx5090",
    "a10g",
    "l4",
    "l40s",
    "a100-40",
    "a100-80",
    "h100",
    "h200",
    "b200",
]


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the user's without files."""
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_every_gpu_is_there_with_source_and_date() -> None:
    catalogue = load_catalogue()
    assert [gpu.id for gpu in catalogue.gpus] == IDS
    for gpu in catalogue.gpus:
        assert gpu.source and gpu.price_source
        assert date.fromisoformat(gpu.date) < date.fromisoformat(gpu.price_date)
        assert 0.9 * gpu.memory_bytes < gpu.usable_bytes < gpu.memory_bytes
        assert gpu.bf16_flops > 100 * gpu.bandwidth / 4, "FLOP/s and bytes/s are mixed up"
        assert gpu.int8_ops is None or 1.9 < gpu.int8_ops / gpu.bf16_flops < 2.1
    have_kernel = {gpu.id for gpu in catalogue.gpus if gpu.int8_ops is not None}
    assert have_kernel == {"h100", "h200"}


def test_units() -> None:
    h100 = load_catalogue().gpu("h100")
    assert (h100.memory_bytes, h100.bf16_flops, h100.bandwidth) == (80 * 2**30, 989e12, 3350e9)
    assert (h100.link_bandwidth, h100.usd_per_hour) == (450e9, 2.69)
    assert h100.int8_ops == 1979e12


def test_an_unknown_gpu_names_the_nearest_and_all() -> None:
    with pytest.raises(CatalogueError, match="'H100'.*did you mean 'h100'.*rtx3090.*b200"):
        load_catalogue().gpu("H100")
    with pytest.raises(CatalogueError, match="'rtx-4090'.*did you mean 'rtx4090'"):
        load_catalogue().machine(["rtx-4090"])


def test_a_machine_is_an_id_n_times() -> None:
    machine = load_catalogue().machine(["l4", "l4", "l4"])
    assert (machine.gpu.id, machine.count) == ("l4", 3)
    with pytest.raises(CatalogueError, match=r"different kinds \(l4, h100\).*of one kind"):
        load_catalogue().machine(["l4", "h100", "l4"])
    with pytest.raises(CatalogueError, match="no GPU is named"):
        load_catalogue().machine([])


def test_managed_services_by_size_and_price() -> None:
    offers = load_catalogue().managed(8e9, 10_000_000, date(2026, 11, 25))
    costs = {offer.service.id: offer.cost_usd for offer in offers}
    assert costs == {
        "tinker-8b": 4.0,
        "fireworks-16b": 5.0,
        "openai-small": 30.0,
        "openai-large": 250.0,
    }
    assert all(offer.is_open for offer in offers)
    big = load_catalogue().managed(70e9, 1e6, date(2027, 1, 6))
    assert [o.service.id for o in big if o.is_open] == ["fireworks-80b"]
    assert {o.service.id for o in big if not o.is_open} == {"openai-small", "openai-large"}
    assert all(o.service.closed for o in load_catalogue().managed(400e9, 1e6))


def test_the_users_rows_go_over_the_packaged(no_home: Path, tmp_path: Path) -> None:
    (no_home / "catalogue.yaml").write_text("gpus:\n- {id: h100, usd_per_hour: 2}\n")
    extra = tmp_path / "extra.yaml"
    extra.write_text(
        "gpus:\n- {id: h100, usd_per_hour: 0, price_source: ours, price_date: 2026-11-01}\n"
        "- {id: mi300x, name: MI300X, memory_gib: 192, usable_gib: 191, bf16_tflops: 1307,\n"
        "   int8_tops: 2614, bandwidth_gb_s: 5300, link_gb_s: 64, source: sheet,\n"
        "   date: 2023-12-06, usd_per_hour: 2.5, price_source: me, price_date: 2026-10-01}\n"
    )
    at_home = load_catalogue().gpu("h100")
    assert at_home.usd_per_hour == 2 and at_home.bf16_flops == 989e12
    assert at_home.price_source.endswith("home/catalogue.yaml")
    both = load_catalogue(extra)
    assert both.gpu("h100").usd_per_hour == 0 and both.gpu("h100").price_source == "ours"
    assert both.gpu("mi300x").memory_bytes == 192 * 2**30
    assert [gpu.id for gpu in both.gpus] == [*IDS, "mi300x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: [{id: h100, usd_per_hr: 2}]", r"row 1 \(h100\): usd_per_hr: unknown key; did you "),
        ("gpus: [{id: h100, usd_per_hour: -2}]", "usd_per_hour: .*greater than or equal to 0"),
        ("gpus: [{id: mine, usd_per_hour: 2}]", r"row 1 \(mine\): memory_gib: is missing"),
        ("gpus: [{usd_per_hour: 2}]", "gpus, row 1: id: is missing"),
        ("gpus: [{id: h100, usable_gib: 99}]", "usable_gib: 99 is more than memory_gib"),
        ("gpu: []", "gpu: unknown key; did you mean 'gpus'"),
        ("- 3", "must be a mapping"),
        ("gpus: [", ":1: is not YAML"),
        ("managed: [{id: tinker-8b, methods: [loar]}]", r"methods\.0: .*\(found 'loar'\)"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(CatalogueError, match=r"mine\.yaml.*" + message):
        load_catalogue(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"gone\.yaml: cannot be read.*give a catalogue file"):
        load_catalogue(tmp_path / "gone.yaml")
