"""Where a GPU's tensors go to the CUDA C++ kernels instead of Triton's, and on what grounds.

A key is an op and a case of it ("" for all its inputs; else as the op calls `backend_for`). A value starts with
"argued:", for a reason written out in docs/cuda-kernels.md, or with "measured:", for a file in bench/results. What
isn't here stays with Triton: also what a GPU has to run first because the CPU's emulation can't check it. Those are the
cases of posttrain/ops/lora_cuda.py, with the matrix instructions of "adapters by row" and "up to 16 rows of NF4" and
the waits between blocks of the latter, until the tests that docs/gpu-todo.md names under LoRA and NF4 ran on one.
"""

_ONE_PASS = "argued: one pass instead of three, on all multiprocessors whatever the rows"
_ONE_LAUNCH_OF_STEP = "argued: one launch instead of three"

WINS: dict[tuple[str, str], str] = {
    ("sample", ""): _ONE_PASS,
    ("rope_cache", ""): _ONE_LAUNCH_OF_STEP,
}
