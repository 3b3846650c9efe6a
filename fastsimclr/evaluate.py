"""Evaluate an encoder with the protocols of the SimCLR paper:

    python -m fastsimclr.evaluate knn|linear|finetune|supervised --checkpoint runs/photos [--data.val PATH] [options]

Runs alone or under torchrun. The protocols that train report the accuracy after the last epoch.
`evaluate PROTOCOL --help` lists the options. Exit codes are those of fastsimclr.train.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from fastsimclr.cli import exit_code
from fastsimclr.data.augmentation import Augmentation
from fastsimclr.data.pixel_options import PixelOptions
from fastsimclr.errors import UserError
from fastsimclr.evaluation.config import PROTOCOLS, EvaluationConfig, SupervisedConfig
from fastsimclr.options import parse_as
from fastsimclr.stopping import run_process

if TYPE_CHECKING:
    from fastsimclr.pretrained import Pretrained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("evaluate", lambda: run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> None:
    if list(arguments[:1]) in (["-h"], ["--help"]):
        print(__doc__)
        return
    config, pretrained = configure(arguments)

    from fastsimclr import distributed  # here: --help needs no PyTorch
    from fastsimclr.evaluation.protocols import Evaluation
    from fastsimclr.malloc import keep_freed_memory
    from fastsimclr.progress_bar import Phase
    from fastsimclr.training.options_check import check_ranks
    from fastsimclr.training.stall import Watchdog

    try:
        world = distributed.start(config.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        check_ranks({"protocol": arguments[0]} | asdict(config), world)
        with Watchdog(world), Phase("evaluating", visible=False):
            Evaluation(config, pretrained, world).run()
    finally:
        distributed.stop()


def configure(arguments: Sequence[str]) -> tuple[EvaluationConfig, "Pretrained | None"]:
    """Parse the options and open --checkpoint, whose settings are the defaults of the options that are not given.

    Returns the options and the opened checkpoint (None without --checkpoint).
    """
    protocol, *options = arguments or [""]
    kind = PROTOCOLS.get(protocol)
    if kind is None:
        raise UserError(f"got {protocol or 'no protocol'}, expected one of {', '.join(PROTOCOLS)}; see --help")
    about = " ".join((kind.__doc__ or "").split())
    config = parse_as(kind, options, f"evaluate {protocol}", about)
    if config.checkpoint is None:
        if not isinstance(config, SupervisedConfig):
            raise UserError("--checkpoint: got none, expected a run's folder or a checkpoint")
        if config.encoder is None:
            raise UserError("--encoder: got none, and no --checkpoint; expected an encoder, such as resnet50")
        return config, None

    from fastsimclr.pretrained import open_checkpoint

    pretrained = open_checkpoint(config.checkpoint, config.encoder)
    defaults: dict[str, Any] = {}
    if pretrained.augmentation is not None:
        defaults = {f"data.{f.name}": getattr(pretrained.augmentation, f.name) for f in fields(Augmentation)}
    if pretrained.config is not None:
        pixels = PixelOptions.from_config(pretrained.config["data"])
        defaults |= {f"data.{name}": value for name, value in asdict(pixels).items()}
    if pretrained.config is not None and config.data.train is None:
        defaults |= {f"data.{name}": pretrained.config["data"].get(name) for name in ("train", "val")}
    config = parse_as(kind, options, f"evaluate {protocol}", about, defaults=defaults)
    return config, pretrained


if __name__ == "__main__":
    run_process(main)
