// What becomes of attention's output in training: scaled, with a share of the prefix sum of values, gated; and its gradients.
//
// Rows [B, T] of whole sequences; sums start anew with each document. Its twins: Mix.finish and Prefix in ops/mixing.py.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t WIDEST_TAPED = 256;

// What both directions read. Heads of v are shared by heads / kv_heads of `said`.
struct Taped {
  int64_t batch, length, heads, kv_heads, width;
  const float* alpha;  // of position i at alpha + i * alpha_stride: [heads]
  int64_t alpha_stride;
  const float* average;      // [heads]
  const float* gates;        // [B, T, heads] before the sigmoid; null: not gated
  const int64_t* documents;  // [B, T], side by side; null: one a row
  int64_t fixed;             // N where it is fixed, else 0

  int64_t group() const { return heads / kv_heads; }
  bool begins(int64_t b, int64_t t) const {
    return t == 0 || (documents && documents[b * length + t] != documents[b * length + t - 1]);
  }
  float counted(int64_t seen) const { return static_cast<float>(fixed ? fixed : seen); }
  float gate(int64_t row, int64_t head) const {
    return gates ? 1.0f / (1.0f + __builtin_expf(-gates[row * heads + head])) : 1.0f;
  }
  float scale(int64_t row, int64_t head) const { return alpha[row * alpha_stride + head]; }
};

template <class T>
inline void add_to(float* sum, const T* x, int64_t width) {
  for (int64_t d = 0; d < width; d += 16) {
    const __mmask16 mask = first(width - d);
    store(sum + d, _mm512_add_ps(load(sum + d, mask), load(x + d, mask)), mask);
  }
}

// said [B, T, H, D] and v [B, T, K, D] -> out like said. A sequence's key/value head is one thread's.
template <class T>
void mix_forward(const Taped& x, const T* said, const T* v, T* out) {
#pragma omp for schedule(static)
  for (int64_t task = 0; task < x.batch * x.kv_heads; ++task) {
    const int64_t b = task / x.kv_heads, k = task % x.kv_heads;
    alignas(64) float sum[WIDEST_TAPED];
    int64_t seen = 0;
    for (int64_t t = 0; t < x.length; ++t) {
      const int64_t row = b * x.length + t;
      if (x.begins(b, t)) {
        seen = 0;
        std::memset(sum, 0, sizeof sum);
      }
      add_to(sum, v + (row * x.kv_heads + k) * x.width, x.width);
      const float counted = x.counted(++seen);
      for (int64_t h = k * x.group(); h < (k + 1) * x.group(); ++h) {
        const float gate = x.gate(row, h), scale = x.scale(row, h);
        const f32v own = _mm512_set1_ps(gate * scale), rest = _mm512_set1_ps(gate * ((x.average[h] - scale) / counted));
        const int64_t at = (row * x.heads + h) * x.width;
        for (int64_t d = 0; d < x.width; d += 16) {
          const __mmask16 mask = first(x.width - d);
          const f32v part = _mm512_mul_ps(load(said + at + d, mask), own);
          store(out + at + d, _mm512_fmadd_ps(load(sum + d, mask), rest, part), mask);
        }
      }
    }
  }
}

// Gradients for said and v, in their format, and for alpha and the gates [B, T, H] float32 (null: not wanted).
template <class T>
struct MixSlopes {
  const Taped& x;
  const T *said, *v, *slope;
  T *to_said, *to_v;
  float *to_alpha, *to_gates;

  void run() const {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < x.batch * x.kv_heads; ++task) {
      forwards(task / x.kv_heads, task % x.kv_heads);
      backwards(task / x.kv_heads, task % x.kv_heads);
    }
  }

  void forwards(int64_t b, int64_t k) const {
    alignas(64) float sum[WIDEST_TAPED];
    int64_t seen = 0;
    for (int64_t t = 0; t < x.length; ++t) {
      const int64_t row = b * x.length + t;
      if (x.begins(b, t)) {
        seen = 0;
        std::memset(sum, 0, sizeof sum);
      }
      add_to(sum, v + (row * x.kv_heads + k) * x.width, x.width);
      ++seen;
      for (int64_t h = k * x.group(); h < (k + 1) * x.group(); ++h) head(row, h, sum, x.counted(seen));
    }
  }

  void head(int64_t row, int64_t h, const float* sum, float counted) const {
    const float gate = x.gate(row, h), scale = x.scale(row, h);
    const int64_t place = row * x.heads + h, at = place * x.width;
    const f32v own = _mm512_set1_ps(gate * scale);
    f32v with_said = _mm512_setzero_ps(), with_sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < x.width; d += 16) {
      const __mmask16 mask = first(x.width - d);
      const f32v g = load(slope + at + d, mask);
      with_said = _mm512_fmadd_ps(g, load(said + at + d, mask), with_said);
      with_sum = _mm512_fmadd_ps(g, load(sum + d, mask), with_sum);
      store(to_said + at + d, _mm512_mul_ps(g, own), mask);
    }
    const float a = _mm512_reduce_add_ps(with_said), s = _mm512_reduce_add_ps(with_sum) / counted;
    if (to_alpha) to_alpha[place] = gate * (a - s);
    if (to_gates) to_gates[place] = gate * (1.0f - gate) * (scale * a + (x.average[h] - scale) * s);
  }

  // A value stands in the sums of all positions from its own to its document's end.
  void backwards(int64_t b, int64_t k) const {
    alignas(64) float sum[WIDEST_TAPED];
    int64_t seen = 0;
    for (int64_t t = x.length - 1; t >= 0; --t) {
      const int64_t row = b * x.length + t;
      if (t + 1 == x.length || x.begins(b, t + 1)) {
        std::memset(sum, 0, sizeof sum);
        for (seen = 1; !x.begins(b, t + 1 - seen); ++seen) {}
      }
      const float counted = x.counted(seen--);
      for (int64_t h = k * x.group(); h < (k + 1) * x.group(); ++h) {
        const float share = (x.average[h] - x.scale(row, h)) / counted;
        const f32v rest = _mm512_set1_ps(x.gate(row, h) * share);
        const T* g = slope + (row * x.heads + h) * x.width;
        for (int64_t d = 0; d < x.width; d += 16) {
          const __mmask16 mask = first(x.width - d);
          store(sum + d, _mm512_fmadd_ps(load(g + d, mask), rest, load(sum + d, mask)), mask);
        }
      }
      T* to = to_v + (row * x.kv_heads + k) * x.width;
      for (int64_t d = 0; d < x.width; d += 16) {
        const __mmask16 mask = first(x.width - d);
        store(to + d, load(sum + d, mask), mask);
      }
    }
  }
};

}  // namespace
