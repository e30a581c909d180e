#!/usr/bin/env bash
# From a fresh clone: make an environment, install, and run every check. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" demo --group dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # tests are many small problems: threads only wait for each other
ruff check .
ruff format --check .
basedpyright
lint-imports --no-cache
pytest -n 2 --dist loadfile --no-loadscope-reorder --cov=adamerge --cov-report=term --cov-fail-under=90 "$@"
