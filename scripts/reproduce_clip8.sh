#!/usr/bin/env bash
# The eight-task CLIP tables, beside the published rows of the same checkpoints. Arguments go to `adamerge bench run`:
#   scripts/reproduce_clip8.sh --mirror /data/hub --trainer.accelerator gpu
# As published, one adapts on the test images: add --adapt_split test (the table then says transductive).
set -euo pipefail
METHODS="${METHODS:-zero_shot,individual,average,fisher,regmean,regmean_pp,task_arithmetic,ties,pcb,consensus,lines,tsv,iso_c,\
iso_cts,wudi,official_task_wise,official_pp_task_wise,official_layer_wise,official_pp_layer_wise,fusion_bench_task_wise,\
fusion_bench_layer_wise,adamerging_layer_wise_kl,reliable_layer_wise,twin_merging,wemoe,e_wemoe,smile,hard_top_1,oracle,emr}"
for backbone in ${BACKBONES:-ViT-B-32 ViT-B-16 ViT-L-14}; do
  adamerge bench run clip8 --backbone "$backbone" --methods "$METHODS" --out "runs/clip8/$backbone" "$@"
done
