// Packing plans: integer arithmetic on host memory, one thread.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "kernels.h"

namespace fastbert {

MaskPlan plan_mask_lengths(const bool* mask, std::int32_t* cu_seqlens, std::int64_t B, std::int64_t L) {
  MaskPlan plan{0, 0};
  cu_seqlens[0] = 0;
  for (std::int64_t row = 0; row < B; ++row) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(mask + row * L);
    const std::int64_t length = std::accumulate(bytes, bytes + L, std::int64_t{0});
    plan.num_tokens += length;
    if (plan.num_tokens > INT32_MAX) throw std::overflow_error("the batch has more than 2^31 - 1 tokens: split it");
    plan.max_seqlen = std::max(plan.max_seqlen, length);
    cu_seqlens[row + 1] = static_cast<std::int32_t>(plan.num_tokens);
  }
  return plan;
}

void plan_mask_indices(const bool* mask, std::int64_t* indices, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i)
    if (mask[i]) *indices++ = i;
}

std::vector<std::int64_t> plan_batches(const std::int64_t* lengths, std::int64_t* order, std::int64_t S,
                                       std::int64_t budget_tokens, std::int64_t max_sequences) {
  std::iota(order, order + S, std::int64_t{0});
  std::stable_sort(order, order + S, [=](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::int64_t> bounds{0};
  std::int64_t tokens = 0;
  for (std::int64_t i = 0; i < S; ++i) {
    const std::int64_t count = i - bounds.back(), length = lengths[order[i]];
    // length > budget - tokens, not tokens + length > budget: the sum may not fit.
    if (count > 0 && (length > budget_tokens - tokens || count == max_sequences)) {
      bounds.push_back(i);
      tokens = 0;
    }
    tokens += length;
  }
  if (S > 0) bounds.push_back(S);
  return bounds;
}

}  // namespace fastbert
