#!/usr/bin/env bash
# The results and figures of docs/marginalisation.md, from nothing. Trains next-token models and
# one like the demo's (about half an hour on 2 CPU cores; a stopped run is resumed), then measures
# them by size, by data and by layer.
# PYTHON=... chooses the interpreter, RESULTS=... the folder of the results.
#     bash experiments/marginalize.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
RESULTS=${RESULTS:-experiments/results}
mkdir -p "$RESULTS"

train() { # RUN DATA OFFSETS LAYERS HEADS WIDTH
    [ -d data/"$2" ] || "$PY" data/prepare.py "$2"
    if [ -f runs/"$1"/checkpoint.pt ]; then
        "$PY" train.py --resume runs/"$1"
    else
        "$PY" train.py --data data/"$2" --out runs/"$1" --offsets "$3" --n-layer "$4" \
            --n-head "$5" --n-embd "$6" --steps 3600
    fi
}
train ntp-python-1x32 python 1 1 1 32
train ntp-python-2x64 python 1 2 2 64
train ntp-python-4x96 python 1 4 2 96
train ntp-python-6x192 python 1 6 3 192
train ntp-shakespeare-4x96 shakespeare 1 4 2 96
train ntp-multi30k-4x96 multi30k 1 4 2 96
train heads-python-4x96 python 1,2,3,4,5,7 4 2 96

"$PY" experiments/layers.py runs/ntp-python-{1x32,2x64,4x96,6x192} --probe-steps 0 \
    --out "$RESULTS/marginalize_size.json"
"$PY" experiments/layers.py runs/ntp-{python,shakespeare,multi30k}-4x96 --probe-steps 0 \
    --out "$RESULTS/marginalize_data.json"
"$PY" experiments/layers.py runs/ntp-python-6x192 runs/ntp-python-4x96 runs/heads-python-4x96 \
    --probe-steps 1000 --exact-nodes 0 --out "$RESULTS/marginalize_layers.json"
