"""The bad images of a run: listed in skipped_images.txt as they are met, counted, and limited by --data.max_bad."""

from itertools import islice
from typing import Any

from fastsimclr.data import ViewLoader
from fastsimclr.data.scan import SKIPPED_FILE, write_skipped_images
from fastsimclr.distributed import World, gather_objects
from fastsimclr.errors import UserError
from fastsimclr.progress_bar import print_line
from fastsimclr.run_folder import RunFolder
from fastsimclr.training.metrics import Metrics

_MIN_SEEN = 1000  # images, or an epoch if it is smaller, before the fraction of bad ones is limited
_MAX_NAMED = 3  # images named in an error


class SkippedImages:
    """The images that any rank has found bad; the same on all ranks, which call the same methods together."""

    def __init__(self, loader: ViewLoader, folder: RunFolder, world: World, max_bad: float, batch_size: int) -> None:
        """max_bad: largest fraction of bad images among those seen so far. batch_size: of all ranks.

        Raises UserError if more than `max_bad` of all images are known to be bad before the run.
        """
        self._bad, self._source, self._max_bad = loader.bad, loader.source, max_bad
        self._folder, self._world = folder.path, world
        self._min_seen = min(_MIN_SEEN, len(self._source), len(loader) * batch_size)
        self._seen = self._reported = 0
        self._exchanged = 0  # images in `_bad` that all ranks know; first those known before the run
        self._exchange()
        self._known_before = self._exchanged
        if self._known_before > max_bad * len(self._source):
            self._write_list()
            raise self._too_many(0, len(self._source))

    def __len__(self) -> int:
        return self._exchanged

    @property
    def file(self) -> str:
        return str(self._folder / SKIPPED_FILE)

    @property
    def news(self) -> int:
        """The number of images that this rank has found bad and that the others do not know."""
        return len(self._bad) - self._exchanged

    def start(self) -> None:
        """Replace the list of an earlier run, or of steps that a resumed run repeats."""
        self._write_list()

    def add(self, images: int, any_news: bool) -> None:
        """Count the `images` of a batch of all ranks. any_news: whether a rank has found further ones bad."""
        self._seen += images
        if any_news:
            listed = self._exchanged
            self._exchange()
            if self._world.is_rank_zero:
                if listed == self._known_before:
                    print_line(f"data: {self._lines(listed)[0]}; replaced by another image, see {self.file}")
                with open(self.file, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write("".join(f"{line}\n" for line in self._lines(listed)))

    def report(self, metrics: Metrics, step: int, epoch: int) -> None:
        """Write the number of bad images to the metrics if it has changed."""
        if len(self) != self._reported:
            self._reported = len(self)
            metrics.event({"step": step, "epoch": epoch, "skipped_images": self._reported})

    def describe(self) -> list[str]:
        """Return the line to print at the end of the run, if images were replaced."""
        many = "1 image" if len(self) == 1 else f"{len(self)} images"
        return [f"data: replaced {many} that cannot be used by others; see {self.file}"] if len(self) else []

    @property
    def error(self) -> UserError | None:
        """The error that ends the run, if more than `max_bad` of the images seen so far are bad."""
        seen, found = min(self._seen, len(self._source)), self._exchanged - self._known_before
        is_limited = self._seen >= self._min_seen and found > self._max_bad * seen
        return self._too_many(self._known_before, seen) if is_limited else None

    def state_dict(self) -> dict[str, Any]:
        """Return what the run has found. Empty once too many are bad: they are read again after their repair."""
        if self.error:
            return {"seen": 0, "bad": []}
        found = islice(self._bad.items(), self._known_before, self._exchanged)
        return {"seen": self._seen, "bad": [(index, self._source.key(index), reason) for index, reason in found]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = state["seen"]
        for index, key, reason in state["bad"]:
            if index < len(self._source) and self._source.key(index) == key:
                self._bad.setdefault(index, reason)
        self._exchanged = len(self._bad)

    def _exchange(self) -> None:
        own = dict(islice(self._bad.items(), self._exchanged, None))
        for of_rank in gather_objects(own, self._world):
            for index, reason in of_rank.items():
                self._bad.setdefault(index, reason)
        self._exchanged = len(self._bad)

    def _lines(self, first: int = 0) -> list[str]:
        lines = (f"{self._source.name(index)}: {reason}" for index, reason in islice(self._bad.items(), first, None))
        return [line.replace("\n", "\\n") for line in lines]

    def _write_list(self) -> None:
        if self._world.is_rank_zero:
            write_skipped_images(self._folder, self._lines())

    def _too_many(self, first: int, images: int) -> UserError:
        lines = self._lines(first)
        named = "; ".join(lines[:_MAX_NAMED])
        if len(lines) > _MAX_NAMED:
            named += f"; and {len(lines) - _MAX_NAMED} more"
        return UserError(
            f"--data.max_bad: got {len(lines)} of {images} images that cannot be used, expected a fraction of at most "
            f"{self._max_bad:g}: {named} (all are listed in {self.file}); repair or restore them, or raise the limit, "
            "and rerun the same command"
        )
