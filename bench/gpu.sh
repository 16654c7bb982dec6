#!/usr/bin/env bash
# Build for this machine's GPU, run the tests that touch kernels, then the benchmarks; JSON goes to $OUT or
# bench/results. Uses .venv if there is one, else the python3 on PATH, which must bring torch with CUDA, triton,
# transformers, peft, and to build and test scikit-build-core, pybind11, cmake, ninja, nvcc, pytest, pytest-xdist and
# hypothesis; needs no network. Peers to compare with may lie as wheels in .whl/; without them they are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=python3
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu: no CUDA GPU here ($("$python" -c 'import torch; print("torch", torch.__version__)'));" \
    "run it on a machine with one. Kernels are checked without a GPU by make test." >&2
  exit 2
fi

export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1
arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a >= 9 else ""))')
"$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target build/gpu --upgrade . \
  -Ccmake.define.POSTTRAIN_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$arch"
if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --target build/gpu --upgrade .whl/*.whl
fi

# The installed package, not the folder beside this script: tests and benchmarks start from elsewhere.
root=$PWD
export PYTHONPATH="$root/build/gpu" OUT="${OUT:-$root/bench/results}"
cd "$root/build"
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -n 4 \
  "$root/tests/kernels" "$root/tests/ops" "$root/tests/models" "$root/tests/rollout" "$root/tests/cuda"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck synccheck; do  # without PyTorch's cache of freed memory, so that an access beyond a tensor shows
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$root/tests/cuda" -m "not slow"
  done
else
  echo "make gpu: no compute-sanitizer on PATH; memcheck and synccheck of the CUDA kernels are left out" >&2
fi
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$root/bench"
