// Vectors of the width of the instruction set being compiled, on GCC/Clang vector types: no intrinsics, so the same
// source serves x86 and ARM. `Vec<float>` has Lanes<float>::n lanes; comparisons give all-ones masks of the integer
// type of the same size, and `mask ? a : b` selects.
#pragma once

#include <cstddef>
#include <cstdint>

namespace posttrain::POSTTRAIN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Lanes {
  static constexpr int n = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Lanes<T>::type;
typedef int32_t VecInt __attribute__((vector_size(kVectorBytes)));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Whether stream() may write to p.
template <class T>
inline bool can_stream(const T* p) {
  return (uintptr_t)p % kVectorBytes == 0;
}

// store() past the caches, for results too large to stay there: their old contents are not read first. A thread that
// has streamed calls stream_end() before others read.
template <class T>
inline void stream(T* p, Vec<T> v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, (Vec<T>*)p);
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512((float*)p, (Vec<float>)v);
#elif defined(__AVX__)
  __builtin_ia32_movntps256((float*)p, (Vec<float>)v);
#elif defined(__SSE__)
  __builtin_ia32_movntps((float*)p, (Vec<float>)v);
#else
  store(p, v);
#endif
}

inline void stream_end() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

// x - 0 is x, so this is one broadcast; x + 0 would have to turn -0 into 0.
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// The first n < Lanes lanes of p; the others are `fill`.
template <class T>
inline Vec<T> load_part(const T* p, int n, T fill) {
  Vec<T> v = splat(fill);
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* p, Vec<T> v, int n) {
  __builtin_memcpy(p, &v, n * sizeof(T));
}

template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
inline T sum(Vec<T> v) {
  T lanes[Lanes<T>::n];
  store(lanes, v);
  for (int half = Lanes<T>::n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T>
inline T max_lane(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < Lanes<T>::n; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Lanes of a, b one after the other, picked by their numbers.
template <class T, class I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, I lanes) {
#if defined(__clang__)
  Vec<T> v;
  for (int i = 0; i < Lanes<T>::n; ++i) v[i] = lanes[i] < Lanes<T>::n ? a[lanes[i]] : b[lanes[i] - Lanes<T>::n];
  return v;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Transposes the square v. Each of log2(n) rounds interleaves line i with line i + n / 2.
template <class T>
inline void turn(Vec<T>* v) {
  constexpr int n = Lanes<T>::n;
  decltype(Vec<T>{} < Vec<T>{}) low = {}, high = {};
  for (int i = 0; i < n; ++i) {
    low[i] = i / 2 + i % 2 * n;
    high[i] = low[i] + n / 2;
  }
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = shuffle<T>(v[i], v[i + n / 2], low);
      next[2 * i + 1] = shuffle<T>(v[i], v[i + n / 2], high);
    }
    for (int i = 0; i < n; ++i) v[i] = next[i];
  }
}

// e^x = fraction 2^n: x = n ln2 + r with |r| <= ln2/2, and a polynomial of degree 7 in r (a least-maximum fit, relative
// error 1e-9).
struct ExpParts {
  Vec<float> fraction;
  VecInt n;
};

inline ExpParts exp_parts(Vec<float> x) {
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = splat(1.979029912e-4f);
  p = p * r + 1.394470339e-3f;
  p = p * r + 8.333497681e-3f;
  p = p * r + 4.166629538e-2f;
  p = p * r + 1.666666567e-1f;
  p = p * r + 0.5f;
  return {p * r * r + r + 1.0f, (VecInt)shifted - (VecInt)magic};
}

// e^x to 2 ulp; n is added to the exponent in two halves so that results near the ends of the range stay right. Below
// -103.98 the result is 0, above 88.73 infinity.
inline Vec<float> exp(Vec<float> x) {
  const ExpParts parts = exp_parts(max<float>(splat(-104.0f), x < 89.0f ? x : splat(89.0f)));
  const VecInt half = parts.n >> 1;
  const Vec<float> low = (Vec<float>)((half + 127) << 23);
  const Vec<float> high = (Vec<float>)((parts.n - half + 127) << 23);
  const Vec<float> result = parts.fraction * low * high;
  return x == x ? result : x;  // NaN stays NaN
}

inline Vec<double> exp(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < Lanes<double>::n; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// e^x for x up to 88, or 0 below -87, where numbers would get denormal and slow: exp without its care for the ends of
// the range. NaN stays NaN.
inline Vec<float> exp_or_zero(Vec<float> x) {
  const ExpParts parts = exp_parts(x);
  const Vec<float> power = (Vec<float>)((parts.n + 127) << 23);
  return x < -87.0f ? splat(0.0f) : parts.fraction * power;
}

inline Vec<double> exp_or_zero(Vec<double> x) {
  return x < -87.0 ? splat(0.0) : exp(x);
}

// tanh x to 3 ulp: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that formula elsewhere.
inline Vec<float> tanh(Vec<float> x) {
  const Vec<float> x2 = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 + -5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 + -3.33332819422e-1f;
  const Vec<float> near = p * x2 * x + x;
  const Vec<float> far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  return (x < 0.625f) & (x > -0.625f) ? near : far;
}

inline Vec<double> tanh(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < Lanes<double>::n; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

}  // namespace posttrain::POSTTRAIN_ISA
