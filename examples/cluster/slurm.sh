#!/bin/bash
# A search on whole nodes of a Slurm cluster. In a folder that every node sees, which holds venv/: sbatch slurm.sh
# EDIT the nodes, what each of them has, and what else your site asks for, such as a partition or an account:
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
# One Ray on each node, which has the node to itself (ray symmetric-run wants that):
#SBATCH --job-name=laser
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
# After preemption or the loss of a node the job is queued again, and the same command goes on where it was.
# Several jobs of this name run one after another (singleton), for searches longer than the time limit.
#SBATCH --requeue
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=laser-%j.log
set -euo pipefail

# EDIT where things are: all of it on a file system that every node sees.
shared=$SLURM_SUBMIT_DIR
# shellcheck source=/dev/null
source "$shared/venv/bin/activate"
export HF_HOME=$shared/hub            # models and data sets of the hub
export LASER_CACHE=$shared/cache      # decompositions
export LASER_STORE=$shared/runs.db    # results; or a PostgreSQL URL

# EDIT the model and the task. One worker for each GPU; the search itself needs none.
gpus=${SLURM_GPUS_PER_NODE##*:}       # of a node, whether asked for as 4 or as a100:4
search=(
  laser search Qwen/Qwen2.5-7B-Instruct --task worldfacts
  --device cpu --executor ray
  --workers "$((SLURM_JOB_NUM_NODES * gpus))"
  --gpus-per-worker 1
  --cpus-per-worker "$((SLURM_CPUS_PER_TASK / gpus))"
)

# This script runs on the first node, which becomes the head. If the others cannot reach its first address, EDIT it.
read -r host _ < <(hostname -I)
head=$host:6379

# A secret of this job: without one, whoever reaches the head's port could run code as you.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Seconds that the nodes wait for each other: starting from a slow file system takes a while.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 RAY_py_gcs_connect_timeout_s=600

# Starts Ray on every node, waits for all of them, runs the search on the head alone and stops Ray. What the search
# prints is in laser-JOB.0.log; the other nodes see a minute after its end that the head is gone, and say so at length.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --output=laser-%j.%t.log --open-mode=append \
  ray symmetric-run --address "$head" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$gpus" --disable-usage-stats \
  -- "${search[@]}" --address "$head"
