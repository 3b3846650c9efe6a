"""The stages of gpu_check.py, in order: the command of each and its requirements.

The most important come first, so that an interrupted run is useful: correctness of the kernels, then their accuracy and
speed, then everything else.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Plugin autoload is off (see gpu_check.py), because warnings of other plugins would be errors.
PYTEST = ("{python}", "-m", "pytest", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider")
GPU_TESTS = (*PYTEST, "-m", "gpu", "--durations=5")
LOSS_AND_VIEWS = ("tests/loss/test_fused.py", "tests/data/test_crop.py", "tests/data/test_photometric.py")
OFFSETS = "tests/loss/test_fused.py::test_offsets_past_2_31_elements"
BUILD = """
set -e
cmake --fresh -S . -B build/gpu_check -G Ninja -DPython_EXECUTABLE="{python}" -DFASTSIMCLR_CUDA=ON \\
  -DCMAKE_CUDA_COMPILER="{nvcc}" -DCMAKE_CUDA_ARCHITECTURES={arch}
cmake --build build/gpu_check
cmake --install build/gpu_check --prefix .
"{python}" scripts/small_kernels.py --only loss
"""


@dataclass(frozen=True)
class Stage:
    """A command and its requirements. {python}, {out} and the other names of `Runner.values` are substituted."""

    name: str
    seconds: int
    command: tuple[str, ...]
    files: tuple[str, ...] = ()
    """Test or benchmark files, appended to the command."""
    optional_files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """More files and the modules that each imports; a file is left out if one of its modules is missing."""
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """Environment variables that must be set to a folder."""
    environment: dict[str, str] = field(default_factory=dict)
    proofs: tuple[str, ...] = ()
    """Regular expressions. The stage fails unless a line of the output matches each of them."""
    refusal: str = ""
    """Regular expression. If a line matches it, a failure means that the machine does not permit this stage."""
    default: bool = True
    fatal: bool = False

    def lacking(self) -> str:
        """Return why the stage cannot run on this machine, or "" if it can."""
        reasons = [f"{name} is not installed" for name in missing(self.modules)]
        reasons += [f"{name} is not in PATH" for name in self.programs if not shutil.which(name)]
        reasons += [f"{name} names no folder" for name in self.folders if not os.path.isdir(os.environ.get(name, ""))]
        return "; ".join(reasons)


def missing(modules: Sequence[str]) -> list[str]:
    def is_installed(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # nvidia.dali without the package nvidia
            return False

    return [module for module in modules if not is_installed(module)]


def passed(*files: str) -> tuple[str, ...]:
    """Return proofs that tests of each file passed: pytest also exits with 0 if all tests are skipped."""
    return (r"\d+ passed", *(rf"^{re.escape(file)} .*\." for file in files))


def benchmark(name: str, seconds: int, file: str, result: str, **more: Any) -> Stage:
    command = (*PYTEST, f"--benchmark-json={{out}}/{result}", "--benchmark-columns=median,iqr,rounds")
    return Stage(name, seconds, command, (f"benchmarks/{file}",), proofs=passed(), **more)


def sanitizer(tool: str) -> Stage:
    options = ("--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "20")
    return Stage(
        tool,
        120,
        ("compute-sanitizer", "--tool", tool, *options, "{python}", "scripts/small_kernels.py"),
        programs=("compute-sanitizer",),
        # Allocate each tensor separately: inside a block of the caching allocator no access is out of bounds.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        proofs=(r"SUMMARY: 0 (errors|hazards)",),
        refusal=r"Device not supported|Unable to find injection|not supported on this",
    )


STAGES = (
    Stage("build", 90, ("bash", "-c", BUILD), programs=("cmake", "ninja", "nvcc"), fatal=True),
    Stage("doctor", 20, ("{python}", "-m", "fastsimclr.doctor")),
    Stage(
        "tests",
        90,
        (*GPU_TESTS, "--junitxml={out}/gpu_tests.xml", "--continue-on-collection-errors", f"--deselect={OFFSETS}"),
        LOSS_AND_VIEWS,
        proofs=passed(*LOSS_AND_VIEWS),
    ),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    sanitizer("synccheck"),
    Stage("accuracy", 40, ("{python}", "-m", "benchmarks.nt_xent_accuracy", "--json={out}/accuracy.json")),
    benchmark(
        "loss",
        60,
        "bench_nt_xent.py",
        "nt_xent.json",
        environment={"BENCH_RIVALS": "0", "BENCH_SIZES": "8192x128,32768x128,131072x256"},
    ),
    benchmark("view_kernels", 40, "bench_view_kernels.py", "view_kernels.json", modules=("yaml",)),
    Stage("offsets", 60, GPU_TESTS, (OFFSETS,), proofs=passed(), refusal=r"needs \d+ GiB"),
    Stage(
        "other_tests",
        60,
        GPU_TESTS,
        ("tests/test_doctor.py",),
        {
            "tests/benchmarks/test_dali_colors.py": ("nvidia.dali",),
            "tests/data/test_view_module.py": ("cloudpickle", "yaml", "tqdm"),
            "tests/test_profiling.py": ("jsonargparse", "cloudpickle", "yaml", "tqdm", "tensorboard", "sklearn"),
        },
        proofs=passed(),
    ),
    benchmark("rivals", 200, "bench_nt_xent.py", "nt_xent_rivals.json", environment={"BENCH_SECONDS": "{begin}"}),
    benchmark("encoder", 400, "bench_encoder.py", "encoder.json", default=False),
    benchmark("training", 500, "bench_train.py", "train.json", default=False, modules=("yaml", "sklearn")),
    Stage(
        "speedrun",
        570,
        (
            *("{python}", "-m", "benchmarks.speedrun", "--budget=120", "--seeds=1", "--output={out}/speedrun"),
            *("--train={cifar10}/train-*.tar", "--test={cifar10}/test.tar"),
        ),
        modules=("jsonargparse", "yaml", "tqdm", "tensorboard", "safetensors"),
        folders=("CIFAR10",),
        default=False,
    ),
)
