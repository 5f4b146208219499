#!/usr/bin/env bash
# Real pictures from the bundled checkpoint, without and with plugins, side by side: out/compare.png and the figures beside it.
# Arguments go to `diffgraft compare` (for instance --device cuda, --steps 20).
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
diffgraft_setup run

diffgraft compare emoji-sd --plugins deepcache,time_shift --out out "$@"
echo "The pictures are in $PWD/out/compare.png, the figures in $PWD/out/compare.json"
