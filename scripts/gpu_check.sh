#!/usr/bin/env bash
# Build, test and measure fastsimclr on a machine with an NVIDIA GPU: scripts/gpu_check.sh OUT_DIR [STAGE...]
# What it does is described in gpu_check.py. PYTHON names the Python to use (python3).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
