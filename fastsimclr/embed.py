"""Compute the features of all images with a trained encoder, a map of them, and a gallery of nearest neighbors.

    python -m fastsimclr.embed --checkpoint runs/photos --data photos/ --output features/

Runs alone or under torchrun. The output folder holds features.npy, (images, features) float32, which np.load(file,
mmap_mode="r") opens without reading it into memory; images.csv, the image, label and class of each row; embed.json, the
encoder and settings used; map.png and gallery.png; and skipped_images.txt, if some images do not decode. Exit codes are
those of fastsimclr.train.
"""

import argparse
from collections.abc import Sequence

from fastsimclr.cli import ENCODER_HELP, Parser, exit_code
from fastsimclr.config import parse
from fastsimclr.data.backends import BACKENDS
from fastsimclr.evaluation.config import FEATURE_FORMATS, MAP_METHODS, PREPROCESSING, Queries
from fastsimclr.ranges import Count, Probability, Seed, Workers, number
from fastsimclr.stopping import run_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("embed", lambda: run(_options(arguments)))


def run(options: argparse.Namespace) -> None:
    from fastsimclr import distributed  # here: --help needs no PyTorch
    from fastsimclr.evaluation.embedding import embed_images
    from fastsimclr.progress_bar import Phase
    from fastsimclr.training.options_check import check_ranks
    from fastsimclr.training.stall import Watchdog

    try:
        world = distributed.start(options.device)
        check_ranks({name: value for name, value in vars(options).items() if name != "preprocessing"}, world)
        with Watchdog(world), Phase("embedding", visible=False):
            embed_images(options, world)
    finally:
        distributed.stop()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m fastsimclr.embed", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="F", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("--encoder", metavar="NAME", help=ENCODER_HELP)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of images, tar shards, or a built-in dataset, whose held-out part is used; default: the "
        "training data of the run",
    )
    parser.add_argument("--output", metavar="DIR", help="output folder; default: embed/ in the run's folder")
    parser.add_argument("--format", choices=FEATURE_FORMATS, default="npy", help="file format; default: npy")
    parser.add_argument(
        "--images", type=number(Count), metavar="N", help="embed a random sample of N images; default: all"
    )
    parser.add_argument(
        "--map", choices=("auto", *MAP_METHODS, "none"), default="auto", help="auto: umap if installed, else tsne"
    )
    parser.add_argument(
        "--gallery", type=number(Queries), default=8, metavar="N", help="rows of the gallery; 0: none; default: 8"
    )
    parser.add_argument(
        "--batch_size", type=number(Count), default=256, metavar="N", help="global batch size; default: 256"
    )
    parser.add_argument("--workers", type=number(Workers), metavar="N", help="data loading workers; default: automatic")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="decoding backend; default: auto")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="default: auto")
    parser.add_argument("--cache", metavar="DIR", help="results of fastsimclr doctor; default: ~/.cache/fastsimclr")
    parser.add_argument(
        "--max_bad", type=number(Probability), default=0.01, metavar="F", help="tolerated bad files; default: 0.01"
    )
    parser.add_argument(
        "--seed", type=number(Seed), default=0, metavar="N", help="seed of the sample, the map and the gallery"
    )
    parser.add_argument("--force", action="store_true", help="overwrite earlier results in the output folder")
    for name in PREPROCESSING:
        parser.add_argument(f"--data.{name}", metavar="V", help="as for train; default: the encoder's training value")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, f"data.{name}") for name in PREPROCESSING}
    given = {name: value for name, value in given.items() if value is not None}
    # Parse the values as train does.
    config = parse(["--data.train=-", *(f"--data.{name}={value}" for name, value in given.items())])
    options.preprocessing = {name: getattr(config.data, name) for name in given}
    return options


if __name__ == "__main__":
    run_process(main)
