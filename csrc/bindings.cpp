// The module posttrain._C: raw addresses and sizes in, work done, nothing out. posttrain/ops checks shapes, dtypes,
// devices and contiguity before calling; nothing is checked twice here.
#include <pybind11/pybind11.h>

#include "burst.h"
#include "cpu/all.h"
#ifdef POSTTRAIN_WITH_CUDA
#include "cuda/bindings.h"
#endif
#include "isa.h"
#include "layout.h"
#include "packing.h"
#include "paging.h"

namespace py = pybind11;
using address = uintptr_t;

namespace {

// The address `a` as a pointer to T.
template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

// Calls body(T{}) with T = float or double, by the size in bytes of the tensors' elements.
template <class Body>
void by_size(int itemsize, Body body) {
  py::gil_scoped_release release;
  if (itemsize == 8)
    body(double{});
  else
    body(float{});
}

void rms_norm_forward(int itemsize, address x, address residual, address weight, address y, address sum, address rstd,
                      int64_t rows, int64_t width, double eps) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rms_norm_forward<T>, at<T>(x), at<T>(residual), at<T>(weight), at<T>(y), at<T>(sum), at<T>(rstd),
                   rows, width, eps);
  });
}

void rms_norm_backward(int itemsize, address grad_y, address grad_sum, address sum, address weight, address rstd,
                       address dx, address dw, address partial, address exact, int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rms_norm_backward<T>, at<T>(grad_y), at<T>(grad_sum), at<T>(sum), at<T>(weight), at<T>(rstd),
                   at<T>(dx), at<T>(dw), at<T>(partial), at<double>(exact), rows, width);
  });
}

// Address and strides of batch, heads and tokens, of what is read and of what is written; the number of heads.
using turned_heads = std::tuple<address, int64_t, int64_t, int64_t, address, int64_t, int64_t, int64_t, int64_t>;

template <class T>
posttrain::TurnedHeads<T> heads_of(turned_heads x) {
  const auto [from, from_batch, from_head, from_token, to, to_batch, to_head, to_token, heads] = x;
  return {at<T>(from), {from_batch, from_head, from_token}, at<T>(to), {to_batch, to_head, to_token}, heads};
}

void rope(int itemsize, turned_heads q, turned_heads k, address cos, address sin, int64_t angle_batch_stride,
          int64_t batch, int64_t tokens, int64_t width, int64_t rotated, bool transposed) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(rope<T>, heads_of<T>(q), heads_of<T>(k), at<T>(cos), at<T>(sin), angle_batch_stride, batch, tokens,
                   width, rotated, transposed);
  });
}

void glu_forward(int itemsize, int act, address gate, int64_t gate_stride, address up, int64_t up_stride, address y,
                 int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(glu_forward<T>, act, at<T>(gate), gate_stride, at<T>(up), up_stride, at<T>(y), rows, width);
  });
}

void glu_backward(int itemsize, int act, address grad_y, int64_t grad_stride, address gate, int64_t gate_stride,
                  address up, int64_t up_stride, address grad_gate, address grad_up, int64_t rows, int64_t width) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(glu_backward<T>, act, at<T>(grad_y), grad_stride, at<T>(gate), gate_stride, at<T>(up), up_stride,
                   at<T>(grad_gate), at<T>(grad_up), rows, width);
  });
}

void logprob_fold(int itemsize, address tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column,
                  address targets, address bias, double scale, double softcap, double inverse_temperature, address m,
                  address top, address s, address t, address z_target, address unit, int64_t width) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    POSTTRAIN_CALL(logprob_fold<T>, at<T>(tile), stride, rows, cols, first_column, at<int64_t>(targets), at<T>(bias),
                   {scale, softcap, inverse_temperature}, at<T>(m), at<T>(top), at<T>(s), at<T>(t), at<T>(z_target),
                   at<T>(unit), width);
  });
}

void logprob_grad(int itemsize, address tile, int64_t tile_stride, address grad, int64_t grad_stride, int64_t rows,
                  int64_t cols, int64_t first_column, address targets, address bias, double scale, double softcap,
                  double inverse_temperature, bool finished, address logprob, address entropy, address lse,
                  address lse_low, address grad_logprob, address grad_entropy, address grad_lse) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    POSTTRAIN_CALL(logprob_grad<T>, at<T>(tile), tile_stride, at<T>(grad), grad_stride, rows, cols, first_column,
                   at<int64_t>(targets), at<T>(bias), {scale, softcap, inverse_temperature}, finished, at<T>(logprob),
                   at<T>(entropy), at<T>(lse), at<T>(lse_low), at<T>(grad_logprob), at<T>(grad_entropy),
                   at<T>(grad_lse));
  });
}

int64_t pack_best_fit(address lengths, int64_t count, int64_t capacity, address bin) {
  py::gil_scoped_release release;
  return posttrain::pack_best_fit(at<int64_t>(lengths), count, capacity, at<int64_t>(bin));
}

int64_t forest_tokens(address lengths, address parents, int64_t count) {
  return posttrain::forest_tokens(at<int64_t>(lengths), at<int64_t>(parents), count);
}

void forest_layout(address lengths, address parents, int64_t count, address visible_until, address positions,
                   address starts) {
  posttrain::forest_layout(at<int64_t>(lengths), at<int64_t>(parents), count, at<int32_t>(visible_until),
                           at<int32_t>(positions), at<int64_t>(starts));
}

int64_t sequence_layout(address positions, int64_t tokens, address visible_until, address starts) {
  return posttrain::sequence_layout(at<int64_t>(positions), tokens, at<int32_t>(visible_until), at<int64_t>(starts));
}

using posttrain::Attention;

// Address, elements between tokens, elements between heads.
using view = std::tuple<address, int64_t, int64_t>;

template <class T>
posttrain::View<const T> tensor(view v) {
  return {at<T>(std::get<0>(v)), std::get<1>(v), std::get<2>(v)};
}

// Heads, key heads, width of keys, width of values; scale, softcap, window.
using shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using score_options = std::tuple<double, double, int64_t>;

template <class T>
Attention<T> attention(view q, view k, view v, address positions, address sinks, int64_t tokens, shape s,
                       score_options o) {
  const auto [heads, key_heads, width, value_width] = s;
  const auto [scale, softcap, window] = o;
  return {tensor<T>(q), tensor<T>(k), tensor<T>(v), at<int32_t>(positions), at<T>(sinks), tokens, heads, key_heads,
          width, value_width, scale, softcap, window};
}

posttrain::AttentionPlan plan(address visible_until, int64_t tokens, shape s) {
  return posttrain::attention_plan(at<int32_t>(visible_until), tokens, std::get<0>(s) / std::get<1>(s));
}

int64_t attention_workspace(int itemsize, int64_t width, int64_t value_width, bool backward) {
  if (itemsize == 8) return POSTTRAIN_CALL(attention_workspace<double>, width, value_width, backward);
  return POSTTRAIN_CALL(attention_workspace<float>, width, value_width, backward);
}

void attention_forward(int itemsize, view q, view k, view v, address visible_until, address positions, address sinks,
                       int64_t tokens, shape s, score_options o, address out, address lse, address workspace,
                       int threads) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    const auto work = plan(visible_until, tokens, s);
    POSTTRAIN_CALL(attention_forward<T>, attention<T>(q, k, v, positions, sinks, tokens, s, o), work.tiles.data(),
                   work.tiles.size(), at<T>(out), at<double>(lse), at<T>(workspace), threads);
  });
}

void attention_backward(int itemsize, view q, view k, view v, address visible_until, address positions, int64_t tokens,
                        shape s, score_options o, address out, address lse, view grad_out, address grad_q,
                        address grad_k, address grad_v, address delta, address workspace, int threads) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    const auto work = plan(visible_until, tokens, s);
    const posttrain::AttentionGradients<T> gradients = {
        at<T>(out), at<double>(lse), tensor<T>(grad_out), at<T>(grad_q), at<T>(grad_k), at<T>(grad_v), at<T>(delta)};
    POSTTRAIN_CALL(attention_backward<T>, attention<T>(q, k, v, positions, 0, tokens, s, o), work.tiles.data(),
                   work.chunks.data(), work.chunks.size(), work.most_chunks, gradients, at<T>(workspace), threads);
  });
}

// Addresses of block_table, context_lens and query_lens (or 0); elements between the table's rows, sequences, max_pages.
using tables = std::tuple<address, address, address, int64_t, int64_t, int64_t>;

posttrain::PagedTables paged_tables(tables t) {
  const auto [block_table, context_lens, query_lens, stride, sequences, max_pages] = t;
  return {at<int32_t>(block_table), stride, at<int32_t>(context_lens), at<int32_t>(query_lens), sequences, max_pages};
}

void check_pages(tables t, int64_t tokens, int64_t num_pages, int64_t page_size) {
  posttrain::check_pages(paged_tables(t), tokens, num_pages, page_size);
}

// Strides of k and v in elements.
void write_cache(int itemsize, view k, view v, address key_cache, address value_cache, address slots, int64_t tokens,
                 int64_t heads, int64_t width, int64_t room) {
  const auto heads_of = [&](view x) {
    return posttrain::TokenHeads{at<char>(std::get<0>(x)), std::get<1>(x) * itemsize, std::get<2>(x) * itemsize};
  };
  posttrain::check_slots("write_cache", at<int64_t>(slots), tokens, room);
  posttrain::write_cache(heads_of(k), heads_of(v), at<char>(key_cache), at<char>(value_cache), at<int64_t>(slots),
                         tokens, heads, width * itemsize);
}

// The shape is heads, key heads, width, and how much of it is turned.
void rope_cache(int itemsize, view q, view k, view v, address cos, address sin, address slots, address out,
                address key_cache, address value_cache, int64_t tokens, shape s, int64_t room) {
  posttrain::check_slots("rope_cache", at<int64_t>(slots), tokens, room);
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    const auto [heads, key_heads, width, rotated] = s;
    const posttrain::StepHeads<T> step = {
        tensor<T>(q), tensor<T>(k), tensor<T>(v), at<T>(cos), at<T>(sin), at<int64_t>(slots), at<T>(out),
        at<T>(key_cache), at<T>(value_cache), heads, key_heads, width, rotated};
    POSTTRAIN_CALL(rope_cache<T>, step, tokens);
  });
}

int64_t paged_workspace(int itemsize, int64_t width) {
  if (itemsize == 8) return POSTTRAIN_CALL(paged_workspace<double>, width);
  return POSTTRAIN_CALL(paged_workspace<float>, width);
}

// Address and strides of a cache: page, token, head.
using cache = std::tuple<address, int64_t, int64_t, int64_t>;

template <class T>
posttrain::Pages<T> pages(cache c) {
  const auto [data, page, token, head] = c;
  return {at<T>(data), page, token, head};
}

// The shape is that of attention, but with the page size in place of the width of values.
void paged_attention(int itemsize, view q, cache k, cache v, tables t, address sinks, shape s, score_options o,
                     address out, address workspace, int threads) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    const auto [heads, key_heads, width, page_size] = s;
    const auto [scale, softcap, window] = o;
    const posttrain::PagedTables all = paged_tables(t);
    const posttrain::PagedPlan work = posttrain::paged_plan(all, page_size, heads / key_heads);
    const posttrain::PagedAttention<T> f = {
        tensor<T>(q), pages<T>(k), pages<T>(v), {all.block_table, all.stride, __builtin_ctzll(page_size)},
        at<T>(sinks), heads, key_heads, width, scale, softcap, window};
    POSTTRAIN_CALL(paged_attention<T>, f, work.slices.data(), work.panels.data(), work.panels.size(), at<T>(out),
                   at<T>(workspace), threads);
  });
}

void linear(int itemsize, address x, int64_t rows, int64_t width, address weight, address bias, address y,
            int64_t height) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    const posttrain::LinearTask<T> task = {at<T>(weight), at<T>(bias), at<T>(y), height, width,
                                          height,        1.0,           false,    nullptr};
    POSTTRAIN_CALL(linear<T>, at<T>(x), rows, &task, 1);
  });
}

void turn_weight(int itemsize, address weight, int64_t height, int64_t width, address turned) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(turn_weight<T>, at<T>(weight), height, width, at<T>(turned));
  });
}

// Addresses of temperature, top_k, top_p, min_p, seeds, offsets.
using sample_parameters = std::tuple<address, address, address, address, address, address>;

posttrain::SampleBatch sample_batch(address logits, int64_t stride, int64_t rows, int64_t size, sample_parameters p) {
  const auto [temperature, top_k, top_p, min_p, seeds, offsets] = p;
  return {at<float>(logits), stride, rows, size, at<float>(temperature), at<int64_t>(top_k), at<float>(top_p),
          at<float>(min_p), at<int64_t>(seeds), at<int64_t>(offsets)};
}

void sample(address logits, int64_t stride, int64_t rows, int64_t size, sample_parameters parameters, address tokens,
            address logprobs, int threads) {
  py::gil_scoped_release release;
  POSTTRAIN_CALL(sample, sample_batch(logits, stride, rows, size, parameters), at<int64_t>(tokens),
                 at<float>(logprobs), threads);
}

// Addresses of cosines and sines [positions, rotated] of the first and of the last kind of layers; rotated width.
using angle_tables = std::tuple<address, address, address, address, int64_t>;

template <class T>
posttrain::Angles<T> angles(angle_tables a) {
  const auto [cos, sin, last_cos, last_sin, rotated] = a;
  return {{at<T>(cos), at<T>(last_cos)}, {at<T>(sin), at<T>(last_sin)}, rotated};
}

int64_t decoder_workspace(int itemsize, address decoder, int64_t tokens, int64_t rows, int64_t rotated, int threads) {
  const auto size = [=](auto t) {
    using T = decltype(t);
    posttrain::DecoderStep<T> step = {};
    step.num_tokens = tokens, step.num_rows = rows, step.angles.rotated = rotated, step.threads = threads;
    return POSTTRAIN_CALL(decoder_workspace<T>, *at<posttrain::Decoder<T>>(decoder), step);
  };
  return itemsize == 8 ? size(double{}) : size(float{});
}

// Addresses of token ids, positions, slots and rows; how many tokens and rows.
using step_tokens = std::tuple<address, address, address, address, int64_t, int64_t>;

void decode(int itemsize, address decoder, step_tokens i, angle_tables a, tables t, address logits, address workspace,
            int threads) {
  by_size(itemsize, [=](auto t_) {
    using T = decltype(t_);
    const auto [tokens, positions, slots, rows, num_tokens, num_rows] = i;
    const posttrain::Decoder<T>& d = *at<posttrain::Decoder<T>>(decoder);
    const posttrain::PagedTables all = paged_tables(t);
    const posttrain::PagedPlan work = posttrain::paged_plan(all, d.page_size, d.heads / d.key_heads);
    posttrain::DecoderStep<T> step = {};
    step.tokens = at<int64_t>(tokens), step.positions = at<int64_t>(positions);
    step.slots = at<int64_t>(slots), step.rows = at<int64_t>(rows);
    step.num_tokens = num_tokens, step.num_rows = num_rows;
    step.angles = angles<T>(a);
    step.table = {all.block_table, all.stride, __builtin_ctzll(d.page_size)};
    step.slices = work.slices.data(), step.panels = work.panels.data(), step.num_panels = work.panels.size();
    step.threads = threads, step.logits = at<T>(logits), step.workspace = at<T>(workspace);
    POSTTRAIN_CALL(decode<T>, d, step);
  });
}

// Addresses of the most tokens of each sequence, of whether ends complete it, and of the ends; how many ends.
using burst_ends = std::tuple<address, address, address, int64_t>;

// `out`: addresses of tokens, their log-probabilities, and how many tokens of each sequence. Returns the next step.
int64_t burst(int itemsize, address decoder, angle_tables a, tables t, burst_ends e, sample_parameters draws,
              std::tuple<address, address, address> out, int64_t step, bool until_one, double seconds, address logits,
              address workspace, int threads) {
  by_size(itemsize, [=, &step](auto t_) {
    using T = decltype(t_);
    const auto [limits, heeds, ends, num_ends] = e;
    const auto [tokens, logprobs, drawn] = out;
    const posttrain::BurstTask task = {
        paged_tables(t), at<int64_t>(limits), at<int64_t>(heeds), at<int64_t>(ends), num_ends,
        sample_batch(0, 0, 0, 0, draws), at<int64_t>(tokens), at<float>(logprobs), at<int64_t>(drawn), until_one,
        seconds};
    step = posttrain::burst<T>(*at<posttrain::Decoder<T>>(decoder), angles<T>(a), task, step, at<T>(logits),
                               at<T>(workspace), threads);
  });
  return step;
}

// Packed, absmax (or its 8-bit index), nested absmax, nested code and offset (0 without nested statistics); block,
// nested block.
using nf4 = std::tuple<address, address, address, address, address, int64_t, int64_t>;

posttrain::Nf4 matrix(nf4 w) {
  const auto [packed, absmax, nested, code, offset, block, nested_block] = w;
  return {at<uint8_t>(packed), at<float>(absmax), at<uint8_t>(absmax), at<float>(nested),
          at<float>(code),     at<float>(offset), block,               nested_block};
}

void nf4_dequantize(int itemsize, nf4 w, int64_t first, int64_t count, address out) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(nf4_dequantize<T>, matrix(w), first, count, at<T>(out));
  });
}

void nf4_matvec(int itemsize, nf4 w, address x, address turned, int rows, int64_t width, int64_t height, address y) {
  by_size(itemsize, [=](auto t) {
    using T = decltype(t);
    POSTTRAIN_CALL(nf4_matvec<T>, matrix(w), at<T>(x), at<T>(turned), rows, width, height, at<T>(y));
  });
}

bool with_cuda() {
#ifdef POSTTRAIN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of posttrain; call them through posttrain.ops";
  m.def("isa", &posttrain::isa_name, "instruction set of the CPU kernels: baseline, avx2 or avx512");
  m.def("with_cuda", &with_cuda, "whether this build contains the CUDA kernels");
  m.def("pack_best_fit", &pack_best_fit);
  m.def("forest_tokens", &forest_tokens);
  m.def("forest_layout", &forest_layout);
  m.def("sequence_layout", &sequence_layout);

  m.def("logprob_fold", &logprob_fold);
  m.def("logprob_grad", &logprob_grad);
#ifdef POSTTRAIN_WITH_CUDA
  posttrain::cuda::bind_kernels(m);
#endif
  m.def("rms_norm_forward", &rms_norm_forward);
  m.def("rms_norm_backward", &rms_norm_backward);
  m.def("rms_norm_blocks", [](int64_t rows) { return posttrain::baseline::rms_norm_blocks(rows); });
  m.def("rope", &rope);
  m.def("glu_forward", &glu_forward);
  m.def("glu_backward", &glu_backward);
  m.def("nf4_dequantize", &nf4_dequantize);
  m.def("nf4_matvec", &nf4_matvec);
  m.def("attention_workspace", &attention_workspace);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("check_pages", &check_pages);
  m.def("write_cache", &write_cache);
  m.def("rope_cache", &rope_cache);
  m.def("paged_workspace", &paged_workspace);
  m.def("paged_attention", &paged_attention);
  m.def("sample", &sample);
  m.def("linear", &linear);
  m.def("decoder_sizes", [] { return py::make_tuple(sizeof(posttrain::Decoder<float>), sizeof(posttrain::DecoderLayer<float>)); });
  m.def("turn_weight", &turn_weight);
  m.attr("turned_columns") = posttrain::kTurnedColumns;
  m.def("decoder_workspace", &decoder_workspace);
  m.def("decode", &decode);
  m.def("burst", &burst);
}
