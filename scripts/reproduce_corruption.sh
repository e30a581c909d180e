#!/usr/bin/env bash
# The table of corrupted test images: four tasks, clean and seven corruptions. As published, adaptive methods adapt on
# the corrupted test images themselves (the table says transductive). Arguments go to `adamerge bench run`.
set -euo pipefail
METHODS="${METHODS:-zero_shot,fisher,regmean,regmean_pp,task_arithmetic,ties,fusion_bench_layer_wise,wemoe}"
adamerge bench run clip4 --methods "$METHODS" --adapt_split test --out runs/clip4/clean "$@"
for corruption in motion_blur impulse_noise gaussian_noise pixelate spatter contrast jpeg_compression; do
  adamerge bench run clip4 --corruption "$corruption" --methods "$METHODS" --adapt_split test \
    --out "runs/clip4/$corruption" "$@"
done
