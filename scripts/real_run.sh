#!/usr/bin/env bash
# Train a preset by both recipes on one prepared text, score both, write the page: scripts/real_run.sh --help
set -euo pipefail

USAGE='usage: [BUDGET=45m] [PRESET=mini] [SEED=0] [SEEDS=3] [PYTHON=python3] scripts/real_run.sh CORPUS OUT

CORPUS is a text file, or a folder whose .xz files are all taken but small.txt.xz, a sample of the others. Every finished
stage is noted in OUT/done and left out the next time, a training run goes on from its checkpoint: after a cut-off, give
the same command again; with values that a finished stage did not have, it is refused. OUT then holds results.json,
results.md and its picture; copy them to docs/.

  BUDGET    of each training run, as cramfast.train takes it          RECIPES   default "crammed cramfast"
  GLUE      folder of GLUE; default: glue, next to the folder of CORPUS  TASKS     default "cola rte mrpc sts-b sst-2"
  BLIMP     file of BLiMP; default: blimp/blimp.jsonl.xz beside it    PAIRS     of each paradigm; default 0, all
  CURATION  flags; default "--curation.duplicates near --curation.max-tokens-per-char 0.3"; 0.25 for 32,768 words
  JOBS      runs at the same time, one thread each if above 1; default 2 on a CPU, for the same weather, 1 on a GPU
  SETTINGS  further flags of cramfast.train

On a GPU, both recipes for 20 minutes each and every task of a partial GLUE:
  PRESET=base BUDGET=20m TASKS="rte mrpc sts-b cola sst-2 qnli-nqg qqp-lite mnli-lite" scripts/real_run.sh CORPUS OUT
Its rehearsal on a CPU, in minutes:
  PRESET=base BUDGET=2steps SEEDS=1 PAIRS=2 TASKS="rte mrpc" SETTINGS="--model.layers 2 --model.width 64 --model.heads 1
  --model.feedforward 64 --microbatch-tokens 4096 --batch-tokens 4096 --heldout-tokens 8192" scripts/real_run.sh TEXT OUT'

if (($# != 2)) || [[ $1 == -* ]]; then echo "$USAGE"; [[ ${1:-} == --help ]]; exit; fi
refuse() { echo "error: $*" >&2; exit 2; }

[[ -e $1 ]] || refuse "CORPUS $1 does not exist — give a text file, or a folder of .xz files"
CORPUS=$(realpath "$1") OUT=$(realpath -m "$2")
PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-45m} PRESET=${PRESET:-mini} SEED=${SEED:-0} SEEDS=${SEEDS:-3}
RECIPES=${RECIPES:-crammed cramfast} TASKS=${TASKS:-cola rte mrpc sts-b sst-2} PAIRS=${PAIRS:-0}
[[ -d $CORPUS ]] && BESIDE=$CORPUS/.. || BESIDE=$(dirname "$CORPUS")/..
GLUE=$(realpath -m "${GLUE:-$BESIDE/glue}") BLIMP=$(realpath -m "${BLIMP:-$BESIDE/blimp/blimp.jsonl.xz}")
compgen -G "$GLUE/*" >/dev/null || refuse "GLUE $GLUE: no folders of tasks there — set GLUE= to where they are"
[[ -e $BLIMP ]] || refuse "BLIMP $BLIMP does not exist — set BLIMP= to the file of BLiMP"
TEXTS=("$CORPUS")
if [[ -d $CORPUS ]]; then mapfile -t TEXTS < <(find "$CORPUS" -maxdepth 1 -name '*.xz' ! -name 'small.*' | sort); fi
((${#TEXTS[@]})) || refuse "CORPUS $CORPUS: no .xz file there but a small one — give a text file, or another folder"
cd "$(dirname "$0")/.."
SAID=$("$PYTHON" -c 'import torch, cramfast.recipes' 2>&1) ||
  refuse "PYTHON=$PYTHON: ${SAID##*$'\n'} — set PYTHON= to one that has cramfast, or pip install -e . with it"
JOBS=${JOBS:-$("$PYTHON" -c 'import torch; print(1 if torch.cuda.is_available() else 2)')}
VOCAB=$("$PYTHON" -c "from cramfast.recipes import PRESETS; print(PRESETS['$PRESET']('cpu').model.vocab_size)")
((VOCAB >= 32768)) && LIMIT=0.25 || LIMIT=0.3
CURATION=${CURATION:---curation.duplicates near --curation.max-tokens-per-char $LIMIT} SETTINGS=${SETTINGS:-}
mkdir -p "$OUT/done"

# flags COMMAND: its flags with their values, one a line; without the threads, which change no result.
flags() { grep -v '^--threads ' <<<"${1// --/$'\n'--}"; }

# without LINES OTHERS: the others that are not among the lines, on one line.
without() { grep -vxFe "$1" <<<"$2" | paste -sd' ' || true; }

# once NAME COMMAND...: run it unless it has succeeded before; keep what it printed and, without our paths, its words.
# Where it has succeeded with other flags, the results of both must not be mixed. CHECK=1: see to that alone.
once() {
  local name=$1 words was now && shift
  words="$*" words=${words/#"$PYTHON"/python}
  for folder in OUT GLUE BLIMP CORPUS; do words=${words//"${!folder}"/$folder}; done
  if [[ -f $OUT/done/$name ]]; then
    was=$(flags "$(<"$OUT/done/$name")") now=$(flags "$words")
    [[ $was == "$now" ]] && return
    words="'$(without "$now" "$was")', not '$(without "$was" "$now")'"
    refuse "$OUT: $name was made with $words — choose another OUT, or the values of before"
  fi
  [[ -z ${CHECK:-} ]] || return 0
  echo "== $name: $*"
  "$@" > >(tee "$OUT/done/$name.log") 2>&1 || { echo "$name failed; give the same command again to go on" >&2; return 1; }
  echo "$words" >"$OUT/done/$name"
}

# Train by a recipe and score: with several jobs one thread each, which small models and batches keep busier than two.
run() {
  local run=$OUT/$1 threads=0
  ((JOBS > 1)) && threads=1
  # shellcheck disable=SC2086 # flags are words
  once "$1-train" "$PYTHON" -m cramfast.train --data "$OUT/text" --preset "$PRESET" --recipe "$1" --seed "$SEED" \
    --budget "$BUDGET" --run-dir "$run" --resume auto --threads $threads $CURATION $SETTINGS
  once "$1-blimp" "$PYTHON" -m cramfast.evaluate blimp "$run" --data "$BLIMP" --limit-per-paradigm "$PAIRS" --threads $threads
  for task in $TASKS; do
    once "$1-$task" "$PYTHON" -m cramfast.evaluate glue "$run" --data "$GLUE" --tasks "$task" --seeds "$SEEDS" --threads $threads
  done
}

# shellcheck disable=SC2086 # flags are words
once prepare "$PYTHON" -m cramfast.prepare --data "${TEXTS[@]}" --out "$OUT/text" --vocab-size "$VOCAB" $CURATION
for recipe in $RECIPES; do CHECK=1 run "$recipe"; done
jobs=()
for recipe in $RECIPES; do
  run "$recipe" &
  jobs+=($!)
  if ((${#jobs[@]} >= JOBS)); then wait "${jobs[0]}" && jobs=("${jobs[@]:1}"); fi
done
for job in "${jobs[@]}"; do wait "$job"; done

runs=() stages=(prepare)
for recipe in $RECIPES; do
  runs+=("$OUT/$recipe")
  stages+=("$recipe-train" "$recipe-blimp")
  for task in $TASKS; do stages+=("$recipe-$task"); done
done
(cd "$OUT/done" && cat "${stages[@]}") >"$OUT/commands.txt"
"$PYTHON" -m bench.runs "${runs[@]}" --commands "$OUT/commands.txt" --out "$OUT"
