// Rotary position embedding of strided heads (posttrain/ops/rope.py derives the formula).
//
// The angles of a block of tokens stay in cache while all heads, of queries and then of keys, pass over them.
#include "cpu/rope.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kTokens = 16;  // in a block

// Turns the tokens begin <= t < end of place `batch`, whose angles these are.
template <bool kTransposed, class T>
void turn_tokens(const TurnedHeads<T>& f, int64_t batch, int64_t begin, int64_t end, const T* cos, const T* sin,
                 int64_t width, int64_t rotated) {
  const T* x = f.x + batch * f.from.batch;
  T* y = f.y + batch * f.to.batch;
  const auto turn = [&](int64_t t, int64_t h) {
    turn_head<kTransposed>(x + h * f.from.head + t * f.from.token, y + h * f.to.head + t * f.to.token,
                           cos + t * rotated, sin + t * rotated, width, rotated);
  };
  if (f.from.head < f.from.token)
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < f.heads; ++h) turn(t, h);
  else
    for (int64_t h = 0; h < f.heads; ++h)
      for (int64_t t = begin; t < end; ++t) turn(t, h);
}

}  // namespace

template <class T>
void rope(const TurnedHeads<T>& q, const TurnedHeads<T>& k, const T* cos, const T* sin, int64_t angle_batch_stride,
          int64_t batch, int64_t tokens, int64_t width, int64_t rotated, bool transposed) {
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
#pragma omp parallel for schedule(static) if (batch * (q.heads + k.heads) * tokens * width > 8192)
  for (int64_t piece = 0; piece < batch * blocks; ++piece) {
    const int64_t b = piece / blocks, begin = piece % blocks * kTokens;
    const int64_t end = begin + kTokens < tokens ? begin + kTokens : tokens, angle = b * angle_batch_stride;
    const TurnedHeads<T>* both[] = {&q, &k};
    for (const TurnedHeads<T>* f : both)
      if (transposed)
        turn_tokens<true>(*f, b, begin, end, cos + angle, sin + angle, width, rotated);
      else
        turn_tokens<false>(*f, b, begin, end, cos + angle, sin + angle, width, rotated);
  }
}

#define INSTANTIATE(T)                                                                                         \
  template void rope<T>(const TurnedHeads<T>&, const TurnedHeads<T>&, const T*, const T*, int64_t, int64_t,    \
                        int64_t, int64_t, int64_t, bool);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
