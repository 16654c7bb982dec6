// Drawing tokens (posttrain/ops/sample.py has the formulas).
//
// top_k and min_p give the least z that stays; the k-th largest is found bit by bit, over those parts of the row that may
// hold it. top_p needs no search: the largest z + g among all tokens is that of the tokens that stay, if it stays itself,
// as the weight of the tokens above it says. If it doesn't, everything that stays lies above it, and the next draw is
// among the tokens above. Random numbers are made for groups of kGroup tokens, and only for groups of which some token
// may still win, as g is at most kMostGumbel.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int kGroup = 64;
constexpr int kCounters = kGroup / 4;
constexpr int64_t kChunk = 4096;         // weights summed in float, in lanes; chunks are summed in double
constexpr float kMostGumbel = 16.6356f;  // -log(-log(1 - 2^-24)), rounded up
constexpr float kInfinity = __builtin_inff();
constexpr int kLanes = Lanes<float>::n;

// log x to 2 ulp for normal x > 0: x = m 2^e with m in [sqrt(1/2), sqrt(2)), and log m from a polynomial (a fit by the
// least maximum of the relative error, 6e-9).
inline Vec<float> log(Vec<float> x) {
  const VecInt bits = (VecInt)x - 0x3f3504f3;  // of sqrt(1/2)
  const VecInt e = bits >> 23;
  const Vec<float> z = (Vec<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> p = splat(-7.63447439e-2f);
  p = p * z + 1.27615682e-1f;
  p = p * z + -1.31601866e-1f;
  p = p * z + 1.42017595e-1f;
  p = p * z + -1.66233571e-1f;
  p = p * z + 2.00012268e-1f;
  p = p * z + -2.50008210e-1f;
  p = p * z + 3.33333317e-1f;
  const Vec<float> exponent = __builtin_convertvector(e, Vec<float>);
  const Vec<float> square = z * z;
  const Vec<float> low = exponent * -2.12194440e-4f + (p * z * square - square * 0.5f);
  return exponent * 0.693359375f + (low + z);
}

// A row of logits as z = (logit - top) * inverse_temperature.
struct Row {
  const float* logits;
  int64_t size;
  float top, inverse_temperature;

  float z(int64_t i) const { return (logits[i] - top) * inverse_temperature; }

  Vec<float> z(int64_t i, int lanes) const {
    const Vec<float> x = lanes == kLanes ? load(logits + i) : load_part(logits + i, lanes, -kInfinity);
    return (x - top) * inverse_temperature;
  }

  // Calls body(offset, lanes) for the vectors of tokens begin <= i < end.
  template <class Body>
  void each_vector(int64_t begin, int64_t end, Body body) const {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
    if (i < end) body(i, int(end - i));
  }

  int64_t chunk_end(int64_t begin) const { return begin + kChunk < size ? begin + kChunk : size; }
};

// Sets the largest logit and says whether there is a distribution: no NaN, no infinity, not all minus infinity.
bool find_top(Row& row) {
  Vec<float> top = splat(-kInfinity), sick = splat(0.0f);
  row.each_vector(0, row.size, [&](int64_t i, int lanes) {
    const Vec<float> x = lanes == kLanes ? load(row.logits + i) : load_part(row.logits + i, lanes, -kInfinity);
    top = max<float>(top, x);
    sick = x == x ? sick : splat(1.0f);
  });
  row.top = max_lane<float>(top);
  return max_lane<float>(sick) == 0 && row.top > -kInfinity && row.top < kInfinity;
}

// The weight of the tokens with z > limit, all if that is minus infinity: 0 only where there are none, as the largest
// token weighs 1.
double weight_above(const Row& row, float limit) {
  double weight = 0;
  for (int64_t begin = 0; begin < row.size; begin += kChunk) {
    Vec<float> sums = {};
    row.each_vector(begin, row.chunk_end(begin), [&](int64_t i, int lanes) {
      const Vec<float> z = row.z(i, lanes);
      sums += z > limit ? exp_or_zero(z) : splat(0.0f);
    });
    weight += sum<float>(sums);
  }
  return weight;
}

// Numbers in the order of the floats z they come from, NaN excepted; and the float bits they come from.
inline VecInt ordered(Vec<float> z) {
  const VecInt bits = (VecInt)z;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float unordered(int32_t number) {
  return ((Vec<float>)((VecInt{} + number) ^ (((VecInt{} + number) >> 31) & 0x7fffffff)))[0];
}

// The row in at most kParts parts, with the largest number (as by `ordered`) in each.
struct Parts {
  static constexpr int64_t kParts = 2048;
  int64_t length, count;
  int32_t largest[kParts];

  explicit Parts(const Row& row) {
    length = (row.size + kParts - 1) / kParts;
    length = length < kGroup ? kGroup : (length + kLanes - 1) / kLanes * kLanes;
    count = (row.size + length - 1) / length;
    for (int64_t p = 0; p < count; ++p) {
      Vec<float> top = splat(-kInfinity);
      each_vector(row, p, [&](Vec<float> z) { top = max<float>(top, z); });
      largest[p] = ordered(splat(max_lane<float>(top)))[0];
    }
  }

  template <class Body>
  void each_vector(const Row& row, int64_t part, Body body) const {
    const int64_t end = (part + 1) * length < row.size ? (part + 1) * length : row.size;
    row.each_vector(part * length, end, [&](int64_t i, int lanes) { body(row.z(i, lanes)); });
  }

  // Whether at least k numbers are at least `least`; parts without any are passed over.
  bool enough(const Row& row, int64_t k, int32_t least) const {
    for (int64_t p = 0; p < count && k > 0; ++p) {
      if (largest[p] < least) continue;
      VecInt counts = {};
      each_vector(row, p, [&](Vec<float> z) { counts -= ordered(z) >= least; });
      for (int lane = 0; lane < kLanes; ++lane) k -= counts[lane];
    }
    return k <= 0;
  }
};

// The k-th largest z, and the weight of those and of all equal to the last of them.
struct Largest {
  float last;
  double weight;
};

// The number of the k-th is found bit by bit.
Largest find_largest(const Row& row, int64_t k) {
  const Parts parts(row);
  int32_t kth = INT32_MIN;
  for (int64_t bit = int64_t(1) << 31; bit > 0; bit >>= 1)
    if (parts.enough(row, k, int32_t(kth + bit))) kth = int32_t(kth + bit);
  double weight = 0;
  for (int64_t p = 0; p < parts.count; ++p) {
    if (parts.largest[p] < kth) continue;
    Vec<float> sums = {};
    parts.each_vector(row, p, [&](Vec<float> z) { sums += ordered(z) >= kth ? exp_or_zero(z) : splat(0.0f); });
    weight += sum<float>(sums);
  }
  return {unordered(kth), weight};
}

typedef uint32_t VecWord __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecPair __attribute__((vector_size(kVectorBytes)));

// Products of the lower words of pairs.
inline VecPair multiply_low(VecPair a, uint32_t factor) {
#if defined(__AVX512F__) && !defined(__clang__)
  typedef long long Result __attribute__((vector_size(kVectorBytes)));
  return (VecPair)__builtin_ia32_pmuludq512_mask((VecInt)a, VecInt{} + int32_t(factor), Result{}, 0xff);
#elif defined(__AVX2__) && !defined(__clang__)
  return (VecPair)__builtin_ia32_pmuludq256((VecInt)a, VecInt{} + int32_t(factor));
#elif defined(__SSE2__) && !defined(__clang__)
  return (VecPair)__builtin_ia32_pmuludq128((VecInt)a, VecInt{} + int32_t(factor));
#else
  return (a & 0xffffffff) * factor;
#endif
}

struct Product {
  VecWord high, low;
};

inline Product multiply(VecWord a, uint32_t factor) {
  const VecPair even = multiply_low((VecPair)a, factor), odd = multiply_low((VecPair)a >> 32, factor);
  const VecPair upper = VecPair{} + 0xffffffff00000000;
  return {(VecWord)((even >> 32) | (odd & upper)), (VecWord)((even & ~upper) | (odd << 32))};
}

// Philox 4x32-10 at the counters first, first + 1, ...: words[w][c].
void philox(uint32_t first, uint64_t key, uint64_t offset, uint32_t (*words)[kCounters]) {
  VecWord lane_numbers;
  for (int lane = 0; lane < kLanes; ++lane) lane_numbers[lane] = lane;
  for (int c = 0; c < kCounters; c += kLanes) {
    VecWord w0 = lane_numbers + (first + c), w1 = {}, w2 = VecWord{} + uint32_t(offset);
    VecWord w3 = VecWord{} + uint32_t(offset >> 32);
    uint32_t low_key = uint32_t(key), high_key = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, low_key += 0x9E3779B9, high_key += 0xBB67AE85) {
      const Product a = multiply(w0, 0xD2511F53), b = multiply(w2, 0xCD9E8D57);
      w0 = b.high ^ w1 ^ low_key;
      w1 = b.low;
      w2 = a.high ^ w3 ^ high_key;
      w3 = a.low;
    }
    const VecWord result[4] = {w0, w1, w2, w3};
    for (int w = 0; w < 4; ++w) __builtin_memcpy(words[w] + c, &result[w], sizeof w0);
  }
}

// The first token with the largest z + g among those with z > limit and z >= floor.
int64_t draw(const Row& row, float limit, float floor, uint64_t seed, uint64_t offset) {
  Vec<float> best = splat(-kInfinity);
  VecInt where = {};
  float leader = -kInfinity;
  VecInt lane_numbers;
  for (int lane = 0; lane < kLanes; ++lane) lane_numbers[lane] = lane;
  for (int64_t begin = 0; begin < row.size; begin += kGroup) {
    const int64_t end = begin + kGroup < row.size ? begin + kGroup : row.size;
    float z[kGroup];
    Vec<float> top = splat(-kInfinity);
    row.each_vector(begin, end, [&](int64_t i, int lanes) {
      Vec<float> own = row.z(i, lanes);
      own = (own > limit) & (own >= floor) ? own : splat(-kInfinity);
      store(z + (i - begin), own);
      top = max<float>(top, own);
    });
    if (!(max_lane<float>(top) + kMostGumbel > leader)) continue;
    uint32_t words[4][kCounters];
    philox(uint32_t(begin / 4), seed, offset, words);
    for (int64_t i = begin; i < end; i += kLanes) {
      VecInt word;
      __builtin_memcpy(&word, &words[0][0] + (i - begin), sizeof word);
      const VecInt upper = (word >> 9) & 0x7fffff;
      const Vec<float> u = (__builtin_convertvector(upper, Vec<float>) + 0.5f) * (1.0f / (1 << 23));
      const Vec<float> value = load(z + (i - begin)) - log(-log(u));
      const VecInt better = value > best;
      best = better ? value : best;
      where = better ? lane_numbers + int32_t(i) : where;
    }
    leader = max_lane<float>(best);
  }
  int64_t token = row.size;
  for (int lane = 0; lane < kLanes; ++lane)
    if (best[lane] == leader && where[lane] < token) token = where[lane];
  return token;
}

// `weight` is that of all tokens, `floor` what min_p leaves.
int64_t draw_filtered(const Row& row, double weight, int64_t top_k, double top_p, float floor, uint64_t seed,
                      uint64_t offset) {
  if (top_k > 0 && top_k < row.size) {
    const Largest largest = find_largest(row, top_k);
    floor = largest.last > floor ? largest.last : floor;
    weight = largest.weight;
  }
  float limit = -kInfinity;
  for (;;) {
    const int64_t token = draw(row, limit, floor, seed, offset);
    if (top_p >= 1) return token;
    limit = row.z(token);
    const double above = weight_above(row, limit);
    if (above == 0 || above < top_p * weight) return token;
  }
}

int64_t first_of_largest(const Row& row) {
  for (int64_t i = 0; i < row.size; ++i)
    if (row.logits[i] == row.top) return i;
  return 0;
}

}  // namespace

void sample_row(const SampleBatch& batch, int64_t r, int64_t* tokens, float* logprobs) {
  const double temperature = batch.temperature[r] == 0 ? 1 : batch.temperature[r];
  Row row = {batch.logits + r * batch.stride, batch.size, 0, float(1 / temperature)};
  tokens[r] = 0;
  logprobs[r] = __builtin_nanf("");
  if (!find_top(row)) return;
  const double weight = weight_above(row, -kInfinity);
  tokens[r] = batch.temperature[r] == 0
                  ? first_of_largest(row)
                  : draw_filtered(row, weight, batch.top_k[r], batch.top_p[r], float(__builtin_log(batch.min_p[r])),
                                  batch.seeds[r], batch.offsets[r]);
  const double z = (double(row.logits[tokens[r]]) - row.top) / temperature;
  logprobs[r] = float(z - __builtin_log(weight));
}

void sample(const SampleBatch& batch, int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t r = 0; r < batch.rows; ++r) sample_row(batch, r, tokens, logprobs);
}

}  // namespace posttrain::POSTTRAIN_ISA
