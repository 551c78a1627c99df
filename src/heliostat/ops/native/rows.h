// What is done to each row by itself: norms, rotation, gating. To be called by all threads of a parallel region, or by one.

#pragma once

#include "vectors.h"

namespace {

template <class T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  f32v sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const f32v part = load(x + i, first(width - i));
    sum = _mm512_fmadd_ps(part, part, sum);
  }
  return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + eps);
}

// As the twin does: the normed value is rounded to T before it is multiplied with the weight. out may be x.
template <class T>
inline void norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  const f32v scale = _mm512_set1_ps(inverse_rms(x, width, eps));
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = first(width - i);
    const f32v normed = rounded<T>(_mm512_mul_ps(load(x + i, mask), scale));
    store(out + i, _mm512_mul_ps(normed, load(weight + i, mask)), mask);
  }
}

template <class T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; ++r) norm_row(x + r * width, weight, out + r * width, width, eps);
}

// Rotates a head of `width` numbers in place by the angles of its position.
template <class T>
inline void rotate_head(T* head, const T* cos, const T* sin, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = first(half - i);
    const f32v a = load(head + i, mask), b = load(head + half + i, mask);
    store(head + i, _mm512_fnmadd_ps(b, load(sin + i, mask), _mm512_mul_ps(a, load(cos + i, mask))), mask);
    store(head + half + i,
          _mm512_fmadd_ps(a, load(sin + half + i, mask), _mm512_mul_ps(b, load(cos + half + i, mask))), mask);
  }
}

// `heads` heads of every row, in place; cos and sin are [rows, width].
template <class T>
void rotate(T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h)
      rotate_head(x + r * stride + h * width, cos + r * width, sin + r * width, width);
}

// out = silu(gate) * up, with gate and up side by side in each row of x [rows, 2 * width].
template <class T>
void gated(const T* x, T* out, int64_t rows, int64_t width) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T *gate = x + r * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      const f32v g = load(gate + i, mask), one = _mm512_set1_ps(1.0f);
      const f32v small = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(g)));  // e^-|g|: no overflow
      const __mmask16 negative = _mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_LT_OQ);
      const f32v top = _mm512_mask_blend_ps(negative, one, small);
      const f32v silu = rounded<T>(_mm512_div_ps(_mm512_mul_ps(g, top), _mm512_add_ps(one, small)));
      store(out + r * width + i, _mm512_mul_ps(silu, load(up + i, mask)), mask);
    }
  }
}

// Where the highest number of each row stands, the first of equals, and whether all numbers of the row are finite.
template <class T>
void best(const T* x, int64_t rows, int64_t width, int64_t* place, bool* finite) {
#pragma omp for schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = x + r * width;
    f32v highest = _mm512_set1_ps(-__builtin_inff()), zero = _mm512_setzero_ps();
    __m512i at = _mm512_setzero_si512(), here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      const f32v part = load(row + i, mask);
      zero = _mm512_fmadd_ps(part, _mm512_setzero_ps(), zero);  // infinity and NaN leave NaN behind
      const __mmask16 more = _mm512_mask_cmp_ps_mask(mask, part, highest, _CMP_GT_OQ);
      highest = _mm512_mask_mov_ps(highest, more, part);
      at = _mm512_mask_mov_epi32(at, more, here);
      here = _mm512_add_epi32(here, _mm512_set1_epi32(16));
    }
    const __mmask16 winners = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(_mm512_reduce_max_ps(highest)), _CMP_EQ_OQ);
    place[r] = winners ? _mm512_mask_reduce_min_epu32(winners, at) : 0;
    finite[r] = _mm512_reduce_add_ps(zero) == 0.0f;
  }
}

}  // namespace
