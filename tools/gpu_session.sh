#!/usr/bin/env bash
# What a machine with a GPU is asked for, in the order of docs/gpu-session.md: the tests, then the benchmarks.
#
#   tools/gpu_session.sh [OPTION ...] OUT [STAGE ...]
#
# OUT takes gpu-session.tar.gz, packed anew after each stage: every log and result; and gpu-session-kernels.tar.gz,
# compiled CUTLASS, which a later call takes from --results. A stage that fails, crashes or runs out of time does not stop
# the others, and the exit code is 1 if any did. Options, with what holds without them:
#   --limit SECONDS    of this call (560); a stage gets its share of what is left
#   --results DIR      logs and results, where a later call goes on (build/gpu-session)
#   --wheels DIR       Python packages that this machine lacks (wheels, if it is there); not installed into the system
#   --cusparselt FILE  another libcusparseLt.so.0 than the installed one; give it a --results of its own
#   --python PATH      (.venv/bin/python, else python3)
#   --list             print the commands and run nothing
# STAGE: only these, of: triton cusparselt products cutlass training gemm block step decode refresh; tests: the first five.
# Where .git is not, SLOPE_COMMIT names the commit.
set -euo pipefail

usage() {
  sed -n '2,18s/^# \{0,1\}//p' "$0"
  exit 2
}

refuse() {
  echo "error: $*" >&2
  exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
list=false limit=560 results=$root/build/gpu-session wheels="" cusparselt="" python=$root/.venv/bin/python out=""
tests=(triton cusparselt products cutlass training)
benchmarks=(gemm block step decode refresh)
all=("${tests[@]}" "${benchmarks[@]}")
wanted=()
while (($#)); do
  case $1 in
    --list) list=true ;;
    --limit | --results | --wheels | --cusparselt | --python)
      (($# > 1)) || usage
      case $1 in
        --limit) limit=$2 ;;
        --results) results=$(realpath -m "$2") ;;
        --wheels) wheels=$(realpath -m "$2") ;;
        --cusparselt) cusparselt=$(realpath -m "$2") ;;
        --python) python=$2 ;;
      esac
      shift
      ;;
    -*) usage ;;
    *)
      if [[ -z $out ]]; then
        out=$(realpath -m "$1")
      elif [[ $1 == tests ]]; then
        wanted+=("${tests[@]}")
      elif [[ " ${all[*]} " == *" $1 "* ]]; then
        wanted+=("$1")
      else
        refuse "there is no stage \"$1\"; there are: tests ${all[*]}"
      fi
      ;;
  esac
  shift
done
[[ -n $out && $limit =~ ^[0-9]+$ ]] || usage
((${#wanted[@]})) || wanted=("${all[@]}")
if [[ ! -x $python ]]; then
  [[ $python == "$root/.venv/bin/python" ]] || refuse "--python $python is not a program"
  python=$(command -v python3)
fi
if [[ -z $wheels ]]; then
  [[ ! -d $root/wheels ]] || wheels=$root/wheels
elif [[ ! -d $wheels ]]; then
  refuse "--wheels $wheels is not a folder"
fi
[[ -z $cusparselt || -f $cusparselt ]] || refuse "--cusparselt $cusparselt is not a file"

cd "$root"
export PYTHONUNBUFFERED=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if ! $list && [[ -z ${SLOPE_COMMIT:-} ]] && ! git rev-parse HEAD >/dev/null 2>&1; then
  refuse "results name their commit, and there is no .git here: set SLOPE_COMMIT to what git rev-parse HEAD says"
fi

if [[ -n $wheels ]]; then
  site=$root/build/gpu-site
  rm -rf "$site"
  "$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore \
    --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl ||
    refuse "the wheels in $wheels cannot be installed with $python"
  PYTHONPATH=$site:$PYTHONPATH
fi
if [[ -n $cusparselt ]]; then
  # Where the library is looked for, and before the installed one.
  mkdir -p build/gpu-cusparselt/nvidia/cusparselt/lib
  ln -sf "$cusparselt" build/gpu-cusparselt/nvidia/cusparselt/lib/libcusparseLt.so.0
  PYTHONPATH=$root/build/gpu-cusparselt:$PYTHONPATH
fi

modules_of() {
  case $1 in
    training) echo torch numpy pytest pydantic_core annotated_types typing_inspection pydantic hjson deepspeed megatron.core ;;
    triton) echo torch numpy pytest hypothesis xdist ;;
    cusparselt | products | cutlass) echo torch numpy pytest hypothesis ;;
    *) echo torch numpy rich matplotlib safetensors pydantic_core annotated_types typing_inspection pydantic ;;
  esac
}

# Imported, not only found: a wheel of another Python or system is found too.
mapfile -t modules < <(for stage in "${wanted[@]}"; do modules_of "$stage" | tr ' ' '\n'; done | sort -u)
mapfile -t missing < <("$python" -c 'import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"missing {name if error.name is None or name.startswith(error.name) else error.name}")' \
  "${modules[@]}" 2>/dev/null | sed -n 's/^missing //p' | sort -u)
runnable=() without=()
for stage in "${wanted[@]}"; do
  lacks=false
  for module in "${missing[@]}"; do
    [[ " $(modules_of "$stage") " != *" $module "* ]] || lacks=true
  done
  if $lacks; then without+=("$stage"); else runnable+=("$stage"); fi
done
if ((${#without[@]})); then
  echo "not run: ${without[*]}; this Python lacks ${missing[*]}: give wheels of them with --wheels DIR, made as docs/gpu-session.md says" >&2
  ((${#runnable[@]})) || exit 2
fi

card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null | tail -n 1 || true)
card=$(tr 'A-Z /' 'a-z--' <<<"${card:-no-card}")
if [[ $card == no-card ]] && ! $list; then
  refuse "torch finds no CUDA device with $python; --list shows what would run"
fi

# How long each may take beside the others.
declare -A weight=(
  [triton]=20 [cusparselt]=20 [products]=30 [cutlass]=30 [training]=30
  [gemm]=35 [block]=35 [step]=25 [decode]=20 [refresh]=7
)
# From the request to stop until it is killed.
grace=15
# Of a benchmark, until its first cell.
start=20

# What a stage runs, of `allowed` seconds. Tests are verbose, so that the last line before a crash names the test.
command_of() {
  local cells=$(((allowed > start ? allowed - start : 0) / 6)) pytest=("$python" -m pytest -m gpu -vv -rfEs)
  local benchmark=("$python" tools/benchmark.py "$1" --output "$results/$1-$card.json")
  # In tenths of a minute: no cell is begun that would not end before.
  benchmark+=(--minutes "$((cells / 10)).$((cells % 10))")
  case $1 in
    # Some two hundred kernels are compiled, a second or two of a core each: more than all else that it does.
    triton) command=("${pytest[@]}" -n 8 tests/sparse/kernels/jit) ;;
    cusparselt) command=("${pytest[@]}" tests/sparse/kernels/cusparselt) ;;
    products) command=("${pytest[@]}" tests/sparse/test_on_gpu.py tests/sparse/kernels/test_on_gpu.py tests/sparse/kernels/test_routes.py) ;;
    cutlass) command=("${pytest[@]}" tests/sparse/kernels/test_cutlass_on_gpu.py) ;;
    training)
      mapfile -t files < <(grep -rlE 'mark\.gpu|kernels\.devices import' tests --include='test_*.py' | grep -v '^tests/sparse/' | sort)
      command=("${pytest[@]}" "${files[@]}")
      ;;
    # As engines have weights: block, step and refresh then need not search what this has searched.
    gemm) command=("${benchmark[@]}" --seconds 0.5 --arrangement kept) ;;
    decode) command=("${benchmark[@]}" --seconds 1) ;;
    # The largest model that trains whole on an H200; of a larger one what fits has too much that is dense at its ends.
    step) command=("${benchmark[@]}" --configs configs/opt6.7b.json --seconds 1) ;;
    *) command=("${benchmark[@]}") ;;
  esac
}

pack() {
  tar -czf "$out/.partial" --exclude='*.tar.gz' --exclude=.partial --exclude=./cache -C "$results" .
  mv "$out/.partial" "$out/gpu-session.tar.gz"
}

# CUTLASS's kernels take a minute or two to compile: beside the first stages, and once for all calls.
compile() {
  local arch
  arch=$("$python" -c 'import torch; print({8: "sm_80", 9: "sm_90a"}.get(torch.cuda.get_device_capability()[0], ""))')
  [[ -n $arch ]] || return 0
  "$python" -m slope_dist.sparse.kernels.cutlass.build --arch "$arch" || return 0
  tar -czf "$out/.kernels" -C "$results" cache
  mv "$out/.kernels" "$out/gpu-session-kernels.tar.gz"
}

summary=() bad=("${without[@]}") failures=()
for stage in "${without[@]}"; do summary+=("$stage: not run, something is missing"); done
if ! $list; then
  mkdir -p "$out" "$results"
  [[ ! -f $results/gpu-session-kernels.tar.gz ]] || tar -xzf "$results/gpu-session-kernels.tar.gz" -C "$results"
  export XDG_CACHE_HOME=$results/cache
  compile >"$results/cutlass-build.log" 2>&1 &
  compiling=$!
  trap 'pkill -P "$compiling" 2>/dev/null || true; kill "$compiling" 2>/dev/null || true' EXIT
fi
for ((number = 0; number < ${#runnable[@]}; number++)); do
  ! $list || SECONDS=0
  stage=${runnable[number]} weights=0
  for other in "${runnable[@]:number}"; do weights=$((weights + weight[$other])); done
  allowed=$(((limit - SECONDS) * weight[$stage] / weights - grace))
  if ((allowed < 1)); then
    echo "$stage: no time is left"
    summary+=("$stage: not run, no time is left")
    bad+=("$stage")
    continue
  fi
  command_of "$stage"
  if $list; then
    # What each has if all take as long as they may.
    echo "$stage, $allowed s: ${command[*]}"
    limit=$((limit - allowed - grace))
    continue
  fi
  turn=1
  while [[ -e $results/$stage.$turn.log ]]; do turn=$((turn + 1)); done
  log=$results/$stage.$turn.log
  echo "$(date +%T) $stage, $allowed s: ${command[*]}"
  code=0
  timeout --signal=INT --kill-after=$grace "$allowed" "${command[@]}" >"$log" 2>&1 || code=$?
  case $code in
    0) state="done" ;;
    124 | 137) state="stopped after $allowed s, what was measured is kept" ;;
    *) state="failed with code $code" ;;
  esac
  ((code == 0)) || bad+=("$stage")
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c -160 || true)
  if ((code > 128)) && [[ " ${tests[*]} " == *" $stage "* ]]; then
    last="last test: $(grep -oE '^tests/[^ ]+::.*' "$log" | tail -n 1 | cut -c -160 || true)"
  fi
  summary+=("$stage: $state; $last; $(basename "$log")")
  mapfile -t -O "${#failures[@]}" failures < <(grep -E '^(FAILED|ERROR) ' "$log" | head -n 15 | cut -c -200)
  pack
done
$list && exit 0
pack
((${#failures[@]} == 0)) || printf '%s\n' "" "${failures[@]}"
printf '%s\n' "" "${summary[@]}" "everything is in $out/gpu-session.tar.gz"
if ((${#bad[@]})); then
  echo "failed: ${bad[*]}"
  exit 1
fi
