#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: builds, tests and measures the fused loss and the views there, without a
# network.
#   scripts/gpu_check.sh OUT_DIR [STAGE...]
# Without a STAGE those that take eight minutes in all: build doctor tests memcheck racecheck view_kernels nt_xent. Only
# by name: encoder training (fifteen more; they need nvidia-dali, and lightly to have a rival).
# OUT_DIR gets log.txt, summary.json, gpu_tests.xml (JUnit) and what the benchmarks write (view_kernels.json,
# nt_xent.json, encoder.json, train.json), for `python -m benchmarks.report`. Exit code 0: all went well; 1: some stage
# failed (the later ones ran nevertheless); 2: there is no GPU here, or a mistake in the call.
#
# PYTHON            the Python with torch, pybind11, cmake, ninja, setuptools, pytest and pytest-benchmark (python3)
# GPU_CHECK_COMMIT  what to record where there is no git checkout
# BUILD_SECONDS, TEST_SECONDS, SANITIZER_SECONDS (each tool), BENCH_SECONDS (nt_xent), ENCODER_SECONDS,
# TRAINING_SECONDS: the stages' limits
# BENCH_M, BENCH_D  the benchmark's sizes; without them, those of the targets and then what fits into the time
set -uo pipefail

known=" build doctor tests memcheck racecheck view_kernels nt_xent encoder training "
usage() {
  echo "usage: $0 OUT_DIR [STAGE...]; stages:$known" >&2
  exit 2
}
if [ $# -eq 0 ]; then usage; fi
folder=$1
shift
for name in "$@"; do [[ $known == *" $name "* ]] || usage; done
wanted=" ${*:-build doctor tests memcheck racecheck view_kernels nt_xent} "
python=${PYTHON:-python3}
if ! why=$("$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' 2>&1); then
  echo "$0: there is no GPU to check: $(tail -n 1 <<<"$why")" >&2
  exit 2
fi
mkdir -p "$folder" || exit 2
out=$(cd "$folder" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

commit=${GPU_CHECK_COMMIT:-$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}
device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
device=${device:-$("$python" -c 'import torch; print(torch.cuda.get_device_name())')}
export BENCH_COMMIT=$commit PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 PIP_ROOT_USER_ACTION=ignore
for tools in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda; do PATH=$PATH:$tools/bin; done

stage() {  # stage NAME SECONDS COMMAND...: 77 is its exit code where it can't be done here, which is no failure
  local name=$1 limit=$2 start=$SECONDS code outcome
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  printf '\n=== %s (at most %d s)\n' "$name" "$limit"
  # INT first: pytest then still writes what it has.
  timeout --signal=INT --kill-after=5 "$limit" "$@" </dev/null
  code=$?
  case $code in
    0) outcome=ok ;;
    77) outcome="not done here" ;;
    124 | 137) outcome="over its time limit" ;;
    *) outcome="failed ($code)" ;;
  esac
  if [ "$code" -ne 0 ] && [ "$code" -ne 77 ]; then failed=1; fi
  summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$outcome")")
  stages+=("{\"name\": \"$name\", \"seconds\": $((SECONDS - start)), \"exit_code\": $code, \"outcome\": \"$outcome\"}")
}

build() {  # the package's own way; and the one by hand of CMakeLists.txt, where cmake or ninja are no Python packages
  export FASTSIMCLR_CUDA=1
  if ! "$python" -m pip install -e . --no-build-isolation --no-deps -v; then
    echo "--- pip could not build it; by hand, with the cmake of PATH"
    build_by_hand || return
  fi
  "$python" -c 'import torch; from fastsimclr.loss import fused; exit(fused.unavailable(torch.device("cuda")) or 0)'
}

build_by_hand() {
  local folder arch generator=()
  folder=$(mktemp -d)
  arch=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || return
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$folder" "${generator[@]}" -DPython_EXECUTABLE="$(command -v "$python")" -DFASTSIMCLR_CUDA=ON \
    -DCMAKE_CUDA_COMPILER="$(command -v nvcc)" -DCMAKE_CUDA_ARCHITECTURES="$arch" &&
    cmake --build "$folder" --parallel && cmake --install "$folder" --prefix .
}

gpu_tests() {  # only files that hold such a test: others may import what this machine lacks
  local files
  rm -f "$out/gpu_tests.xml"
  mapfile -t files < <(grep -lE 'mark\.gpu\b' tests/test_*.py)
  if [ ${#files[@]} -eq 0 ]; then
    echo "no file in tests/ has a test that is marked gpu"
    return 1
  fi
  "$python" -m pytest "${files[@]}" -m gpu --continue-on-collection-errors --junitxml="$out/gpu_tests.xml" \
    --durations=5 -p no:cacheprovider || return
  if ! grep -q '<testcase [^>]*/>' "$out/gpu_tests.xml"; then
    echo "every test was skipped: nothing was tested"
    return 1
  fi
}

sanitizer() {  # sanitizer TOOL
  local tool=$1 program report code
  if ! program=$(command -v compute-sanitizer); then
    echo "compute-sanitizer was not found in PATH, CUDA_HOME or /usr/local/cuda"
    return 77
  fi
  report=$(mktemp)
  # Each tensor an allocation of its own: in the caching allocator's blocks no access is out of bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$python" -c "$small_loss" 2>&1 | tee "$report"
  code=${PIPESTATUS[0]}
  if grep -qE 'Device not supported|Unable to find injection|not supported on this' "$report"; then
    echo "--- $tool does not work on this machine"
    return 77
  fi
  return "$code"
}
# No size a multiple of a tile's, one and two planes, one block of the width and several; the inputs are made on the CPU
# so that as few kernels as possible are not ours.
small_loss='
import torch
from fastsimclr.loss import nt_xent
torch.manual_seed(0)
for n, d in ((65, 30), (131, 128), (67, 264)):
    for precision in ("medium", "highest"):
        z1, z2 = (torch.randn(n, d).cuda().requires_grad_() for _ in range(2))
        loss = nt_xent(z1, z2, 0.1, backend="fused", precision=precision)
        loss.backward()
        assert torch.isfinite(loss).item() and torch.isfinite(z1.grad.cpu()).all(), (n, d, precision)
        print(n, d, precision, loss.item(), flush=True)
'

benchmark() {  # benchmark FILE RESULT
  rm -f "$out/$2"
  "$python" -m pytest "benchmarks/$1" --benchmark-json="$out/$2" --benchmark-columns=median,iqr,rounds -p no:cacheprovider
}

all_stages() {
  local failed=0 summary=() stages=()
  echo "fastsimclr $commit on $device"
  stage build "${BUILD_SECONDS:-90}" bash -c build
  stage doctor 20 "$python" -m fastsimclr.doctor
  stage tests "${TEST_SECONDS:-110}" bash -c gpu_tests
  stage memcheck "${SANITIZER_SECONDS:-30}" bash -c 'sanitizer memcheck'
  stage racecheck "${SANITIZER_SECONDS:-30}" bash -c 'sanitizer racecheck'
  stage view_kernels 30 bash -c 'benchmark bench_view_kernels.py view_kernels.json'
  # A size of the loss is not begun in the last quarter of the time.
  stage nt_xent "${BENCH_SECONDS:-160}" \
    bash -c "BENCH_SECONDS=$((${BENCH_SECONDS:-160} * 3 / 4)) benchmark bench_nt_xent.py nt_xent.json"
  stage encoder "${ENCODER_SECONDS:-400}" bash -c 'benchmark bench_encoder.py encoder.json'
  stage training "${TRAINING_SECONDS:-500}" bash -c 'benchmark bench_train.py train.json'

  printf '\n=== summary: fastsimclr %s on %s\n' "$commit" "$device"
  printf '%s\n' "${summary[@]}"
  for name in nt_xent train; do
    if [ -s "$out/$name.json" ]; then "$python" -c "$targets" "$out/$name.json"; fi
  done
  if [ "$failed" -ne 0 ]; then echo "FAILED"; else echo "all went well"; fi
  cat >"$out/summary.json" <<END
{"commit": "$commit", "device": "$device", "ok": $([ "$failed" -eq 0 ] && echo true || echo false),
 "stages": [$(IFS=,; echo "${stages[*]}")]}
END
  return "$failed"
}
targets='
import json, sys
for measured in json.load(open(sys.argv[1]))["benchmarks"]:
    info = measured["extra_info"]
    for verdict in info.get("targets", []):
        print(measured["name"], "target,", verdict)
'

# timeout starts programs, not functions.
export python out small_loss
export -f build build_by_hand gpu_tests sanitizer benchmark
all_stages 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
