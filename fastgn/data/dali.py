"""The DALI loader: what the PIL loader does to an image, decoded and augmented by NVIDIA DALI on
the CPU or on the GPU.

Worker processes read the files and draw with timm's own objects (recipe.py); DALI takes bytes and
numbers. So one seed gives the PIL loader's pictures but for resampling and rounding, and a position
is all that a resumed run needs: DALI's readers, its shuffling and its random operators are not
used. Nor are its own worker processes: when one of them dies, DALI waits for it for ever.
"""

import atexit
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastgn.config.groups import AugmentationConfig
from fastgn.data.augment import BatchAugment
from fastgn.data.batch import Batch, epoch_order, rank_slice
from fastgn.data.datasets import Arrays
from fastgn.data.host import finished
from fastgn.data.images import BadImageError, Encoded, decode_image, load_or_next, thin
from fastgn.data.jpeg import plain_size
from fastgn.data.recipe import ARGUMENTS, FILL, Kind, Recipe
from fastgn.data.torch import as_it_is, from_workers
from fastgn.errors import UserError, first_line
from fastgn.seeding import Stream, seed_all, seed_host

try:
    from nvidia.dali import fn, math, pipeline_def, types
    from nvidia.dali.pipeline import do_not_convert
except ImportError:
    raise UserError(
        "--loader dali: NVIDIA DALI is not installed: pip install 'fastgn[dali]', which takes "
        "nvidia-dali-cuda130 (fastgn[dali-cuda120]: nvidia-dali-cuda120)"
    ) from None

AHEAD = 2
"""Batches that one pipeline makes before they are asked for."""
BY_DALI = False
"""Whether DALI's operators do on a CPU, too, what host.py does there: for tests of them."""


# ------------------------------------------------------------------------- in the worker processes


class Fed(NamedTuple):
    """A batch before it is decoded. Arrays within the Feeder, tensors from it."""

    encoded: Any
    """uint8: one after the other, files' bytes, or a PPM of what is not a plain JPEG."""
    lengths: Any
    """int64 B, of each one's bytes."""
    anchors: Any
    """int32 B x 2, row and column of the crop."""
    shapes: Any
    """int32 B x 2, height and width of the crop."""
    bilinear: Any
    """int32 B: how the crop is resized; bicubic otherwise."""
    flipped: Any
    """int32 B."""
    kinds: Any
    """int32 B x layers, of recipe.Kind."""
    arguments: Any
    """fp32 B x layers x ARGUMENTS."""
    labels: Any
    """int64 B."""
    complaints: list[str]
    """Why the batch cannot be used; mostly empty."""
    replaced: list[str]
    """A line for each bad image that another stands for; mostly empty."""


class Feeder(Dataset):
    """Position (epoch x batches_per_epoch + index) -> Fed."""

    def __init__(
        self,
        split: Encoded,
        recipe: Recipe,
        *,
        skip: bool,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
    ):
        self.split = split
        self.recipe = recipe
        self.skip = skip
        self.spoilt: dict[int, str] = {}
        """Image -> what PIL says of it, where that showed within DALI."""
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self._order = (-1, torch.empty(0))

    def keys(self, position: int) -> list[tuple[int, int]]:
        """(epoch, image) of a batch's images."""
        epoch, index = divmod(position, self.batches_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.split), self.seed, epoch))
        chosen = self._order[1][rank_slice(index, self.batch_size, self.rank, self.ranks)]
        return [(epoch, image) for image in chosen.tolist()]

    def __getitem__(self, position: int) -> Fed:
        size, layers = self.batch_size, max(1, self.recipe.layers)
        fed = Fed(
            np.zeros(0, np.uint8),
            np.zeros(size, np.int64),
            np.zeros((size, 2), np.int32),
            np.ones((size, 2), np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.zeros((size, layers), np.int32),
            np.zeros((size, layers, ARGUMENTS), np.float32),
            np.zeros(size, np.int64),
            [],
            [],
        )
        contents = []
        for place, (epoch, image) in enumerate(self.keys(position)):
            try:
                content = self.fill(fed, place, epoch, image)
            except BadImageError as error:  # told where the batch is taken, with no traceback
                content = BLACK
                fed.complaints.append(str(error))
            fed.lengths[place] = len(content)
            contents.append(np.frombuffer(content, np.uint8))
        arrays: list[Any] = [np.concatenate(contents), *fed[1:-2]]
        return Fed._make([*map(torch.from_numpy, arrays), fed.complaints, fed.replaced])

    def fill(self, fed: Fed, place: int, epoch: int, image: int) -> bytes:
        """An image's encoded bytes, or of the one that stands for it; what is done to it goes into
        fed. Raises BadImageError."""
        seed_host(Stream.IMAGE, self.seed, epoch, image)
        image, (content, decoded, size), bad = load_or_next(
            self.read, image, len(self.split), self.skip
        )
        fed.replaced.extend(bad)
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

    def read(self, image: int) -> tuple[bytes, Image.Image | None, tuple[int, int]]:
        """(bytes, the picture where DALI might see another than PIL, its width and height). Raises
        BadImageError."""
        if image in self.spoilt:
            raise BadImageError(self.spoilt[image])
        content = self.split.read(image)
        size = plain_size(content)
        if size and not thin(*size) and size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 0):
            return content, None, size
        decoded = decode_image(content, self.split.name(image))
        return content, decoded, decoded.size


def ppm(image: Image.Image) -> bytes:
    """Exact, and quick to decode."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


BLACK = ppm(Image.new("RGB", (1, 1)))


class Source:
    """Gives DALI batch after batch, and keeps what it does not need, in their order."""

    def __init__(self, feeder: Feeder, position: int, workers: int, worker_timeout: float):
        """position: of the first batch."""
        positions = itertools.count(position)
        options: dict[str, Any] = {"sampler": positions, "collate_fn": as_it_is}
        self.batches = from_workers(feeder, workers, worker_timeout, batch_size=None, **options)
        self.given: deque[tuple[Tensor, list[str], list[str]]] = deque()
        """(labels, complaints, replaced) of the batches that DALI has taken."""
        self.broken: str | None = None
        """Why there are no more."""

    def __call__(self) -> tuple[Any, ...]:
        """Fed without what is kept, as arrays."""
        try:
            fed = next(self.batches)
        except (RuntimeError, UserError) as error:
            self.broken = first_line(error)
            raise
        self.given.append((fed.labels, fed.complaints, fed.replaced))
        encoded = [x.numpy() for x in fed.encoded.split(fed.lengths.tolist())]
        return encoded, *(x.numpy() for x in fed[2:-3])

    def close(self) -> None:
        """Ends the worker processes."""
        self.batches.close()


# ------------------------------------------------------------------------------------ the pipeline


@pipeline_def(enable_conditionals=True)
def augmented(source: Source, recipe: Recipe, *, device: str) -> Any:
    """Source's batches -> fp32 3 x S x S in 0..1; device: DALI's name, cpu or gpu, of where it is
    done."""
    encoded, anchor, shape, bilinear, flipped, kinds, arguments = fn.external_source(
        source=source,
        num_outputs=7,
        batch=True,
        dtype=[types.UINT8, *[types.INT32] * 5, types.FLOAT],
        ndim=[1, 1, 1, 0, 0, 1, 2],
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
    if BY_DALI or device == "gpu":
        image = operated(recipe, crop, bilinear, flipped, kinds, arguments, device)
    else:
        image = fn.python_function(
            *(crop, bilinear, flipped, kinds, arguments),
            function=lambda *batch: list(map(partial(finished, recipe.img_size), *batch)),
            batch_processing=True,
            output_layouts="HWC",
        )
    image = fn.crop_mirror_normalize(
        image, dtype=types.FLOAT, output_layout="CHW", mean=[0.0], std=[255.0]
    )
    return image


def operated(
    recipe: Recipe, crop: Any, bilinear: Any, flipped: Any, kinds: Any, arguments: Any, device: str
) -> Any:
    """host.finished of a batch, by DALI's operators: on the device."""
    side, possible = recipe.img_size, sorted(recipe.kinds)
    if bilinear == 1:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_LINEAR)
    else:
        image = fn.resize(crop, size=[side, side], interp_type=types.INTERP_CUBIC)
    image = fn.flip(image, horizontal=flipped)
    for layer in range(recipe.layers):
        image = operate(possible, kinds[layer], image, arguments[layer], side, device)
    return image


# Operations on uint8 S x S x 3, PIL's to within 1 but for interpolation. Bytes are kept as bytes,
# and not broadcast, where that can be: DALI's floats take several times as long.


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


@do_not_convert
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


def to_bytes(values: Any, shift: float = 0.0) -> Any:
    """Rounds values + shift."""
    return fn.brightness_contrast(values, brightness_shift=shift / 255, dtype=types.UINT8)


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


@do_not_convert
def bicubic(image: Any, arguments: Any, side: int, device: str) -> Any:
    return warp(image, arguments, side, device, types.INTERP_CUBIC)


@do_not_convert
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


@do_not_convert
def auto_contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    """ImageOps.autocontrast."""
    low, high = (extreme(r, image) for r in (fn.reductions.min, fn.reductions.max))
    flat = fn.cast(low == high, dtype=types.UINT8)  # such a channel stays
    low = low * (byte(1) - flat)
    scale = 255.0 / (high - low + (byte(255) - high) * flat)
    return to_bytes((image - low) * scale, FLOOR)


@do_not_convert
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


@do_not_convert
def invert(image: Any, arguments: Any, side: int, device: str) -> Any:
    return byte(255) - image


@do_not_convert
def posterize(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image & fn.cast(first(arguments, device), dtype=types.UINT8)


@do_not_convert
def solarize(image: Any, arguments: Any, side: int, device: str) -> Any:
    return image ^ ((image >= fn.cast(first(arguments, device), dtype=types.INT32)) * byte(255))


@do_not_convert
def solarize_add(image: Any, arguments: Any, side: int, device: str) -> Any:
    """At most 128 is added."""
    return image + (image < byte(128)) * fn.cast(first(arguments, device), dtype=types.UINT8)


@do_not_convert
def color(image: Any, arguments: Any, side: int, device: str) -> Any:
    return blend(grey(image), image, first(arguments, device))


@do_not_convert
def contrast(image: Any, arguments: Any, side: int, device: str) -> Any:
    mean = extreme(fn.reductions.mean, grey(image))
    return blend(math.floor(mean + 0.5), image, first(arguments, device))


@do_not_convert
def brightness(image: Any, arguments: Any, side: int, device: str) -> Any:
    return fn.brightness_contrast(image, brightness=arguments[0], brightness_shift=FLOOR / 255)


@do_not_convert
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
        split: Arrays | Encoded,
        cfg: AugmentationConfig,
        augment: BatchAugment,
        *,
        img_size: int,
        hflip: float,
        workers: int,
        worker_timeout: float,
        skip: bool,
        batch_size: int,
        batches_per_epoch: int,
        seed: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ):
        """workers: threads that decode and augment, and a quarter as many processes that read and
        draw. With fewer than 4 the main process does that: 0.35 ms an image, and 0.8 in a process
        of its own on the same two cores."""
        if isinstance(split, Arrays):
            raise UserError("--loader dali decodes files: arrays need --loader device")
        self.feeder = Feeder(
            split,
            Recipe(cfg, img_size, hflip),
            skip=skip,
            batch_size=batch_size,
            batches_per_epoch=batches_per_epoch,
            seed=seed,
            rank=rank,
            ranks=ranks,
        )
        self.augment = augment
        self.workers = workers
        self.worker_timeout = worker_timeout
        self.bad_images: list[str] = []
        self.batches_per_epoch = batches_per_epoch
        self.seed, self.rank = seed, rank
        self.device = device
        self._source: Source | None = None
        self._pipelines: deque[Any] = deque()
        """The next one to give a batch comes first."""
        self._next = -1
        # workers that ignore signals have to be told to end, before Python waits for them
        atexit.register(close_if_alive, weakref.ref(self))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """See batch.Loader. Raises UserError on a bad image."""
        for index in range(first, self.batches_per_epoch):
            images, labels = self._take(epoch * self.batches_per_epoch + index)
            seed_all(Stream.AUGMENT, self.seed, epoch, index, self.rank)
            yield self.augment(images, labels)

    def close(self) -> None:
        """Ends the worker processes; the next batch asked for starts others."""
        self._pipelines = deque()
        if self._source is not None:
            self._source.close()
        self._source, self._next = None, -1
        sweep()

    def __del__(self) -> None:
        source = getattr(self, "_source", None)  # __init__ may have raised
        if source is not None:
            source.close()

    def _take(self, position: int) -> tuple[Tensor, Tensor]:
        """(images in 0..1, labels) on the device. The pipelines go on from epoch to epoch, and
        start anew where another position than the next one is asked for."""
        if self._source is None or position != self._next:
            self.close()
            self._start(position)
        assert self._source is not None
        try:
            pipeline = self._pipelines[0]
            (images,) = pipeline.share_outputs(**self._stream())
            pipeline.release_outputs()
            pipeline.schedule_run()
            self._pipelines.rotate(-1)
        except (RuntimeError, UserError) as error:
            image, failure = self._explain(error, position)
            self.close()
            if image is None or not self.feeder.skip:
                raise failure from None
            self.feeder.spoilt[image] = str(failure)
            return self._take(position)
        labels_B, complaints, replaced = self._source.given.popleft()
        if complaints:
            self.close()
            raise UserError(complaints[0])
        self.bad_images += replaced
        self._next = position + 1
        images_BCHW = torch.from_dlpack(images.as_tensor())
        return images_BCHW, labels_B.to(self.device, non_blocking=True)

    def _stream(self) -> dict[str, Any]:
        """Outputs are ordered with torch's work, without a wait by the host."""
        if self.device.type != "cuda":
            return {}
        return {"cuda_stream": torch.cuda.current_stream(self.device)}

    def _start(self, position: int) -> None:
        """On CUDA one pipeline, AHEAD batches ahead. On a CPU one of one thread for each worker,
        and one while the main process feeds: threads of one pipeline wait for each other after
        every operation on a few images."""
        cuda = self.device.type == "cuda"
        count = 1 if cuda or not self.workers else self.workers + 1
        self._source = Source(self.feeder, position, self.workers // 4, self.worker_timeout)
        for _ in range(count):
            pipeline = augmented(
                self._source,
                self.feeder.recipe,
                device="gpu" if cuda else "cpu",
                batch_size=self.feeder.batch_size,
                num_threads=max(1, self.workers) if cuda else 1,
                device_id=(self.device.index or 0) if cuda else None,
                prefetch_queue_depth=AHEAD if count == 1 else 1,
            )
            self._pipelines.append(pipeline)
        sweep()
        KEPT.append((weakref.ref(self), self._pipelines))
        for pipeline in self._pipelines:
            pipeline.build()
            pipeline.schedule_run()

    def _explain(self, error: Exception, position: int) -> tuple[int | None, UserError]:
        """Of an error within DALI, which names no file: the image that it comes from, and what to
        say."""
        assert self._source is not None
        if self._source.broken is not None:
            return None, UserError(f"--loader dali: {self._source.broken}")
        ahead = max(AHEAD, len(self._pipelines))
        keys = [k for p in range(ahead + 1) for k in self.feeder.keys(position + p)]
        for _, image in keys:
            if image not in self.feeder.spoilt:
                try:
                    self.feeder.split.image(image)
                except BadImageError as bad:
                    return image, bad
        return None, UserError(
            f"--loader dali: {reason_of(error)} (in a batch that begins with "
            f"{self.feeder.split.name(keys[0][1])}; PIL decodes all of it: try --loader torch)"
        )


KEPT: list[tuple["weakref.ref[DaliLoader]", deque[Any]]] = []
"""All pipelines. Else Python's garbage collector would end those of a forgotten loader, and it may
run in one of their own threads, as they call Python: the thread would wait for itself."""


def sweep() -> None:
    """Ends the pipelines that no loader has any more."""
    KEPT[:] = [(ref, x) for ref, x in KEPT if getattr(ref(), "_pipelines", None) is x]


def close_if_alive(reference: "weakref.ref[DaliLoader]") -> None:
    loader = reference()
    if loader is not None:
        loader.close()


def reason_of(error: Exception) -> str:
    """DALI's message without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i for i, line in enumerate(lines) if line.startswith("encountered:")]
    return lines[min(after[0] + 1, len(lines) - 1)] if after else lines[0]
