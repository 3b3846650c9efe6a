"""Decoding and cropping by NVIDIA DALI: on the GPU, or by its CPU operators."""

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
from fastsimclr.data.images import as_ppm, decode, is_web_format, upright_size
from fastsimclr.data.loader import BatchRequest, CroppedBatch
from fastsimclr.data.params import VIEW_PARAMS, ViewParams, sample_batch_params
from fastsimclr.data.sources import ArraySource, EncodedSource, Source
from fastsimclr.errors import UserError

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AHEAD = 2  # batches inside the pipeline
_READ_AHEAD = 2  # further batches whose files are being read


class DaliBackend:
    """A pipeline whose order, crops and flips come from outside: they are the same in every loader.

    Threads read files and find each image's size by its header; the pipeline decodes it once and crops, resizes and
    flips it for each view. Its outputs are handed on without a copy (DLPack).
    """

    def __init__(
        self, source: Source, augmentation: Augmentation, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self.source, self.augmentation, self.device = source, augmentation, device
        self._readers = ThreadPoolExecutor(max_workers=max(2, threads), thread_name_prefix="fastsimclr-read")
        self._requests: Iterator[BatchRequest] = iter(())
        self._reading: deque[tuple[BatchRequest, list[Future[NDArray[np.uint8]]]]] = deque()
        self._inside: deque[tuple[BatchRequest, list[ViewParams]]] = (
            deque()
        )  # batches that the pipeline has taken, not given back
        self._bad_input: UserError | None = None
        self._lent: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._batch_size, self._threads = batch_size, threads
        self._names = [list(self._view_inputs(np.empty(0, VIEW_PARAMS), recipe)) for recipe in augmentation.recipes]
        self._pipeline = self._build()

    def crops(self, requests: Iterator[BatchRequest]) -> Generator[CroppedBatch, None, None]:
        self._requests = requests
        self._pipeline = self._pipeline or self._build()
        try:
            while (made := self._run()) is not None:
                yield made
                self._lend(made.crops)
        finally:
            self._empty()

    def _empty(self) -> None:
        """Leave the pipeline empty for the next epoch, also where this one was abandoned."""
        self._requests = iter(())
        for _, files in self._reading:
            for file in files:
                file.cancel()
        self._reading.clear()
        with contextlib.suppress(Exception):  # of batches that nobody asked for
            while self._pipeline is not None and self._run() is not None:  # None: it has taken note of the end
                pass

    def _lend(self, augmentation: tuple[Tensor, ...]) -> None:
        """On a GPU, keep DALI from writing into buffers that torch's stream has still to read."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()  # behind whatever the consumer has queued by now
            self._lent.append((event, augmentation))
            while self._lent[0][0].query() and len(self._lent) > 1:
                self._lent.popleft()

    def device_bytes(self) -> int:
        return 0  # DALI tells it only of executors with exec_dynamic=False, which this is not

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipeline = None

    def _read(self, index: int) -> NDArray[np.uint8]:
        if isinstance(self.source, ArraySource):
            return self.source.images[index].numpy()
        assert isinstance(self.source, EncodedSource)
        data = self.source.read(index)
        # Formats that DALI knows not, or not alike, go in as raw pixels behind a PPM header.
        return data if is_web_format(data) else as_ppm(decode(data, self.source.name(index)))

    def _inputs(self) -> tuple[Any, ...]:
        """DALI asks for the next batch: images, then each view's inputs."""
        while len(self._reading) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._reading.append((request, [self._readers.submit(self._read, index) for index in request.index]))
        if not self._reading:
            raise StopIteration
        request, files = self._reading.popleft()
        try:
            images = [file.result() for file in files]
            params = sample_batch_params(self.augmentation, *request, self._sizes(request, images))
        except UserError as error:
            self._bad_input = error  # to be raised behind the batches before it, which are whole
            raise StopIteration from None
        self._inside.append((request, params))
        of_views = map(self._view_inputs, params, self.augmentation.recipes)
        return images, *[values for of_view in of_views for values in of_view.values()]

    def _view_inputs(self, params: ViewParams, recipe: Augmentation) -> dict[str, Any]:
        """What the pipeline needs of a view's draws (B,), by name."""
        box = params["box"].astype(np.float32)
        inputs = {"start": box[:, :2], "end": box[:, :2] + box[:, 2:], "flip": params["flip"].astype(np.int32)}
        return {name: np.ascontiguousarray(values) for name, values in inputs.items()}  # DALI takes no others

    def _sizes(self, request: BatchRequest, images: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
        """(B, 2): heights and widths, upright."""
        if isinstance(self.source, ArraySource):
            return np.array([image.shape[:2] for image in images])
        assert isinstance(self.source, EncodedSource)
        if self.source.sizes is not None:
            return self.source.sizes[request.index]
        return np.array(
            [upright_size(data, self.source.name(i)) for data, i in zip(images, request.index, strict=True)]
        )

    def _run(self) -> CroppedBatch | None:
        """The next batch; None when all are out."""
        try:
            outputs = self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
            if self._bad_input is not None:
                error, self._bad_input = self._bad_input, None
                raise error from None
            return None
        except Exception:  # DALI's errors share no base class
            requests = [request for request, _ in self._inside]
            self._inside.clear()
            self._pipeline = None  # it cannot go on after an error; the next epoch builds another
            for request in requests:
                self._blame(request)
            raise  # no image is to blame
        _, params = self._inside.popleft()
        return CroppedBatch(tuple(torch.from_dlpack(output.as_tensor()) for output in outputs), params)

    def _blame(self, request: BatchRequest) -> None:
        """DALI does not say which image it failed on: raise UserError for the first that our own decoder refuses."""
        if isinstance(self.source, EncodedSource):
            for index in request.index:
                decode(self.source.read(index), self.source.name(index))

    def _build(self, **options: Any) -> Any:
        """The pipeline. options: pipeline_def's."""
        on_gpu = self.device.type == "cuda"
        pipeline = pipeline_def(**options)(self._graph)(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        pipeline.build()
        return pipeline

    def _graph(self) -> Any:
        """The pipeline's outputs: each view, HWC."""
        on_gpu = self.device.type == "cuda"
        images, *inputs = fn.external_source(self._inputs, num_outputs=1 + sum(map(len, self._names)))
        if isinstance(self.source, EncodedSource):
            decoder = "mixed" if on_gpu else "cpu"
            images = fn.decoders.image(images, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
        elif on_gpu:
            images = images.gpu()
        images = fn.reshape(images, layout="HWC")
        views = []
        for number, recipe in enumerate(self.augmentation.recipes):
            of_view = {name: inputs.pop(0) for name in self._names[number]}
            views.append(self._view(images, of_view, recipe))
        return tuple(views)

    def _view(self, images: Any, inputs: dict[str, Any], recipe: Augmentation) -> Any:
        """One view, HWC, of each image, by the inputs of `_view_inputs`."""
        place = "gpu" if self.device.type == "cuda" else "cpu"
        view = fn.resize(
            images,
            device=place,
            size=[recipe.image_size] * 2,
            roi_start=inputs["start"],
            roi_end=inputs["end"],
            antialias=True,
            interp_type=_INTERPOLATION[recipe.interpolation],
        )
        return fn.flip(view, device=place, horizontal=inputs["flip"])
