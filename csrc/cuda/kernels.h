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

// sample.cu: posttrain/ops/sample.py has the contract; logits have contiguous rows, `stride` elements apart.

// Each row's parameters.
struct SampleRows {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seeds;
  const int64_t* offsets;
};

// Bytes of the workspace, which lies on a multiple of 16.
int64_t sample_workspace(int64_t rows, int64_t size);
int sample(void* stream, int dtype, const void* logits, int64_t stride, int64_t rows, int64_t size,
           SampleRows parameters, void* workspace, int64_t* tokens, float* logprobs);

// rms_norm.cu: the forward of posttrain/ops/rms_norm.py; `residual` and `total` may be null. The weight is float32 if it
// is wide, else of `dtype`.
int rms_norm(void* stream, int dtype, bool wide_weight, const void* x, const void* residual, const void* weight,
             void* y, void* total, float* rstd, int64_t rows, int64_t width, float eps);

// rope_cache.cu: posttrain/ops/rope_cache.py has the contract; cos and sin are float32 if they are wide, else of `dtype`.

// Heads of each token, contiguous rows; strides are in elements.
struct HeadRows {
  const void* start;
  int64_t token_stride, head_stride;
  int heads;
};

int rope_cache(void* stream, int dtype, bool wide_angles, HeadRows q, HeadRows k, HeadRows v, const void* cos,
               const void* sin, const int64_t* slots, int64_t tokens, int64_t width, int64_t half, void* q_out,
               void* keys, void* values);

}  // namespace posttrain::cuda
