#!/bin/bash
# Trains on one or more nodes under SLURM for longer than the time limit of one job. The run's
# folder, the data and .venv must be on a file system that all nodes share. Submit it once, from the
# folder that contains .venv:
#
#     sbatch slurm_requeue.sh
#
# Five minutes before the time limit, SLURM sends SIGUSR1 to this script. The script asks the ranks
# to save a checkpoint and end, and puts the job back into the queue. SLURM also puts the job back
# if a node fails or if a more urgent job needs the nodes.

# ---- Settings. Options of sbatch, such as --nodes=4 before the script's name, replace these.
#SBATCH --job-name=fastgn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8           # one rank per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12            # per rank, because the images are decoded by CPU cores
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300           # seconds before the limit; B means to this script alone
#SBATCH --requeue
#SBATCH --open-mode=append            # the log also keeps what the job said before
#SBATCH --output=%x-%j.log
environment=.venv                     # the Python environment that has fastgn
flags=(--recipe swin_b_gradnorm --data-dir imagenet --output runs/robust)
# ---- End of the settings.

(($# == 0)) || flags=("$@")           # arguments after the script's name replace the flags
source "$environment/bin/activate"

# srun starts the ranks itself, without torchrun. They find each other through rank 0, which is on
# the first node. If a rank dies, the others notice and end. The port depends on the job, so that two
# jobs can share a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

# scancel sends SIGTERM to all ranks, and to the processes that they have started.
limit_is_near=no
trap 'limit_is_near=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# The single quotes keep the variables until each rank has its own.
# shellcheck disable=SC2016
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python -m fastgn.train "$@"' rank "${flags[@]}" --resume auto &

wait "$!"                             # returns when the ranks end, or when SIGUSR1 comes
status=$?
if [ "$limit_is_near" = yes ]; then
    wait "$!"                         # the ranks are saving
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
