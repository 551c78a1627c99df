// CPU kernel for weights in codebooks: x [batch, inputs] by the weight, without the weight ever being made.
//
// What each codebook's entries give with a piece of x is put in a table, one for each row of x and each chunk of columns,
// as whole numbers of 8 bits (one plane) or 16 (two); then every row of the weight looks its codes up, and whole numbers
// are added up exactly until a chunk's end, where they are scaled in float32. Every output is computed by one thread in
// one order, so the number of threads changes nothing, nor do the other rows of x. Needs AVX-512 with VBMI and BF16;
// threads are those of torch's own OpenMP.

#include <omp.h>

#include <algorithm>

#include "codebook_rows.h"

namespace {

constexpr int64_t TOGETHER = 4;          // strips that share the reading of a table
constexpr int64_t TABLE_BYTES = 1 << 19;  // of all tables of a round: what stays in a core's cache

template <class T, int PLANES>
struct CodedProduct {
  const Coded weight;
  const T* x;  // [batch, inputs], rows x_stride apart
  int64_t x_stride;
  const T* bias;  // [outputs] or null
  T* out;         // [batch, outputs], rows out_stride apart
  int64_t out_stride, batch;
  uint8_t* tables;  // [batch][columns of a round][planes][256]
  float* steps;     // [batch][chunks of a round]
  float* sums;      // [batch][strips * 64]

  static constexpr int64_t COLUMN = PLANES * ENTRIES;

  static int64_t chunks_a_round(const Coded& weight, int64_t batch) {
    return std::max<int64_t>(1, std::min(weight.chunks(), TABLE_BYTES / (weight.chunk * COLUMN * batch)));
  }

  int64_t round() const { return chunks_a_round(weight, batch); }
  uint8_t* table(int64_t b, int64_t n) const { return tables + (b * round() + n) * weight.chunk * COLUMN; }

  // Chunks [begin, end), this thread's share of them.
  void build(int64_t begin, int64_t end, const Table<PLANES>& made) const {
    const int64_t tasks = (end - begin) * batch, threads = omp_get_num_threads(), own = omp_get_thread_num();
    for (int64_t task = tasks * own / threads; task < tasks * (own + 1) / threads; ++task) {
      const int64_t b = task / (end - begin), n = task % (end - begin);
      steps[b * round() + n] = made.build(x + b * x_stride, begin + n, table(b, n));
    }
  }

  template <int COUNT>
  int64_t look_up(int64_t strip, int64_t begin, int64_t end) const {
    const int64_t stride = 64 * weight.columns, rows = 64 * weight.strips();
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first_column = weight.begin(n), count = weight.end(n) - first_column;
      const Strips<PLANES, COUNT> strips{weight.codes + strip * stride + 64 * first_column, stride};
      const uint16_t* scales = weight.scales + weight.group_of(n) * rows + 64 * strip;
      for (int64_t b = 0; b < batch; ++b)
        strips.run(table(b, n - begin), count, steps[b * round() + n - begin], scales, sums + b * rows + 64 * strip);
    }
    return COUNT;
  }

  int64_t next_strips(int64_t strip, int64_t last, int64_t begin, int64_t end) const {
    switch (std::min(last - strip, TOGETHER)) {
      case 1: return look_up<1>(strip, begin, end);
      case 2: return look_up<2>(strip, begin, end);
      case 3: return look_up<3>(strip, begin, end);
      default: return look_up<4>(strip, begin, end);
    }
  }

  void settle(int64_t strip, int64_t last) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t n = 64 * strip; n < std::min(64 * last, weight.outputs); n += 16) {
        const __mmask16 mask = first(weight.outputs - n);
        f32v y = _mm512_load_ps(sums + b * 64 * weight.strips() + n);
        if (bias) y = _mm512_add_ps(y, load(bias + n, mask));
        store(out + b * out_stride + n, y, mask);
      }
  }

  // To be called by all threads of a parallel region.
  void run() const {
    const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num(), strips = weight.strips();
    const int64_t from = strips * own / threads, to = strips * (own + 1) / threads, chunks = weight.chunks();
    const Space piece(weight.chunk * weight.v * 4 + 64);
    const Table<PLANES> made{weight, reinterpret_cast<float*>(piece.bytes)};
    for (int64_t b = 0; b < batch; ++b)
      std::memset(sums + 64 * (b * strips + from), 0, 256 * (to - from));
    for (int64_t begin = 0; begin < chunks; begin += round()) {
      const int64_t end = std::min(begin + round(), chunks);
      if (begin) {
#pragma omp barrier
      }
      build(begin, end, made);
#pragma omp barrier
      for (int64_t strip = from; strip < to;) strip += next_strips(strip, to, begin, end);
    }
    settle(from, to);
  }
};

template <class T, int PLANES>
void multiply(const Coded& weight, const T* x, int64_t x_stride, const T* bias, T* out, int64_t out_stride, int64_t batch) {
  const int64_t round = CodedProduct<T, PLANES>::chunks_a_round(weight, batch);
  const Space tables(batch * round * weight.chunk * PLANES * ENTRIES), steps(4 * batch * round);
  const Space sums(256 * batch * weight.strips());
  const CodedProduct<T, PLANES> product{weight, x, x_stride, bias, out, out_stride, batch,
                                        reinterpret_cast<uint8_t*>(tables.bytes), reinterpret_cast<float*>(steps.bytes),
                                        reinterpret_cast<float*>(sums.bytes)};
#pragma omp parallel if (weight.columns * weight.outputs > 16384)
  product.run();
}

}  // namespace

#define EXPORT(T, kind)                                                                                               \
  extern "C" void coded_linear_##kind(const Coded* weight, const T* x, int64_t x_stride, const T* bias, T* out,       \
                                      int64_t out_stride, int64_t batch, int64_t planes) {                            \
    if (planes == 1) multiply<T, 1>(*weight, x, x_stride, bias, out, out_stride, batch);                              \
    else multiply<T, 2>(*weight, x, x_stride, bias, out, out_stride, batch);                                          \
  }

EXPORT(float, f32)
EXPORT(bf16, bf16)

// Whether this processor has what the rest was compiled for.
extern "C" int64_t runs_here() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
