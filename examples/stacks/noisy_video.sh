#!/usr/bin/env bash
# A cache for transformers under sampling with noise: the cache answers with old residuals, the noise washes out what they got wrong.
# Arguments go to `diffgraft compare`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
diffgraft_setup run

out=out/noisy_video
mkdir -p "$out"
[ -f "$out/ertacache.safetensors" ] || diffgraft calibrate ertacache --pipeline emoji-wan --out "$out/ertacache.safetensors" \
  --prompt "a big apple moves up on a blue background" --prompt "a small heart moves to the left on a red background" \
  --prompt "a big star stays still on a green background" --prompt "a small car moves to the right on a gray background"
diffgraft compare emoji-wan --plugins interpolant_sde,ertacache --out "$out" --repeats 3 \
  -o ertacache.artefact="$out/ertacache.safetensors" -o ertacache.rectify=false -o interpolant_sde.eta=0.7 "$@"
