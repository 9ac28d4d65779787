#!/usr/bin/env bash
# What only a CUDA device can show, the most valuable first (not yet run on a GPU). A failure does
# not stop the rest. All results of a call go into one tar file. PYTHON=... chooses the interpreter;
# it needs the packages of '.[test]' and '.[experiments]'. Call 2 uses the model of call 1.
#     bash experiments/gpu.sh 1 call1.tar  # 7 minutes: tests; the demo
#     bash experiments/gpu.sh 2 call2.tar  # 5 minutes: one step and whole texts at 124M
#     bash experiments/gpu.sh 3 call3.tar  # 9 minutes: 1.5B; a larger model, calibrated
set -uo pipefail
CALL=${1:?which call, 1 2 or 3} TAR=$(realpath -m "${2:?the tar file to write}")
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=$(mktemp -d)
MINUTES=(0 7 5 9)
END=$((SECONDS + 60 * ${MINUTES[$CALL]:-0}))
LATENCY="--parts latency --blocks 1 4 8 16"
export PYTHONUNBUFFERED=1

# try NAME SECONDS COMMAND...: run it for at most SECONDS; keep its output and what it measured
try() {
    local left=$((END - SECONDS)) start=$SECONDS
    ((left > 0)) ||
        { echo "== $1: left out, the call's time is over" | tee -a "$OUT/calls.log"; return; }
    timeout -k 5 $((left < $2 ? left : $2)) "${@:3}" 2>&1 | tee "$OUT/$1.log"
    echo "== $1: status ${PIPESTATUS[0]}, $((SECONDS - start)) s" | tee -a "$OUT/calls.log"
    tar -C "$OUT" -cf "$TAR" .  # what is there, in case that the call is cut short
}
# bench NAME SECONDS OPTIONS...
bench() {
    try "$1" "$2" "$PY" experiments/bench_decode.py --device cuda --dtype bfloat16 \
        --out "$OUT/$1.json" "${@:3}"
}

"$PY" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || {
    echo "gpu.sh: error: $PY has no PyTorch with a CUDA device; PYTHON=... chooses another" >&2
    exit 2
}
case $CALL in
1)  try versions 30 "$PY" -c "import platform, torch, triton
print(platform.python_version(), torch.__version__, triton.__version__,
      torch.cuda.get_device_name(), torch.backends.cudnn.version())"
    try tests 180 "$PY" -m pytest -m cuda -rs tests/test_decode.py tests/test_marginalize.py
    try demo_corpus 60 "$PY" data/prepare.py python
    try demo_train 100 "$PY" train.py --data data/python --out runs/demo --offsets 1,2,3,4,5,7 \
        --n-layer 4 --n-head 2 --n-embd 96 --steps 1200 --lr 1e-2 --device cuda
    for dtype in bfloat16 float32; do
        try demo_cuda_$dtype 150 "$PY" decode.py runs/demo --device cuda --dtype $dtype \
            --methods 1,2,3,4 1,3,5,7 --out "$OUT/demo_cuda_$dtype.json"
    done ;;
2)  bench bench_cuda_124M 100 --sizes 124M $LATENCY
    bench bench_cuda_124M_texts 160 --sizes 124M --parts generate
    try rounding 60 "$PY" experiments/rounding.py runs/demo --device cuda --dtype bfloat16
    bench bench_cuda_124M_cudnn 100 --sizes 124M $LATENCY --attention cudnn ;;
3)  bench bench_cuda_1.5B 200 --sizes 1.5B $LATENCY
    try corpus 60 "$PY" data/prepare.py python
    try train 150 "$PY" train.py --data data/python --out runs/gpu --offsets 1,2,3,4,5,7 \
        --n-layer 6 --n-head 6 --n-embd 384 --steps 3000 --device cuda
    try calibrate 120 "$PY" experiments/calibrate.py runs/gpu --device cuda --dtype bfloat16
    cp runs/gpu/tree.json "$OUT/tree_cuda_bfloat16.json"
    try decode 100 "$PY" decode.py runs/gpu --device cuda --dtype bfloat16 \
        --out "$OUT/decode_cuda_bfloat16.json"
    try bench_train 120 "$PY" experiments/bench_train.py --device cuda \
        --out "$OUT/bench_train_cuda.json"
    try bench_marginalize 120 "$PY" experiments/bench_marginalize.py --run runs/gpu \
        --device cuda --out "$OUT/bench_marginalize_cuda.json" ;;
*)  echo "gpu.sh: error: the call is 1, 2 or 3, not $CALL" >&2; exit 2 ;;
esac
tar -C "$OUT" -cf "$TAR" .
cat "$OUT/calls.log"
