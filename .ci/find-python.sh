#!/bin/sh
# Prints the first Python on PATH that can run expertmesh: 3.11 or newer, able to make a
# virtual environment. Otherwise one line on stderr says what is missing, and it exits with 1.
usable=
reason='no Python was found: install Python 3.11 or newer (with venv)'
for name in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    command -v "$name" >/dev/null 2>&1 || continue
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        reason="$name is Python $version: Python 3.11 or newer is needed"
    elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
        reason="$name cannot make virtual environments: install its venv and ensurepip modules"
        reason="$reason (on Debian and Ubuntu: apt install python$version-venv)"
        [ -n "$usable" ] || usable="$reason"
    else
        command -v "$name"
        exit 0
    fi
done
echo "expertmesh setup: ${usable:-$reason}" >&2
exit 1
