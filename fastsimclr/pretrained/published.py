"""ImageNet weights that torchvision and timm publish: where their files are kept, and how to get them."""

import contextlib
import re
import socket
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.errors import UserError
from fastsimclr.models import ENCODERS, STANDARD_ENCODERS, USER_MODULE, EncoderSpec
from fastsimclr.models.registry import create_timm
from fastsimclr.pretrained.layouts import find_tensors
from fastsimclr.pretrained.safe_pickle import read_foreign

_TIMEOUT = 10  # seconds until a server that does not answer is an error


def load_published(spec: EncoderSpec) -> tuple[dict[str, Tensor], str]:
    """Return the published tensors by their names in the encoder's library, and their origin.

    Downloads the file unless it is in the cache of its library. The classifier is included, and the first layer is for
    the published number of channels.
    Raises UserError if there are none, or if the file cannot be downloaded, saying which file to put where.
    """
    if spec.name == USER_MODULE:
        raise UserError("weights: got imagenet for a module of your own, expected a file of its weights")
    if spec.name in set(ENCODERS) - set(STANDARD_ENCODERS):
        raise UserError(f"weights: got imagenet for {spec.name}, which has no published weights; expected a file")
    if spec.name in ENCODERS:
        return _torchvision(spec.name)
    library, _, name = spec.name.partition("/")
    return _timm(name, spec.image_size) if library == "timm" else _torchvision(name)


def _torchvision(name: str) -> tuple[dict[str, Tensor], str]:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    state = find_tensors(read_foreign(_download(weights.url)))
    # DenseNets' files have names from before PyTorch 0.4, "norm.1", which torchvision replaces as well.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=\d\.)", r"\1", name): value for name, value in state.items()}
    return state, f"torchvision's {weights}"


def _timm(name: str, image_size: int) -> tuple[dict[str, Tensor], str]:
    """timm adapts the names in its files and what depends on the image size, but not the channels."""
    import timm

    published = timm.get_pretrained_cfg(name)
    if published is not None and published.hf_hub_id:
        file = _download_from_hub(published.hf_hub_id, published.hf_hub_filename or "model.safetensors")
    elif published is not None and published.url:
        file = _download(str(published.url))
    else:
        raise UserError(
            f"weights: got imagenet for timm/{name}, which has no published weights; expected a file, or an encoder of "
            "timm.list_models(pretrained=True)"
        )
    # custom_load describes the file at published.url, which may be of JAX.
    overlay = {"file": str(file), "custom_load": False}
    try:
        with torch.random.fork_rng(devices=[]):
            model, _ = create_timm(name, image_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # pickle's, safetensors', and those of a file of another encoder
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: got {reason} ({type(error).__name__}), expected weights of timm/{name}") from error
    origin, size = f"timm's {published.architecture}.{published.tag}", published.input_size[-1]
    if published.fixed_input_size and size != image_size:
        origin += f", adapted by timm from images of {size} to {image_size} pixels"
    return model.state_dict(), origin


def _download(url: str) -> Path:
    """Return the file of a URL in torch.hub's cache. The hash in its name is checked after a download only."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        name_and_hash = torch.hub.HASH_REGEX.search(file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _timeout():
                torch.hub.download_url_to_file(
                    url, str(file), name_and_hash[1] if name_and_hash else None, progress=sys.stderr.isatty()
                )
        except (OSError, RuntimeError, HTTPException) as error:
            raise _not_downloaded(url, file, error) from error
    return file


def _download_from_hub(repository: str, name: str) -> Path:
    """Return a file of the Hugging Face Hub in its cache."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    repository, _, revision = repository.partition("@")
    where: dict[str, Any] = {"repo_id": repository, "filename": name, "revision": revision or None}
    cached = try_to_load_from_cache(**where)
    if isinstance(cached, str):
        return Path(cached)
    url = hf_hub_url(**where)
    try:
        get_hf_file_metadata(url, timeout=_TIMEOUT)  # hf_hub_download retries for minutes without a network
        return Path(hf_hub_download(**where))
    except Exception as error:  # its own errors, and those of its HTTP library, which depends on the version
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
        reference = folder / "refs" / (revision or "main")
        commit = reference.read_text() if reference.is_file() else revision or "main"
        raise _not_downloaded(url, folder / "snapshots" / commit / name, error) from error


def _not_downloaded(url: str, file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"weights: got imagenet, but its file cannot be downloaded ({reason}); get {url} on another machine and put it "
        f"at {file}"
    )


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    """torch.hub sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
