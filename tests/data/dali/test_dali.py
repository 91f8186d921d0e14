"""The DALI loader on the CPU backend: PIL's pictures, the loaders' contract, bad images, processes.

How far its pictures are from the PIL loader's: decoded crops are the same to the last bit; resizing
is PIL's to the rounding between its two passes; then each operation is PIL's (on the CPU) or has
its formula (by DALI's operators, which a GPU needs and these tests run on the CPU as well), but for
the bicubic kernel of warps. Operations that are not smooth (posterize, solarize, equalize) make
much of a difference of 1, in few pixels: so means are compared, and the maximum where it says
something.
"""

import gc
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, SHARED
from support.states import differences
from timm.data import auto_augment

from fastgn.config import Config
from fastgn.config.groups import DatasetConfig
from fastgn.data.dali.draws import FILL, WARPS, Drawn, Kind, Layer
from fastgn.data.datasets import Dataset, Files, load_dataset
from fastgn.data.loader import build_loader
from fastgn.errors import UserError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: fastgn[dali]")

from fastgn.data.dali import cpu  # noqa: E402
from fastgn.data.dali import loader as dali_loader  # noqa: E402

CPU = torch.device("cpu")
MEAN, STD = torch.full((1, 3, 1, 1), 0.45), torch.full((1, 3, 1, 1), 0.225)
PAPER = "rand-m9-mstd0.5-inc1"
SAMPLE = SHARED / "imagenet_sample_200.tar"
SIDE = 64


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Shapes, gradients and grain."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(smooth) + draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def dataset_of(paths: list[Path] | list[str]) -> Dataset:
    split = Files([str(p) for p in paths], torch.arange(len(paths)) % 3)
    return Dataset("photographs", split, split, ("a", "b", "c"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """26 JPEGs of uneven sizes."""
    root = tmp_path_factory.mktemp("photographs")
    return dataset_of(
        [
            write(root / f"{i}.jpg", photograph(90 + 7 * i, 150 - 3 * i, i), quality=90)
            for i in range(26)
        ]
    )


def loader_of(dataset: Dataset, kind: str = "dali", **keys: Any) -> Any:
    given = {"batch_size": 8, "rank": 0, "ranks": 1, "img_size": SIDE} | keys
    common = {k: given.pop(k) for k in ("batch_size", "rank", "ranks", "img_size")}
    return build_loader(
        Config().replace(**({"loader": kind, "workers": 0, "smoothing": 0.0} | given)),
        dataset,
        mean=MEAN,
        std=STD,
        grad_accum_steps=1,
        device=CPU,
        **common,
    )


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for --workers 4, which has one process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))


# -------------------------------------------------------------------------------------- the picture


def pil_affine(image: Image.Image, data: tuple, resample: Image.Resampling) -> Image.Image:
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, data, resample=resample, fillcolor=FILL)


TURN = (0.94, 0.34, -8.5, -0.34, 0.94, 12.25)
SHEAR = (1, 0.27, 0, 0, 1, 0)
SHIFT = (1, 0, 0, 0, 1, -20.25)
OPERATIONS: dict[str, tuple[Layer, Any, float, int]] = {
    # name: layer, the same by timm, largest mean and single difference
    "none": (Layer(Kind.NONE), lambda i: i, 0, 0),
    **{
        f"bicubic {name}": (
            Layer(Kind.BICUBIC, data),
            lambda i, data=data: pil_affine(i, data, Image.Resampling.BICUBIC),
            # PIL's kernel is sharper (a = -1, OpenCV's -0.75), and PIL rounds down
            *(0.8, 12),
        )
        for name, data in (("turn", TURN), ("shear", SHEAR), ("shift", SHIFT))
    },
    **{
        f"bilinear {name}": (
            Layer(Kind.BILINEAR, data),
            lambda i, data=data: pil_affine(i, data, Image.Resampling.BILINEAR),
            *(0.6, 2),  # PIL rounds down
        )
        for name, data in (("turn", TURN), ("shift", SHIFT))
    },
    "auto_contrast": (Layer(Kind.AUTO_CONTRAST), auto_augment.auto_contrast, 0.02, 1),
    "equalize": (Layer(Kind.EQUALIZE), auto_augment.equalize, 0.5, 1),
    "invert": (Layer(Kind.INVERT), auto_augment.invert, 0, 0),
    **{
        f"posterize {bits}": (
            Layer(Kind.POSTERIZE, (256 - 2 ** (8 - bits),)),
            lambda i, bits=bits: auto_augment.posterize(i, bits),
            *(0, 0),
        )
        for bits in (1, 4)
    },
    **{
        f"solarize {least}": (
            Layer(Kind.SOLARIZE, (least,)),
            lambda i, least=least: auto_augment.solarize(i, least),
            *(0, 0),
        )
        for least in (0, 26, 256)
    },
    **{
        f"solarize_add {more}": (
            Layer(Kind.SOLARIZE_ADD, (more,)),
            lambda i, more=more: auto_augment.solarize_add(i, more),
            *(0, 0),
        )
        for more in (99, 128)
    },
    **{
        f"{kind.name.lower()} {factor}": (
            Layer(kind, (factor,)),
            lambda i, call=call, factor=factor: call(i, factor),
            *(0.02, 1),
        )
        for kind, call in (
            (Kind.COLOR, auto_augment.color),
            (Kind.CONTRAST, auto_augment.contrast),
            (Kind.BRIGHTNESS, auto_augment.brightness),
            (Kind.SHARPNESS, auto_augment.sharpness),
        )
        for factor in (0.1, 0.73, 1.0, 1.87)
    },
}


def pictures() -> dict[str, Image.Image]:
    """A photograph; one with much black and white; one of few colours; one of a single colour."""
    hard = np.array(photograph(SIDE, SIDE, 3)).astype(int) * 3 - 250
    few = np.array(photograph(SIDE, SIDE, 4)) // 64 * 50 + 20
    return {
        "photograph": photograph(SIDE, SIDE, 2),
        "hard": Image.fromarray(hard.clip(0, 255).astype(np.uint8)),
        "few colours": Image.fromarray(few),
        "flat": Image.new("RGB", (SIDE, SIDE), (10, 128, 250)),
    }


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def by_dali(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The CPU backend's own way, and the GPU's operators on it."""
    as_on_gpu = request.param == "as on a GPU"
    monkeypatch.setattr(dali_loader, "uses_operators", lambda device: as_on_gpu)
    return as_on_gpu


def test_each_operation_is_pils(tmp_path, monkeypatch, by_dali):
    """On pixels that no decoder or resize has touched: one image an operation and picture."""
    cases = [(n, p) for n in OPERATIONS for p in pictures()]
    paths = [write(tmp_path / f"{p}.png", image) for p, image in pictures().items()]
    loader = loader_of(dataset_of(paths * len(OPERATIONS)), batch_size=len(cases), aa=PAPER)
    loader.feeder.recipe.kinds.add(Kind.BILINEAR)
    order = [k for _, k in loader.feeder.keys(0)]
    taken = iter(order)

    def draw(width: int, height: int) -> Drawn:
        layer = OPERATIONS[cases[next(taken) % len(cases)][0]][0]
        return Drawn(0, 0, height, width, False, False, (layer,))

    monkeypatch.setattr(loader.feeder.recipe, "draw", draw)
    # one batch alone, for there are no others to draw for
    monkeypatch.setattr(dali_loader, "AHEAD", 1)
    images = (next(loader.epoch(0)).images_BCHW * 255).round().int().permute(0, 2, 3, 1).numpy()
    for place, index in enumerate(order):
        name, which = cases[index]
        _, by_timm, mean, largest = OPERATIONS[name]
        if name in ("bicubic shear", "bicubic shift") and not by_dali:
            mean, largest = 0.02, 1  # PIL's own kernel
        expected = np.asarray(by_timm(pictures()[which])).astype(int)
        difference = np.abs(images[place] - expected)
        assert difference.mean() <= mean, (name, which, difference.mean())
        # OpenCV takes positions to 1/32 pixel, torch to a float: at the image's edge, a pixel falls
        # inside or outside
        beyond = 0.001 if OPERATIONS[name][0].kind in WARPS else 0
        assert (difference > largest).mean() <= beyond, (name, which, difference.max())


@pytest.mark.parametrize("keys", [{"aa": PAPER}, {"train_interpolation": "random"}], ids=str)
def test_the_same_pictures_as_the_pil_loader(keys, photographs, by_dali):
    """Two epochs, the whole recipe but for what is done on the device: the same image at the same
    place with the same label, and nearly the same pixels."""
    for epoch in (0, 1):
        pairs = list(
            zip(
                loader_of(photographs, "torch", **keys).epoch(epoch),
                loader_of(photographs, **keys).epoch(epoch),
                strict=True,
            )
        )
        assert len(pairs) == 3
        for pil, dali_batch in pairs:
            assert torch.equal(pil.targets, dali_batch.targets)
            means = (pil.images_BCHW - dali_batch.images_BCHW).abs().mean((1, 2, 3)) * 255
            assert float(means.max()) < 1.6  # of a solarized, posterized or equalized one
            assert float(means.median()) < 0.5


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"there is no {SAMPLE}")
def test_crops_of_imagenet_are_the_same_to_the_rounding(tmp_path, by_dali):
    """48 real files at 224 px, cropped, resized and flipped: PIL's decoder to the last bit, and its
    resize but for the rounding between two passes."""
    with tarfile.open(SAMPLE) as archive:
        members = [m for m in archive.getmembers() if m.isfile()][::4][:48]
        archive.extractall(tmp_path, members=members, filter="data")
    dataset = dataset_of([tmp_path / m.name for m in members])
    keys: dict[str, Any] = {"batch_size": 16, "img_size": 224, "color_jitter": 0.0}
    worst = 0.0
    for pil, dali_batch in zip(
        loader_of(dataset, "torch", **keys).epoch(0),
        loader_of(dataset, **keys).epoch(0),
        strict=True,
    ):
        means = (pil.images_BCHW - dali_batch.images_BCHW).abs().mean((1, 2, 3)) * 255
        worst = max(worst, float(means.max()))
        # DALI's resize keeps fractions between its passes
        assert float(means.median()) < (0.25 if by_dali else 0.05)
    assert worst < 0.5


# ------------------------------------------------------------------------------------- the contract

FULL: dict[str, Any] = {"reprob": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def test_the_batch_contract_and_a_resumed_run(photographs, cores):
    """Three epochs by one pipeline; then from positions in the middle, with worker processes and
    without: bitwise the same batches."""
    keys = FULL | {"aa": PAPER}
    loader = loader_of(photographs, **keys)
    unbroken = [list(loader.epoch(epoch)) for epoch in range(3)]
    assert [len(x) for x in unbroken] == [loader.batches_per_epoch] * 3 == [3] * 3
    for images, targets in unbroken[1]:
        assert images.shape == (8, 3, SIDE, SIDE) and images.dtype == torch.float32
        assert images.device == CPU and images.is_contiguous() and not images.requires_grad
        assert 0 <= float(images.min()) and float(images.max()) <= 1
        assert targets.shape == (8, 3) and targets.dtype == torch.float32
    assert differences(list(loader.epoch(1, 2)), unbroken[1][2:]) == []
    resumed = loader_of(photographs, workers=4, **keys)
    assert differences(list(resumed.epoch(1, 1)), unbroken[1][1:]) == []
    assert differences(list(resumed.epoch(2)), unbroken[2]) == []
    resumed.close()


def test_batches_are_their_owners(photographs):
    """DALI writes no later batch into one that is still held."""
    loader = loader_of(photographs, color_jitter=0.0)
    held, copies = [], []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            held.append(batch.images_BCHW)
            copies.append(batch.images_BCHW.clone())
    assert differences(held, copies) == []


def test_two_ranks_see_together_what_one_sees(photographs):
    """And every image at most once an epoch; resumed as well."""
    keys: dict[str, Any] = {"color_jitter": 0.4}
    one = list(loader_of(photographs, batch_size=12, **keys).epoch(1))
    ranks = [loader_of(photographs, batch_size=6, rank=r, ranks=2, **keys) for r in (0, 1)]
    for first in (0, 1):
        parts = [list(rank.epoch(1, first)) for rank in ranks]
        for whole, *both in zip(one[first:], *parts, strict=True):
            assert torch.equal(whole.images_BCHW, torch.cat([b.images_BCHW for b in both]))
            assert torch.equal(whole.targets, torch.cat([b.targets for b in both]))
    seen = [k for rank in ranks for p in range(2, 4) for _, k in rank.feeder.keys(p)]
    assert len(seen) == len(set(seen)) == 24


def test_arrays_are_refused():
    with pytest.raises(UserError, match="--loader dali decodes image files"):
        loader_of(load_dataset(DatasetConfig()))


# --------------------------------------------------------------------------------------- odd images


def odd_images(root: Path) -> list[Path]:
    """What PIL decodes and a JPEG decoder may see otherwise."""
    image = photograph(97, 61)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn, which the PIL loader ignores as well
    deep = np.random.default_rng(0).integers(0, 65536, (61, 97)).astype(np.uint16)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG")
    trailing = root / "trailing.jpg"
    trailing.write_bytes(jpeg.getvalue() + b"camera's notes")
    return [
        write(root / "cmyk.jpg", image.convert("CMYK")),
        write(root / "grey.jpg", image.convert("L")),
        write(root / "rgb.jpg", image, keep_rgb=True),
        write(root / "progressive.jpg", image, progressive=True),
        write(root / "turned.jpg", image, exif=turned),
        write(root / "fine.jpg", image, subsampling=0),
        write(root / "deep.png", Image.fromarray(deep)),
        write(root / "palette.png", image.convert("P")),
        write(root / "alpha.png", image.convert("RGBA")),
        write(root / "lossy.webp", image),
        write(root / "animated.gif", image, save_all=True, append_images=[image.rotate(90)]),
        write(root / "pixel.jpg", photograph(1, 1)),
        write(root / "column.png", photograph(1, 300)),
        write(root / "row.jpg", photograph(2000, 2)),
        trailing,
    ]


def test_odd_images_are_what_pil_makes_of_them(tmp_path):
    paths = odd_images(tmp_path)
    dataset = dataset_of(paths)
    keys: dict[str, Any] = {"batch_size": len(paths), "color_jitter": 0.0}
    pil, by_dali = (next(loader_of(dataset, k, **keys).epoch(0)) for k in ("torch", "dali"))
    means = (pil.images_BCHW - by_dali.images_BCHW).abs().mean((1, 2, 3)) * 255
    order = [k for _, k in loader_of(dataset, **keys).feeder.keys(0)]
    assert {paths[k].name: float(m) for k, m in zip(order, means, strict=True) if m > 0.5} == {}


BAD = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"text",
    "vanished": None,
}


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_image_is_one_line_where_its_batch_is_taken(spoil, photographs, tmp_path):
    """The batches before it are trained on, though DALI works ahead."""
    paths = [Path(p) for p in photographs.train.paths]
    plain: dict[str, Any] = {"batch_size": 4, "color_jitter": 0.0}
    place = loader_of(photographs, **plain).feeder.keys(2)[1][1]
    paths[place] = tmp_path / "bad.jpg"
    if BAD[spoil] is not None:
        paths[place].write_bytes(BAD[spoil](Path(photographs.train.paths[place]).read_bytes()))
    loader = loader_of(dataset_of(paths), **plain)
    batches = loader.epoch(0)
    next(batches), next(batches)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{paths[place]} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


def test_a_jpeg_that_looks_right_and_is_not(photographs, tmp_path):
    """DALI does not say which image it was: PIL finds it."""
    content = Path(photographs.train.paths[0]).read_bytes()
    tables, frame = content.index(b"\xff\xdb"), content.index(b"\xff\xc0")
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(content[:tables] + content[frame:])
    paths = [*map(Path, photographs.train.paths[:3]), bad]
    with pytest.raises(UserError) as caught:
        next(loader_of(dataset_of(paths), batch_size=4, color_jitter=0.0).epoch(0))
    assert str(caught.value).startswith(f"{bad} cannot be read as an image: ")
    assert "\n" not in str(caught.value)


def test_bad_images_are_replaced_as_by_the_pil_loader(photographs, tmp_path):
    """One that a worker finds, one that DALI does: the next one stands in, of its own class, and
    both loaders say the same."""
    content = Path(photographs.train.paths[2]).read_bytes()
    tables, frame = content.index(b"\xff\xdb"), content.index(b"\xff\xc0")
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "rotten.jpg").write_bytes(content[:tables] + content[frame:])
    paths = [*photographs.train.paths[:6], str(tmp_path / "cut.jpg"), str(tmp_path / "rotten.jpg")]
    found = {}
    for kind in ("torch", "dali"):
        keys = {"on_bad_image": "skip", "color_jitter": 0.0, "batch_size": 4}
        loader = loader_of(dataset_of(paths), kind, **keys)
        batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        found[kind] = torch.cat([b.targets for b in batches]), sorted(loader.bad_images)
        images = torch.cat([b.images_BCHW for b in batches])
        if kind == "torch":
            expected = images
        loader.__dict__.get("_source") and loader.close()
    assert torch.equal(found["torch"][0], found["dali"][0])
    names = [line.split()[0].rpartition("/")[2] for line in found["torch"][1]]
    # a bad one in whose place another bad one would stand is met on the way, too
    assert {"cut.jpg", "rotten.jpg"} == set(names) and found["torch"][1] == found["dali"][1]
    assert (images - expected).abs().mean() < 0.02


def test_no_dali_is_one_line(photographs, monkeypatch):
    for name in ("loader", "operations"):
        monkeypatch.delitem(sys.modules, f"fastgn.data.dali.{name}")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="run pip install 'fastgn.dali.' for CUDA 13"):
        loader_of(photographs)


# --------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_garbage_collected_in_a_pipelines_own_thread(photographs, monkeypatch):
    """A loader that is forgotten in a cycle, as an exception's traceback makes one: DALI's threads
    call Python, and would wait for themselves where they ended its pipelines. They live on until
    another loader begins."""
    finished, one_at_a_time = cpu.augment_crop, threading.Lock()
    collected: list[bool] = []
    others: list[Any] = []

    def collect(*item: Any) -> Any:
        # not before the other's pipelines begin, which end those of a loader that is gone already
        if any(ref() in others for ref, _ in dali_loader.KEPT):
            with one_at_a_time:  # beside a collection another one does nothing
                collected.append(bool(gc.collect()))
        return finished(*item)

    gc.collect()
    gc.disable()
    try:
        loader = loader_of(photographs, color_jitter=0.0)
        batches = loader.epoch(0)
        next(batches)
        loader.itself, forgotten = loader, weakref.ref(loader)
        monkeypatch.setattr(cpu, "augment_crop", collect)
        other = loader_of(photographs, color_jitter=0.0, batch_size=2)
        others.append(other)
        del loader, batches
        next(other.epoch(0))
    finally:
        gc.enable()
    assert any(collected) and forgotten() is None and len(dali_loader.KEPT) >= 2
    other.close()
    assert all(ref() is not None for ref, _ in dali_loader.KEPT)


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_worker_processes_end_with_the_loader_and_ignore_signals(photographs, cores):
    before = children()
    loader = loader_of(photographs, workers=4, color_jitter=0.0)
    batches = loader.epoch(0)
    next(batches)
    started = children() - before
    assert started
    for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal sends them to the whole group
        for process in started:
            os.kill(process, number)
    assert len(list(batches)) == 2 and children() - before == started
    del loader, batches
    assert children() == before


def run_apart(dataset: Dataset, then: str) -> subprocess.CompletedProcess[str]:
    """Python of its own that prints its worker processes with a batch taken, and goes on."""
    code = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / "tests")]}
import os, signal, test_dali
os.sched_getaffinity = lambda pid: range(8)
dataset = test_dali.dataset_of({list(dataset.train.paths)})
loader = test_dali.loader_of(dataset, workers=4, batch_size=1, color_jitter=0.0)
batches = loader.epoch(0)
next(batches)
started = test_dali.children()
print(*started, flush=True)
{then}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.stdout.split() and not any(Path(f"/proc/{p}").exists() for p in done.stdout.split())
    return done


@pytest.mark.slow
def test_no_process_is_left_when_python_ends(photographs):
    done = run_apart(photographs, "")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_killed_worker_is_told(photographs):
    """DALI's own would be waited for, for ever. torch raises wherever its signal finds Python: in
    the loader or not."""
    done = run_apart(
        photographs, "[os.kill(p, signal.SIGKILL) for p in started]; list(batches); list(batches)"
    )
    assert done.returncode == 1 and "DataLoader worker" in done.stderr
