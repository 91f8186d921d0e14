#!/bin/bash
# Trains on several hosts without a scheduler. Run the same line on every host, from the folder that
# contains .venv. The hosts may start in any order:
#
#     ./torchrun_hosts.sh
#
# Ctrl-C on one host ends the run on all of them, with a checkpoint. The same line then continues.
# The run's folder and the data must be on a file system that all hosts share.

# ---- Settings.
first_host=${FIRST_HOST:-host1:29500} # name of one of the hosts, and a port that is free on it
hosts=2
processes=${PROCESSES:-8}             # one per GPU of a host
environment=.venv                     # the Python environment that has fastgn
flags=(--recipe swin_b_gradnorm --data-dir imagenet --output runs/robust)
# ---- End of the settings.

(($# == 0)) || flags=("$@")           # arguments after the script's name replace the flags
source "$environment/bin/activate"

# If a rank dies, torchrun starts all ranks again, at most three times. The run then continues from
# its last checkpoint.
exec torchrun --nnodes "$hosts" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id fastgn --rdzv-endpoint "$first_host" \
    -m fastgn.train "${flags[@]}" --resume auto
