#!/bin/bash
# A run on four machines of eight GPUs: sbatch examples/slurm.sh DATASET RUN, both in folders that all machines see.
# Submitted again, or requeued after a machine was lost, it goes on from the newest checkpoint.
#SBATCH --job-name=sparsegate
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

# Without it, processes that torchrun starts again do not meet.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The signal above comes five minutes before the end; so long may the last checkpoint take.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m sparsegate train moe-4096-h --data "$1" --out "$2" --training.device cuda --resume
