"""The DALI backend: decode and crop on the GPU, or with DALI's CPU operators."""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
from fastsimclr.data.sources import EncodedSource, Source, decoded
from fastsimclr.errors import UserError

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_PREFETCH = 2  # batches in the pipeline
_READ_AHEAD = 2  # further batches whose files are being read


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
        readers = max(2, threads) if source.thread_safe else 1
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="fastsimclr-read")
        self._requests: Iterator[BatchRequest] = iter(())
        self._read_queue: deque[tuple[BatchRequest, list[Future[NDArray[np.uint8]]]]] = deque()
        # Batches that the pipeline has taken but not returned.
        self._in_pipeline: deque[tuple[BatchRequest, list[ViewParams]]] = deque()
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
        """Empty the pipeline for the next epoch, also if this one was abandoned."""
        self._requests = iter(())
        for _, files in self._read_queue:
            for file in files:
                file.cancel()
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

    def _read(self, index: int) -> NDArray[np.uint8]:
        if not self._decodes:
            return np.ascontiguousarray(decoded(self.source, int(index)).permute(1, 2, 0).numpy())
        assert isinstance(self.source, EncodedSource)
        data = self.source.read(index)
        # Formats that DALI does not decode, or decodes differently, are passed as PPM, i.e. raw pixels.
        return data if is_web_format(data) else as_ppm(decode(data, self.source.name(index)))

    def _next_inputs(self) -> tuple[Any, ...]:
        """Return the pipeline's inputs for the next batch: images, then the inputs of each view. Called by DALI."""
        while len(self._read_queue) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._read_queue.append((request, [self._readers.submit(self._read, index) for index in request.index]))
        if not self._read_queue:
            raise StopIteration
        request, files = self._read_queue.popleft()
        try:
            images = [file.result() for file in files]
            params = sample_batch_params(self.augmentation, *request, self._sizes(request, images))
        except UserError as error:
            self._bad_input = error  # raised after the batches before it, which are complete
            raise StopIteration from None
        self._in_pipeline.append((request, params))
        inputs = map(self._view_inputs, params, self.augmentation.recipes)
        return images, *[values for view_inputs in inputs for values in view_inputs.values()]

    def _view_inputs(self, params: ViewParams, recipe: Augmentation) -> dict[str, Any]:
        """Return the pipeline's inputs for a view with parameters `params` (B,), by name."""
        box = params["box"].astype(np.float32)
        inputs = {"start": box[:, :2], "end": box[:, :2] + box[:, 2:], "flip": params["flip"].astype(np.int32)}
        return {
            name: np.ascontiguousarray(values) for name, values in inputs.items()
        }  # DALI requires contiguous arrays

    def _sizes(self, request: BatchRequest, images: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
        """Return (B, 2): height and width of the upright images."""
        if not self._decodes:
            return np.array([image.shape[:2] for image in images])
        assert isinstance(self.source, EncodedSource)
        if self.source.sizes is not None:
            return self.source.sizes[request.index]
        return np.array(
            [read_header(data, self.source.name(i)).upright_size for data, i in zip(images, request.index, strict=True)]
        )

    def _next_batch(self) -> CroppedBatch | None:
        """Return the next batch from the pipeline; None at the end of the epoch."""
        try:
            outputs = self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
            if self._bad_input is not None:
                error, self._bad_input = self._bad_input, None
                raise error from None
            return None
        except Exception:  # DALI's errors share no base class
            requests = [request for request, _ in self._in_pipeline]
            self._in_pipeline.clear()
            self._pipeline = None  # it cannot be used after an error; the next epoch builds a new one
            for request in requests:
                self._raise_if_bad(request)
            raise  # not due to an image
        _, params = self._in_pipeline.popleft()
        crops = tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
        pixels = self.source.pixels
        # In place: the crops are DALI's buffers, which are kept until they have been read.
        return CroppedBatch(crops if pixels == RGB8 else tuple(map(pixels.to_unit_, crops)), params)

    def _raise_if_bad(self, request: BatchRequest) -> None:
        """Raise UserError for the first image that `decode` rejects, as DALI does not report which one failed."""
        if isinstance(self.source, EncodedSource):
            for index in request.index:
                decode(self.source.read(index), self.source.name(index))

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
