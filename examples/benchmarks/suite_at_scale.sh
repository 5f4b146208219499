#!/usr/bin/env bash
# Does the suite stay within its 25 minutes when plugins are added? Puts N generated plugins (default 60, hook points in turn) into a scratch
# copy of this checkout and times the default suite there:   bash examples/benchmarks/suite_at_scale.sh [N]
# The generated plugins are skeletons without a paper, so what asks a plugin of this repository to be finished is left out for them.
set -euo pipefail
cd "$(dirname "$0")/../.."
count=${1:-60}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q . "$work/diffgraft"
cd "$work/diffgraft"
unset VIRTUAL_ENV
. examples/setup.sh
diffgraft_setup test

hooks=(denoise block guide step schedule attention run scheduler modules control)
for i in $(seq "$count"); do
  name="generated_$i"
  diffgraft new "$name" --hook "${hooks[$((i % ${#hooks[@]}))]}" --arxiv none --title "Generated $i" --out "plugins/$name" >/dev/null
done
python .ci/published.py >/dev/null  # what a plugin of this repository shows on an index
diffgraft_setup test

seed=$(git rev-parse --short HEAD)
TIMEFORMAT="$count generated plugins: the suite took %R s, with %U + %S s of CPU time"
time OMP_NUM_THREADS=1 python -m pytest -n "${PYTEST_WORKERS:-2}" --dist worksteal --durations=20 --sample "$seed" \
  -k "not (generated and (test_static_rules or test_plugin_has_a_page or test_a_readme_opens))"
