#!/bin/bash
# Trains on all GPUs of one node under SLURM. Submit it from the folder that contains .venv:
#
#     sbatch slurm_one_node.sh
#
# If the job ends before the run does, submit it again. The run then continues.

# ---- Settings. Options of sbatch, such as --time=1:00:00 before the script's name, replace these.
#SBATCH --job-name=fastgn
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96            # 12 per GPU, because the images are decoded by CPU cores
#SBATCH --time=48:00:00
#SBATCH --output=%x-%j.log
environment=.venv                     # the Python environment that has fastgn
processes=${SLURM_GPUS_ON_NODE:-8}    # one per GPU
flags=(--recipe swin_b_gradnorm --data-dir imagenet --output runs/robust)
# ---- End of the settings.

(($# == 0)) || flags=("$@")           # arguments after the script's name replace the flags
source "$environment/bin/activate"

# If a rank dies, torchrun starts all ranks again, at most three times. The run then continues from
# its last checkpoint.
exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 \
    -m fastgn.train "${flags[@]}" --resume auto
