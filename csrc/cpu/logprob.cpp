// The elementwise half of linear_logprob: a tile of logits, fresh from the GEMM and still in cache, is folded into
// running statistics, or turned into its own gradient (posttrain/ops/logprob.py has the formulas).
//
// The reference m of a row only moves when a tile's maximum exceeds it by more than kSlack: sums stay far from
// overflow (e^16 times the vocabulary), and accumulators that depend on m are almost never rescaled.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr double kSlack = 16.0;
const double kInfinity = __builtin_inf();

// Calls body(offset, lanes) for every vector of a row; lanes < Lanes<T>::n only for the last.
template <class T, class Body>
inline void over_row(int64_t cols, Body body) {
  constexpr int n = Lanes<T>::n;
  int64_t j = 0;
  for (; j + n <= cols; j += n) body(j, n);
  if (j < cols) body(j, int(cols - j));
}

template <class T>
inline Vec<T> get(const T* p, int lanes, T fill) {
  return lanes == Lanes<T>::n ? load(p) : load_part(p, lanes, fill);
}

template <class T>
inline void put(T* p, Vec<T> v, int lanes) {
  lanes == Lanes<T>::n ? store(p, v) : store_part(p, v, lanes);
}

template <class T>
inline Vec<T> transformed(Vec<T> a, Vec<T> bias, const LogitTransform& f) {
  if (f.softcap == 0) return (a + bias) * T(f.scale * f.inverse_temperature);
  return tanh((a + bias) * T(f.scale / f.softcap)) * T(f.softcap * f.inverse_temperature);
}

// d cap(t) / dt from z: 1 - tanh^2.
template <class T>
inline Vec<T> slope(Vec<T> z, const LogitTransform& f) {
  if (f.softcap == 0) return splat(T(1));
  const Vec<T> th = z * T(1 / (f.softcap * f.inverse_temperature));
  return T(1) - th * th;
}

// Logits in place, and their maximum.
template <class T>
T transform_row(T* row, const T* bias, int64_t cols, const LogitTransform& f) {
  Vec<T> top = splat(T(-kInfinity));
  over_row<T>(cols, [&](int64_t j, int lanes) {
    const Vec<T> b = bias ? get(bias + j, lanes, T(0)) : splat(T(0));
    const Vec<T> z = transformed<T>(get(row + j, lanes, T(0)), b, f);
    put(row + j, z, lanes);
    top = max<T>(top, lanes == Lanes<T>::n ? z : load_part(row + j, lanes, T(-kInfinity)));
  });
  return max_lane<T>(top);
}

template <class T>
T max_of_row(const T* row, int64_t cols) {
  Vec<T> top = splat(T(-kInfinity));
  over_row<T>(cols, [&](int64_t j, int lanes) { top = max<T>(top, get(row + j, lanes, T(-kInfinity))); });
  return max_lane<T>(top);
}

// Moves the reference of a row to its new maximum and rescales what depends on it.
template <class T>
void move_reference(T tile_top, T* m, T* s, T* t, T* unit, int64_t width) {
  const T shift = *m - tile_top;
  const bool first = *m == T(-kInfinity);
  const T factor = first ? T(0) : T(__builtin_exp(double(shift)));
  *m = tile_top;
  if (t) *t = first ? T(0) : factor * (*t + shift * *s);
  *s *= factor;
  if (unit && !first)
    for (int64_t j = 0; j < width; ++j) unit[j] *= factor;
}

template <class T, bool kEntropy, bool kUnit>
void fold_row(T* row, int64_t cols, T m, const LogitTransform& f, T* s, T* t) {
  Vec<T> sums = splat(T(0)), weighted = splat(T(0));
  over_row<T>(cols, [&](int64_t j, int lanes) {
    const Vec<T> z = get(row + j, lanes, T(-kInfinity));
    const Vec<T> e = exp_or_zero(z - m);
    sums += e;
    if (kEntropy) weighted += e > T(0) ? e * (z - m) : splat(T(0));
    if (kUnit) put(row + j, f.softcap == 0 ? e : e * (e > T(0) ? slope<T>(z, f) : splat(T(0))), lanes);
  });
  *s += sum<T>(sums);
  if (kEntropy) *t += sum<T>(weighted);
}

}  // namespace

template <class T>
void logprob_fold(T* tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column, const int64_t* targets,
                  const T* bias, LogitTransform f, T* m, T* top, T* s, T* t, T* z_target, T* unit, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * cols > 4096)
  for (int64_t i = 0; i < rows; ++i) {
    T* row = tile + i * stride;
    T tile_top = transform_row(row, bias, cols, f);
    const int64_t y = targets[i] - first_column;
    const bool has_target = y >= 0 && y < cols;
    if (has_target) {
      z_target[i] = row[y];
      row[y] = T(-kInfinity);
      if (z_target[i] >= tile_top) tile_top = max_of_row(row, cols);
    }
    if (tile_top > top[i]) top[i] = tile_top;
    T* unit_row = unit ? unit + i * width : nullptr;
    T* t_row = t ? t + i : nullptr;
    if (!(tile_top <= m[i] + T(kSlack)) && tile_top > T(-kInfinity))
      move_reference(tile_top, m + i, s + i, t_row, unit_row, width);
    const T reference = m[i] == T(-kInfinity) ? T(0) : m[i];
    if (unit && t)
      fold_row<T, true, true>(row, cols, reference, f, s + i, t_row);
    else if (unit)
      fold_row<T, false, true>(row, cols, reference, f, s + i, t_row);
    else if (t)
      fold_row<T, true, false>(row, cols, reference, f, s + i, t_row);
    else
      fold_row<T, false, false>(row, cols, reference, f, s + i, t_row);
    if (has_target && !unit) row[y] = z_target[i];
  }
}

namespace {

// dz = p (pull - grad_entropy (log p + entropy)) for a row without its target; pull = grad_lse - grad_logprob.
template <class T, bool kEntropy>
void grad_row(const T* z_row, T* grad, int64_t cols, const LogitTransform& f, T lse, T lse_low, T pull, T entropy,
              T grad_entropy) {
  const T factor = T(f.scale * f.inverse_temperature);
  over_row<T>(cols, [&](int64_t j, int lanes) {
    const Vec<T> z = get(z_row + j, lanes, T(-kInfinity));
    const Vec<T> log_p = (z - lse) - lse_low;
    const Vec<T> p = exp_or_zero(log_p);
    Vec<T> g = p * (pull * factor);
    if (kEntropy) g -= p > T(0) ? p * (log_p + entropy) * (grad_entropy * factor) : splat(T(0));
    put(grad + j, f.softcap == 0 ? g : g * slope<T>(z, f), lanes);
  });
}

}  // namespace

template <class T>
void logprob_grad(const T* tile, int64_t tile_stride, T* grad, int64_t grad_stride, int64_t rows, int64_t cols,
                  int64_t first_column, const int64_t* targets, const T* bias, LogitTransform f, bool finished,
                  const T* logprob, const T* entropy, const T* lse, const T* lse_low, const T* grad_logprob,
                  const T* grad_entropy, const T* grad_lse) {
#pragma omp parallel for schedule(static) if (rows * cols > 4096)
  for (int64_t i = 0; i < rows; ++i) {
    const T* z = tile + i * tile_stride;
    T* out = grad + i * grad_stride;
    if (!finished) {
      over_row<T>(cols, [&](int64_t j, int lanes) {
        const Vec<T> b = bias ? get(bias + j, lanes, T(0)) : splat(T(0));
        put(out + j, transformed<T>(get(z + j, lanes, T(0)), b, f), lanes);
      });
      z = out;
    }
    const T g = grad_logprob ? grad_logprob[i] : T(0);
    const T g_lse = grad_lse ? grad_lse[i] : T(0);
    const T g_entropy = grad_entropy ? grad_entropy[i] : T(0);
    const T h = grad_entropy ? entropy[i] : T(0);
    const int64_t y = targets[i] - first_column;
    T at_target = T(0);
    if (y >= 0 && y < cols) {
      const double log_p = logprob[i], p = __builtin_exp(log_p);
      const double th = f.softcap == 0 ? 0 : double(z[y]) / (f.softcap * f.inverse_temperature);
      const double dz = -g * __builtin_expm1(log_p) + p * (g_lse - g_entropy * (log_p + h));
      at_target = T(dz * f.scale * f.inverse_temperature * (1 - th * th));
    }
    if (grad_entropy)
      grad_row<T, true>(z, out, cols, f, lse[i], lse_low[i], g_lse - g, h, g_entropy);
    else
      grad_row<T, false>(z, out, cols, f, lse[i], lse_low[i], g_lse - g, h, g_entropy);
    if (y >= 0 && y < cols) out[y] = at_target;
  }
}

#define INSTANTIATE(T)                                                                                            \
  template void logprob_fold<T>(T*, int64_t, int64_t, int64_t, int64_t, const int64_t*, const T*, LogitTransform, T*, \
                                T*, T*, T*, T*, T*, int64_t);                                                      \
  template void logprob_grad<T>(const T*, int64_t, T*, int64_t, int64_t, int64_t, int64_t, const int64_t*, const T*,  \
                                LogitTransform, bool, const T*, const T*, const T*, const T*, const T*, const T*,   \
                                const T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
