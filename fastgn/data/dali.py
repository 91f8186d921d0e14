"""The DALI loader: what the PIL loader does to an image, decoded and augmented by NVIDIA DALI on
the CPU or on the GPU.

Worker processes read the files and draw with timm's own objects (recipe.py); DALI takes bytes and
numbers. So one seed gives the PIL loader's pictures but for resampling and rounding, and a position
is all that a resumed run needs: DALI's readers, its shuffling and its random operators are not
used.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgn.config import AugmentationConfig, UserError
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Batch, epoch_order, rank_slice
from fastgn.data.datasets import Arrays, BadImageError, Files, decode_image
from fastgn.data.jpeg import plain_size
from fastgn.data.recipe import ARGUMENTS, FILL, Kind, Recipe
from fastgn.seeding import Stream, seed_all, seed_host

try:
    from nvidia.dali import fn, math, pipeline_def, types
except ImportError:
    raise UserError(
        "--loader dali: NVIDIA DALI is not installed: pip install 'fastgn[dali]', which takes "
        "nvidia-dali-cuda130 (fastgn[dali-cuda120]: nvidia-dali-cuda120)"
    ) from None

SIGNALS = {signal.SIGINT, signal.SIGTERM}
AHEAD = 2
"""Batches that DALI makes before they are asked for."""


# ------------------------------------------------------------------------- in the worker processes


class Fed(NamedTuple):
    """A batch as DALI takes it."""

    encoded: list[np.ndarray]
    """uint8; a file's bytes, or a PPM of what is not a plain JPEG."""
    anchors: np.ndarray
    """int32 B x 2, row and column of the crop."""
    shapes: np.ndarray
    """int32 B x 2, height and width of the crop."""
    bilinear: np.ndarray
    """int32 B: how the crop is resized; bicubic otherwise."""
    flipped: np.ndarray
    """int32 B."""
    kinds: np.ndarray
    """int32 B x layers, of recipe.Kind."""
    arguments: np.ndarray
    """fp32 B x layers x ARGUMENTS."""
    labels: np.ndarray
    """int64 B."""
    complaints: list[np.ndarray]
    """uint8: what is wrong with an image, in UTF-8; mostly empty."""


class Feeder:
    """Number of a batch since the pipeline's start -> Fed."""

    def __init__(
        self,
        split: Files,
        recipe: Recipe,
        *,
        start: int,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
    ):
        """start: the first batch's position, epoch x batches_per_epoch + index."""
        self.split = split
        self.recipe = recipe
        self.start = start
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self._order: tuple[int, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """A feeder is pickled for a worker process alone."""
        return in_worker, (self.__dict__ | {"_order": None},)

    def keys(self, position: int) -> list[tuple[int, int]]:
        """(epoch, image) of a batch's images."""
        epoch, index = divmod(position, self.batches_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.split), self.seed, epoch))
        chosen = self._order[1][rank_slice(index, self.batch_size, self.rank, self.ranks)]
        return [(epoch, image) for image in chosen.tolist()]

    def __call__(self, number: int) -> Fed:
        size, layers = self.batch_size, self.recipe.layers
        fed = Fed(
            [],
            np.zeros((size, 2), np.int32),
            np.ones((size, 2), np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros((size, layers), np.int32),
            np.zeros((size, layers, ARGUMENTS), np.float32),
            np.zeros(size, np.int64),
            [],
        )
        for place, (epoch, image) in enumerate(self.keys(self.start + number)):
            complaint = b""
            try:
                content = self.fill(fed, place, epoch, image)
            except BadImageError as error:  # told where the batch is taken, with no traceback
                content, complaint = BLACK, str(error).encode(errors="replace")
            fed.encoded.append(np.frombuffer(content, np.uint8))
            fed.complaints.append(np.frombuffer(complaint, np.uint8))
        return fed

    def fill(self, fed: Fed, place: int, epoch: int, image: int) -> bytes:
        """An image's encoded bytes; what is done to it goes into fed. Raises BadImageError: what
        becomes of a bad image is decided here."""
        content, name = self.split.read(image), self.split.name(image)
        decoded = None
        size = plain_size(content)
        if size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or 0):
            decoded = decode_image(content, name)
            size = decoded.size
        seed_host(Stream.IMAGE, self.seed, epoch, image)
        drawn = self.recipe.draw(*size)
        if decoded is None:
            fed.anchors[place] = drawn.top, drawn.left
        else:
            box = (drawn.left, drawn.top, drawn.left + drawn.width, drawn.top + drawn.height)
            content = ppm(decoded.crop(box))
        fed.shapes[place] = drawn.height, drawn.width
        fed.bilinear[place], fed.flipped[place] = drawn.bilinear, drawn.flipped
        for layer, (kind, arguments) in enumerate(drawn.layers):
            fed.kinds[place, layer] = kind
            fed.arguments[place, layer, : len(arguments)] = arguments
        fed.labels[place] = int(self.split.labels_N[image])
        return content


def ppm(image: Image.Image) -> bytes:
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


BLACK = ppm(Image.new("RGB", (1, 1)))


def in_worker(state: dict[str, Any]) -> Feeder:
    """Makes a feeder out of its pickled attributes, in a process that DALI has started."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    feeder = Feeder.__new__(Feeder)
    feeder.__dict__.update(state)
    return feeder


def end_with(parent: int) -> None:
    """Ends this process when its parent says so or is gone. A signal from elsewhere, as to the
    whole process group, is the main process's to handle: it saves, then ends the workers."""
    while os.getppid() == parent:
        received = signal.sigtimedwait([signal.SIGTERM], 1)  # blocked: see signals_blocked
        if received is not None and received.si_pid == parent:
            break
    os._exit(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """For what starts meanwhile, threads and processes, these signals stay blocked."""
    resource_tracker.ensure_running()  # as it starts, it would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ------------------------------------------------------------------------------------ the pipeline


@pipeline_def(enable_conditionals=True)
def augmented(feeder: Feeder, *, threads: int, parallel: bool, device: str) -> Any:
    """Fed -> (fp32 3 x S x S in 0..1, labels, complaints); device: DALI's name, cpu or gpu, of where
    it is done."""
    encoded, anchor, shape, bilinear, flipped, kinds, arguments, label, complaint = (
        fn.external_source(
            source=feeder,
            num_outputs=len(Fed._fields),
            batch=True,
            parallel=parallel,
            prefetch_queue_depth=max(AHEAD, threads) if parallel else None,
            dtype=[types.UINT8, *[types.INT32] * 5, types.FLOAT, types.INT64, types.UINT8],
            ndim=[1, 1, 1, 0, 0, 1, 2, 0, 1],
        )
    )
    crop = fn.decoders.image_slice(
        encoded,
        start=anchor,
        shape=shape,
        axis_names="HW",
        adjust_orientation=False,  # as PIL has it
        output_type=types.RGB,
        device="mixed" if device == "gpu" else "cpu",
    )
    recipe = feeder.recipe
    side, possible = recipe.img_size, sorted(recipe.kinds)
    if device == "cpu":
        resize = Resize(side, threads)
        image = fn.python_function(
            crop, bilinear, flipped, function=resize, batch_processing=True, output_layouts="HWC"
        )
    elif bilinear == 1:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_LINEAR)
    else:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_CUBIC)
    if device == "gpu":
        image = fn.flip(image, horizontal=flipped)
    for layer in range(recipe.layers):
        image = operate(possible, kinds[layer], image, arguments[layer], side, device)
    image = fn.crop_mirror_normalize(
        image, dtype=types.FLOAT, output_layout="CHW", mean=[0.0], std=[255.0]
    )
    return image, label, complaint


class Resize:
    """[uint8 H x W x 3], [bilinear, else bicubic], [flipped] -> [uint8 S x S x 3], antialiased, by
    torch's CPU kernel: 0.5 ms a crop of ImageNet, PIL takes 1.6 and DALI's CPU operator 3.5."""

    def __init__(self, side: int, threads: int):
        self.side = side
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def __call__(self, *batch: list[np.ndarray]) -> list[np.ndarray]:
        each = map if self.pool is None else self.pool.map
        return list(each(self.one, *batch))

    def one(self, crop: np.ndarray, bilinear: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        mode = "bilinear" if bilinear else "bicubic"
        image = torch.from_numpy(crop).permute(2, 0, 1)[None]
        resized = F.interpolate(image, (self.side, self.side), mode=mode, antialias=True)
        result = resized[0].permute(1, 2, 0)
        return (result.flip(1) if flipped else result.contiguous()).numpy()


# Operations on uint8 S x S x 3, PIL's to within 1 but for interpolation. Bytes are kept as bytes and
# never broadcast where that can be: DALI's floats take several times as long on a CPU.


def operate(
    possible: list[Kind], kind: Any, image: Any, arguments: Any, side: int, device: str
) -> Any:
    """One layer: `kind` (int32), one of those possible. A tree of conditions: DALI runs each
    operation on its own images."""
    if len(possible) == 1:
        return OPERATIONS[possible[0]](image, arguments, side, device)
    middle = len(possible) // 2
    if kind < int(possible[middle]):
        result = operate(possible[:middle], kind, image, arguments, side, device)
    else:
        result = operate(possible[middle:], kind, image, arguments, side, device)
    return result


def none(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image


def byte(value: int) -> Any:
    return types.Constant(value, dtype=types.UINT8)


def picture(values: np.ndarray, side: int, device: str) -> Any:
    """The same uint8 S x S x 3 for every image."""
    shape = (side, side, 3)
    return types.Constant(np.broadcast_to(values, shape).astype(np.uint8), device=device)


def first(arguments: Any, device: str) -> Any:
    """A layer's only argument, where the images are."""
    return arguments[0].gpu() if device == "gpu" else arguments[0]


def to_bytes(values: Any, shift: float = 0.0, factor: Any = 1.0) -> Any:
    """Rounds factor x values + shift."""
    return fn.brightness_contrast(
        values, brightness=factor, brightness_shift=shift / 255, dtype=types.UINT8
    )


FLOOR = -0.498
"""PIL casts a blend's float to a byte; what is 0.002 below a whole number may be its rounding."""


def blend(other: Any, image: Any, factor: Any) -> Any:
    """PIL's Image.blend."""
    return to_bytes(other * (1 - factor) + image * factor, FLOOR)


def grey(image: Any) -> Any:
    """PIL's mode L, S x S x 1."""
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def extreme(reduction: Any, image: Any) -> Any:
    """A statistic of each channel, 1 x 1 x 3."""
    return reduction(image, axes=[0, 1], keep_dims=True)


def bicubic(image: Any, arguments: Any, side: int, device: str) -> Any:
    return warp(image, arguments, side, device, types.INTERP_CUBIC)


def bilinear(image: Any, arguments: Any, side: int, device: str) -> Any:
    return warp(image, arguments, side, device, types.INTERP_LINEAR)


def warp(image: Any, arguments: Any, side: int, device: str, interpolation: Any) -> Any:
    """PIL's image ends sharply, where the nearest pixel lies outside: a mask shows where that is.
    DALI's two bicubic kernels are less sharp than PIL's (a = -0.75 or -0.5, not -1)."""
    last = types.Constant(np.array([[0, 0, 1]], np.float32), device="cpu")
    matrix = fn.cat(fn.reshape(arguments, shape=[2, 3]), last, axis=0)
    warped = fn.experimental.warp_perspective(
        image, matrix=matrix, interp_type=interpolation, border_mode="replicate"
    )
    inside = fn.experimental.warp_perspective(
        picture(np.array(255), side, device),
        matrix=matrix,
        interp_type=types.INTERP_NN,
        border_mode="constant",
        fill_value=0.0,
    )
    fill = picture(np.array(FILL), side, device)
    return ((warped ^ fill) & inside) ^ fill


def auto_contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    """ImageOps.autocontrast."""
    low, high = (extreme(r, image) for r in (fn.reductions.min, fn.reductions.max))
    flat = fn.cast(low == high, dtype=types.UINT8)  # such a channel stays
    low = low * (byte(1) - flat)
    scale = 255.0 / (high - low + (byte(255) - high) * flat)
    return to_bytes((image - low) * scale, FLOOR)


def equalize(image: Any, arguments: Any, side: int, device: str) -> Any:
    """ImageOps.equalize counts the pixels below a value, DALI those up to it: of the negative,
    these are the pixels that are not below. What remains is PIL's step, a whole number."""
    shares = byte(255) - fn.equalize(byte(255) - image)
    brightest = fn.cast(image == extreme(fn.reductions.max, image), dtype=types.UINT8)
    others = side * side - fn.cast(extreme(fn.reductions.sum, brightest), dtype=types.FLOAT)
    step = math.floor(others / 255.0)
    few = fn.cast(step == 0.0, dtype=types.UINT8)  # such a channel stays
    table = to_bytes(shares * (others / 255.0 / (step + few)))
    return table * (byte(1) - few) + image * few


def invert(image: Any, arguments: Any, side: int, device: str) -> Any:
    return byte(255) - image


def posterize(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image & fn.cast(first(arguments, device), dtype=types.UINT8)


def solarize(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image ^ ((image >= fn.cast(first(arguments, device), dtype=types.INT32)) * byte(255))


def solarize_add(image: Any, arguments: Any, side: int, device: str) -> Any:
    """At most 128 is added."""
    return image + (image < byte(128)) * fn.cast(first(arguments, device), dtype=types.UINT8)


def color(image: Any, arguments: Any, side: int, device: str) -> Any:
    return blend(grey(image), image, first(arguments, device))


def contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    mean = extreme(fn.reductions.mean, grey(image))
    return blend(math.floor(mean + 0.5), image, first(arguments, device))


def brightness(image: Any, arguments: Any, side: int, device: str) -> Any:
    return to_bytes(image, FLOOR, arguments[0])


def sharpness(image: Any, arguments: Any, side: int, device: str) -> Any:
    """PIL blurs all but the outermost pixels."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    blurred = fn.filter(image, types.Constant(kernel, device=device))
    inner = np.zeros((side, side, 1))
    inner[1:-1, 1:-1] = 255
    sharpened = blend(blurred, image, first(arguments, device))
    return ((sharpened ^ image) & picture(inner, side, device)) ^ image


OPERATIONS = {
    Kind.NONE: none,
    Kind.BICUBIC: bicubic,
    Kind.BILINEAR: bilinear,
    Kind.AUTO_CONTRAST: auto_contrast,
    Kind.EQUALIZE: equalize,
    Kind.INVERT: invert,
    Kind.POSTERIZE: posterize,
    Kind.SOLARIZE: solarize,
    Kind.SOLARIZE_ADD: solarize_add,
    Kind.COLOR: color,
    Kind.CONTRAST: contrast,
    Kind.BRIGHTNESS: brightness,
    Kind.SHARPNESS: sharpness,
}


# -------------------------------------------------------------------------------------- the loader


class DaliLoader:
    """See batch.Loader."""

    def __init__(
        self,
        split: Arrays | Files,
        cfg: AugmentationConfig,
        augment: BatchAugment,
        *,
        img_size: int,
        hflip: float,
        workers: int,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        """workers: processes that read and draw, and threads that decode and augment; with 0 the
        main process does it all."""
        if isinstance(split, Arrays):
            raise UserError("--loader dali decodes files: arrays need --loader device")
        self.split = split
        self.recipe = Recipe(cfg, img_size, hflip)
        self.augment = augment
        self.workers = workers
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.device = device
        self._feed = {
            "batch_size": batch_size,
            "batches_per_epoch": batches_per_epoch,
            "seed": seed,
            "rank": rank,
            "ranks": ranks,
        }
        self._feeder: Feeder | None = None
        self._pipeline: Any = None
        self._next = -1

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See batch.Loader. Raises UserError on a bad image."""
        for index in range(first, self.batches_per_epoch):
            images, labels = self._take(epoch * self.batches_per_epoch + index)
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, labels)

    def close(self) -> None:
        """Ends the worker processes; the next epoch starts others."""
        self._pipeline, self._next = None, -1

    def _take(self, position: int) -> tuple[Tensor, Tensor]:
        """(images in 0..1, labels) on the device. The pipeline goes on from epoch to epoch, and
        starts anew where another position than the next one is asked for."""
        if self._pipeline is None or position != self._next:
            self.close()
            self._start(position)
        try:
            images, labels, complaints = self._pipeline.run(**self._stream())
        except RuntimeError as error:
            self._pipeline = None
            raise self._explain(error, position) from None
        for place in range(len(complaints)):
            text = np.asarray(complaints[place]).tobytes().decode()
            if text:
                self.close()
                raise UserError(text)
        self._next = position + 1
        images_BCHW, labels_B = (torch.from_dlpack(x.as_tensor()) for x in (images, labels))
        return images_BCHW, labels_B.to(self.device)

    def _stream(self) -> dict[str, Any]:
        """Outputs are ordered with torch's work, without a wait by the host."""
        if self.device.type != "cuda":
            return {}
        return {"cuda_stream": torch.cuda.current_stream(self.device)}

    def _start(self, position: int) -> None:
        self._feeder = Feeder(self.split, self.recipe, start=position, **self._feed)
        cuda = self.device.type == "cuda"
        index = self.device.index if self.device.index is not None else 0
        with signals_blocked():
            self._pipeline = augmented(
                self._feeder,
                threads=max(1, self.workers),
                parallel=self.workers > 0,
                device="gpu" if cuda else "cpu",
                batch_size=self._feed["batch_size"],
                num_threads=max(1, self.workers),
                device_id=index if cuda else None,
                py_num_workers=max(1, self.workers),
                py_start_method="spawn",
                prefetch_queue_depth=AHEAD,
            )
            self._pipeline.build()

    def _explain(self, error: RuntimeError, position: int) -> UserError:
        """Of an error within DALI, which names no file: the batch's image that it comes from."""
        assert self._feeder is not None
        reason = reason_of(error)
        keys = [k for p in range(AHEAD + 1) for k in self._feeder.keys(position + p)]
        for _, image in keys:
            try:
                self.split.image(image)
            except BadImageError as bad:
                return bad
        return UserError(
            f"--loader dali: {reason} (in a batch that begins with {self.split.name(keys[0][1])}, "
            "all of whose images PIL decodes: try --loader torch)"
        )


def reason_of(error: RuntimeError) -> str:
    """DALI's message without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i for i, line in enumerate(lines) if line.startswith("encountered:")]
    return lines[min(after[0] + 1, len(lines) - 1)] if after else lines[0]
