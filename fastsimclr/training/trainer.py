"""A pre-training run: opens and checks all that it needs, trains, measures, saves and resumes."""

import json
import math
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr import distributed
from fastsimclr._extension import describe_build
from fastsimclr.config import Config
from fastsimclr.data import Batch, choose_backend, open_views
from fastsimclr.data.dataset import prepare
from fastsimclr.data.scan import SKIPPED_FILE, ScanStopped, list_skipped
from fastsimclr.distributed import World
from fastsimclr.environment import commit, examine
from fastsimclr.errors import UserError
from fastsimclr.evaluation.knn import measure
from fastsimclr.loss import BackendError, NTXentLoss
from fastsimclr.loss import choose_backend as loss_backend
from fastsimclr.models import SimCLR, encoder, projector, synchronise_batch_norm
from fastsimclr.optim import build_optimizer, learning_rate, resolve_lr
from fastsimclr.precision import choose_precision
from fastsimclr.profiling import FIRST_TRACED, StageClock, Trace, stage
from fastsimclr.run_folder import RunFolder, load_checkpoint
from fastsimclr.training.metrics import LaggedRecord, RunLog
from fastsimclr.training.run_data import RunData
from fastsimclr.training.step import Step

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Training:
    """A run: what it needs, opened and checked on every rank, and then the loop."""

    def __init__(self, config: Config, text: str, world: World, arguments: Sequence[str]) -> None:
        self.config, self.text, self.world, self.arguments = config, text, world, arguments
        self.folder = RunFolder(distributed.share(config.output or _new_folder(config), world))
        self.output = self.folder.path
        self.untrained_knn: float | None = None
        self.lagged = LaggedRecord()
        self.clock = StageClock(world.device)
        self.trace: Trace | None = None
        self.data_state: dict[str, Any] = {}
        self.failure: str | None = None  # of this rank: all ranks learn of it, and stop together
        self.stop_signal = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        distributed.together(self._open, world)
        try:
            self.data.scan(stop=lambda: self.stop_signal != 0)
        except ScanStopped:
            self._say(f"stopped in the scan for bad images; the same command with --output {self.output} goes on")
            raise
        distributed.together(self._open_loader, world)

    def _open(self) -> None:
        """All that does not depend on how many images are good: its mistakes are known before the scan."""
        config, world = self.config, self.world
        self.views = config.data.views_recipe()
        if self.views.views < 2:
            raise UserError(f"--data.views: got {self.views.views}, expected at least 2: the loss compares views")
        self.data = RunData(config, self.output, world)
        self.precision = choose_precision(config.precision, world.device)
        self.scaler = self.precision.grad_scaler(world.device)

        torch.manual_seed(config.seed)
        chosen = encoder(config.model.encoder, config.model.width, config.model.stem, image_size=self.views.image_size)
        head = projector(chosen.out_features, config.model.hidden, config.model.out, config.model.layers)
        model: nn.Module = SimCLR(chosen, head)
        model.to(world.device, self.precision.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if world.world_size > 1 and config.model.sync_bn:
            model = synchronise_batch_norm(model, world.device)
        self.model = model
        optim = config.optim
        self.peak_lr = resolve_lr(optim.lr_rule, config.batch_size, optim.name) if optim.lr == "auto" else optim.lr
        self.optimizer = build_optimizer(
            optim.name, model.parameters(), self.peak_lr, optim.momentum, optim.weight_decay
        )
        try:
            backend, why = loss_backend(config.loss.backend, world.device, self.precision.dtype, config.model.out)
        except BackendError as error:
            raise UserError(f"--loss.backend: {error}") from error
        self.loss_backend = f"{backend} ({why})"
        group = "world" if config.loss.global_negatives else None
        loss = config.loss
        # Not "auto" again: each rank would then warn of a slower backend, which the log says once.
        self.loss = NTXentLoss(
            loss.temperature, group=group, backend=backend, precision=loss.precision, decoupled=loss.decoupled
        )

    def _open_loader(self) -> None:
        config, world = self.config, self.world
        self.loader = open_views(
            self.data.source,
            self.views,
            config.batch_size,
            backend=config.data.backend,
            device=world.device,
            rank=world.rank,
            world_size=world.world_size,
            seed=config.seed,
            drop_last=config.data.drop_last,
            min_local_batch=2,  # one image would have no negative on its rank, and no batch to be normalised by
            workers=config.data.workers,
            dtype=self.precision.view_dtype,
        )
        self.data.source = self.loader.source  # backend memory has decoded it
        if self.data.val is not None:
            self.data.val, _ = prepare(self.data.val, config.data.backend, world.device)
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        self.warmup_steps = min(round(config.optim.warmup_epochs * self.steps_per_epoch), self.total_steps // 10)
        self.checkpoint_file = self.folder.checkpoint
        self._resume()

    def run(self) -> int:
        """Train to the end, or to a signal."""
        config, world = self.config, self.world
        if self.step >= self.last_step:
            self._say(f"{self.checkpoint_file} has {self.step} of {self.last_step} steps: nothing is left to do")
            return 0
        self.stepper = self._stepper()
        torch.backends.cudnn.benchmark = True
        self._describe()
        self.log = None
        if world.is_first:
            list_skipped(self.output, self.data.skipped or [])
            self.output.mkdir(parents=True, exist_ok=True)
            (self.output / "config.yaml").write_text(self.text)
            (self.output / "environment.json").write_text(json.dumps(self._environment(), indent=2) + "\n")
            self.log = RunLog(self.output, first_step=self.step, total_steps=self.last_step, epochs=config.epochs)
            if self.data.skipped is not None:
                skipped = {"skipped_images": len(self.data.skipped)}
                self.log.event({"step": self.step, "epoch": self.data_state["epoch"], **skipped})
        try:
            if self.data.measures_knn and self.untrained_knn is None:
                self.untrained_knn = self._measure_knn()
            if config.profile and world.is_first:
                self.trace = Trace(self.output / "trace.json.gz", world.device)
            with self.clock.running():
                finished = self._train()
            knn = self._measure_knn() if self.data.measures_knn and finished else None
        finally:
            if self.trace is not None:
                self.trace.close()
            if self.log is not None:
                self.log.close()
            self.loader.close()
        self._report(finished, knn)
        return 0

    def _stepper(self) -> Step:
        config, device = self.config, self.world.device
        model: Any = torch.compile(self.model) if config.compile else self.model
        if self.world.world_size > 1:
            devices = [device] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        return Step(model, self.loss, self.precision, config.micro_batch_size, self.scaler)

    def _train(self) -> bool:
        """The loop. True at its end; False if a signal stopped it."""
        every = max(1, round(self.config.checkpoint_every * self.steps_per_epoch))
        while self.step < self.last_step:
            epoch = self.data_state["epoch"]
            self.loader.set_epoch(epoch)
            batches = iter(self.loader)
            self.clock.restart()
            while self.step < self.last_step:
                asked = time.perf_counter()
                with stage("data_wait"):
                    batch = self._next(batches)
                waited = time.perf_counter() - asked
                local_sizes, stopped = self._exchange(0 if batch is None else len(batch.index))
                if stopped:
                    self._checkpoint()
                    return False
                if batch is None:
                    self.data_state = self.loader.state_dict()
                    break
                record = {"step": self.step + 1, "epoch": epoch, "lr": self._set_lr(), "data_wait": waited}
                measured = self._update(batch, max(local_sizes))
                self.step += 1
                self.data_state = self.loader.state_dict()
                seconds, stages = self.clock.end_step()
                images = sum(local_sizes)
                record |= {"images_per_second": images / seconds, "step_ms": 1000 * seconds, "images": images}
                self._log(self.lagged.push(measured, stages, record))
                if self.trace is not None:
                    self.trace.end_step()
                    self.clock.restart()  # its own time, which is no step's
                if self.step % every == 0 or self.step == self.last_step:
                    self._checkpoint()
                    self.clock.restart()
            if self.data_state["epoch"] > epoch:
                self._end_epoch(epoch + 1)
        return True

    def _update(self, batch: Batch, largest_local_batch: int) -> dict[str, Tensor]:
        """Train on a batch; returns the loss over all ranks and, under fp16, the scale of the gradients.

        Under fp16 a step whose gradients overflow leaves the weights and the optimizer's state alone, and halves the
        scale for the next one. DDP has averaged the gradients, so all ranks skip it together. It counts as a step: the
        learning rate's schedule and the data advance.
        """
        loss = self.stepper.backward(batch.views, largest_local_batch)
        measured = {"loss": loss}
        if self.scaler.is_enabled():
            measured["grad_scale"] = self.scaler.scale(torch.ones_like(loss))  # get_scale() would wait for the GPU
        with stage("optimizer"):
            self.scaler.unscale_(self.optimizer)
            if self.config.optim.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        if self.world.world_size > 1:
            dist.all_reduce(loss)
            loss /= self.world.world_size
        return measured

    def _set_lr(self) -> float:
        lr = learning_rate(self.step, peak=self.peak_lr, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None at the epoch's end, and where this rank cannot read one."""
        try:
            return next(batches, None)
        except UserError as error:
            self.failure = str(error)
            return None

    def _exchange(self, local_batch_size: int) -> tuple[list[int], bool]:
        """Before each step, through the CPU: every rank's batch size, and whether one was told to stop.

        Raises UserError on all ranks if one has failed, so that none waits for it in the step's collectives.
        """
        mine = torch.tensor([local_batch_size, self.stop_signal, self.failure is not None])
        everyone = mine[None]
        if self.world.world_size > 1:
            with stage("rank_wait"):
                everyone = mine.new_empty(self.world.world_size, 3)
                dist.all_gather_into_tensor(everyone, mine[None])
        sizes, stops, failures = everyone.T.tolist()
        if any(failures):
            distributed.fail_together(self.failure, self.world)
        self.stop_signal = max(stops)
        return sizes, any(stops)

    def _on_signal(self, number: int, _: Any) -> None:
        self.stop_signal = number

    def _log(self, record: dict[str, Any] | None) -> None:
        if record is None:
            return
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"loss: got {record['loss']} at step {record['step']} (lr {record['lr']:.4g}); expected a finite one: "
                f"lower --optim.lr or use --precision fp32. {self.checkpoint_file} is from before, if it is there"
            )
        if record.get("grad_scale", 1.0) < 1.0:
            raise UserError(
                f"grad_scale: got {record['grad_scale']:.4g} at step {record['step']}, lr {record['lr']:.4g}; expected "
                "at least 1: gradients overflow float16 even unscaled; lower --optim.lr or use --precision fp32"
            )
        self.record = record
        if self.log is not None:
            self.log.step(record, record["images"], record["step_ms"] / 1000)

    def _end_epoch(self, epochs_done: int) -> None:
        self._log(self.lagged.flush())
        if self.log is not None:
            self.log.epoch(epochs_done, self.record)
        if self.data.measures_knn and epochs_done % self.config.knn_every == 0 and self.step < self.last_step:
            self._measure_knn()

    def _measure_knn(self) -> float:
        config = self.config
        accuracy = measure(
            self.model.encoder,  # type: ignore[arg-type]
            self.data.source,
            self.data.val,
            self.views,
            config.batch_size,
            self.world,
            config.knn_k,
            backend=config.data.backend,  # not the loader's: memory may suit one of two sources
            workers=config.data.workers,
            autocast=self.precision.autocast,
        )
        if self.log is not None:
            self.log.event({"step": self.step, "epoch": self.data_state["epoch"], "knn_accuracy": accuracy})
        return accuracy

    def _checkpoint(self) -> None:
        self._log(self.lagged.flush())  # a step whose loss is not finite is never saved
        if self.world.is_first:
            state = {
                "step": self.step,
                "batch_size": self.config.batch_size,
                "architecture": self._architecture(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "grad_scaler": self.scaler.state_dict(),
                "data": self.data_state,
                "untrained_knn": self.untrained_knn,
                "config": self.text,
            }
            self.folder.save(state)

    def _resume(self) -> None:
        """Take up the checkpoint that --resume means, if there is one."""
        self.step = 0
        self.data_state = self.loader.state_dict()  # behind the last batch that was trained on, not only fetched
        file = self.checkpoint_file if self.config.resume == "auto" else Path(self.config.resume)
        if self.config.resume == "never" or (self.config.resume == "auto" and not file.exists()):
            return
        state = load_checkpoint(file)
        self._check_architecture(file, state["architecture"])
        if state["batch_size"] != self.config.batch_size:
            raise UserError(
                f"--batch_size: got {self.config.batch_size}, but {file} is of a run with {state['batch_size']}; "
                "expected the same, as the schedule counts steps: use that, or --resume never"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("grad_scaler"):  # empty if the checkpoint's precision was another: the scale then starts afresh
            self.scaler.load_state_dict(state["grad_scaler"])
        self.loader.load_state_dict(state["data"])
        self.data_state = state["data"]
        self.untrained_knn = state["untrained_knn"]
        self.step = state["step"]
        self._say(f"resumed from {file} at step {self.step}")

    def _architecture(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "encoder": model.encoder,
            "width": model.width,
            "stem": self.model.encoder.stem,  # type: ignore[union-attr]  # not "auto"
            "hidden": model.hidden,
            "out": model.out,
            "layers": model.layers,
            "optimizer": self.config.optim.name,
        }

    def _check_architecture(self, file: Path, saved: dict[str, Any]) -> None:
        """Raise UserError, naming each difference, unless the checkpoint's model is built like this run's."""
        differences = [
            f"{name} {saved.get(name)!r} instead of {value!r}"
            for name, value in self._architecture().items()
            if saved.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{file}: got a checkpoint of another architecture ({', '.join(differences)}); expected this run's: "
                "change the --model options, or give another --output, or --resume never"
            )

    def _environment(self) -> dict[str, Any]:
        """What this run, or its latest start, ran on."""
        return examine() | {
            "commit": commit(),
            "command": ["python", "-m", "fastsimclr.train", *self.arguments],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": self.world.world_size,
            "device": str(self.world.device),
            "precision": self.precision.why,
            "loss_backend": self.loss_backend,
            "views_backend": self.loader.backend,
        }

    def _describe(self) -> None:
        """What was chosen, and why."""
        config, world = self.config, self.world
        optim = config.optim
        parameters = sum(p.numel() for p in self.model.parameters())
        lr = f"lr {self.peak_lr:.4g}"
        if optim.lr == "auto":
            lr += f" (auto: {optim.lr_rule} rule at batch {config.batch_size})"
        source = self.data.source
        classes = f" in {len(source.classes)} classes" if source.has_labels else ", no labels"
        why = choose_backend(source, world.device)[1] if config.data.backend == "auto" else "as asked"
        self._say(f"data: {config.data.train}, {len(source)} images{classes}; views by {self.loader.backend} ({why})")
        if self.data.skipped:
            file = self.output / SKIPPED_FILE
            self._say(f"data: left out {len(self.data.skipped)} images that cannot be used; {file} names them")
        self._say(f"model: {config.model.encoder} x{config.model.width}, {parameters / 1e6:.1f} M parameters with head")
        self._say(f"device: {world.world_size} x {world.device.type}, {self.precision.why}")
        self._say(f"loss: NT-Xent, temperature {config.loss.temperature}, backend {self.loss_backend}")
        self._say(describe_build())
        self._say(f"optimizer: {optim.name}, {lr}, {self.warmup_steps} steps of warm-up, {self.total_steps} in all")
        self._say(f"output: {self.output}")

    def _report(self, finished: bool, knn: float | None) -> None:
        if not finished:
            name = signal.Signals(self.stop_signal).name
            self._say(f"stopped by {name} at step {self.step}; the same command with --output {self.output} goes on")
            return
        self._say(f"trained {self.step} steps, last loss {self.record['loss']:.4f}")
        if knn is not None:
            val = self.data.val
            where = f"{len(val)} held-out images" if val is not None else "the training images, leave-one-out"
            self._say(f"kNN accuracy on {where}: {knn:.1%} trained, {self.untrained_knn:.1%} untrained")
        if self.trace is not None and not self.trace.is_written:
            self._say(f"no trace: it begins at step {FIRST_TRACED} of a start, and this one had fewer")
        elif self.trace is not None:
            self._say(f"trace: {self.trace.file}, for ui.perfetto.dev or chrome://tracing")
        self._say(f"files: {self.output}: checkpoints/last.pt, metrics.jsonl, config.yaml, tensorboard/")

    def _say(self, line: str) -> None:
        if self.world.is_first:
            print(line, flush=True)


def _new_folder(config: Config) -> str:
    data = re.sub(r"[^\w-]+", "-", Path(config.data.train or "").name.removesuffix(".tar")).strip("-")
    return f"runs/{data}-{config.model.encoder}-{time.strftime('%Y%m%d-%H%M%S')}"
