#!/usr/bin/env bash
# One run on several nodes (docs/tpu.md). One task a GPU: JAX gives each task the GPU of its number on the node.
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 experiments/cluster/slurm.sh \
#       ppo_summarize --config=ppo_summarize:gpt2 --config.mesh.fsdp=4 --workdir=/shared/runs/demo
#
# The workdir is on a file system that all nodes share. Two minutes before the time limit, all processes save and stop,
# and the job is queued again; the same workdir goes on.
#SBATCH --job-name=rlhf
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail

[ $# -gt 0 ] || { echo "slurm.sh: expected a command of rlhf-jax and its flags, got none" >&2; exit 2; }
: "${PYTHON:=python}"

# The processes find each other by SLURM's variables. Their exit code is the highest of all.
srun --kill-on-bad-exit=0 "$PYTHON" -m rlhf_jax "$@"
code=$?
# 0: done. 2: bad input, 4: a number is not finite, 5: out of memory; to start again would not help.
case $code in
    0 | 2 | 4 | 5) ;;
    *) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
