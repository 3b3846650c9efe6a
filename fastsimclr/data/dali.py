"""Decoding and cropping by NVIDIA DALI: on the GPU, or by its CPU operators where there is none."""

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
from nvidia.dali import Pipeline
from torch import Tensor

from fastsimclr.data.draws import boxes
from fastsimclr.data.images import as_ppm, decode, is_web_format, upright_size
from fastsimclr.data.loader import Job
from fastsimclr.data.sources import ArraySource, EncodedSource, Source
from fastsimclr.errors import UserError
from fastsimclr.views import Views

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_AHEAD = 2  # batches inside the pipeline
_READ_AHEAD = 2  # further batches whose files are being read


class DaliFront:
    """A pipeline whose order, crops and flips come from outside: they are the same in every loader.

    Threads read files and find each image's size by its header; the pipeline decodes it once and crops, resizes and
    flips it for each view. Its outputs are handed on without a copy (DLPack).
    """

    def __init__(self, source: Source, views: Views, device: torch.device, batch_size: int, threads: int) -> None:
        self.source, self.views, self.device = source, views, device
        self._readers = ThreadPoolExecutor(max_workers=max(2, threads), thread_name_prefix="fastsimclr-read")
        self._jobs: Iterator[Job] = iter(())
        self._reading: deque[tuple[Job, list[Future[NDArray[np.uint8]]]]] = deque()
        self._inside: deque[Job] = deque()  # batches that the pipeline has taken and not given back
        self._bad_input: UserError | None = None
        self._lent: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()
        self._batch_size, self._threads = batch_size, threads
        self._pipeline = self._build()

    def crops(self, jobs: Iterator[Job]) -> Generator[tuple[Tensor, ...], None, None]:
        self._jobs = jobs
        self._pipeline = self._pipeline or self._build()
        try:
            while (views := self._run()) is not None:
                yield views
                self._lend(views)
        finally:
            self._empty()

    def _empty(self) -> None:
        """Leave the pipeline empty for the next epoch, also where this one was abandoned."""
        self._jobs = iter(())
        for _, files in self._reading:
            for file in files:
                file.cancel()
        self._reading.clear()
        with contextlib.suppress(Exception):  # of batches that nobody asked for
            while self._pipeline is not None and self._run() is not None:  # None: it has taken note of the end
                pass

    def _lend(self, views: tuple[Tensor, ...]) -> None:
        """On a GPU, keep DALI from writing into buffers that torch's stream has still to read."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()  # behind whatever the consumer has queued by now
            self._lent.append((event, views))
            while self._lent[0][0].query() and len(self._lent) > 1:
                self._lent.popleft()

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._pipeline = None

    def _read(self, index: int) -> NDArray[np.uint8]:
        if isinstance(self.source, ArraySource):
            return np.ascontiguousarray(self.source.images[index].permute(1, 2, 0).numpy())
        assert isinstance(self.source, EncodedSource)
        data = self.source.read(index)
        # Formats that DALI knows not, or not alike, go in as raw pixels behind a PPM header.
        return data if is_web_format(data) else as_ppm(decode(data, self.source.name(index)))

    def _inputs(self) -> tuple[list[NDArray[Any]], ...]:
        """DALI asks for the next batch: images, then of each view the crop's start and end and the flip."""
        while len(self._reading) <= _READ_AHEAD and (job := next(self._jobs, None)) is not None:
            self._reading.append((job, [self._readers.submit(self._read, index) for index in job.index]))
        if not self._reading:
            raise StopIteration
        job, files = self._reading.popleft()
        try:
            images = [file.result() for file in files]
            if isinstance(self.source, ArraySource):
                sizes = [image.shape[:2] for image in images]
            else:
                sizes = [upright_size(data, self.source.name(i)) for data, i in zip(images, job.index, strict=True)]
        except UserError as error:
            self._bad_input = error  # to be raised behind the batches before it, which are whole
            raise StopIteration from None
        height, width = np.array(sizes).T
        inputs: list[list[NDArray[Any]]] = [images]
        for draws in job.draws:
            box = boxes(self.views, draws, height, width).astype(np.float32)
            inputs += [list(box[:, :2]), list(box[:, :2] + box[:, 2:]), list(draws.flip.astype(np.int32))]
        self._inside.append(job)
        return tuple(inputs)

    def _run(self) -> tuple[Tensor, ...] | None:
        """The next batch's views; None when all are out."""
        try:
            outputs = self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
            if self._bad_input is not None:
                error, self._bad_input = self._bad_input, None
                raise error from None
            return None
        except Exception:  # DALI's errors share no base class
            jobs = list(self._inside)
            self._inside.clear()
            self._pipeline = None  # it cannot go on after an error; the next epoch builds another
            for job in jobs:
                self._blame(job)
            raise  # no image is to blame
        self._inside.popleft()
        return tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)

    def _blame(self, job: Job) -> None:
        """DALI does not say which image it failed on: raise UserError for the first that our own decoder refuses."""
        if isinstance(self.source, EncodedSource):
            for index in job.index:
                decode(self.source.read(index), self.source.name(index))

    def _build(self) -> Any:
        on_gpu = self.device.type == "cuda"
        place = "gpu" if on_gpu else "cpu"
        size = [self.views.image_size] * 2
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        with pipeline:
            images, *geometry = fn.external_source(self._inputs, num_outputs=1 + 3 * self.views.views)
            if isinstance(self.source, EncodedSource):
                decoder = "mixed" if on_gpu else "cpu"
                images = fn.decoders.image(images, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
            elif on_gpu:
                images = images.gpu()
            images = fn.reshape(images, layout="HWC")
            views = []
            for start, end, flip in zip(*[iter(geometry)] * 3, strict=True):
                resized = fn.resize(
                    images,
                    device=place,
                    size=size,
                    roi_start=start,
                    roi_end=end,
                    antialias=True,
                    interp_type=_INTERPOLATION[self.views.interpolation],
                )
                views.append(fn.flip(resized, device=place, horizontal=flip))
            pipeline.set_outputs(*views)
        pipeline.build()
        return pipeline
