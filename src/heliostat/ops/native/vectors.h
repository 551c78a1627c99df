// Numbers and vectors: bf16 beside float, masked loads and stores, dot products, e^x.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

using f32v = __m512;

inline f32v load(const float* p) { return _mm512_loadu_ps(p); }
inline f32v load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline f32v load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline f32v load(const bf16* p, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store(float* p, f32v x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store(bf16* p, f32v x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

// x as it is once it has been stored as a T.
template <class T>
inline f32v rounded(f32v x);
template <>
inline f32v rounded<float>(f32v x) { return x; }
template <>
inline f32v rounded<bf16>(f32v x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))), 16));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { store(p, _mm512_set1_ps(x), 1); }

// The 32 bits at p, sixteen times.
inline __m512i repeated(const char* p) {
  int32_t unit;
  std::memcpy(&unit, p, sizeof unit);
  return _mm512_set1_epi32(unit);
}

// How many numbers one step of a dot product takes, and the step itself.
template <class T>
struct Dot;
template <>
struct Dot<float> {
  static constexpr int step = 16;
  using vec = __m512;
  static vec load(const float* p) { return _mm512_loadu_ps(p); }
  static vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static vec unit(const int32_t* p) { return _mm512_castsi512_ps(_mm512_load_si512(p)); }
  static vec repeat(const char* p) { return _mm512_castsi512_ps(repeated(p)); }
  static f32v add(f32v sum, vec a, vec b) { return _mm512_fmadd_ps(a, b, sum); }
};
template <>
struct Dot<bf16> {
  static constexpr int step = 32;
  using vec = __m512bh;
  static vec load(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static vec load(const bf16* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static vec unit(const int32_t* p) { return reinterpret_cast<__m512bh>(_mm512_load_si512(p)); }
  static vec repeat(const char* p) { return reinterpret_cast<__m512bh>(repeated(p)); }
  static f32v add(f32v sum, vec a, vec b) { return _mm512_dpbf16_ps(sum, a, b); }
};

// The sums of 16 vectors as one vector: lane i is the sum of v[i].
inline f32v sums(const f32v* v) {
  f32v a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const f32v lo = _mm512_unpacklo_ps(v[i], v[i + 8]), hi = _mm512_unpackhi_ps(v[i], v[i + 8]);
    a[i] = _mm512_add_ps(lo, hi);  // v[i] in even lanes, v[i + 8] in odd ones
  }
  for (int i = 0; i < 4; ++i) {
    const f32v lo = _mm512_unpacklo_ps(a[i], a[i + 4]), hi = _mm512_unpackhi_ps(a[i], a[i + 4]);
    b[i] = _mm512_add_ps(lo, hi);  // in each 128 bits: v[i], v[i + 4], v[i + 8], v[i + 12]
  }
  for (int i = 0; i < 2; ++i) {
    const f32v lo = _mm512_shuffle_f32x4(b[i], b[i + 2], 0x88), hi = _mm512_shuffle_f32x4(b[i], b[i + 2], 0xdd);
    c[i] = _mm512_add_ps(lo, hi);
  }
  const f32v lo = _mm512_shuffle_f32x4(c[0], c[1], 0x88), hi = _mm512_shuffle_f32x4(c[0], c[1], 0xdd);
  const f32v mixed = _mm512_add_ps(lo, hi);
  const __m512i order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  return _mm512_permutexvar_ps(order, mixed);
}

// v[i] lane j <-> v[j] lane i.
inline void turn_over(__m512i* v) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }  // b[4 * g + c]: column 4 * q + c of rows 4 * g .. 4 * g + 3, in its 128 bits q
  for (int c = 0; c < 4; ++c) {
    const __m512i lo = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), hi = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i low = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = _mm512_shuffle_i32x4(lo, low, 0x88);
    v[8 + c] = _mm512_shuffle_i32x4(lo, low, 0xdd);
    v[4 + c] = _mm512_shuffle_i32x4(hi, high, 0x88);
    v[12 + c] = _mm512_shuffle_i32x4(hi, high, 0xdd);
  }
}

// e^x for x <= 0, to about 1e-7 relative; far below zero it is 0. NaN stays NaN: of max, the second operand.
inline f32v exponential(f32v x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
  const f32v n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  f32v r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  f32v y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

}  // namespace
