#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command that is meant to end within 10 minutes (not yet measured): the
# CUDA tests, a small model trained and compared there, and the benchmarks. PYTHON=... chooses the interpreter,
# RESULTS=... the folder of the results. The study is apart: python experiments/study.py, part by part with --only.
#     bash experiments/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
RESULTS=${RESULTS:-experiments/results}
mkdir -p "$RESULTS"

"$PY" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
"$PY" -m pytest -m cuda -rs
"$PY" data/prepare.py python
[ -f runs/gpu/checkpoint.pt ] || "$PY" train.py --data data/python --out runs/gpu --offsets 1,2,3,4,5,7 \
    --n-layer 6 --n-head 6 --n-embd 384 --steps 3000 --device cuda
"$PY" decode.py runs/gpu --device cuda --calibrate --out "$RESULTS/decode_cuda_float32.json"
"$PY" decode.py runs/gpu --device cuda --dtype bfloat16 --out "$RESULTS/decode_cuda_bfloat16.json"
"$PY" experiments/bench_train.py --device cuda --out "$RESULTS/bench_train_cuda.json"
"$PY" experiments/bench_marginalize.py --run runs/gpu --device cuda --out "$RESULTS/bench_marginalize_cuda.json"
"$PY" marginalize.py runs/gpu --device cuda --max-nodes 16384 --out "$RESULTS/marginalize_cuda.json"
for size in toy 124M 1.5B; do                                               # one by one, so that each is kept
    timeout 240 "$PY" experiments/bench_decode.py --device cuda --dtype bfloat16 --sizes $size --blocks 1 4 8 16 32 \
        --run runs/gpu --out "$RESULTS/bench_cuda_$size.json" || echo "bench $size did not end"
done
