"""The options for reading remote images. Uses no framework."""

from dataclasses import dataclass

from fastsimclr.ranges import Positive, check_fields


@dataclass(frozen=True)
class StorageOptions:
    """How images at a URL are read."""

    local_cache: str | None = None
    """Folder on a local disk that keeps the images read from a URL, so that a node fetches each of them once. All its
    ranks, workers and runs share it. null: images are fetched again in every epoch."""
    local_cache_gb: Positive = 200.0
    """Size limit of local_cache in GB (10^9 bytes). When it is full, the least recently used images are removed."""

    def __post_init__(self) -> None:
        check_fields(self, "--data.")

    def storage_options(self) -> "StorageOptions":
        """Return only these options."""
        return StorageOptions(self.local_cache, self.local_cache_gb)
