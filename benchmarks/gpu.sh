#!/usr/bin/env bash
# make gpu: on a machine with a GPU, builds with CUDA, runs the GPU tests and the benchmarks, in under eight minutes.
#
#   PYTHON   an interpreter with a CUDA build of torch (nothing is installed)      default: python3
#   OUT      where the results and the log go                                      default: benchmarks/results
#
# Each step has a time limit of its own, and a failing one does not keep the next from running; the exit status says
# whether all of them went well.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}

name=$("$PYTHON" - <<'PYTHON_END'
import re
import sys

try:
    import torch
except ImportError:
    sys.exit(f"make gpu: {sys.executable} has no torch; name an interpreter that has one: PYTHON=... make gpu")
if not torch.cuda.is_available():
    sys.exit(f"make gpu: torch {torch.__version__} sees no CUDA device here")
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))
PYTHON_END
) || exit 1

mkdir -p "$OUT"
log=$OUT/gpu-$name.log
: > "$log"
status=0

# step SECONDS COMMAND...: runs it, into the log and onto the screen, and remembers a failure.
step() {
  local limit=$1
  shift
  echo "== $*" | tee -a "$log"
  SECONDS=0
  timeout "$limit" "$@" 2>&1 | tee -a "$log"
  local code=${PIPESTATUS[0]}
  echo "== ${SECONDS} s, exit status $code" | tee -a "$log"
  if [ "$code" -ne 0 ]; then status=1; fi
}

# bench SECONDS OP SETTING OPTIONS...: no case starts after SECONDS.
bench() {
  local budget=$1 op=$2 setting=$3
  shift 3
  step $((budget + 15)) "$PYTHON" -m benchmarks.run "$op" --device cuda --budget "$budget" "$@" \
    --json "$OUT/gpu-$name--$op--$setting.json"
}

export DDRF_FAST_FORCE_CUDA=1
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  export TORCH_CUDA_ARCH_LIST
fi
step 120 "$PYTHON" setup.py --quiet build_ext --inplace
# Compiling Triton kernels takes most of the tests' time. With pytest-xdist there is time for all of them.
if "$PYTHON" -c 'import xdist' 2> /dev/null; then
  step 80 "$PYTHON" -m pytest -m gpu -n 8 -q tests
else
  step 80 "$PYTHON" -m pytest -m "gpu and not slow" -q tests
fi
bench 70 dynamic_conv bfloat16 --dtype bfloat16 --layout channels_last
bench 60 degrade float32
bench 25 model bfloat16 --dtype bfloat16
bench 20 dynamic_conv tf32 --dtype tf32 --quick
bench 20 degrade bfloat16 --dtype bfloat16 --quick
exit $status
