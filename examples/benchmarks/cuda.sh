#!/usr/bin/env bash
# What only a GPU can tell, in one call of under 9 minutes: out/cuda/cuda.json and cuda.png.
#   bash examples/benchmarks/cuda.sh            one NVIDIA GPU of 80 GiB or more; a second call measures what the first had no time for
#   bash examples/benchmarks/cuda.sh --dry      the same on a CPU with shrunken layouts, about a minute; its figures say nothing
# A torch that is there is used. Without an index: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER of wheels. MINUTES (default 8.8) is for everything.
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh
export PIP_RETRIES="${PIP_RETRIES:-1}" PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-15}"

if [ -z "${VIRTUAL_ENV:-}" ]; then
  # an environment on top of what this machine's Python has: a CUDA build of torch is gigabytes
  [ -f out/cuda/venv/.made ] || {
    python3 -m venv out/cuda/venv || python3 -m venv --without-pip --clear out/cuda/venv  # then the pip below will do
    python3 -c 'import site, sys; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
      >"$(out/cuda/venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/base.pth"
    touch out/cuda/venv/.made
  }
  # shellcheck disable=SC1091
  . out/cuda/venv/bin/activate
fi
diffgraft_setup run plugins/{deepcache,diffusers_cache,ertacache,faster_diffusion}
python -c "import jinja2" 2>/dev/null || python -m pip --disable-pip-version-check install --quiet "jinja2>=3.1,<4"
export PYTHONPATH="$PWD/examples/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
python -m diffgraft_bench cuda --seconds "$(python -c "print(max(0, ${MINUTES:-8.8} * 60 - $SECONDS))")" "$@"
