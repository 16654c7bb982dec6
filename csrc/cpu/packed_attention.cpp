// Attention over a packed forest of tokens (posttrain/ops/packed_attention.py has the formulas).
//
// A *panel* is up to kRows rows, each a query of a tile under one head of a group that shares keys: [heads][queries].
// Forward, the lanes of a vector of scores are rows, so the softmax needs no sums across lanes. Backward they are
// keys, and only the keys are transposed, once for all the queries they meet.
//
// The backward divides each tree into chunks of tokens. A task is one chunk of queries with one chunk of keys i >= j of
// a tree of n chunks, under one key head; step t = 0, 1, ..., n - 1 runs those with (i + j) mod n = t, about n / 2, no
// two of which share queries or keys. So each sum has one order whatever the number of threads, without atomics or
// copies of the gradients.
#include <omp.h>

#include "cpu/attention_tile.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

// x[keys][head][0, size), where it is if that is whole vectors, else copied.
template <class T>
Lines<T> lines(View<const T> x, KeyRange keys, int64_t head, int64_t size, T* copy) {
  const T* from = x.data + keys.begin * x.token + head * x.head;
  if (size % Lanes<T>::n == 0) return {from, x.token};
  const int64_t line = padded<T>(size);
  for (int64_t k = 0; k < keys.end - keys.begin; ++k) copy_line(from + k * x.token, size, T(1), copy + k * line);
  return {copy, line};
}

// Up to kRows rows: each of a tile's queries under each of `heads` query heads from `head` on.
template <class T>
struct Panel {
  const Attention<T>& f;
  const QueryTile& tile;
  int64_t head, heads;
  int64_t key_head;
  int64_t rows;
  int64_t first_position, last_position;

  Panel(const Attention<T>& f, const QueryTile& tile, int64_t head, int64_t heads)
      : f(f), tile(tile), head(head), heads(heads), key_head(head / (f.heads / f.key_heads)), rows(heads * tile.count) {
    first_position = last_position = f.positions[tile.first];
    for (int64_t q = tile.first; q < tile.first + tile.count; ++q) {
      const int64_t position = f.positions[q];
      first_position = position < first_position ? position : first_position;
      last_position = position > last_position ? position : last_position;
    }
  }

  // Rows, up to whole vectors.
  int64_t width() const { return padded<T>(rows); }

  int64_t query(int64_t row) const { return tile.first + row % tile.count; }

  const T* line(View<const T> x, int64_t row) const {
    return x.data + query(row) * x.token + (head + row / tile.count) * x.head;
  }

  // Calls body(row, token, head) for every row.
  template <class Body>
  void each_row(Body body) const {
    for (int64_t h = 0, row = 0; h < heads; ++h)
      for (int64_t i = 0; i < tile.count; ++i, ++row) body(row, tile.first + i, head + h);
  }

  // Calls body(keys, masked) for every block of at most kKeys of the keys `within` of which some row sees some; masked
  // if not all see all.
  template <class Body>
  void each_block(KeyRange within, Body body) const {
    for (int64_t i = 0; i < tile.num_ancestors; ++i) each_block_of(common(tile.ancestors[i], within), body);
    each_block_of(common(tile.own, within), body);
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
};

// Calls body(panel) for the panels of a tile that share a key head.
template <class T, class Body>
void each_panel(const Attention<T>& f, const QueryTile& tile, int64_t key_head, Body body) {
  const int64_t group = f.heads / f.key_heads;
  const int64_t most = kRows / tile.count;
  for (int64_t h = 0; h < group; h += most)
    body(Panel<T>(f, tile, key_head * group + h, group - h < most ? group - h : most));
}

// Hides what rows don't see of s[key][kRows].
template <class T>
void mask_keys(const Panel<T>& panel, KeyRange keys, T* s) {
  typedef typename Index<T>::type I;
  const Attention<T>& f = panel.f;
  I query[kRows], position[kRows];
  for (int64_t row = 0; row < panel.width(); ++row) {
    query[row] = I(panel.query(row));
    position[row] = f.positions[query[row]];
  }
  for (int64_t k = keys.begin; k < keys.end; ++k, s += kRows)
    for (int64_t r = 0; r < panel.width(); r += Lanes<T>::n) {
      Mask<T> hidden = load_indices<T>(query + r) < I(k);
      if (f.window > 0) hidden |= load_indices<T>(position + r) - I(f.positions[k]) >= I(f.window);
      store(s + r, hidden ? splat(T(-kInfinity)) : load(s + r));
    }
}

template <class T>
void forward_panel(const Panel<T>& panel, T* out, double* lse, T* workspace) {
  const Attention<T>& f = panel.f;
  const int64_t line = padded<T>(f.value_width);
  T* qt = workspace;
  T* s = qt + f.width * kRows;
  T* o = s + kKeys * kRows;
  T* values = o + kRows * line;
  T m[kRows], l[kRows];
  for (int i = 0; i < kRows; ++i) m[i] = T(-kInfinity), l[i] = T(0);
  for (int64_t i = 0; i < panel.rows * line; ++i) o[i] = T(0);
  transpose([&](int64_t row) { return panel.line(f.q, row); }, panel.rows, f.width, T(f.scale), qt, kRows);
  panel.each_block({0, f.tokens}, [&](KeyRange keys, bool masked) {
    const int64_t count = keys.end - keys.begin;
    const T* k = f.k.data + keys.begin * f.k.token + panel.key_head * f.k.head;
    multiply<T, false>({k, f.k.token, 1}, qt, kRows, s, kRows, count, f.width, panel.width());
    if (f.softcap > 0) cap_scores(s, kRows, count, panel.width(), T(f.softcap));
    if (masked) mask_keys(panel, keys, s);
    online_softmax(s, count, panel.rows, m, l, o, line);
    const Lines<T> v = lines(f.v, keys, panel.key_head, f.value_width, values);
    multiply<T, true>({s, 1, kRows}, v.data, v.stride, o, line, panel.rows, count, line);
  });
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    const auto [inverse, row_lse] = end_row(m[row], l[row], f.sinks ? f.sinks + head : nullptr);
    T* to = out + (token * f.heads + head) * f.value_width;
    for (int64_t d = 0; d < f.value_width; ++d) to[d] = o[row * line + d] * inverse;
    lse[head * f.tokens + token] = row_lse;
  });
}

// delta[head][token] = grad_out . out, added up exactly as the products grad_out . v are: where a query sees one key
// only, the two are the same number, and the gradient of its score is 0.
template <class T>
void output_products(const Attention<T>& f, const AttentionGradients<T>& g, int64_t token) {
  constexpr int n = Lanes<T>::n;
  for (int64_t head = 0; head < f.heads; head += n) {
    const T* out = g.out + (token * f.heads + head) * f.value_width;
    const T* grad = g.grad_out.data + token * g.grad_out.token + head * g.grad_out.head;
    const int64_t heads = f.heads - head;
    Vec<T> sums = {};
    for (int64_t d = 0; d < f.value_width; d += n) {
      Vec<T> a[n], b[n];
      load_turned<T>([&](int64_t h) { return grad + h * g.grad_out.head + d; }, heads, f.value_width - d, a);
      load_turned<T>([&](int64_t h) { return out + h * f.value_width + d; }, heads, f.value_width - d, b);
      for (int i = 0; i < n; ++i) sums += a[i] * b[i];
    }
    for (int64_t h = 0; h < n && h < heads; ++h) g.delta[(head + h) * f.tokens + token] = sums[h];
  }
}

// A chunk's keys and values under one head, transposed: kt[width][kChunkTokens], vt likewise; and the keys as they are.
template <class T>
struct KeyChunk {
  KeyRange keys;
  const T *kt, *vt;
  Lines<T> k;
};

template <class T>
KeyChunk<T> load_chunk(const Attention<T>& f, KeyRange keys, int64_t head, T*& workspace) {
  T* kt = workspace;
  T* vt = kt + f.width * kChunkTokens;
  T* copy = vt + f.value_width * kChunkTokens + Lanes<T>::n;  // the last line of vt is read up to whole vectors
  workspace = copy + padded<T>(f.width) * kChunkTokens;
  const int64_t count = keys.end - keys.begin;
  const T* k = f.k.data + keys.begin * f.k.token + head * f.k.head;
  const T* v = f.v.data + keys.begin * f.v.token + head * f.v.head;
  transpose([&](int64_t key) { return k + key * f.k.token; }, count, f.width, T(1), kt, kChunkTokens);
  transpose([&](int64_t key) { return v + key * f.v.token; }, count, f.value_width, T(1), vt, kChunkTokens);
  return {keys, kt, vt, lines(f.k, keys, head, f.width, copy)};
}

// Hides what a panel's rows don't see of s[row][kKeys].
template <class T>
void mask_rows(const Panel<T>& panel, KeyRange keys, T* s) {
  typedef typename Index<T>::type I;
  const Attention<T>& f = panel.f;
  const int64_t count = keys.end - keys.begin;
  I key[kKeys], position[kKeys];
  for (int64_t j = 0; j < kKeys; ++j) {
    key[j] = I(keys.begin + j);
    position[j] = f.positions[keys.begin + (j < count ? j : 0)];
  }
  panel.each_row([&](int64_t row, int64_t token, int64_t) {
    for (int64_t j = 0; j < count; j += Lanes<T>::n) {
      Mask<T> hidden = load_indices<T>(key + j) > I(token);
      if (f.window > 0) hidden |= I(f.positions[token]) - load_indices<T>(position + j) >= I(f.window);
      T* at = s + row * kKeys + j;
      store(at, hidden ? splat(T(-kInfinity)) : load(at));
    }
  });
}

// What the backward knows of a row: delta, and its log-sum-exp in two parts, so that p is right at large scores too.
template <class T>
struct RowStatistics {
  T lse, lse_low, delta;
};

// From scores s and dp = dO V^T: probabilities into s, and gradients of the scores before the cap into dp.
template <class T>
void score_gradients(T* s, T* dp, int64_t rows, int64_t keys, T cap, const RowStatistics<T>* statistics) {
  for (int64_t row = 0; row < rows; ++row, s += kKeys, dp += kKeys) {
    const auto [lse, lse_low, delta] = statistics[row];
    for (int64_t j = 0; j < keys; j += Lanes<T>::n) {
      const Vec<T> z = load(s + j), p = exp_or_zero((z - lse) - lse_low);
      Vec<T> g = p * (load(dp + j) - delta);
      if (cap > 0) g *= p > T(0) ? T(1) - z * z * (1 / (cap * cap)) : splat(T(0));
      store(s + j, p);
      store(dp + j, g);
    }
  }
}

template <class T>
void backward_panel(const Panel<T>& panel, const KeyChunk<T>& chunk, const AttentionGradients<T>& g, T* workspace) {
  const Attention<T>& f = panel.f;
  const int64_t line = padded<T>(f.width), value_line = padded<T>(f.value_width);
  T* q = workspace;
  T* go = q + kRows * line;
  T* dq = go + kRows * value_line;
  T* s = dq + kRows * line;
  T* ds = s + kRows * kKeys;
  RowStatistics<T> statistics[kRows];
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    const double x = g.lse[head * f.tokens + token];
    const T lse = x > -kInfinity ? T(x) : T(kInfinity);  // a row that sees nothing has p = 0
    statistics[row] = {lse, x > -kInfinity ? T(x - lse) : T(0), g.delta[head * f.tokens + token]};
    copy_line(panel.line(f.q, row), f.width, T(f.scale), q + row * line);
    copy_line(panel.line(g.grad_out, row), f.value_width, T(1), go + row * value_line);
  });
  for (int64_t i = 0; i < panel.rows * line; ++i) dq[i] = T(0);
  panel.each_block(chunk.keys, [&](KeyRange keys, bool masked) {
    const int64_t count = keys.end - keys.begin, rows = panel.rows, first = keys.begin - chunk.keys.begin;
    const T* k = chunk.k.data + first * chunk.k.stride;
    T* dk = g.grad_k + (keys.begin * f.key_heads + panel.key_head) * f.width;
    T* dv = g.grad_v + (keys.begin * f.key_heads + panel.key_head) * f.value_width;
    multiply<T, false>({q, line, 1}, chunk.kt + first, kChunkTokens, s, kKeys, rows, f.width, count);
    multiply<T, false>({go, value_line, 1}, chunk.vt + first, kChunkTokens, ds, kKeys, rows, f.value_width, count);
    if (f.softcap > 0) cap_scores(s, kKeys, rows, count, T(f.softcap));
    if (masked) mask_rows(panel, keys, s);
    score_gradients(s, ds, rows, count, T(f.softcap), statistics);
    multiply<T, true>({ds, kKeys, 1}, k, chunk.k.stride, dq, line, rows, count, line);
    multiply<T, true>({s, 1, kKeys}, go, value_line, dv, f.key_heads * f.value_width, count, rows, f.value_width);
    multiply<T, true>({ds, 1, kKeys}, q, line, dk, f.key_heads * f.width, count, rows, f.width);
  });
  panel.each_row([&](int64_t row, int64_t token, int64_t head) {
    T* to = g.grad_q + (token * f.heads + head) * f.width;
    for (int64_t d = 0; d < f.width; ++d) to[d] += dq[row * line + d] * T(f.scale);
  });
}

KeyRange tokens_of(const TileChunk& chunk, const QueryTile* tiles) {
  const QueryTile& last = tiles[chunk.end - 1];
  return {tiles[chunk.begin].first, last.first + last.count};
}

bool sees_some(const QueryTile& tile, KeyRange keys) {
  for (int64_t i = 0; i < tile.num_ancestors; ++i)
    if (const KeyRange seen = common(tile.ancestors[i], keys); seen.begin < seen.end) return true;
  const KeyRange seen = common(tile.own, keys);
  return seen.begin < seen.end;
}

// Whether no query's window reaches back to these keys.
template <class T>
bool beyond_window(const Attention<T>& f, const QueryTile& tile, KeyRange keys) {
  if (f.window == 0) return false;
  int64_t nearest = f.positions[keys.begin], first = f.positions[tile.first];
  for (int64_t k = keys.begin; k < keys.end; ++k) nearest = nearest > f.positions[k] ? nearest : f.positions[k];
  for (int64_t q = tile.first; q < tile.first + tile.count; ++q)
    first = first < f.positions[q] ? first : f.positions[q];
  return first - nearest >= f.window;
}

// Adds the gradients of one chunk of queries and one of keys under one head.
template <class T>
void backward_cell(const Attention<T>& f, const QueryTile* tiles, const TileChunk& queries, const TileChunk& keys,
                   int64_t key_head, const AttentionGradients<T>& g, T* workspace) {
  const KeyRange range = tokens_of(keys, tiles);
  KeyChunk<T> chunk = {};
  for (int64_t t = queries.begin; t < queries.end; ++t) {
    if (!sees_some(tiles[t], range) || beyond_window(f, tiles[t], range)) continue;
    if (chunk.kt == nullptr) chunk = load_chunk(f, range, key_head, workspace);
    each_panel(f, tiles[t], key_head, [&](const Panel<T>& panel) { backward_panel(panel, chunk, g, workspace); });
  }
}

}  // namespace

template <class T>
int64_t attention_workspace(int64_t width, int64_t value_width, bool backward) {
  const int64_t line = padded<T>(width), value_line = padded<T>(value_width);
  if (!backward) return kRows * (width + kKeys + value_line) + kKeys * value_line;
  return kChunkTokens * (width + value_width + line) + Lanes<T>::n + kRows * (2 * line + value_line + 2 * kKeys);
}

template <class T>
void attention_forward(const Attention<T>& f, const QueryTile* tiles, int64_t num_tiles, T* out, double* lse,
                       T* workspace, int threads) {
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
void attention_backward(const Attention<T>& f, const QueryTile* tiles, const TileChunk* chunks, int64_t num_chunks,
                        int64_t steps, const AttentionGradients<T>& g, T* workspace, int threads) {
  const int64_t size = attention_workspace<T>(f.width, f.value_width, true), tasks = num_chunks * f.key_heads;
#pragma omp parallel num_threads(threads)
  {
    T* own = workspace + omp_get_thread_num() * size;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < f.tokens; ++token) output_products(f, g, token);
    for (int64_t step = 0; step < steps; ++step) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < tasks; ++i) {
        const TileChunk& queries = chunks[i / f.key_heads];
        const int64_t keys = (step - queries.index + queries.count) % queries.count;
        if (step < queries.count && keys <= queries.index)
          backward_cell(f, tiles, queries, (&queries)[keys - queries.index], i % f.key_heads, g, own);
      }
    }
  }
}

#define INSTANTIATE(T)                                                                                           \
  template int64_t attention_workspace<T>(int64_t, int64_t, bool);                                               \
  template void attention_forward<T>(const Attention<T>&, const QueryTile*, int64_t, T*, double*, T*, int);      \
  template void attention_backward<T>(const Attention<T>&, const QueryTile*, const TileChunk*, int64_t, int64_t, \
                                      const AttentionGradients<T>&, T*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
