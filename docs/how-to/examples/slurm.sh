#!/usr/bin/env bash
#SBATCH --job-name=expertmesh
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=08:00:00
# Runs one cluster in one allocation. The first node is Ray's head, runs the gateway and may run workers
# too. Set MODEL to a folder that every node can read, or to a hub id. The cluster ends with the job.
set -euo pipefail
MODEL=${MODEL:?folder or hub id of the checkpoint}
EXPERTS=${EXPERTS:-24}
ATTENTION=${ATTENTION:-8}

umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.expertmesh-token-$SLURM_JOB_ID
openssl rand -hex 32 > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT  # the job, and all that runs in it, ends with this script

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname --ip-address | awk '{print $1}')

# --overlap: the command below shares the first node with its `expertmesh node`.
srun --overlap --nodes=1 --ntasks=1 -w "${nodes[0]}" \
    expertmesh node --head --node-ip "$head_ip" &
for node in "${nodes[@]:1}"; do
    srun --overlap --nodes=1 --ntasks=1 -w "$node" expertmesh node --join "$head_ip" &
done

# Waits for all nodes, and returns when clients can call http://$head_ip:8000. Set keys in EXPERTMESH_API_KEYS.
tries=0
until srun --overlap --nodes=1 --ntasks=1 -w "${nodes[0]}" \
    expertmesh up "$MODEL" --address "$head_ip:6379" --wait-nodes "${#nodes[@]}" --host 0.0.0.0 \
    --num-attention-workers "$ATTENTION" --num-expert-workers "$EXPERTS" --gpus-per-worker 1; do
    ((++tries < 12)) || exit 1 # 12 failures: not only a head that is still starting
    sleep 5
done
wait
