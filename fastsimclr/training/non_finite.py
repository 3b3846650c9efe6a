"""Steps whose loss or gradient is not finite: they change nothing, are counted, and end the run if they go on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsimclr.errors import UserError
from fastsimclr.progress_bar import print_line
from fastsimclr.run_folder import RunFolder, replace_atomically
from fastsimclr.sharding import whole


class NonFiniteError(UserError):
    """Too many steps in a row were not finite."""


class NonFiniteSteps:
    """Counts the skipped steps, and undoes their effect on the running statistics of batch normalization.

    All ranks call the same methods together, with the same records.
    """

    def __init__(self, model: nn.Module, folder: RunFolder, max_skipped: int, *, is_rank_zero: bool) -> None:
        self.total = 0
        """Skipped steps since the start of the run."""
        self.in_a_row = 0
        """Skipped steps since the latest one that was not, without overflows of float16."""
        self._model, self._folder, self._max_skipped, self._is_rank_zero = model, folder, max_skipped, is_rank_zero
        self._statistics = [
            statistic
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]
        # The statistics before each of the last two steps: on a GPU, a step's loss is known one step later.
        self._before: dict[int, list[Tensor]] = {}
        self._views: Sequence[Tensor] = ()

    def begin(self, step: int, views: Sequence[Tensor]) -> None:
        """Remember what a skipped step needs. step: its number in the metrics, from 1."""
        self._views = views
        oldest = self._before.pop(min(self._before)) if len(self._before) == 2 else None
        saved = oldest or [torch.empty_like(statistic) for statistic in self._statistics]
        if saved:
            torch._foreach_copy_(saved, self._statistics)
        self._before[step] = saved

    def check(self, record: dict[str, Any]) -> NonFiniteError | None:
        """Count a completed step, and add "skipped_steps", the count, to its record if it was skipped.

        Returns the error that ends the run after max_skipped such steps in a row, or if gradients overflow float16 even
        unscaled. Overflows at a higher scale, which the scaler then halves, do not count towards max_skipped.
        """
        step, loss, norm, scale = record["step"], record["loss"], record["gradient_norm"], record.get("grad_scale")
        at = f"at step {step} (lr {record['lr']:.4g})"
        advice = (
            "lower --optim.lr or use --precision fp32. The latest checkpoint, if any, is from before these steps; "
            f"{self._folder.non_finite(0)} has the views and norms"
        )
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        if not is_finite:
            self.total += 1
            record["skipped_steps"] = self.total
            self._restore_statistics(step)
        if scale is not None and scale < 1:
            got = f"grad_scale: got {scale:.4g} {at}; expected at least 1"
            return NonFiniteError(f"{got}: gradients overflow float16 even unscaled; {advice}")
        if is_finite:
            self.in_a_row = 0
            return None
        if scale is not None and math.isfinite(loss):
            return None
        self.in_a_row += 1
        if self.in_a_row >= self._max_skipped:
            got = f"loss: got {loss:.4g} and a gradient norm of {norm:.4g} {at}"
            in_a_row = f"after {self.in_a_row} skipped steps in a row (--max_skipped)"
            return NonFiniteError(f"{got}, {in_a_row}; expected finite ones: {advice}")
        if self._is_rank_zero:
            print_line(f"step {step}: skipped, with a loss of {loss:.4g} and a gradient norm of {norm:.4g}")
        return None

    def _restore_statistics(self, step: int) -> None:
        before = self._before.get(step)
        if not before:
            return
        # A step that has been started since has these statistics, too.
        for statistics in (self._statistics, *(later for number, later in self._before.items() if number > step)):
            torch._foreach_copy_(statistics, before)

    def save_for_inspection(
        self, rank: int, error: NonFiniteError, backward: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        """Write the error, this rank's views, and the norms of the weights and their gradients to the run's folder.

        backward: computes the gradients of the views again; all ranks call it. On a GPU they are those of the step
        after the one that was found not to be finite.
        """
        loss = backward(self._views)
        parameters = dict(self._model.named_parameters())
        state = {
            "error": str(error),
            "loss": float(loss),
            "views": [view.cpu() for view in self._views],
            "weight_norms": _norms({name: p.detach() for name, p in parameters.items()}),
            "gradient_norms": _norms({name: p.grad for name, p in parameters.items() if p.grad is not None}),
        }
        file = self._folder.non_finite(rank)
        try:
            with replace_atomically(file) as partial:
                torch.save(state, partial)
        except OSError as failure:  # such as a full disk: the error to report is the other one
            print_line(f"{file}: not written: {failure}")

    def describe(self) -> list[str]:
        """Return the line to print at the end of the run, if steps were skipped."""
        steps = "1 step" if self.total == 1 else f"{self.total} steps"
        return [f"skipped {steps} without a finite loss and gradient; see {self._folder.metrics}"] if self.total else []

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(whole(tensor.norm())) for name, tensor in tensors.items()}
