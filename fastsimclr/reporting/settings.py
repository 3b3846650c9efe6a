"""How a run was set up: its configuration, its environment, and in which of them runs differ."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fastsimclr.config import Config
from fastsimclr.models import SimCLR, encoder, projector
from fastsimclr.reporting.markup import Child, Html, element, join, table
from fastsimclr.reporting.numbers import count
from fastsimclr.reporting.run_record import Run, flattened

ITS_OWN = {"output"}
"""Options that differ from run to run by what they are."""


def differences(runs: Sequence[Run]) -> Html:
    """The options that are not the same for all runs."""
    options = _differing([{k: v for k, v in run.config.items() if k not in ITS_OWN} for run in runs])
    if not options:
        return element("p", "No option: their configurations are the same, but for the output’s folder.")
    return _by_run(options, [run.config for run in runs], runs, "Options that differ")


def configuration(runs: Sequence[Run]) -> Html:
    """All options, folded."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    folded = element("summary", "All ", count(len(names), "option"))
    if len(runs) > 1:
        shown = _by_run(names, [run.config for run in runs], runs, "All options")
        return element("details", folded, shown)
    config = runs[0].config
    usual = dict(flattened(dataclasses.asdict(Config())))
    groups: dict[str, list[Child]] = {}
    for name in names:
        group, _, option = name.rpartition(".")
        changed = name not in ITS_OWN and config[name] != usual.get(name)
        value = element("b" if changed else "span", config[name])
        groups.setdefault(group or "run", []).append(element("div", element("dt", option), element("dd", value)))
    parts = [
        element("section", element("h4", name), element("dl", rows, class_="options")) for name, rows in groups.items()
    ]
    note = element("p", "Bold: not the default. Options that are not named are null.", class_="note")
    return element("details", folded, element("div", parts, class_="groups"), note)


def environment(runs: Sequence[Run]) -> Html | None:
    """What the runs ran on, if they have kept it."""
    found = [_environment(run) for run in runs]
    if not any(found):
        return None
    if len(runs) == 1:
        command = found[0].pop("command", None)
        shown = element("p", element("code", command), class_="command") if command else None
        return join([shown, _folded("Versions, devices and choices", found[0])])
    differing = _differing(found)
    same = [name for name in dict.fromkeys(name for each in found for name in each) if name not in differing]
    return join(
        [
            _by_run(differing, found, runs, "Where the runs’ environments differ") if differing else None,
            _folded("The same for all", {name: found[0][name] for name in same}) if same else None,
        ]
    )


def device(run: Run) -> tuple[str, str]:
    """What the run ran on, and how; both empty if it has not kept it."""
    kept = run.environment
    if "device" not in kept:
        return "", ""
    gpus = kept.get("gpus") or []
    name = str(kept["device"])
    if name.startswith("cuda") and gpus and isinstance(gpus[0], dict):
        name = str(gpus[0].get("name", name))
    ranks = kept.get("world_size") or 1
    parts = [str(kept[key]).split(" (")[0] for key in ("precision", "loss_backend") if kept.get(key)]
    return (f"{ranks} × {name}" if ranks != 1 else name), " · ".join(parts)


def parameters(run: Run) -> tuple[str, str]:
    """How many parameters the run's model has, and of what; both empty if its options don't say."""
    config = {name.removeprefix("model."): value for name, value in run.config.items()}
    try:
        with torch.device("meta"):  # sizes alone
            body = encoder(
                config["encoder"], int(config["width"]), config["stem"], image_size=int(config["data.image_size"])
            )
            hidden = config.get("hidden", "null")
            head = projector(
                body.out_features, None if hidden == "null" else int(hidden), int(config["out"]), int(config["layers"])
            )
    except (KeyError, ValueError):  # another version's options
        return "", ""
    whole = sum(parameter.numel() for parameter in SimCLR(body, head).parameters())
    wide = f" ×{config['width']}" if config["width"] != "1" else ""
    return f"{whole / 1e6:.1f} M", f"{config['encoder']}{wide} with its projection head"


def _environment(run: Run) -> dict[str, str]:
    words = {name: value for name, value in run.environment.items() if name != "command"}
    command = run.environment.get("command")
    if command:
        words["command"] = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    return {name: value or "–" for name, value in flattened(_worded(words))}


def _worded(value: Any) -> Any:
    """Lists as words, at any depth: eight GPUs that are alike as 8 × NVIDIA H100, 9.0."""
    if isinstance(value, dict):
        return {name: _worded(each) for name, each in value.items()}
    if isinstance(value, list):
        words = [", ".join(map(str, each.values())) if isinstance(each, dict) else str(each) for each in value]
        return ", ".join(f"{many} × {word}" if many > 1 else word for word, many in Counter(words).items())
    return "" if value is None else value


def _folded(summary: str, values: dict[str, str]) -> Html:
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in values.items()]
    return element("details", element("summary", summary), element("dl", rows, class_="options wide"))


def _differing(found: Sequence[dict[str, str]]) -> list[str]:
    names = dict.fromkeys(name for each in found for name in each)
    return [name for name in names if len({each.get(name) for each in found}) > 1]


def _by_run(names: Sequence[str], values: Sequence[dict[str, str]], runs: Sequence[Run], label: str) -> Html:
    rows = [[name, *(each.get(name, "–") for each in values)] for name in names]
    return table(["", *(run.name for run in runs)], rows, label=label, class_="settings")
