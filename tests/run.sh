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
# The SLURM job waits for SLURM's clocks most of its time, so it runs beside the others. Tests of one process run two at a time, each with
# one thread; those on several ranks in turn: on two cores anything beside four processes costs them more than it gains.
slurm=$(mktemp)
python -m pytest tests/test_slurm.py >"$slurm" 2>&1 &
trap 'kill "$!" 2>/dev/null || true; rm -f "$slurm"' EXIT
status=0
python -m pytest -m "not slow and not distributed" --ignore tests/test_slurm.py --numprocesses 2 --dist loadfile || status=$?
python -m pytest -m "not slow and distributed" --ignore tests/test_slurm.py || status=$?
wait "$!" || status=$?
cat "$slurm"
exit "$status"
