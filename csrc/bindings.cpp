// The module posttrain._C: raw addresses and sizes in, work done, nothing out. posttrain/ops checks shapes, dtypes,
// devices and contiguity before calling; nothing is checked twice here.
#include <pybind11/pybind11.h>

#include "cpu/all.h"
#include "isa.h"
#include "packing.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

// The address `a` as a pointer to T.
template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

// Calls body(T{}) with T = float or double, by the size in bytes of the tensors' elements.
template <class Body>
void by_size(int itemsize, Body body) {
  py::gil_scoped_release release;
  if (itemsize == 8)
    body(double{});
  else
    body(float{});
}

void rms_norm_forward(int itemsize, address x, address residual, address weight, address y, address sum, address rstd,
                      int64_t rows, int64_t width, double eps) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rms_norm_forward<T>, at<T>(x), at<T>(residual), at<T>(weight), at<T>(y), at<T>(sum), at<T>(rstd),
                   rows, width, eps);
  });
}

void rms_norm_backward(int itemsize, address grad_y, address grad_sum, address sum, address weight, address rstd,
                       address dx, address dw, address partial, int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rms_norm_backward<T>, at<T>(grad_y), at<T>(grad_sum), at<T>(sum), at<T>(weight), at<T>(rstd),
                   at<T>(dx), at<T>(dw), at<T>(partial), rows, width);
  });
}

int64_t pack_best_fit(address lengths, int64_t count, int64_t capacity, address bin) {
  py::gil_scoped_release release;
  return posttrain::pack_best_fit(at<int64_t>(lengths), count, capacity, at<int64_t>(bin));
}

bool with_cuda() {
#ifdef POSTTRAIN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of posttrain; call them through posttrain.ops";
  m.def("isa", &posttrain::isa_name, "instruction set of the CPU kernels: baseline, avx2 or avx512");
  m.def("with_cuda", &with_cuda, "whether this build contains the CUDA kernels");
  m.def("pack_best_fit", &pack_best_fit);

  m.def("rms_norm_forward", &rms_norm_forward);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("rms_norm_blocks", [](int64_t rows) { return posttrain::baseline::rms_norm_blocks(rows); });
}
