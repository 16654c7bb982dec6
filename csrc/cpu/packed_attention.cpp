// Attention over a packed forest of tokens (posttrain/ops/packed_attention.py has the formulas).
//
// The lanes of a vector are queries, so the softmax needs no sums across lanes, and K and V are read where they are,
// one number at a time, each multiplied with a whole vector. A *panel* is up to kRows rows, each a query of a tile
// under one head of a group that shares keys: rows [heads][queries]. Everything about it lies transposed, [.][kRows].
//
// Every product is one micro-kernel: C[c][:] += sum over i of A[c, i] B[i][:] on a block of kBlock c times up to
// kWide vectors, kept in registers.
//
// The backward walks trees: a task owns all keys and queries of one tree under one key head, so sums have one order
// whatever the number of threads, without atomics.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
constexpr int kBlock = 6;
constexpr int kKeys = 96;  // keys at a time

template <class T>
constexpr int kRows = kWide * Lanes<T>::n;

template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + Lanes<T>::n - 1) / Lanes<T>::n * Lanes<T>::n;
}

template <class T>
struct Index {};
template <>
struct Index<float> {
  typedef int32_t type;
};
template <>
struct Index<double> {
  typedef int64_t type;
};
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});  // also a vector of Index<T>

constexpr double kInfinity = __builtin_inf();

// Numbers A[c, i] at a + c * by_c + i * by_i.
template <class T>
struct Scalars {
  const T* a;
  int64_t by_c, by_i;
};

template <class T, int C, int R, bool kAdd>
inline void block(Scalars<T> x, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t n, int last) {
  constexpr int n_lanes = Lanes<T>::n;
  Vec<T> sums[C][R];
  for (int j = 0; j < C; ++j)
    for (int r = 0; r < R; ++r) {
      T* at = c + j * c_stride + r * n_lanes;
      sums[j][r] = !kAdd ? Vec<T>{} : r == R - 1 && last < n_lanes ? load_part(at, last, T(0)) : load(at);
    }
  for (int64_t i = 0; i < n; ++i) {
    Vec<T> rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(b + i * b_stride + r * n_lanes);
    const T* a = x.a + i * x.by_i;
    for (int j = 0; j < C; ++j) {
      const Vec<T> scalar = splat(a[j * x.by_c]);
      for (int r = 0; r < R; ++r) sums[j][r] += scalar * rows[r];
    }
  }
  for (int j = 0; j < C; ++j)
    for (int r = 0; r < R; ++r) {
      T* at = c + j * c_stride + r * n_lanes;
      if (r == R - 1 && last < n_lanes)
        store_part(at, sums[j][r], last);
      else
        store(at, sums[j][r]);
    }
}

template <class T, int R, bool kAdd>
void blocks(Scalars<T> x, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t count, int64_t n, int last) {
  int64_t j = 0;
  for (; j + kBlock <= count; j += kBlock, x.a += kBlock * x.by_c, c += kBlock * c_stride)
    block<T, kBlock, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
  switch (count - j) {
    case 1: return block<T, 1, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
    case 2: return block<T, 2, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
    case 3: return block<T, 3, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
    case 4: return block<T, 4, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
    case 5: return block<T, 5, R, kAdd>(x, b, b_stride, c, c_stride, n, last);
  }
}

// C[c][0, width) (+)= sum over i < n of A[c, i] B[i][0, width) for c < count. B is readable up to whole vectors.
template <class T, bool kAdd>
void multiply(Scalars<T> x, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t count, int64_t n,
              int64_t width) {
  constexpr int lanes = Lanes<T>::n;
  for (int64_t first = 0; first < width; first += kWide * lanes) {
    const int64_t rest = width - first;
    const int vectors = rest >= kWide * lanes ? kWide : int((rest + lanes - 1) / lanes);
    const int last = rest >= vectors * lanes ? lanes : int(rest - (vectors - 1) * lanes);
    switch (vectors) {
      case 1: blocks<T, 1, kAdd>(x, b + first, b_stride, c + first, c_stride, count, n, last); break;
      case 2: blocks<T, 2, kAdd>(x, b + first, b_stride, c + first, c_stride, count, n, last); break;
#if defined(__AVX512F__)
      case 3: blocks<T, 3, kAdd>(x, b + first, b_stride, c + first, c_stride, count, n, last); break;
      case 4: blocks<T, 4, kAdd>(x, b + first, b_stride, c + first, c_stride, count, n, last); break;
#endif
    }
  }
}

// e^x for x <= 0, to 2 ulp; 0 below -87, where numbers get denormal and slow. Like exp, but in half the instructions.
inline Vec<float> decay(Vec<float> x) {
  const Vec<float> floor = splat(-87.0f), magic = splat(12582912.0f);
  const Vec<float> clamped = x < floor ? floor : x;
  const Vec<float> shifted = clamped * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = splat(1.979029912e-4f);
  p = p * r + 1.394470339e-3f;
  p = p * r + 8.333497681e-3f;
  p = p * r + 4.166629538e-2f;
  p = p * r + 1.666666567e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Vec<float> power = (Vec<float>)((VecInt)p + ((VecInt)shifted << 23));
  return x < floor ? splat(0.0f) : power;
}

inline Vec<double> decay(Vec<double> x) { return exp(x); }

template <class T>
inline Mask<T> load_indices(const typename Index<T>::type* p) {
  Mask<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Up to kRows rows: each of a tile's queries under each of `heads` query heads from `head` on.
template <class T>
struct Panel {
  const Attention<T>& f;
  const QueryTile& tile;
  int64_t head, heads;
  int64_t key_head;
  int64_t rows, vectors;
  typename Index<T>::type query[kRows<T>], position[kRows<T>];
  int64_t first_position, last_position;

  Panel(const Attention<T>& f, const QueryTile& tile, int64_t head, int64_t heads)
      : f(f), tile(tile), head(head), heads(heads), key_head(head / (f.heads / f.key_heads)) {
    rows = heads * tile.count;
    vectors = (rows + Lanes<T>::n - 1) / Lanes<T>::n;
    first_position = last_position = f.positions[tile.first];
    for (int64_t i = 0; i < kRows<T>; ++i) {
      const int64_t token = tile.first + (i < rows ? i % tile.count : 0);
      query[i] = token;
      position[i] = f.positions[token];
      if (position[i] < first_position) first_position = position[i];
      if (position[i] > last_position) last_position = position[i];
    }
  }

  int64_t width() const { return vectors * Lanes<T>::n; }

  // Calls body(row, token, head) for every row.
  template <class Body>
  void each_row(Body body) const {
    for (int64_t h = 0, row = 0; h < heads; ++h)
      for (int64_t i = 0; i < tile.count; ++i, ++row) body(row, tile.first + i, head + h);
  }

  // x[token][head][0, size) * factor as to[.][kRows], with zeros in the rows there aren't.
  void transpose(View<const T> x, int64_t size, T factor, T* to) const {
    each_row([&](int64_t row, int64_t token, int64_t h) {
      const T* from = x.data + token * x.token + h * x.head;
      for (int64_t d = 0; d < size; ++d) to[d * kRows<T> + row] = from[d] * factor;
    });
    for (int64_t d = 0; d < size; ++d)
      for (int64_t row = rows; row < width(); ++row) to[d * kRows<T> + row] = T(0);
  }

  // The same as to[row][padded size], with zeros in the columns there aren't.
  void gather(View<const T> x, int64_t size, T factor, T* to) const {
    each_row([&](int64_t row, int64_t token, int64_t h) {
      const T* from = x.data + token * x.token + h * x.head;
      T* line = to + row * padded<T>(size);
      for (int64_t d = 0; d < size; ++d) line[d] = from[d] * factor;
      for (int64_t d = size; d < padded<T>(size); ++d) line[d] = T(0);
    });
  }

  // Calls body(keys, masked) for every block of at most kKeys keys of which some row sees some; masked if not all all.
  template <class Body>
  void each_block(Body body) const {
    for (int64_t i = 0; i < tile.num_ancestors; ++i) each_block_of(tile.ancestors[i], body);
    each_block_of(tile.own, body);
  }

  template <class Body>
  void each_block_of(KeyRange range, Body body) const {
    for (int64_t begin = range.begin; begin < range.end; begin += kKeys) {
      const KeyRange keys = {begin, begin + kKeys < range.end ? begin + kKeys : range.end};
      bool masked = keys.end - 1 > tile.first;
      if (f.window > 0) {
        int64_t low = f.positions[begin], high = low;
        for (int64_t k = begin; k < keys.end; ++k) {
          low = f.positions[k] < low ? f.positions[k] : low;
          high = f.positions[k] > high ? f.positions[k] : high;
        }
        if (first_position - high >= f.window) continue;
        masked |= last_position - low >= f.window;
      }
      body(keys, masked);
    }
  }

  // Scores of the block, before cap and mask: s[key][kRows] = K Q^T.
  void scores(KeyRange keys, const T* qt, T* s) const {
    const T* k = f.k.data + keys.begin * f.k.token + key_head * f.k.head;
    multiply<T, false>({k, f.k.token, 1}, qt, kRows<T>, s, kRows<T>, keys.end - keys.begin, f.width, width());
  }

  void mask(KeyRange keys, T* s) const {
    for (int64_t k = keys.begin; k < keys.end; ++k, s += kRows<T>)
      for (int64_t r = 0; r < width(); r += Lanes<T>::n) {
        Mask<T> hidden = load_indices<T>(query + r) < typename Index<T>::type(k);
        if (f.window > 0)
          hidden |= load_indices<T>(position + r) - typename Index<T>::type(f.positions[k]) >=
                    typename Index<T>::type(f.window);
        store(s + r, hidden ? splat(T(-kInfinity)) : load(s + r));
      }
  }
};

template <class T>
void cap_scores(T* s, int64_t keys, int64_t width, T cap) {
  for (int64_t j = 0; j < keys; ++j, s += kRows<T>)
    for (int64_t r = 0; r < width; r += Lanes<T>::n) store(s + r, tanh(load(s + r) * (1 / cap)) * cap);
}

// Turns scores into e^(s - m), moves m to the new maximum, and rescales the sums l and out^T [rows of out][kRows].
template <class T>
void online_softmax(T* s, int64_t keys, int64_t width, T* m, T* l, T* ot, int64_t value_width) {
  for (int64_t r = 0; r < width; r += Lanes<T>::n) {
    Vec<T> top = load(m + r);
    for (int64_t j = 0; j < keys; ++j) top = max<T>(top, load(s + j * kRows<T> + r));
    const Vec<T> reference = top > T(-kInfinity) ? top : splat(T(0));
    const Vec<T> factor = decay(load(m + r) - reference);
    Vec<T> sums = load(l + r) * factor;
    for (int64_t j = 0; j < keys; ++j) {
      T* at = s + j * kRows<T> + r;
      const Vec<T> p = decay(load(at) - reference);
      store(at, p);
      sums += p;
    }
    store(m + r, top);
    store(l + r, sums);
    if (sum<T>(factor < T(1) ? splat(T(1)) : splat(T(0))) > 0)
      for (int64_t d = 0; d < value_width; ++d) store(ot + d * kRows<T> + r, load(ot + d * kRows<T> + r) * factor);
  }
}

template <class T>
void forward_panel(const Panel<T>& panel, T* out, T* lse, T* workspace) {
  const Attention<T>& f = panel.f;
  T* qt = workspace;
  T* ot = qt + f.width * kRows<T>;
  T* s = ot + f.value_width * kRows<T>;
  T m[kRows<T>], l[kRows<T>];
  for (int i = 0; i < kRows<T>; ++i) m[i] = T(-kInfinity), l[i] = T(0);
  for (int64_t i = 0; i < f.value_width * kRows<T>; ++i) ot[i] = T(0);
  panel.transpose(f.q, f.width, T(f.scale), qt);
  panel.each_block([&](KeyRange keys, bool masked) {
    const int64_t count = keys.end - keys.begin;
    panel.scores(keys, qt, s);
    if (f.softcap > 0) cap_scores(s, count, panel.width(), T(f.softcap));
    if (masked) panel.mask(keys, s);
    online_softmax(s, count, panel.width(), m, l, ot, f.value_width);
    const T* v = f.v.data + keys.begin * f.v.token + panel.key_head * f.v.head;
    multiply<T, true>({v, 1, f.v.token}, s, kRows<T>, ot, kRows<T>, f.value_width, count, panel.width());
  });
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    T sum = l[row], top = m[row], factor = 1;
    if (f.sinks && f.sinks[head] > top) {
      factor = T(__builtin_exp(double(top - f.sinks[head])));
      top = f.sinks[head];
    }
    sum = sum * factor + (f.sinks ? T(__builtin_exp(double(f.sinks[head] - top))) : T(0));
    const T inverse = sum > 0 ? factor / sum : T(0);
    T* line = out + (token * f.heads + head) * f.value_width;
    for (int64_t d = 0; d < f.value_width; ++d) line[d] = ot[d * kRows<T> + row] * inverse;
    lse[head * f.tokens + token] = sum > 0 ? top + T(__builtin_log(double(sum))) : T(-kInfinity);
  });
}

// From scores s and dp = dO V^T: probabilities into s, and gradients of the scores before the cap into dp.
template <class T>
void score_gradients(T* s, T* dp, int64_t keys, int64_t width, T cap, const T* lse, const T* delta, const bool masked,
                     const Panel<T>& panel, KeyRange range) {
  if (cap > 0) cap_scores(s, keys, width, cap);
  if (masked) panel.mask(range, s);
  for (int64_t j = 0; j < keys; ++j, s += kRows<T>, dp += kRows<T>)
    for (int64_t r = 0; r < width; r += Lanes<T>::n) {
      const Vec<T> z = load(s + r), p = decay(z - load(lse + r));
      Vec<T> g = p * (load(dp + r) - load(delta + r));
      if (cap > 0) g *= p > T(0) ? T(1) - z * z * (1 / (cap * cap)) : splat(T(0));
      store(s + r, p);
      store(dp + r, g);
    }
}

template <class T>
void backward_panel(const Panel<T>& panel, const AttentionGradients<T>& g, T* workspace) {
  const Attention<T>& f = panel.f;
  const int64_t row_width = padded<T>(f.width), value_row_width = padded<T>(f.value_width);
  T* qt = workspace;
  T* got = qt + f.width * kRows<T>;
  T* dqt = got + f.value_width * kRows<T>;
  T* s = dqt + f.width * kRows<T>;
  T* ds = s + kKeys * kRows<T>;
  T* q = ds + kKeys * kRows<T>;
  T* go = q + row_width * kRows<T>;
  T lse[kRows<T>], delta[kRows<T>];
  for (int i = 0; i < kRows<T>; ++i) lse[i] = T(kInfinity), delta[i] = T(0);
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    const T* out = g.out + (token * f.heads + head) * f.value_width;
    const T* grad = g.grad_out.data + token * g.grad_out.token + head * g.grad_out.head;
    double product = 0;
    for (int64_t d = 0; d < f.value_width; ++d) product += double(out[d]) * double(grad[d]);
    g.delta[head * f.tokens + token] = delta[row] = T(product);
    const T x = g.lse[head * f.tokens + token];
    lse[row] = x > T(-kInfinity) ? x : T(kInfinity);
  });
  panel.transpose(f.q, f.width, T(f.scale), qt);
  panel.transpose(g.grad_out, f.value_width, T(1), got);
  panel.gather(f.q, f.width, T(f.scale), q);
  panel.gather(g.grad_out, f.value_width, T(1), go);
  for (int64_t i = 0; i < f.width * kRows<T>; ++i) dqt[i] = T(0);
  panel.each_block([&](KeyRange keys, bool masked) {
    const int64_t count = keys.end - keys.begin, width = panel.width();
    const T* k = f.k.data + keys.begin * f.k.token + panel.key_head * f.k.head;
    const T* v = f.v.data + keys.begin * f.v.token + panel.key_head * f.v.head;
    T* dk = g.grad_k + (keys.begin * f.key_heads + panel.key_head) * f.width;
    T* dv = g.grad_v + (keys.begin * f.key_heads + panel.key_head) * f.value_width;
    panel.scores(keys, qt, s);
    multiply<T, false>({v, f.v.token, 1}, got, kRows<T>, ds, kRows<T>, count, f.value_width, width);
    score_gradients(s, ds, count, width, T(f.softcap), lse, delta, masked, panel, keys);
    multiply<T, true>({k, 1, f.k.token}, ds, kRows<T>, dqt, kRows<T>, f.width, count, width);
    multiply<T, true>({s, kRows<T>, 1}, go, value_row_width, dv, f.key_heads * f.value_width, count, panel.rows,
                      f.value_width);
    multiply<T, true>({ds, kRows<T>, 1}, q, row_width, dk, f.key_heads * f.width, count, panel.rows, f.width);
  });
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    T* line = g.grad_q + (token * f.heads + head) * f.width;
    for (int64_t d = 0; d < f.width; ++d) line[d] = dqt[d * kRows<T> + row] * T(f.scale);
  });
}

// Calls body(panel) for the panels of a tile that share a key head.
template <class T, class Body>
void each_panel(const Attention<T>& f, const QueryTile& tile, int64_t key_head, Body body) {
  const int64_t group = f.heads / f.key_heads;
  const int64_t most = kRows<T> / tile.count;
  for (int64_t h = 0; h < group; h += most)
    body(Panel<T>(f, tile, key_head * group + h, group - h < most ? group - h : most));
}

}  // namespace

template <class T>
int64_t attention_tile(int64_t group) {
  return group < kRows<T> ? kRows<T> / group : 1;
}

template <class T>
int64_t attention_workspace(int64_t width, int64_t value_width, bool backward) {
  const int64_t forward_size = (width + value_width + kKeys) * kRows<T>;
  if (!backward) return forward_size;
  return forward_size + (width + kKeys + padded<T>(width) + padded<T>(value_width)) * kRows<T>;
}

template <class T>
void attention_forward(const Attention<T>& f, const QueryTile* tiles, int64_t num_tiles, T* out, T* lse, T* workspace,
                       int threads) {
  const int64_t size = attention_workspace<T>(f.width, f.value_width, false), tasks = num_tiles * f.key_heads;
#pragma omp parallel num_threads(threads)
  {
    T* own = workspace + omp_get_thread_num() * size;
#pragma omp for schedule(dynamic)
    for (int64_t i = tasks - 1; i >= 0; --i)  // in a long sequence the last tiles have the most keys
      each_panel(f, tiles[i / f.key_heads], i % f.key_heads,
                 [&](const Panel<T>& panel) { forward_panel(panel, out, lse, own); });
  }
}

template <class T>
void attention_backward(const Attention<T>& f, const QueryTile* tiles, const Tree* trees, int64_t num_trees,
                        const AttentionGradients<T>& g, T* workspace, int threads) {
  const int64_t size = attention_workspace<T>(f.width, f.value_width, true), tasks = num_trees * f.key_heads;
#pragma omp parallel num_threads(threads)
  {
    T* own = workspace + omp_get_thread_num() * size;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < tasks; ++i) {
      const Tree& tree = trees[i / f.key_heads];
      for (int64_t t = tree.begin; t < tree.end; ++t)
        each_panel(f, tiles[t], i % f.key_heads, [&](const Panel<T>& panel) { backward_panel(panel, g, own); });
    }
  }
}

#define INSTANTIATE(T)                                                                                        \
  template int64_t attention_tile<T>(int64_t);                                                                \
  template int64_t attention_workspace<T>(int64_t, int64_t, bool);                                            \
  template void attention_forward<T>(const Attention<T>&, const QueryTile*, int64_t, T*, T*, T*, int);        \
  template void attention_backward<T>(const Attention<T>&, const QueryTile*, const Tree*, int64_t,            \
                                      const AttentionGradients<T>&, T*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
