"""The model card of an exported encoder: a README.md with the header that the Hugging Face Hub reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fastsimclr.metrics_file import read_records
from fastsimclr.models import USER_MODULE
from fastsimclr.pretrained.libraries import describe
from fastsimclr.pretrained.load import Pretrained
from fastsimclr.run_folder import RunFolder

_MEASURING = ("knn", "linear", "finetune")  # protocols that use these weights; `supervised` starts from new ones


def model_card(pretrained: Pretrained, run: RunFolder | None) -> str:
    """Describe the encoder, its recipe, its data, and the results that the run measured with these very weights."""
    spec, config = pretrained.encoder.spec, pretrained.config
    header = {
        "library_name": "fastsimclr",
        "pipeline_tag": "image-feature-extraction",
        "license": "unknown",
        "tags": ["simclr", "self-supervised", "contrastive-learning"],
    }
    features, channels = pretrained.encoder.out_features, spec.channels
    trained = f"pre-trained with SimCLR on {_name(config['data']['train'])}" if config else "without a recorded recipe"
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {describe(spec)}\n\n"
        f"An image encoder, {trained} ({pretrained.origin}). It maps normalized images (N, {channels}, H, W) to "
        f"representations (N, {features}).\n",
        f"## Use\n\n```python\n{_usage(pretrained)}\n```\n",
    ]
    if config:
        rows = [("data", _name(config["data"]["train"])), *_options(config)]
        sections.append(f"## Recipe\n\n{_table(('option', 'value'), rows)}\n")
    results = list(_results(pretrained, run)) if run is not None else []
    if results:
        sections.append(f"## Results\n\n{_table(('protocol', 'data', 'top-1'), results)}\n")
    return "\n".join(sections)


def _usage(pretrained: Pretrained) -> str:
    module = ", encoder=MODULE" if pretrained.encoder.spec.name == USER_MODULE else ""
    lines = ["from fastsimclr import load_encoder", "", f'encoder = load_encoder("hf://USER/NAME"{module})']
    if pretrained.augmentation is not None:
        lines.append("h = encoder(encoder.transform(image)[None])  # image: a PIL image or a uint8 tensor (C, H, W)")
    else:
        lines.append("h = encoder(images)  # the preparation of the images is not recorded")
    return "\n".join(lines)


def _options(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that determine the result."""
    for name in ("batch_size", "epochs", "max_steps", "seed", "precision"):
        if config.get(name) is not None:
            yield name, str(config[name])
    for section in ("loss", "optim"):
        for name, value in config.get(section, {}).items():
            yield f"{section}.{name}", str(value)
    for name, value in config["data"].items():
        if name not in ("train", "val", "backend", "workers", "max_bad", "cache"):
            yield f"data.{name}", str(value)


def _results(pretrained: Pretrained, run: RunFolder) -> Iterator[tuple[str, str, str]]:
    """The protocol, data and top-1 accuracy of what was measured with the exported weights."""
    config = pretrained.config or {}
    if run.metrics.is_file():
        for record in read_records(run.metrics):
            if "knn_accuracy" in record and pretrained.origin == f"fastsimclr run, step {record['step']}":
                val, train = config["data"].get("val"), config["data"]["train"]
                data = _name(val if isinstance(val, str) else train)
                yield "kNN in training", data, f"{record['knn_accuracy']:.2%}"
    for file in sorted(run.evaluate.glob("*.json")):
        record = json.loads(file.read_text())
        if record["origin"] == pretrained.origin and record["protocol"].startswith(_MEASURING):
            path, images = record["val"]["path"], record["val"]["images"]
            data = _name(path) if path else f"{_name(record['train']['path'])}, leave-one-out"
            yield record["protocol"], f"{images} images of {data}", f"{record['top1']:.2%}"


def _name(path: Any) -> str:
    """The last name of a path on this machine; other names as they are."""
    return Path(path).name if str(path).startswith("/") else str(path)


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
