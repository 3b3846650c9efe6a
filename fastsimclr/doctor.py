"""What is here, what will be used, why, and what to install to be faster.

It ends with 0 whatever is missing: to say so is what it is for.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from fastsimclr.environment import OPTIONAL, examine


def describe(found: dict[str, Any]) -> str:
    """The same for people, in two columns."""
    rows = [(name, found[name] or "not installed") for name in ("fastsimclr", "python", "torch", "torchvision", "dali")]
    rows.append(("cuda of torch", found["cuda_of_torch"] or "none: this torch is for the CPU"))
    rows.append(("driver", found["driver"] or "none: nvidia-smi names no GPU"))
    rows += [("gpu", f"{gpu['name']}, compute capability {gpu['capability']}") for gpu in found["gpus"]]
    rows += [] if found["gpus"] else [("gpu", "none that torch can use")]
    rows.append(("extension", found["extension"]["description"]))
    for name in ("loss", "crops_and_colors", "views_of_a_folder"):
        rows.append((name.replace("_", " "), f"{found[name]['backend']}: {found[name]['why']}"))
    rows.append(("precision", found["precision"]))
    rows += [(name, version or f"not installed (for {OPTIONAL[name]})") for name, version in found["optional"].items()]
    rows += [("to be faster", line) for line in found["to_be_faster"]]
    return "\n".join(f"{name:19}{text}" for name, text in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsimclr.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    options = parser.parse_args(arguments)
    found = examine()
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
