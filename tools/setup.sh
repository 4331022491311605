#!/usr/bin/env bash
# Sets a checkout up: `tools/setup.sh run` for `make run`, `tools/setup.sh test` for everything that `make test` needs.
# It writes inside the checkout (.venv) and, for missing tools only, calls apt-get. It knows nothing of what is run afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv
readonly purpose=${1:-run}

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# Prints the first interpreter that is new enough and can make a venv with pip in it. A pyenv shim for a version that is
# not selected exits with an error here, and Debian's python3 without python3-venv has no ensurepip: both are passed over.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 /usr/bin/python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

apt_updated=
install_debian() {
    local sudo=()
    command -v apt-get >/dev/null || die "missing $*: install them by hand, this system has no apt-get"
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "missing $*: run 'apt-get install $*' as root, there is no sudo here"
        sudo=(sudo)
    fi
    if [ -z "$apt_updated" ]; then
        say "apt-get update"
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 update >/dev/null ||
            say "apt-get update failed in part; trying with the lists there are"
        apt_updated=yes
    fi
    say "apt-get install $*"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "$@" </dev/null >/dev/null || die "apt-get could not install $*"
}

# gcc -m32 is asked to link, because the compiler alone does not show whether the 32-bit libraries are there.
links_32_bit() {
    printf 'int main(void) { return 0; }\n' | gcc -m32 -x c -o /dev/null - 2>/dev/null
}

install_test_tools() {
    local missing=()
    command -v gcc >/dev/null && command -v make >/dev/null || missing+=(gcc make libc6-dev)
    links_32_bit || missing+=(gcc-multilib)
    # The PyPI gdb may come first on PATH; the tests want Debian's own as well.
    [ -x /usr/bin/gdb ] || missing+=(gdb)
    command -v lldb >/dev/null || missing+=(lldb)
    command -v qemu-system-i386 >/dev/null || missing+=(qemu-system-x86)
    [ ${#missing[@]} -eq 0 ] || install_debian "${missing[@]}"
}

install_python_packages() {
    local python extras=$1
    if [ ! -x "$venv/bin/python" ]; then
        if ! python=$(find_python); then
            install_debian python3 python3-venv
            python=$(find_python) || die "no Python 3.11 or newer with venv: set PYTHON to one"
        fi
        say "creating $venv with $("$python" --version)"
        "$python" -m venv "$venv"
    fi
    say "installing trapgate$extras into $venv (a minute or so the first time)"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --editable ".$extras" ||
        die "pip could not install trapgate$extras"
}

# The gdb from PyPI loads the shared libpython of the interpreter that the venv was made with.
check_pypi_gdb() {
    "$venv/bin/gdb" -nx --version >/dev/null 2>&1 && return
    command -v apt-get >/dev/null && install_debian libpython3.11
    "$venv/bin/gdb" -nx --version >/dev/null 2>&1 ||
        die "the gdb from PyPI does not start: remove $venv and set PYTHON to an interpreter with a shared libpython"
}

case $purpose in
    run)
        install_python_packages ""
        # A gdb is all that `make run` needs besides. Without Debian's, the one from PyPI needs no root.
        if ! command -v gdb >/dev/null; then
            install_python_packages "[gdb]"
            check_pypi_gdb
        fi
        ;;
    test)
        install_test_tools
        install_python_packages "[test]"
        check_pypi_gdb
        ;;
    fuzz)
        install_python_packages "[test,fuzz]"
        ;;
    *)
        die "unknown purpose '$purpose': run, test or fuzz"
        ;;
esac
touch "$venv/stamp-$purpose"
