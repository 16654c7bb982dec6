// Attention over a paged cache (posttrain/ops/paged_attention.py has the formulas).
//
// A *panel* is up to kRows rows: the queries of some slices under the heads of a group, [queries][heads]. Its slices
// begin with the same pages; all its rows go through the blocks of keys that are common to all, then each branch of
// slices through what is common to it, at last each slice through its own: a key is read once for all rows it is shared
// by. A row goes through blocks of kKeys keys, aligned to positions, in order, and the arithmetic of a row depends
// neither on the other rows nor on their number. So a query's result has the same bits whatever is in the batch, and
// whether its sequence is computed in one piece or token by token; for a sequence whose keys packed attention takes in
// the same blocks, as it does in a pack without shared prompts, they are packed attention's.
//
// With many rows the lanes of a vector of scores are rows, as in packed attention. With a few they are keys, turned in
// registers; the sum of a row's probabilities still runs through its keys one by one.
#include <omp.h>

#include "cpu/attention_tile.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kFew = 8;

template <class T>
struct PagedPanel {
  const PagedAttention<T>& f;
  const QuerySlice* slices;
  int64_t key_head, head, heads;  // query heads from `head` on
  int64_t rows = 0, line;
  T *q, *qt, *s, *o, *values;
  T m[kRows], l[kRows];
  typename Index<T>::type position[kRows + Lanes<T>::n] = {};

  PagedPanel(const PagedAttention<T>& f, const QuerySlice* slices, int64_t head, int64_t heads, T* workspace)
      : f(f), slices(slices), key_head(head / (f.heads / f.key_heads)), head(head), heads(heads),
        line(padded<T>(f.width)) {
    q = workspace;
    qt = q + kRows * line;
    s = qt + f.width * kRows + Lanes<T>::n;  // the last line of qt is read up to whole vectors
    o = s + kKeys * kRows;
    values = o + kRows * line;
  }

  // Calls body(row, token, head) for the rows of the slices.
  template <class Body>
  void each_row(SlicePanel panel, Body body) const {
    int64_t row = 0;
    for (int64_t i = panel.begin; i < panel.end; ++i)
      for (int64_t t = 0; t < slices[i].end - slices[i].begin; ++t)
        for (int64_t h = 0; h < heads; ++h) body(row++, slices[i].token + t, head + h);
  }

  void start(SlicePanel panel) {
    for (int64_t i = panel.begin; i < panel.end; ++i)
      for (int64_t p = slices[i].begin; p < slices[i].end; ++p)
        for (int64_t h = 0; h < heads; ++h) position[rows++] = p;
    each_row(panel, [&](int64_t row, int64_t token, int64_t head) {
      copy_line(f.q.data + token * f.q.token + head * f.q.head, f.width, T(f.scale), q + row * line);
      m[row] = T(-kInfinity), l[row] = T(0);
      for (int64_t d = 0; d < line; ++d) o[row * line + d] = T(0);
    });
    if (rows > kFew) transpose([&](int64_t row) { return q + row * line; }, rows, f.width, T(1), qt, kRows);
  }

  void finish(SlicePanel panel, T* out) const {
    each_row(panel, [&](int64_t row, int64_t token, int64_t head) {
      const T factor = end_row(m[row], l[row], f.sinks ? f.sinks + head : nullptr).factor;
      T* to = out + (token * f.heads + head) * f.width;
      for (int64_t d = 0; d < f.width; ++d) to[d] = o[row * line + d] * factor;
    });
  }

  // Takes the rows of slices begin <= i < end, the first of which is `row`, through their blocks from `block` on.
  void descend(int64_t begin, int64_t end, int64_t row, int64_t block) {
    if (end - begin == 1) return through(slices[begin], row, count_rows(begin, end), block * kKeys, slices[begin].end);
    int64_t common = slices[begin + 1].common;
    for (int64_t i = begin + 2; i < end; ++i) common = slices[i].common < common ? slices[i].common : common;
    through(slices[begin], row, count_rows(begin, end), block * kKeys, common * kKeys);
    for (int64_t i = begin, next; i < end; row += count_rows(i, next), i = next) {
      next = i + 1;
      while (next < end && slices[next].common > common) ++next;
      descend(i, next, row, common);
    }
  }

  int64_t count_rows(int64_t begin, int64_t end) const {
    int64_t queries = 0;
    for (int64_t i = begin; i < end; ++i) queries += slices[i].end - slices[i].begin;
    return queries * heads;
  }

  // Takes `count` rows from `row` on through the keys begin <= k < end of a slice's sequence.
  void through(const QuerySlice& slice, int64_t row, int64_t count, int64_t begin, int64_t end) {
    int64_t low = position[row], high = low;
    for (int64_t r = row; r < row + count; ++r) {
      low = position[r] < low ? position[r] : low;
      high = position[r] > high ? position[r] : high;
    }
    for (; begin < end; begin += kKeys) {
      const KeyRange keys = {begin, begin + kKeys < end ? begin + kKeys : end};
      if (f.window > 0 && low - (keys.end - 1) >= f.window) continue;
      const bool masked = keys.end - 1 > low || (f.window > 0 && high - keys.begin >= f.window);
      const T *k[kKeys], *v[kKeys];
      find(f.k, slice.sequence, keys, k);
      find(f.v, slice.sequence, keys, v);
      if (line != f.width)
        for (int64_t i = 0; i < keys.end - keys.begin; ++i) {
          copy_line(v[i], f.width, T(1), values + i * line);
          v[i] = values + i * line;
        }
      if (count > kFew)
        many(row, count, keys, masked, k, v);
      else
        few(row, count, keys, masked, k, v);
    }
  }

  // Where the keys of a sequence lie.
  void find(const Pages<T>& pages, int64_t sequence, KeyRange keys, const T** at) const {
    const int32_t* table = f.table.pages + sequence * f.table.stride;
    const int64_t mask = (int64_t(1) << f.table.page_bits) - 1;
    for (int64_t k = keys.begin; k < keys.end; ++k)
      at[k - keys.begin] =
          pages.data + table[k >> f.table.page_bits] * pages.page + (k & mask) * pages.token + key_head * pages.head;
  }

  // One block for rows as lanes.
  void many(int64_t row, int64_t count, KeyRange keys, bool masked, const T* const* k, const T* const* v) {
    const int64_t size = keys.end - keys.begin, width = padded<T>(count);
    multiply<T, false>(LinePointers<T>{k}, Lines<T>{qt + row, kRows}, s, kRows, size, f.width, width);
    if (f.softcap > 0) cap_scores(s, kRows, size, width, T(f.softcap));
    if (masked) hide(row, width, keys);
    T top[kRows], sum[kRows];
    for (int64_t r = 0; r < width; ++r) {
      top[r] = r < count ? m[row + r] : T(0);
      sum[r] = r < count ? l[row + r] : T(0);
    }
    online_softmax(s, size, count, top, sum, o + row * line, line);
    for (int64_t r = 0; r < count; ++r) m[row + r] = top[r], l[row + r] = sum[r];
    multiply<T, true>(Scalars<T>{s, 1, kRows}, LinePointers<T>{v}, o + row * line, line, count, size, line);
  }

  // Hides what rows don't see of s[key][kRows].
  void hide(int64_t row, int64_t width, KeyRange keys) {
    typedef typename Index<T>::type I;
    T* at = s;
    for (int64_t k = keys.begin; k < keys.end; ++k, at += kRows)
      for (int64_t r = 0; r < width; r += Lanes<T>::n) {
        const Mask<T> own = load_indices<T>(position + row + r);
        Mask<T> hidden = own < I(k);
        if (f.window > 0) hidden |= own - I(k) >= I(f.window);
        store(at + r, hidden ? splat(T(-kInfinity)) : load(at + r));
      }
  }

  // One block for keys as lanes: s[row][kKeys].
  void few(int64_t row, int64_t count, KeyRange keys, bool masked, const T* const* k, const T* const* v) {
    const int64_t size = keys.end - keys.begin;
    const T* from = q + row * line;
    switch (count) {
      case 1: turned_products<1>(from, k, size); break;
      case 2: turned_products<2>(from, k, size); break;
      case 3: turned_products<3>(from, k, size); break;
      case 4: turned_products<4>(from, k, size); break;
      case 5: turned_products<5>(from, k, size); break;
      case 6: turned_products<6>(from, k, size); break;
      case 7: turned_products<7>(from, k, size); break;
      case 8: turned_products<8>(from, k, size); break;
    }
    if (f.softcap > 0) cap_scores(s, kKeys, count, padded<T>(size), T(f.softcap));
    for (int64_t r = 0; r < count; ++r) {
      if (masked) hide_in_row(s + r * kKeys, position[row + r], keys);
      softmax_row(s + r * kKeys, size, row + r);
    }
    multiply<T, true>(Scalars<T>{s, kKeys, 1}, LinePointers<T>{v}, o + row * line, line, count, size, line);
  }

  // s[c][j] = from[c] . k[j]
  template <int C>
  void turned_products(const T* from, const T* const* k, int64_t size) {
    constexpr int n = Lanes<T>::n;
    for (int64_t j = 0; j < size; j += n) {
      Vec<T> sums[C] = {};
      for (int64_t d = 0; d < f.width; d += n) {
        Vec<T> v[n];
        load_turned([&](int64_t r) { return k[j + r] + d; }, size - j, f.width - d, T(1), v);
        for (int i = 0; i < n; ++i)
          for (int c = 0; c < C; ++c) sums[c] += splat(from[c * line + d + i]) * v[i];
      }
      for (int c = 0; c < C; ++c) store(s + c * kKeys + j, sums[c]);
    }
  }

  void hide_in_row(T* at, int64_t own, KeyRange keys) const {
    for (int64_t k = keys.begin; k < keys.end; ++k)
      if (k > own || (f.window > 0 && own - k >= f.window)) at[k - keys.begin] = T(-kInfinity);
  }

  // online_softmax for one row of `size` scores, which may be written up to whole vectors.
  void softmax_row(T* at, int64_t size, int64_t row) {
    constexpr int n = Lanes<T>::n;
    for (int64_t j = size; j < padded<T>(size); ++j) at[j] = T(-kInfinity);
    Vec<T> tops = splat(m[row]);
    for (int64_t j = 0; j < size; j += n) tops = max<T>(tops, load(at + j));
    const T top = max_lane<T>(tops), reference = top > T(-kInfinity) ? top : T(0);
    const T factor = exp_or_zero(splat(m[row]) - reference)[0];
    for (int64_t j = 0; j < size; j += n) store(at + j, exp_or_zero(load(at + j) - reference));
    T sum = l[row] * factor;
    for (int64_t j = 0; j < size; ++j) sum += at[j];
    m[row] = top, l[row] = sum;
    if (factor < 1)
      for (T* to = o + row * line; to < o + (row + 1) * line; to += n) store(to, load(to) * factor);
  }
};

}  // namespace

template <class T>
int64_t paged_workspace(int64_t width) {
  const int64_t line = padded<T>(width);
  return kRows * (2 * line + width + kKeys) + kKeys * line + Lanes<T>::n;
}

template <class T>
void paged_attention(const PagedAttention<T>& f, const QuerySlice* slices, const SlicePanel* panels,
                     int64_t num_panels, T* out, T* workspace, int threads) {
  const int64_t size = paged_workspace<T>(f.width), tasks = num_panels * f.key_heads, group = f.heads / f.key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) {
    const SlicePanel task = panels[i / f.key_heads];
    const int64_t first = i % f.key_heads * group;
    int64_t queries = 0;
    for (int64_t j = task.begin; j < task.end; ++j) queries += slices[j].end - slices[j].begin;
    const int64_t most = kRows / queries;
    for (int64_t h = 0; h < group; h += most) {
      PagedPanel<T> panel(f, slices, first + h, group - h < most ? group - h : most,
                          workspace + omp_get_thread_num() * size);
      panel.start(task);
      panel.descend(task.begin, task.end, 0, 0);
      panel.finish(task, out);
    }
  }
}

#define INSTANTIATE(T)                                                                                   \
  template int64_t paged_workspace<T>(int64_t);                                                          \
  template void paged_attention<T>(const PagedAttention<T>&, const QuerySlice*, const SlicePanel*, int64_t, T*, T*, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
