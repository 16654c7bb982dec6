// Every CUDA kernel: raw device pointers and a stream in, the status of the launch (a cudaError_t, 0 for success) out.
// Row-major, contiguous rows. The current device must be the one that holds the tensors. posttrain/ops checks shapes,
// dtypes and alignment before calling; nothing is checked twice here.
#pragma once

#include <cstdint>

namespace posttrain::cuda {

// Element types, as CUDA_DTYPES in posttrain/ops/backend.py.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// What a status means, in words.
const char* describe(int status);

// logprob.cu

// As in cpu/kernels.h: z = cap((a + bias) * scale) * inverse_temperature, softcap 0 for no cap.
struct LogitTransform {
  float scale, softcap, inverse_temperature;
};

// cpu/kernels.h has the contracts of both, for float32.
int logprob_fold(void* stream, float* tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column,
                 const int64_t* targets, const float* bias, LogitTransform transform, float* m, float* top, float* s,
                 float* t, float* z_target, float* unit, int64_t width);
int logprob_grad(void* stream, const float* tile, int64_t tile_stride, float* grad, int64_t grad_stride, int64_t rows,
                 int64_t cols, int64_t first_column, const int64_t* targets, const float* bias,
                 LogitTransform transform, bool finished, const float* logprob, const float* entropy,
                 const float* lse, const float* lse_low, const float* grad_logprob, const float* grad_entropy,
                 const float* grad_lse);

}  // namespace posttrain::cuda
