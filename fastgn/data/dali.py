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
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
import torch
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
# The operations are PIL's to its rounding. It is the floor where PIL blends two images, for it casts
# a float to a byte.


@pipeline_def(enable_conditionals=True)
def augmented(feeder: Feeder, *, workers: int, device: str) -> Any:
    """Fed -> (uint8 3 x S x S on the device, labels, complaints)."""
    encoded, anchor, shape, bilinear, flipped, kinds, arguments, label, complaint = (
        fn.external_source(
            source=feeder,
            num_outputs=len(Fed._fields),
            batch=True,
            parallel=workers > 0,
            prefetch_queue_depth=max(AHEAD, workers) if workers else None,
            dtype=[types.UINT8, *[types.INT32] * 5, types.FLOAT, types.INT64, types.UINT8],
            ndim=[1, 1, 1, 0, 0, 1, 2, 0, 1],
        )
    )
    image = fn.decoders.image_slice(
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
    if bilinear == 1:
        image = fn.resize(image, size=[side, side], interp_type=types.INTERP_LINEAR)
    else:
        image = fn.resize(image, size=[side, side], interp_type=types.INTERP_CUBIC)
    image = fn.flip(image, horizontal=flipped)
    for layer in range(recipe.layers):
        image = operate(possible, kinds[layer], image, arguments[layer], side, device)
    return fn.transpose(image, perm=[2, 0, 1]), label, complaint


def operate(
    possible: list[Kind], kind: Any, image: Any, arguments: Any, side: int, device: str
) -> Any:
    """One layer: `kind` (int32), one of those possible, on uint8 S x S x 3. A tree of conditions,
    each of which DALI runs on its images alone."""
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


def first(arguments: Any, device: str) -> Any:
    """A layer's only argument, where the images are."""
    return arguments[0].gpu() if device == "gpu" else arguments[0]


def to_bytes(values: Any) -> Any:
    """As PIL makes bytes of floats."""
    return fn.cast(math.floor(values), dtype=types.UINT8)


def blend(other: Any, image: Any, factor: Any) -> Any:
    """PIL's Image.blend of bytes and another image in whole numbers."""
    return to_bytes(other + factor * (fn.cast(image, dtype=types.FLOAT) - other))


def grey(image: Any) -> Any:
    """PIL's mode L, S x S x 1."""
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def bicubic(image: Any, arguments: Any, side: int, device: str) -> Any:
    return warp(image, arguments, side, device, types.INTERP_CUBIC)


def bilinear(image: Any, arguments: Any, side: int, device: str) -> Any:
    return warp(image, arguments, side, device, types.INTERP_LINEAR)


def warp(image: Any, arguments: Any, side: int, device: str, interpolation: Any) -> Any:
    """At its edges, PIL's image ends without a blend, at the middle of a pixel that lies outside:
    the colour beyond it comes by a mask of its own."""
    matrix = fn.reshape(arguments, shape=[2, 3])
    last = types.Constant(np.array([[0, 0, 1]], np.float32), device="cpu")
    warped = fn.experimental.warp_perspective(
        image,
        matrix=fn.cat(matrix, last, axis=0),
        interp_type=interpolation,
        border_mode="replicate",
    )
    inside = fn.warp_affine(
        types.Constant(np.ones((side, side, 1), np.uint8), device=device),
        matrix=matrix,
        interp_type=types.INTERP_NN,
        fill_value=0,
    )
    fill = types.Constant(np.array([[FILL]], np.uint8), device=device)
    return warped * inside + fill * (inside ^ types.Constant(1, dtype=types.UINT8))


def auto_contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    """ImageOps.autocontrast's table, in its float64."""
    wide, low, high = (
        fn.cast(x, dtype=types.FLOAT64)
        for x in (
            image,
            fn.reductions.min(image, axes=[0, 1], keep_dims=True),
            fn.reductions.max(image, axes=[0, 1], keep_dims=True),
        )
    )
    flat = fn.cast(high == low, dtype=types.FLOAT64)  # such a channel stays
    scale = types.Constant(255.0, dtype=types.FLOAT64) / (high - low + 255 * flat)
    return to_bytes(wide * scale - low * (1 - flat) * scale)


def equalize(image: Any, arguments: Any, side: int, device: str) -> Any:
    """ImageOps.equalize's table counts the pixels below a value, DALI's those up to it, which on
    the negative are the pixels that are not below. What remains is PIL's step, a whole number."""
    top = types.Constant(255, dtype=types.UINT8)
    shares = fn.cast(top - fn.equalize(top - image), dtype=types.FLOAT)
    brightest = fn.reductions.max(image, axes=[0, 1], keep_dims=True)
    last = fn.reductions.sum(
        fn.cast(image == brightest, dtype=types.FLOAT), axes=[0, 1], keep_dims=True
    )
    others = side * side - last
    step = math.floor(others / 255)
    flat = fn.cast(step == 0, dtype=types.FLOAT)  # such a channel stays
    table = math.floor(shares * (others / 255) / (step + flat) + 0.5)
    return fn.cast(table * (1 - flat) + image * flat, dtype=types.UINT8)


def invert(image: Any, arguments: Any, side: int, device: str) -> Any:
    return types.Constant(255, dtype=types.UINT8) - image


def posterize(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image & fn.cast(first(arguments, device), dtype=types.UINT8)


def solarize(image: Any, arguments: Any, side: int, device: str) -> Any:
    inverted = fn.cast(image >= first(arguments, device), dtype=types.UINT8)
    return image ^ (inverted * types.Constant(255, dtype=types.UINT8))


def solarize_add(image: Any, arguments: Any, side: int, device: str) -> Any:
    dark = fn.cast(image < types.Constant(128, dtype=types.UINT8), dtype=types.FLOAT)
    return fn.cast(image + dark * first(arguments, device), dtype=types.UINT8)


def color(image: Any, arguments: Any, side: int, device: str) -> Any:
    return blend(grey(image), image, first(arguments, device))


def contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    mean = fn.reductions.mean(grey(image), axes=[0, 1], keep_dims=True, dtype=types.FLOAT)
    return blend(math.floor(mean + 0.5), image, first(arguments, device))


def brightness(image: Any, arguments: Any, side: int, device: str) -> Any:
    return to_bytes(first(arguments, device) * image)


def sharpness(image: Any, arguments: Any, side: int, device: str) -> Any:
    """PIL blurs all but the outermost pixels."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    blurred = fn.filter(image, types.Constant(kernel, device=device))
    inner = np.zeros((side, side, 1), np.uint8)
    inner[1:-1, 1:-1] = 1
    inside = types.Constant(inner, device=device)
    sharpened = blend(blurred, image, first(arguments, device))
    return sharpened * inside + image * (inside ^ types.Constant(1, dtype=types.UINT8))


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
        images_BCHW = torch.from_dlpack(images.as_tensor()).float().div_(255)
        labels_B = torch.from_dlpack(labels.as_tensor()).to(self.device, copy=True)
        return images_BCHW, labels_B

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
                workers=self.workers,
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
