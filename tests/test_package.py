"""Building the package: the extension's build info, and each way in which the extension can be missing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastsimclr
from benchmarks.kernel_resources import find_tool
from fastsimclr._extension import build_info, describe_build
from fastsimclr.loss.fused import is_available

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastsimclr_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()
needs_compiler = pytest.mark.skipif(setup.find_compiler()[0] is None, reason=setup.find_compiler()[1])
needs_nvcc = pytest.mark.skipif(setup.find_nvcc()[0] is None, reason=setup.find_nvcc()[1])


FOLDERS = ("benchmarks", "csrc", "docs", "fastsimclr", "scripts", "tests")
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "mkdocs.yml", "pyproject.toml", "setup.py")
BUILT = ("__pycache__", "*.so", "_build.*.json")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy: an egg-info folder in the working tree could add stale files."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*BUILT))
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    done = run(copy, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')")
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").iterdir()
    return archive


@pytest.fixture
def checkout(sdist: Path, tmp_path: Path) -> Path:
    """The unpacked source distribution. Building in it shows that it is complete, and changes no installed files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    return unpacked


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    removed = ("FASTSIMCLR_CUDA", "FASTSIMCLR_CUDA_ARCHS", "FASTSIMCLR_WERROR", "CUDA_HOME", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in removed} | variables
    if environment.get("CXX") == "":
        del environment["CXX"]
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


def build(checkout: Path, **variables: str) -> str:
    """Build the package into checkout/lib, as for a wheel; return the output."""
    done = run(checkout, "setup.py", "build", "--build-lib", "lib", "--build-temp", "temp", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler_flags(checkout: Path, source: str) -> list[str]:
    """Return the FLAGS of a source file in the build.ninja of the last build."""
    (ninja,) = checkout.rglob("build.ninja")
    match = re.search(rf"^build [^\n]*{re.escape(source)}\.o: .*?\n  FLAGS = (.*?)\n", ninja.read_text(), re.M | re.S)
    assert match is not None
    return match[1].split()


def describe(folder: Path) -> str:
    """Return the description of its extension by the package in this folder."""
    # The finder of an editable install would provide its own _C to a package without one.
    code = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in finder.__module__];"
        "import fastsimclr._extension as extension; print(extension.__file__); print(extension.describe_build())"
    )
    done = run(folder, "-c", code)  # -c searches the current directory first
    assert done.returncode == 0, done.stderr
    file, line = done.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return line


def test_build_info_of_the_installed_package() -> None:
    info = build_info()
    assert info["extension"] in ("cuda", "cpu", "none")
    assert bool(info["reason"]) == (info["extension"] != "cuda")
    if info["extension"] == "none":
        assert describe_build() == f"extension: none ({info['reason']})"
        return
    assert info["version"] == fastsimclr.__version__
    assert re.fullmatch(r"(g\+\+|clang\+\+) \d+\.\d+", info["compiler"])
    if info["extension"] == "cpu":
        assert (info["cuda"], info["cuda_runtime"], info["architectures"]) == (None, None, [])
        assert describe_build() == f"extension: CPU only ({info['reason']})"
        return
    assert re.fullmatch(r"\d+\.\d+", info["cuda"])
    assert info["cuda_runtime"].split(".")[0] == info["cuda"].split(".")[0]  # cudart is from nvcc's toolkit
    assert info["architectures"]
    assert all(re.fullmatch(r"sm_\d+", name) for name in info["architectures"])
    assert re.match(rf"extension: .*CUDA .*for {info['architectures'][0]}", describe_build())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_fused_loss_is_not_available_without_a_gpu() -> None:
    assert not is_available()


def test_sdist_holds_all_source_files_and_no_build_outputs(sdist: Path) -> None:
    expected = set(FILES)
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        built = {path for path in files if any(part.match(name) for part in (path, path.parent) for name in BUILT)}
        expected |= {path.relative_to(ROOT).as_posix() for path in set(files) - built}
    with tarfile.open(sdist) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {name for name in found if name.startswith("fastsimclr.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert found - generated == expected


@needs_compiler
@needs_nvcc
def test_cuda_build_has_the_requested_architectures(checkout: Path) -> None:
    """Only one architecture, because the kernels take long to compile; CI builds several."""
    assert "building for CUDA" in build(
        checkout, FASTSIMCLR_CUDA="1", FASTSIMCLR_CUDA_ARCHS="80", FASTSIMCLR_WERROR="1"
    )
    assert re.fullmatch(r"extension: .*CUDA .*for sm_80\b.*\)", describe(checkout / "lib"))
    library = checkout / "lib" / "fastsimclr" / LIBRARY
    images = [find_tool("cuobjdump"), "--list-elf", "--list-ptx", library]
    listing = subprocess.run(images, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"sm_\w+\.\w+", listing)) == {"sm_80.cubin", "sm_80.ptx"}

    flags = compiler_flags(checkout, "forward.cu")
    assert "-lineinfo" in flags
    assert "-Xcompiler=-Werror" in flags  # the host compiler's warnings
    assert re.search(r"-Werror[ =]all-warnings", " ".join(flags))  # nvcc's own
    assert "-Werror" in compiler_flags(checkout, "view_params.cpp")


@needs_compiler
def test_build_without_nvcc_is_for_the_cpu_and_reports_it(checkout: Path) -> None:
    nowhere = str(checkout / "nowhere")
    reason = f"no nvcc was found (CUDA_HOME is {nowhere!r}, which has no bin/nvcc)"
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = run(checkout, "-c", code, CUDA_HOME=nowhere)
    assert f"building for the CPU only: {reason}" in done.stdout, done.stdout + done.stderr
    assert "-Werror" not in compiler_flags(checkout, "view_params.cpp"), "newer compilers may warn"

    (wheel,) = (checkout / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(checkout / "lib")
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert describe(checkout / "lib") == f"extension: CPU only ({reason})"
    suffixes = {".py", ".css", ".html", ".js", ".yaml"}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fastsimclr/**/*") if path.suffix in suffixes}
    expected |= {f"fastsimclr/{name}" for name in ("_C.pyi", "py.typed", LIBRARY)}
    expected |= {f"fastsimclr/_build.{sys.implementation.cache_tag}.json"}
    assert found == expected, "contains no emulation, tests or sources of the extension"


def test_build_without_a_compiler_is_pure_python_and_reports_it(checkout: Path) -> None:
    stale = checkout / "lib" / "fastsimclr" / LIBRARY
    stale.parent.mkdir(parents=True)
    stale.write_text("an earlier build's")
    reason = "no C++ compiler was found (looked for c++, g++, clang++ in PATH; install g++ or set CXX)"
    assert f"installing without the extension: {reason}" in build(checkout, PATH=str(checkout), CXX="")
    assert not stale.exists()
    assert describe(checkout / "lib") == f"extension: none ({reason})"

    packaged = checkout / "lib" / "fastsimclr"
    assert (packaged / "py.typed").exists()
    presets = sorted(preset.name for preset in (ROOT / "fastsimclr" / "configs").glob("*.yaml"))
    assert sorted(preset.name for preset in (packaged / "configs").iterdir()) == presets


def test_editable_build_without_a_compiler_removes_outdated_libraries(checkout: Path) -> None:
    stale = [checkout / "fastsimclr" / name for name in (LIBRARY, LIBRARY.replace("_C", "_emulated"))]
    for library in stale:
        library.write_text("an earlier build's")
    done = run(checkout, "setup.py", "build_ext", "--inplace", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not any(library.exists() for library in stale)
    reason = "no C++ compiler was found (CXX is 'no-such-compiler', which is not a program)"
    assert describe(checkout) == f"extension: none ({reason})"


def test_library_that_cannot_be_imported_reports_why(checkout: Path) -> None:
    assert "it was never built for this Python" in describe(checkout)
    (checkout / "fastsimclr" / LIBRARY).write_text("not a library")
    assert re.search(rf"cannot be imported: .*{re.escape(LIBRARY)}", describe(checkout))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param({"CXX": "no-such-compiler"}, "but no C++ compiler was found (CXX is 'no", id="no compiler"),
        pytest.param({"CUDA_HOME": "no-cuda"}, "but no nvcc was found (CUDA_HOME is 'no-cuda'", marks=needs_compiler),
        pytest.param({"FASTSIMCLR_CUDA": "yes"}, "FASTSIMCLR_CUDA is 'yes'; expected 1", id="invalid value"),
    ],
)
def test_required_cuda_build_fails_without_its_tools(checkout: Path, variables: dict[str, str], message: str) -> None:
    arguments = ("setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp")
    done = run(checkout, *arguments, **({"FASTSIMCLR_CUDA": "1"} | variables))
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (checkout / "lib").exists()


def test_search_order_of_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: str) -> Path:
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        return nvcc

    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(setup, "DEFAULT_CUDA_HOME", tmp_path / "usual")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    nvcc, reason = setup.find_nvcc()
    assert nvcc is None
    assert all(place in reason for place in ("CUDA_HOME", str(tmp_path / "usual"), "PATH", "nvidia-cuda-nvcc"))
    for folder in ("purelib/nvidia/cu13/bin", "path", "usual/bin", "home/bin"):  # in increasing priority
        expected = make(folder)
        if folder == "home/bin":
            monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        assert setup.find_nvcc() == (expected, "")


@needs_nvcc
def test_choose_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = setup.find_nvcc()[0]
    monkeypatch.delenv("FASTSIMCLR_CUDA_ARCHS", raising=False)
    assert {"80", "90"} <= set(setup.choose_architectures(nvcc, editable=False))
    assert setup.choose_architectures(nvcc, editable=True) == (setup.present_architectures() or ["80", "90"])
    for editable in (False, True):
        monkeypatch.setenv("FASTSIMCLR_CUDA_ARCHS", "80;90a")
        assert setup.choose_architectures(nvcc, editable=editable) == ["80", "90a"]
        monkeypatch.setenv("FASTSIMCLR_CUDA_ARCHS", "8.0 9.0")
        with pytest.raises(SystemExit, match=r"is '8\.0 9\.0'; expected numbers with ';' between"):
            setup.choose_architectures(nvcc, editable=editable)


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        ("80", "80"),
        ("80;90", "80;90"),
        ("80;86;89;90;100;120", "80;86-real;89-real;90-real;100-real;120"),
        ("120;86;80", "120;86-real;80"),
        ("80;90a;100f", "80;90a-real;100f-real"),
        ("90a", "90a-real"),
    ],
)
def test_ptx_is_built_for_the_lowest_and_highest_architecture(architectures: str, expected: str) -> None:
    assert setup.cmake_architectures(architectures.split(";")) == expected


def test_extension_includes_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|THC)\b", path.read_text()), path
