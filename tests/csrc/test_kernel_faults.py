"""The kernels pass the sanitizers and the race detector in the emulation, and planted faults are detected."""

import re
from pathlib import Path

import kernel_variants
import pytest
from kernel_variants import Fault

pytestmark = [pytest.mark.slow, pytest.mark.skipif(kernel_variants.COMPILER is None, reason="needs g++ (or CXX)")]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated kernels under the address and undefined behavior sanitizers."""
    return kernel_variants.build(tmp_path_factory.mktemp("sanitized"), checker="sanitizers")


@pytest.mark.parametrize("kernels", ["all", "sizes"])
def test_kernels_pass_the_address_and_undefined_behavior_sanitizers(sanitized: Path, kernels: str) -> None:
    outcome = kernel_variants.check(sanitized, kernels, checker="sanitizers")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_cpu_code_passes_the_sanitizers_with_hostile_sizes(tmp_path: Path) -> None:
    outcome = kernel_variants.check(
        kernel_variants.build(tmp_path, "_C", checker="sanitizers"), "sizes", checker="sanitizers"
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_kernels_have_no_data_race(tmp_path: Path) -> None:
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, checker="races"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_read_past_the_rows_is_reported_by_the_address_sanitizer(tmp_path: Path) -> None:
    fault = ("tile.cuh", "const bool valid = r < rows_left &&", "const bool valid = r <= rows_left &&")
    library = kernel_variants.build(tmp_path, fault=fault, checker="sanitizers")
    outcome = kernel_variants.check(library, "loss", one_shape=True, checker="sanitizers")
    assert outcome.returncode == kernel_variants.SANITIZER_EXIT_CODE, outcome.stdout + outcome.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in outcome.stderr


def test_read_before_the_crops_is_reported_by_the_address_sanitizer(tmp_path: Path) -> None:
    fault = ("photometric.cu", "y = y < 0 ? 0 : y;", "")
    library = kernel_variants.build(tmp_path, fault=fault, checker="sanitizers")
    outcome = kernel_variants.check(library, "views", checker="sanitizers")
    assert outcome.returncode == kernel_variants.SANITIZER_EXIT_CODE, outcome.stdout + outcome.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in outcome.stderr


def test_write_past_the_crop_is_reported_by_the_address_sanitizer(tmp_path: Path) -> None:
    fault = ("crop.cpp", "for (int64_t x = 0; x < pitch; x++) to[x] =", "for (int64_t x = 0; x <= pitch; x++) to[x] =")
    library = kernel_variants.build(tmp_path, "_C", fault=fault, checker="sanitizers")
    outcome = kernel_variants.check(library, "sizes", checker="sanitizers")
    assert outcome.returncode == kernel_variants.SANITIZER_EXIT_CODE, outcome.stdout + outcome.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in outcome.stderr


@pytest.mark.parametrize(
    ("fault", "memory"),
    [
        pytest.param(("tile.cuh", "    __syncthreads();\n    stage_", "    stage_"), "shared", id="step"),
        pytest.param(("tile.cuh", "    cp_async_wait<0>();\n", ""), "shared", id="no wait for the copies"),
        pytest.param(("tile.cuh", "other = stage_ ^ 1", "other = stage_"), "shared", id="copy into the wrong buffer"),
        pytest.param(("forward.cu", "    __syncthreads();  // all threads are done", "//"), "shared", id="row blocks"),
        pytest.param(("forward.cu", "      __syncthreads();  // all warps'", "//"), "shared", id="column sums"),
        pytest.param(
            ("forward.cu", "row_sums = p.sums + int64_t(blockIdx.y)", "row_sums = p.sums + 0"), "global", id="slot"
        ),
        pytest.param(("backward.cu", "p.sums + int64_t(blockIdx.z) *", "p.sums + 0 *"), "global", id="one split"),
        pytest.param(("backward.cu", "    stage ^= 1;\n", ""), "shared", id="one buffer of column weights"),
        pytest.param(("photometric.cu", "  __syncthreads();  // the warps' sums", "//"), "shared", id="luma"),
        pytest.param(("photometric.cu", "  __syncthreads();  // the tile and the weights", "//"), "shared", id="tile"),
        pytest.param(("photometric.cu", "    __syncthreads();  // all rows", "//"), "shared", id="rows"),
        pytest.param(("photometric.cu", "    __syncthreads();  // the blurred", "//"), "shared", id="blurred"),
        pytest.param(("crop.cu", "  __syncthreads();  // the rows that", "//"), "shared", id="crop"),
    ],
)
def test_planted_data_race_is_reported_with_the_first_seed(tmp_path: Path, fault: Fault, memory: str) -> None:
    library = kernel_variants.build(tmp_path, fault=fault, checker="races")
    is_view_kernel = fault[0] in kernel_variants.VIEWS
    kernels = "views" if is_view_kernel else "loss"
    outcome = kernel_variants.check(library, kernels, one_shape=not is_view_kernel, checker="races")
    assert outcome.returncode == 1, outcome.stdout + outcome.stderr
    assert "failed: cudaErrorLaunchFailure" in outcome.stderr
    assert re.search(rf"data race in {memory} memory.* at \S+:\d+, not ordered .*\(seed 1\)", outcome.stderr)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(("tile.cuh", "diagonal == self ||", ""), id="self-pair is a negative"),
        pytest.param(("tile.cuh", "(diagonal == up && row < half)", "false"), id="positive is a negative"),
        pytest.param(("tile.cuh", "column >= columns ||", ""), id="columns past the edge are negatives"),
        # On a CPU, equal exponentials cancel exactly; exp2f and ex2.approx of a GPU round differently.
        pytest.param(
            (
                "forward.cu",
                "      products.exclude(",
                """
                const TileProducts<S> all = products;
                const TileMask<S> mask(p.pairs, p.rows.count, p.columns.count, row0, column0);
                for (int e = 0; kExpFits && e < S::kRowTiles * S::kColumnTiles * 4; e++) {
                  const int i = e / 4 / S::kColumnTiles, j = e / 4 % S::kColumnTiles, lane = threadIdx.x % 32;
                  const float x = all.value[i][j][e % 4] * scale_log2;
                  if (mask.covers(warp * S::kRowsPerWarp + 16 * i + lane / 4 + 8 * (e % 4 / 2),
                                  8 * j + 2 * (lane % 4) + e % 2))
                    rows.sum[i][e % 4 / 2] += exp2_approx(x) - exp2f(x);
                }
                products.exclude(""",
            ),
            id="an exponential is subtracted with a different rounding",
        ),
    ],
)
def test_planted_fault_in_the_loss_gives_wrong_results(tmp_path: Path, fault: Fault) -> None:
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, fault=fault), "loss", one_shape=True)
    assert outcome.returncode == 1
    assert "wrong: seed" in outcome.stdout


def test_wrong_swizzle_is_reported_as_a_bank_conflict(tmp_path: Path) -> None:
    fault = ("tile.cuh", "(2 * k16 + a_chunk) ^ (a_row % 8)", "(2 * k16 + a_chunk) ^ (a_row % 4)")
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, fault=fault), "loss", one_shape=True)
    assert outcome.returncode == 1
    assert re.search(r"ldmatrix_x4, \S*tile.cuh:\d+: bank conflict", outcome.stderr)
