"""The CUDA emulation (csrc/emulation): it computes the same as a GPU, and detects errors in kernels.

The test kernels are in tests/csrc/emulation. Faults are planted by replacing text in a copy of the source.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests" / "csrc" / "emulation"
SEEDS = range(1, 6)
INVALID_VALUE, LAUNCH_FAILURE = 1, 719
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
RACES = ("-g1", "-fsanitize=thread")  # linked with the emulation's race detector instead of libtsan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels"),
]

Build = Callable[..., Path]
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build("stream.cu", (old, new), ...) compiles the kernel with these changes and returns the cached library.

    Without flags it is not optimized, since compile time dominates.
    """
    libraries: dict[object, Path] = {}

    def run(folder: Path, *command: object) -> None:
        command = ("g++", *FLAGS, "-I", ROOT / "csrc", *command)
        done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    @functools.cache
    def race_detector() -> Path:
        folder = tmp_path_factory.mktemp("race_detector")
        run(folder, "-O1", "-c", ROOT / "csrc" / "emulation" / "race_detector.cpp")
        return folder / "race_detector.o"

    def compile_kernel(file: str, *changes: tuple[str, str], flags: tuple[str, ...] = ()) -> Path:
        key = (file, changes, flags)
        if key not in libraries:
            folder = tmp_path_factory.mktemp("kernel")
            source = (KERNELS / file).read_text()
            for old, new in changes:
                assert source.count(old) == 1, f"{file} has {old!r} {source.count(old)} times"
                source = source.replace(old, new)
            (folder / file).write_text(source)
            run(folder, *flags, "-x", "c++", "-c", file, "-o", "kernel.o")
            linked = [race_detector()] if flags == RACES else flags
            run(folder, "-shared", "kernel.o", *linked, "-o", "kernel.so")
            libraries[key] = folder / "kernel.so"
        return libraries[key]

    return compile_kernel


def call(library: Path, function: str, *arguments: Tensor | int) -> int:
    """Call the function with the tensors' addresses; return its cudaError_t."""
    values = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x) for x in arguments]
    error: int = getattr(ctypes.CDLL(str(library)), function)(*values)
    return error


def wrong_seeds(run: Callable[[], Tensor], expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the seeds for which the result of run() differs from `expected`."""
    wrong = []
    for seed in SEEDS:
        monkeypatch.setenv("FASTSIMCLR_EMULATION_SEED", str(seed))
        if not torch.equal(run(), expected):
            wrong.append(seed)
    return wrong


def small_integers(count: int) -> Tensor:
    """Return random integers that are small, so that their sums are exact in any order."""
    return torch.randint(100, (count,), generator=torch.Generator().manual_seed(0)).float()


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


# Warp operations


def test_single_mma(build: Build) -> None:
    a, b, c = random_bf16(16, 16), random_bf16(16, 8), torch.empty(16, 8)
    assert call(build("products.cu"), "single_product", a, b, c) == 0
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("b_is_transposed", [True, False], ids=["ldmatrix", "ldmatrix_trans"])
@pytest.mark.parametrize("flags", [("-O2",), (), ("-DFASTSIMCLR_EMULATION_UCONTEXT",)], ids=str)
def test_product_with_ldmatrix_and_mma(build: Build, b_is_transposed: bool, flags: tuple[str, ...]) -> None:
    a, b, c = random_bf16(64, 64), random_bf16(64, 64), torch.empty(64, 64)
    assert call(build("products.cu", flags=flags), "product", a, b, c, int(b_is_transposed)) == 0
    torch.testing.assert_close(c, a.float() @ (b.T if b_is_transposed else b).float(), rtol=1e-6, atol=1e-4)


def test_speed_of_mma(build: Build) -> None:
    out = torch.empty(128)
    start = time.process_time()
    assert call(build("products.cu", flags=("-O2",)), "repeated_product", out, 1000) == 0
    assert (out == 16000).all()
    assert time.process_time() - start < 1, "it takes 6 ms: 1.4 µs for each product of a warp"


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_shuffles(build: Build, threads: int) -> None:
    x, out = torch.arange(threads).float(), torch.empty(5, threads)
    assert call(build("exchange.cu"), "shuffles", x, out, threads) == 0
    thread = torch.arange(threads)
    lane, first = thread % 32, thread // 32 * 32
    assert torch.equal(out[0], x[first + (lane ^ 5)])
    assert torch.equal(out[1], x[torch.where(lane + 3 < 32, thread + 3, thread)]), "the last lanes keep their own"
    assert torch.equal(out[2], x[first + thread * 7 % 32])
    assert torch.equal(out[3], (thread ^ 1).float()), "of int"
    assert torch.equal(out[4], x[first + 31]), "of uint32_t"


def test_conversions(build: Build) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    from_bf16, from_half = bits.view(torch.bfloat16).float(), bits.view(torch.float16).float()
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.0, 65520.0, 3.4e38, 1e-45, -126.5, -125.9])
    random = 200 * torch.randn(2**16 - len(edges), generator=torch.Generator().manual_seed(0))
    # All bf16 numbers, and those halfway between two of them, where ties round to even.
    halfway = (torch.arange(2**16, dtype=torch.int64) * 2**16 + 2**15).to(torch.uint32).view(torch.float32)
    x = torch.cat([from_bf16, halfway, from_half, edges, random])
    to_bf16, to_half = torch.empty_like(x, dtype=torch.uint16), torch.empty_like(x, dtype=torch.uint16)
    packed = torch.empty(len(x), 2, dtype=torch.uint16)
    exp2, out_bf16, out_half = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    arguments = (x, to_bf16, to_half, packed, exp2, out_bf16, out_half, len(x) // 128)
    assert call(build("numbers.cu"), "numbers", *arguments) == 0

    def assert_same(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    assert_same(to_bf16.view(torch.bfloat16), x.to(torch.bfloat16))
    assert_same(to_half.view(torch.float16), x.to(torch.float16))
    assert_same(packed[:, 0], to_bf16)
    assert_same(packed[:, 1].view(torch.bfloat16), (-x).to(torch.bfloat16))
    assert_same(out_bf16[: 2**16], from_bf16)
    assert_same(out_half[: 2**16], from_half)
    expected = torch.exp2(x.double()).float()
    expected[expected < torch.finfo(torch.float32).tiny] = 0
    normal = expected.isfinite() & (expected > 0)
    assert_same(exp2[~normal], expected[~normal])
    whole = normal & (x == x.trunc())
    assert_same(exp2[whole], expected[whole])
    exact, rest = torch.exp2(x[normal & ~whole].double()), exp2[normal & ~whole].double()
    ulp = torch.exp2(torch.maximum(exact, rest).log2().floor()) * torch.finfo(torch.float32).eps
    errors = (rest - exact) / ulp
    assert errors.min() < -1.9
    assert errors.max() > 1.9
    assert errors.abs().max() < 2.6, "2 units in the last place, plus the error of the host's exp2"
    again = torch.empty_like(exp2)
    arguments = (x, to_bf16, to_half, packed, again, out_bf16, out_half, len(x) // 128)
    assert call(build("numbers.cu"), "numbers", *arguments) == 0
    assert_same(again, exp2)


# Correct kernels give the same results with every seed; races are detected


def reverse(library: Path, error: int = 0) -> Tensor:
    x, out = torch.arange(3 * 128).float(), torch.empty(3 * 128)
    assert call(library, "reverse", x, out, 3, 128, 512) == error
    return out


REVERSED = torch.arange(3 * 128).float().view(3, 128).flip(1).flatten()
PREFIX_SUMS = small_integers(128).view(4, 32).cumsum(1).flatten()


def prefix_sum(library: Path, error: int = 0) -> Tensor:
    out = torch.empty(128)
    assert call(library, "prefix_sum", small_integers(128), out, 128) == error
    return out


def stream(library: Path, error: int = 0, *, function: str = "stream", count: int = 20 * 512 + 12) -> Tensor:
    out = torch.empty(512)
    assert call(library, function, small_integers(count), count, out) == error
    return out


STREAMED = torch.nn.functional.pad(small_integers(20 * 512 + 12), (0, 500)).view(21, 512).sum(0)
GROUPED = small_integers(1024)[:512].flip(0) + 1000 * small_integers(1024)[512:].flip(0)


def grouped(library: Path, error: int = 0) -> Tensor:
    return stream(library, error, function="groups", count=1024)


def total(library: Path, error: int = 0) -> Tensor:
    out = torch.zeros(1)
    assert call(library, "total", small_integers(7 * 96), out, 7, 96) == error
    return out


TOTAL = small_integers(7 * 96).sum(0, keepdim=True)
A, B = random_bf16(64, 64), random_bf16(64, 64)


def product(library: Path, error: int = 0) -> Tensor:
    c = torch.empty(64, 64)
    assert call(library, "product", A, B, c, 1) == error
    return c


@pytest.mark.parametrize(
    ("file", "run", "expected"),
    [
        ("exchange.cu", reverse, REVERSED),
        ("exchange.cu", prefix_sum, PREFIX_SUMS),
        ("stream.cu", stream, STREAMED),
        ("stream.cu", grouped, GROUPED),
        ("exchange.cu", total, TOTAL),
    ],
)
def test_correct_kernels_are_right_with_every_seed(
    build: Build, file: str, run: Callable[[Path], Tensor], expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong_seeds(lambda: run(build(file, flags=("-O2",))), expected, monkeypatch) == []


@pytest.mark.parametrize(
    ("file", "run"),
    [
        ("exchange.cu", reverse),
        ("exchange.cu", prefix_sum),
        ("exchange.cu", total),
        ("stream.cu", stream),
        ("stream.cu", grouped),
        ("products.cu", product),
    ],
)
def test_correct_kernels_have_no_race(build: Build, file: str, run: Callable[[Path], Tensor], capfd: Printed) -> None:
    assert run(build(file, flags=RACES)).isfinite().all()
    assert capfd.readouterr().err == ""


TILE_BARRIER = "__syncthreads();  // the tile is there, and all are done with the one before\n"


@pytest.mark.parametrize(
    ("file", "run", "change", "message"),
    [
        pytest.param(
            "exchange.cu", reverse, ("__syncthreads();  // all are written", ""), "shared memory", id="barrier"
        ),
        pytest.param(
            "exchange.cu", prefix_sum, ("__syncwarp();  // written by all", ""), "shared memory", id="write, __syncwarp"
        ),
        pytest.param(
            "exchange.cu", prefix_sum, ("__syncwarp();  // read by all", ""), "shared memory", id="read, __syncwarp"
        ),
        pytest.param(
            "exchange.cu",
            prefix_sum,
            ("__syncwarp();  // read by all", "__shfl_sync(~0u, sum, 0);"),
            "shared memory",
            id="a shuffle is no fence",
        ),
        pytest.param(
            "exchange.cu",
            reverse,
            ("p.out[begin + thread] = shared", "p.out[0] = 1; p.out[begin + thread] = shared"),
            "global memory: write",
            id="the same value from all threads",
        ),
        pytest.param(
            "exchange.cu",
            reverse,
            ("p.out[begin + thread] = shared", "p.out[thread] = shared"),
            r"global memory: write .* not ordered after the write .* by thread (\d+) of block \([012], 0, 0\)",
            id="two blocks write the same elements",
        ),
        pytest.param(
            "exchange.cu",
            total,
            ("atomicAdd(p.out, p.in[blockIdx.x * blockDim.x + threadIdx.x]);", "*p.out += p.in[threadIdx.x];"),
            "global memory: read",
            id="addition that is not atomic",
        ),
        pytest.param(
            "exchange.cu",
            total,
            ("{ atomicAdd", "{ if (threadIdx.x + blockIdx.x == 0) *p.out = 0; atomicAdd"),
            "global memory: (atomic .* after the write|write .* after the atomic)",
            id="a write among atomics",
        ),
        pytest.param("stream.cu", stream, (TILE_BARRIER, "\n"), "shared memory", id="barrier of a pipeline"),
        pytest.param(
            "stream.cu",
            stream,
            ("cp_async_wait<0>();\n    " + TILE_BARRIER, TILE_BARRIER + "cp_async_wait<0>();\n"),
            "shared memory, .*: read .* after the cp.async in flight",
            id="wait after the barrier",
        ),
        pytest.param(
            "stream.cu",
            grouped,
            ("  cp_async_wait<1>();\n", ""),
            "shared memory, .*: read .* after the cp.async in flight",
            id="no wait",
        ),
        pytest.param(
            "stream.cu",
            grouped,
            ("  cp_async_wait<1>();\n", "  p.out[i] = buffers[i];\n  cp_async_wait<1>();\n"),
            "thread (\\d+): data race .* read .* after the cp.async in flight .* by thread \\1 ",
            id="a thread's own copy before its wait",
        ),
        pytest.param(
            "stream.cu",
            stream,
            (
                TILE_BARRIER + "    if (begin + kTile < p.count) fetch(begin + kTile);\n",
                "if (begin + kTile < p.count) fetch(begin + kTile);\n    __syncthreads();\n",
            ),
            "shared memory",
            id="copy into a buffer in use",
        ),
        pytest.param(
            "products.cu",
            product,
            ("__syncthreads();  // all threads' copies are there", ""),
            "shared memory, .*(: read|after the read) at products.cu",
            id="ldmatrix",
        ),
    ],
)
def test_race_is_reported_with_any_seed(
    build: Build,
    file: str,
    run: Callable[[Path, int], Tensor],
    change: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Printed,
) -> None:
    library = build(file, change, flags=RACES)
    for seed in SEEDS:
        monkeypatch.setenv("FASTSIMCLR_EMULATION_SEED", str(seed))
        run(library, LAUNCH_FAILURE)
        printed = capfd.readouterr().err
        assert re.search(message, printed), printed
        line = rf"at {file}:\d+"
        assert re.search(rf"data race .* {line}, not ordered after .* {line} by thread \d+", printed), printed


def test_race_report_names_both_lines_and_threads(build: Build, capfd: Printed) -> None:
    """A write and a read of element 7 by the threads 5 and 120, in either order."""
    racing = build(
        "exchange.cu",
        ("__syncthreads();  // all are written", "__syncthreads(); if (thread == 5) shared[7] = 0;"),
        flags=RACES,
    )
    reverse(racing, LAUNCH_FAILURE)
    check_printed(
        capfd,
        r"thread (5: data race in shared memory, byte 28: write at exchange.cu:16, not ordered after the read at "
        r"exchange.cu:17 by thread 120|120: data race in shared memory, byte 28: read at exchange.cu:17, not ordered "
        r"after the write at exchange.cu:16 by thread 5) of block \([012], 0, 0\)",
    )


def test_threads_may_write_parts_of_a_word(build: Build) -> None:
    x, halves, words = torch.zeros(128), torch.empty(3, 128, dtype=torch.int32), torch.empty(3, 128)
    assert call(build("numbers.cu", flags=RACES), "numbers", x, *halves, *words, 1) == 0


def test_seed_determines_the_thread_order(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    racing = build("stream.cu", (TILE_BARRIER, "\n"))

    def results() -> list[bytes]:
        results = []
        for seed in SEEDS:
            monkeypatch.setenv("FASTSIMCLR_EMULATION_SEED", str(seed))
            results.append(stream(racing).numpy().tobytes())
        return results

    first = results()
    assert results() == first
    assert len(set(first)) == len(SEEDS)


def test_shared_memory_is_filled_with_nan_for_each_block(build: Build) -> None:
    unwritten = build(
        "exchange.cu", ("shared[thread] = p.in[begin + thread];", "if (blockIdx.x == 9) shared[thread] = 1;")
    )
    assert reverse(unwritten).isnan().all()


# Errors that stop a kernel


def check_printed(printed: Printed, *messages: str) -> None:
    """Assert that each message, a regular expression, was printed to stderr."""
    text = printed.readouterr().err
    for message in messages:
        assert re.search(message, text), f"{message}\nis not in\n{text}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("kSize + 8;", "kSize + 9;", r"cp_async_16, products.cu:\d+: the target is not a mul", id="target"),
        pytest.param("p.a + row", "p.a + 4 + row", r"cp_async_16, products.cu:\d+: the source is not a", id="source"),
        pytest.param("+ n + lane", "+ n + 4 + lane", r"ldmatrix_x4_trans, products.cu:\d+: a row's address", id="row"),
        pytest.param("kSize + 8;", "kSize;", r"ldmatrix_x4, products.cu:\d+: bank conflict: .* matrix 0", id="banks"),
        pytest.param("(k + lane", "(64 + k + lane", r"ldmatrix_x4_trans, .*: .* in shared memory", id="outside"),
    ],
)
def test_invalid_addresses_are_reported(build: Build, old: str, new: str, message: str, capfd: Printed) -> None:
    a, b, c = random_bf16(65, 64), random_bf16(64, 64), torch.empty(64, 64)
    assert call(build("products.cu", (old, new)), "product", a, b, c, 0) == LAUNCH_FAILURE
    check_printed(capfd, message)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        pytest.param(
            "if (thread >= 64) __syncthreads();",
            ["threads wait at different barriers", r"at __syncthreads, barriers.cu:13: 64-\d+|at __syncthreads.*: \d+"],
            id="barrier in half of the warps",
        ),
        pytest.param(
            "if (lane < 16) __syncthreads();",
            ["the other lanes of warp 0 will never arrive|lanes of a warp are at different", ": 0-15"],
            id="barrier in half of a warp",
        ),
        pytest.param(
            "if (lane % 2) __syncwarp();",
            ["lanes of a warp are at different operations", r"at __syncwarp, barriers.cu:13", "at __shfl_xor_sync"],
            id="warp barrier in half of the lanes",
        ),
        pytest.param(
            "if (lane == 3) return;",
            [
                "the other lanes of warp 0 will never arrive",
                r"have exited: 3(\n| )",
                "at __shfl_xor_sync, .*: 0-2 4-31",
            ],
            id="shuffle without one lane",
        ),
        pytest.param(
            "x = __shfl_xor_sync(1u, x, 1);",
            [r"__shfl_xor_sync, barriers.cu:13: only whole warps"],
            id="partial mask",
        ),
    ],
)
def test_deadlock_is_an_error(build: Build, change: str, messages: list[str], capfd: Printed) -> None:
    stuck = build("barriers.cu", ("if (thread >= 64) x += 1;  // here", change))
    assert call(stuck, "barriers", torch.empty(128), 128, 0, 1) == LAUNCH_FAILURE
    check_printed(capfd, *messages)


def test_library_works_after_a_deadlock(build: Build, capfd: Printed) -> None:
    library = build("barriers.cu", ("if (thread >= 64) x += 1;  // here", "if (thread >= 64) __syncthreads();"))
    out = torch.empty(128)
    for _ in range(2):
        assert call(library, "barriers", out, 128, 0, 1) == LAUNCH_FAILURE
        check_printed(capfd, "threads wait at different barriers")
        assert call(library, "last_error") == LAUNCH_FAILURE
        assert call(library, "last_error") == 0, "reading the error clears it"
        assert call(library, "barriers", out, 64, 0, 1) == 0
        assert torch.equal(out[:64], (torch.arange(64) % 32 + (torch.arange(64) ^ 1)).float())


def test_barrier_does_not_wait_for_exited_threads(build: Build) -> None:
    library = build("barriers.cu", ("if (thread >= 64) x += 1;  // here", "if (thread >= 64) return;"))
    out = torch.full((128,), -1.0)
    assert call(library, "barriers", out, 128, 0, 1) == 0
    assert (out[64:] == -1).all()
    assert (out[:64] >= 0).all()


def test_copy_without_wait_is_an_error(build: Build, capfd: Printed) -> None:
    last_wait = ("  cp_async_wait<0>();\n  __syncthreads();  // and", "  __syncthreads();  // and")
    x, out = small_integers(1024), torch.empty(512)
    assert call(build("stream.cu", last_wait), "groups", x, 1024, out) == LAUNCH_FAILURE
    check_printed(capfd, r"exits without waiting for 1 of its asynchronous copies; the first is at stream.cu:\d+")
    not_committed = ("true);\n    cp_async_commit();", "true);")
    assert call(build("stream.cu", not_committed), "groups", x, 1024, out) == LAUNCH_FAILURE
    check_printed(capfd, "exits without waiting for 2 of its asynchronous copies")


def test_invalid_launch_configurations(build: Build, capfd: Printed) -> None:
    library, out = build("barriers.cu"), torch.empty(1024)
    for threads, shared_bytes, blocks in [(0, 0, 1), (1056, 0, 1), (128, 101377, 1), (128, 0, 0), (128, 0, -1)]:
        assert call(library, "barriers", out, threads, shared_bytes, blocks) == INVALID_VALUE
    assert capfd.readouterr().err == ""
    assert call(library, "barriers", out, 1024, 101376, 1) == 0
    assert call(library, "barriers", out, 100, 0, 1) == INVALID_VALUE, "valid on a GPU, but not in the emulation"
    check_printed(capfd, "100 threads are not a multiple of a warp")


# AddressSanitizer: in a separate process, because the sanitizer must be preloaded


def run_sanitized(library: Path, function: str, in_count: int, out_count: int, *arguments: int | str) -> str:
    """Call function(*arguments) with float arrays for "in" and "out"; return what was printed."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(name) for name in libraries):
        pytest.skip("g++ has no libasan.so or libubsan.so")
    code = (
        "import ctypes, sys; library, function, in_count, out_count, *arguments = sys.argv[1:];"
        "arrays = {'in': (ctypes.c_float * int(in_count))(), 'out': (ctypes.c_float * int(out_count))()};"
        "arguments = [arrays[x] if x in arrays else int(x) for x in arguments];"
        "print('returned', getattr(ctypes.CDLL(library), function)(*arguments))"
    )
    command = [sys.executable, "-c", code, library, function, in_count, out_count, *arguments]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


COUNT = 3 * 512 + 12
STREAM_ARGUMENTS = (COUNT, 512, "in", COUNT, "out")


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        pytest.param("stream.cu", ("stream", *STREAM_ARGUMENTS), id="stream"),
        pytest.param("exchange.cu", ("reverse", 384, 384, "in", "out", 3, 128, 512), id="reverse"),
        pytest.param("exchange.cu", ("prefix_sum", 1024, 1024, "in", "out", 1024), id="prefix_sum"),
        pytest.param("products.cu", ("product", 2048, 4096, "in", "in", "out", 0), id="product"),
    ],
)
def test_correct_kernels_pass_the_sanitizers(build: Build, file: str, arguments: tuple) -> None:
    assert run_sanitized(build(file, flags=SANITIZERS), *arguments) == "returned 0\n"


def test_out_of_bounds_read_is_reported(build: Build) -> None:
    library = build("stream.cu", ("valid = i < p.count;", "valid = true;"), flags=SANITIZERS)
    printed = run_sanitized(library, "stream", *STREAM_ARGUMENTS)
    assert "AddressSanitizer: heap-buffer-overflow" in printed
    assert re.search(r"#\d+ .*stream.cu:\d+", printed), "the kernel's line"


def test_shared_memory_overrun_is_reported(build: Build) -> None:
    printed = run_sanitized(build("exchange.cu", flags=SANITIZERS), "reverse", 384, 384, "in", "out", 3, 128, 508)
    assert "AddressSanitizer: heap-buffer-overflow" in printed
    assert "0 bytes to the right of 508-byte region" in printed or "0 bytes after 508-byte region" in printed


def test_misaligned_access_is_reported(build: Build) -> None:
    library = build(
        "exchange.cu",
        ("shared[thread] = p.in[begin + thread];", "*reinterpret_cast<float2*>(shared + thread) = {0, 0};"),
        flags=SANITIZERS,
    )
    printed = run_sanitized(library, "reverse", 384, 384, "in", "out", 3, 128, 516)
    assert re.search(r"exchange.cu:\d+:\d+: runtime error: .*misaligned address", printed)


def test_deadlock_is_an_error_under_the_sanitizers(build: Build) -> None:
    library = build(
        "barriers.cu", ("if (thread >= 64) x += 1;  // here", "if (lane < 16) __syncthreads();"), flags=SANITIZERS
    )
    printed = run_sanitized(library, "barriers", 1, 128, "out", 128, 0, 3)
    assert f"returned {LAUNCH_FAILURE}\n" in printed
    assert "Sanitizer" not in printed
