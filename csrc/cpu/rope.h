// Rotary embedding of one head (posttrain/ops/rope.py derives the formula).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

// Turns the pairs (x[j], x[j + half]), n of them from j on: y = x cos + rotate(x) sin, or its transpose. The choice is made
// by the compiler and not in the loop, where it would decide about which of the two products is rounded: the same bits
// come out of every kernel.
template <class T, bool kTransposed>
struct Pairs {
  const T *x, *cos, *sin;
  T* y;
  int64_t half;

  void turn(Vec<T> a, Vec<T> b, Vec<T> cos_a, Vec<T> cos_b, Vec<T> sin_a, Vec<T> sin_b, Vec<T>& u, Vec<T>& v) const {
    u = kTransposed ? a * cos_a + b * sin_b : a * cos_a - b * sin_a;
    v = kTransposed ? b * cos_b - a * sin_a : b * cos_b + a * sin_b;
  }

  void run() const {
    constexpr int n = Lanes<T>::n;
    const int64_t h = half;
    Vec<T> u, v;
    int64_t j = 0;
    for (; j + n <= h; j += n) {
      turn(load(x + j), load(x + h + j), load(cos + j), load(cos + h + j), load(sin + j), load(sin + h + j), u, v);
      store(y + j, u);
      store(y + h + j, v);
    }
    if (j < h) {
      const int m = int(h - j);
      const auto part = [=](const T* p) { return load_part(p, m, T(0)); };
      turn(part(x + j), part(x + h + j), part(cos + j), part(cos + h + j), part(sin + j), part(sin + h + j), u, v);
      store_part(y + j, u, m);
      store_part(y + h + j, v, m);
    }
  }
};

// Turns the first `rotated` elements of x[0, width) by the angles, or back; copies the others. y may be x.
template <bool kTransposed, class T>
inline void turn_head(const T* x, T* y, const T* cos, const T* sin, int64_t width, int64_t rotated) {
  Pairs<T, kTransposed>{x, cos, sin, y, rotated / 2}.run();
  for (int64_t j = rotated; j < width; ++j) y[j] = x[j];
}

}  // namespace

}  // namespace posttrain::POSTTRAIN_ISA
