// Attention over a paged cache (posttrain/ops/paged_attention.py has the formulas).
//
// A *panel* is up to kRows rows: the queries of some slices under the heads of some groups, [key heads][queries][heads].
// Its slices begin with the same pages; all its rows go through the blocks of keys that are common to all, then each
// branch of slices through what is common to it, at last each slice through its own: a key is read once for all rows it
// is shared by, and the key heads of a token one after another. A row goes through blocks of kKeys keys, aligned to
// positions, in order, and the arithmetic of a row depends neither on the other rows nor on their number. So a query's
// result has the same bits whatever is in the batch, and whether its sequence is computed in one piece or token by
// token; for a sequence whose keys packed attention takes in the same blocks, as it does in a pack without shared
// prompts, they are packed attention's.
//
// Where many rows share a key, the lanes of a vector of scores are rows, as in packed attention. Where few do, they are
// keys, turned in registers; the sum of a row's probabilities still runs through its keys one by one. There reading is
// what takes long, so that while keys are multiplied their values are asked for, and while values are the keys to come.
#include <omp.h>

#include "cpu/attention_tile.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

constexpr int64_t kFew = 8;

template <class T>
struct PagedPanel {
  const PagedAttention<T>& f;
  const QuerySlice* slices;
  int64_t key_head, key_heads, head, heads;  // from key_head on; query heads of each, from its group's `head` on
  int64_t rows = 0, line;                    // rows of one key head
  T *q, *qt, *s, *o, *values;
  T m[kRows], l[kRows];
  typename Index<T>::type position[kRows + Lanes<T>::n] = {};  // of the rows of one key head

  PagedPanel(const PagedAttention<T>& f, const QuerySlice* slices, T* workspace)
      : f(f), slices(slices), line(padded<T>(f.width)) {
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
    for (int64_t k = key_head; k < key_head + key_heads; ++k)
      for (int64_t i = panel.begin; i < panel.end; ++i)
        for (int64_t t = 0; t < slices[i].end - slices[i].begin; ++t)
          for (int64_t h = 0; h < heads; ++h) body(row++, slices[i].token + t, k * (f.heads / f.key_heads) + head + h);
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
    if (rows > kFew)
      transpose([&](int64_t row) { return q + row * line; }, rows * key_heads, f.width, T(1), qt, kRows);
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

  int64_t count_queries(int64_t begin, int64_t end) const {
    int64_t queries = 0;
    for (int64_t i = begin; i < end; ++i) queries += slices[i].end - slices[i].begin;
    return queries;
  }

  int64_t count_rows(int64_t begin, int64_t end) const { return count_queries(begin, end) * heads; }

  // Where the keys and values of a block lie, and the keys of the one after it, if that has any; and whether those of
  // this one have been asked for: by the block before it, if lines are whole vectors.
  struct Block {
    const T *const *k, *const *v, *const *next;
    int64_t next_size;
    bool asked;
  };

  // Takes, under each key head, `count` rows from `row` on through the keys begin <= k < end of a slice's sequence.
  void through(const QuerySlice& slice, int64_t row, int64_t count, int64_t begin, int64_t end) {
    int64_t low = position[row], high = low;
    for (int64_t r = row; r < row + count; ++r) {
      low = position[r] < low ? position[r] : low;
      high = position[r] > high ? position[r] : high;
    }
    bool asked = false;  // for the keys of the block
    for (; begin < end; begin += kKeys) {
      const KeyRange keys = {begin, begin + kKeys < end ? begin + kKeys : end};
      const KeyRange later = {keys.end, keys.end + kKeys < end ? keys.end + kKeys : end};
      if (f.window > 0 && low - (keys.end - 1) >= f.window) continue;
      const bool masked = keys.end - 1 > low || (f.window > 0 && high - keys.begin >= f.window);
      const T *k[kKeys], *v[kKeys], *next[kKeys];
      find(f.k, slice.sequence, keys, k);
      find(f.v, slice.sequence, keys, v);
      if (count > kFew) {
        for (int64_t h = 0; h < key_heads; ++h) many(h, row, count, keys, masked, k, v);
        continue;
      }
      find(f.k, slice.sequence, later, next);
      few(row, count, keys, masked, {k, v, next, later.end - later.begin, asked});
      asked = line == f.width;
    }
  }

  // Where the keys of a sequence lie, under this panel's first key head.
  void find(const Pages<T>& pages, int64_t sequence, KeyRange keys, const T** at) const {
    const int32_t* table = f.table.pages + sequence * f.table.stride;
    const int64_t bits = f.table.page_bits;
    for (int64_t k = keys.begin; k < keys.end;) {
      const int64_t first = k >> bits << bits, last = first + (int64_t(1) << bits);
      const T* page = pages.data + table[k >> bits] * pages.page + key_head * pages.head;
      for (; k < last && k < keys.end; ++k) *at++ = page + (k - first) * pages.token;
    }
  }

  // o[row] += sum over j of a[row, j] v[j] under the panel's key head `h`.
  void add_values(Scalars<T> a, const T* const* v, int64_t h, int64_t row, int64_t count, int64_t size) {
    T* to = o + row * line;
    const LinePointers<T> lines = {v, h * f.v.head};
    if (line == f.width) return multiply<T, true>(a, lines, to, line, count, size, line);
    for (int64_t j = 0; j < size; ++j) copy_line(lines[j], f.width, T(1), values + j * line);
    multiply<T, true>(a, values, line, to, line, count, size, line);
  }

  // The same, asking for the keys of the next block where lines are whole vectors. Inlined, it would take the registers of its loop from it.
  __attribute__((noinline)) void add_values(Scalars<T> a, const Block& b, int64_t h, int64_t row, int64_t count,
                                            int64_t size) {
    if (line != f.width) return add_values(a, b.v, h, row, count, size);
    constexpr int64_t chunk = kWide * Lanes<T>::n;
    for (int64_t d = 0; d < line; d += chunk) {
      const LinesAndLater<T> lines = {b.v, h * f.v.head + d, b.next, h * f.k.head + d, b.next_size};
      multiply<T, true>(a, lines, o + row * line + d, line, count, size, line - d < chunk ? line - d : chunk);
    }
  }

  // One block under the panel's key head `h`, for rows as lanes: s[key][kRows].
  void many(int64_t h, int64_t first, int64_t count, KeyRange keys, bool masked, const T* const* k,
            const T* const* v) {
    const int64_t size = keys.end - keys.begin, width = padded<T>(count), row = h * rows + first;
    multiply<T, false>(LinePointers<T>{k, h * f.k.head}, Lines<T>{qt + row, kRows}, s, kRows, size, f.width, width);
    if (f.softcap > 0) cap_scores(s, kRows, size, width, T(f.softcap));
    if (masked) hide(first, width, keys);
    T top[kRows], sum[kRows];
    for (int64_t r = 0; r < width; ++r) {
      top[r] = r < count ? m[row + r] : T(0);
      sum[r] = r < count ? l[row + r] : T(0);
    }
    online_softmax(s, size, count, top, sum, o + row * line, line);
    for (int64_t r = 0; r < count; ++r) m[row + r] = top[r], l[row + r] = sum[r];
    add_values({s, 1, kRows}, v, h, row, count, size);
  }

  // Hides what rows don't see of s[key][kRows].
  void hide(int64_t first, int64_t width, KeyRange keys) {
    typedef typename Index<T>::type I;
    T* at = s;
    for (int64_t k = keys.begin; k < keys.end; ++k, at += kRows)
      for (int64_t r = 0; r < width; r += Lanes<T>::n) {
        const Mask<T> own = load_indices<T>(position + first + r);
        Mask<T> hidden = own < I(k);
        if (f.window > 0) hidden |= own - I(k) >= I(f.window);
        store(at + r, hidden ? splat(T(-kInfinity)) : load(at + r));
      }
  }

  // One block under all key heads, for keys as lanes: s[row][kKeys], the rows of the key heads one after another.
  void few(int64_t first, int64_t count, KeyRange keys, bool masked, const Block& b) {
    const int64_t size = keys.end - keys.begin;
    int64_t row_of[kRows];
    for (int64_t h = 0; h < key_heads; ++h) {
      for (int64_t r = 0; r < count; ++r) row_of[h * count + r] = h * rows + first + r;
      products(count, q + (h * rows + first) * line, b, h, size, s + h * count * kKeys);
    }
    const int64_t all = key_heads * count;
    if (f.softcap > 0) cap_scores(s, kKeys, all, padded<T>(size), T(f.softcap));
    for (int64_t r = 0; r < all; ++r) {
      if (masked) hide_in_row(s + r * kKeys, position[first + r % count], keys);
      weigh_row(s + r * kKeys, size, row_of[r]);
    }
    add_weights(row_of, all, size);
    for (int64_t h = 0; h < key_heads; ++h)
      add_values({s + h * count * kKeys, kKeys, 1}, b, h, h * rows + first, count, size);
  }

  void products(int64_t count, const T* from, const Block& b, int64_t h, int64_t size, T* to) const {
    switch (count) {
      case 1: return turned_products<1>(from, b, h, size, to);
      case 2: return turned_products<2>(from, b, h, size, to);
      case 3: return turned_products<3>(from, b, h, size, to);
      case 4: return turned_products<4>(from, b, h, size, to);
      case 5: return turned_products<5>(from, b, h, size, to);
      case 6: return turned_products<6>(from, b, h, size, to);
      case 7: return turned_products<7>(from, b, h, size, to);
      case 8: return turned_products<8>(from, b, h, size, to);
    }
  }

  // to[c][j] = from[c] . k[j] under the panel's key head `h`
  template <int C>
  void turned_products(const T* from, const Block& b, int64_t h, int64_t size, T* to) const {
    constexpr int n = Lanes<T>::n;
    const LinePointers<T> k = {b.k, h * f.k.head}, values = {b.v, h * f.v.head};
    for (int64_t j = 0; j < size; j += n) {
      Vec<T> sums[C] = {};
      for (int64_t d = 0; d < f.width; d += n) {
        if (d * sizeof(T) % kCacheLine == 0) {
          for (int64_t r = j; r < j + n && r < size; ++r) __builtin_prefetch(values[r] + d, 0, 2);
          if (!b.asked)
            for (int64_t r = j + n; r < j + 2 * n && r < size; ++r) __builtin_prefetch(k[r] + d, 0, 2);
        }
        Vec<T> v[n];
        load_turned<T>([&](int64_t r) { return k[j + r] + d; }, size - j, f.width - d, v);
        for (int i = 0; i < n; ++i)
          for (int c = 0; c < C; ++c) sums[c] += splat(from[c * line + d + i]) * v[i];
      }
      for (int c = 0; c < C; ++c) store(to + c * kKeys + j, sums[c]);
    }
  }

  void hide_in_row(T* at, int64_t own, KeyRange keys) const {
    for (int64_t k = keys.begin; k < keys.end; ++k)
      if (k > own || (f.window > 0 && own - k >= f.window)) at[k - keys.begin] = T(-kInfinity);
  }

  // Turns a row's `size` scores, which may be written up to whole vectors, into e^(s - m), moves m to the new maximum,
  // and rescales l and o.
  void weigh_row(T* at, int64_t size, int64_t row) {
    constexpr int n = Lanes<T>::n;
    for (int64_t j = size; j < padded<T>(size); ++j) at[j] = T(-kInfinity);
    Vec<T> tops = splat(m[row]);
    for (int64_t j = 0; j < size; j += n) tops = max<T>(tops, load(at + j));
    const T top = max_lane<T>(tops), reference = top > T(-kInfinity) ? top : T(0);
    const T factor = exp_or_zero(splat(m[row]) - reference)[0];
    for (int64_t j = 0; j < size; j += n) store(at + j, exp_or_zero(load(at + j) - reference));
    m[row] = top;
    l[row] *= factor;
    if (factor < 1)
      for (T* to = o + row * line; to < o + (row + 1) * line; to += n) store(to, load(to) * factor);
  }

  // l[row] += the row's weights, one by one; some rows at a time, since each sum waits for itself.
  void add_weights(const int64_t* row_of, int64_t count, int64_t size) {
    constexpr int64_t together = 8;
    for (int64_t r = 0; r < count; r += together) {
      T sums[together];
      const T* at[together];
      for (int64_t i = 0; i < together; ++i) {
        const int64_t own = r + i < count ? r + i : r;
        sums[i] = l[row_of[own]];
        at[i] = s + own * kKeys;
      }
      for (int64_t j = 0; j < size; ++j)
        for (int64_t i = 0; i < together; ++i) sums[i] += at[i][j];
      for (int64_t i = 0; i < together && r + i < count; ++i) l[row_of[r + i]] = sums[i];
    }
  }
};

}  // namespace

template <class T>
int64_t paged_workspace(int64_t width) {
  const int64_t line = padded<T>(width);
  return kRows * (2 * line + width + kKeys) + kKeys * line + Lanes<T>::n;
}

// Key heads of a piece, so that there are some pieces for each thread.
template <class T>
int64_t heads_of_a_piece(const PagedAttention<T>& f, int64_t num_panels, int64_t threads) {
  const int64_t share = num_panels * f.key_heads / (4 * threads);
  return share < 1 ? 1 : share < f.key_heads ? share : f.key_heads;
}

template <class T>
int64_t paged_pieces(const PagedAttention<T>& f, int64_t num_panels, int64_t threads) {
  const int64_t heads = heads_of_a_piece(f, num_panels, threads);
  return num_panels * ((f.key_heads + heads - 1) / heads);
}

template <class T>
void paged_piece(const PagedAttention<T>& f, const QuerySlice* slices, const SlicePanel* panels, int64_t num_panels,
                 int64_t threads, int64_t piece, T* out, T* workspace) {
  const int64_t heads = heads_of_a_piece(f, num_panels, threads), group = f.heads / f.key_heads;
  const int64_t parts = (f.key_heads + heads - 1) / heads, part = piece % parts;
  const SlicePanel task = panels[piece / parts];
  const int64_t end = (part + 1) * heads < f.key_heads ? (part + 1) * heads : f.key_heads;
  PagedPanel<T> panel(f, slices, workspace);
  const int64_t queries = panel.count_queries(task.begin, task.end);
  const int64_t most = kRows / queries < group ? kRows / queries : group, together = kRows / (queries * most);
  for (int64_t k = part * heads; k < end; k += together)
    for (int64_t h = 0; h < group; h += most) {
      panel.key_head = k, panel.key_heads = end - k < together ? end - k : together;
      panel.head = h, panel.heads = group - h < most ? group - h : most;
      panel.rows = 0;
      panel.start(task);
      panel.descend(task.begin, task.end, 0, 0);
      panel.finish(task, out);
    }
}

template <class T>
void paged_attention(const PagedAttention<T>& f, const QuerySlice* slices, const SlicePanel* panels,
                     int64_t num_panels, T* out, T* workspace, int threads) {
  const int64_t size = paged_workspace<T>(f.width), pieces = paged_pieces(f, num_panels, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < pieces; ++i)
    paged_piece(f, slices, panels, num_panels, threads, i, out, workspace + omp_get_thread_num() * size);
}

#define INSTANTIATE(T)                                                                                              \
  template int64_t paged_workspace<T>(int64_t);                                                                     \
  template int64_t paged_pieces<T>(const PagedAttention<T>&, int64_t, int64_t);                                     \
  template void paged_piece<T>(const PagedAttention<T>&, const QuerySlice*, const SlicePanel*, int64_t, int64_t,    \
                               int64_t, T*, T*);                                                                    \
  template void paged_attention<T>(const PagedAttention<T>&, const QuerySlice*, const SlicePanel*, int64_t, T*, T*, \
                                   int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
