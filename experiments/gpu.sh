#!/usr/bin/env bash
# What only a CUDA device can show, the most valuable first. A failure does not stop the rest. All
# results of a part, which ends after 6 minutes, go into one tar file. PYTHON=... chooses the
# interpreter; it needs the packages of '.[test]'.
#     bash experiments/gpu.sh 1 part1.tar  # the demo's model, rounding, tests
#     bash experiments/gpu.sh 2 part2.tar  # steps of 124M and 1.5B, beside transformers
set -uo pipefail
PART=${1:?which part, 1 or 2}
TAR=$(realpath -m "${2:?the tar file to write}")
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=$(mktemp -d)
END=$((SECONDS + 350))
export PYTHONUNBUFFERED=1

try() {  # NAME SECONDS ARGUMENTS...: run Python for at most SECONDS; keep what it prints
    local left=$((END - SECONDS)) start=$SECONDS
    timeout -k 5 $((left < 1 ? 1 : left < $2 ? left : $2)) "$PY" "${@:3}" 2>&1 | tee "$OUT/$1.log"
    echo "== $1: status ${PIPESTATUS[0]}, $((SECONDS - start)) s" | tee -a "$OUT/calls.log"
    tar -C "$OUT" -cf "$TAR" .  # what is there, in case that the part is cut short
}
bench() {  # NAME SECONDS OPTIONS...
    try "$1" "$2" experiments/bench_decode.py --device cuda --dtype bfloat16 \
        --out "$OUT/$1.json" "${@:3}"
}
train() {  # RUN OPTIONS...
    try "train_$1" 80 train.py --data data/python --out "runs/$1" --offsets 1,2,3,4,5,7 \
        --n-layer 4 --n-head 2 --n-embd 96 --steps 1000 --lr 1e-2 --device cuda --overwrite "${@:2}"
}
compare() {  # RUN DTYPE
    try "decode_$1_$2" 80 decode.py "runs/$1" --device cuda --dtype "$2" --temperature 0 \
        --methods lookup 1,2,3,4 1,3,5,7 --out "$OUT/decode_$1_$2.json"
}

"$PY" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || {
    echo "gpu.sh: error: $PY has no PyTorch with a CUDA device; PYTHON=... chooses another" >&2
    exit 2
}
[ -f data/python/meta.json ] || try corpus 60 data/prepare.py python
if [ "$PART" = 1 ]; then
    train gpu --sequential
    compare gpu float32
    compare gpu bfloat16
    try rounding 60 experiments/rounding.py runs/gpu --device cuda --methods 1,3,5,7 --temperatures 0
    try tests 200 -m pytest -m cuda -rs
else
    bench bench_cuda_124M 150 --sizes 124M --methods MTP leap --batches 1 \
        --rows 4 8 16  # if these cost the same, always pad
    bench bench_cuda_1.5B 95 --sizes 1.5B --methods MTP --heads independent --batches 1
    bench bench_cuda_124M_texts 80 --sizes 124M --parts texts --methods MTP --prompts 1 --rounds 3
fi
cat "$OUT/calls.log"
