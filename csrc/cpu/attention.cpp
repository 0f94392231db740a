// Attention of many queries. Sixteen of a head stand side by side, in the lanes of a tile: their scores against a pass of keys are one
// product, scores[t][16], which is the panel that the values are multiplied by afterwards. So nothing is summed across lanes, and both
// products are those of the linears.
#include <algorithm>
#include <memory>
#include <vector>

#include "block.h"
#include "numbers.h"
#include "products.h"
#include "threads.h"

namespace llmquant {
namespace {

constexpr int64_t kFewTokens = 4;  // below this, each query by itself: sixteen lanes would stand mostly empty

// What sixteen queries may see, as bytes [count][16], and between which keys.
struct Sight {
  std::vector<uint8_t> mask;
  int64_t first = 0, last = 0;

  Sight(const Prompt& p, const Seen& seen, int64_t sequence, int64_t token) : mask(seen.count * kRows), first(seen.count) {
    for (int64_t i = 0; i < std::min<int64_t>(kRows, p.tokens - token); ++i) {
      const uint8_t* row = seen.mask + sequence * seen.mask_strides[0] + (token + i) * seen.mask_strides[1];
      for (int64_t t = 0; t < seen.count; ++t) {
        if (!row[t]) continue;
        mask[t * kRows + i] = 1;
        first = std::min(first, t), last = std::max(last, t + 1);
      }
    }
    first = std::min(first, last);
  }
};

class Attention {
 public:
  Attention(const Instructions& with, const Block& b, const Prompt& p, float* query, const Seen& seen)
      : with_(with), b_(b), p_(p), query_(query), seen_(seen), dims_(b.head_dim, with.most_rows) {
    key_passes_ = (seen.count + with.most_rows - 1) / with.most_rows;
    key_size_ = key_passes_ * with.most_rows * b.head_dim;
    size_ = key_size_ + seen.count * b.head_dim;
    packed_.reset(new float[static_cast<size_t>(p.sequences * b.kv_heads * size_)]);
  }

  void run(int threads) {
    for_each(p_.sequences * b_.kv_heads, threads, [&](int64_t i) { pack(i / b_.kv_heads, i % b_.kv_heads, packed_.get() + i * size_); });
    const int64_t blocks = (p_.tokens + kRows - 1) / kRows;
    std::vector<Sight> sights;
    if (seen_.mask)
      for (int64_t s = 0; s < (seen_.mask_strides[0] ? p_.sequences : 1); ++s)
        for (int64_t i = 0; i < blocks; ++i) sights.emplace_back(p_, seen_, s, i * kRows);
    for_each(p_.sequences * b_.heads * blocks, threads, [&](int64_t i) {
      const int64_t block = blocks - 1 - i % blocks, sequence = i / blocks / b_.heads;  // the longest ones first
      const Sight* sight = sights.empty() ? nullptr : &sights[(seen_.mask_strides[0] ? sequence : 0) * blocks + block];
      attend(sequence, i / blocks % b_.heads, block * kRows, sight);
    });
  }

 private:
  // Keys [pass][dim][most_rows], zeros behind the last; values [pass of dimensions][count][size].
  void pack(int64_t sequence, int64_t head, float* to) const {
    const int64_t dim = b_.head_dim, rows = with_.most_rows;
    std::vector<float> lines(static_cast<size_t>(rows * dim));
    for (int64_t pass = 0; pass < key_passes_; ++pass) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = pass * rows + r;
        if (t < seen_.count) widen(seen_.keys, p_.type, place(0, sequence, head, t), dim, &lines[r * dim]);
        else std::fill_n(&lines[r * dim], dim, 0.0f);
      }
      interleave(lines.data(), dim, static_cast<int>(rows), dim, to + pass * rows * dim);
    }
    to += key_size_;
    for (int64_t t = 0; t < seen_.count; ++t) {
      widen(seen_.values, p_.type, place(3, sequence, head, t), dim, lines.data());
      for (int64_t pass = 0; pass < dims_.count; ++pass) {
        const int64_t at = dims_.first(pass), size = dims_.size(pass);
        for (int64_t i = 0; i < size; ++i) to[at * seen_.count + t * size + i] = lines[at + i];
      }
    }
  }

  int64_t place(int strides, int64_t sequence, int64_t head, int64_t token) const {
    return sequence * seen_.strides[strides] + head * seen_.strides[strides + 1] + token * seen_.strides[strides + 2];
  }

  // Sixteen queries from `token` on, fewer at the end.
  void attend(int64_t sequence, int64_t head, int64_t token, const Sight* sight) const {
    const int64_t dim = b_.head_dim, rows = with_.most_rows, wide = b_.heads * dim;
    const int64_t lanes = std::min<int64_t>(kRows, p_.tokens - token), diagonal = seen_.count - p_.tokens + token;
    const int64_t first = sight ? sight->first / rows * rows : 0, last = sight ? sight->last : std::min(seen_.count, diagonal + lanes);
    float* queries = query_ + (sequence * p_.tokens + token) * wide + head * dim;
    float* panel = scratch(static_cast<size_t>((2 * dim + last + rows) * kRows), 3);
    float *sums = panel + dim * kRows, *scores = sums + dim * kRows, totals[kRows];
    for (int64_t k = 0; k < dim; ++k)
      for (int64_t i = 0; i < kRows; ++i) panel[k * kRows + i] = i < lanes ? queries[i * wide + k] * b_.scaling : 0.0f;
    const float* packed = packed_.get() + (sequence * b_.kv_heads + head / (b_.heads / b_.kv_heads)) * size_;
    for (int64_t t = first; t < last; t += rows) {
      with_.multiply(panel, packed + t * dim, dim, static_cast<int>(rows), 1, {nullptr, 0, scores + t * kRows, 0, kRows});
    }
    with_.softmax_columns(scores, first, last, diagonal, sight ? sight->mask.data() : nullptr, totals);
    const float* values = packed + key_size_;
    for (int64_t start = first; start < last; start += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, last - start);
      for (int64_t pass = 0; pass < dims_.count; ++pass) {
        const int64_t at = dims_.first(pass), size = dims_.size(pass);
        float* sum = sums + at * kRows;
        with_.multiply(
            scores + start * kRows, values + at * seen_.count + start * size, count, static_cast<int>(size), 1,
            {start == first ? nullptr : sum, 0, sum, 0, kRows});
      }
    }
    for (int64_t i = 0; i < lanes; ++i)
      for (int64_t k = 0; k < dim; ++k) queries[i * wide + k] = last > first ? sums[k * kRows + i] / totals[i] : 0.0f;
  }

  const Instructions& with_;
  const Block& b_;
  const Prompt& p_;
  float* query_;
  const Seen& seen_;
  const Passes dims_;
  int64_t key_passes_, key_size_, size_;
  std::unique_ptr<float[]> packed_;
};

// Every query by itself, as one token is stepped.
void attend_one_by_one(const Instructions& with, const Block& b, const Prompt& p, float* query, const Seen& seen, int threads) {
  const int64_t dim = b.head_dim, share = b.heads / b.kv_heads, bytes = size_of(p.type);
  for_each(p.rows() * b.heads, p.rows() * b.heads * seen.count * dim < kWorthThreads ? 1 : threads, [&](int64_t i) {
    const int64_t row = i / b.heads, h = i % b.heads / share, sequence = row / p.tokens, token = row % p.tokens;
    const char* keys = static_cast<const char*>(seen.keys) + (sequence * seen.strides[0] + h * seen.strides[1]) * bytes;
    const char* values = static_cast<const char*>(seen.values) + (sequence * seen.strides[3] + h * seen.strides[4]) * bytes;
    const uint8_t* mask = seen.mask ? seen.mask + sequence * seen.mask_strides[0] + token * seen.mask_strides[1] : nullptr;
    const int64_t count = mask ? seen.count : seen.count - p.tokens + token + 1;
    float* scores = scratch(static_cast<size_t>(count + dim), 3);
    float* out = scores + count;
    with.attend(
        query + i * dim, keys, values, p.type, count, seen.strides[2], seen.strides[5], dim, b.scaling, mask, scores, out);
    std::copy(out, out + dim, query + i * dim);
  });
}

}  // namespace

void attend_all(const Instructions& with, const Block& b, const Prompt& p, float* query, const Seen& seen, int threads) {
  if (p.tokens < kFewTokens) return attend_one_by_one(with, b, p, query, seen, threads);
  Attention(with, b, p, query, seen).run(threads);
}

}  // namespace llmquant
