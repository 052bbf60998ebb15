// A feed-forward layer of which only the active experts are read: the memory-bound kernel of small-batch decoding.
//
//   y[t, :] = sum over active e of h[t, e] @ down[e],   h[t, e] = activation(x[t] @ gate[e]) * (x[t] @ up[e])
//
// Layout: gate, up [experts, d, width] and down [experts, width, d], each block of an expert contiguous, so that it is
// one sequential stream. Weights are float32 or bfloat16, all sums float32.
//
// Rows come in blocks of 16. A block reads each expert that is active for any of its rows once, and computes it for
// those rows alone. The list of these experts is cut into chunks with an accumulator each, which threads take in turn;
// chunks depend on the sizes alone and are added in order, so that the result does not depend on the threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int W = 16;     // floats in a vector register
constexpr int GROUP = 8;  // rows whose sums stay in registers
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int GROUP = 2;
#else
constexpr int W = 4;
constexpr int GROUP = 1;
#endif
constexpr int PANEL = 32;             // columns of gate and up that are summed together
constexpr int ROWS = 16;              // of x in a block
constexpr int DOWN = 4;               // rows of down that are added together
constexpr int64_t CHUNK = 512 << 10;  // bytes of weights worth an accumulator
constexpr int64_t MOST_CHUNKS = 64;
constexpr int64_t AHEAD = 2048;  // bytes of a stream that are asked for early

typedef float vec __attribute__((vector_size(4 * W)));
typedef uint16_t half_vec __attribute__((vector_size(2 * W)));
typedef uint32_t bits_vec __attribute__((vector_size(4 * W)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const uint16_t* p) {  // bfloat16: the upper half of a float32
  half_vec h;
  std::memcpy(&h, p, sizeof h);
  bits_vec wide = __builtin_convertvector(h, bits_vec) << 16;
  vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}
inline float single(float v) { return v; }
inline float single(uint16_t v) {
  uint32_t wide = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &wide, sizeof f);
  return f;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// out[r][c] = sum over k of x[r][k] w[k][c], for N rows and the PANEL columns from w on, `width` apart.
template <int N, typename T>
void panel(const float* const* x, const T* w, int64_t d, int64_t width, float* out) {
  constexpr int V = PANEL / W;
  vec sum[N][V] = {};
  for (int64_t k = 0; k < d; ++k, w += width) {
    __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD);
    __builtin_prefetch(reinterpret_cast<const char*>(w) + AHEAD + 64);
    vec row[V];
    for (int v = 0; v < V; ++v) row[v] = load(w + v * W);
    for (int r = 0; r < N; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += x[r][k] * row[v];
  }
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < V; ++v) store(out + r * width + v * W, sum[r][v]);
}

template <typename T>
void panels(int rows, const float* const* x, const T* w, int64_t d, int64_t width, float* out) {
  int r = 0;
  for (; r + GROUP <= rows; r += GROUP) panel<GROUP>(x + r, w, d, width, out + r * width);
  if constexpr (GROUP > 4)
    for (; r + 4 <= rows; r += 4) panel<4>(x + r, w, d, width, out + r * width);
  if constexpr (GROUP > 2)
    for (; r + 2 <= rows; r += 2) panel<2>(x + r, w, d, width, out + r * width);
  for (; r < rows; ++r) panel<1>(x + r, w, d, width, out + r * width);
}

// out[r] = x[r] @ w with w [d, width], for up to ROWS rows.
template <typename T>
void into(int rows, const float* const* x, const T* w, int64_t d, int64_t width, float* out) {
  int64_t c = 0;
  for (; c + PANEL <= width; c += PANEL) panels(rows, x, w + c, d, width, out + c);
  for (; c < width; ++c)
    for (int r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t k = 0; k < d; ++k) sum += x[r][k] * single(w[k * width + c]);
      out[r * width + c] = sum;
    }
}

// y[r] += h[r] @ w with w [width, d], for up to ROWS rows.
template <int N, typename T>
void add_rows(int rows, const float* h, int64_t width, const T* w, int64_t d, float* const* y) {
  int64_t k = 0;
  for (; k + W <= d; k += W) {
    vec row[N];
    for (int j = 0; j < N; ++j) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + j * d + k) + AHEAD);
      row[j] = load(w + j * d + k);
    }
    for (int r = 0; r < rows; ++r) {
      vec sum = load(y[r] + k);
      for (int j = 0; j < N; ++j) sum += h[r * width + j] * row[j];
      store(y[r] + k, sum);
    }
  }
  for (; k < d; ++k)
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < N; ++j) y[r][k] += h[r * width + j] * single(w[j * d + k]);
}

template <typename T>
void out_of(int rows, const float* h, const T* w, int64_t d, int64_t width, float* const* y) {
  int64_t j = 0;
  for (; j + DOWN <= width; j += DOWN) add_rows<DOWN>(rows, h + j, width, w + j * d, d, y);
  for (; j < width; ++j) add_rows<1>(rows, h + j, width, w + j * d, d, y);
}

enum Activation : int64_t { SILU = 0, RELU = 1, RELU2 = 2 };

inline float activated(float g, int64_t activation) {
  if (activation == SILU) return g / (1 + std::exp(-g));
  float positive = g > 0 ? g : 0;
  return activation == RELU ? positive : positive * positive;
}

template <typename T>
struct Layer {
  const float* x;
  const T *gate, *up, *down;  // gate may be null
  const uint8_t* active;
  int64_t t, d, experts, width, activation;

  // Adds the experts list[begin, end) of the rows [row, row + rows) to y [rows, d].
  void run(int64_t row, int rows, const int32_t* list, int64_t begin, int64_t end, float* y) const {
    std::vector<float> g(ROWS * width), u(ROWS * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = list[i], block = e * d * width;
      const float* from[ROWS];
      float* to[ROWS];
      int n = 0;
      for (int r = 0; r < rows; ++r)
        if (active[(row + r) * experts + e]) {
          from[n] = x + (row + r) * d;
          to[n++] = y + r * d;
        }
      into(n, from, up + block, d, width, u.data());
      if (gate) {
        into(n, from, gate + block, d, width, g.data());
        for (int64_t j = 0; j < n * width; ++j) u[j] *= activated(g[j], activation);
      } else {
        for (int64_t j = 0; j < n * width; ++j) u[j] = activated(u[j], activation);
      }
      out_of(n, u.data(), down + block, d, width, to);
    }
  }
};

struct Work {  // outlives the call: a thread may come when all is done
  std::atomic<int64_t> next{0}, done{0};
};

template <typename T>
void whole_block(const Layer<T>& layer, int64_t row, int rows, float* y, ffi::ThreadPool& pool) {
  std::vector<int32_t> list;
  for (int64_t e = 0; e < layer.experts; ++e)
    for (int r = 0; r < rows; ++r)
      if (layer.active[(row + r) * layer.experts + e]) {
        list.push_back(int32_t(e));
        break;
      }
  const int64_t d = layer.d, count = int64_t(list.size());
  const int64_t bytes = count * d * layer.width * (layer.gate ? 3 : 2) * int64_t(sizeof(T));
  const int64_t most = std::max<int64_t>(MOST_CHUNKS / rows, 8);
  const int64_t chunks = std::max<int64_t>(std::min({count, bytes / CHUNK, most}), 1);
  std::vector<float> parts(chunks * rows * d);
  auto work = std::make_shared<Work>();
  float* sums = parts.data();
  const int32_t* numbers = list.data();
  const Layer<T>* shared = &layer;
  auto take = [=] {
    for (;;) {
      const int64_t c = work->next.fetch_add(1);
      if (c >= chunks) return;  // before anything of the caller's is touched
      shared->run(row, rows, numbers, count * c / chunks, count * (c + 1) / chunks, sums + c * rows * d);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([take] { take(); });
  take();  // alone, where the pool has no thread to spare: nothing waits for a task that has not begun
  while (work->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
  std::memset(y, 0, rows * d * sizeof(float));
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t i = 0; i < rows * d; ++i) y[i] += sums[c * rows * d + i];
}

template <typename T>
ffi::Error run(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer gate, ffi::AnyBuffer up,
               ffi::AnyBuffer down, ffi::Buffer<ffi::PRED> active, int64_t first, ffi::Result<ffi::Buffer<ffi::F32>> y,
               int64_t activation, bool gated) {
  const auto rows = x.dimensions(), block = down.dimensions(), mask = active.dimensions();
  Layer<T> layer{x.typed_data(), nullptr, nullptr, nullptr, reinterpret_cast<const uint8_t*>(active.typed_data()),
                 rows[0],        rows[1], mask[1], block[1], activation};
  if (block[2] != layer.d || mask[0] != layer.t || first < 0 || first + layer.experts > block[0])
    return ffi::Error::InvalidArgument("sparse_ffn: shapes of x, down and active do not agree");
  const int64_t skipped = first * layer.width * layer.d;
  layer.gate = gated ? static_cast<const T*>(gate.untyped_data()) + skipped : nullptr;
  layer.up = static_cast<const T*>(up.untyped_data()) + skipped;
  layer.down = static_cast<const T*>(down.untyped_data()) + skipped;
  for (int64_t row = 0; row < layer.t; row += ROWS)
    whole_block(layer, row, int(std::min<int64_t>(ROWS, layer.t - row)), y->typed_data() + row * layer.d, pool);
  return ffi::Error::Success();
}

ffi::Error dispatch(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer gate, ffi::AnyBuffer up,
                    ffi::AnyBuffer down, ffi::Buffer<ffi::PRED> active, ffi::Buffer<ffi::S32> first,
                    ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t activation, bool gated) {
  const int64_t from = first.typed_data()[0];
  if (down.element_type() == ffi::F32) return run<float>(pool, x, gate, up, down, active, from, y, activation, gated);
  if (down.element_type() == ffi::BF16)
    return run<uint16_t>(pool, x, gate, up, down, active, from, y, activation, gated);
  return ffi::Error::InvalidArgument("sparse_ffn: weights must be float32 or bfloat16");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fbi_sparse_ffn, dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("activation")
                                  .Attr<bool>("gated"));
