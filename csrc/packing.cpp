#include "packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

namespace posttrain {

int64_t pack_best_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bin) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::set<std::pair<int64_t, int64_t>> open;  // (space left, bin), the tightest first
  int64_t bins = 0;
  for (int64_t i : order) {
    auto fit = open.lower_bound({lengths[i], 0});
    auto [space, chosen] = fit != open.end() ? *fit : std::pair{capacity, bins++};
    if (fit != open.end()) open.erase(fit);
    open.emplace(space - lengths[i], chosen);
    bin[i] = chosen;
  }
  return bins;
}

}  // namespace posttrain
