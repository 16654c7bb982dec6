// The module posttrain._emulated: the CUDA kernels' own sources, run on the CPU for tests (cuda/emulation.h).
#include "cuda/bindings.h"

namespace posttrain::emulation {
void set_descending(bool descending);
}

PYBIND11_MODULE(_emulated, m) {
  m.doc() = "CUDA kernels of posttrain emulated on the CPU, for tests; call them through posttrain.ops";
  posttrain::cuda::bind_kernels(m);
  m.def("set_descending", &posttrain::emulation::set_descending,
        "whether blocks, and threads of a block, run from the last to the first");
}
