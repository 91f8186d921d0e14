"""What `--loader auto` does where CUDA and DALI are there: DALI after a trial, PIL if it fails.

No GPU is needed: the loaders are stand-ins, and the device is one in name alone.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd import picture, run_args, write_tree
from support.states import differences

import fastgn.data.loader as loading
from fastgn import train
from fastgn.checkpoint import find_checkpoint, load_checkpoint
from fastgn.data.batch import Batch
from fastgn.data.torch import TorchLoader
from fastgn.data.trial import MEAN_DIFFERENCE, MEDIAN_DIFFERENCE, choose_dali_or_pil, wants_dali
from fastgn.errors import UserError


def right_batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(torch.rand(6, 3, 8, 8, generator=draw) * 0.9, torch.eye(6)[:, :4])


class Standin:
    """A loader that gives one batch."""

    batches_per_epoch = 1

    def __init__(self, change: Callable[[Batch], Batch] = lambda batch: batch):
        self.change = change
        self.bad_images = ["a line from the trial"]
        self.closed = False

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        yield self.change(right_batch())

    def close(self) -> None:
        self.closed = True


def shifted(by: float, images: int = 6) -> Callable[[Batch], Batch]:
    """Moves the first images of a batch."""

    def change(batch: Batch) -> Batch:
        moved = batch.images_BCHW.clone()
        moved[:images] += by
        return batch._replace(images_BCHW=moved)

    return change


def raise_(error: Exception) -> Callable[..., Any]:
    def change(*_: object, **options: object) -> Batch:
        raise error

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch,
        shifted(0.9 * MEDIAN_DIFFERENCE),
        shifted(0.9 * MEAN_DIFFERENCE, images=1),
    ],
)
def test_dali_is_taken_if_its_first_batch_is_pils(change):
    dali, pil = Standin(change), Standin()
    loader, line = choose_dali_or_pil(lambda: dali, lambda: pil)
    assert loader is dali and line is None and dali.bad_images == [] and not dali.closed


def nan(batch: Batch) -> Batch:
    images = batch.images_BCHW.clone()
    images[2, 1, 3, 4] = torch.nan
    return batch._replace(images_BCHW=images)


FAULTS: dict[str, Callable[[Batch], Batch]] = {
    "RuntimeError: a driver's trouble": raise_(RuntimeError("a driver's trouble\nwith a trace")),
    "UserError: --loader dali: a policy": raise_(UserError("--loader dali: a policy")),
    "its images are torch.float32 (6, 3, 8, 7)": lambda b: b._replace(
        images_BCHW=b.images_BCHW[..., :7]
    ),
    "its images are torch.float16": lambda b: b._replace(images_BCHW=b.images_BCHW.half()),
    "its images are torch.float32 (5, 3, 8, 8)": lambda b: b._replace(
        images_BCHW=b.images_BCHW[1:]
    ),
    "its images are not finite": nan,
    "its targets differ": lambda b: b._replace(targets=b.targets.roll(1, 0)),
    "its targets are torch.int64": lambda b: b._replace(targets=b.targets.argmax(1)),
    "its images differ from PIL's by at most 1.8/255": shifted(1.1 * MEAN_DIFFERENCE, images=1),
    "in the median by 0.7/255": shifted(1.4 * MEDIAN_DIFFERENCE),
    "its images differ from PIL's": lambda b: b._replace(images_BCHW=b.images_BCHW.flip(3)),
}


@pytest.mark.parametrize("said", FAULTS)
def test_pil_is_taken_if_dali_fails_and_a_line_says_why(said):
    dali, pil = Standin(FAULTS[said]), Standin()
    loader, line = choose_dali_or_pil(lambda: dali, lambda: pil)
    assert loader is pil and dali.closed and pil.bad_images == []
    assert line is not None and said in line and "\n" not in line
    assert line.startswith("--loader auto uses torch, because DALI did not pass its trial: ")


def test_a_loader_of_dalis_that_cannot_be_made(tmp_path):
    pil = Standin()
    loader, line = choose_dali_or_pil(raise_(ImportError("libcuda.so.1")), lambda: pil)
    assert loader is pil and line is not None and line.endswith("ImportError: libcuda.so.1")


def test_all_ranks_take_the_same_loader():
    dali, pil = Standin(), Standin()
    loader, line = choose_dali_or_pil(lambda: dali, lambda: pil, agree=lambda mine: True)
    assert loader is pil and dali.closed
    assert line is not None and line.endswith("it failed on another rank")


def test_a_bad_image_is_the_users_and_not_dalis():
    """PIL's loader comes first, and what it raises ends the run as it would have later."""
    bad = Standin(raise_(UserError("x.jpg cannot be read")))
    with pytest.raises(UserError, match=r"x\.jpg cannot be read"):
        choose_dali_or_pil(Standin, lambda: bad)


def test_which_devices_want_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, object] = {}

    def find(name: str) -> object:
        if not installed:
            raise ModuleNotFoundError("No module named 'nvidia'")
        return installed.get(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for device, there, wanted in (
        ("cuda", False, False),
        ("cuda", True, True),
        ("cpu", True, False),
    ):
        installed |= {"nvidia.dali": "there"} if there else {}
        assert wants_dali(torch.device(device)) == wanted
    installed["nvidia.dali"] = None  # other packages of NVIDIA's alone
    assert not wants_dali(torch.device("cuda"))


class DaliLoader(TorchLoader):
    """Stands in for DALI's: PIL's pictures, or brighter ones."""

    brighter = 0.0

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, first):
            yield batch._replace(images_BCHW=batch.images_BCHW + self.brighter)


class BrighterLoader(DaliLoader):
    brighter = 0.1


@pytest.mark.parametrize(
    ("made", "taken", "said"),
    [
        (DaliLoader, "DaliLoader", None),
        (BrighterLoader, "TorchLoader", "its images differ from PIL's by at most 25.5/255"),
        (raise_(ImportError("libnvjpeg.so")), "TorchLoader", "ImportError: libnvjpeg.so"),
    ],
)
def test_a_run_with_loader_auto(
    made: Any,
    taken: str,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loader that trains, and what the run says of its choice; the images are the same."""
    root = write_tree(tmp_path / "data", {"ant/a.png": picture(3), "bee/b.png": picture(200)})
    module = types.SimpleNamespace(DaliLoader=made)
    monkeypatch.setitem(sys.modules, "fastgn.data.dali.loader", module)  # type: ignore[arg-type]
    pil = train.main(run_args(root, tmp_path / "pil"))
    monkeypatch.setattr(loading, "wants_dali", lambda device: True)
    assert (pil, train.main(run_args(root, tmp_path / "run"))) == (0, 0)
    resolved = json.loads((tmp_path / "run" / "environment.json").read_text())["resolved"]
    assert resolved["loader"] == taken
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("--loader auto uses")]
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(
            f"--loader auto uses torch, because DALI did not pass its trial: {said}"
        )
    states = [load_checkpoint(find_checkpoint(tmp_path / name)).model for name in ("pil", "run")]
    assert differences(*states) == []
