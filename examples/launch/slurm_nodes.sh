#!/bin/bash
# Trains on several nodes under SLURM, with one torchrun per node. The run's folder, the data and
# .venv must be on a file system that all nodes share. Submit it from the folder that contains .venv:
#
#     sbatch slurm_nodes.sh
#
# If the job ends before the run does, submit it again. The run then continues.

# ---- Settings. Options of sbatch, such as --nodes=4 before the script's name, replace these.
#SBATCH --job-name=fastgn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1           # one torchrun, which starts one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96            # 12 per GPU, because the images are decoded by CPU cores
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
environment=.venv                     # the Python environment that has fastgn
processes=${SLURM_GPUS_ON_NODE:-8}    # one per GPU of a node
flags=(--recipe swin_b_gradnorm --data-dir imagenet --output runs/robust)
# ---- End of the settings.

(($# == 0)) || flags=("$@")           # arguments after the script's name replace the flags
source "$environment/bin/activate"

# The torchruns meet on the first node. The port depends on the job, so that two jobs can share a
# node.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# If a rank dies, torchrun starts all ranks again, at most three times. The run then continues from
# its last checkpoint.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:$port" \
    -m fastgn.train "${flags[@]}" --resume auto
