// Tables of a product with codebooks: what every entry of every codebook gives with a piece of a row of x, in 8 or 16 bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "vectors.h"

namespace {

constexpr int ENTRIES = 256;
constexpr int LONG = 64;  // entries of a codebook that are tried out; it begins with its longest ones

// A weight in codebooks. A column is one codebook's part of one vector: column s * m + c. Columns of a chunk share a step,
// those of a group a scale; a chunk never reaches into another group, and has whole vectors, of 256 columns at most.
struct Coded {
  const uint8_t* codes;    // [strips][columns][64]: rows 0 to 31 at even places, the others between them
  const float* books;      // [m][v][256]
  const uint16_t* scales;  // [groups][strips * 64], half
  float longest, others;   // an entry of any codebook is at most so long; and one that is not among its first LONG
  int64_t outputs, inputs, m, v;
  int64_t columns, group, chunk;  // columns in all, of a group, of a chunk

  int64_t strips() const { return (outputs + 63) / 64; }
  int64_t chunks_of_group() const { return (group + chunk - 1) / chunk; }
  int64_t chunks() const {
    const int64_t whole = (columns - 1) / group;
    return whole * chunks_of_group() + (columns - whole * group + chunk - 1) / chunk;
  }
  int64_t group_of(int64_t n) const { return n / chunks_of_group(); }
  int64_t begin(int64_t n) const { return group_of(n) * group + n % chunks_of_group() * chunk; }
  int64_t end(int64_t n) const {
    return std::min(std::min(begin(n) + chunk, (group_of(n) + 1) * group), columns);
  }
};

// Memory from a cache line's begin on.
struct Space {
  char* bytes;
  explicit Space(int64_t count) : bytes(static_cast<char*>(std::aligned_alloc(64, (count + 63) / 64 * 64))) {}
  ~Space() { std::free(bytes); }
  Space(const Space&) = delete;
};

// One row of x against one chunk.
template <int PLANES>
struct Table {
  const Coded& weight;
  float* piece;  // the chunk's numbers of x, zeros beyond the row

  // Copies columns [begin, end) of x; whether all are finite.
  template <class T>
  bool take(const T* x, int64_t begin, int64_t end) const {
    const int64_t first_input = begin / weight.m * weight.v, count = (end - begin) / weight.m * weight.v;
    __mmask16 wrong = 0;
    for (int64_t k = 0; k < count; k += 16) {
      const int64_t left = weight.inputs - first_input - k;
      const f32v some = load(x + first_input + k, left > 0 ? first(left) : 0);
      wrong |= _mm512_fpclass_ps_mask(some, 0x99);  // both kinds of NaN, both infinities
      store(piece + k, some, first(count - k));
    }
    return !wrong;
  }

  float longest_piece(int64_t vectors) const {
    float most = 0;
    for (int64_t s = 0; s < vectors; ++s) {
      float square = 0;
      for (int64_t k = 0; k < weight.v; ++k) square += piece[s * weight.v + k] * piece[s * weight.v + k];
      most = std::max(most, square);
    }
    return std::sqrt(most);
  }

  // 16 entries with a vector of x, added to ``sum``.
  template <int V>
  f32v add(f32v sum, const float* book, const float* x) const {
    for (int64_t k = 0; k < (V ? V : weight.v); ++k)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(x[k]), _mm512_load_ps(book + k * ENTRIES), sum);
    return sum;
  }

  const float* book(int64_t j) const { return weight.books + j % weight.m * weight.v * ENTRIES; }
  const float* vector(int64_t j) const { return piece + j / weight.m * weight.v; }

  // How large the largest product of a chunk with long entries is.
  template <int V>
  float largest(int64_t count) const {
    f32v most = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; ++j)
      for (int i = 0; i < LONG; i += 16)
        most = _mm512_range_ps(most, add<V>(_mm512_setzero_ps(), book(j) + i, vector(j)), 11);  // without its sign
    return _mm512_reduce_max_ps(most);
  }

  // Nothing in the chunk's table is larger. Eight bits need it close, for sixteen a length is good enough.
  template <int V>
  float bound(int64_t count) const {
    const float length = longest_piece(count / weight.m);
    return PLANES == 2 ? length * weight.longest : std::max(length * weight.others, largest<V>(count));
  }

  // Adding 2^23 leaves a whole number in the low bits of a float; 2^15 more keeps it above zero. The upper byte of the
  // sixteen bits is the number of one plane, rounded by half a unit.
  static constexpr float SHIFT = 8388608.0f + 32768.0f + (PLANES == 1 ? 128.0f : 0.0f);
  static constexpr float UNIT = PLANES == 1 ? 256 : 1;
  float most() const { return PLANES == 1 ? 32500 : 32700 - static_cast<float>(weight.v); }  // and room for rounding

  template <int V>
  void column(const float* book, const float* x, uint8_t* table) const {
    alignas(64) static constexpr uint8_t LOW_BYTES[64] = {
        0,  4,  8,  12, 16, 20, 24, 28, 32,  36,  40,  44,  48,  52,  56,  60,  64,  68,  72,  76,  80, 84,
        88, 92, 96, 100, 104, 108, 112, 116, 120, 124, 1,  5,  9,   13,  17,  21,  25,  29,  33,  37,  41,  45,
        49, 53, 57, 61, 65, 69, 73, 77, 81, 85, 89, 93, 97, 101, 105, 109, 113, 117, 121, 125};
    const __m512i order = _mm512_load_si512(LOW_BYTES);  // the lowest bytes of both, then the ones above
    for (int i = 0; i < ENTRIES; i += 64) {
      __m512i whole[4];
      for (int q = 0; q < 4; ++q)
        whole[q] = _mm512_castps_si512(add<V>(_mm512_set1_ps(SHIFT), book + i + 16 * q, x));
      const __m512i left = _mm512_permutex2var_epi8(whole[0], order, whole[1]);
      const __m512i right = _mm512_permutex2var_epi8(whole[2], order, whole[3]);
      _mm512_store_si512(table + i, _mm512_shuffle_i64x2(left, right, 0xee));
      if (PLANES == 2)
        _mm512_store_si512(table + ENTRIES + i, _mm512_inserti64x4(left, _mm512_castsi512_si256(right), 1));
    }
  }

  // The table of ``count`` columns, [columns][planes, the upper first][256]; returns its step: what a unit stands for.
  template <int V>
  float fill(int64_t count, bool finite, uint8_t* table) const {
    const float bound = this->bound<V>(count);
    // A piece so small that a step of it could not be told from zero is zero; one that is not finite spoils its rows.
    const bool usual = finite && bound > 1e-30f && bound < 1e30f;
    const f32v factor = _mm512_set1_ps(usual ? most() / bound : 0);
    for (int64_t k = 0; k < count / weight.m * weight.v; k += 16)
      _mm512_store_ps(piece + k, usual ? _mm512_mul_ps(_mm512_load_ps(piece + k), factor) : factor);
    for (int64_t j = 0; j < count; ++j) column<V>(book(j), vector(j), table + j * PLANES * ENTRIES);
    return usual ? bound / most() * UNIT : finite && bound <= 1e-30f ? 0 : NAN;
  }

  // The table of chunk n.
  template <class T>
  float build(const T* x, int64_t n, uint8_t* table) const {
    const int64_t begin = weight.begin(n), count = weight.end(n) - begin;
    const bool finite = take(x, begin, begin + count);
    switch (weight.v) {
      case 4: return fill<4>(count, finite, table);
      case 8: return fill<8>(count, finite, table);
      default: return fill<0>(count, finite, table);
    }
  }
};

}  // namespace
