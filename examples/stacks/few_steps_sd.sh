#!/usr/bin/env bash
# A solver that knows the model's statistics, and a small model in the first step, where only the layout is decided.
# Arguments go to `diffgraft compare`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
diffgraft_setup run

out=out/few_steps_sd
mkdir -p "$out"
[ -f "$out/statistics.safetensors" ] || diffgraft calibrate dpm_solver_v3 --pipeline emoji-sd --steps 25 --out "$out/statistics.safetensors" \
  --prompts plugins/dpm_solver_v3/benchmarks/prompts.txt -o dpm_solver_v3.intervals=50 -a num_images_per_prompt=8
diffgraft compare emoji-sd --steps 5 --reference-steps 200 --num-prompts 48 --repeats 15 --plugins t_stitch,dpm_solver_v3 --out "$out" \
  -o t_stitch.model=emoji-sd-small -o t_stitch.fraction=0.2 \
  -o dpm_solver_v3.artefact="$out/statistics.safetensors" -o dpm_solver_v3.corrector=off "$@"
