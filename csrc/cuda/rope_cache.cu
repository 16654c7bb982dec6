// Rotary embedding of this step's queries and keys, and the write of keys and values into their pages, in one launch
// (posttrain/ops/rope_cache.py). Keys go from the projection to the cache once, without a rotated copy between.
//
// The heads of q, k and v follow one another. A thread has N elements of the first half of a head's rotated part and
// the N that turn with them, or N of those behind that part, which stay. Values move the same way and don't turn.
#include "cuda/pack.h"

namespace posttrain::cuda {

namespace {

constexpr int kThreads = 128;

template <class T, class A, int N>
__global__ void __launch_bounds__(kThreads)
    rope_cache_kernel(HeadRows q, HeadRows k, HeadRows v, const A* cos, const A* sin, const int64_t* slots, int width,
                      int half, T* q_out, T* keys, T* values) {
  const int64_t token = blockIdx.x;
  const int packs = (width - half) / N, own = blockIdx.y * kThreads + threadIdx.x, j = own % packs * N;
  int head = own / packs;
  if (head >= q.heads + k.heads + v.heads) return;
  const bool of_q = head < q.heads, of_v = head >= q.heads + k.heads;
  const HeadRows x = of_q ? q : of_v ? v : k;
  head -= of_q ? 0 : of_v ? q.heads + k.heads : q.heads;
  const T* in = static_cast<const T*>(x.start) + token * x.token_stride + head * x.head_stride;
  T* out = (of_q ? q_out : of_v ? values : keys) + ((of_q ? token : slots[token]) * x.heads + head) * width;
  if (j >= half) {
    store_pack(out + half + j, load_pack<N>(in + half + j));
    return;
  }
  Pack<T, N> a = load_pack<N>(in + j), b = load_pack<N>(in + half + j);
  if (!of_v) {
    const int64_t angle = token * 2 * half + j;
    const Pack<A, N> cos_a = load_pack<N>(cos + angle), cos_b = load_pack<N>(cos + angle + half);
    const Pack<A, N> sin_a = load_pack<N>(sin + angle), sin_b = load_pack<N>(sin + angle + half);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float first = a[n], second = b[n];
      a.set(n, first * cos_a[n] - second * sin_a[n]);
      b.set(n, second * cos_b[n] + first * sin_b[n]);
    }
  }
  store_pack(out + j, a);
  store_pack(out + half + j, b);
}

template <int N, class T, class A>
int turn_in_packs(void* stream, HeadRows q, HeadRows k, HeadRows v, const A* cos, const A* sin, const int64_t* slots,
                  int64_t tokens, int64_t width, int64_t half, T* q_out, T* keys, T* values) {
  const int64_t threads = (q.heads + k.heads + v.heads) * ((width - half) / N);
  return launch(rope_cache_kernel<T, A, N>, Extent(tokens, divide_up(threads, kThreads)), kThreads, stream, q, k, v,
                cos, sin, slots, static_cast<int>(width), static_cast<int>(half), q_out, keys, values);
}

template <class T, class A>
int turn(void* stream, HeadRows q, HeadRows k, HeadRows v, const A* cos, const A* sin, const int64_t* slots,
         int64_t tokens, int64_t width, int64_t half, T* q_out, T* keys, T* values) {
  constexpr int N = 16 / sizeof(T);
  bool aligned = width % N == 0 && half % N == 0;
  for (const HeadRows& x : {q, k, v})
    aligned = aligned && is_aligned(x.start) && x.token_stride % N == 0 && x.head_stride % N == 0;
  for (const void* p : {static_cast<const void*>(cos), static_cast<const void*>(sin), static_cast<const void*>(q_out),
                        static_cast<const void*>(keys), static_cast<const void*>(values)})
    aligned = aligned && is_aligned(p);
  return (aligned ? turn_in_packs<N, T, A> : turn_in_packs<1, T, A>)(stream, q, k, v, cos, sin, slots, tokens, width,
                                                                     half, q_out, keys, values);
}

}  // namespace

int rope_cache(void* stream, int dtype, bool wide_angles, HeadRows q, HeadRows k, HeadRows v, const void* cos,
               const void* sin, const int64_t* slots, int64_t tokens, int64_t width, int64_t half, void* q_out,
               void* keys, void* values) {
  return by_dtype(dtype, [=](auto t) {
    using T = decltype(t);
    const auto with = [=](auto* own_cos, auto* own_sin) {
      return turn(stream, q, k, v, own_cos, own_sin, slots, tokens, width, half, static_cast<T*>(q_out),
                  static_cast<T*>(keys), static_cast<T*>(values));
    };
    return wide_angles ? with(static_cast<const float*>(cos), static_cast<const float*>(sin))
                       : with(static_cast<const T*>(cos), static_cast<const T*>(sin));
  });
}

}  // namespace posttrain::cuda
