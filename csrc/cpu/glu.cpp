// Gated linear units: y = act(gate) * up, with act one of silu, gelu and gelu's tanh form (posttrain/ops/glu.py derives
// the gradients). Rows may lie apart, as the halves of one fused projection do.
//
// Every element is read once and every result written once; the backward recomputes act(gate).
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace posttrain::POSTTRAIN_ISA {

namespace {

enum { kSilu, kGelu, kGeluTanh };  // values of `act` (cpu/kernels.h)
constexpr int64_t kPiece = 2048;  // elements of a row that a thread takes at a time
constexpr int64_t kLarge = 8 << 20;  // bytes of a result that will not stay in cache

template <class T>
Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp(-x));
}

// e^(-a^2/2) times a polynomial in 1 / (1 + 0.26 a): the upper tail of the normal distribution at a >= 0, to a few ulp
// of float. The polynomial is a least-maximum fit (relative error 7e-9) for a in [0, 14.5], each
// coefficient rounded to float before the next is fitted, and the last chosen so that gelu leans to neither side.
inline Vec<float> normal_tail(Vec<float> a, Vec<float> bell) {
  const Vec<float> t = 1.0f / (1.0f + 0.26f * a);
  Vec<float> p = splat(3.392614797e-02f);
  p = p * t - 1.705186516e-01f;
  p = p * t + 2.909821570e-01f;
  p = p * t - 2.008113414e-01f;
  p = p * t + 2.001177967e-01f;
  p = p * t + 3.120735288e-02f;
  p = p * t + 1.094817072e-01f;
  p = p * t + 1.017153859e-01f;
  p = p * t + 1.039066166e-01f;
  p = p * t - 7.168165e-06f;
  return p * bell;
}

inline Vec<double> normal_tail(Vec<double> a, Vec<double>) {
  Vec<double> tail;
  for (int i = 0; i < Lanes<double>::n; ++i) tail[i] = 0.5 * __builtin_erfc(a[i] * 0.70710678118654752440);
  return tail;
}

// Each activation gives act(x) and act'(x).
template <class T>
struct Silu {
  Vec<T> s, x;
  explicit Silu(Vec<T> x) : s(sigmoid<T>(x)), x(x) {}
  Vec<T> value() const { return x * s; }
  Vec<T> slope() const { return s + x * s * (T(1) - s); }
};

// gelu(x) = x Phi(x) with Phi the normal distribution function. What float leaves of a constant is added back: alone, it
// would tilt all results to one side.
template <class T>
struct Gelu {
  static constexpr double kPeak = 0.39894228040143267794;  // 1 / sqrt(2 pi)
  static constexpr T kDensity = T(kPeak), kDensityLeft = T(kPeak - double(kDensity));
  Vec<T> bell, phi, x;
  explicit Gelu(Vec<T> x) : bell(exp(T(-0.5) * x * x)), x(x) {
    const Vec<T> tail = normal_tail(x < T(0) ? -x : x, bell);
    phi = x < T(0) ? tail : T(1) - tail;
  }
  Vec<T> value() const { return x * phi; }
  Vec<T> slope() const { return phi + (kDensity * (x * bell) + kDensityLeft * (x * bell)); }
};

// gelu(x) ~ x (1 + tanh(z / 2)) / 2 = x sigmoid(z) with z = c x + k x^3. The slope needs sigmoid(-z) = e s without
// cancellation, since z' grows; so e = exp(-z) must stay finite.
template <class T>
struct GeluTanh {
  static constexpr double kC = 1.59576912160573071176, kK = 0.044715 * kC;  // c = 2 sqrt(2 / pi)
  static constexpr T c = T(kC), c_left = T(kC - double(c)), k = T(kK), k_left = T(kK - double(k));
  Vec<T> e, s, x, x2;
  explicit GeluTanh(Vec<T> x) : x(x), x2(x * x) {
    const Vec<T> z = x * (c + (k * x2 + (k_left * x2 + c_left)));
    e = exp(-max<T>(z, splat(T(-88))));
    s = T(1) / (T(1) + e);
  }
  Vec<T> value() const { return x * s; }
  Vec<T> slope() const { return s + e * s * s * x * (c + (T(3 * kK) * x2 + c_left)); }
};

// The rows of one call, cut into pieces; rows that follow each other directly count as one long row.
struct Pieces {
  int64_t width, per_row, count;
  Pieces(int64_t rows, int64_t width_, bool joined)
      : width(joined ? rows * width_ : width_),
        per_row((width + kPiece - 1) / kPiece),
        count((joined ? (rows > 0) : rows) * per_row) {}
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

template <class T>
void put(T* p, Vec<T> v, bool streamed) {
  if (streamed)
    stream(p, v);
  else
    store(p, v);
}

template <template <class> class Act, class T>
void forward(Rows<const T> gate, Rows<const T> up, T* y, int64_t rows, int64_t width) {
  constexpr int n = Lanes<T>::n;
  const Pieces pieces(rows, width, gate.stride == width && up.stride == width);
  const bool large = rows * width * int64_t(sizeof(T)) >= kLarge;
#pragma omp parallel if (rows * width > 8192)
  {
#pragma omp for schedule(static) nowait
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t row = piece / pieces.per_row, start = piece % pieces.per_row * kPiece;
      const int64_t left = pieces.width - start, size = left < kPiece ? left : kPiece;
      const T* g = gate.data + row * gate.stride + start;
      const T* u = up.data + row * up.stride + start;
      T* out = y + row * pieces.width + start;
      const bool streamed = large && can_stream(out);
      int64_t j = 0;
      for (; j + n <= size; j += n) put(out + j, Act<T>(load(g + j)).value() * load(u + j), streamed);
      if (j < size) {
        const int part = int(size - j);
        store_part(out + j, Act<T>(load_part(g + j, part, T(0))).value() * load_part(u + j, part, T(0)), part);
      }
    }
    stream_end();
  }
}

template <template <class> class Act, class T>
void backward(Rows<const T> grad_y, Rows<const T> gate, Rows<const T> up, T* grad_gate, T* grad_up, int64_t rows,
              int64_t width) {
  constexpr int n = Lanes<T>::n;
  const Pieces pieces(rows, width, grad_y.stride == width && gate.stride == width && up.stride == width);
  const bool large = rows * width * int64_t(sizeof(T)) >= kLarge;
#pragma omp parallel if (rows * width > 8192)
  {
#pragma omp for schedule(static) nowait
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      const int64_t row = piece / pieces.per_row, start = piece % pieces.per_row * kPiece;
      const int64_t left = pieces.width - start, size = left < kPiece ? left : kPiece;
      const T* d = grad_y.data + row * grad_y.stride + start;
      const T* g = gate.data + row * gate.stride + start;
      const T* u = up.data + row * up.stride + start;
      T* dg = grad_gate + row * pieces.width + start;
      T* du = grad_up + row * pieces.width + start;
      const bool streamed = large && can_stream(dg) && can_stream(du);
      int64_t j = 0;
      for (; j + n <= size; j += n) {
        const Act<T> act(load(g + j));
        const Vec<T> grad = load(d + j);
        put(dg + j, grad * load(u + j) * act.slope(), streamed);
        put(du + j, grad * act.value(), streamed);
      }
      if (j < size) {
        const int part = int(size - j);
        const Act<T> act(load_part(g + j, part, T(0)));
        const Vec<T> grad = load_part(d + j, part, T(0));
        store_part(dg + j, grad * load_part(u + j, part, T(0)) * act.slope(), part);
        store_part(du + j, grad * act.value(), part);
      }
    }
    stream_end();
  }
}

}  // namespace

template <class T>
void glu_forward(int act, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y,
                 int64_t rows, int64_t width) {
  const Rows<const T> g{gate, gate_stride}, u{up, up_stride};
  if (act == kSilu) forward<Silu>(g, u, y, rows, width);
  if (act == kGelu) forward<Gelu>(g, u, y, rows, width);
  if (act == kGeluTanh) forward<GeluTanh>(g, u, y, rows, width);
}

template <class T>
void glu_backward(int act, const T* grad_y, int64_t grad_stride, const T* gate, int64_t gate_stride,
                  const T* up, int64_t up_stride, T* grad_gate, T* grad_up, int64_t rows, int64_t width) {
  const Rows<const T> d{grad_y, grad_stride}, g{gate, gate_stride}, u{up, up_stride};
  if (act == kSilu) backward<Silu>(d, g, u, grad_gate, grad_up, rows, width);
  if (act == kGelu) backward<Gelu>(d, g, u, grad_gate, grad_up, rows, width);
  if (act == kGeluTanh) backward<GeluTanh>(d, g, u, grad_gate, grad_up, rows, width);
}

#define INSTANTIATE(T)                                                                                          \
  template void glu_forward<T>(int, const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t);          \
  template void glu_backward<T>(int, const T*, int64_t, const T*, int64_t, const T*, int64_t, T*, T*,     \
                                int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace posttrain::POSTTRAIN_ISA
