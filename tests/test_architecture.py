"""Imports between modules: layers, no cycles, and one module per heavy dependency."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
API = {"fastsimclr"}
COMMANDS = {"train", "evaluate", "embed", "export", "preview", "report", "plan", "doctor", "shard"}
LAYERS = (
    API,
    COMMANDS,
    {"cli"},
    {"training", "evaluation", "reporting"},
    {"config", "data", "environment", "options", "pretrained"},
    {"loss", "models", "optim"},
    {
        "distributed",
        "gloo",
        "node",
        "precision",
        "profiling",
        "progress_bar",
        "malloc",
        "memory",
        "run_folder",
        "sharding",
    }
    | {"checkpoint_format", "errors", "imports", "metrics_file", "presets", "ranges", "slurm", "stopping", "torchrun"}
    | {"version", "_lazy", "_extension", "_C", "_emulated"},
)
"""The modules and packages of fastsimclr, top to bottom. Each imports only from its own layer and those below."""


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the full names imported by the source of a module of `package`, at module level and inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) - node.level + 1] if node.level else []
            yield from (".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def read_modules() -> dict[str, set[str]]:
    """Return the full names that each module of fastsimclr imports, by the module's full name."""
    modules: dict[str, set[str]] = {name: set() for name in ("fastsimclr._C", "fastsimclr._emulated")}  # compiled
    for path in sorted((ROOT / "fastsimclr").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = package if parts[-1] == "__init__" else ".".join(parts)
        modules[name] = set(imports(path.read_text(), package))
    return modules


MODULES = read_modules()


def module_of(name: str) -> str:
    """Return the module that a full name belongs to: the name itself, or a prefix of it."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {
    module: {module_of(name) for name in names if name.split(".")[0] == "fastsimclr"}
    for module, names in MODULES.items()
}


def part_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    return module.removeprefix("fastsimclr.").split(".")[0]


def layer_of(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part_of(module) in layer)


def test_every_part_is_in_exactly_one_layer() -> None:
    named = [part for layer in LAYERS for part in layer]
    assert sorted(named) == sorted({part_of(module) for module in MODULES})


def test_no_module_imports_from_a_higher_layer() -> None:
    found = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if layer_of(target) < layer_of(module)
    ]
    assert not found


def test_no_module_imports_a_command() -> None:
    found = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if part_of(target) in COMMANDS
    ]
    assert not found


@pytest.mark.parametrize("level", ["modules", "parts"])
def test_no_import_cycle(level: str) -> None:
    graph: dict[str, set[str]] = {}
    # Augmentation.as_module imports on its first call what applies the recipe, all of which imports the recipe.
    factory = ("fastsimclr.data.augmentation", "fastsimclr.data.view_module")
    for module, targets in IMPORTS.items():
        targets = targets - {factory[1]} if module == factory[0] else targets
        if level == "modules":
            graph[module] = targets
        else:
            graph.setdefault(part_of(module), set()).update({part_of(target) for target in targets} - {part_of(module)})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


@pytest.mark.parametrize(
    ("dependency", "users"),
    [
        ("fastsimclr._C", {"fastsimclr._extension"}),
        ("fastsimclr._emulated", {"fastsimclr._extension"}),
        ("nvidia.dali", {"fastsimclr.data.dali"}),
        ("jinja2", {"fastsimclr.reporting.page"}),
        ("torch.utils.tensorboard", {"fastsimclr.training.loggers"}),
        ("wandb", {"fastsimclr.training.loggers"}),
        ("mlflow", {"fastsimclr.training.loggers"}),
        ("matplotlib", {"fastsimclr.reporting.charts", "fastsimclr.reporting.contact_sheet"}),
    ],
)
def test_heavy_dependency_is_imported_by_its_modules_only(dependency: str, users: set[str]) -> None:
    found = {
        module for module, names in MODULES.items() if any(f"{name}.".startswith(f"{dependency}.") for name in names)
    }
    assert found == users


def test_every_kind_of_import_is_found() -> None:
    source = """
import a.b
from c import d as e
from . import f
from ..g import h
def lazy():
    import i
    importlib.import_module("j.k")
"""
    expected = {"a.b", "c.d", "fastsimclr.data.f", "fastsimclr.g.h", "i", "j.k"}
    assert set(imports(source, "fastsimclr.data")) == expected


def assigned_outside_init(source: str) -> Iterator[str]:
    """Yield, as Class.attribute, attributes of self that are first assigned in a method other than __init__."""
    for owner in ast.walk(ast.parse(source)):
        if not isinstance(owner, ast.ClassDef):
            continue
        known = {node.target.id for node in owner.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
        methods = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
        for method in sorted(methods, key=lambda method: method.name != "__init__"):
            for node in ast.walk(method):
                if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                    continue
                if ast.unparse(node.value) != "self" or node.attr in known:
                    continue
                if method.name == "__init__":
                    known.add(node.attr)
                else:
                    yield f"{owner.name}.{node.attr}"


def test_no_attribute_is_first_assigned_outside_init() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "fastsimclr").rglob("*.py"))
        for name in assigned_outside_init(path.read_text())
    ]
    assert not found
    source = """
class A:
    b: int

    def f(self):
        self.b = self.c = 1
        self.d += 1

    def __init__(self):
        self.d = 1
"""
    assert list(assigned_outside_init(source)) == ["A.c"]
