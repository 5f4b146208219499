# Sourced by examples/run.sh and tests/run.sh: one virtual environment with everything of this checkout in it, editable.
# Uses the active virtual environment, or makes .venv here. A second call with unchanged pyproject files skips the set-up.
#   diffgraft_setup run    what a user needs
#   diffgraft_setup test   and what the tests need
# Names of folders behind the kind: these plugins only.
diffgraft_setup() {
  local kind=$1 stamp sum folder plugins=("${@:2}")
  [ ${#plugins[@]} -gt 0 ] || plugins=(plugins/*/)
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -f .venv/bin/activate ] || python3 -m venv .venv  # written last: a venv that was interrupted is made again
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  sum=$(cat pyproject.toml core/pyproject.toml pipelines/*/pyproject.toml plugins/*/pyproject.toml examples/setup.sh docs/requirements.txt tests/requirements.txt | cksum)
  stamp="$VIRTUAL_ENV/.diffgraft-$kind${2:+-some}"
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum $PWD ${*:2}" ] && return 0

  echo "Setting up $VIRTUAL_ENV (a few minutes the first time)"
  local pip=(python -m pip --disable-pip-version-check install --quiet)
  # torch first and alone: a range given by another package would bring a newer build with gigabytes of CUDA libraries
  python -c "import torch" 2>/dev/null || "${pip[@]}" "torch==2.13.0"
  "${pip[@]}" "flit_core>=3.11,<4" "hatchling>=1.25" "editables>=0.5"
  # the glob is the list: a new folder in plugins/ needs no entry anywhere
  local packages=(-e .) extras=(-e "./core[lab]")  # `compare` is among what the examples show
  for folder in core pipelines/*/ "${plugins[@]}"; do packages+=(-e "./${folder%/}"); done
  # first all of them, then what the tests need: pip looks on the index for a package that it knows with an extra only
  "${pip[@]}" --no-build-isolation "${packages[@]}"
  if [ "$kind" = test ]; then
    extras=(-r docs/requirements.txt -r tests/requirements.txt)
    for folder in core pipelines/*/ "${plugins[@]}"; do extras+=(-e "./${folder%/}[test]"); done
    diffgraft_debian chromium fonts-noto-color-emoji
  fi
  "${pip[@]}" --no-build-isolation "${extras[@]}"
  echo "$sum $PWD ${*:2}" >"$stamp"
}

# Debian packages that some tests need (a browser for the pages, the artwork of the bundled checkpoints), where they can be installed.
diffgraft_debian() {
  local missing=() package sudo=()
  command -v apt-get >/dev/null || return 0
  for package in "$@"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
  [ ${#missing[@]} -eq 0 ] && return 0
  [ "$(id -u)" = 0 ] || sudo=(sudo -n)
  if "${sudo[@]}" apt-get update -qq && "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null; then
    return 0
  fi
  echo "Not installed: ${missing[*]}; the tests that need them will skip themselves" >&2
}
