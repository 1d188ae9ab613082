#!/usr/bin/env bash
# The GPU measurements that `make gpu` takes: every model's train step against OpenCLIP's, in 8 minutes at most.
# PYTHON names the interpreter; OPEN_CLIP_PATH a checkout of OpenCLIP to compare with instead of the installed one.
# Arguments go to benchmarks.train_step_all: --arms all, --full-length, --only MODEL, --dry-run. With --arms all the steps
# with their loaders are measured as well, against OpenCLIP as it is and tuned: some minutes more.
set -uo pipefail
cd "$(dirname "$0")/.."

checkout=()
if [ -n "${OPEN_CLIP_PATH:-}" ]; then
    checkout=(--open-clip-path "$OPEN_CLIP_PATH")
fi
code=0
"${PYTHON:-python3}" -m benchmarks.train_step_all "${checkout[@]}" "$@" || code=$?
case " $* " in
*" --dry-run "*) ;;
*" --arms all "*)
    for tuned in "" --tune-open-clip; do
        "${PYTHON:-python3}" -m benchmarks.end_to_end --device cuda --model ViT-B-32-256 --batch-size 896 \
            --precision amp_bf16 --torchcompile $tuned "${checkout[@]}" || code=$?
    done
    "${PYTHON:-python3}" -m benchmarks.end_to_end --write-page || code=$?
    "${PYTHON:-python3}" -m benchmarks.train_step_report || code=$?
    ;;
esac
exit "$code"
