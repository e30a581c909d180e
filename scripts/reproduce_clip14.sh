#!/usr/bin/env bash
# The tables of 14 tasks (arXiv:2405.07813): as those of 20.
set -euo pipefail
BENCHMARK=clip14 "$(dirname "$0")/reproduce_clip20.sh" "$@"
