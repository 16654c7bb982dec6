// One step of a whole decoder: the tokens' embeddings through all layers, to logits behind some of them. It is what the
// modules of posttrain/models/families.py do, one kernel after the other without a way back to Python, and each of the
// kernels gives a token the same bits whatever is beside it.
//
// The residual stream is `state`; what attention and MLP give, `delta`, joins it in the norm that follows.
#include "cpu/kernels.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

template <class T>
struct Run {
  const Decoder<T>& d;
  const DecoderStep<T>& s;
  T *state, *delta, *normed, *q, *k, *v, *attended, *gate, *up, *low, *rstd, *attention;

  // Takes the places of its arrays in the workspace; returns its size.
  int64_t place(T* base) {
    const int64_t n = s.num_tokens, inner = d.heads * d.width, key_inner = d.key_heads * d.width;
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      at += size;
      return base ? base + at - size : nullptr;
    };
    state = take(n * d.hidden), delta = take(n * d.hidden), normed = take(n * d.hidden);
    q = take(n * inner), attended = take(n * inner), k = take(n * key_inner), v = take(n * key_inner);
    gate = take(n * d.intermediate), up = take(n * d.intermediate);
    low = take(n * 3 * d.most_rank), rstd = take(n * (d.heads > 1 ? d.heads : 1));
    attention = take(s.threads * paged_workspace<T>(d.width));
    return at;
  }

  void operator()() {
    embed();
    for (int64_t i = 0; i < d.num_layers; ++i) layer(d.layers[i], i == 0);
    for (int64_t i = 0; i < s.num_rows; ++i) {  // rows ascend, so nothing is overwritten before it is read
      copy(state + s.rows[i] * d.hidden, state + i * d.hidden, d.hidden);
      copy(delta + s.rows[i] * d.hidden, delta + i * d.hidden, d.hidden);
    }
    if (s.num_rows == 0) return;
    enter(d.norm, s.num_rows, false);
    const AdaptedLinear<T>* heads[] = {&d.head};
    T* outs[] = {s.logits};
    project(normed, s.num_rows, heads, outs, 1);
  }

  void embed() {
    for (int64_t i = 0; i < s.num_tokens; ++i) {
      const T* from = d.embeddings + s.tokens[i] * d.hidden;
      for (int64_t j = 0; j < d.hidden; ++j) state[i * d.hidden + j] = from[j] * T(d.embedding_scale);
    }
  }

  void layer(const DecoderLayer<T>& l, bool first) {
    const int64_t n = s.num_tokens, inner = d.heads * d.width, key_inner = d.key_heads * d.width;
    const T* x = enter(l.before_attention, n, first);
    const AdaptedLinear<T>* projections[] = {&l.q, &l.k, &l.v};
    T* projected[] = {q, k, v};
    project(x, n, projections, projected, 3);
    if (l.q_norm) {
      const int64_t parts = l.norm_each_head ? d.heads : 1, key_parts = l.norm_each_head ? d.key_heads : 1;
      norm(q, l.q_norm, n * parts, inner / parts);
      norm(k, l.k_norm, n * key_parts, key_inner / key_parts);
    }
    turn(q, d.heads, l.rope);
    turn(k, d.key_heads, l.rope);
    for (int64_t i = 0; i < n; ++i) {
      copy(k + i * key_inner, l.keys + s.slots[i] * key_inner, key_inner);
      copy(v + i * key_inner, l.values + s.slots[i] * key_inner, key_inner);
    }
    attend(l);
    const AdaptedLinear<T>* out[] = {&l.o};
    project(attended, n, out, &delta, 1);
    if (l.after_attention) norm(delta, l.after_attention, n, d.hidden);
    x = enter(l.before_mlp, n, false);
    const AdaptedLinear<T>* halves[] = {&l.gate, &l.up};
    T* both[] = {gate, up};
    project(x, n, halves, both, 2);
    glu_forward<T>(int(d.activation), gate, d.intermediate, up, d.intermediate, gate, n, d.intermediate);
    const AdaptedLinear<T>* down[] = {&l.down};
    project(gate, n, down, &delta, 1);
    if (l.after_mlp) norm(delta, l.after_mlp, n, d.hidden);
  }

  // Adds delta, unless it is the `first` layer, to the state; returns its norm, or itself without a norm.
  const T* enter(const T* weight, int64_t rows, bool first) {
    if (weight) {
      rms_norm_forward<T>(first ? state : delta, first ? nullptr : state, weight, normed, first ? nullptr : state, rstd,
                          rows, d.hidden, d.eps);
      return normed;
    }
    if (!first)
      for (int64_t i = 0; i < rows * d.hidden; ++i) state[i] += delta[i];
    return state;
  }

  void norm(T* x, const T* weight, int64_t rows, int64_t width) {
    rms_norm_forward<T>(x, nullptr, weight, x, nullptr, rstd, rows, width, d.eps);
  }

  void turn(T* x, int64_t heads, int64_t which) {
    const HeadStrides strides = {0, d.width, heads * d.width};
    rope<T>(x, strides, x, strides, s.cos[which], s.sin[which], 0, 1, heads, s.num_tokens, d.width, s.rotated, false);
  }

  void attend(const DecoderLayer<T>& l) {
    const int64_t line = d.key_heads * d.width;
    const PagedAttention<T> f = {{q, d.heads * d.width, d.width},
                                 {l.keys, d.page_size * line, line, d.width},
                                 {l.values, d.page_size * line, line, d.width},
                                 s.table, nullptr, d.heads, d.key_heads, d.width, d.scale, d.softcap, l.window};
    paged_attention<T>(f, s.slices, s.panels, s.num_panels, attended, attention, int(s.threads));
  }

  // y[i] = layers[i](x), up to three.
  void project(const T* x, int64_t rows, const AdaptedLinear<T>* const* layers, T* const* y, int count) {
    LinearTask<T> whole[3], down[3];
    int adapted = 0;
    for (int i = 0; i < count; ++i) {
      const AdaptedLinear<T>& a = *layers[i];
      whole[i] = {a.weight, a.bias, y[i], a.height, a.width, a.height, 1.0, false, a.turned};
      if (a.rank == 0) continue;
      T* own = low + adapted * s.num_tokens * d.most_rank;
      down[adapted] = {a.lora_a, nullptr, own, a.rank, a.width, a.rank, 1.0, false, nullptr};
      ++adapted;
    }
    linear<T>(x, rows, whole, count);
    if (adapted == 0) return;
    linear<T>(x, rows, down, adapted);
    for (int i = 0, next = 0; i < count; ++i) {
      const AdaptedLinear<T>& a = *layers[i];
      if (a.rank == 0) continue;
      const LinearTask<T> raise = {a.lora_b, nullptr, y[i], a.height, a.rank, a.height, a.scaling, true, nullptr};
      linear<T>(down[next++].y, rows, &raise, 1);
    }
  }

  static void copy(const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
};

}  // namespace

template <class T>
int64_t decoder_workspace(const Decoder<T>& decoder, const DecoderStep<T>& step) {
  Run<T> run = {decoder, step};
  return run.place(nullptr);
}

template <class T>
void decode(const Decoder<T>& decoder, const DecoderStep<T>& step) {
  Run<T> run = {decoder, step};
  run.place(step.workspace);
  run();
}

#define INSTANTIATE(T)                                                             \
  template int64_t decoder_workspace<T>(const Decoder<T>&, const DecoderStep<T>&); \
  template void decode<T>(const Decoder<T>&, const DecoderStep<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
