#!/usr/bin/env bash
# Lint, types, floors, tests: at most 25 minutes on 2 cores, whatever the number of plugins (tests/sampling.py says how).
#   bash tests/run.sh                all of the core, what changed of plugins and families, a sample of the rest
#   bash tests/run.sh --thorough     everything (hours with many plugins)
#   bash tests/run.sh ARGUMENTS...   exactly what the arguments to pytest say (-k deepcache, plugins/deepcache, -m cuda)
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
diffgraft_setup test

ruff check .
mypy core/diffgraft
lint-imports --no-cache

if [ "${1:-}" = --thorough ]; then
  shift
elif [ $# -eq 0 ]; then
  # what changed: since the branch left origin/main, or else in the last day's commits; and what is not committed
  base=$(git merge-base HEAD origin/main 2>/dev/null || true)
  [ -n "$base" ] && [ "$base" != "$(git rev-parse HEAD)" ] || base=$(git rev-list -1 --before="24 hours ago" HEAD 2>/dev/null || true)
  changed=$({ git diff --name-only "${base:-HEAD}" -- plugins pipelines/families; git ls-files --others --exclude-standard plugins pipelines/families; } 2>/dev/null |
    sed -nE 's|^plugins/([^/]+)/.*|\1|p; s|^pipelines/families/.*/([a-z0-9_]+)\.py$|\1|p' | sort -u | paste -sd, -)
  set -- --sample "$(git rev-parse --short HEAD 2>/dev/null || echo 0)" --changed "$changed"
fi
unset PYTHONDONTWRITEBYTECODE  # tests start many interpreters, which find the code compiled
# one worker a core, one thread each: tiny tensors do not profit from more; neighbouring tests share references, so workers get stretches
OMP_NUM_THREADS=1 python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal --durations=20 "$@"
