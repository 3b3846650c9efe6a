"""The emulation finds what it is there to find: the kernels pass the sanitizers, and faults planted in them show."""

from pathlib import Path

import kernel_variants
import pytest

pytestmark = pytest.mark.skipif(kernel_variants.COMPILER is None, reason="needs g++ (or CXX)")


def test_kernels_pass_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    library = kernel_variants.build(tmp_path, sanitize=True)
    outcome = kernel_variants.check(library, sanitize=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_a_read_past_the_rows_is_reported_by_the_address_sanitizer(tmp_path: Path) -> None:
    fault = ("tile.cuh", "const bool valid = r < rows_left &&", "const bool valid = r <= rows_left &&")
    library = kernel_variants.build(tmp_path, fault=fault, sanitize=True)
    outcome = kernel_variants.check(library, "loss", one_shape=True, sanitize=True)
    assert outcome.returncode == kernel_variants.SANITIZER_EXIT_CODE, outcome.stdout + outcome.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in outcome.stderr


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(("tile.cuh", "    __syncthreads();\n    stage_", "    stage_"), id="no barrier"),
        pytest.param(("tile.cuh", "    cp_async_wait<0>();\n", ""), id="no wait for the copies"),
        pytest.param(
            ("forward.cu", "      __syncthreads();  // all", "      // all"), id="no barrier before column sums"
        ),
        pytest.param(("tile.cuh", "diagonal == self ||", ""), id="a row is its own negative"),
        pytest.param(("tile.cuh", "(diagonal == up && row < half)", "false"), id="a positive is a negative"),
        pytest.param(("tile.cuh", "column >= columns ||", ""), id="columns past the edge count"),
    ],
)
def test_a_fault_planted_in_the_loss_is_caught(tmp_path: Path, fault: tuple[str, str, str]) -> None:
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, fault=fault), "loss", one_shape=True)
    assert outcome.returncode == 1
    assert "wrong: seed" in outcome.stdout or "nt_xent_forward failed: cudaErrorLaunchFailure" in outcome.stderr


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(("photometric.cu", "  __syncthreads();  // the warps' sums", "  // sums"), id="no barrier: luma"),
        pytest.param(("photometric.cu", "  __syncthreads();  // the tile and", "  // the tile and"), id="tile"),
        pytest.param(("photometric.cu", "    __syncthreads();  // all rows", "    // all rows"), id="rows"),
        pytest.param(("photometric.cu", "    __syncthreads();  // the blurred", "    // the blurred"), id="blurred"),
        pytest.param(("crop.cu", "  __syncthreads();  // the rows", "  // the rows"), id="no barrier: crop"),
    ],
)
def test_a_fault_planted_in_the_views_is_caught(tmp_path: Path, fault: tuple[str, str, str]) -> None:
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, fault=fault), "views")
    assert outcome.returncode == 1
    assert "wrong: seed" in outcome.stdout or "failed: cudaErrorLaunchFailure" in outcome.stderr


def test_a_read_before_the_crops_is_reported_by_the_address_sanitizer(tmp_path: Path) -> None:
    fault = ("photometric.cu", "y = y < 0 ? 0 : y;", "")
    outcome = kernel_variants.check(kernel_variants.build(tmp_path, fault=fault, sanitize=True), "views", sanitize=True)
    assert outcome.returncode == kernel_variants.SANITIZER_EXIT_CODE, outcome.stdout + outcome.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in outcome.stderr
