"""Importing this module hides all packages except PyTorch and the test tools, to emulate a bare GPU machine.

    python -c "import bare_machine, benchmarks.speedrun"     # with scripts/ in PYTHONPATH
    python -m pytest -p bare_machine --collect-only ...

A hidden package behaves as if it were not installed: `import` raises ModuleNotFoundError, `find_spec` returns None.
BARE_MACHINE_HAS lists packages that stay visible: "jsonargparse,yaml".
"""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MISSING = {
    "jsonargparse", "kornia", "lightly", "matplotlib", "nvidia.dali", "onnx", "onnxruntime", "onnxscript",
    "pytorch_metric_learning", "safetensors", "sklearn", "tensorboard", "timm", "tqdm", "umap", "webdataset", "yaml",
}  # fmt: skip
HIDDEN = MISSING - set(os.environ.get("BARE_MACHINE_HAS", "").split(","))


class HidingFinder:
    """Wraps other finders and hides packages from them."""

    def __init__(self, finders: list[Any]) -> None:
        self.finders = finders

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if any(name == hidden or name.startswith(f"{hidden}.") for hidden in HIDDEN):
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context: Any) -> Iterator[Any]:
        """Used by importlib.metadata, with which pytest finds its plugins."""
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*context)


sys.meta_path[:] = [HidingFinder(list(sys.meta_path))]
