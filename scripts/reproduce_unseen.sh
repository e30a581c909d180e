#!/usr/bin/env bash
# AdaMerging's tables of unseen tasks: six tasks are merged, two more are evaluated. Arguments go to `adamerge bench run`.
set -euo pipefail
METHODS="${METHODS:-zero_shot,individual,fisher,regmean,regmean_pp,task_arithmetic,ties,fusion_bench_layer_wise,wemoe}"
for benchmark in clip8-unseen1 clip8-unseen2; do
  adamerge bench run "$benchmark" --methods "$METHODS" --out "runs/$benchmark" "$@"
done
