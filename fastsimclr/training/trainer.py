"""A pre-training run: open the data, train, evaluate, save and resume."""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr import stopping
from fastsimclr.config import Config
from fastsimclr.data import Batch
from fastsimclr.data.dataset import open_loader, prepare_pair
from fastsimclr.data.loader import LoaderConfig
from fastsimclr.data.urls import redacted
from fastsimclr.distributed import World, run_on_all_ranks
from fastsimclr.errors import UserError
from fastsimclr.malloc import return_freed_memory
from fastsimclr.optim import LRSchedule
from fastsimclr.profiling import StageClock, Trace
from fastsimclr.progress_bar import Phase
from fastsimclr.run_folder import RunFolder
from fastsimclr.sharding import assemble, broadcast
from fastsimclr.training import summary
from fastsimclr.training.build import architecture, build_learner
from fastsimclr.training.callbacks import Callback, Callbacks, KeepCheckpoints
from fastsimclr.training.checkpoint_writer import CheckpointWriter
from fastsimclr.training.checkpoints import checkpoint_to_resume, learned_state, resume, state_of
from fastsimclr.training.estimate import Estimate, estimate_step
from fastsimclr.training.health import Health
from fastsimclr.training.images import as_recorded, open_images, record_pixels
from fastsimclr.training.loggers import make_loggers
from fastsimclr.training.metrics import Metrics
from fastsimclr.training.micro_batch import as_resumed, choose_size
from fastsimclr.training.non_finite import NonFiniteError, NonFiniteSteps
from fastsimclr.training.options_check import check_resumed, run_options
from fastsimclr.training.probe import OnlineProbe
from fastsimclr.training.progress import Progress
from fastsimclr.training.rank_sync import RankSync
from fastsimclr.training.record import record_run
from fastsimclr.training.skipped import SkippedImages
from fastsimclr.training.stall import Watchdog
from fastsimclr.training.step import Outputs, Step, seed_generators, update_weights
from fastsimclr.training.validation import measure_accuracy


class Trainer:
    """Pre-trains an encoder. Every rank creates one. User errors are raised on all ranks."""

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        folder: RunFolder | None = None,
        train: Any = None,
        val: Any = None,
        encoder: nn.Module | None = None,
        command: Sequence[str] = (),
        watchdog: Watchdog | None = None,
        callbacks: Sequence[Callback] = (),
        rgb_optional: bool = False,
    ) -> None:
        """folder: folder of the run, which the caller has locked; None is that of config.output.
        train, val: images to use instead of those at config.data's paths, as for `open_source`.
        encoder: the encoder to train instead of the one that config.model names.
        command: the command line, for the record. watchdog: told of the run's progress.
        callbacks: called during the run, in order, on all ranks.
        rgb_optional: turn off hue, saturation and grayscale for images that are not RGB, where they otherwise are an
        error.
        """
        self.config, self.world = config, world
        self.command = list(map(redacted, command))
        if folder is None:
            assert config.output is not None
            folder = RunFolder(config.output)
        self.folder = folder
        self._watchdog = watchdog or Watchdog(world)
        self.sync = RankSync(world, stopping.active(), self._watchdog)
        self.clock = StageClock(world.device)
        keep = KeepCheckpoints(config.keep_every, config.keep_best)
        loggers = run_on_all_ranks(lambda: make_loggers(config, world), world)
        self.callbacks = Callbacks(self, [keep, *loggers, *callbacks])
        self.checkpoints = CheckpointWriter(self.folder, world)
        self.trace: Trace | None = None
        self.untrained_knn: float | None = None
        self._accuracies: dict[str, float] = {}  # the latest measured
        self.unfinished_epoch: dict[str, Any] | None = None
        """The last record of an epoch that has ended, until its kNN accuracy is measured and the callbacks called."""
        self._checkpoint_requested = False

        with Phase("opening the images", visible=world.is_rank_zero):
            sources, config = open_images(config, train, val, world, rgb_optional=rgb_optional)
        channels = sources[0].pixels.channels
        # Before the images are checked, which may take long: errors in these options are reported at once.
        checkpoint = checkpoint_to_resume(config, self.folder, world)
        config, self._micro_batches = as_resumed(config, checkpoint)
        self.source = as_recorded(sources.train, checkpoint.path if checkpoint else None, world)
        sources = sources._replace(train=self.source)
        # DistributedDataParallel and `shard` copy the weights of rank zero to the others.
        weights = config.model.weights if world.is_rank_zero and checkpoint is None else None
        learner = build_learner(config, world, channels=channels, module=encoder, weights=weights)
        self.model, self.optimizer = learner.model, learner.optimizer
        self.precision, self.scaler, self.recipe = learner.precision, learner.scaler, learner.recipe
        self.loss, self.loss_backend = learner.loss, learner.loss_backend
        self.freezing, self._weights, self._template = learner.freezing, learner.weights, learner.template
        self.options = run_options(config, learner, world)
        if checkpoint is not None:
            check_resumed(checkpoint, config, self.options, architecture(config, self.model), world)
        self.non_finite = NonFiniteSteps(self.model, self.folder, config.max_skipped, is_rank_zero=world.is_rank_zero)
        self.data = prepare_pair(sources, world=world, backend=config.data.backend, cache=config.data.cache)
        self.config, self.augmentation, self._statistics = record_pixels(
            config, learner.augmentation, self.data.train, world
        )
        self.measures_knn = config.knn_every > 0 and self.data.train.has_labels
        self.loader_config = LoaderConfig(
            batch_size=config.batch_size,
            backend=config.data.backend,
            world=world,
            seed=config.seed,
            drop_last=config.data.drop_last,
            min_local_batch=2,  # with one image a rank has no negatives, and batch norm no variance
            workers=config.data.workers,
            dtype=learner.precision.view_dtype,
            max_bad=1.0,  # `self.skipped` limits them, over all ranks
        )
        self.loader = run_on_all_ranks(
            lambda: open_loader(self.data.train, self.augmentation, self.loader_config), world
        )
        self.skipped = SkippedImages(self.loader, self.folder, world, config.data.max_bad, config.batch_size)
        steps_per_epoch = len(self.loader)
        self.checkpoint_steps = max(1, round(config.checkpoint_every * steps_per_epoch))
        epochs = config.epochs if config.steps is None else config.steps / steps_per_epoch
        self.schedule = LRSchedule.over_epochs(learner.recipe.lr, epochs, steps_per_epoch, config.optim.warmup_epochs)
        self.probe: OnlineProbe | None = None
        if config.probe and self.measures_knn:
            features: int = self.model.encoder.out_features  # type: ignore[union-attr, assignment]
            self.probe = OnlineProbe(features, len(self.data.train.classes), world)
        self.outputs = Outputs() if config.health or self.probe is not None else None
        self.health = Health(
            world,
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            warmup_steps=self.schedule.warmup_steps,
        )
        self.metrics = Metrics(self.callbacks.on_step, self.non_finite.check, self.health.complete)
        last_step = min(self.schedule.total_steps, config.max_steps or self.schedule.total_steps)
        self.progress = Progress(self.loader.state_dict(), last_step)
        if checkpoint is not None:
            run_on_all_ranks(partial(resume, self, checkpoint), world)
        self.config, found = choose_size(self.config, learner, self.augmentation, world)
        self._micro_batches += found
        self.options["micro_batch_size"] = self.config.micro_batch_size
        self.freezing.start_epoch(self.progress.epoch)
        self.stepper = self._build_stepper()

    def train(self) -> None:
        """Train to the last step, or until a signal or a callback stops the run."""
        if self.progress.is_done and self.unfinished_epoch is None:
            steps = f"{self.progress.step} of {self.progress.last_step} steps"
            self._print(f"{self.folder.checkpoint} has finished {steps}: nothing to do")
            return
        torch.backends.cudnn.benchmark = True
        stopping.active().defer()  # to the next step
        try:
            self._start()
            with self.clock.running():
                for batch in self.sync.batches(self.loader, self.progress, self.skipped, self.checkpoints):
                    if self.sync.is_checkpoint_ready:
                        self.checkpoints.finish()
                    self.skipped.report(self.metrics, self.progress.step, batch.epoch)
                    if self.freezing.start_epoch(batch.epoch):
                        self.stepper = self._build_stepper()
                    lr = self.schedule.apply(self.optimizer, self.progress.step)
                    limited = contextlib.nullcontext() if self.config.compile else self._watchdog.limited()
                    with limited, Phase("training step", visible=False):
                        measured = self.train_step(batch)
                    self.progress.advance(batch)
                    self._log(batch, lr, measured)
                    if batch.ends_epoch or self.progress.is_done:
                        self.metrics.end_epoch()
                        self.unfinished_epoch = self.metrics.last
                        self.end_epoch()
                    if self.checkpoint_due():
                        self.save()
            if self.sync.is_stopped:
                self.save()
            self.checkpoints.finish()
            self.sync.raise_failure()
            self.callbacks.raise_failure()
            self.checkpoints.raise_failure()
        except NonFiniteError as error:  # on all ranks
            largest = max(self.sync.local_batch_sizes)
            self.non_finite.save_for_inspection(
                self.world.rank, error, lambda views: self.stepper.backward(views, largest)
            )
            raise
        finally:
            self.close()
        self._print(*self._result())

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Update the weights with one batch.

        Returns the loss and the gradient's norm over all ranks and, for fp16, the gradient scale. If loss or norm is
        not finite, all ranks leave weights and optimizer unchanged, and in fp16 an overflow halves the scale. The
        learning rate schedule and the data advance all the same.
        """
        seed_generators(self.config.seed, self.progress.step, self.world.rank)
        self.non_finite.begin(self.progress.step + 1, batch.views)
        loss = self.stepper.backward(batch.views, max(self.sync.local_batch_sizes))
        measured = update_weights(self.optimizer, self.scaler, loss, self.config.optim.clip_grad, self.world.world_size)
        if self.outputs is not None:
            if self.config.health:
                measured |= self.health.measure(self.progress.step + 1, self.outputs, self.sync.local_batch_sizes)
            if self.probe is not None:
                measured["probe_loss"] = self.probe.train_step(self.outputs.h, batch.label).to(loss)
        return measured

    def end_epoch(self) -> None:
        """Measure kNN and probe accuracy if due, and call the callbacks. Also called after the last step of the run.

        The epoch stays unfinished if a stop signal interrupts the measurement: the resumed run then measures again.
        """
        record = self.unfinished_epoch
        assert record is not None
        if self.measures_knn and ((record["epoch"] + 1) % self.config.knn_every == 0 or self.progress.is_done):
            if self.non_finite.in_a_row == 0:
                self._start_checkpoint()  # a run that is killed while it measures does not repeat the epoch
            measured = measure_accuracy(self)
            if measured is None:
                return
            self._accuracies = measured
            record = record | measured
        self.unfinished_epoch = None
        self.checkpoints.finish()  # before the callbacks ask for the next one
        self.callbacks.on_epoch(record)
        self.clock.restart()

    def encoder(self) -> nn.Module:
        """Return the encoder: that of `model`, or, with --distributed fsdp, a whole copy. All ranks must call it.

        Its buffers, such as running statistics, are those of rank zero, which the checkpoint has.
        """
        encoder = self.model.get_submodule("encoder")
        if self._template is not None:
            return assemble(self._template, encoder)
        if self.world.world_size > 1:
            broadcast(list(encoder.buffers()))
        return encoder

    def stop(self) -> None:
        """End the run on all ranks before the next step, with a checkpoint. One rank's call is enough."""
        self.sync.stop()

    def request_checkpoint(self) -> None:
        """Save a checkpoint after the current step even if none is due. All ranks must call it."""
        self._checkpoint_requested = True

    def checkpoint_due(self) -> bool:
        """Return whether to save now. Not while steps are skipped: the cause may be in the weights."""
        self._checkpoint_requested |= self.progress.step % self.checkpoint_steps == 0
        if self._checkpoint_requested:
            self.metrics.flush()
        return self.progress.is_done or (self._checkpoint_requested and self.non_finite.in_a_row == 0)

    def save(self) -> None:
        """Start to write a checkpoint; the callbacks are called when it is complete.

        A step whose loss is not finite is never saved.
        """
        self._start_checkpoint(self.callbacks.on_checkpoint)
        self._checkpoint_requested = False
        self.clock.restart()

    def _start_checkpoint(self, on_written: Callable[[Path], None] | None = None) -> None:
        self.metrics.sync()
        self.checkpoints.finish()  # before the next one takes memory
        learned = learned_state(self)
        self.checkpoints.start(self.progress.step, lambda: state_of(self, learned), on_written)

    @property
    def saved_step(self) -> int:
        """Finished steps in the newest checkpoint of this run."""
        return self.checkpoints.saved_step

    def close(self) -> None:
        """Complete the checkpoint, close the files, stop the loader's workers and end the callbacks."""
        self.checkpoints.close()
        if self.trace is not None:
            self.trace.close()
        self.metrics.close()
        self.loader.close()
        self.callbacks.on_end()

    def _build_stepper(self) -> Step:
        config, device = self.config, self.world.device
        model: Any = torch.compile(self.model) if config.compile else self.model
        if self.world.world_size > 1 and self._template is None:
            devices = [device] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        size = config.micro_batch_size
        assert not isinstance(size, str)  # auto is a number by now
        recomputes = config.model.checkpoint_stages
        return Step(model, self.loss, self.precision, size, self.scaler, self.outputs, recomputes)

    def _start(self) -> None:
        """Print the choices made, open the run's files, and measure the untrained encoder if asked."""
        config, progress = self.config, self.progress
        lines = summary.describe_data(config, self.data, self.loader)
        lines += [self._statistics] if self._statistics else []
        lines += summary.describe_model(
            config, self.model, self.freezing, self.precision, self.loss_backend, self.world
        )
        lines += [*self._weights, *self._micro_batches]
        lines += [summary.describe_schedule(self.recipe, self.schedule), f"output: {self.folder}"]
        self._print(*lines)
        estimate = self._estimate_step()
        if estimate is not None:
            self._print(*summary.describe_estimate(config, estimate, progress.last_step - progress.step))
        self.checkpoints.open()
        run_on_all_ranks(partial(self._open_files, estimate), self.world)
        self.skipped.start()
        self.skipped.report(self.metrics, progress.step, progress.epoch)
        if config.knn_at_start and self.measures_knn and progress.step == 0:
            untrained = measure_accuracy(self)
            self.untrained_knn = untrained["knn_accuracy"] if untrained is not None else None
        if config.profile and self.world.is_rank_zero:
            self.trace = Trace(self.folder.trace, self.world.device)
        self.callbacks.on_start()
        self.callbacks.raise_failure()
        if self.unfinished_epoch is not None:  # the run was interrupted while it measured kNN accuracy
            self.end_epoch()
            self.save()
        return_freed_memory()  # what has been measured so far leaves gaps in the heap
        self.metrics.show_first_step(estimate.step_seconds if estimate else None)
        self.clock.restart()

    def _open_files(self, estimate: Estimate | None) -> None:
        """Record the run in its folder, and open its metrics. Raises UserError if the disk cannot be written."""
        if not self.world.is_rank_zero:
            return
        try:
            record_run(self, estimate)
            self.metrics.open(
                self.folder,
                first_step=self.progress.step,
                total_steps=self.progress.last_step,
                epochs=math.ceil(self.schedule.total_steps / len(self.loader)),
                is_epoch_finished=self.unfinished_epoch is None,
            )
        except OSError as error:
            raise UserError(
                f"--output: got {self.folder}, which cannot be written ({error.strerror}); expected a folder on a disk "
                "with room for the run"
            ) from error

    def _estimate_step(self) -> Estimate | None:
        """Estimate a step on a CPU; None on a GPU, whose steps are short, and with several ranks."""
        if self.world.device.type != "cpu" or self.world.world_size > 1:
            return None
        return estimate_step(self.model, self.loss, self.precision, self.augmentation, self.config.batch_size)

    def _log(self, batch: Batch, lr: float, measured: dict[str, Tensor]) -> None:
        """Stop the step's clock, and log the step."""
        seconds, stages = self.clock.end_step()
        stopping.active().reserve(seconds)
        images = sum(self.sync.local_batch_sizes)
        record = {"step": self.progress.step, "epoch": batch.epoch, "lr": lr, "data_wait": self.sync.data_wait}
        record |= {"images_per_second": images / seconds, "step_ms": 1000 * seconds, "images": images}
        self.metrics.log(measured, stages, record)
        if self.trace is not None:
            self.trace.end_step()
            self.clock.restart()  # writing the trace is not part of a step

    def _result(self) -> list[str]:
        """The lines to print at the end."""
        if self.sync.is_stopped:
            return [summary.describe_stop(self.sync.stop_signal, self.progress.step, self.folder)]
        lines = [*self.skipped.describe(), *self.non_finite.describe()]
        lines += summary.describe_result(
            self.metrics.last, self.data, self._accuracies, self.untrained_knn, self.folder
        )
        return lines if self.trace is None else [*lines, summary.describe_trace(self.trace)]

    def _print(self, *lines: str) -> None:
        if self.world.is_rank_zero:
            print(*lines, sep="\n", flush=True)
