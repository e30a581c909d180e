#!/usr/bin/env bash
# From a fresh clone: make an environment, install, and run `adamerge demo` (arguments are passed on).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" demo
exec adamerge demo "$@"
