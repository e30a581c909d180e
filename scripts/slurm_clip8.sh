#!/usr/bin/env bash
#SBATCH --job-name=adamerge-clip8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One table as a SLURM job: sbatch scripts/slurm_clip8.sh --mirror /data/hub
# A job that was stopped goes on where it was when it is queued again: finished rows are read, the row that was
# learning continues from its last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"   # compute nodes seldom reach the hub: fill its cache, or pass --mirror
exec srun adamerge bench run clip8 --backbone "${BACKBONE:-ViT-B-32}" --out "runs/clip8/${BACKBONE:-ViT-B-32}" \
  --methods "${METHODS:-zero_shot,individual,task_arithmetic,ties,fusion_bench_layer_wise}" \
  --trainer.accelerator gpu "$@"
