#!/usr/bin/env bash
# What `make gpu` runs, whole or one part: bench/gpu.sh [build | test | bench [OP...] | sanitize]
#   build     for this machine's GPU, into build/gpu, from where the other parts take it
#   test      tests that touch kernels
#   bench     `posttrain bench --suite full --peers`, then comparisons with targets; with OPs only the first, of these
#   sanitize  tests of the CUDA kernels under compute-sanitizer
# A failure of the first two ends the run, one of the others doesn't keep the rest from running.
# JSON goes to $OUT or bench/results. Uses .venv if there is one, else the python3 on PATH, which must bring torch with
# CUDA, triton, transformers, peft, and to build and test scikit-build-core, pybind11, cmake, ninja, nvcc, pytest,
# pytest-benchmark, pytest-xdist and hypothesis; needs no network. What is missing of pure Python, and peers to compare
# with, may lie as wheels in .whl/; without them peers are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD part=${1:-all}
case $part in all | build | test | bench | sanitize) ;; *)
  echo "bench/gpu.sh: there is no part $part; there are build, test, bench and sanitize" >&2
  exit 2
esac
wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }

python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu: no CUDA GPU here ($("$python" -c 'import torch; print("torch", torch.__version__)'));" \
    "run it on a machine with one. Kernels are checked without a GPU by make test." >&2
  exit 2
fi
device='from torch import cuda; print("%d%d" % cuda.get_device_capability(), cuda.get_device_name())'
read -r arch name < <("$python" -c "$device")
if [ "$arch" -lt 80 ]; then
  echo "make gpu: $name is sm_$arch; the kernels need sm_80 or later, an A100 or RTX 30 for instance." >&2
  exit 2
fi
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1

if wanted build; then
  [ "$arch" -lt 90 ] || arch+=a
  "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target build/gpu --upgrade . \
    -Cbuild-dir='build/gpu-{wheel_tag}' -Ccmake.define.POSTTRAIN_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$arch"
  if compgen -G '.whl/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --target build/gpu --upgrade .whl/*.whl
  fi
fi

# The installed package, not the folder beside this script: tests and benchmarks start from elsewhere.
[ -d build/gpu/posttrain ] || { echo "bench/gpu.sh: nothing in build/gpu; run bench/gpu.sh build first" >&2; exit 2; }
export PYTHONPATH="$root/build/gpu" OUT="${OUT:-$root/bench/results}" POSTTRAIN_CHECKOUT="$root"  # whose commit it is
cd build
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider)

if wanted test; then
  "${pytest[@]}" -n 4 "$root"/tests/{kernels,ops,models,rollout,cuda}
fi
failed=0
if wanted bench; then
  "$python" -m posttrain.cli bench --suite full --peers "${@:2}" || failed=1
  [ $# -gt 1 ] || "${pytest[@]}" "$root/bench" -k "not test_case" || failed=1
fi
if wanted sanitize && ! command -v compute-sanitizer >/dev/null; then
  echo "bench/gpu.sh: no compute-sanitizer on PATH; memcheck and synccheck of the CUDA kernels are left out" >&2
elif wanted sanitize; then
  for tool in memcheck synccheck; do  # without PyTorch's cache of freed memory, so that an access beyond a tensor shows
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "${pytest[@]}" "$root"/tests/{cuda,kernels/test_{nf4,lora_adapters}.py} -m "not slow" -k cuda || failed=1
  done
fi
exit $failed
