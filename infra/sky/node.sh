#!/bin/sh
# A node of a SkyPilot cluster: the ranks of a module, by torchrun. SkyPilot runs this on every node and says which it is.
# WAV_LAUNCHER='sky exec wav --num-nodes 2 sh infra/sky/node.sh'
exec python -m torch.distributed.run --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" \
    --nproc-per-node "${SKYPILOT_NUM_GPUS_PER_NODE:-1}" --master-addr "${SKYPILOT_NODE_IPS%%[!0-9a-f.:]*}" \
    --master-port 29500 -m "$@"
