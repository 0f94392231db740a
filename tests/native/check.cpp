// The kernel's C interface against its definition in double precision, without Python: for instruction sets that this machine can
// only compile for (ARM under an emulator) and for the logic of vectors wider than its own.
//
//   check NUMBER      the instruction set of that number; prints what was checked, exits with 1 if anything was wrong
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "packed.h"

using namespace llmquant;

extern "C" {
void llmquant_pack(const Weight*, const uint8_t*, uint32_t*, int);
void llmquant_linear(int, const Weight*, const void*, int64_t, int32_t, const void*, void*, int);
void llmquant_decode(int, const Weight*, int64_t, int64_t, int32_t, void*, int64_t, int);
const char* llmquant_instructions(int, int*);
}

namespace {

std::mt19937 random_bits(1);

struct Case {
  Weight w{};
  std::vector<uint8_t> codes, zeros;
  std::vector<uint32_t> words;
  std::vector<float> scales;

  Case(int bits, bool symmetric, int64_t width, int64_t groups, int64_t out) {
    w.out = out, w.in = groups * width, w.groups = groups, w.width = width, w.bits = bits, w.scale_type = kFloat32;
    codes.resize(out * w.in), words.resize(w.tiles() * w.tile_words());
    scales.resize(w.tiles() * groups * kRows), zeros.resize(scales.size());
    for (auto& c : codes) c = random_bits() % (1 << bits);
    for (auto& s : scales) s = static_cast<float>(random_bits() % 255 + 1) / 1024;
    for (auto& z : zeros) z = random_bits() % (1 << bits);
    w.words = words.data(), w.scales = scales.data(), w.zeros = symmetric ? nullptr : zeros.data();
    llmquant_pack(&w, codes.data(), words.data(), 1);
  }

  int64_t place(int64_t row, int64_t column) const { return (row / kRows * w.groups + column / w.width) * kRows + row % kRows; }
  int zero(int64_t row, int64_t column) const { return w.zeros ? zeros[place(row, column)] : 1 << (w.bits - 1); }
  double scale(int64_t row, int64_t column) const { return scales[place(row, column)]; }
  double weight(int64_t row, int64_t column) const {
    return (codes[row * w.in + column] - zero(row, column)) * scale(row, column);
  }
};

int wrong_weights(const Case& c, int instructions) {
  std::vector<float> decoded(c.w.in * c.w.out);
  llmquant_decode(instructions, &c.w, 0, c.w.out, kFloat32, decoded.data(), c.w.out, 1);
  int wrong = 0;
  for (int64_t r = 0; r < c.w.out; ++r)
    for (int64_t k = 0; k < c.w.in; ++k) wrong += decoded[k * c.w.out + r] != static_cast<float>(c.weight(r, k));
  return wrong;
}

int wrong_products(const Case& c, int instructions, int64_t rows) {
  std::vector<float> x(rows * c.w.in), y(rows * c.w.out, NAN);
  std::normal_distribution<float> normal;
  for (auto& v : x) v = normal(random_bits);
  llmquant_linear(instructions, &c.w, x.data(), rows, kFloat32, nullptr, y.data(), 1);
  int wrong = 0;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < c.w.out; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < c.w.in; ++k) {
        sum += c.weight(r, k) * x[m * c.w.in + k];
        magnitude += std::abs(x[m * c.w.in + k]) * (c.codes[r * c.w.in + k] + c.zero(r, k)) * c.scale(r, k);
      }
      wrong += !(std::abs(y[m * c.w.out + r] - sum) <= static_cast<double>(c.w.in + 4) * 0x1p-24 * magnitude);
    }
  return wrong;
}

}  // namespace

int main(int, char** arguments) {
  const int instructions = std::atoi(arguments[1]);
  int available = 0, wrong = 0, cases = 0;
  for (int bits : {2, 3, 4, 8})
    for (bool symmetric : {true, false})
      for (auto [width, groups] : {std::pair{32, 3}, {64, 3}, {192, 2}})
        for (int64_t out : {1, 33, 64}) {
          const Case c(bits, symmetric, width, groups, out);
          wrong += wrong_weights(c, instructions);
          for (int64_t rows : {1, 2, 3, 7, 13, 29, 270}) wrong += wrong_products(c, instructions, rows), ++cases;
        }
  std::printf("%s: %d products, %d numbers wrong\n", llmquant_instructions(instructions, &available), cases, wrong);
  return wrong != 0;
}
