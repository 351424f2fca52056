#!/usr/bin/env bash
# Build, test, bench and train on a GPU machine without network, in eight minutes: scripts/device.sh --help
set -uo pipefail

USAGE='usage: [PYTHON=python3] [OUT=device-out] [WHEELS=folder] [DATA="files"] scripts/device.sh [--rehearse] [--stages a,b]

Runs every stage, each within its own budget of seconds; one that fails does not stop the next. Exit status 0 only if
none failed. In OUT: summary.json (rc and seconds of each stage), log.txt, operators.jsonl, step.jsonl, metrics.jsonl,
and qualified/, what the trial found.

  WHEELS      wheels that the machine lacks (cmake, ninja, tyro, backports.zstd, liger-kernel, ...), installed without network
  DATA        text for the step and the training run; nothing: documentation text found on the machine
  --rehearse  on a CPU: device cpu, toy sizes, what needs nvcc is skipped with its reason
  --stages    only these, in this order; probe (the emulator on hardware) and turing (PTX of sm_75) run by name alone'

STAGES=wheels,build,qualify,doctor,tests,bench,choose,step,train
declare -A BUDGET=([wheels]=15 [build]=75 [qualify]=65 [doctor]=20 [tests]=50 [bench]=105 [choose]=45 [step]=75 [train]=30
                   [probe]=25 [turing]=110)  # 480 s without the last two, which builds a second tree
LONGEST_LOG=$((8 << 20))

REHEARSE=0
while (($#)); do
  case $1 in
    --rehearse) REHEARSE=1 ;;
    --stages) STAGES=${2:?--stages needs names}; shift ;;
    --help | -h) echo "$USAGE"; exit 0 ;;
    *) echo "$1: unknown option"; echo "$USAGE"; exit 2 ;;
  esac
  shift
done
for stage in ${STAGES//,/ }; do
  [[ -n ${BUDGET[$stage]:-} ]] || { echo "$stage: no such stage; one of ${!BUDGET[*]}"; exit 2; }
done
cd "$(dirname "$0")/.." || exit 1
export ROOT=$PWD PYTHON=${PYTHON:-python3} OUT=${OUT:-device-out} REHEARSE DATA=${DATA:-} WHEELS=${WHEELS:-}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
WORK=$(mktemp -d) && export WORK
trap 'rm -rf "$WORK"' EXIT
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export SITE=$WORK/site PATH="$WORK/site/bin:$PATH" PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
if ((REHEARSE)); then DEVICE=cpu; else DEVICE=cuda; fi
export DEVICE

# --- the stages; exit status 77 says "skipped", with the reason as the last line printed

skip() { echo "$1"; exit 77; }
needs_gpu() { ((!REHEARSE)) || skip "rehearsal: $1"; }

wheels() {
  compgen -G "$WHEELS/*.whl" >/dev/null || skip "no wheels in WHEELS=$WHEELS"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl
}

# PTX of the lowest architecture alone takes the code path of Turing on any later card: the driver compiles it there.
turing_tree() {
  mkdir -p "$WORK/turing" || return
  cp -r cramfast tests bench conftest.py pyproject.toml "$WORK/turing" && rm -f "$WORK"/turing/cramfast/_C*
  cp -r kernels "$WORK/turing/cramfast/kernels"
  make build PYTHON="$PYTHON" BUILD="$WORK/turing-build" OUTPUT="$WORK/turing/cramfast" \
    CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=75-virtual
}

build() {
  needs_gpu "the extension is taken as it was built"
  CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
}

# What a run without flags does first on a card that it does not know: every implementation tried, and timed.
qualify() {
  needs_gpu "a CPU runs the C++ kernels untried"
  "$PYTHON" -m cramfast.doctor --device cuda --qualify --seconds 45  # the rest of the stage is the doctor's own checks
  local status=$?
  mkdir -p "$OUT/qualified" && cp "${XDG_CACHE_HOME:-$HOME/.cache}"/cramfast/qualified/*.json "$OUT/qualified"
  return $status
}

doctor() {
  if ((REHEARSE)); then "$PYTHON" -m cramfast.doctor --device cpu
  else "$PYTHON" -m cramfast.doctor --device cuda --kernels all=cpp; fi
}

# layernorm_glu in one kernel, which takes half precision alone; "$1": more for -k.
fused_tests() {
  "$PYTHON" -m pytest tests/kernels/test_ops.py --device cuda --kernels cpp_fused -k "layernorm_glu and not compiles ${1:-}"
}

tests() {
  local chosen=()
  ((REHEARSE)) && chosen=(-k "values and glu")
  "$PYTHON" -m pytest tests/kernels/test_ops.py --device "$DEVICE" "${chosen[@]}"
  local failed=$?
  ((REHEARSE)) || fused_tests || failed=1
  return $failed
}

probe() {
  needs_gpu "the emulator's probes run on hardware, compiled by nvcc"
  "$PYTHON" -m pytest tests/kernels/test_emulator.py --device cuda
}

turing() {
  needs_gpu "PTX for compute_75 needs nvcc and a driver"
  turing_tree || return
  cd "$WORK/turing" || return
  "$PYTHON" -c 'import torch, cramfast.kernels, cramfast._C; print(cramfast._C.__file__)'
  "$PYTHON" -m pytest tests/kernels/test_ops.py --device cuda -k "not bfloat16"  # Turing has no bfloat16 tensor cores
  local failed=$?
  fused_tests "and not bfloat16" || failed=1
  return $failed
}

bench() {
  local chosen=()
  ((REHEARSE)) && chosen=(--smoke -k glu-0-float32)
  "$PYTHON" -m pytest bench/test_kernels.py --device "$DEVICE" --results "$OUT/operators.jsonl" "${chosen[@]}"
}

# In which order a trial takes its candidates: python -m bench.choose operators.jsonl reads these rows beside those of `bench`.
choose() {
  needs_gpu "implementations are compared on a GPU alone"
  local failed=0
  for kernels in triton cpp_fused stock torch_varlen padded; do
    "$PYTHON" -m pytest bench/test_kernels.py --device cuda --kernels $kernels --ours-only --results "$OUT/operators.jsonl" || failed=1
  done
  return $failed
}

step() {
  local sizes=(--rounds 3 --seconds 3)
  ((REHEARSE)) && sizes=(--rounds 1 --seconds 0.5 --systems cramfast --batch-sequences 4 --layers 1 --width 64 --heads 1
                         --feedforward 64 --vocab-size 512)
  # shellcheck disable=SC2086  # DATA holds several files
  "$PYTHON" -m bench.step --device "$DEVICE" --results "$OUT/step.jsonl" "${sizes[@]}" ${DATA:+--data $DATA}
}

train() {
  local sizes=(--preset base --budget 20s --eval-interval 10 --kernels all=cpp)
  ((REHEARSE)) && sizes=(--preset tiny --budget 2steps --model.layers 1 --model.width 64 --model.heads 1
                         --model.feedforward 64 --model.vocab-size 512 --microbatch-tokens 256 --batch-tokens 256
                         --heldout-tokens 256)
  # shellcheck disable=SC2086
  "$PYTHON" -m cramfast.train --device "$DEVICE" --run-dir "$WORK/run" "${sizes[@]}" ${DATA:+--data $DATA}
  local status=$?
  cp "$WORK/run/metrics.jsonl" "$OUT" 2>/dev/null
  return $status
}

# --- one after the other, with what is left of the time

export -f skip needs_gpu turing_tree fused_tests
results=() failed=0
rm -rf "$OUT"/{qualified,summary.json,log.txt,operators.jsonl,step.jsonl,metrics.jsonl}
for stage in ${STAGES//,/ }; do
  # shellcheck disable=SC2163  # the function of that name
  export -f "$stage"
  echo "=== $stage, ${BUDGET[$stage]} s at most ($(date +%T))" | tee -a "$OUT/log.txt"
  began=$SECONDS
  timeout -k 5 "${BUDGET[$stage]}" bash -c "$stage" >"$WORK/stage.log" 2>&1
  rc=$? seconds=$((SECONDS - began)) reason=
  tail -c "$LONGEST_LOG" "$WORK/stage.log" >>"$OUT/log.txt"
  case $rc in
    0) said="passed" ;;
    77) reason=$(tail -n 1 "$WORK/stage.log") said="skipped: $reason" ;;
    124 | 137) reason="stopped after its ${BUDGET[$stage]} s" said=$reason failed=1 ;;
    *) reason=$(grep -v '^ *$' "$WORK/stage.log" | tail -n 1) said="failed ($rc): $reason" failed=1 ;;
  esac
  echo "$stage: $said, $seconds s"
  results+=("$stage" "$rc" "$seconds" "$reason")
  # Written anew after every stage: a run that is cut short has it too.
  "$PYTHON" - "$DEVICE" "$REHEARSE" "${results[@]}" >"$OUT/summary.json" <<'PYTHON'
import json, sys

device, rehearse, *cells = sys.argv[1:]
stages = [
    {"stage": name, "rc": None if rc == "77" else int(rc), "seconds": int(seconds), "reason": reason}
    for name, rc, seconds, reason in zip(*[iter(cells)] * 4)
]
seconds = sum(stage["seconds"] for stage in stages)
print(json.dumps({"device": device, "rehearsal": rehearse == "1", "seconds": seconds, "stages": stages}, indent=1))
PYTHON
done
((SECONDS <= 480)) || echo "took $SECONDS s: over the eight minutes"
exit $failed
