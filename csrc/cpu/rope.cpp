// Rotary position embedding of strided heads (posttrain/ops/rope.py derives the formula).
//
// The angles of a block of tokens stay in cache while all heads pass over them.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kTokens = 16;  // in a block

// Turns the pairs (x[j], x[j + half]), n of them from j on: y = x cos + rotate(x) sin, or its transpose.
template <class T>
struct Pairs {
  const T *x, *cos, *sin;
  T* y;
  int64_t half;
  bool transposed;

  void turn(Vec<T> a, Vec<T> b, Vec<T> cos_a, Vec<T> cos_b, Vec<T> sin_a, Vec<T> sin_b, Vec<T>& u, Vec<T>& v) const {
    u = transposed ? a * cos_a + b * sin_b : a * cos_a - b * sin_a;
    v = transposed ? b * cos_b - a * sin_a : b * cos_b + a * sin_b;
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

}  // namespace

template <class T>
void rope(const T* x, HeadStrides from, T* y, HeadStrides to, const T* cos, const T* sin, int64_t angle_batch_stride,
          int64_t batch, int64_t heads, int64_t tokens, int64_t width, int64_t rotated, bool transposed) {
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
#pragma omp parallel for schedule(static) if (batch * heads * tokens * width > 8192)
  for (int64_t piece = 0; piece < batch * blocks; ++piece) {
    const int64_t b = piece / blocks, first = piece % blocks * kTokens;
    const int64_t count = tokens - first < kTokens ? tokens - first : kTokens;
    const bool heads_inside = from.head < from.token;
    const int64_t inner = heads_inside ? heads : count;
    const int64_t outer = heads_inside ? count : heads;
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t head = heads_inside ? i : o, token = first + (heads_inside ? o : i);
        const T* row = x + b * from.batch + head * from.head + token * from.token;
        T* out = y + b * to.batch + head * to.head + token * to.token;
        const int64_t angle = b * angle_batch_stride + token * rotated;
        Pairs<T>{row, cos + angle, sin + angle, out, rotated / 2, transposed}.run();
        for (int64_t j = rotated; j < width; ++j) out[j] = row[j];
      }
  }
}

#define INSTANTIATE(T)                                                                                            \
  template void rope<T>(const T*, HeadStrides, T*, HeadStrides, const T*, const T*, int64_t, int64_t, int64_t,      \
                        int64_t, int64_t, int64_t, bool);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
