// Rotary embedding of a step's queries and keys, the keys and the values straight into the cache
// (posttrain/ops/rope_cache.py).
#include "cpu/rope.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kSmall = 1 << 15;  // elements that one thread takes alone

}  // namespace

template <class T>
void rope_cache_tokens(const StepHeads<T>& s, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T *cos = s.cos + t * s.rotated, *sin = s.sin + t * s.rotated;
    for (int64_t h = 0; h < s.heads; ++h)
      turn_head<false>(s.q.data + t * s.q.token + h * s.q.head, s.out + (t * s.heads + h) * s.width, cos, sin, s.width,
                       s.rotated);
    const int64_t slot = s.slots[t] * s.key_heads * s.width;
    for (int64_t h = 0; h < s.key_heads; ++h) {
      turn_head<false>(s.k.data + t * s.k.token + h * s.k.head, s.keys + slot + h * s.width, cos, sin, s.width,
                       s.rotated);
      const T* v = s.v.data + t * s.v.token + h * s.v.head;
      for (int64_t j = 0; j < s.width; ++j) s.values[slot + h * s.width + j] = v[j];
    }
  }
}

template <class T>
void rope_cache(const StepHeads<T>& s, int64_t tokens) {
  constexpr int64_t together = 8;
  const int64_t pieces = (tokens + together - 1) / together;
#pragma omp parallel for schedule(static) if (tokens * (s.heads + 2 * s.key_heads) * s.width > kSmall)
  for (int64_t i = 0; i < pieces; ++i)
    rope_cache_tokens(s, i * together, (i + 1) * together < tokens ? (i + 1) * together : tokens);
}

#define INSTANTIATE(T)                                                          \
  template void rope_cache_tokens<T>(const StepHeads<T>&, int64_t, int64_t);    \
  template void rope_cache<T>(const StepHeads<T>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
