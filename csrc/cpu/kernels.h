// Every CPU kernel, declared once per instruction set (POSTTRAIN_ISA names which). Row-major, contiguous rows,
// T = float or double. Include through cpu/all.h from code that calls kernels, or directly from a kernel's own file.
#include <cstdint>

#include "attention.h"
#include "decoder.h"
#include "nf4.h"
#include "sample.h"

namespace posttrain::POSTTRAIN_ISA {

// y = sum / rms(sum) * weight with sum = x + residual; residual may be null (then sum is x and is not written).
template <class T>
void rms_norm_forward(const T* x, const T* residual, const T* weight, T* y, T* sum, T* rstd, int64_t rows,
                      int64_t width, double eps);

// dx = gradient of sum (grad_sum may be null), dw = gradient of weight.
// `partial` and `exact` are workspaces of rms_norm_blocks(rows) * width elements.
template <class T>
void rms_norm_backward(const T* grad_y, const T* grad_sum, const T* sum, const T* weight, const T* rstd, T* dx, T* dw,
                       T* partial, double* exact, int64_t rows, int64_t width);
int64_t rms_norm_blocks(int64_t rows);

// Turns the first `rotated` elements of every head of queries and keys by the angles whose cos and sin are
// [1 or batch, tokens, rotated], or, transposed, back; copies the others.
template <class T>
void rope(const TurnedHeads<T>& q, const TurnedHeads<T>& k, const T* cos, const T* sin, int64_t angle_batch_stride,
          int64_t batch, int64_t tokens, int64_t width, int64_t rotated, bool transposed);

// A step's queries and keys turned, into `out` [tokens, heads, width] and the cache, and the values beside the keys.
template <class T>
void rope_cache(const StepHeads<T>& s, int64_t tokens);
// Of tokens begin <= t < end, on this thread.
template <class T>
void rope_cache_tokens(const StepHeads<T>& s, int64_t begin, int64_t end);

// y = act(gate) * up with act 0 silu, 1 gelu, 2 gelu's tanh form. Rows of inputs have strides, results are contiguous.
template <class T>
void glu_forward(int act, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y,
                 int64_t rows, int64_t width);
template <class T>
void glu_backward(int act, const T* grad_y, int64_t grad_stride, const T* gate, int64_t gate_stride,
                  const T* up, int64_t up_stride, T* grad_gate, T* grad_up, int64_t rows, int64_t width);

// Logits of a head: z = cap((a + bias) * scale) * inverse_temperature with cap(t) = softcap * tanh(t / softcap),
// or t where softcap is 0.
struct LogitTransform {
  double scale, softcap, inverse_temperature;
};

// Folds a tile of raw logits a [rows, cols] (row stride `stride`, columns first_column...) into the statistics of
// every token but the target: reference m, maximum top, s = sum e^(z-m), t = sum (z-m) e^(z-m) (may be null), and
// the target's own z in z_target. Leaves z in the tile if `unit` is null. Otherwise leaves e^(z-m) dz/dcap there (0
// at the target) and rescales the rows of unit [rows, width] where m moved.
template <class T>
void logprob_fold(T* tile, int64_t stride, int64_t rows, int64_t cols, int64_t first_column, const int64_t* targets,
                  const T* bias, LogitTransform transform, T* m, T* top, T* s, T* t, T* z_target, T* unit,
                  int64_t width);

// Gradient of a tile of raw logits (or of finished z, if `finished`), written to `grad` (which may be the tile).
// Log-sum-exp is lse + lse_low, so that p keeps its digits at large logits. entropy and the three incoming gradients
// are per row; entropy and the gradients may be null.
template <class T>
void logprob_grad(const T* tile, int64_t tile_stride, T* grad, int64_t grad_stride, int64_t rows, int64_t cols,
                  int64_t first_column, const int64_t* targets, const T* bias, LogitTransform transform, bool finished,
                  const T* logprob, const T* entropy, const T* lse, const T* lse_low, const T* grad_logprob,
                  const T* grad_entropy, const T* grad_lse);

// Elements of workspace that each thread needs.
template <class T>
int64_t attention_workspace(int64_t width, int64_t value_width, bool backward);

// out [tokens, heads, value_width] and lse [heads, tokens], contiguous. `steps`: the most chunks a tree has.
template <class T>
void attention_forward(const Attention<T>& f, const QueryTile* tiles, int64_t num_tiles, T* out, double* lse,
                       T* workspace, int threads);
template <class T>
void attention_backward(const Attention<T>& f, const QueryTile* tiles, const TileChunk* chunks, int64_t num_chunks,
                        int64_t steps, const AttentionGradients<T>& g, T* workspace, int threads);

// As attention_workspace.
template <class T>
int64_t paged_workspace(int64_t width);

// out [tokens, heads, width], contiguous.
template <class T>
void paged_attention(const PagedAttention<T>& f, const QuerySlice* slices, const SlicePanel* panels,
                     int64_t num_panels, T* out, T* workspace, int threads);

// The same in pieces, 0 <= piece < paged_pieces, in any order and on any thread; each thread has a workspace.
template <class T>
int64_t paged_pieces(const PagedAttention<T>& f, int64_t num_panels, int64_t threads);
template <class T>
void paged_piece(const PagedAttention<T>& f, const QuerySlice* slices, const SlicePanel* panels, int64_t num_panels,
                 int64_t threads, int64_t piece, T* out, T* workspace);

// A row without a distribution gets token 0 and the logprob NaN.
void sample(const SampleBatch& batch, int64_t* tokens, float* logprobs, int threads);
// Row `row` by itself.
void sample_row(const SampleBatch& batch, int64_t row, int64_t* tokens, float* logprobs);

// Elements [first, first + count) of the matrix `w`.
template <class T>
void nf4_dequantize(const Nf4& w, int64_t first, int64_t count, T* out);

// y [rows, height] = x W^T for W [height, width] and x [rows, width]; `turned` is a workspace of the size of x.
template <class T>
void nf4_matvec(const Nf4& w, const T* x, T* turned, int rows, int64_t width, int64_t height, T* y);

// Several layers with the same x [rows, width]. Every output has the same bits whatever rows are beside it.
template <class T>
void linear(const T* x, int64_t rows, const LinearTask<T>* tasks, int count);
// The part of it that is that of thread number `thread`.
template <class T>
void linear_share(const T* x, int64_t rows, const LinearTask<T>* tasks, int count, int64_t thread, int64_t threads);
// Turns W [height, width]; `turned` has room for whole pieces.
template <class T>
void turn_weight(const T* weight, int64_t height, int64_t width, T* turned);

// Elements of workspace that a step needs; and the step.
template <class T>
int64_t decoder_workspace(const Decoder<T>& decoder, const DecoderStep<T>& step);
template <class T>
void decode(const Decoder<T>& decoder, const DecoderStep<T>& step);
// All of `steps`, the first of which is `step`.
template <class T>
void decode(const Decoder<T>& decoder, DecoderStep<T>& step, DecoderSteps<T> steps);

}  // namespace posttrain::POSTTRAIN_ISA
