// The CUDA kernels as Python functions: in posttrain._C on a GPU, in posttrain._emulated on a CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace posttrain::cuda {

void bind_kernels(pybind11::module_& m);

}  // namespace posttrain::cuda
