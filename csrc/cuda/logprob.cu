// The elementwise half of linear_logprob on a GPU: a tile of logits from a library GEMM is folded into running
// statistics, or turned into its own gradient (posttrain/ops/logprob.py has the formulas, csrc/cpu/logprob.cpp the
// same on a CPU).
//
// One block per row, 16 bytes per access. A thread visits the same elements in every pass over its row, so passes need
// no barrier but that of the reductions, whose order is fixed: repeated runs give the same bits.
#include "cuda/device.h"

namespace posttrain::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kSlack = 16.0f;  // how far a tile's maximum may exceed the reference before the reference moves

// out[j] = body(in[j], j) over a row; `out` may be null, and may be `in`.
template <class Body>
__device__ void over_row(const float* in, float* out, int64_t cols, Body body) {
  const int64_t vectors = is_aligned(in) && is_aligned(out) ? cols / 4 : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    float4 v = reinterpret_cast<const float4*>(in)[i];
    v.x = body(v.x, 4 * i);
    v.y = body(v.y, 4 * i + 1);
    v.z = body(v.z, 4 * i + 2);
    v.w = body(v.w, 4 * i + 3);
    if (out) reinterpret_cast<float4*>(out)[i] = v;
  }
  for (int64_t j = 4 * vectors + threadIdx.x; j < cols; j += kThreads) {
    const float v = body(in[j], j);
    if (out) out[j] = v;
  }
}

__device__ float transformed(float a, float bias, const LogitTransform& f) {
  const float scaled = (a + bias) * f.scale;
  return (f.softcap == 0 ? scaled : f.softcap * tanhf(scaled / f.softcap)) * f.inverse_temperature;
}

// d cap(t) / dt from z: 1 - tanh^2.
__device__ float slope(float z, const LogitTransform& f) {
  if (f.softcap == 0) return 1.0f;
  const float th = z / (f.softcap * f.inverse_temperature);
  return 1.0f - th * th;
}

__global__ void __launch_bounds__(kThreads, 3)
    fold_kernel(float* tile, int64_t stride, int64_t cols, int64_t first_column, const int64_t* targets,
                const float* bias, LogitTransform f, float* m, float* top, float* s, float* t, float* z_target,
                float* unit, int64_t width) {
  const int64_t i = blockIdx.x;
  float* row = tile + i * stride;
  const int64_t y = targets[i] - first_column;
  float tile_top = -INFINITY;
  over_row(row, row, cols, [&](float a, int64_t j) {
    const float z = transformed(a, bias ? bias[j] : 0.0f, f);
    if (j == y)
      z_target[i] = z;
    else
      tile_top = fmaxf(tile_top, z);
    return z;
  });
  tile_top = reduce_block<kThreads>(tile_top, -INFINITY, Maximum{});

  const float before = m[i], s_before = s[i], t_before = t ? t[i] : 0.0f;
  const bool moves = !(tile_top <= before + kSlack) && tile_top > -INFINITY;
  const bool first = before == -INFINITY;
  const float after = moves ? tile_top : before;
  const float factor = !moves ? 1.0f : first ? 0.0f : expf(before - after);
  const float reference = after == -INFINITY ? 0.0f : after;
  if (unit && moves && !first)
    over_row(unit + i * width, unit + i * width, width, [=](float u, int64_t) { return u * factor; });

  float sum = 0.0f, weighted = 0.0f;
  over_row(row, unit ? row : nullptr, cols, [&](float z, int64_t j) {
    const float e = j == y ? 0.0f : expf(z - reference);
    sum += e;
    if (e > 0.0f) weighted += e * (z - reference);
    return e > 0.0f ? e * slope(z, f) : e;
  });
  sum = reduce_block<kThreads>(sum, 0.0f, Sum{});
  if (t) weighted = reduce_block<kThreads>(weighted, 0.0f, Sum{});
  if (threadIdx.x != 0) return;
  const float shifted = moves && !first ? (before - after) * s_before : 0.0f;
  if (t) t[i] = (first ? 0.0f : factor * (t_before + shifted)) + weighted;
  s[i] = factor * s_before + sum;
  m[i] = after;
  top[i] = fmaxf(top[i], tile_top);
}

__global__ void __launch_bounds__(kThreads, 3)
    grad_kernel(const float* tile, int64_t tile_stride, float* grad, int64_t grad_stride, int64_t cols,
                int64_t first_column, const int64_t* targets, const float* bias, LogitTransform f, bool finished,
                const float* logprob, const float* entropy, const float* lse, const float* lse_low,
                const float* grad_logprob, const float* grad_entropy, const float* grad_lse) {
  const int64_t i = blockIdx.x;
  const int64_t y = targets[i] - first_column;
  const float g = grad_logprob ? grad_logprob[i] : 0.0f, g_lse = grad_lse ? grad_lse[i] : 0.0f;
  const float g_entropy = grad_entropy ? grad_entropy[i] : 0.0f, h = grad_entropy ? entropy[i] : 0.0f;
  const float high = lse[i], low = lse_low[i], log_p_target = logprob[i];
  const float factor = f.scale * f.inverse_temperature;
  over_row(tile + i * tile_stride, grad + i * grad_stride, cols, [=](float a, int64_t j) {
    const float z = finished ? a : transformed(a, bias ? bias[j] : 0.0f, f);
    const float log_p = j == y ? log_p_target : (z - high) - low;
    const float p = expf(log_p);
    float dz = j == y ? p * g_lse - g * expm1f(log_p) : p * (g_lse - g);
    if (p > 0.0f) dz -= p * g_entropy * (log_p + h);
    return dz * factor * slope(z, f);
  });
}

}  // namespace

int logprob_fold(void* stream, float* tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column,
                 const int64_t* targets, const float* bias, LogitTransform transform, float* m, float* top, float* s,
                 float* t, float* z_target, float* unit, int64_t width) {
  return launch(fold_kernel, rows, kThreads, 0, stream, tile, stride, cols, first_column, targets, bias, transform, m,
                top, s, t, z_target, unit, width);
}

int logprob_grad(void* stream, const float* tile, int64_t tile_stride, float* grad, int64_t grad_stride, int64_t rows,
                 int64_t cols, int64_t first_column, const int64_t* targets, const float* bias,
                 LogitTransform transform, bool finished, const float* logprob, const float* entropy,
                 const float* lse, const float* lse_low, const float* grad_logprob, const float* grad_entropy,
                 const float* grad_lse) {
  return launch(grad_kernel, rows, kThreads, 0, stream, tile, tile_stride, grad, grad_stride, cols, first_column,
                targets, bias, transform, finished, logprob, entropy, lse, lse_low, grad_logprob, grad_entropy,
                grad_lse);
}

}  // namespace posttrain::cuda
