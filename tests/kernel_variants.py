"""Rebuild the extension with a planted fault or a checker, and check its results in a separate process.

library = build(folder, checker="sanitizers")    # the emulated kernels; or "races": the emulation's race detector
library = build(folder, fault=("tile.cuh", "right", "wrong"))      # with one tile shape, which compiles faster
library = build(folder, "_C", checker="sanitizers")                # what runs on the CPU
outcome = check(library, checker="sanitizers")   # exit code 0 if all results are right, 1 if one is wrong
outcome = check(library, "views")                # only the kernels of views; "loss": only those of the loss
outcome = check(library, "sizes")                # hostile sizes, see hostile_sizes.py
"""

import atexit
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal

import pybind11
import torch

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++")
LOSS, VIEWS = ("normalize.cu", "forward.cu", "backward.cu"), ("crop.cu", "photometric.cu")
BINDING = ("bindings.cpp", "bindings_views.cpp")  # no kernels, but the longest to compile
CPU = ("crop.cpp", "photometric.cpp", "view_params.cpp")
SANITIZER_EXIT_CODE = 99
Fault = tuple[str, str, str]  # file, right, wrong
Checker = Literal["", "races", "sanitizers"]
Module = Literal["_emulated", "_C"]
COMPILER_FLAGS: dict[Checker, list[str]] = {
    "": [],
    "races": ["-g1", "-fsanitize=thread"],
    "sanitizers": ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
# (M, D, temperature): rows around a tile edge; one, a partial and several width blocks; both sets of formulas.
# 258: several tiles in each of several backward splits.
# 0.5: a column past the edge would count as much as a negative. 0.03: the self-pair's exponential dominates.
CASES = [(6, 7, 0.5), (258, 64, 0.03), (130, 60, 0.005), (258, 130, 0.1), (70, 300, 0.005), (70, 300, 0.1)]


def build(folder: Path, module: Module = "_emulated", *, fault: Fault | None = None, checker: Checker = "") -> Path:
    """Build a module of the extension and return its path.

    fault: text to replace in a source file. All tiles then have one shape, which compiles faster: D <= 64 in one plane,
    with two row blocks per forward unit.
    """
    sources = _copy(folder, one_shape=fault is not None)
    changed = LOSS + VIEWS if module == "_emulated" else CPU
    if fault is not None:
        name, right, wrong = fault
        text = (sources / name).read_text()
        assert text.count(right) == 1, f"{name} has {text.count(right)} times {right!r}; expected once"
        (sources / name).write_text(text.replace(right, wrong))
        changed = (name,) if name in changed else LOSS

    objects = _compile_all(sources, folder, changed, module, checker)
    rest = BINDING + (LOSS + VIEWS if module == "_emulated" else CPU)
    objects += [_unchanged(name, module, checker) for name in rest if name not in changed]
    if checker == "races":  # in place of libtsan
        objects.append(_unchanged("emulation/race_detector.cpp"))
    linker_flags = COMPILER_FLAGS[checker] if checker == "sanitizers" else []
    library = folder / f"{module}.so"
    subprocess.run([COMPILER, "-shared", *linker_flags, *objects, "-o", library], check=True)
    return library


def _copy(folder: Path, *, one_shape: bool) -> Path:
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    if one_shape:
        tile = (sources / "tile.cuh").read_text()
        body = re.compile(r"(auto with_shape\(int planes, int width, F f\) \{).*?\n\}\n", re.DOTALL)
        tile, count = body.subn(r"\1 return f(Shape<64, 1>::Low()); }\n", tile)
        assert count == 1
        (sources / "tile.cuh").write_text(tile)
    return sources


@functools.cache
def _unchanged(name: str, module: Module = "_emulated", checker: Checker = "") -> Path:
    """Return the object file of this source without a fault, for one tile shape."""
    if checker == "races" and name in BINDING:
        checker = ""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return _compile_all(_copy(folder, one_shape=True), folder, (name,), module, checker)[0]


def _compile_all(sources: Path, folder: Path, names: tuple[str, ...], module: Module, checker: Checker) -> list[Path]:
    assert COMPILER is not None
    objects = [folder / f"{Path(name).name}.o" for name in names]
    flags = [*_compile(sources, module), *COMPILER_FLAGS[checker]]
    running = [
        subprocess.Popen([*flags, "-c", sources / name, "-o", target])
        for name, target in zip(names, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    return objects


def _compile(sources: Path, module: Module) -> list[str]:
    flags = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-x", "c++"]
    flags += [f"-DFASTSIMCLR_MODULE={module}", '-DFASTSIMCLR_VERSION="test"']
    flags += ["-DFASTSIMCLR_EMULATION"] if module == "_emulated" else []
    return flags + [f"-I{path}" for path in (sources, pybind11.get_include(), sysconfig.get_path("include"))]


def check(
    library: Path, kernels: str = "all", *, one_shape: bool = False, checker: Checker = ""
) -> "subprocess.CompletedProcess[str]":
    """Check the kernels of a library in a new process: "all", "loss", "views", or "sizes": hostile sizes."""
    environment = dict(os.environ)
    if checker == "sanitizers":  # Python is built without sanitizers, so they must be preloaded
        runtimes = [
            subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment["LD_PRELOAD"] = ":".join(runtimes)
        environment["ASAN_OPTIONS"] = f"detect_leaks=0:exitcode={SANITIZER_EXIT_CODE}"
        environment["UBSAN_OPTIONS"] = f"exitcode={SANITIZER_EXIT_CODE}"
    command = [sys.executable, __file__, str(library), kernels, *(["--one-shape"] if one_shape else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def main(library: str, kernels: str, one_shape: bool) -> int:
    from fastsimclr import _extension

    module = Path(library).stem
    specification = importlib.util.spec_from_file_location(module, library)
    assert specification is not None
    assert specification.loader is not None
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    setattr(_extension, "emulated" if module == "_emulated" else "compiled", loaded)

    torch.set_num_threads(1)
    if kernels == "sizes":
        import hostile_sizes

        return 1 if hostile_sizes.are_wrong(loaded) else 0
    wrong = (kernels != "views" and loss_is_wrong(one_shape)) or (kernels != "loss" and views_are_wrong())
    return 1 if wrong else 0


def views_are_wrong() -> bool:
    """Compare the kernels of crops and colors with the PyTorch implementation."""
    import numpy as np

    from fastsimclr import Augmentation
    from fastsimclr.data.crop import crop
    from fastsimclr.data.params import sample_params
    from fastsimclr.data.photometric import photometric

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 37, 45, 3)).astype(np.uint8))
    index, sizes = np.arange(12), np.tile([37, 45], (12, 1))
    for seed in range(1, 6):
        os.environ["FASTSIMCLR_EMULATION_SEED"] = str(seed)
        for size in (33, 70):  # one column in a second tile; three tiles per side
            recipe = Augmentation(image_size=size, blur_prob=0.7, blur_kernel=0.5, jitter_prob=0.9, std=(1 / 255,) * 3)
            params = sample_params(recipe, seed, 0, index, 0, sizes)
            crops = [crop(images, index, params, recipe, name) for name in ("emulated", "pytorch")]
            views = [photometric(crops[1], params, recipe, implementation=name) for name in ("emulated", "pytorch")]
            errors = [float((a.float() - b.float()).abs().mean()) for a, b in (crops, views)]
            # A loose bound: test_crop.py and test_photometric.py test the accuracy.
            if not all(error < 0.1 for error in errors):  # also true for NaN
                print(f"wrong: seed {seed}, views of {size}: {errors} levels off")
                return True
    return False


def loss_is_wrong(one_shape: bool) -> bool:
    from oracle import loss_and_gradients, relative_error, row_losses, views

    cases = [(*case, p) for case in CASES for p in ("medium", "highest")]
    if one_shape:
        cases = [case for case in cases if case[1] <= 64 and case[3] == "medium"]
    for seed in range(1, 9 if one_shape else 2):  # of the thread order
        os.environ["FASTSIMCLR_EMULATION_SEED"] = str(seed)
        for m, d, temperature, precision in cases:
            z1, z2 = views(m // 2, d, torch.float32, noise=0.5 if temperature > 0.01 else 5.0)
            got = loss_and_gradients(row_losses("emulated", precision=precision), z1, z2, temperature)
            exact = loss_and_gradients(row_losses("reference"), z1.double(), z2.double(), temperature)
            errors = [relative_error(a, b) for a, b in zip(got[:2], exact[:2], strict=True)]
            # A loose bound: test_fused.py tests the accuracy.
            if not max(errors) < (0.1 if precision == "medium" else 0.001):
                print(f"wrong: seed {seed}, M={m}, D={d}, temperature {temperature}, {precision}: errors {errors}")
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], "--one-shape" in sys.argv))
