#!/usr/bin/env bash
# Runs a command as on a machine with GPUs, where there is none: what the host does for a card is done, by a torch for
# CUDA over a runtime that has none (cuda.c); what a card would compute is computed by the CPU (site/operators.py), and
# products of cuSPARSELt by the stand-in of its tests. Kernels, their numbers and their speed are not rehearsed, nor
# nccl, Triton and compiled models.
#
#   tests/rehearsal/rehearse.sh python -m pytest -m gpu tests/models/test_flash.py
#
# VCARD_COUNT: cards (1). VCARD_GIB: memory of each. The first start installs some 5 GB into build/rehearsal.
set -euo pipefail

(($#)) || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/rehearsal made=$root/build/rehearsal
if [[ ! -e $made/.installed || $root/constraints.txt -nt $made/.installed ]]; then
  python3 -m venv "$made/venv"
  mkdir -p "$made/cusparselt/nvidia/cusparselt/lib"
  # The torch of the machine that docs/gpu-session.md speaks of.
  "$made/venv/bin/pip" install -q --disable-pip-version-check torch==2.11.0 "nvidia-cuda-crt==13.0.*"
  grep -vE '^(torch|triton|setuptools|nvidia-)' "$root/constraints.txt" >"$made/constraints.txt"
  DS_BUILD_OPS=0 "$made/venv/bin/pip" install -q --disable-pip-version-check -c "$made/constraints.txt" -e "${root}[test]"
  touch "$made/.installed"
fi
site=$("$made/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
include=$site/nvidia/cu13/include
standin=$root/tests/sparse/kernels/cusparselt/standin.c
if [[ $here/cuda.c -nt $made/libcudart.so.13 || $standin -nt $made/libcudart.so.13 ]]; then
  printf 'libcudart.so.13 { global: cuda*; __cuda*; local: *; };\n' >"$made/runtime.map"
  # What torch links to of the driver, and never calls here.
  nm -D --undefined-only "$site/torch/lib/libcaffe2_nvrtc.so" | grep -oE ' cu[A-Z]\w+' |
    sed 's/.*/__attribute__((weak)) int & (void) { return 801; }/' >"$made/driver.c"
  sed -i -E '/cu(DevicePrimaryCtxGetState|CtxGetCurrent|GetErrorString) /d' "$made/driver.c"
  build=(cc -shared -fPIC -O1 -Wno-attributes -I"$include" "$here/cuda.c")
  "${build[@]}" "$made/driver.c" -o "$made/libcuda.so.1" -Wl,-soname,libcuda.so.1
  "${build[@]}" -o "$made/libnvidia-ml.so.1" -Wl,-soname,libnvidia-ml.so.1
  "${build[@]}" -o "$made/libcudart.so.13" -Wl,-soname,libcudart.so.13 -Wl,--version-script="$made/runtime.map"
  cc -shared -fPIC -O1 "$standin" -lm -lpthread \
    -o "$made/cusparselt/nvidia/cusparselt/lib/libcusparseLt.so.0"
fi
export PATH=$made/venv/bin:$PATH OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
export PYTHONPATH=$here/site:$root:$made/cusparselt LD_LIBRARY_PATH=$made LD_PRELOAD=$made/libcudart.so.13
exec "$@"
