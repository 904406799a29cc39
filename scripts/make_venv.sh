#!/usr/bin/env bash
# Makes the virtual environment at $1 with the first Python >= 3.11 that can make one.
set -euo pipefail
venv=$1

if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  exit 0
fi

usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
candidates=${PYTHON:-python3.11 python3.12 python3.13 python3 python}
for python in $candidates; do
  if "$python" -c "$usable" >/dev/null 2>&1; then
    echo "making $venv with $("$python" --version 2>&1) ($(command -v "$python"))"
    exec "$python" -m venv --clear "$venv"
  fi
done

cat >&2 <<MESSAGE
No Python >= 3.11 with the venv module was found (tried: $candidates).
Install one (Debian and Ubuntu: apt install python3.11 python3.11-venv), or name it: make install PYTHON=/path/to/python3.11
MESSAGE
exit 1
