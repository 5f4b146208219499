#!/usr/bin/env bash
# Real pictures from the bundled checkpoint, without and with plugins: out/compare.png and the figures beside it. Fifty plain steps against
# ten with a better solver (dpm_solver_v3) whose first two a model of a fifth of the compute takes (t_stitch); and against plain steps in that time.
# Arguments go to `diffgraft compare` (for instance --device cuda, --steps 20).
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
diffgraft_setup run

diffgraft compare emoji-sd --plugins t_stitch,dpm_solver_v3 -o t_stitch.model=emoji-sd-small -o t_stitch.fraction=0.2 --plugin-steps 10 --out out "$@"
echo "The pictures are in $PWD/out/compare.png, the figures in $PWD/out/compare.json"
