// Rotary position embedding of strided heads (posttrain/ops/rope.py derives the formula).
//
// The angles of a block of tokens stay in cache while all heads pass over them.
#include "cpu/rope.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kTokens = 16;  // in a block

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
        turn_head(row, out, cos + angle, sin + angle, width, rotated, transposed);
      }
  }
}

#define INSTANTIATE(T)                                                                                            \
  template void rope<T>(const T*, HeadStrides, T*, HeadStrides, const T*, const T*, int64_t, int64_t, int64_t,      \
                        int64_t, int64_t, int64_t, bool);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
