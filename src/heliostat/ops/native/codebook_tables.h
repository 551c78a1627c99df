// Tables of a product with codebooks: what every entry of every codebook gives with a piece of a row of x, in 8 or 16 bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "vectors.h"

namespace {

constexpr int ENTRIES = 256;
constexpr int64_t MOST_COLUMNS = 128;  // of a chunk: so many bytes are added up in 16 bits
constexpr float WORD = 32767;

// A weight in codebooks. A column is one codebook's part of one vector: column s * m + c. Columns of a chunk share a step,
// those of a group a scale; a chunk never reaches into another group, and has whole vectors, of 128 columns at most.
// Sums of a section are added up on their own, so that threads can share the work; sections do not depend on threads.
struct Coded {
  const uint8_t* codes;    // chunk by chunk [strips][its columns][64]: rows 0 to 31 at even places, the others between
  const float* books;      // [m][v][256]
  const int16_t* words;    // [m][pairs of v][256][2]: the same in units of longest / WORD; odd vectors end with a zero
  const uint16_t* scales;  // [groups][strips * 64], half
  float longest;           // an entry of any codebook is at most so long
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
  int64_t pairs() const { return (v + 1) / 2; }
  int64_t room() const { return sections() * strips() * 64; }  // floats for each row of x
};

// Memory from a cache line's begin on.
struct Space {
  char* bytes;
  explicit Space(int64_t count) : bytes(static_cast<char*>(std::aligned_alloc(64, (count + 63) / 64 * 64))) {}
  ~Space() { std::free(bytes); }
  Space(const Space&) = delete;
};

// What a table's units stand for: a product is about step * (unit - middle of the range), and `centre` is to be added for
// all columns together.
struct Units {
  float step, centre;
};

// Four times 16 whole numbers: two bytes of each, 64 bytes of the upper ones and 64 of those below; BYTE is the lower one.
template <int BYTE>
struct Cut {
  __m512i left, right;
  explicit Cut(const __m512i* whole) {
    alignas(64) static constexpr uint8_t PLACES[64] = {
        0,  4,  8,  12, 16, 20, 24, 28, 32,  36,  40,  44,  48,  52,  56,  60,  64,  68,  72,  76,  80, 84,
        88, 92, 96, 100, 104, 108, 112, 116, 120, 124, 1,  5,  9,   13,  17,  21,  25,  29,  33,  37,  41,  45,
        49, 53, 57, 61, 65, 69, 73, 77, 81, 85, 89, 93, 97, 101, 105, 109, 113, 117, 121, 125};
    const __m512i order = _mm512_add_epi8(_mm512_load_si512(PLACES), _mm512_set1_epi8(BYTE));
    left = _mm512_permutex2var_epi8(whole[0], order, whole[1]);
    right = _mm512_permutex2var_epi8(whole[2], order, whole[3]);
  }
  __m512i upper() const { return _mm512_shuffle_i64x2(left, right, 0xee); }
  __m512i lower() const { return _mm512_inserti64x4(left, _mm512_castsi512_si256(right), 1); }
};

// One row of x against some columns of a chunk.
struct Row {
  const Coded& weight;
  float* piece;  // the columns' numbers of x, zeros beyond the row; behind them room for what is made of them

  float* behind() const { return piece + (weight.chunk / weight.m * weight.v + 15) / 16 * 16; }
  static int64_t bytes(const Coded& weight) { return weight.chunk / weight.m * (weight.v + 1) * 6 + 256; }

  // Copies what columns [begin, end) ask of x; whether all is finite.
  template <class T>
  bool take(const T* x, int64_t begin, int64_t end) const {
    const int64_t first_input = begin / weight.m * weight.v, count = (end - begin) / weight.m * weight.v;
    __mmask16 wrong = 0;
    for (int64_t k = 0; k < count; k += 16) {
      const int64_t left = weight.inputs - first_input - k;
      const f32v some = load(x + first_input + k, left > 0 ? first(left) : 0);
      wrong |= _mm512_fpclass_ps_mask(some, 0x99);  // both kinds of NaN, both infinities
      _mm512_store_ps(piece + k, some);
    }
    return !wrong;
  }

  // Of the longest vector; those of 4 and 8 numbers are squared side by side.
  template <int V>
  float longest(int64_t vectors) const {
    if (V != 4 && V != 8) {
      float most = 0;
      for (int64_t s = 0; s < vectors; ++s) {
        float square = 0;
        for (int64_t k = s * weight.v; k < (s + 1) * weight.v; ++k) square += piece[k] * piece[k];
        most = std::max(most, square);
      }
      return std::sqrt(most);
    }
    f32v most = _mm512_setzero_ps();
    for (int64_t k = 0; k < vectors * V; k += 16) {
      const f32v some = _mm512_maskz_load_ps(first(vectors * V - k), piece + k);
      f32v square = _mm512_mul_ps(some, some);
      square = _mm512_add_ps(square, _mm512_shuffle_ps(square, square, 0xb1));
      square = _mm512_add_ps(square, _mm512_shuffle_ps(square, square, 0x4e));
      if (V == 8) square = _mm512_add_ps(square, _mm512_shuffle_f32x4(square, square, 0xb1));
      most = _mm512_max_ps(most, square);
    }
    return std::sqrt(_mm512_reduce_max_ps(most));
  }

  // A piece so small that a step of it could not be told from zero is zero; one that is not finite spoils its rows.
  static bool usual(bool finite, float reach) { return finite && reach > 1e-30f && reach < 1e30f; }
  static Units unusual(bool finite, float reach, float centre) {
    return finite && reach <= 1e-30f ? Units{0, centre} : Units{NAN, 0};
  }
};

template <int PLANES>
struct Table;

// One plane: eight bits want a step for few vectors, and the middle of each column's products at the middle of the range.
template <>
struct Table<1> : Row {
  static constexpr int64_t VECTORS = 4;  // of a step
  // Adding 2^23 leaves a whole number in the low bits of a float; 2^15 more keeps it above zero. The upper byte of the
  // sixteen bits is the number, rounded by half a unit.
  static constexpr float SHIFT = 8388608.0f + 32768.0f + 128.0f, MOST = 32500, UNIT = 256;

  int64_t columns_of_step() const { return std::min(weight.chunk, VECTORS * weight.m); }
  static int64_t bytes(const Coded& weight) { return Row::bytes(weight) + VECTORS * weight.m * ENTRIES * 4; }

  // A column's products as they are; their middle, and how far from it any of them is.
  template <int V>
  float multiply(int64_t j, float* products, float& reach) const {
    const float *book = weight.books + j % weight.m * weight.v * ENTRIES, *x = piece + j / weight.m * weight.v;
    f32v least = _mm512_set1_ps(__builtin_inff()), most = _mm512_set1_ps(-__builtin_inff());
    for (int i = 0; i < ENTRIES; i += 16) {
      f32v some = _mm512_setzero_ps();
      for (int64_t k = 0; k < (V ? V : weight.v); ++k)
        some = _mm512_fmadd_ps(_mm512_set1_ps(x[k]), _mm512_load_ps(book + k * ENTRIES + i), some);
      _mm512_store_ps(products + i, some);
      least = _mm512_min_ps(least, some), most = _mm512_max_ps(most, some);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
    reach = std::max(reach, (high - low) / 2);
    return (low + high) / 2;
  }

  // [columns][256]
  template <int V>
  Units fill(int64_t count, bool finite, uint8_t* table) const {
    float *products = behind(), middles[MOST_COLUMNS], reach = 0, centre = 0;
    for (int64_t j = 0; j < count; ++j) centre += middles[j] = multiply<V>(j, products + j * ENTRIES, reach);
    if (!usual(finite, reach)) return std::memset(table, 128, count * ENTRIES), unusual(finite, reach, centre);
    const f32v factor = _mm512_set1_ps(MOST / reach);
    for (int64_t j = 0; j < count; ++j) {
      const f32v zero = _mm512_set1_ps(SHIFT - middles[j] * (MOST / reach));
      for (int i = j * ENTRIES; i < (j + 1) * ENTRIES; i += 64) {
        __m512i whole[4];
        for (int q = 0; q < 4; ++q)
          whole[q] = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_load_ps(products + i + 16 * q), factor, zero));
        _mm512_store_si512(table + i, Cut<0>(whole).upper());
      }
    }
    return {reach / MOST * UNIT, centre};
  }
};

// Two planes: sixteen bits are so fine that lengths are good enough to tell how large a product can get. Products of whole
// numbers, the upper half of 32 bits.
template <>
struct Table<2> : Row {
  int64_t columns_of_step() const { return weight.chunk; }

  // The numbers of x as whole ones, in pairs as those of the codebooks.
  int32_t* pairs() const { return reinterpret_cast<int32_t*>(behind()); }

  void round(int64_t vectors, float factor) const {
    int16_t* whole = reinterpret_cast<int16_t*>(pairs());
    const auto some = [&](const float* from, __mmask16 mask, int16_t* to) {
      const f32v scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from), _mm512_set1_ps(factor));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled)));
    };
    if (weight.v % 2 == 0) {
      for (int64_t k = 0; k < vectors * weight.v; k += 16) some(piece + k, first(vectors * weight.v - k), whole + k);
      return;
    }
    for (int64_t s = 0; s < vectors; ++s)  // what is written too far is written over by the next one
      for (int64_t k = 0; k < weight.v; k += 16)
        some(piece + s * weight.v + k, first(weight.v - k), whole + s * 2 * weight.pairs() + k);
  }

  // 2^31 keeps the sum above zero, 2^15 rounds it.
  template <int V>
  void column(const int16_t* words, const int32_t* x, uint8_t* table) const {
    for (int i = 0; i < ENTRIES; i += 64) {
      __m512i whole[4];
      for (int q = 0; q < 4; ++q) {
        whole[q] = _mm512_set1_epi32(static_cast<int32_t>(0x80008000u));
        for (int64_t k = 0; k < (V ? V / 2 : weight.pairs()); ++k) {
          const __m512i some = _mm512_load_si512(words + 2 * (k * ENTRIES + i + 16 * q));
          whole[q] = _mm512_dpwssd_epi32(whole[q], some, _mm512_set1_epi32(x[k]));
        }
      }
      const Cut<2> cut(whole);
      _mm512_store_si512(table + i, cut.upper());
      _mm512_store_si512(table + ENTRIES + i, cut.lower());
    }
  }

  // [columns][planes, the upper first][256]
  template <int V>
  Units fill(int64_t count, bool finite, uint8_t* table) const {
    const int64_t vectors = count / weight.m, pairs = weight.pairs();
    const float length = longest<V>(vectors), reach = length * weight.longest;
    const bool plain = usual(finite, reach);
    round(vectors, plain ? WORD / length : 0);
    for (int64_t j = 0; j < count; ++j)
      column<V>(weight.words + j % weight.m * pairs * 2 * ENTRIES, this->pairs() + j / weight.m * pairs,
                table + j * 2 * ENTRIES);
    return plain ? Units{65536 * reach / (WORD * WORD), 0} : unusual(finite, reach, 0);
  }
};

// The table of columns [begin, end) for a row of x.
template <class T, int PLANES>
Units build(const Table<PLANES>& table, const T* x, int64_t begin, int64_t end, uint8_t* to) {
  const bool finite = table.take(x, begin, end);
  switch (table.weight.v) {
    case 4: return table.template fill<4>(end - begin, finite, to);
    case 8: return table.template fill<8>(end - begin, finite, to);
    default: return table.template fill<0>(end - begin, finite, to);
  }
}

}  // namespace
