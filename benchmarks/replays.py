"""What a benchmark on a GPU repeats: a CUDA graph of a step, and several steps as one call."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from benchmarks.interleaved import Spread, Timing

T = TypeVar("T")


def capture(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of the call, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def repeated(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Several steps as one call, so that a wait for the device is shared by all of them."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def per_call(timing: Timing, repeats: int) -> Timing:
    """The timing of one of the `repeats` steps in a call."""

    def divided(spread: Spread) -> Spread:
        return Spread(*(each / repeats for each in (spread.median, spread.lower, spread.upper)))

    return replace(timing, milliseconds={name: divided(spread) for name, spread in timing.milliseconds.items()})
