#!/usr/bin/env bash
# Build, test and measure fastsimclr on a machine with an NVIDIA GPU: scripts/gpu_check.sh OUT_DIR [STAGE...]
# See gpu_check.py. PYTHON selects the Python interpreter (default: python3).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
