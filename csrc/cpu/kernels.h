// Every CPU kernel, declared once per instruction set (POSTTRAIN_ISA names which). Row-major, contiguous rows,
// T = float or double. Include through cpu/all.h from code that calls kernels, or directly from a kernel's own file.
#include <cstdint>

namespace posttrain::POSTTRAIN_ISA {

// y = sum / rms(sum) * weight with sum = x + residual; residual may be null (then sum is x and is not written).
template <class T>
void rms_norm_forward(const T* x, const T* residual, const T* weight, T* y, T* sum, T* rstd, int64_t rows,
                      int64_t width, double eps);

// dx = gradient of sum (grad_sum may be null), dw = gradient of weight.
// `partial` is a workspace of rms_norm_blocks(rows) * width elements.
template <class T>
void rms_norm_backward(const T* grad_y, const T* grad_sum, const T* sum, const T* weight, const T* rstd, T* dx, T* dw,
                       T* partial, int64_t rows, int64_t width);
int64_t rms_norm_blocks(int64_t rows);

}  // namespace posttrain::POSTTRAIN_ISA
