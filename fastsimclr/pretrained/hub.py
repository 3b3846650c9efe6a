"""Download an encoder from the Hugging Face Hub."""

import re
from pathlib import Path

from fastsimclr.errors import UserError
from fastsimclr.pretrained.files import FOLDER_FILES

SCHEME = "hf://"


def download(reference: str) -> Path:
    """Return the local folder of hf://USER/NAME[@REVISION], in huggingface_hub's cache.

    Downloads only weights and their description, never code. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN work as in
    huggingface_hub. Raises UserError if the repository is neither reachable nor in the cache.
    """
    parts = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", reference)
    if parts is None:
        raise UserError(f"got {reference}, expected hf://USER/NAME or hf://USER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"{reference}: got a repository of the Hugging Face Hub, but huggingface_hub is not installed; "
            "pip install 'fastsimclr[hub]'"
        ) from error
    try:
        return Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=list(FOLDER_FILES)))
    except (OSError, ValueError, RuntimeError) as error:  # its errors, and those of the network
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{reference}: got {type(error).__name__} ({reason}), expected a repository that is reachable or cached"
        ) from error
