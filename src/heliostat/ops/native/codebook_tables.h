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
// Sums of a section are added up on their own, so that threads can share the work; sections do not depend on threads.
struct Coded {
  const uint8_t* codes;    // chunk by chunk [strips][its columns][64]: rows 0 to 31 at even places, the others between
  const float* books;      // [m][v][256]
  const uint16_t* scales;  // [groups][strips * 64], half
  float longest, others;   // an entry of any codebook is at most so long; and one that is not among its first LONG
  int64_t outputs, inputs, m, v;
  int64_t columns, group, chunk;  // columns in all, of a group, of a chunk
  int64_t section;                // chunks of a section

  int64_t strips() const { return (outputs + 63) / 64; }
  int64_t chunks_of_group() const { return (group + chunk - 1) / chunk; }
  int64_t chunks() const {
    const int64_t whole = (columns - 1) / group;
    return whole * chunks_of_group() + (columns - whole * group + chunk - 1) / chunk;
  }
  int64_t sections() const { return (chunks() + section - 1) / section; }
  int64_t group_of(int64_t n) const { return n / chunks_of_group(); }
  int64_t begin(int64_t n) const { return group_of(n) * group + n % chunks_of_group() * chunk; }
  int64_t end(int64_t n) const {
    return std::min(std::min(begin(n) + chunk, (group_of(n) + 1) * group), columns);
  }
  int64_t room() const { return sections() * strips() * 64; }  // floats for each row of x
};

// Memory from a cache line's begin on.
struct Space {
  char* bytes;
  explicit Space(int64_t count) : bytes(static_cast<char*>(std::aligned_alloc(64, (count + 63) / 64 * 64))) {}
  ~Space() { std::free(bytes); }
  Space(const Space&) = delete;
};

// What a table's units stand for: an entry's product is about step * (unit - zero), and `centre` is to be added for all
// columns together.
struct Units {
  float step, centre;
};

// One row of x against some columns of a chunk.
template <int PLANES>
struct Table {
  const Coded& weight;
  float* piece;  // the columns' numbers of x, zeros beyond the row

  // Columns of a step. Eight bits need it fine.
  int64_t columns_of_step() const { return PLANES == 1 ? std::min(weight.chunk, 8 * weight.m) : weight.chunk; }

  // Copies what columns [begin, end) ask of x; whether all is finite.
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

  float length(int64_t s) const {
    float square = 0;
    for (int64_t k = 0; k < weight.v; ++k) square += piece[s * weight.v + k] * piece[s * weight.v + k];
    return std::sqrt(square);
  }

  // Of the longest vector; many short ones are squared side by side.
  template <int V>
  float longest_piece(int64_t vectors) const {
    f32v most = _mm512_setzero_ps();
    if (V != 4 && V != 8) {
      float longest = 0;
      for (int64_t s = 0; s < vectors; ++s) longest = std::max(longest, length(s));
      return longest;
    }
    for (int64_t k = 0; k < vectors * V; k += 16) {
      const f32v some = _mm512_maskz_loadu_ps(first(vectors * V - k), piece + k);
      f32v square = _mm512_mul_ps(some, some);
      square = _mm512_add_ps(square, _mm512_shuffle_ps(square, square, 0xb1));
      square = _mm512_add_ps(square, _mm512_shuffle_ps(square, square, 0x4e));
      if (V == 8) square = _mm512_add_ps(square, _mm512_shuffle_f32x4(square, square, 0xb1));
      most = _mm512_max_ps(most, square);
    }
    return std::sqrt(_mm512_reduce_max_ps(most));
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

  // The middle of a column's products, as far as long entries say; and how far from it any of them may be.
  template <int V>
  float middle(int64_t j, float& reach) const {
    f32v least = _mm512_set1_ps(__builtin_inff()), most = _mm512_set1_ps(-__builtin_inff());
    for (int i = 0; i < LONG; i += 16) {
      const f32v some = add<V>(_mm512_setzero_ps(), book(j) + i, vector(j));
      least = _mm512_min_ps(least, some), most = _mm512_max_ps(most, some);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most), middle = (low + high) / 2;
    reach = std::max(reach, std::max(high - middle, length(j / weight.m) * weight.others + std::fabs(middle)));
    return middle;
  }

  // Adding 2^23 leaves a whole number in the low bits of a float; 2^15 more keeps it above zero. The upper byte of the
  // sixteen bits is the number of one plane, rounded by half a unit.
  static constexpr float SHIFT = 8388608.0f + 32768.0f + (PLANES == 1 ? 128.0f : 0.0f);
  static constexpr float UNIT = PLANES == 1 ? 256 : 1;
  float most() const { return PLANES == 1 ? 32500 : 32700 - static_cast<float>(weight.v); }  // and room for rounding

  template <int V>
  void column(float zero, const float* book, const float* x, uint8_t* table) const {
    alignas(64) static constexpr uint8_t LOW_BYTES[64] = {
        0,  4,  8,  12, 16, 20, 24, 28, 32,  36,  40,  44,  48,  52,  56,  60,  64,  68,  72,  76,  80, 84,
        88, 92, 96, 100, 104, 108, 112, 116, 120, 124, 1,  5,  9,   13,  17,  21,  25,  29,  33,  37,  41,  45,
        49, 53, 57, 61, 65, 69, 73, 77, 81, 85, 89, 93, 97, 101, 105, 109, 113, 117, 121, 125};
    const __m512i order = _mm512_load_si512(LOW_BYTES);  // the lowest bytes of both, then the ones above
    for (int i = 0; i < ENTRIES; i += 64) {
      __m512i whole[4];
      for (int q = 0; q < 4; ++q)
        whole[q] = _mm512_castps_si512(add<V>(_mm512_set1_ps(zero), book + i + 16 * q, x));
      const __m512i left = _mm512_permutex2var_epi8(whole[0], order, whole[1]);
      const __m512i right = _mm512_permutex2var_epi8(whole[2], order, whole[3]);
      _mm512_store_si512(table + i, _mm512_shuffle_i64x2(left, right, 0xee));
      if (PLANES == 2)
        _mm512_store_si512(table + ENTRIES + i, _mm512_inserti64x4(left, _mm512_castsi512_si256(right), 1));
    }
  }

  // The table of ``count`` columns, [columns][planes, the upper first][256].
  template <int V>
  Units fill(int64_t count, bool finite, uint8_t* table) const {
    const int64_t vectors = count / weight.m;
    float middles[MOST_COLUMNS], reach = 0, centre = 0;
    if (PLANES == 2) reach = longest_piece<V>(vectors) * weight.longest;  // good enough for sixteen bits
    for (int64_t j = 0; PLANES == 1 && j < count; ++j) centre += middles[j] = middle<V>(j, reach);
    // A piece so small that a step of it could not be told from zero is zero; one that is not finite spoils its rows.
    const bool usual = finite && reach > 1e-30f && reach < 1e30f;
    const float factor = usual ? most() / reach : 0;
    for (int64_t k = 0; k < vectors * weight.v; k += 16)
      _mm512_store_ps(piece + k, usual ? _mm512_mul_ps(_mm512_load_ps(piece + k), _mm512_set1_ps(factor))
                                       : _mm512_setzero_ps());
    for (int64_t j = 0; j < count; ++j)
      column<V>(PLANES == 1 && usual ? SHIFT - middles[j] * factor : SHIFT, book(j), vector(j), table + j * PLANES * ENTRIES);
    if (usual) return {reach / most() * UNIT, PLANES == 1 ? centre : 0};
    return {finite && reach <= 1e-30f ? 0 : NAN, 0};
  }

  static constexpr int64_t MOST_COLUMNS = 256;

  // The table of columns [begin, end), all of one chunk.
  template <class T>
  Units build(const T* x, int64_t begin, int64_t end, uint8_t* table) const {
    const bool finite = take(x, begin, end);
    switch (weight.v) {
      case 4: return fill<4>(end - begin, finite, table);
      case 8: return fill<8>(end - begin, finite, table);
      default: return fill<0>(end - begin, finite, table);
    }
  }
};

}  // namespace
