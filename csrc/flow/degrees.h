// Units in order of their degrees: the plan of a masked product, made by those who call the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace genfuse {

// The numbers 0 .. n - 1 in order of their degrees, equal ones as they were.
inline std::vector<int64_t> order_of_degrees(const int64_t* degrees, int64_t n) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (std::is_sorted(degrees, degrees + n)) return order;
  const auto [least, most] = std::minmax_element(degrees, degrees + n);
  const int64_t low = *least;
  const uint64_t range = static_cast<uint64_t>(*most) - static_cast<uint64_t>(low);
  if (range > static_cast<uint64_t>(4 * n)) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return degrees[a] < degrees[b]; });
    return order;
  }
  std::vector<int64_t> begin(static_cast<size_t>(range) + 2);
  for (int64_t i = 0; i < n; ++i) ++begin[static_cast<size_t>(degrees[i] - low) + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(begin[static_cast<size_t>(degrees[i] - low)]++)] = i;
  return order;
}

inline std::vector<int64_t> places_of(const std::vector<int64_t>& order) {
  std::vector<int64_t> place(order.size());
  for (size_t i = 0; i < order.size(); ++i) place[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  return place;
}

// Which places of its source the unit at each place of a layer sees: the first `live` ones; which units see a place of
// the source: those from `first` on.
struct Sight {
  std::vector<int64_t> live, first;

  Sight(const int64_t* in_degrees, const std::vector<int64_t>& in_order, const int64_t* out_degrees,
        const std::vector<int64_t>& out_order, bool strict)
      : live(out_order.size()), first(in_order.size(), static_cast<int64_t>(out_order.size())) {
    size_t seen = 0;
    for (size_t o = 0; o < out_order.size(); ++o) {
      const int64_t own = out_degrees[out_order[o]];
      for (; seen < in_order.size(); ++seen) {
        const int64_t other = in_degrees[in_order[seen]];
        if (strict ? other >= own : other > own) break;
        first[seen] = static_cast<int64_t>(o);
      }
      live[o] = static_cast<int64_t>(seen);
    }
  }
};

}  // namespace genfuse
