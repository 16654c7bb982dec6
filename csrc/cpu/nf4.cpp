// NF4 matrices in the layout of bitsandbytes (posttrain/ops/nf4_weight.py describes it): dequantisation, and the
// product with a few rows.
//
// Weights are W_i = absmax * code[q_i] with q in the halves of a byte, the even element in the high one. Values are
// looked up by one permutation of the 16, which reads the low 4 bits of each lane only. So the product reads packed
// bytes as 32-bit lanes, each of 8 weights, and has no need to take them apart: loads that begin 0 to 3 bytes later and
// one shift bring each weight down in turn. x is reordered to meet them.
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

// The same of `count` blocks; here the products pass through memory.
void absmax_of(const Nf4& w, int64_t block, int64_t count, float* out) {
  if (w.nested_absmax == nullptr) {
    __builtin_memcpy(out, w.absmax + block, count * sizeof(float));
    return;
  }
  for (int64_t i = 0, end; i < count; i = end) {
    const int64_t outer = (block + i) / w.nested_block;
    end = (outer + 1) * w.nested_block - block;
    end = end < count ? end : count;
    const float scale = w.nested_absmax[outer];
    for (int64_t j = i; j < end; ++j) out[j] = w.nested_code[w.absmax_index[block + j]] * scale;
  }
  asm volatile("" ::: "memory");
  for (int64_t i = 0; i < count; ++i) out[i] += *w.offset;
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

// A run: as many weights as the nibbles of one vector; its lane l has those from 8 l on.
constexpr int kRun = 8 * kLanes;
constexpr int kBand = 16;     // rows of W that a thread takes at a time,
constexpr int kPiece = 4096;  // and at most as many elements of each
constexpr int kAbsmax = kPiece / 32 + kLanes;  // room for the absmax of a piece of a row, and to load more than there are
constexpr int kSums = kVectorBytes == 64 ? 16 : 8;  // sums that fit in registers
constexpr int kGroup = 8;                           // rows of x at a time

// Whether every row of W is made of whole blocks and whole runs.
inline bool has_runs(const Nf4& w, int64_t width) { return width % w.block == 0 && width % kRun == 0; }

// How many of `rows` rows of x are taken together: groups as even as can be.
inline int group_of(int rows) {
  const int groups = (rows + kGroup - 1) / kGroup;
  return (rows + groups - 1) / groups;
}

// A run of `rows` rows of x as add_runs reads it: element 8 l + e of row r in the order of e, then of r, then of l.
void turn_run(const float* x, int64_t width, int rows, float* out) {
  for (int e = 0; e < 8; ++e)
    for (int r = 0; r < rows; ++r, out += kLanes)
      for (int l = 0; l < kLanes; ++l) out[l] = x[r * width + 8 * l + e];
}

// Keeps v in a register. (GCC 12 would load it again for each use.)
template <class V>
inline V held(V v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

inline VecInt load_words(const uint8_t* p) {
  VecInt q;
  __builtin_memcpy(&q, p, sizeof q);
  return held(q);
}

// A piece of some rows of W and of x.
struct Piece {
  const uint8_t *packed, *next;  // its first row of W, and that of the piece to come
  int64_t stride;                // bytes from row to row
  const float* absmax;           // of its first row of W,
  int64_t absmax_stride;         // from row to row,
  int shift;                     // of blocks of 2^shift elements
  const float* x;

  // Byte b of every word of run i of row c, in the low bits of the lanes. Loading b bytes further costs no shift, but
  // reads b bytes too far, so in the last run of the matrix the bytes are shifted.
  template <bool kLast>
  VecInt bytes(int64_t i, int c, int b) const {
    const uint8_t* p = packed + c * stride + i * (kRun / 2);
    return kLast ? load_words(p) >> 8 * b : load_words(p + b);
  }

  // The absmax of each lane's block in run i of row c; `lanes` are the blocks' numbers.
  Vec<float> scale(int64_t i, int c, VecInt lanes) const {
    const float* p = absmax + c * absmax_stride + (i * kRun >> shift);
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_maskz_permutexvar_ps(__mmask16(-1), (__m512i)lanes, (__m512)load(p));
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_permutevar8x32_ps((__m256)load(p), (__m256i)lanes);
#else
    return splat(*p);  // a run is as long as the smallest block
#endif
  }

  VecInt block_of_lanes() const {
    VecInt lanes;
    for (int l = 0; l < kLanes; ++l) lanes[l] = 8 * l >> shift;
    return lanes;
  }
};

// sums[c][r] += x[r] . W[c] over the runs [first, end), for kHeight rows of W and kRows rows of x. A run is summed
// without its absmax, by which each lane is multiplied once.
template <int kRows, int kHeight, bool kLast>
void add_runs(const Piece& piece, int64_t first, int64_t end, Vec<float>* sums) {
  const Table code(1.0f);
  const VecInt lanes = piece.block_of_lanes();
  const float* x = piece.x + first * kRun * kRows;
  for (int64_t i = first; i < end; ++i) {
    for (int c = 0; c < kHeight; ++c) __builtin_prefetch(piece.next + c * piece.stride + i * (kRun / 2));
    Vec<float> run[kHeight][kRows];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      VecInt q[kHeight];
      for (int c = 0; c < kHeight; ++c) q[c] = piece.bytes<kLast>(i, c, b);
#pragma GCC unroll 2
      for (int low = 0; low < 2; ++low) {
        Vec<float> weight[kHeight];
        for (int c = 0; c < kHeight; ++c) weight[c] = code(low ? q[c] : q[c] >> 4);
        for (int r = 0; r < kRows; ++r, x += kLanes) {
          const Vec<float> v = held(load(x));
          for (int c = 0; c < kHeight; ++c) run[c][r] = b + low == 0 ? weight[c] * v : run[c][r] + weight[c] * v;
        }
      }
    }
    for (int c = 0; c < kHeight; ++c) {
      const Vec<float> scale = piece.scale(i, c, lanes);
      for (int r = 0; r < kRows; ++r) sums[c * kRows + r] += run[c][r] * scale;
    }
  }
}

// add_runs for the elements [k, k + count) of the rows [first, end) of W.
template <int kRows>
void add_piece(const Nf4& w, int64_t first, int64_t end, int64_t k, int64_t count, int64_t width, int64_t height,
               const float* x, Vec<float>* sums) {
  constexpr int kHeight = kSums / kRows < 4 ? kSums / kRows : 4;
  const int64_t runs = count / kRun, stride = width / 2, below = k + count == width ? end : first;
  const int shift = __builtin_ctzll(w.block);
  float copies[kBand * kAbsmax];
  // Scale loads reach up to kLanes - 1 beyond those of the band, so unless the next bands have as many, it has copies.
  const bool copied = w.nested_absmax != nullptr || (height - end) * (width >> shift) < kLanes - 1;
  if (copied)
    for (int64_t n = first; n < end; ++n)
      absmax_of(w, (n * width + k) >> shift, ((count - 1) >> shift) + 1, copies + (n - first) * kAbsmax);
  const float* absmax = copied ? copies : w.absmax + ((first * width + k) >> shift);
  const int64_t absmax_stride = copied ? kAbsmax : width >> shift;
  for (int64_t n = first, rows; n < end; n += rows, sums += rows * kRows) {
    const uint8_t* packed = w.packed + n * stride + k / 2;
    const uint8_t* next = w.packed + below * stride + (k + count) % width / 2;
    if (n + kHeight < end) next = packed + kHeight * stride;
    const float* scales = absmax + (n - first) * absmax_stride;
    const Piece piece = {packed, next, stride, scales, absmax_stride, shift, x + k * kRows};
    if (n + kHeight <= end && n + kHeight < height) {
      rows = kHeight;
      add_runs<kRows, kHeight, false>(piece, 0, runs, sums);
    } else {
      rows = 1;
      const int64_t safe = n + 1 == height && k + count == width ? runs - 1 : runs;
      add_runs<kRows, 1, false>(piece, 0, safe, sums);
      add_runs<kRows, 1, true>(piece, safe, runs, sums);
    }
  }
}

// y[r, n] = x[r] . W[n] for kRows rows of x and the rows [first, end) of W, at most kBand.
template <int kRows>
void dot_band(const Nf4& w, int64_t first, int64_t end, int64_t width, int64_t height, const float* x, float* y) {
  Vec<float> sums[kBand * kRows] = {};
  // The piece of x stays in the first cache.
  constexpr int64_t kCount = kRows > 4 ? kPiece / 4 : kRows > 1 ? kPiece / 2 : kPiece;
  for (int64_t k = 0; k < width; k += kCount)
    add_piece<kRows>(w, first, end, k, width - k < kCount ? width - k : kCount, width, height, x, sums);
  for (int64_t n = first; n < end; n += kLanes)
    for (int r = 0; r < kRows; ++r) {
      Vec<float> parts[kLanes];
      for (int i = 0; i < kLanes; ++i) parts[i] = sums[(n - first + i) * kRows + r];
      turn<float>(parts);
      for (int i = 1; i < kLanes; ++i) parts[0] += parts[i];
      store_part(y + r * height + n, parts[0], end - n < kLanes ? end - n : kLanes);
    }
}

void dot_rows(const Nf4& w, int64_t first, int64_t end, int64_t width, int64_t height, const float* x, int rows,
              float* y) {
  constexpr decltype(&dot_band<1>) bands[kGroup] = {dot_band<1>, dot_band<2>, dot_band<3>, dot_band<4>,
                                                    dot_band<5>, dot_band<6>, dot_band<7>, dot_band<8>};
  for (int r = 0, group; r < rows; r += group) {
    group = group_of(rows - r);
    bands[group - 1](w, first, end, width, height, x + r * width, y + r * height);
  }
}

void dot_runs(const Nf4& w, const float* x, float* turned, int rows, int64_t width, int64_t height, float* y) {
#pragma omp parallel if (width * height > 32768)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < width; k += kRun)
      for (int r = 0, group; r < rows; r += group) {
        group = group_of(rows - r);
        turn_run(x + r * width + k, width, group, turned + r * width + k * group);
      }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < height; n += kBand)
      dot_rows(w, n, n + kBand < height ? n + kBand : height, width, height, turned, rows, y);
  }
}

constexpr int kSlice = 1024;  // elements of a row of W that are dequantised at a time

template <class T>
T dot(const T* a, const T* b, int64_t count) {
  Vec<T> sums = {};
  T rest = 0;
  int64_t i = 0;
  for (; i + Lanes<T>::n <= count; i += Lanes<T>::n) sums += load(a + i) * load(b + i);
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum<T>(sums) + rest;
}

// y[:, n] = x . W[n], for any width and block.
template <class T>
void dot_row(const Nf4& w, int64_t n, int64_t width, int64_t height, const T* x, int rows, T* y) {
  T slice[kSlice];
  for (int r = 0; r < rows; ++r) y[r * height + n] = 0;
  for (int64_t k = 0; k < width; k += kSlice) {
    const int64_t start = n * width + k, count = width - k < kSlice ? width - k : kSlice;
    for (int64_t i = start, next; i < start + count; i = next) {
      next = (i / w.block + 1) * w.block;
      next = next < start + count ? next : start + count;
      dequantize_run(w.packed, absmax_of(w, i / w.block), i, next, slice + (i - start));
    }
    for (int r = 0; r < rows; ++r) y[r * height + n] += dot<T>(x + r * width + k, slice, count);
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
void nf4_matvec(const Nf4& w, const T* x, T* turned, int rows, int64_t width, int64_t height, T* y) {
  if constexpr (sizeof(T) == 4)
    if (has_runs(w, width)) return dot_runs(w, x, turned, rows, width, height, y);
#pragma omp parallel for schedule(static) if (width * height > 32768)
  for (int64_t n = 0; n < height; ++n) dot_row(w, n, width, height, x, rows, y);
}

#define INSTANTIATE(T)                                                     \
  template void nf4_dequantize<T>(const Nf4&, int64_t, int64_t, T*);       \
  template void nf4_matvec<T>(const Nf4&, const T*, T*, int, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
