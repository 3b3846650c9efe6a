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
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise UserError(
            f"{reference}: got a repository of the Hugging Face Hub, but huggingface_hub is not installed; "
            "pip install 'fastsimclr[hub]'"
        ) from error
    name, revision = parts.groups()
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FOLDER_FILES)))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{reference}: got a repository that is not in the cache, and no connection to the Hugging Face Hub; "
            "expected either: check the network, HF_HUB_OFFLINE and HF_HOME"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{reference}: got no such repository or revision, or one without access; expected its name on the Hugging "
            "Face Hub: check it, or log in by `hf auth login`"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # of the disk and the network
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{reference}: got {type(error).__name__} ({reason}), expected a download") from error
