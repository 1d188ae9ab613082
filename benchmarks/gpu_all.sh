#!/usr/bin/env bash
# The GPU measurements that `make gpu` takes, largest differences first; each has its own limit, together under 6.5 minutes.
# PYTHON names the interpreter; OPEN_CLIP_PATH a checkout of OpenCLIP to compare with instead of the installed one.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
limit_s=130
failed=0
checkout=()
if [ -n "${OPEN_CLIP_PATH:-}" ]; then
    checkout=(--open-clip-path "$OPEN_CLIP_PATH")
fi

measure() {
    echo "== train_step $*"
    timeout "$limit_s" "$python" -m benchmarks.train_step --device cuda "${checkout[@]}" "$@"
    local code=$?
    if [ "$code" -ne 0 ]; then
        echo "== failed with exit code $code (124 is the limit of $limit_s s): train_step $*" >&2
        failed=1
    fi
}

measure --model ViT-B-32 --batch-size 896 --precision amp_bf16 --blocks 5 --block-steps 10 --warmup-steps 10 --batches 4
measure --model ViT-L-14 --batch-size 256 --precision amp_bf16 --blocks 4 --block-steps 5 --warmup-steps 6 --batches 2
measure --model convnext_base_w --batch-size 256 --precision amp_bf16 --blocks 4 --block-steps 5 --warmup-steps 6 --batches 2
exit "$failed"
