"""Build the extension fastsimclr._C with CMake and Ninja, depending on the tools that are available:

with nvcc and a C++ compiler the CUDA build, without nvcc the CPU build, without a C++ compiler no extension.
pip hides the output of a build, so the outcome and its reason are written to a file next to the extension, which
fastsimclr/_extension.py reads.

FASTSIMCLR_CUDA=1        fail if the CUDA build is not possible
FASTSIMCLR_CUDA=0        make the CPU build even if nvcc is available
FASTSIMCLR_CUDA_ARCHS    architectures to compile for: "80;90"
FASTSIMCLR_WERROR=1      treat compiler warnings as errors
CUDA_HOME, CXX           the CUDA toolkit and the C++ compiler; if set, no others are searched for
CMAKE_BUILD_PARALLEL_LEVEL   number of compiler processes
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_HOME = Path("/usr/local/cuda")
WHEEL_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
EDITABLE_ARCHITECTURES = ["80", "90"]  # on a machine without a GPU


def find_compiler() -> tuple[str | None, str]:
    """Return the C++ compiler and "", or None and why a Python extension cannot be built."""
    if named := os.environ.get("CXX"):
        compiler = shutil.which(shlex.split(named)[0])  # CXX may be "ccache g++"
        looked = f"CXX is {named!r}, which is not a program"
    else:
        names = ["c++", "g++", "clang++"]
        compiler = next(filter(None, map(shutil.which, names)), None)
        looked = f"looked for {', '.join(names)} in PATH; install g++ or set CXX"
    if compiler is None:
        return None, f"no C++ compiler was found ({looked})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return None, f"no Python.h was found in {sysconfig.get_path('include')} (install python3-dev)"
    return compiler, ""


def find_nvcc() -> tuple[Path | None, str]:
    """Return nvcc and "", or None and where it was searched for. No GPU is needed to build for another machine."""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home, "bin", "nvcc")]
        looked = f"CUDA_HOME is {home!r}, which has no bin/nvcc"
    else:
        # Also in pip's isolated build, purelib is the environment that is installed into.
        packages = Path(sysconfig.get_path("purelib"), "nvidia")
        candidates = [DEFAULT_CUDA_HOME / "bin" / "nvcc", Path(shutil.which("nvcc") or "/nowhere")]
        candidates += sorted(packages.glob("*/bin/nvcc"), reverse=True)
        looked = f"looked in CUDA_HOME, {DEFAULT_CUDA_HOME}, PATH and the pip package nvidia-cuda-nvcc"
    nvcc = next((path for path in candidates if os.access(path, os.X_OK)), None)
    return nvcc, "" if nvcc else f"no nvcc was found ({looked})"


def read_switch(name: str) -> str | None:
    """Return the value of the environment variable, "1" or "0"; None if it is unset or empty."""
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 1 or 0, or leave it unset")
    return value


def choose_architectures(nvcc: Path, editable: bool) -> list[str]:
    """Return the architectures to compile for: all for a wheel, those of this machine's GPUs for an editable build."""
    if named := os.environ.get("FASTSIMCLR_CUDA_ARCHS"):
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", named):
            raise SystemExit(f"FASTSIMCLR_CUDA_ARCHS is {named!r}; expected numbers with ';' between, such as 80;90")
        return named.split(";")
    requested, default = WHEEL_ARCHITECTURES, EDITABLE_ARCHITECTURES
    if editable:
        requested = present_architectures() or EDITABLE_ARCHITECTURES
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in requested if f"sm_{arch}" in known] or default


def cmake_architectures(architectures: list[str]) -> str:
    """Return CMAKE_CUDA_ARCHITECTURES: machine code for each architecture, and PTX for the lowest and the highest.

    For a GPU without machine code in the library, the driver compiles the newest PTX that is not newer than the GPU:
    the highest serves later GPUs, the lowest those in between. Code for 90a or 100f runs only on that GPU or family, so
    its PTX would not serve other GPUs.
    """
    portable = sorted((arch for arch in architectures if arch.isdigit()), key=int)
    with_ptx = {*portable[:1], *portable[-1:]}
    return ";".join(arch if arch in with_ptx else f"{arch}-real" for arch in architectures)


def present_architectures() -> list[str]:
    """Return the architectures of this machine's GPUs that can run the kernels (8.0 and later), such as ["90"]."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = {int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)}
    return [str(arch) for arch in sorted(found) if arch >= 80]


def run_cmake(build: Path, prefix: Path, options: list[str]) -> None:
    # The programs of the PyPI packages, which an isolated build has independently of PATH.
    from cmake import CMAKE_BIN_DIR
    from ninja import BIN_DIR

    cmake = Path(CMAKE_BIN_DIR, "cmake")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={Path(BIN_DIR, 'ninja')}", *options]
    # Limited because many nvcc processes exhaust the memory before they use all cores.
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(min(os.cpu_count() or 1, 8)), **os.environ}
    for command in (
        [cmake, "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *options],  # fresh: the tools may have changed
        [cmake, "--build", build],
        [cmake, "--install", build, "--prefix", prefix, "--strip"],
    ):
        if subprocess.run(command, env=environment).returncode:
            raise SystemExit("building the extension failed, see above; FASTSIMCLR_CUDA=0 builds it without CUDA")


class BuildExtension(build_ext):
    def run(self) -> None:
        requested = read_switch("FASTSIMCLR_CUDA")
        compiler, reason = find_compiler()
        nvcc = None
        if compiler:
            nvcc, reason = (None, "FASTSIMCLR_CUDA is 0") if requested == "0" else find_nvcc()
        if requested == "1" and nvcc is None:
            raise SystemExit(f"FASTSIMCLR_CUDA is 1, but {reason}; unset FASTSIMCLR_CUDA to build for the CPU")

        # Remove the libraries of an earlier build: this one may not build any.
        library, emulated = (
            Path(self.get_ext_fullpath(f"fastsimclr.{name}")).resolve() for name in ("_C", "_emulated")
        )
        library.unlink(missing_ok=True)
        emulated.unlink(missing_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)

        options = ["-DFASTSIMCLR_CUDA=OFF"]
        if nvcc:
            architectures = cmake_architectures(choose_architectures(nvcc, editable=bool(self.inplace)))
            options = ["-DFASTSIMCLR_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            options += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
            print(f"fastsimclr: building for CUDA with {nvcc}, architectures {architectures}", flush=True)
        elif compiler:
            print(f"fastsimclr: building for the CPU only: {reason}", flush=True)
        else:
            print(f"fastsimclr: installing without the extension: {reason}", flush=True)
            self.extensions = []
        if self.inplace:  # an editable install: also build the emulated kernels for the tests
            options += ["-DFASTSIMCLR_EMULATION=ON"]
        if read_switch("FASTSIMCLR_WERROR") == "1":
            options += ["-DFASTSIMCLR_WERROR=ON"]
        if compiler:
            run_cmake(Path(self.build_temp).resolve(), library.parents[1], options)

        # One record per Python version, like the library. fastsimclr/_extension.py reads this file.
        record = library.with_name(f"_build.{sys.implementation.cache_tag}.json")
        outcome = "cuda" if nvcc else "cpu" if compiler else "none"
        record.write_text(json.dumps({"extension": outcome, "reason": reason}) + "\n")


if __name__ == "__main__":  # the tests import the functions above
    setup(
        ext_modules=[Extension("fastsimclr._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
