// cuda_<op>(stream, addresses, sizes, dtype tags...): a launch, or an error that says why there was none.
#include "cuda/bindings.h"

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;
using address = uintptr_t;

namespace posttrain::cuda {

namespace {

// The address `a` as a pointer to T.
template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

void check(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA: ") + describe(status));
}

// As logprob_fold and logprob_grad of posttrain._C, for float32, after a stream; itemsize is that of float.
void bound_logprob_fold(address stream, int, address tile, int64_t stride, int64_t rows, int64_t cols,
                        int64_t first_column, address targets, address bias, float scale, float softcap,
                        float inverse_temperature, address m, address top, address s, address t, address z_target,
                        address unit, int64_t width) {
  using T = float;
  check(logprob_fold(at<void>(stream), at<T>(tile), stride, rows, cols, first_column, at<int64_t>(targets), at<T>(bias),
                     {scale, softcap, inverse_temperature}, at<T>(m), at<T>(top), at<T>(s), at<T>(t), at<T>(z_target),
                     at<T>(unit), width));
}

void bound_logprob_grad(address stream, int, address tile, int64_t tile_stride, address grad, int64_t grad_stride,
                        int64_t rows, int64_t cols, int64_t first_column, address targets, address bias, float scale,
                        float softcap, float inverse_temperature, bool finished, address logprob, address entropy,
                        address lse, address lse_low, address grad_logprob, address grad_entropy, address grad_lse) {
  using T = float;
  check(logprob_grad(at<void>(stream), at<T>(tile), tile_stride, at<T>(grad), grad_stride, rows, cols, first_column,
                     at<int64_t>(targets), at<T>(bias), {scale, softcap, inverse_temperature}, finished, at<T>(logprob),
                     at<T>(entropy), at<T>(lse), at<T>(lse_low), at<T>(grad_logprob), at<T>(grad_entropy),
                     at<T>(grad_lse)));
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("cuda_logprob_fold", &bound_logprob_fold);
  m.def("cuda_logprob_grad", &bound_logprob_grad);
}

}  // namespace posttrain::cuda
