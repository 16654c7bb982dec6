"""The Triton kernels, one file per op; installed as posttrain.kernels."""
