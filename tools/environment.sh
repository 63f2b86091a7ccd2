# Sourced from the repository root by tests/run.sh and examples/quickstart.sh: makes .venv, installs what is missing and
# activates it. Quick when nothing is missing: a stamp in .venv holds the checksum of the files that say what to install.
# PYTHON names the interpreter to make .venv with (default: python3).

fail() {
    echo "$1" >&2
    exit 2
}

environment_checksum() {
    cat setup.py constraints.txt pyproject.toml tools/environment.sh | cksum
}

environment_install() {
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || fail "$python was not found: install Python 3.11 or name an interpreter with PYTHON=..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: Python 3.11 or newer is needed, and PYTHON=... can name one"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # also what an interrupted attempt left
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make virtual environments: on Debian and Ubuntu, apt-get install python3-venv"
        echo "Making .venv"
        "$python" -m venv --clear .venv || fail "$python -m venv .venv failed"
    fi
    echo "Installing into .venv: about a minute and 1.6 GB with the CPU build of torch"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # torch first: whatever asks for a torch later finds the pinned one. lmms-eval without all that it asks for: extra test has what
    # running a task takes, and its torchvision from PyPI would break the CPU build of torch.
    .venv/bin/python -m pip install --constraint constraints.txt torch &&
        .venv/bin/python -m pip install --constraint constraints.txt --editable ".[test,examples]" &&
        .venv/bin/python -m pip install --constraint constraints.txt --no-deps lmms-eval ||
        fail "Installation into .venv failed: pip's last lines say why; the same command tries again"
    environment_checksum >.venv/installed
}

if [ "$(cat .venv/installed 2>/dev/null)" != "$(environment_checksum)" ]; then
    environment_install
fi
source .venv/bin/activate
