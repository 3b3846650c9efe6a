"""The images of a run: opened, tried, and those listed that cannot be used."""

from collections.abc import Callable
from pathlib import Path

from fastsimclr.config import Config
from fastsimclr.data import Source, open_source
from fastsimclr.data.scan import SKIPPED_FILE, BadImages, list_skipped, scan
from fastsimclr.data.sources import BUILT_IN, EncodedSource
from fastsimclr.distributed import World
from fastsimclr.errors import UserError


class RunData:
    """What a run trains on, `source`, and measures kNN accuracy on: `val`, or without it the source's other images.

    Raises UserError, on this rank alone, if something is missing or does not fit.
    """

    def __init__(self, config: Config, output: Path, world: World) -> None:
        assert config.data.train is not None  # the preset of the demonstration names one
        self._max_bad, self._output, self._world = config.data.max_bad, output, world
        self.source: Source = open_source(config.data.train)
        self.val: Source | None = None
        if config.data.val is not None or config.data.train.partition(":")[0] in BUILT_IN:
            self.val = open_source(config.data.val or config.data.train, split="val")
        if config.data.val is not None and not (self.source.has_labels and self.val and self.val.has_labels):
            raise UserError("--data.val: got images without labels in it or in --data.train; kNN accuracy needs both")
        self.measures_knn = config.knn_every > 0 and self.source.has_labels
        self.skipped: list[str] | None = None
        """What was wrong with each image left out, beginning with its name; None: there were no files to scan."""

    def scan(self, stop: Callable[[], bool]) -> None:
        """Leave out the images that do not decode. The ranks share the work, and fail together.

        Raises UserError if more than --data.max_bad are bad, and ScanStopped once stop() is true on a rank.
        """
        self.source = self._scanned(self.source, stop)
        self.val = self._scanned(self.val, stop) if self.val is not None else None

    def _scanned(self, source: Source, stop: Callable[[], bool]) -> Source:
        if not isinstance(source, EncodedSource):
            return source
        skipped = self.skipped or []
        try:
            scanned = scan(source, max_bad=self._max_bad, cache=self._output, world=self._world, stop=stop)
        except BadImages as error:
            if self._world.is_first:
                list_skipped(self._output, [*skipped, *error.bad])
            raise UserError(f"--data.{error} ({self._output / SKIPPED_FILE} names all)") from error
        self.skipped = list(dict.fromkeys([*skipped, *scanned.bad]))  # --data.val may be --data.train
        return scanned.source
