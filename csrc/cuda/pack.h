// N elements that lie on a multiple of their common size, or of 16 bytes if that is less: as few loads or stores as
// hold them, one up to 16 bytes. N = 1 is the way for rows of any width and place.
#pragma once

#include "cuda/device.h"

namespace posttrain::cuda {

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];

  __device__ float operator[](int n) const { return to_float(values[n]); }
  __device__ void set(int n, float x) { from_float(values + n, x); }
};

template <int N, class T>
__device__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N>
__device__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

}  // namespace posttrain::cuda
