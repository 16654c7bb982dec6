// cuda_<op>(stream, addresses, sizes, dtype tags...): a launch, or an error that says why there was none.
#include "cuda/bindings.h"

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernels.h"

namespace py = pybind11;
using address = uintptr_t;

namespace posttrain::cuda {

namespace {

// The address `a` as a pointer to T.
template <class T>
T* at(address a) {
  return reinterpret_cast<T*>(a);
}

void check(int status) {
  if (status != 0) throw std::runtime_error(std::string("CUDA: ") + describe(status));
}

void bound_logprob_fold(address stream, int dtype, address tile, int64_t stride, int64_t rows, int64_t cols,
                        int64_t first_column, address targets, address bias, float scale, float softcap,
                        float inverse_temperature, address m, address top, address s, address t, address z_target,
                        address unit, int64_t width) {
  using T = float;
  check(logprob_fold(at<void>(stream), dtype, at<T>(tile), stride, rows, cols, first_column, at<int64_t>(targets),
                     at<T>(bias), {scale, softcap, inverse_temperature}, at<T>(m), at<T>(top), at<T>(s), at<T>(t),
                     at<T>(z_target), at<T>(unit), width));
}

void bound_logprob_grad(address stream, int dtype, address tile, int64_t stride, int64_t rows, int64_t cols,
                        int64_t first_column, address targets, address bias, float scale, float softcap,
                        float inverse_temperature, address logprob, address entropy, address lse, address lse_low,
                        address grad_logprob, address grad_entropy, address grad_lse) {
  using T = float;
  check(logprob_grad(at<void>(stream), dtype, at<T>(tile), stride, rows, cols, first_column, at<int64_t>(targets),
                     at<T>(bias), {scale, softcap, inverse_temperature}, at<T>(logprob), at<T>(entropy), at<T>(lse),
                     at<T>(lse_low), at<T>(grad_logprob), at<T>(grad_entropy), at<T>(grad_lse)));
}

// Start, strides of tokens and heads, heads.
using head_rows = std::tuple<address, int64_t, int64_t, int>;

HeadRows heads_at(head_rows x) {
  const auto [start, token_stride, head_stride, heads] = x;
  return {at<void>(start), token_stride, head_stride, heads};
}

// As sample of posttrain._C, after a stream and a dtype, with a workspace.
void bound_sample(address stream, int dtype, address logits, int64_t stride, int64_t rows, int64_t size,
                  std::tuple<address, address, address, address, address, address> parameters, address workspace,
                  address tokens, address logprobs) {
  const auto [temperature, top_k, top_p, min_p, seeds, offsets] = parameters;
  check(sample(at<void>(stream), dtype, at<void>(logits), stride, rows, size,
               {at<float>(temperature), at<int64_t>(top_k), at<float>(top_p), at<float>(min_p), at<int64_t>(seeds),
                at<int64_t>(offsets)},
               at<void>(workspace), at<int64_t>(tokens), at<float>(logprobs)));
}

void bound_rms_norm(address stream, int dtype, bool wide_weight, address x, address residual, address weight, address y,
                    address total, address rstd, int64_t rows, int64_t width, float eps) {
  check(rms_norm(at<void>(stream), dtype, wide_weight, at<void>(x), at<void>(residual), at<void>(weight), at<void>(y),
                 at<void>(total), at<float>(rstd), rows, width, eps));
}

void bound_rope_cache(address stream, int dtype, bool wide_angles, head_rows q, head_rows k, head_rows v, address cos,
                      address sin, address slots, int64_t tokens, int64_t width, int64_t half, address q_out,
                      address keys, address values) {
  check(rope_cache(at<void>(stream), dtype, wide_angles, heads_at(q), heads_at(k), heads_at(v), at<void>(cos),
                   at<void>(sin), at<int64_t>(slots), tokens, width, half, at<void>(q_out), at<void>(keys),
                   at<void>(values)));
}

// packed, absmax, nested absmax, code and offset; block and nested block, as in posttrain._C.
using nf4 = std::tuple<address, address, address, address, address, int64_t, int64_t>;

Nf4 matrix(const nf4& w) {
  const auto [packed, absmax, nested, code, offset, block, nested_block] = w;
  return {at<uint8_t>(packed), nested ? nullptr : at<float>(absmax), nested ? at<uint8_t>(absmax) : nullptr,
          at<float>(nested),   at<float>(code), at<float>(offset), block, nested_block};
}

void bound_nf4_dequantize(address stream, const nf4& w, int64_t first, int64_t count, int dtype, address out) {
  check(nf4_dequantize(at<void>(stream), matrix(w), first, count, dtype, at<void>(out)));
}

void bound_nf4_matvec(address stream, const nf4& w, address x, int dtype, int64_t rows, int64_t width, int64_t height,
                      address base, int64_t base_stride, address y, int64_t y_stride, address a, address b,
                      int adapter_dtype, int64_t ranks, float scale, address u, address counters, bool spans) {
  const Nf4Adapter adapter = {at<void>(a), at<void>(b), adapter_dtype, ranks, scale, at<float>(u), at<int>(counters)};
  check(nf4_matvec(at<void>(stream), matrix(w), at<void>(x), dtype, rows, width, height, at<void>(base), base_stride,
                   at<void>(y), y_stride, adapter, spans));
}

void bound_lora_shrink(address stream, address x, int dtype, int64_t stride, int64_t rows, int64_t width,
                       address adapter, address a, int a_dtype, int64_t adapters, int64_t ranks, address scale,
                       address u) {
  check(lora_shrink(at<void>(stream), at<void>(x), dtype, stride, rows, width, at<int64_t>(adapter), at<void>(a),
                    a_dtype, adapters, ranks, at<float>(scale), at<float>(u)));
}

void bound_lora_expand(address stream, address u, address adapter, address b, int b_dtype, int64_t adapters,
                       int64_t ranks, address y, int dtype, int64_t stride, int64_t rows, int64_t height) {
  check(lora_expand(at<void>(stream), at<float>(u), at<int64_t>(adapter), at<void>(b), b_dtype, adapters, ranks,
                    at<void>(y), dtype, stride, rows, height));
}

void bound_lora_outer(address stream, address v, int64_t ranks, address x, int dtype, int64_t stride, int64_t rows,
                      int64_t width, address adapter, int64_t adapters, address grad) {
  check(lora_outer(at<void>(stream), at<float>(v), ranks, at<void>(x), dtype, stride, rows, width,
                   at<int64_t>(adapter), adapters, at<float>(grad)));
}

void bound_layout_expand(address stream, address lengths, address parents, int64_t segments, int64_t tokens,
                         address workspace, address visible_until, address positions) {
  using T = int32_t;
  check(layout_expand(at<void>(stream), at<T>(lengths), at<T>(parents), segments, tokens, at<T>(workspace),
                      at<T>(visible_until), at<T>(positions)));
}

void bound_layout_schedule(address stream, address visible_until, address positions, int64_t tokens, address schedule,
                           int64_t blocks) {
  using T = int32_t;
  check(layout_schedule(at<void>(stream), at<T>(visible_until), at<T>(positions), tokens, at<T>(schedule), blocks));
}

// Addresses and strides: q, k and v, of which the last dimension is contiguous, the block table, and the parts.
using token_heads = std::tuple<address, int64_t, int64_t>;
using page_heads = std::tuple<address, int64_t, int64_t, int64_t>;
using page_table = std::tuple<address, int64_t, address>;
using split_parts = std::tuple<address, address, address>;
using decode_sizes = std::tuple<int, int, int, int, int, int>;
using score_options = std::tuple<float, float, int>;

void bound_paged_decode(address stream, int dtype, token_heads q, page_heads k, page_heads v, page_table table,
                        address sinks, split_parts parts, decode_sizes sizes, score_options options, address out) {
  const auto [q_data, q_token, q_head] = q;
  const auto pages = [](const page_heads& x) {
    return PagedView{at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
  };
  const auto [block_table, table_row, contexts] = table;
  const auto [part_out, part_top, part_total] = parts;
  const auto [sequences, heads, key_heads, width, page_bits, splits] = sizes;
  const auto [scale, softcap, window] = options;
  const PagedDecode f = {at<void>(q_data), q_token, q_head, pages(k), pages(v), at<int32_t>(block_table), table_row,
                         at<int32_t>(contexts), at<float>(sinks), at<float>(part_out), at<float>(part_top),
                         at<float>(part_total), sequences, heads, key_heads, width, page_bits, splits, scale, softcap,
                         window};
  check(paged_decode(at<void>(stream), dtype, f, at<void>(out)));
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("cuda_logprob_fold", &bound_logprob_fold);
  m.def("cuda_logprob_grad", &bound_logprob_grad);
  m.def("cuda_sample", &bound_sample);
  m.def("cuda_sample_workspace", &sample_workspace);
  m.def("cuda_rms_norm", &bound_rms_norm);
  m.def("cuda_rope_cache", &bound_rope_cache);
  m.def("cuda_nf4_dequantize", &bound_nf4_dequantize);
  m.def("cuda_nf4_matvec", &bound_nf4_matvec);
  m.def("cuda_lora_shrink", &bound_lora_shrink);
  m.def("cuda_lora_expand", &bound_lora_expand);
  m.def("cuda_lora_outer", &bound_lora_outer);
  m.def("cuda_layout_expand", &bound_layout_expand);
  m.def("cuda_layout_schedule", &bound_layout_schedule);
  m.def("cuda_paged_split", &paged_split);
  m.def("cuda_paged_decode", &bound_paged_decode);
}

}  // namespace posttrain::cuda
