#!/usr/bin/env bash
# The tables of 20 tasks (arXiv:2405.07813), beside the published rows of the same checkpoints. Arguments go to
# `adamerge bench run`; for TALL's own checkpoints: --family tall --mirror DIR
set -euo pipefail
BENCHMARK="${BENCHMARK:-clip20}"
METHODS="${METHODS:-zero_shot,individual,average,task_arithmetic,ties,consensus,regmean,regmean_pp,tsv,iso_c,iso_cts,\
fusion_bench_layer_wise,twin_merging,smile}"
for backbone in ${BACKBONES:-ViT-B-32 ViT-B-16 ViT-L-14}; do
  adamerge bench run "$BENCHMARK" --backbone "$backbone" --methods "$METHODS" --codec bf16 --out "runs/$BENCHMARK/$backbone" "$@"
done
