"""Where a GPU's tensors go to the CUDA C++ kernels instead of Triton's, and on what grounds.

A key is an op and a case of it ("" for all its inputs; else as the op calls `backend_for`). A value starts with
"argued:", for a reason written out in docs/cuda-kernels.md, or with "measured:", for a file in bench/results. What
isn't here stays with Triton.
"""

WINS: dict[tuple[str, str], str] = {
    ("sample", ""): "argued: one pass instead of three, on all multiprocessors whatever the rows",
    ("rope_cache", ""): "argued: one launch for a layer instead of three",
}
