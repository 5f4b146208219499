#!/usr/bin/env bash
# The documentation as a folder of plain files that need no network and no server: out/docs/index.html. A warning is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh
diffgraft_setup run
python -c "import sphinx, furo, myst_nb, sphinx_copybutton, latex2mathml" 2>/dev/null ||
  python -m pip --disable-pip-version-check install --quiet -r docs/requirements.txt

python -m sphinx --builder html --fail-on-warning --keep-going --quiet --fresh-env --write-all "$@" docs out/docs
echo "The documentation is in $PWD/out/docs/index.html"
