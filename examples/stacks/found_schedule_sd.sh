#!/usr/bin/env bash
# A schedule of four steps that an evolution has found, the first half of it in a small model.
# Arguments go to `diffgraft compare`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
diffgraft_setup run

diffgraft compare emoji-sd --steps 4 --reference-steps 200 --num-prompts 48 --repeats 15 --plugins t_stitch,autodiffusion \
  --out out/found_schedule_sd -o t_stitch.model=emoji-sd-small -o t_stitch.fraction=0.5 \
  -o autodiffusion.artefact=plugins/autodiffusion/benchmarks/emoji-sd-4-steps.json "$@"
