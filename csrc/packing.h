// Bin packing of sequence lengths: host code, the same for every instruction set.
#pragma once

#include <cstdint>

namespace posttrain {

// Best-fit decreasing: longest first (equal lengths in order), each into the fullest bin it still fits (the first
// opened of equally full ones), else into a new one. bin[i] becomes the bin of length i; returns the number of bins.
// Every length must be in [0, capacity].
int64_t pack_best_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bin);

}  // namespace posttrain
