// Rows of a weight in codebooks against tables: 64 codes are looked up at once, in registers.

#pragma once

#include "codebook_tables.h"

namespace {

// One plane of a table, 256 bytes, in four registers. HELD: compilers are told to leave them there; where many strips want
// registers too, they know better.
template <bool HELD>
struct Plane {
  __m512i part[4];
  explicit Plane(const uint8_t* table) {
    for (int i = 0; i < 4; ++i) {
      __m512i some = _mm512_load_si512(table + 64 * i);
      if (HELD) asm("" : "+v"(some));
      part[i] = some;
    }
  }
  // The bytes at 64 codes; ``high``: which codes are from 128 on.
  __m512i at(__m512i codes, __mmask64 high) const {
    const __m512i some = _mm512_mask2_permutex2var_epi8(part[0], codes, ~high, part[1]);
    return _mm512_mask2_permutex2var_epi8(part[2], some, high, part[3]);  // the other codes still stand there
  }
};

// Sums of 64 rows' bytes of one plane, 16 bits each: pairs as they lie, and their upper halves. Exact for MOST_COLUMNS.
struct Sums {
  __m512i pairs, upper;
  void clear() { pairs = upper = _mm512_setzero_si512(); }
  void add(__m512i bytes) {
    pairs = _mm512_add_epi16(pairs, bytes);  // may wrap: what the upper halves gave is taken off again
    upper = _mm512_add_epi16(upper, _mm512_srli_epi16(bytes, 8));
  }
  __m512i lower() const { return _mm512_sub_epi16(pairs, _mm512_slli_epi16(upper, 8)); }
};

// What is fetched early: for columns [from, to) that are read now, those `ahead` bytes behind them.
struct Fetch {
  int64_t from, to, ahead;
};

// COUNT strips of 64 rows over columns that share a step.
template <int PLANES, int COUNT>
struct Strips {
  const uint8_t* codes;  // of the first strip, from the first column on
  int64_t stride;        // from strip to strip

  void run(const uint8_t* table, int64_t columns, Units units, const uint16_t* scales, float* sums, Fetch fetch) const {
    Sums found[COUNT][PLANES];
    for (int r = 0; r < COUNT; ++r)
      for (int p = 0; p < PLANES; ++p) found[r][p].clear();
    columns_of<false>(table, 0, fetch.from, 0, found);
    columns_of<true>(table, fetch.from, fetch.to, fetch.ahead, found);
    columns_of<false>(table, fetch.to, columns, 0, found);
    for (int r = 0; r < COUNT; ++r) finish(found[r], columns, units, scales + 64 * r, sums + 64 * r);
  }

  template <bool EARLY>
  void columns_of(const uint8_t* table, int64_t begin, int64_t end, int64_t ahead, Sums (&found)[COUNT][PLANES]) const {
    for (int64_t j = begin; j < end; ++j) {
      const Plane<(COUNT < 4)> upper_plane(table + j * PLANES * ENTRIES), low(table + (j * PLANES + PLANES - 1) * ENTRIES);
      for (int r = 0; r < COUNT; ++r) {
        const uint8_t* place = codes + r * stride + 64 * j;
        if (EARLY) _mm_prefetch(reinterpret_cast<const char*>(place) + ahead, _MM_HINT_T1);
        const __m512i own = _mm512_load_si512(place);
        const __mmask64 upper = _mm512_movepi8_mask(own);
        found[r][0].add(upper_plane.at(own, upper));
        if (PLANES == 2) found[r][PLANES - 1].add(low.at(own, upper));
      }
    }
  }

  // Rows come as bytes of low sums and high sums lie side by side: the layout of codes has them so that they end in order.
  static void finish(const Sums* found, int64_t columns, Units units, const uint16_t* scales, float* sums) {
    const __m512i zero = _mm512_set1_epi32(-static_cast<int>(columns * (PLANES == 1 ? 128 : 32768)));
    const __m512i parts = _mm512_set1_epi32(1 + (256 << 16));
    const __m512i none = _mm512_setzero_si512();
    const __m512i low[2] = {found[PLANES - 1].lower(), found[PLANES - 1].upper};
    const __m512i high[2] = {PLANES == 1 ? none : found[0].lower(), PLANES == 1 ? none : found[0].upper};
    const f32v step = _mm512_set1_ps(units.step), centre = _mm512_set1_ps(units.centre);
    for (int q = 0; q < 4; ++q) {
      const __m512i both = q % 2 ? _mm512_unpackhi_epi16(low[q / 2], high[q / 2])
                                 : _mm512_unpacklo_epi16(low[q / 2], high[q / 2]);
      const f32v number = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(zero, both, parts));
      const f32v scale = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales + 16 * q)));
      const f32v value = PLANES == 1 ? _mm512_fmadd_ps(number, step, centre) : _mm512_mul_ps(number, step);
      _mm512_store_ps(sums + 16 * q, _mm512_fmadd_ps(value, scale, _mm512_load_ps(sums + 16 * q)));
    }
  }
};

}  // namespace
