#!/usr/bin/env bash
# The README's figures about marginalisation, from nothing: trains the next-token models (about half an hour on 2 CPU
# cores; a run that was stopped is resumed), then measures them by size, by data and layer by layer.
# PYTHON=... chooses the interpreter, RESULTS=... the folder of the results.
#     bash experiments/marginalize.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
RESULTS=${RESULTS:-experiments/results}
mkdir -p "$RESULTS"

train() {                                                                   # data, layers, heads, width
    [ -d data/"$1" ] || "$PY" data/prepare.py "$1"
    if [ -f runs/ntp-"$1-$2x$4"/checkpoint.pt ]; then "$PY" train.py --resume runs/ntp-"$1-$2x$4"; else
        "$PY" train.py --data data/"$1" --out runs/ntp-"$1-$2x$4" --offsets 1 --steps 3600 \
            --n-layer "$2" --n-head "$3" --n-embd "$4"
    fi
}
train python 1 1 32
train python 2 2 64
train python 4 2 96
train python 6 3 192
train shakespeare 4 2 96
train multi30k 4 2 96

"$PY" marginalize.py runs/ntp-python-{1x32,2x64,4x96,6x192} --out "$RESULTS/marginalize_size.json"
"$PY" marginalize.py runs/ntp-{python,shakespeare,multi30k}-4x96 --out "$RESULTS/marginalize_data.json"
"$PY" marginalize.py runs/ntp-python-6x192 --layers --probe-steps 1000 --out "$RESULTS/marginalize_layers.json"
[ ! -f runs/demo/checkpoint.pt ] || "$PY" marginalize.py runs/demo --layers --out "$RESULTS/marginalize_demo.json"
