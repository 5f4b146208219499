#!/usr/bin/env bash
# diffgraft beside everything a user could pick instead: out/benchmarks/report.html, the raw rows beside it.
#   bash examples/benchmarks/run.sh --quick             about 18 minutes on two cores, once it is set up
#   bash examples/benchmarks/run.sh                     everything, about 80 minutes; a second call goes on where the first was interrupted
#   bash examples/benchmarks/run.sh --device cuda --full --dtype bfloat16
# Other packages are installed into environments of their own below out/benchmarks/envs.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
diffgraft_setup run
python -c "import diffgraft_bench, jinja2" 2>/dev/null || python -m pip --disable-pip-version-check install --quiet --no-build-isolation -e "examples/benchmarks[test]"

# glibc gives memory back to the system after every call otherwise, which costs CPU runs up to half of their time, for all sides alike
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
python -m diffgraft_bench run "$@"
