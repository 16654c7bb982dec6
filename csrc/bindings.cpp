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
                       address dx, address dw, address partial, address exact, int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rms_norm_backward<T>, at<T>(grad_y), at<T>(grad_sum), at<T>(sum), at<T>(weight), at<T>(rstd),
                   at<T>(dx), at<T>(dw), at<T>(partial), at<double>(exact), rows, width);
  });
}

void rope(int itemsize, address x, int64_t x_batch, int64_t x_head, int64_t x_token, address y, int64_t y_batch,
          int64_t y_head, int64_t y_token, address cos, address sin, int64_t angle_batch_stride, int64_t batch,
          int64_t heads, int64_t tokens, int64_t width, int64_t rotated, bool transposed) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rope<T>, at<T>(x), {x_batch, x_head, x_token}, at<T>(y), {y_batch, y_head, y_token}, at<T>(cos),
                   at<T>(sin), angle_batch_stride, batch, heads, tokens, width, rotated, transposed);
  });
}

void glu_forward(int itemsize, int act, address gate, int64_t gate_stride, address up, int64_t up_stride, address y,
                 int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(glu_forward<T>, act, at<T>(gate), gate_stride, at<T>(up), up_stride, at<T>(y), rows, width);
  });
}

void glu_backward(int itemsize, int act, address grad_y, int64_t grad_stride, address gate, int64_t gate_stride,
                  address up, int64_t up_stride, address grad_gate, address grad_up, int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(glu_backward<T>, act, at<T>(grad_y), grad_stride, at<T>(gate), gate_stride, at<T>(up), up_stride,
                   at<T>(grad_gate), at<T>(grad_up), rows, width);
  });
}

void logprob_fold(int itemsize, address tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column,
                  address targets, address bias, double scale, double softcap, double inverse_temperature, address m,
                  address top, address s, address t, address z_target, address unit, int64_t width) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    POSTTRAIN_CALL(logprob_fold<T>, at<T>(tile), stride, rows, cols, first_column, at<int64_t>(targets), at<T>(bias),
                   {scale, softcap, inverse_temperature}, at<T>(m), at<T>(top), at<T>(s), at<T>(t), at<T>(z_target),
                   at<T>(unit), width);
  });
}

void logprob_grad(int itemsize, address tile, int64_t tile_stride, address grad, int64_t grad_stride, int64_t rows,
                  int64_t cols, int64_t first_column, address targets, address bias, double scale, double softcap,
                  double inverse_temperature, bool finished, address logprob, address entropy, address lse,
                  address lse_low, address grad_logprob, address grad_entropy, address grad_lse) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    POSTTRAIN_CALL(logprob_grad<T>, at<T>(tile), tile_stride, at<T>(grad), grad_stride, rows, cols, first_column,
                   at<int64_t>(targets), at<T>(bias), {scale, softcap, inverse_temperature}, finished, at<T>(logprob),
                   at<T>(entropy), at<T>(lse), at<T>(lse_low), at<T>(grad_logprob), at<T>(grad_entropy),
                   at<T>(grad_lse));
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

  m.def("logprob_fold", &logprob_fold);
  m.def("logprob_grad", &logprob_grad);
  m.def("rms_norm_forward", &rms_norm_forward);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("rms_norm_blocks", [](int64_t rows) { return posttrain::baseline::rms_norm_blocks(rows); });
  m.def("rope", &rope);
  m.def("glu_forward", &glu_forward);
  m.def("glu_backward", &glu_backward);
}
