// Products with a weight, from one row to thousands. The weight lies as torch has it, [outputs, width]: nothing is packed.
//
// To be called by all threads of a parallel region, or by one outside of any.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "vectors.h"

namespace {

constexpr int64_t SHORT = 3072;  // numbers in a row of a weight
// Memory of one thread, from a cache line's begin on.
struct Room {
  int32_t* numbers;
  explicit Room(int64_t count) : numbers(static_cast<int32_t*>(std::aligned_alloc(64, (4 * count + 63) / 64 * 64))) {}
  ~Room() { std::free(numbers); }
  Room(const Room&) = delete;
};

template <class T>
struct Product {
  const T* x;  // [batch, width], rows x_stride apart
  int64_t x_stride;
  const T *w, *bias, *residual;  // [outputs, width], [outputs] or null, [batch, outputs] or null
  T* out;                        // [batch, outputs]; may be the residual itself
  int64_t batch, outputs, width;
  int64_t out_stride = outputs;  // numbers between rows of out and residual
  float scale = 1;               // of what was multiplied, not of bias and residual

  void settle(int64_t b, int64_t n, float y) const {
    y *= scale;
    if (bias) y += to_float(bias[n]);
    if (residual) y += to_float(residual[b * out_stride + n]);
    put(out + b * out_stride + n, y);
  }

  void settle(int64_t b, int64_t n, f32v y, __mmask16 mask) const {
    y = _mm512_mul_ps(y, _mm512_set1_ps(scale));
    if (bias) y = _mm512_add_ps(y, load(bias + n, mask));
    if (residual) y = _mm512_add_ps(y, load(residual + b * out_stride + n, mask));
    store(out + b * out_stride + n, y, mask);
  }

  // 32 rows of w are turned over first, so that their numbers at one place of x lie side by side: then nothing is left
  // to add up at the end. A unit is what 32 bits hold: one float, or two bf16.
  static constexpr int WIDE = 32;
  int64_t units() const { return width * static_cast<int64_t>(sizeof(T)) / 4; }

  void pack(int64_t n, int32_t* packed) const {
    const int64_t count = units();
    for (int half = 0; half < WIDE; half += 16) {
      const int32_t* row[16];
      for (int i = 0; i < 16; ++i)
        row[i] = reinterpret_cast<const int32_t*>(w + std::min<int64_t>(n + half + i, outputs - 1) * width);
      for (int64_t u = 0; u < count; u += 16) {
        const __mmask16 mask = first(count - u);
        __m512i v[16];
        for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi32(mask, row[i] + u);
        turn_over(v);
        for (int i = 0; i < std::min<int64_t>(count - u, 16); ++i)
          _mm512_store_si512(packed + (u + i) * WIDE + half, v[i]);
      }
    }
  }

  // R rows of x by what was packed. AHEAD: fetch the rows of w that come next meanwhile, two lines for every unit.
  template <int R, bool AHEAD>
  void several(int64_t b, int64_t n, const int32_t* packed) const {
    using D = Dot<T>;
    f32v sum[R][2];
    const char* given[R];
    for (int i = 0; i < R; ++i) {
      sum[i][0] = sum[i][1] = _mm512_setzero_ps();
      given[i] = reinterpret_cast<const char*>(x + (b + i) * x_stride);
    }
    const int64_t count = units();
    const char* next = reinterpret_cast<const char*>(w + (n + WIDE) * width);
    for (int64_t u = 0; u < count; ++u) {
      if (AHEAD) {
        _mm_prefetch(next + 128 * u, _MM_HINT_T1);
        _mm_prefetch(next + 128 * u + 64, _MM_HINT_T1);
      }
      const auto left = D::unit(packed + u * WIDE), right = D::unit(packed + u * WIDE + 16);
      for (int i = 0; i < R; ++i) {
        const auto part = D::repeat(given[i] + 4 * u);
        sum[i][0] = D::add(sum[i][0], part, left);
        sum[i][1] = D::add(sum[i][1], part, right);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int half = 0; half < 2; ++half)
        if (n + 16 * half < outputs) settle(b + i, n + 16 * half, sum[i][half], first(outputs - n - 16 * half));
  }

  template <bool AHEAD>
  int64_t next_rows(int64_t b, int64_t n, const int32_t* packed) const {
    switch (std::min<int64_t>(batch - b, 8)) {
      case 1: return several<1, AHEAD>(b, n, packed), 1;
      case 2: return several<2, AHEAD>(b, n, packed), 2;
      case 3: return several<3, AHEAD>(b, n, packed), 3;
      case 4: return several<4, AHEAD>(b, n, packed), 4;
      case 5: return several<5, AHEAD>(b, n, packed), 5;
      case 6: return several<6, AHEAD>(b, n, packed), 6;
      case 7: return several<7, AHEAD>(b, n, packed), 7;
      default: return several<8, AHEAD>(b, n, packed), 8;
    }
  }

  void many_rows(int64_t n, int32_t* packed) const {
    pack(n, packed);
    for (int64_t b = next_rows<true>(0, n, packed); b < batch;) b += next_rows<false>(b, n, packed);
  }

  // One row of x by one of w, in four sums: short rows come fastest as one stream.
  float dot(const T* x, const T* row) const {
    using D = Dot<T>;
    f32v sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = 0;
    for (; k + 4 * D::step <= width; k += 4 * D::step)
      for (int i = 0; i < 4; ++i)
        sum[i] = D::add(sum[i], D::load(x + k + i * D::step), D::load(row + k + i * D::step));
    for (; k < width; k += D::step) sum[0] = D::add(sum[0], D::load(x + k, width - k), D::load(row + k, width - k));
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }

  // One row of x by eight long rows of w: several streams from memory are faster than one.
  void streams(int64_t n) const {
    using D = Dot<T>;
    f32v sum[16];
    const T* row[8];
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
    for (int i = 0; i < 8; ++i) row[i] = w + (n + i < outputs ? n + i : outputs - 1) * width;
    int64_t k = 0;
    for (; k + D::step <= width; k += D::step) {
      const auto part = D::load(x + k);
      for (int i = 0; i < 8; ++i) {
        sum[i] = D::add(sum[i], part, D::load(row[i] + k));
        _mm_prefetch(row[i] + k + 8 * width, _MM_HINT_T1);
      }
    }
    if (k < width)
      for (int i = 0; i < 8; ++i) sum[i] = D::add(sum[i], D::load(x + k, width - k), D::load(row[i] + k, width - k));
    settle(0, n, sums(sum), first(std::min<int64_t>(outputs - n, 8)));
  }

  void one_row(int64_t n) const {
    if (width > SHORT) return streams(n);
    for (int64_t i = n; i < std::min(n + 8, outputs); ++i) settle(0, i, dot(x, w + i * width));
  }

  void run() const {
    if (batch == 1) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < outputs; n += 8) one_row(n);
    } else if (width * sizeof(T) % 4) {
#pragma omp for schedule(static)
      for (int64_t n = 0; n < outputs; ++n)
        for (int64_t b = 0; b < batch; ++b) settle(b, n, dot(x + b * x_stride, w + n * width));
    } else {
      const Room packed(units() * WIDE);
#pragma omp for schedule(static)
      for (int64_t n = 0; n < outputs; n += WIDE) many_rows(n, packed.numbers);
    }
  }
};

}  // namespace
