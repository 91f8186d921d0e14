"""scaling.py: the formula by hand, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step import scaling
from benchmarks.step.scaling import (
    Links,
    Sum,
    exposed_seconds,
    flat_sums,
    overlapped_sums,
    update_seconds,
)

SMALL = ["patch_size=4", "embed_dim=8", "depths=(1, 1)", "num_heads=(1, 2)", "window_size=2"]


@pytest.fixture
def without_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes hops and the start of an all-reduce take no time."""
    for name, value in {"RING_LATENCY_S": (0, 0), "TREE_LATENCY_S": (0, 0), "START_S": 0}.items():
        monkeypatch.setattr(scaling, name, value)


def links(**changes: Any) -> Links:
    """100 MB/s in a node and 50 between nodes."""
    values = {"intra_bytes_per_s": 100e6, "inter_bytes_per_s": 50e6}
    return Links(**values | changes)


def end(share: float, nbytes: float) -> list[Sum]:
    return [Sum(share, nbytes)]


def test_one_gpu_has_no_communication():
    assert update_seconds(1, 0.5, 3, end(1, 400e6), links()) == 1.5


@pytest.mark.usefixtures("without_latency")
def test_a_ring_moves_twice_all_but_one_nth_over_its_slowest_link():
    assert links().all_reduce_seconds(2, 10e6) == pytest.approx(0.1)
    assert links().all_reduce_seconds(8, 10e6) == pytest.approx(2 * 7 / 8 * 0.1)
    assert links().all_reduce_seconds(16, 10e6) == pytest.approx(2 * 15 / 16 * 0.2)
    fast_network = links(inter_bytes_per_s=1e12)
    assert fast_network.all_reduce_seconds(16, 10e6) == pytest.approx(2 * 15 / 16 * 0.1)
    four_cards = links(inter_bytes_per_s=20e6, node_links=4)
    assert four_cards.all_reduce_seconds(16, 10e6) == pytest.approx(2 * 15 / 16 * 10 / 80)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (2, 2 * 3.4),
        (8, 14 * 3.4),  # a ring
        (16, 14 * 4.0 + 2 * 14),  # a tree: 28 hops of a ring would take longer
        (64, 14 * 4.0 + 2 * 3 * 14),
    ],
)
def test_each_all_reduce_waits_for_its_hops(gpus, expected):
    free = Links(float("inf"), float("inf"))
    assert free.all_reduce_seconds(gpus, 1000) == pytest.approx((8.4 + expected) * 1e-6)


def test_flat_sums_have_at_most_128_mib():
    sums = flat_sums((2 * 128 << 20) + 1)
    assert [s.nbytes for s in sums] == [128 << 20, 128 << 20, 1]
    assert {s.begin for s in sums} == {1.0}


@pytest.mark.usefixtures("without_latency")
def test_half_the_bandwidth_adds_the_all_reduce_without_overlap():
    case = (4, 0.5, 1, end(1, 10e6))
    half = links(intra_bytes_per_s=50e6)
    added = update_seconds(*case, half) - update_seconds(*case, links())
    assert added == pytest.approx(2 * 3 / 4 * 10e6 / 100e6)


@pytest.mark.usefixtures("without_latency")
@pytest.mark.parametrize(
    ("sums", "exposed"),
    [
        ([(1.0, 2)], 2),  # at the end, nothing hides it
        ([(0.0, 2)], 0),
        ([(0.0, 6)], 1),
        # the second all-reduce begins when the first one has ended
        ([(0.4, 4), (0.6, 2)], 3),
        ([(0.2, 1), (1.0, 1)], 1),
    ],
)
def test_kernels_hide_what_is_begun_before_them(sums, exposed):
    """A backward of 5 s. Among two GPUs, an all-reduce of n bytes takes n seconds."""
    slow = links(intra_bytes_per_s=1.0)
    assert exposed_seconds(2, 5.0, [Sum(*s) for s in sums], slow) == pytest.approx(exposed)


@pytest.mark.usefixtures("without_latency")
def test_an_update_hides_what_fits_beside_its_backward():
    """The 0.1 s of the all-reduce begin at half of the backward, two thirds of 0.06 s."""
    sums = end(0.5, 10e6)
    assert update_seconds(2, 0.06, 1, sums, links()) == pytest.approx(0.06 + 0.1 - 0.02)
    assert update_seconds(2, 6.0, 1, sums, links()) == pytest.approx(6.0)


def test_the_schedule_of_another_network_is_scaled():
    record = {"rows": [{"sums": [[0.25, 30], [0.5, 10]]}]}
    assert overlapped_sums(record, 8) == [(0.25, 6), (0.5, 2)]


def predicted(tmp_path: Path, *argv: str) -> dict:
    output = tmp_path / "made.json"
    assert scaling.main([*argv, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_accumulation_divides_communication_and_fast_links_scale_linearly(tmp_path, capsys):
    row = {"arm": "fast", "method": "gradnorm", "schedule": "exact", "images_per_s": 1000.0}
    rows = [row | {"precision": "bf16"}]
    path = record_of(tmp_path, rows=rows, batch=10, device="NVIDIA H200")
    flags = ("--record", str(path), "--gpus", "1", "16")
    once = predicted(tmp_path, *flags)
    four = predicted(tmp_path, *flags, "--grad-accum-steps", "4")
    for record, global_batch in ((once, 160), (four, 640)):
        one, many = record["rows"][:2]
        assert (many["grad_sync"], many["grad_dtype"]) == ("flat", "fp32")
        assert (one["images_per_s"], one["efficiency"]) == pytest.approx((1000, 1))
        assert (many["nodes"], many["global_batch"]) == (2, global_batch)
        assert many["images_per_s"] == pytest.approx(global_batch / many["update_s"])
        assert many["days"] == pytest.approx(128_116_700 / many["images_per_s"] / 86400)
    exposed = [r["rows"][1]["update_s"] - n * 0.01 for r, n in ((once, 1), (four, 4))]
    assert exposed[0] == pytest.approx(exposed[1])
    assert exposed[0] == pytest.approx(once["rows"][1]["all_reduce_s"])
    assert once["prediction"] and "Prediction" in capsys.readouterr().out
    # 14 hops in the nodes and 2 between them
    assert once["rows"][1]["all_reduce_s"] == pytest.approx(
        8.4e-6 + 14 * 4e-6 + 2 * 14e-6 + 2 * 15 / 16 * once["gradient_bytes"] / 50e9
    )


def record_of(tmp_path: Path, **more: Any) -> Path:
    rows = [
        {"arm": "natural", "method": "natural", "schedule": None, "images_per_s": 900.0},
        {"arm": "slow", "method": "gradnorm", "schedule": "exact", "images_per_s": 200.0},
        {"arm": "fast", "method": "gradnorm", "schedule": "exact", "images_per_s": 300.0},
        {"arm": "lazy", "method": "gradnorm", "schedule": "lazy 4", "images_per_s": 700.0},
        {"arm": "failed", "method": "gradnorm", "schedule": "exact", "images_per_s": None},
    ]
    record = {
        "device": "NVIDIA A100-SXM4-80GB", "meaningful_times": True, "img_size": 16, "classes": 10,
        "architecture": {"model": "swin_t", "model_kwargs": SMALL}, "batch": 32,
        "model": "swin_t", "model_kwargs": SMALL,
        "rows": [row | {"precision": "bf16", "gpu": "v100"} for row in rows],
    }  # fmt: skip
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record | more))
    return path


def test_a_record_gives_the_fastest_exact_gradnorm_and_its_own_network(tmp_path):
    measured = predicted(tmp_path, "--record", str(record_of(tmp_path)), "--gpus", "1")
    assert (measured["images_per_s_of_one_gpu"], measured["batch"]) == (300, 32)
    assert measured["links"]["intra_bytes_per_s"] == 300e9  # the A100 that it names
    assert "measured on NVIDIA A100" in measured["source"]
    assert measured["gradient_bytes"] < 100_000
    path = record_of(tmp_path, prediction=True)
    flags = ("--record", str(path), "--card", "v100", "--gpus", "1")
    assert "from a prediction" in predicted(tmp_path, *flags)["source"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--gpus", "2", "0"), "--gpus: 0"),
        (("--inter-node", "-1"), "--inter-node: -1"),
        (("--inter-node", "nan"), "--inter-node: nan"),
        (("--node-links", "0"), "--node-links: 0"),
        (("--record", "nowhere.json"), "nowhere.json"),
        (("--record", "PREDICTION"), "--card h200"),
        (("--record", "CPU"), "measured without a GPU"),
        (("--record", "EMPTY"), "no images_per_s of exact gradnorm"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(argv, said, tmp_path, capsys):
    made = {
        "PREDICTION": lambda: record_of(tmp_path, prediction=True),
        "CPU": lambda: record_of(tmp_path, meaningful_times=False),
        "EMPTY": lambda: record_of(tmp_path, rows=[]),
    }
    argv = [str(made[a]()) if a in made else a for a in argv]
    output = tmp_path / "made.json"
    try:
        assert scaling.main([*argv, "--output", str(output)]) == 2
    except SystemExit as end:
        assert end.code == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not output.exists()


@pytest.mark.slow
def test_the_check_measures_processes_of_this_machine(tmp_path, capsys):
    argv = ("--check", "--processes", "2", "--rounds", "2", "--batch", "2")
    record = predicted(tmp_path, *argv)
    (row,) = record["rows"]
    assert (row["processes"], row["grad_sync"], row["grad_dtype"]) == (2, "flat", "fp32")
    assert row["update_ms"]["n"] == row["predicted_over_measured"]["n"] == 2
    assert 0 < row["sums_over_update"]["mean"] < 1
    assert "| 2 | flat, fp32 | off |" in capsys.readouterr().out
