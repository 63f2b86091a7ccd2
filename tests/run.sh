#!/usr/bin/env bash
# Lint and tests: bash tests/run.sh [arguments for pytest]. The slow ones apart: bash tests/run.sh -m slow. Makes .venv and installs what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
# A real SLURM and network namespaces, for the tests of launching: without them these tests are skipped and say so.
absent=()
for tool in slurmctld slurmd sbatch ip; do
    PATH="/usr/sbin:$PATH" command -v "$tool" >/dev/null || absent+=("$tool")
done
if [ "${#absent[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing slurmctld, slurmd, slurm-client and iproute2: about ten seconds"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurmctld slurmd slurm-client iproute2; } >/dev/null 2>&1 || echo "They could not be installed; their tests are skipped"
fi
ruff check .
ruff format --check .
[ "$#" -eq 0 ] || exec python -m pytest "$@"
# Two runs side by side: the tests on several processes, which fill the cores alone, and the others (tests/conftest.py says which).
# The others in the foreground, as some of them interrupt themselves: bash has its background jobs ignore SIGINT.
several=$(mktemp)
python -m pytest -m "distributed and not slow" >"$several" 2>&1 &
status=0
python -m pytest -m "not distributed and not slow" || status=$?
wait "$!" || status=$?
cat "$several"
rm "$several"
exit "$status"
