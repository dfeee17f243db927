#!/usr/bin/env bash
# Everything that a machine with a GPU is asked for, in the order of docs/gpu-session.md: the tests, then the benchmarks.
#
#   tools/gpu_session.sh [--list] [--minutes N] [--python PATH] FOLDER [STAGE ...]
#
# FOLDER takes a log for each stage; results go to docs/results. A stage that fails does not stop the others, and the
# exit code is 1 if any did. --minutes: for all benchmarks together (20). --list: print the commands and run nothing.
# STAGE: only these, of: tests gemm block step decode refresh.
set -euo pipefail

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
list=false minutes=20 python=$root/.venv/bin/python folder=""
all=(tests gemm block step decode refresh)
wanted=()
while (($#)); do
  case $1 in
    --list) list=true ;;
    --minutes | --python)
      (($# > 1)) || usage
      if [[ $1 == --minutes ]]; then minutes=$2; else python=$2; fi
      shift
      ;;
    -*) usage ;;
    *) if [[ -z $folder ]]; then folder=$1; else wanted+=("$1"); fi ;;
  esac
  shift
done
[[ -n $folder && $minutes =~ ^[0-9]+$ ]] || usage
for stage in "${wanted[@]}"; do
  [[ " ${all[*]} " == *" $stage "* ]] || { echo "there is no stage \"$stage\"; there are: ${all[*]}" >&2; exit 2; }
done
((${#wanted[@]})) || wanted=("${all[@]}")
if [[ ! -x $python ]]; then
  [[ $python == "$root/.venv/bin/python" ]] || { echo "--python $python is not a program" >&2; exit 2; }
  python=$(command -v python3)
fi

cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null | tail -n 1 || true)
card=$(tr 'A-Z /' 'a-z--' <<<"${card:-no-card}")
if [[ $card == no-card ]] && ! $list; then
  echo "torch finds no CUDA device with $python; --list shows what would run" >&2
  exit 2
fi

tests=tests
if ! { has deepspeed && has megatron; }; then
  tests=tests/sparse
  echo "without deepspeed and megatron-core, or one of them: of the tests only those under tests/sparse; no training, no tensor ranks"
fi

# A percentage of the minutes, at least one.
share() { echo $((minutes * $1 / 100 > 0 ? minutes * $1 / 100 : 1)); }
command_of() {
  local benchmark=("$python" tools/benchmark.py "$1" --output "docs/results/$1-$card.json")
  case $1 in
    tests) command=("$python" -m pytest -m gpu -rs "$tests") ;;
    gemm) command=("${benchmark[@]}" --minutes "$(share 35)" --seconds 0.5) ;;
    block) command=("${benchmark[@]}" --minutes "$(share 25)") ;;
    step) command=("${benchmark[@]}" --minutes "$(share 15)") ;;
    decode) command=("${benchmark[@]}" --minutes "$(share 20)") ;;
    refresh) command=("${benchmark[@]}" --minutes "$(share 5)") ;;
  esac
}

failed=()
$list || mkdir -p "$folder" docs/results
for stage in "${wanted[@]}"; do
  command_of "$stage"
  if $list; then
    echo "$stage: ${command[*]}"
    continue
  fi
  echo "$(date +%T) $stage: ${command[*]}"
  code=0
  "${command[@]}" >"$folder/$stage.log" 2>&1 || code=$?
  if ((code == 0)); then
    echo "$(date +%T) $stage: done"
  else
    echo "$(date +%T) $stage: failed with code $code, see $folder/$stage.log"
    tail -n 5 "$folder/$stage.log" | sed 's/^/    /'
    failed+=("$stage")
  fi
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
