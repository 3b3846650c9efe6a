"""BENCH_SMALL=1: every benchmark at sizes that only show that it runs, in seconds. Its figures mean nothing."""

import os

SMALL = os.environ.get("BENCH_SMALL") == "1"
