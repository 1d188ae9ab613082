#!/usr/bin/env bash
# The GPU measurements that `make gpu` takes: every model's train step against OpenCLIP's, in 8 minutes at most.
# PYTHON names the interpreter; OPEN_CLIP_PATH a checkout of OpenCLIP to compare with instead of the installed one.
# Arguments go to benchmarks.train_step_all: --arms all, --full-length, --only MODEL, --dry-run.
set -uo pipefail
cd "$(dirname "$0")/.."

checkout=()
if [ -n "${OPEN_CLIP_PATH:-}" ]; then
    checkout=(--open-clip-path "$OPEN_CLIP_PATH")
fi
exec "${PYTHON:-python3}" -m benchmarks.train_step_all "${checkout[@]}" "$@"
