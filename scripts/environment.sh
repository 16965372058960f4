# shellcheck shell=bash
# Finds a Python and builds the virtual environment; sourced by the other scripts, in bash.
#
#   ensure_environment ""            genemodel alone
#   ensure_environment "bench,dev"   genemodel[bench,dev]
#
# Sets environment_python. The environment is <repository>/.venv, or $GENEMODEL_VENV; the Python that
# makes it is the first that works, or $GENEMODEL_PYTHON. What was installed is written down last, so
# an interrupted set-up is recognised and done again from the start.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 2
}

# A name on the PATH proves nothing (a version manager may refuse to run it), so each one is run.
python_works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${GENEMODEL_PYTHON:-}" ]; then
        python_works "$GENEMODEL_PYTHON" ||
            die "GENEMODEL_PYTHON=$GENEMODEL_PYTHON does not run as Python >= 3.12 with venv"
        printf '%s\n' "$GENEMODEL_PYTHON"
        return
    fi
    local candidate
    # 3.12 first: the exact versions of constraints.txt were resolved on it.
    for candidate in python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python \
        /usr/local/bin/python3.1[2-9] /opt/homebrew/bin/python3.1[2-9]; do
        if python_works "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    die "no Python >= 3.12 with venv and pip was found (tried python3.12, python3.13, python3.14," \
        "python3, python and the versions of pyenv). Install one (on Debian or Ubuntu also" \
        "its package python3-venv), or name one: GENEMODEL_PYTHON=/path/to/python $0"
}

# What the environment depends on. A changed file, Python or place means installing again.
fingerprint() {
    {
        cat "$repository/pyproject.toml" "$repository/constraints.txt"
        "$environment_python" -c 'import sys; print(sys.version)'
        printf '%s\n' "$repository"
    } | "$environment_python" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

environment_works() {
    python_works "$environment_python" && "$environment_python" -m pip --version >/dev/null 2>&1
}

make_environment() {
    local python
    python="$(find_python)" || exit 2
    say "Making a virtual environment in $environment with $("$python" --version) ($python)"
    rm -rf "$environment"
    mkdir -p "$environment" || die "cannot make $environment; set GENEMODEL_VENV to a folder of yours"
    : >"$environment/made-by-genemodel"
    : >"$environment/unfinished"
    "$python" -m venv "$environment" ||
        die "$python could not make a virtual environment in $environment (see above)"
}

ensure_environment() {
    local extras="$1" installed print stamp
    environment="${GENEMODEL_VENV:-$repository/.venv}"
    case "$environment" in /*) ;; *) environment="$PWD/$environment" ;; esac
    environment_python="$environment/bin/python"

    if [ ! -e "$environment" ] || [ -z "$(ls -A "$environment" 2>/dev/null)" ]; then
        make_environment
    elif [ -e "$environment/made-by-genemodel" ]; then
        if [ -e "$environment/unfinished" ] || ! environment_works; then
            say "The environment in $environment is incomplete or broken; making it again"
            make_environment
        fi
    elif ! environment_works; then
        die "$environment exists, was not made by these scripts and is no working environment with" \
            "Python >= 3.12 and pip. Move it away, or set GENEMODEL_VENV to another folder"
    fi

    print="$(fingerprint)"
    # An environment with extras serves whoever asks for none.
    for stamp in "$environment"/genemodel-installed"${extras:+-$extras}"*; do
        if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$print" ]; then
            return
        fi
    done

    installed="$repository${extras:+[$extras]}"
    say "Installing genemodel${extras:+[$extras]} at the versions of constraints.txt" \
        "(once; some minutes, about 6 GB)"
    [ ! -e "$environment/made-by-genemodel" ] || : >"$environment/unfinished"
    rm -f "$environment"/genemodel-installed*
    local quiet=()
    [ -t 2 ] || quiet=(--quiet)
    "$environment_python" -m pip install "${quiet[@]}" --disable-pip-version-check \
        --constraint "$repository/constraints.txt" --editable "$installed" >&2 ||
        die "pip could not install genemodel (see above). Without a network, point pip to a" \
            "folder of wheels with PIP_FIND_LINKS and run this again"
    printf '%s\n' "$print" >"$environment/genemodel-installed${extras:+-$extras}"
    rm -f "$environment/unfinished"
    say "Set-up done"
}
