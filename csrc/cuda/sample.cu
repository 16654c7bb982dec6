// Drawing tokens on a GPU (posttrain/ops/sample.py has the formulas).
//
// One pass over the vocabulary: a warp holds a part of 512 tokens in registers and leaves of it the largest logit, the
// sum of the weights and the token drawn, all relative to that logit. A second kernel, a block for each row, puts the
// parts together. If the filters reject the token, or have to know what lies above it, only those parts are read once
// more whose largest logit says that they hold such tokens: of a row with little weight in its tail, a few.
//
// The largest z + g is found as the least t = -log(u) e^-z, one logarithm a token: z + g = -log t.
#include "cuda/pack.h"

namespace posttrain::cuda {

namespace {

constexpr int kPart = 512;  // tokens of a warp, 16 of a thread: of each 64, 4 counters with 4 words each
constexpr int kPartThreads = 128, kRowThreads = 512;
constexpr int kNoToken = 0x7fffffff;
constexpr float kLog2E = 1.4426950408889634f;

// e^z to 2 ulp and |z| 2^-24; zero below 2^-126.
__device__ float exp_of(float z) {
  float power = z * kLog2E;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(power));
#else
  power = exp2f(power);
#endif
  return power;
}

// log x to 2 ulp for normal x > 0, as in csrc/cpu/sample.cpp: x = m 2^e with m in [sqrt(1/2), sqrt(2)).
__device__ float log_of(float x) {
  const int bits = __float_as_int(x) - 0x3f3504f3;
  const float e = static_cast<float>(bits >> 23);
  const float z = __int_as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  float p = -7.63447439e-2f;
  p = fmaf(p, z, 1.27615682e-1f);
  p = fmaf(p, z, -1.31601866e-1f);
  p = fmaf(p, z, 1.42017595e-1f);
  p = fmaf(p, z, -1.66233571e-1f);
  p = fmaf(p, z, 2.00012268e-1f);
  p = fmaf(p, z, -2.50008210e-1f);
  p = fmaf(p, z, 3.33333317e-1f);
  const float square = z * z;
  return fmaf(e, 0.693359375f, fmaf(e, -2.12194440e-4f, fmaf(p * z, square, square * -0.5f)) + z);
}

// Numbers in the order of the floats they come from, NaN excepted.
__device__ uint32_t ordered(float z) {
  const uint32_t bits = __float_as_uint(z);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ float unordered(uint32_t number) {
  return __uint_as_float(number ^ (number >> 31 ? 0x80000000u : 0xffffffffu));
}

struct Minimum {
  template <class Number>
  __device__ Number operator()(Number a, Number b) const {
    return a < b ? a : b;
  }
};

template <class Number, class Combine>
__device__ Number over_row(Number x, Number start, Combine combine) {
  return reduce_block<kRowThreads>(x, start, combine);
}

// Philox 4x32-10 at (counter, 0, offset).
__device__ void philox(uint32_t counter, uint64_t key, uint64_t offset, uint32_t (&w)[4]) {
  w[0] = counter, w[1] = 0, w[2] = static_cast<uint32_t>(offset), w[3] = static_cast<uint32_t>(offset >> 32);
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, low_key += 0x9E3779B9u, high_key += 0xBB67AE85u) {
    const uint64_t a = uint64_t{w[0]} * 0xD2511F53u, b = uint64_t{w[2]} * 0xCD9E8D57u;
    w[0] = static_cast<uint32_t>(b >> 32) ^ w[1] ^ low_key;
    w[1] = static_cast<uint32_t>(b);
    w[2] = static_cast<uint32_t>(a >> 32) ^ w[3] ^ high_key;
    w[3] = static_cast<uint32_t>(a);
  }
}

// Sixteen tokens of a thread, those of word w and counter c of its part at [w][c].
struct Held {
  float z[4][4];
  int first;         // the token at [0][0]
  uint32_t counter;  // of the tokens at [..][0]

  static constexpr int kBetweenWords = 16;

  // Logits of a part, minus infinity beyond the vocabulary. `vectors`: four of them lie on their common size.
  template <class T>
  __device__ Held(const T* logits, int size, bool vectors, int part) {
    const int lane = threadIdx.x % 32;
    first = part * kPart + lane / 4 * 64 + lane % 4 * 4;
    counter = part * (kPart / 4) + lane * 4;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int i = first + w * kBetweenWords;
      if (vectors && i + 4 <= size) {
        const Pack<T, 4> four = load_pack<4>(logits + i);
#pragma unroll
        for (int c = 0; c < 4; ++c) z[w][c] = four[c];
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) z[w][c] = i + c < size ? load(logits + i + c) : -INFINITY;
      }
    }
  }

  // Calls body(number, token) for each of the sixteen.
  template <class Body>
  __device__ void each(Body body) {
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int c = 0; c < 4; ++c) body(z[w][c], first + w * kBetweenWords + c);
  }

  __device__ void scale(float top, float inverse_temperature) {
    each([=](float& x, int) { x = (x - top) * inverse_temperature; });
  }
};

// Who came first in a race, and when.
struct Winner {
  float time = INFINITY;
  int token = kNoToken;

  // Lets those of the sixteen that fit run. As -log(u) >= 1 - u, most are known to be late without a logarithm: those
  // that come after the first of the warp's other threads.
  template <class Fits>
  __device__ void race(const Held& held, uint64_t seed, uint64_t offset, Fits fits) {
    float first = time;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint32_t words[4];
      philox(held.counter + c, seed, offset, words);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float z = held.z[w][c], inverse_weight = exp_of(-z);
        const float u = (static_cast<float>(words[w] >> 9) + 0.5f) * (1.0f / (1 << 23));
        if (!((1.0f - u) * inverse_weight < first && fits(z))) continue;
        const float own = -log_of(u) * inverse_weight;
        if (own < first) first = time = own, token = held.first + w * Held::kBetweenWords + c;
      }
      if (c < 3) first = reduce_warp(first, Minimum{});
    }
  }
};

// What is known of 512 tokens: the largest logit, and relative to it the sum of the weights and who won the draw. In a
// row without noise `token` is the first with the largest logit.
struct alignas(16) Part {
  float top, weight;
  Winner winner;
};

template <class T>
__device__ bool in_fours(const T* logits) {
  return reinterpret_cast<uintptr_t>(logits) % sizeof(Pack<T, 4>) == 0;
}

template <class T>
__global__ void __launch_bounds__(kPartThreads)
    parts_kernel(const T* logits, int64_t stride, int size, SampleRows rows, Part* parts, int count) {
  const int64_t r = blockIdx.x;
  const int part = blockIdx.y * (kPartThreads / 32) + threadIdx.x / 32;
  if (part >= count) return;
  logits += r * stride;
  Held held(logits, size, in_fours(logits), part);
  Part own = {-INFINITY, 0.0f, {}};
  held.each([&](float x, int) { own.top = fmaxf(own.top, x); });
  own.top = reduce_warp(own.top, Maximum{});
  const float temperature = rows.temperature[r];
  held.scale(own.top == -INFINITY ? 0.0f : own.top, temperature > 0 ? 1.0f / temperature : 1.0f);
  held.each([&](float z, int) { own.weight += exp_of(z); });
  own.weight = reduce_warp(own.weight, Sum{});
  if (temperature > 0)
    own.winner.race(held, rows.seeds[r], rows.offsets[r], [](float) { return true; });
  else
    held.each([&](float z, int token) {
      if (z == 0.0f) own.winner = {0.0f, Minimum{}(own.winner.token, token)};
    });
  const float time = reduce_warp(own.winner.time, Minimum{});
  const int token = reduce_warp(own.winner.time == time ? own.winner.token : kNoToken, Minimum{});
  own.winner = {time, token};
  if (threadIdx.x % 32 == 0) parts[r * count + part] = own;
}

// The k-th largest of all numbers with which the threads of a block call the argument of `each`, digit by digit.
template <class Each>
__device__ uint32_t kth_largest(int64_t k, Each each) {
  __shared__ int counts[256];
  __shared__ int digit, left;
  uint32_t found = 0;
  int rank = static_cast<int>(k);
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) counts[threadIdx.x] = 0;
    __syncthreads();
    each([&](uint32_t number) {
      if (uint64_t{number} >> (shift + 8) != uint64_t{found} >> (shift + 8)) return;
      atomicAdd(counts + (number >> shift) % 256, 1);
    });
    __syncthreads();
    if (threadIdx.x < 32) {  // a lane has 8 digits, lane 0 the largest
      const int high = 255 - 8 * static_cast<int>(threadIdx.x);
      int own = 0;
      for (int d = high; d > high - 8; --d) own += counts[d];
      int above = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int of_lane = __shfl_up_sync(~0u, above, distance);
        if (threadIdx.x >= static_cast<unsigned>(distance)) above += of_lane;
      }
      above -= own;
      if (above < rank && rank <= above + own) {
        int d = high;
        while (above + counts[d] < rank) above += counts[d--];
        digit = d, left = rank - above;
      }
    }
    __syncthreads();
    found |= static_cast<uint32_t>(digit) << shift;
    rank = left;
  }
  return found;
}

// A row, for the threads of a block together: all get the same answers.
template <class T>
struct Row {
  const T* logits;
  int size;
  const Part* parts;
  int count;
  float top, inverse_temperature;

  __device__ float z(float logit) const { return (logit - top) * inverse_temperature; }

  // Calls body(held) for the parts of this warp that hold tokens that fit; if a z fits, so does every larger one.
  template <class Fits, class Body>
  __device__ void each_part(Fits fits, Body body) const {
    for (int p = threadIdx.x / 32; p < count; p += kRowThreads / 32) {
      if (!fits(z(parts[p].top))) continue;
      Held held(logits, size, in_fours(logits), p);
      held.scale(top, inverse_temperature);
      body(held);
    }
  }

  // The weight of the tokens with z > limit and z >= floor.
  __device__ float weight(float limit, float floor) const {
    const auto fits = [=](float z) { return z > limit && z >= floor; };
    float sum = 0.0f;
    each_part(fits, [&](Held& held) { held.each([&](float z, int) { sum += fits(z) ? exp_of(z) : 0.0f; }); });
    return over_row(sum, 0.0f, Sum{});
  }

  // A draw among the same.
  __device__ int draw(uint64_t seed, uint64_t offset, float limit, float floor) const {
    const auto fits = [=](float z) { return z > limit && z >= floor; };
    Winner winner;
    each_part(fits, [&](Held& held) { winner.race(held, seed, offset, fits); });
    const float time = over_row(winner.time, INFINITY, Minimum{});
    return over_row(winner.time == time ? winner.token : kNoToken, kNoToken, Minimum{});
  }

  // The k-th largest z. It is no less than the k-th largest top of a part.
  __device__ float largest(int64_t k) const {
    float least = -INFINITY;
    if (k <= count)
      least = unordered(kth_largest(k, [&](auto count_in) {
        for (int p = threadIdx.x; p < count; p += kRowThreads) count_in(ordered(z(parts[p].top)));
      }));
    const auto fits = [=](float z) { return z >= least; };
    return unordered(kth_largest(k, [&](auto count_in) {
      each_part(fits, [&](Held& held) {
        held.each([&](float z, int) {
          if (fits(z)) count_in(ordered(z));
        });
      });
    }));
  }

  // `token`, drawn among all, whose weight is `total`, or another one if the filters of row r reject it.
  __device__ int filtered(int token, float total, const SampleRows& rows, int64_t r) const {
    const int64_t k = rows.top_k[r];
    const float p = rows.top_p[r];
    float limit = -INFINITY;
    float floor = fminf(logf(rows.min_p[r]), 0.0f);  // also for NaN or above 1: the largest z is 0 and must stay
    if (k > 0 && k < size) {
      const float last = largest(k);
      floor = fmaxf(floor, last);
      if (p < 1) total = weight(-INFINITY, last);
    }
    for (;; token = draw(rows.seeds[r], rows.offsets[r], limit, floor)) {
      const float own = z(load(logits + token));
      if (own < floor) continue;
      if (p >= 1) return token;
      limit = own;
      const float above = weight(limit, -INFINITY);
      if (above == 0 || above < p * total) return token;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    rows_kernel(const T* logits, int64_t stride, int size, SampleRows rows, const Part* parts, int count,
                int64_t* tokens, float* logprobs) {
  const int64_t r = blockIdx.x;
  const float temperature = rows.temperature[r];
  const bool noisy = temperature > 0;
  Row<T> row = {logits + r * stride, size, parts + r * count, count, 0.0f, noisy ? 1.0f / temperature : 1.0f};
  float top = -INFINITY;
  for (int p = threadIdx.x; p < count; p += kRowThreads) top = fmaxf(top, row.parts[p].top);
  row.top = over_row(top, -INFINITY, Maximum{});
  float weight = 0.0f;
  Winner winner;
  for (int p = threadIdx.x; p < count; p += kRowThreads) {
    const Part part = row.parts[p];
    const float z = row.z(part.top);
    weight += part.weight * exp_of(z);
    const float time = noisy ? part.winner.time * exp_of(-z) : -z;
    if (time < winner.time) winner = {time, part.winner.token};
  }
  weight = over_row(weight, 0.0f, Sum{});
  const bool healthy = weight > 0;  // NaN where a logit is NaN or infinite, or all are minus infinity
  const float time = over_row(winner.time, INFINITY, Minimum{});
  int token = over_row(winner.time == time ? winner.token : kNoToken, kNoToken, Minimum{});
  if (healthy && noisy) token = row.filtered(token, weight, rows, r);
  if (threadIdx.x != 0) return;
  tokens[r] = healthy ? token : 0;
  logprobs[r] = healthy ? row.z(load(row.logits + token)) - logf(weight) : NAN;
}

int parts_of(int64_t size) { return static_cast<int>(divide_up(size, kPart)); }

}  // namespace

int64_t sample_workspace(int64_t rows, int64_t size) { return rows * parts_of(size) * int64_t{sizeof(Part)}; }

int sample(void* stream, int dtype, const void* logits, int64_t stride, int64_t rows, int64_t size,
           SampleRows parameters, void* workspace, int64_t* tokens, float* logprobs) {
  return by_dtype(dtype, [=](auto t) {
    using T = decltype(t);
    const T* own = static_cast<const T*>(logits);
    Part* parts = static_cast<Part*>(workspace);
    const int count = parts_of(size), vocabulary = static_cast<int>(size);
    const Extent grid(rows, divide_up(count, kPartThreads / 32));
    const int status =
        launch(parts_kernel<T>, grid, kPartThreads, stream, own, stride, vocabulary, parameters, parts, count);
    if (status != cudaSuccess) return status;
    return launch(rows_kernel<T>, rows, kRowThreads, stream, own, stride, vocabulary, parameters, parts, count,
                  tokens, logprobs);
  });
}

}  // namespace posttrain::cuda
