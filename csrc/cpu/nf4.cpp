// NF4 matrices in the layout of bitsandbytes (posttrain/ops/nf4_weight.py describes it): dequantisation, and the
// product with a few rows.
//
// Weights are W_i = absmax * code[q_i] with q in the halves of a byte, the even element in the high one. The product
// keeps x in two parts, its even and its odd elements, so that the two halves of 4 (8, 16) bytes meet consecutive
// elements and no weight has to change its lane. The code times a block's absmax is made once a block and looked up by
// one permutation.
#include "cpu/kernels.h"
#include "cpu/simd.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace posttrain::POSTTRAIN_ISA {

namespace {

alignas(64) constexpr float kCode[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

constexpr int kLanes = Lanes<float>::n;

// The absmax of a block; through nested statistics with two roundings, as bitsandbytes has it: volatile keeps the
// compiler from joining product and sum.
inline float absmax_of(const Nf4& w, int64_t block) {
  if (w.nested_absmax == nullptr) return w.absmax[block];
  volatile float product = w.nested_code[w.absmax_index[block]] * w.nested_absmax[block / w.nested_block];
  return product + *w.offset;
}

inline int nibble(const uint8_t* packed, int64_t i) {
  return i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
}

// The 16 values of a block, absmax * code, looked up by the low 4 bits of each lane.
struct Table {
  float absmax;
#if defined(__AVX512F__)
  __m512 all;
  explicit Table(float a) : absmax(a), all(_mm512_mul_ps(_mm512_load_ps(kCode), _mm512_set1_ps(a))) {}
  // (The unmasked forms make GCC 12 warn of its own header.)
  Vec<float> operator()(VecInt q) const {
    return (Vec<float>)_mm512_maskz_permutexvar_ps(__mmask16(-1), (__m512i)q, all);
  }
#elif defined(__AVX2__)
  __m256 low, high;
  explicit Table(float a)
      : absmax(a),
        low(_mm256_mul_ps(_mm256_load_ps(kCode), _mm256_set1_ps(a))),
        high(_mm256_mul_ps(_mm256_load_ps(kCode + 8), _mm256_set1_ps(a))) {}
  Vec<float> operator()(VecInt q) const {
    const __m256i index = (__m256i)q;
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return (Vec<float>)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                        upper);
  }
#else
  explicit Table(float a) : absmax(a) {}
  Vec<float> operator()(VecInt q) const {
    Vec<float> v;
    for (int i = 0; i < kLanes; ++i) v[i] = kCode[q[i] & 15];
    return v * absmax;
  }
#endif
  float operator[](int q) const { return kCode[q] * absmax; }
};

// Integers to lanes. (GCC 12 takes __builtin_convertvector apart into single bytes.)
inline VecInt widened(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_maskz_cvtepu8_epi32(__mmask16(-1), _mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (VecInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  VecInt v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// high[0], low[0], high[1], low[1] ... to 2 * kLanes places.
inline void store_in_turn(float* out, Vec<float> high, Vec<float> low) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps((__m512)high, first, (__m512)low));
  _mm512_storeu_ps(out + kLanes, _mm512_permutex2var_ps((__m512)high, second, (__m512)low));
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps((__m256)high, (__m256)low);
  const __m256 odd = _mm256_unpackhi_ps((__m256)high, (__m256)low);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(even, odd, 0x20));
  _mm256_storeu_ps(out + kLanes, _mm256_permute2f128_ps(even, odd, 0x31));
#else
  for (int i = 0; i < kLanes; ++i) out[2 * i] = high[i], out[2 * i + 1] = low[i];
#endif
}

// Elements [i, end) of one block.
void dequantize_run(const uint8_t* packed, float absmax, int64_t i, int64_t end, float* out) {
  const Table table(absmax);
  if (i % 2 && i < end) *out++ = table[nibble(packed, i++)];
  for (; i + 2 * kLanes <= end; i += 2 * kLanes, out += 2 * kLanes) {
    const VecInt q = widened(packed + i / 2);
    store_in_turn(out, table(q >> 4), table(q));
  }
  for (; i < end; ++i) *out++ = table[nibble(packed, i)];
}

void dequantize_run(const uint8_t* packed, float absmax, int64_t i, int64_t end, double* out) {
  for (; i < end; ++i) *out++ = double(kCode[nibble(packed, i)]) * absmax;
}

// x [rows, width], its even and odd elements apart: part p of row r begins at data + (2 r + p) * half.
template <class T>
struct Split {
  const T* data;
  int64_t half;
  // Where element k of row 0 lies; those of row r lie 2 r * half further, element k + 2 one further.
  const T* at(int64_t k) const { return data + (k & 1) * half + (k >> 1); }
};

// sums[r] += row r of x . W over `count` elements of one block; the first is element i of W and k of the row.
template <int kRows>
inline void dot_run(const uint8_t* packed, const Table& table, int64_t i, int64_t k, int64_t count, Split<float> x,
                    Vec<float> (&sums)[kRows][2], float (&rest)[kRows]) {
  const int64_t stride = 2 * x.half;
  const auto add_one = [&] {
    const float w = table[nibble(packed, i)];
    for (int r = 0; r < kRows; ++r) rest[r] += w * x.at(k)[r * stride];
    ++i, ++k, --count;
  };
  if (i % 2 && count > 0) add_one();
  const uint8_t* bytes = packed + i / 2;
  const float *for_high = x.at(k), *for_low = x.at(k + 1);
  for (; count >= 2 * kLanes; count -= 2 * kLanes, i += 2 * kLanes, k += 2 * kLanes) {
    const VecInt q = widened(bytes);
    const Vec<float> high = table(q >> 4), low = table(q);
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += high * load(for_high + r * stride);
      sums[r][1] += low * load(for_low + r * stride);
    }
    bytes += kLanes, for_high += kLanes, for_low += kLanes;
  }
  while (count > 0) add_one();
}

// y[r, n] = row r of x . W[n].
template <int kRows>
void dot_row(const Nf4& w, int64_t n, int64_t width, int64_t height, Split<float> x, float* y) {
  Vec<float> sums[kRows][2];
  float rest[kRows];
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = splat(0.0f), rest[r] = 0;
  const int64_t first = n * width;
  int64_t block = first / w.block, left = (block + 1) * w.block - first;
  for (int64_t k = 0; k < width; ++block, left = w.block) {
    const int64_t count = left < width - k ? left : width - k;
    dot_run(w.packed, Table(absmax_of(w, block)), first + k, k, count, x, sums, rest);
    k += count;
  }
  for (int r = 0; r < kRows; ++r) y[r * height + n] = sum<float>(sums[r][0] + sums[r][1]) + rest[r];
}

// Whether every row of W begins a block and is made of whole vectors.
inline bool aligned(const Nf4& w, int64_t width) { return width % w.block == 0 && w.block % (2 * kLanes) == 0; }

// dot_row for n and n + 1 of an aligned W, in the same order: what is loaded of x serves both.
template <int kRows>
void dot_two(const Nf4& w, int64_t n, int64_t width, int64_t height, Split<float> x, float* y) {
  Vec<float> sums[2][kRows][2];
  for (int c = 0; c < 2; ++c)
    for (int r = 0; r < kRows; ++r) sums[c][r][0] = sums[c][r][1] = splat(0.0f);
  const int64_t stride = 2 * x.half, blocks = width / w.block;
  const uint8_t* bytes = w.packed + n * width / 2;
  const float *for_high = x.at(0), *for_low = x.at(1);
  for (int64_t block = n * blocks; block < (n + 1) * blocks; ++block) {
    const Table tables[2] = {Table(absmax_of(w, block)), Table(absmax_of(w, block + blocks))};
    for (int64_t i = 0; i < w.block; i += 2 * kLanes) {
      const VecInt q[2] = {widened(bytes), widened(bytes + width / 2)};
      const Vec<float> high[2] = {tables[0](q[0] >> 4), tables[1](q[1] >> 4)};
      const Vec<float> low[2] = {tables[0](q[0]), tables[1](q[1])};
      for (int r = 0; r < kRows; ++r) {
        const Vec<float> a = load(for_high + r * stride), b = load(for_low + r * stride);
        for (int c = 0; c < 2; ++c) {
          sums[c][r][0] += high[c] * a;
          sums[c][r][1] += low[c] * b;
        }
      }
      bytes += kLanes, for_high += kLanes, for_low += kLanes;
    }
  }
  for (int c = 0; c < 2; ++c)
    for (int r = 0; r < kRows; ++r) y[r * height + n + c] = sum<float>(sums[c][r][0] + sums[c][r][1]);
}

constexpr int kGroup = kVectorBytes == 64 ? 4 : 2;  // rows of x whose sums with two rows of W fit in registers

template <int kRows>
void dot_group(const Nf4& w, int64_t n, bool two, int64_t width, int64_t height, Split<float>& x, int& rows,
               float*& y) {
  for (; rows >= kRows; rows -= kRows, x.data += 2 * x.half * kRows, y += height * kRows)
    two ? dot_two<kRows>(w, n, width, height, x, y) : dot_row<kRows>(w, n, width, height, x, y);
}

// The rows n and, if `two`, n + 1 of W.
void dot_rows(const Nf4& w, int64_t n, bool two, int64_t width, int64_t height, Split<float> x, int rows, float* y) {
  dot_group<kGroup>(w, n, two, width, height, x, rows, y);
  dot_group<2>(w, n, two, width, height, x, rows, y);
  dot_group<1>(w, n, two, width, height, x, rows, y);
}

void dot_rows(const Nf4& w, int64_t n, bool, int64_t width, int64_t height, Split<double> x, int rows, double* y) {
  for (int r = 0; r < rows; ++r) {
    double total = 0;
    for (int64_t k = 0; k < width; ++k) {
      const int64_t i = n * width + k;
      total += double(kCode[nibble(w.packed, i)]) * absmax_of(w, i / w.block) * x.at(k)[2 * x.half * r];
    }
    y[r * height + n] = total;
  }
}

}  // namespace

template <class T>
void nf4_dequantize(const Nf4& w, int64_t first, int64_t count, T* out) {
  if (count <= 0) return;
  const int64_t end = first + count, blocks = (end - 1) / w.block + 1;
#pragma omp parallel for schedule(static) if (count > 32768)
  for (int64_t block = first / w.block; block < blocks; ++block) {
    const int64_t start = block * w.block > first ? block * w.block : first;
    const int64_t stop = (block + 1) * w.block < end ? (block + 1) * w.block : end;
    dequantize_run(w.packed, absmax_of(w, block), start, stop, out + (start - first));
  }
}

template <class T>
void nf4_matvec(const Nf4& w, const T* x, int64_t half, int rows, int64_t width, int64_t height, T* y) {
  const bool pairs = sizeof(T) == 4 && aligned(w, width);
  const int64_t step = pairs ? 2 : 1;
#pragma omp parallel for schedule(static) if (width * height > 32768)
  for (int64_t n = 0; n < height; n += step) {
    const bool two = pairs && n + 1 < height;
    dot_rows(w, n, two, width, height, Split<T>{x, half}, rows, y);
  }
}

#define INSTANTIATE(T)                                                     \
  template void nf4_dequantize<T>(const Nf4&, int64_t, int64_t, T*);       \
  template void nf4_matvec<T>(const Nf4&, const T*, int64_t, int, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
