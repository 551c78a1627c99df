// CPU kernels of the serving path: products, norms, rotation, gating, writing to and attending over pages; one by one,
// and all blocks of a transformer at once. And one of training, with its gradients: mixing_taped.h.
//
// Plain C interface over raw pointers (see __init__.py); each function has a twin in torch that tests hold it to.
// T is float or bf16; sums are in float32. Every output element is computed by one thread in one order, so the
// number of threads changes nothing. Needs AVX-512 with BF16; threads are those of torch's own OpenMP.

#include "blocks.h"
#include "mixing_taped.h"

#define EXPORT(T, kind)                                                                                              \
  extern "C" void linear_##kind(const T* x, int64_t x_stride, const T* w, const T* bias, const T* residual, T* out,  \
                                int64_t batch, int64_t outputs, int64_t width) {                                     \
    const Product<T> product{x, x_stride, w, bias, residual, out, batch, outputs, width};                            \
    _Pragma("omp parallel if (outputs * width > 8192)") product.run();                                               \
  }                                                                                                                  \
  extern "C" void rms_norm_##kind(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float eps) {     \
    _Pragma("omp parallel if (rows * width > 32768)") rms_norm<T>(x, weight, out, rows, width, eps);                 \
  }                                                                                                                  \
  extern "C" void rotate_##kind(T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads,       \
                                int64_t width) {                                                                     \
    _Pragma("omp parallel if (rows * heads * width > 32768)") rotate<T>(x, stride, cos, sin, rows, heads, width);    \
  }                                                                                                                  \
  extern "C" void gated_##kind(const T* x, T* out, int64_t rows, int64_t width) {                                    \
    _Pragma("omp parallel if (rows * width > 16384)") gated<T>(x, out, rows, width);                                 \
  }                                                                                                                  \
  extern "C" void write_pages_##kind(const T* k, const T* v, int64_t k_stride, int64_t v_stride,                     \
                                     const int64_t* rows, const int64_t* slots, int64_t count, T* keys, T* values,   \
                                     int64_t width) {                                                                \
    write_pages<T>(k, v, k_stride, v_stride, rows, slots, count, keys, values, width);                               \
  }                                                                                                                  \
  extern "C" void attend_##kind(const T* q, int64_t q_stride, const T* keys, const T* values, T* out,                \
                                const Entries* entries, int64_t heads, int64_t kv_heads, int64_t width,              \
                                int64_t slots, float scale, const T* sinks) {                                        \
    const Attention<T> attention{q,     q_stride, keys,  values, out,   *entries,                                    \
                                 heads, kv_heads, width, slots,  scale, sinks};                                      \
    const auto tasks = tasks_of(*entries, heads, kv_heads, omp_get_max_threads());                                   \
    _Pragma("omp parallel") attention.run(tasks);                                                                    \
  }                                                                                                                  \
  extern "C" void best_##kind(const T* x, int64_t rows, int64_t width, int64_t* place, bool* finite) {               \
    _Pragma("omp parallel if (rows * width > 32768)") best<T>(x, rows, width, place, finite);                        \
  }                                                                                                                  \
  extern "C" void mix_forward_##kind(const Taped* rows, const T* said, const T* v, T* out) {                          \
    _Pragma("omp parallel") mix_forward<T>(*rows, said, v, out);                                                     \
  }                                                                                                                  \
  extern "C" void mix_backward_##kind(const Taped* rows, const T* said, const T* v, const T* slope, T* to_said,      \
                                      T* to_v, float* to_alpha, float* to_gates) {                                   \
    const MixSlopes<T> slopes{*rows, said, v, slope, to_said, to_v, to_alpha, to_gates};                             \
    _Pragma("omp parallel") slopes.run();                                                                            \
  }                                                                                                                  \
  extern "C" void blocks_##kind(const Blocks<T>* blocks) { blocks->run(); }

EXPORT(float, f32)
EXPORT(bf16, bf16)
