"""The DALI backend: decode and crop on the GPU, or with DALI's CPU operators."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from torch import Tensor

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.headers import read_header
from fastsimclr.data.images import as_ppm, decode, is_web_format
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_batch_params
from fastsimclr.data.pixels import RGB8
from fastsimclr.data.replacement import read_or_replace
from fastsimclr.data.sources import EncodedSource, Source, decoded
from fastsimclr.errors import UserError

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_PREFETCH = 2  # batches in the pipeline
_READ_AHEAD = 2  # further batches whose files are being read


class _Image(NamedTuple):
    """Input of the pipeline for one image."""

    data: NDArray[Any]
    """A file (n,) of uint8, or pixels (H, W, C)."""
    size: Sequence[int]
    """Height and width of the upright image."""


_Load = Callable[[int], _Image]


@dataclass
class _Batch:
    """A batch on its way through the pipeline."""

    request: BatchRequest
    load: _Load
    """What reads its images."""
    futures: list[Future[tuple[int, _Image, dict[int, str]]]]
    """Of each image what `read_or_replace` returns."""
    images: list[tuple[int, _Image, dict[int, str]]] = field(default_factory=list)
    """Their results."""
    params: list[ViewParams] = field(default_factory=list)


class DaliBackend:
    """Crop backend that runs a DALI pipeline. Order, crops and flips are external inputs, the same as in all backends.

    Threads read the files and the image sizes in their headers. The pipeline decodes each image once and crops, resizes
    and flips it for each view. Its outputs are shared with torch without a copy (DLPack).
    """

    def __init__(
        self, source: Source, augmentation: Augmentation, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self.source, self.augmentation, self.device = source, augmentation, device
        self._decodes = isinstance(source, EncodedSource) and source.pixels == RGB8  # DALI decodes only 8-bit RGB
        readers = max(2, threads, source.parallel_reads) if source.thread_safe else 1
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="fastsimclr-read")
        self._requests: Iterator[BatchRequest] = iter(())
        self._read_queue: deque[_Batch] = deque()
        self._in_pipeline: deque[_Batch] = deque()  # batches that the pipeline has taken but not returned
        self._bad_input: UserError | None = None
        self._in_use: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._batch_size, self._threads = batch_size, threads
        self._names = [list(self._view_inputs(np.empty(0, VIEW_PARAMS), recipe)) for recipe in augmentation.recipes]
        self._pipeline = self._build()

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        self._requests = requests
        self._pipeline = self._pipeline or self._build()
        try:
            while (batch := self._next_batch()) is not None:
                yield batch
                self._keep_until_read(batch.crops)
        finally:
            self._drain()

    def _drain(self) -> None:
        """Empty the pipeline for other requests."""
        self._requests = iter(())
        for batch in self._read_queue:
            for future in batch.futures:
                future.cancel()
        self._read_queue.clear()
        with contextlib.suppress(Exception):  # errors of batches that are discarded
            while self._pipeline is not None and self._next_batch() is not None:  # None: it was reset
                pass

    def _keep_until_read(self, crops: tuple[Tensor, ...]) -> None:
        """Hold the crops until torch's stream has read them, as DALI overwrites released buffers (GPU only)."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()  # after all work that the consumer has queued so far
            self._in_use.append((event, crops))
            while self._in_use[0][0].query() and len(self._in_use) > 1:
                self._in_use.popleft()

    def device_bytes(self) -> int:
        return 0  # DALI reports it only for executors with exec_dynamic=False, which is not used here

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipeline = None

    def _next_inputs(self) -> tuple[Any, ...]:
        """Return the pipeline's inputs for the next batch: images, then the inputs of each view. Called by DALI."""
        while len(self._read_queue) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._read_queue.append(self._start_reading(request, self._load))
        if not self._read_queue:
            raise StopIteration
        batch = self._read_queue.popleft()
        try:
            batch.images = [future.result() for future in batch.futures]
        except UserError as error:
            self._bad_input = error  # raised after the batches before it, which are complete
            raise StopIteration from None
        sizes = np.array([image.size for _, image, _ in batch.images])
        request = batch.request
        batch.params = sample_batch_params(self.augmentation, request.seed, request.epoch, request.index, sizes)
        self._in_pipeline.append(batch)
        inputs = map(self._view_inputs, batch.params, self.augmentation.recipes)
        views = [values for view_inputs in inputs for values in view_inputs.values()]
        return [image.data for _, image, _ in batch.images], *views

    def _start_reading(self, request: BatchRequest, load: "_Load") -> "_Batch":
        read = partial(read_or_replace, request, images=len(self.source), read=load)
        return _Batch(request, load, [self._readers.submit(read, row) for row in range(len(request.index))])

    def _load(self, index: int) -> "_Image":
        """Return an image for DALI to decode."""
        if not self._decodes:
            pixels = np.ascontiguousarray(decoded(self.source, int(index)).permute(1, 2, 0).numpy())
            return _Image(pixels, pixels.shape[:2])
        data, name = self._read_file(index)
        # Formats that DALI does not decode, or decodes differently, are passed as PPM, i.e. raw pixels.
        return _Image(data, read_header(data, name).upright_size) if is_web_format(data) else self._load_pixels(index)

    def _load_checked(self, index: int) -> "_Image":
        """Return the same, for an image that our decoder accepts. Raises UserError for others."""
        self._load_pixels(index)
        return self._load(index)

    def _load_pixels(self, index: int) -> "_Image":
        """Return an image that our decoder has decoded."""
        image = decode(*self._read_file(index))
        return _Image(as_ppm(image), image.shape[1:])

    def _read_file(self, index: int) -> tuple[NDArray[np.uint8], str]:
        assert isinstance(self.source, EncodedSource)
        return self.source.read(index), self.source.name(index)

    def _view_inputs(self, params: ViewParams, recipe: Augmentation) -> dict[str, Any]:
        """Return the pipeline's inputs for a view with parameters `params` (B,), by name."""
        box = params["box"].astype(np.float32)
        inputs = {"start": box[:, :2], "end": box[:, :2] + box[:, 2:], "flip": params["flip"].astype(np.int32)}
        return {
            name: np.ascontiguousarray(values) for name, values in inputs.items()
        }  # DALI requires contiguous arrays

    def _next_batch(self) -> CroppedBatch | None:
        """Return the next batch from the pipeline; None after the last one."""
        while True:
            try:
                outputs = self._pipeline.run()
                break
            except StopIteration:
                self._pipeline.reset()
                if self._bad_input is not None:
                    error, self._bad_input = self._bad_input, None
                    raise error from None
                return None
            except Exception:  # DALI's errors share no base class
                self._pipeline = None  # it cannot be used after an error
                self._retry()
                self._pipeline = self._build()
        batch = self._in_pipeline.popleft()
        crops = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        pixels = self.source.pixels
        if pixels != RGB8:  # in place: the crops are DALI's buffers, which are kept until they have been read
            crops = tuple(map(pixels.to_unit_, crops))
        used = np.array([index for index, _, _ in batch.images])
        return CroppedBatch(crops, batch.params, used, dict(item for _, _, bad in batch.images for item in bad.items()))

    def _retry(self) -> None:
        """Put the batches in the pipeline back into the queue after an error of DALI, which is due to the first one.

        DALI does not report which image failed. At the first error those that our decoder rejects are replaced; at the
        second, our decoder decodes the whole batch; at the third, the error is raised again.
        """
        first, *others = self._in_pipeline
        stages: list[_Load] = [self._load, self._load_checked, self._load_pixels]
        if not self._decodes or first.load == stages[-1]:
            self._in_pipeline.clear()
            raise
        load = stages[stages.index(first.load) + 1]
        self._read_queue.extendleft(reversed([self._start_reading(first.request, load), *others]))
        self._in_pipeline.clear()

    def _build(self, **options: Any) -> Any:
        """Build the pipeline. options: arguments of pipeline_def."""
        on_gpu = self.device.type == "cuda"
        pipeline = pipeline_def(**options)(self._graph)(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=_PREFETCH,
        )
        pipeline.build()
        return pipeline

    def _graph(self) -> Any:
        """Define the pipeline; returns its outputs, one (H, W, C) per view."""
        on_gpu = self.device.type == "cuda"
        images, *inputs = fn.external_source(self._next_inputs, num_outputs=1 + sum(map(len, self._names)))
        if self._decodes:
            decoder = "mixed" if on_gpu else "cpu"
            images = fn.decoders.image(images, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
        elif on_gpu:
            images = images.gpu()
        images = fn.reshape(images, layout="HWC")
        views = []
        for number, recipe in enumerate(self.augmentation.recipes):
            view_inputs = {name: inputs.pop(0) for name in self._names[number]}
            views.append(self._view(images, view_inputs, recipe))
        return tuple(views)

    def _view(self, images: Any, inputs: dict[str, Any], recipe: Augmentation) -> Any:
        """Define one view, (H, W, C), of each image, from the inputs of `_view_inputs`."""
        device = "gpu" if self.device.type == "cuda" else "cpu"
        view = fn.resize(
            images,
            device=device,
            size=[recipe.image_size] * 2,
            roi_start=inputs["start"],
            roi_end=inputs["end"],
            antialias=True,
            interp_type=_INTERPOLATION[recipe.interpolation],
            **({} if self.source.pixels == RGB8 else {"dtype": types.FLOAT}),
        )
        return fn.flip(view, device=device, horizontal=inputs["flip"])
