"""The DALI backend: decode and crop on the GPU, or with DALI's CPU operators."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from numpy.typing import NDArray
from nvidia.dali import pipeline_def
from torch import Tensor

from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.headers import is_regular_jpeg, read_header
from fastsimclr.data.images import as_ppm, decode
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_batch_params
from fastsimclr.data.pixels import RGB8
from fastsimclr.data.replacement import read_or_replace
from fastsimclr.data.scaled import decode_scaled, may_be_scaled
from fastsimclr.data.sources import EncodedSource, Source, decoded
from fastsimclr.errors import UserError

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_PREFETCH = 2  # batches in the pipeline
_READ_AHEAD = 2  # further batches whose files are being read


@dataclass(frozen=True)
class _Image:
    """An image as it enters the pipeline."""

    data: NDArray[np.uint8]
    """A JPEG file, or the decoded pixels: as a PPM file, or (H, W, C)."""
    is_jpeg: bool
    size: tuple[int, int]
    """Height and width of the upright image in full."""
    boxes: NDArray[np.float64] | None = None
    """(V, 4): top, left, height and width of each view's crop in `data`; None for those sampled, in full pixels."""


@dataclass
class _Batch:
    """A batch on its way through the pipeline."""

    request: BatchRequest
    futures: list[Future[tuple[int, _Image, dict[int, str]]]]
    """Of each image what `read_or_replace` returns."""
    params: list[ViewParams] = field(default_factory=list)

    def images(self) -> list[_Image]:
        """Return the images once they are read. Raises UserError."""
        return [future.result()[1] for future in self.futures]

    def used(self) -> NDArray[np.int64]:
        return np.array([future.result()[0] for future in self.futures])

    def bad(self) -> dict[int, str]:
        return {index: reason for future in self.futures for index, reason in future.result()[2].items()}


class DaliBackend:
    """Crop backend that runs a DALI pipeline. Order, crops and flips are external inputs, the same as in all backends.

    Threads read the files, their sizes and orientation, by the reader of headers that all backends share. The pipeline
    decodes each image once and crops, resizes and flips it for each view. Its outputs are shared with torch without a
    copy (DLPack).

    The pipeline decodes JPEGs only. The threads decode, for all backends alike, and pass the pixels of:
    - other formats, as no GPU decodes them, and DALI does not decode all of them;
    - JPEGs that EXIF data turns: DALI disagrees with other readers on damaged EXIF data;
    - large JPEGs at a fraction of their size (data/scaled.py), also if the device is a GPU. Decoded in full there, a
      photograph of 4000x3000 takes 36 MB of its memory instead of 0.6 to 2, and its views would differ from those of
      the other backends. `scaled_decode="off"` leaves them to the GPU;
    - JPEGs whose header has a fault: DALI's parser then corrupts memory;
    - JPEGs that DALI refuses, though our decoder does not (damaged ones). Such an image is found when it fails the
      pipeline, which is then built again and given the same batches.
    """

    def __init__(
        self, source: Source, augmentation: Augmentation, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self.source, self.augmentation, self.device = source, augmentation, device
        self._decodes = isinstance(source, EncodedSource) and source.pixels == RGB8  # DALI decodes only 8-bit RGB
        self._refused: set[int] = set()  # images that DALI does not decode
        readers = max(2, threads, source.parallel_reads) if source.thread_safe else 1
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="fastsimclr-read")
        self._requests: Iterator[BatchRequest] = iter(())
        self._read_queue: deque[_Batch] = deque()
        self._in_pipeline: deque[_Batch] = deque()  # batches that the pipeline has taken but not returned
        self._bad_input: UserError | None = None
        self._in_use: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._batch_size, self._threads = batch_size, threads
        no_params, no_boxes = np.empty(0, VIEW_PARAMS), np.empty((0, 4), np.float32)
        self._names = [list(self._view_inputs(no_params, no_boxes, recipe)) for recipe in augmentation.recipes]
        self._pipeline = self._build(self._graph)

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        self._requests = requests
        self._pipeline = self._pipeline or self._build(self._graph)
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
        try:
            while self._pipeline is not None:  # None: it failed
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except Exception:  # of a batch that is discarded
            self._pipeline = None
        self._in_pipeline.clear()
        self._bad_input = None

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

    def _read(self, index: int, request: BatchRequest, row: int) -> _Image:
        """Read image `index` for a row of the request; decode it unless DALI does. Raises UserError."""
        if not self._decodes:
            pixels = np.ascontiguousarray(decoded(self.source, index).permute(1, 2, 0).numpy())
            return _Image(pixels, False, pixels.shape[:2])
        assert isinstance(self.source, EncodedSource)
        data, name = self.source.read(index), self.source.name(index)
        header = read_header(data, name)
        header.check_pixels(self.source.max_pixels, name)
        size = header.upright_size
        if may_be_scaled(self.source, header):
            params = self._sample(request, slice(row, row + 1), [size])
            if scaled := decode_scaled(data, header, self.augmentation, params):
                return _Image(as_ppm(scaled.image), False, size, scaled.boxes)
        is_plain = header.format == "JPEG" and header.orientation == 1 and is_regular_jpeg(data)
        if is_plain and index not in self._refused:
            return _Image(data, True, size)
        return _Image(as_ppm(decode(data, name, header=header)), False, size)

    def _sample(self, request: BatchRequest, rows: slice, sizes: Sequence[tuple[int, int]]) -> list[ViewParams]:
        index = request.index[rows]
        return sample_batch_params(self.augmentation, request.seed, request.epoch, index, np.array(sizes))

    def _start_reading(self, request: BatchRequest) -> _Batch:
        def read(row: int) -> tuple[int, _Image, dict[int, str]]:
            return read_or_replace(request, row, len(self.source), partial(self._read, request=request, row=row))

        return _Batch(request, [self._readers.submit(read, row) for row in range(len(request.index))])

    def _next_inputs(self) -> tuple[Any, ...]:
        """Return the pipeline's inputs for the next batch: images, then the inputs of each view. Called by DALI."""
        while len(self._read_queue) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._read_queue.append(self._start_reading(request))
        if not self._read_queue:
            raise StopIteration
        batch = self._read_queue[0]
        try:
            images = batch.images()
        except UserError as error:
            self._bad_input = error  # raised after the batches before it, which are complete
            raise StopIteration from None
        self._in_pipeline.append(self._read_queue.popleft())
        batch.params = params = self._sample(batch.request, slice(None), [image.size for image in images])
        boxes = np.stack([each["box"] for each in params], axis=1).astype(np.float32)  # (B, V, 4)
        for i, image in enumerate(images):
            if image.boxes is not None:
                boxes[i] = image.boxes  # exact, as they are in eighths of pixels
        inputs: list[Any] = [[image.data for image in images]]
        for view, recipe in enumerate(self.augmentation.recipes):
            inputs += self._view_inputs(params[view], boxes[:, view], recipe).values()
        return tuple(inputs)

    def _view_inputs(self, params: ViewParams, boxes: NDArray[np.float32], recipe: Augmentation) -> dict[str, Any]:
        """Return the pipeline's inputs for a view, by name. params: (B,); boxes: (B, 4) in pixels of the inputs."""
        inputs = {"start": boxes[:, :2], "end": boxes[:, :2] + boxes[:, 2:], "flip": params["flip"].astype(np.int32)}
        return {name: np.ascontiguousarray(values) for name, values in inputs.items()}  # as DALI requires

    def _next_batch(self) -> CroppedBatch | None:
        """Return the next batch from the pipeline; None after the last one."""
        while True:
            try:
                views = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                if self._bad_input is not None:
                    error, self._bad_input = self._bad_input, None
                    raise error from None
                return None
            except Exception:  # DALI's errors share no base class
                self._pipeline = None  # it cannot be used after an error
                if not (refused := self._find_refused()):
                    raise  # not due to an image; the next epoch builds a new pipeline
                self._restart_without(refused)
                continue
            batch = self._in_pipeline.popleft()
            crops = tuple(torch.from_dlpack(view.as_tensor()) for view in views)
            pixels = self.source.pixels
            # In place: the crops are DALI's buffers, which are kept until they have been read.
            crops = crops if pixels == RGB8 else tuple(map(pixels.to_unit_, crops))
            return CroppedBatch(crops, batch.params, batch.used(), batch.bad())

    def _find_refused(self) -> list[int]:
        """Return the images that DALI refuses in the first batch that has any, as it does not name them.

        Each of them is passed decoded when it is read again, or replaced if that fails, so no failure repeats.
        """
        for batch in self._in_pipeline:
            refused, probe = [], None
            for index, image, _ in (future.result() for future in batch.futures):
                if not image.is_jpeg:
                    continue
                probe = probe or self._build(self._probe_graph, batch_size=1, prefetch_queue_depth=1)
                try:
                    probe.run(image=[image.data])
                except Exception:
                    refused.append(index)
                    probe = None
            if refused:
                return refused
        return []

    def _restart_without(self, refused: list[int]) -> None:
        """Decode the images `refused` in the reading threads from now on, and give the batches to a new pipeline."""
        self._refused.update(refused)
        self._read_queue.extendleft(self._start_reading(batch.request) for batch in reversed(self._in_pipeline))
        self._in_pipeline.clear()
        self._pipeline = self._build(self._graph)

    def _build(self, graph: Callable[[], Any], **options: Any) -> Any:
        """Build a pipeline. options: arguments of pipeline_def."""
        on_gpu = self.device.type == "cuda"
        arguments = {
            "batch_size": self._batch_size,
            "num_threads": self._threads,
            "device_id": self.device.index or 0 if on_gpu else None,
            "prefetch_queue_depth": _PREFETCH,
        }
        pipeline = pipeline_def(**arguments | options)(graph)()
        pipeline.build()
        return pipeline

    def _graph(self) -> Any:
        """Define the pipeline; returns its outputs, one (S, S, C) per view."""
        images, *inputs = fn.external_source(self._next_inputs, num_outputs=1 + sum(map(len, self._names)))
        if self._decodes:
            images = self._decoder(images)
        elif self.device.type == "cuda":
            images = images.gpu()
        images = fn.reshape(images, layout="HWC")
        views = []
        for number, recipe in enumerate(self.augmentation.recipes):
            view_inputs = {name: inputs.pop(0) for name in self._names[number]}
            views.append(self._view(images, view_inputs, recipe))
        return tuple(views)

    def _probe_graph(self) -> Any:
        """Define the pipeline that only decodes its input "image"."""
        return self._decoder(fn.external_source(name="image"))

    def _decoder(self, files: Any) -> Any:
        return fn.decoders.image(
            files,
            device="mixed" if self.device.type == "cuda" else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
        )

    def _view(self, images: Any, inputs: dict[str, Any], recipe: Augmentation) -> Any:
        """Define one view, (S, S, C), of each image, from the inputs of `_view_inputs`."""
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
