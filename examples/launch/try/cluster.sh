#!/bin/bash
# Starts or stops a SLURM cluster of two pretended nodes on this machine, to try the scripts with.
# It needs root and `apt-get install slurm-wlm munge`. Use it only in a container or a virtual
# machine. Each node pretends to have 128 cores and 8 GPUs, so ask for few processes.
#
#     ./cluster.sh start /tmp/cluster
#     export SLURM_CONF=/tmp/cluster/slurm.conf
#     sinfo
#     ./cluster.sh stop /tmp/cluster
set -euo pipefail
action=$1 folder=$2
here=$(dirname "$(realpath "$0")")
export SLURM_CONF=$folder/slurm.conf
nodes=(127.0.0.1 127.0.0.2)  # addresses of this machine, so that names of nodes need no DNS

case $action in
start)
    mkdir -p "$folder/state"
    sed "s|FOLDER|$folder|" "$here/slurm.conf" > "$folder/slurm.conf"
    echo "Name=gpu File=$folder/gpu[0-7]" > "$folder/gres.conf"
    for gpu in {0..7}; do ln -sf /dev/null "$folder/gpu$gpu"; done
    if ! munge -n > /dev/null 2>&1; then  # the daemon that signs SLURM's messages
        install -d -o munge -m 755 /run/munge
        runuser -u munge -- munged
    fi
    slurmctld
    for node in "${nodes[@]}"; do
        mkdir -p "$folder/spool-$node"
        slurmd -N "$node"
    done
    ;;
stop)
    for file in "$folder"/*.pid; do kill "$(cat "$file")"; done
    ;;
*)
    echo "cluster.sh: the first argument must be start or stop: $action" >&2
    exit 2
    ;;
esac
