# Sourced by demo.sh and test.sh: makes the virtual environment and installs adamerge into it.
# Needs Python 3.11 or newer and pip's package index; ADAMERGE_VENV names another folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="$(realpath -m "${ADAMERGE_VENV:-.venv}")"
EXTRAS="$1"; shift   # then: more arguments of pip install

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "adamerge needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python3.11" >&2
  exit 5
}

[ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
STAMP="$VENV/.installed-$(cat pyproject.toml <(echo "$EXTRAS" "$@") | cksum | cut -d' ' -f1)"
if [ ! -e "$STAMP" ]; then
  echo "Installing adamerge[$EXTRAS] into $VENV (torch is large: a minute or more) ..."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$EXTRAS]" "$@"
  touch "$STAMP"
fi
export PATH="$VENV/bin:$PATH"
