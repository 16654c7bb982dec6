// What statuses mean, on a GPU and emulated.
#include "cuda/device.h"

namespace posttrain::cuda {

const char* describe(int status) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#else
  return emulation::describe(status);
#endif
}

}  // namespace posttrain::cuda
