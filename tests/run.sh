#!/usr/bin/env bash
# Lint, types, tests. Arguments go to pytest (for instance -k deepcache, -m cuda).
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
diffgraft_setup test

ruff check .
mypy core/diffgraft
# one worker a core, one thread each: tiny tensors do not profit from more; neighbouring tests share references, so workers get stretches
OMP_NUM_THREADS=1 python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal "$@"
