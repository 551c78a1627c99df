// CPU kernel for weights in codebooks: x [batch, inputs] by the weight, without the weight ever being made.
//
// What each codebook's entries give with a piece of x is put in a table, one for each row of x and each chunk of columns,
// as whole numbers of 8 bits (one plane) or 16 (two); then every row of the weight looks its codes up, and whole numbers
// are added up exactly until a step's end, where they are scaled in float32. A chunk's table stays in a core's first cache
// while all rows that the core has go by, and codes lie in the order in which they are read.
//
// Threads share the work by sections of columns and strips of rows. A section's sums are its own, whoever makes them, and
// are added up in one order: the number of threads changes nothing, nor do the other rows of x. Needs AVX-512 with VBMI,
// VNNI and BF16; threads are those of torch's own OpenMP.

#include <omp.h>

#include <algorithm>

#include "codebook_rows.h"
#include "pieces.h"

namespace {

constexpr int64_t TOGETHER = 4;  // strips that share the reading of a table

template <class T, int PLANES>
struct CodedProduct {
  const Coded& weight;
  const T* x;  // [batch, inputs], rows x_stride apart
  int64_t x_stride;
  const T *bias, *residual;  // [outputs] or null, null or as out
  T* out;                    // [batch, outputs], rows out_stride apart
  int64_t out_stride, batch;
  float* sums;  // [sections][batch][strips * 64]

  static constexpr int64_t COLUMN = PLANES * ENTRIES;
  static int64_t table_bytes(const Coded& weight) { return weight.chunk * COLUMN; }
  static int64_t space(const Coded& weight) { return table_bytes(weight) + Table<PLANES>::bytes(weight); }

  float* sum(int64_t section, int64_t b, int64_t strip) const {
    return sums + ((section * batch + b) * weight.strips() + strip) * 64;
  }

  template <int COUNT>
  int64_t look_up(const uint8_t* table, int64_t n, int64_t begin, int64_t end, Units units, int64_t strip, int64_t b,
                  float* sums) const {
    const int64_t first_column = weight.begin(n), stride = 64 * (weight.end(n) - first_column), strips = weight.strips();
    const Strips<PLANES, COUNT> some{
        weight.codes + 64 * strips * first_column + strip * stride + 64 * (begin - first_column), stride};
    // The rows of x share the fetching of the next chunk.
    const int64_t columns = end - begin;
    const Fetch fetch{columns * b / batch, columns * (b + 1) / batch, strips * stride};
    some.run(table, columns, units, weight.scales + 64 * (weight.group_of(n) * strips + strip), sums, fetch);
    return COUNT;
  }

  // Columns [begin, end) of chunk n, strips [from, to), row b.
  void step(int64_t n, int64_t begin, int64_t end, int64_t from, int64_t to, int64_t b, float* sums, char* space) const {
    uint8_t* table = reinterpret_cast<uint8_t*>(space);
    const Table<PLANES> made{{weight, reinterpret_cast<float*>(space + table_bytes(weight))}};
    const Units units = build(made, x + b * x_stride, begin, end, table);
    for (int64_t strip = from; strip < to;) {
      float* own = sums + 64 * (strip - from);
      switch (std::min(to - strip, TOGETHER)) {
        case 1: strip += look_up<1>(table, n, begin, end, units, strip, b, own); break;
        case 2: strip += look_up<2>(table, n, begin, end, units, strip, b, own); break;
        case 3: strip += look_up<3>(table, n, begin, end, units, strip, b, own); break;
        default: strip += look_up<4>(table, n, begin, end, units, strip, b, own);
      }
    }
  }

  void add_up(int64_t section, int64_t from, int64_t to, char* space) const {
    for (int64_t b = 0; b < batch; ++b) std::memset(sum(section, b, from), 0, 256 * (to - from));
    const int64_t last = std::min((section + 1) * weight.section, weight.chunks());
    const int64_t columns = Table<PLANES>{{weight, nullptr}}.columns_of_step();
    for (int64_t n = section * weight.section; n < last; ++n)
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t begin = weight.begin(n), end = weight.end(n); begin < end; begin += columns)
          step(n, begin, std::min(begin + columns, end), from, to, b, sum(section, b, from), space);
  }

  // This thread's share: of all sections by all strips those that lie side by side.
  void add_up(char* space) const {
    const int64_t threads = omp_get_num_threads(), own = omp_get_thread_num(), strips = weight.strips();
    const int64_t all = strips * weight.sections(), end = all * (own + 1) / threads;
    for (int64_t at = all * own / threads; at < end;) {
      const int64_t from = at % strips, to = std::min(strips, from + end - at);
      add_up(at / strips, from, to, space);
      at += to - from;
    }
  }

  void settle(int64_t strip) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t n = 64 * strip; n < std::min(64 * strip + 64, weight.outputs); n += 16) {
        const __mmask16 mask = first(weight.outputs - n);
        f32v y = _mm512_load_ps(sum(0, b, 0) + n);
        for (int64_t section = 1; section < weight.sections(); ++section)
          y = _mm512_add_ps(y, _mm512_load_ps(sum(section, b, 0) + n));
        if (bias) y = _mm512_add_ps(y, load(bias + n, mask));
        if (residual) y = _mm512_add_ps(y, load(residual + b * out_stride + n, mask));
        store(out + b * out_stride + n, y, mask);
      }
  }
};

// To be called by all threads of a parallel region, or by one outside of any.
template <class T, int PLANES>
void look_up(const LookUp<T>& asked) {
  const Piece<T>* pieces = asked.pieces.piece;
  const auto product = [&](int64_t own) {
    int64_t first = 0, room = 0;
    for (int64_t i = 0; i < own; first += pieces[i++].outputs)
      if (pieces[i].coded) room += pieces[i].coded->room();
    const T* residual = asked.residual ? asked.residual + first : nullptr;
    return CodedProduct<T, PLANES>{*pieces[own].coded,    asked.x,          asked.x_stride, pieces[own].bias, residual,
                                   asked.out + first,     asked.out_stride, asked.batch,    asked.room + room * asked.batch};
  };
  int64_t bytes = 0;
  for (int64_t i = 0; i < asked.pieces.count; ++i)
    if (pieces[i].coded) bytes = std::max(bytes, CodedProduct<T, PLANES>::space(*pieces[i].coded));
  const Space space(bytes);
  for (int64_t i = 0; i < asked.pieces.count; ++i)
    if (pieces[i].coded) product(i).add_up(space.bytes);
#pragma omp barrier
  for (int64_t i = 0; i < asked.pieces.count; ++i) {
    if (!pieces[i].coded) continue;
    const auto own = product(i);
#pragma omp for schedule(static) nowait
    for (int64_t strip = 0; strip < own.weight.strips(); ++strip) own.settle(strip);
  }
#pragma omp barrier
}

template <class T, int PLANES>
void multiply(LookUp<T> asked) {
  const Coded& weight = *asked.pieces.piece->coded;
  const Space room(4 * weight.room() * asked.batch);
  asked.room = reinterpret_cast<float*>(room.bytes);
#pragma omp parallel if (weight.columns * weight.outputs > 16384)
  look_up<T, PLANES>(asked);
}

}  // namespace

#define EXPORT(T, kind)                                                                                               \
  extern "C" void coded_linear_##kind(const Coded* weight, const T* x, int64_t x_stride, const T* bias, T* out,       \
                                      int64_t out_stride, int64_t batch, int64_t planes) {                            \
    const Piece<T> piece{nullptr, weight, bias, weight->outputs};                                                     \
    const LookUp<T> asked{{&piece, 1}, x, x_stride, nullptr, out, out_stride, batch, nullptr};                        \
    if (planes == 1) multiply<T, 1>(asked);                                                                           \
    else multiply<T, 2>(asked);                                                                                       \
  }                                                                                                                   \
  extern "C" void coded_pieces_##kind(const LookUp<T>* asked) { look_up<T, 2>(*asked); }

EXPORT(float, f32)
EXPORT(bf16, bf16)

// Whether this processor has what the rest was compiled for.
extern "C" int64_t runs_here() {
  return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
