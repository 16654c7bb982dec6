// Every CUDA kernel: raw device pointers and a stream in, the status of the launch (a cudaError_t, 0 for success) out.
// Row-major, contiguous rows. The current device must be the one that holds the tensors. posttrain/ops checks shapes,
// dtypes and alignment before calling; nothing is checked twice here.
#pragma once

#include <cstdint>

#include "nf4.h"

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

// cpu/kernels.h has the contracts of both, for float32 tiles of at most kLogprobColumns columns, with differences.
// The fold leaves the tile as it is if `unit` is null. What is written takes the tile's place, row by row, rounded to
// `dtype` (float32 or bfloat16): a row of bfloat16 fills the first half of its row.
constexpr int64_t kLogprobColumns = 2048;
int logprob_fold(void* stream, int dtype, float* tile, int64_t stride, int64_t rows, int64_t cols,
                 int64_t first_column, const int64_t* targets, const float* bias, LogitTransform transform, float* m,
                 float* top, float* s, float* t, float* z_target, float* unit, int64_t width);
int logprob_grad(void* stream, int dtype, float* tile, int64_t stride, int64_t rows, int64_t cols,
                 int64_t first_column, const int64_t* targets, const float* bias, LogitTransform transform,
                 const float* logprob, const float* entropy, const float* lse, const float* lse_low,
                 const float* grad_logprob, const float* grad_entropy, const float* grad_lse);

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

// rms_norm.cu: the forward of posttrain/ops/rms_norm.py; `residual` and `total` may be null. The weight is float32 if
// it is wide, else of `dtype`.
int rms_norm(void* stream, int dtype, bool wide_weight, const void* x, const void* residual, const void* weight,
             void* y, void* total, float* rstd, int64_t rows, int64_t width, float eps);

// rope_cache.cu: posttrain/ops/rope_cache.py has the contract; cos and sin are float32 if wide, else of `dtype`.

// Heads of each token, contiguous rows; strides are in elements.
struct HeadRows {
  const void* start;
  int64_t token_stride, head_stride;
  int heads;
};

int rope_cache(void* stream, int dtype, bool wide_angles, HeadRows q, HeadRows k, HeadRows v, const void* cos,
               const void* sin, const int64_t* slots, int64_t tokens, int64_t width, int64_t half, void* q_out,
               void* keys, void* values);

// nf4.cu

// out = elements [first, first + count) of the matrix.
int nf4_dequantize(void* stream, Nf4 w, int64_t first, int64_t count, int dtype, void* out);

// nf4_matvec.cu

// scale (x A^T) B^T for A [ranks, K] and B [N, ranks], of the dtype of x or float32; ranks 0 for none.
struct Nf4Adapter {
  const void *a, *b;
  int dtype;
  int64_t ranks;
  float scale;
  float* u;       // [rows, ranks]
  int* counters;  // 3 zeros, and zeros again afterwards
};

// y = base + x W^T + the adapter's part for up to 16 rows; base [rows, N], or [N] with a stride of 0, or null, may be
// y. `spans` for half precision with K and blocks of multiples of 64, x and A 16-byte and packed 8-byte aligned;
// without it the adapter is float32.
int nf4_matvec(void* stream, Nf4 w, const void* x, int dtype, int64_t rows, int64_t width, int64_t height,
               const void* base, int64_t base_stride, void* y, int64_t y_stride, Nf4Adapter adapter, bool spans);

// lora.cu: rows [rows, ...] name one of `adapters`, or -1 for none, with A [adapters, ranks, width], B [adapters,
// height, ranks], u and v [rows, ranks]. Rows without an adapter are left as they are.

// u = scale[adapter] x A^T. A has the dtype of x if that is half precision and the width a multiple of 64, or float32.
// Where the width is a multiple of 8, x and A are 16-byte aligned and the stride is a multiple of 8.
int lora_shrink(void* stream, const void* x, int dtype, int64_t stride, int64_t rows, int64_t width,
                const int64_t* adapter, const void* a, int a_dtype, int64_t adapters, int64_t ranks,
                const float* scale, float* u);
// y += u B^T. B has the dtype of y or float32.
int lora_expand(void* stream, const float* u, const int64_t* adapter, const void* b, int b_dtype, int64_t adapters,
                int64_t ranks, void* y, int dtype, int64_t stride, int64_t rows, int64_t height);
// grad [adapters, ranks, width] = v^T x over the rows of each adapter.
int lora_outer(void* stream, const float* v, int64_t ranks, const void* x, int dtype, int64_t stride, int64_t rows,
               int64_t width, const int64_t* adapter, int64_t adapters, float* grad);

// packed_layout.cu: what posttrain/ops/layout.py computes elsewhere, integer for integer.

// visible_until and positions [tokens] of a checked forest (csrc/layout.h) of fewer than 2^31 tokens and segments, in a
// workspace [3, segments].
int layout_expand(void* stream, const int32_t* lengths, const int32_t* parents, int64_t segments, int64_t tokens,
                  int32_t* workspace, int32_t* visible_until, int32_t* positions);
// PackedLayout.schedule, [5, blocks].
int layout_schedule(void* stream, const int32_t* visible_until, const int32_t* positions, int64_t tokens,
                    int32_t* schedule, int64_t blocks);

// paged_attention.cu

// Keys or values [pages, page_size, key_heads, width]; strides in elements, lines aligned to 16 bytes.
struct PagedView {
  const void* data;
  int64_t page, token, head;
};

// One query of each sequence over its pages. Every split of paged_split() keys leaves its part, of
// [sequences, heads, splits], in part_out [.., width], part_top and part_total. window 0, softcap 0, sinks null: none.
struct PagedDecode {
  const void* q;
  int64_t q_token, q_head;
  PagedView k, v;
  const int32_t* table;
  int64_t table_row;
  const int32_t* contexts;
  const float* sinks;
  float *part_out, *part_top, *part_total;
  int sequences, heads, key_heads, width, page_bits, splits;
  float scale, softcap;
  int window;
};
int paged_split();
// out [sequences, heads, width], for width at most 256 in whole 16 bytes.
int paged_decode(void* stream, int dtype, const PagedDecode& f, void* out);

}  // namespace posttrain::cuda
