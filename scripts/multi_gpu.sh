#!/usr/bin/env bash
# One adaptation on several GPUs of one machine: the tasks are split over them, and only the coefficients' gradient
# (tasks x layers) is summed. `adamerge bench run` writes TABLE/benchmark.yaml and lets the experts pass the gate first.
#   scripts/multi_gpu.sh runs/clip8/ViT-L-14 fusion_bench_layer_wise --trainer.devices 4
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: $0 TABLE METHOD [OPTIONS OF adamerge fit]" >&2; exit 2; fi
table="$1"; method="$2"; shift 2
adamerge fit --config "$table/benchmark.yaml" --config "configs/methods/$method.yaml" --run_dir "$table/multi_gpu/$method" \
  --trainer.accelerator gpu --trainer.devices 8 --trainer.strategy ddp --evaluate_experts false "$@"
exec adamerge table "$table" "$table/multi_gpu/$method"
