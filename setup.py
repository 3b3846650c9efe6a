"""Builds the extension fastsimclr._C with CMake and Ninja, as far as this machine's tools go:

with nvcc and a C++ compiler the CUDA build, without nvcc the CPU build, without a C++ compiler no extension at all.
pip hides what a build prints, so the outcome and its reason are kept beside the extension, for
fastsimclr/_extension.py to read.

FASTSIMCLR_CUDA=1        what is missing for the CUDA build is an error
FASTSIMCLR_CUDA=0        the CPU build, even where there is an nvcc
FASTSIMCLR_CUDA_ARCHS    what to compile for: "80;90"
FASTSIMCLR_WERROR=1      compiler warnings are errors
CUDA_HOME, CXX           obeyed: where they are set, no other nvcc or C++ compiler is looked for
CMAKE_BUILD_PARALLEL_LEVEL   how many compilers run at once
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
USUAL_CUDA = Path("/usr/local/cuda")
WHEEL_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
EDITABLE_ARCHITECTURES = ["80", "90"]  # where there is no GPU to ask


def find_compiler() -> tuple[str | None, str]:
    """The C++ compiler and "", or None and why there is none that could build a Python extension."""
    if named := os.environ.get("CXX"):
        compiler = shutil.which(shlex.split(named)[0])  # "ccache g++" is a legal value
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
    """The nvcc and "", or None and where it was looked for. No GPU is asked for: one may build for another machine."""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [Path(home, "bin", "nvcc")]
        looked = f"CUDA_HOME is {home!r}, which has no bin/nvcc"
    else:
        # In pip's isolated build purelib is still the environment that is being installed into.
        packages = Path(sysconfig.get_path("purelib"), "nvidia")
        candidates = [USUAL_CUDA / "bin" / "nvcc", Path(shutil.which("nvcc") or "/nowhere")]
        candidates += sorted(packages.glob("*/bin/nvcc"), reverse=True)
        looked = f"looked in CUDA_HOME, {USUAL_CUDA}, PATH and the pip package nvidia-cuda-nvcc"
    nvcc = next((path for path in candidates if os.access(path, os.X_OK)), None)
    return nvcc, "" if nvcc else f"no nvcc was found ({looked})"


def read_switch(name: str) -> str | None:
    """The environment variable's value, "1" or "0"; None if it is unset or empty."""
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise SystemExit(f"{name} is {value!r}; expected 1 or 0, or leave it unset")
    return value


def choose_architectures(nvcc: Path, editable: bool) -> list[str]:
    """The architectures to compile for: a wheel is for any GPU, an editable build for the one at hand."""
    if named := os.environ.get("FASTSIMCLR_CUDA_ARCHS"):
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", named):
            raise SystemExit(f"FASTSIMCLR_CUDA_ARCHS is {named!r}; expected numbers with ';' between, such as 80;90")
        return named.split(";")
    wanted, default = WHEEL_ARCHITECTURES, EDITABLE_ARCHITECTURES
    if editable:
        wanted = present_architectures() or EDITABLE_ARCHITECTURES
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in wanted if f"sm_{arch}" in known] or default


def cmake_architectures(architectures: list[str]) -> str:
    """CMAKE_CUDA_ARCHITECTURES: machine code for each architecture, and PTX of the lowest and the highest.

    A GPU that has no machine code in the library compiles the newest PTX that is not newer than itself: the highest
    serves later GPUs, the lowest those in between. Code for 90a or 100f runs on that GPU or family only, so its PTX
    would serve no other.
    """
    portable = sorted((arch for arch in architectures if arch.isdigit()), key=int)
    with_ptx = {*portable[:1], *portable[-1:]}
    return ";".join(arch if arch in with_ptx else f"{arch}-real" for arch in architectures)


def present_architectures() -> list[str]:
    """The GPUs of this machine that the kernels can run on (8.0 and later): ["90"]; [] without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        lines = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    found = {int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)}
    return [str(arch) for arch in sorted(found) if arch >= 80]


def run_cmake(build: Path, prefix: Path, options: list[str]) -> None:
    # The packages' own programs: they are there in an isolated build, whatever PATH says.
    from cmake import CMAKE_BIN_DIR
    from ninja import BIN_DIR

    cmake = Path(CMAKE_BIN_DIR, "cmake")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={Path(BIN_DIR, 'ninja')}", *options]
    # More than a few nvcc at once exhaust the memory sooner than the cores.
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(min(os.cpu_count() or 1, 8)), **os.environ}
    for command in (
        [cmake, "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja", *options],  # fresh: the last build had other tools
        [cmake, "--build", build],
        [cmake, "--install", build, "--prefix", prefix, "--strip"],
    ):
        if subprocess.run(command, env=environment).returncode:
            raise SystemExit("the extension's build failed, see above; FASTSIMCLR_CUDA=0 builds it without CUDA")


class BuildExtension(build_ext):
    def run(self) -> None:
        wanted = read_switch("FASTSIMCLR_CUDA")
        compiler, reason = find_compiler()
        nvcc = None
        if compiler:
            nvcc, reason = (None, "FASTSIMCLR_CUDA is 0") if wanted == "0" else find_nvcc()
        if wanted == "1" and nvcc is None:
            raise SystemExit(f"FASTSIMCLR_CUDA is 1, but {reason}; without FASTSIMCLR_CUDA it builds for the CPU")

        # An earlier build's library must not outlive a build that makes none.
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
        if self.inplace:  # a developer's build: the kernels for the CPU, too, for the tests
            options += ["-DFASTSIMCLR_EMULATION=ON"]
        if read_switch("FASTSIMCLR_WERROR") == "1":
            options += ["-DFASTSIMCLR_WERROR=ON"]
        if compiler:
            run_cmake(Path(self.build_temp).resolve(), library.parents[1], options)

        # One record for each Python, as there is one library for each. fastsimclr/_extension.py knows this name.
        record = library.with_name(f"_build.{sys.implementation.cache_tag}.json")
        outcome = "cuda" if nvcc else "cpu" if compiler else "none"
        record.write_text(json.dumps({"extension": outcome, "reason": reason}) + "\n")


if __name__ == "__main__":  # the tests import the functions above
    setup(
        ext_modules=[Extension("fastsimclr._C", sources=[])],
        cmdclass={"build_ext": BuildExtension},
    )
