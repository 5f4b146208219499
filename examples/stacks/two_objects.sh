#!/usr/bin/env bash
# Attention kept apart by gradients, and cached features in the calls between: the gradients go past the cache.
# Arguments go to `diffgraft compare`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
diffgraft_setup run

diffgraft compare emoji-sd --steps 20 --plugins a_star,deepcache --always a_star --out out/two_objects --repeats 3 \
  -o a_star.alpha=5 -o deepcache.interval=2 \
  --prompt "a donut at the top and a lion at the bottom on a green background" \
  --prompt "a star at the top and a dog face at the bottom on a yellow background" \
  --prompt "a heart on the left and a crown on the right on a purple background" \
  --prompt "a whale on the left and a carrot on the right on a yellow background" "$@"
