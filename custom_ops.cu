// Fused tri-plane query: bilinear lookup in three planes, their mean and, if wanted, the two-layer decoder behind it.
// Forward and backward, for the GPU (nvcc) and, from the same text, for the CPU (C++17 and OpenMP; GCC or Clang).
//
//   feature(p) = (bilinear(plane xy, p.xy) + bilinear(plane xz, p.xz) + bilinear(plane yz, p.yz)) / 3       C numbers
//   out(p)     = w2 leaky_relu(w1 feature(p) + b1) + b2                                     C -> 64 -> 4 numbers
//
// PyTorch's grid_sample takes channels first: neighbouring channels of a pixel lie T² numbers apart, the results of all
// planes are written before they are averaged, and the backward adds channel by channel. Here a corner of a cell is one
// run of C numbers, which neighbouring threads (GPU) or vector lanes (CPU) read together, and nothing but the result is
// written. The backward computes features and hidden units again; they are not kept.
//
// 3dgp.py checks, allocates and calls by plain C pointers: without a header of PyTorch this compiles in seconds.
// Sums are float32 whatever the planes are (float64 for float64, which is for tests).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __CUDACC__
#define SHARED __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
constexpr bool GPU = true;
#else
#define SHARED inline
#define UNROLL _Pragma("GCC unroll 12")
constexpr bool GPU = false;

// to += w g, both V adjacent numbers, in one step: of a plain loop GCC would make V.
template <int V, class A> inline void add(A* to, A w, const A* g) {
  typedef A Vector __attribute__((vector_size(V * sizeof(A)), aligned(sizeof(A)), may_alias));
  *reinterpret_cast<Vector*>(to) += w * *reinterpret_cast<const Vector*>(g);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Shared by GPU and CPU: memory layout, the interpolation and its adjoint. S is the planes' type, A that of all sums.

constexpr int HIDDEN = 64;       // hidden units of the decoder
constexpr double SLOPE = 0.2;    // of the leaky ReLU

struct bf16 { uint16_t bits; };
SHARED float widen(float x) { return x; }
SHARED double widen(double x) { return x; }
SHARED float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Planes (B, 3, T, T, C) with any strides, counted in numbers, but channels adjacent.
template <class S> struct Planes { S* data; int64_t image, plane, row, pixel; };

// The decoder's weights, with C padded by zeros to WIDTH = 16 or 32.
template <class A, int WIDTH> struct Decoder { A w1[HIDDEN][WIDTH], b1[HIDDEN], w2[4][HIDDEN], b2[4]; };

// One call: forward without `grad` (of `out`), backward with it. Without decoder `out` is the features.
template <class S, class A> struct Query {
  int64_t B, N;
  int C, T;
  Planes<S> planes;
  A* points;                 // (B, N, 3)
  A pixels;                  // per unit of length
  A* decoder;                // a Decoder
  A* out;                    // (B, N, C) or (B, N, 4)
  A* grad;
  Planes<A> grad_planes;     // gradients come zeroed
  A *grad_points, *grad_decoder;
};

// V adjacent channels. On a GPU 16 bytes of them are one load or store.
template <class A, int V> struct alignas(GPU && V * sizeof(A) % 16 == 0 ? 16 : sizeof(A)) Pack { A x[V]; };
template <int V, class A> SHARED Pack<A, V>& pack(A* p) { return *reinterpret_cast<Pack<A, V>*>(p); }

// Where a point is on each axis: the pixel below it, and how far beyond that it is, in pixels.
template <class A> struct Place { int low[3]; A beyond[3]; };

template <class S, class A> SHARED Place<A> locate(const Query<S, A>& q, const A* point) {
  Place<A> place;
  UNROLL for (int axis = 0; axis < 3; axis++) {
    const A p = point[axis] * q.pixels + A(q.T - 1) / 2;
    const bool near = p >= -1 && p < q.T;   // and not NaN
    const A low = near ? std::floor(p) : -2;   // then this pixel and the next one are outside
    place.low[axis] = int(low);
    place.beyond[axis] = near ? p - low : 0;
  }
  return place;
}

// Corner i of a point's twelve, four in each plane (xy, xz, yz; the first axis runs along a row): its pixel, its weight
// (a third of the bilinear one, for the mean) and the weight's slopes along both axes. Beyond the edge planes are zero.
template <class A> struct Corner {
  int plane, axis_u, axis_v, x, y;
  A weight, du, dv;
  bool inside;
  template <class S> SHARED S* in(const Planes<S>& p, int64_t b, int c) const {
    return p.data + b * p.image + plane * p.plane + y * p.row + x * p.pixel + c;
  }
};

template <class A> SHARED Corner<A> corner(const Place<A>& place, int i, int T) {
  const int plane = i / 4, right = i & 1, up = i >> 1 & 1, axis_u = plane == 2, axis_v = 1 + (plane > 0);
  const int x = place.low[axis_u] + right, y = place.low[axis_v] + up;
  const A u = place.beyond[axis_u], v = place.beyond[axis_v], wu = (right ? u : 1 - u) * A(1. / 3), wv = up ? v : 1 - v;
  return {plane, axis_u, axis_v, x, y, wu * wv, (right ? wv : -wv) * A(1. / 3), up ? wu : -wu,
          x >= 0 && y >= 0 && x < T && y < T};
}

// x: the channels [c, c + V) at a corner. A GPU makes the load itself conditional and does not branch around its use:
// so the loads of all twelve corners are under way at once.
#ifdef __CUDA_ARCH__
template <int V, class S> __device__ Pack<S, V> load(const S* from, bool inside) {
  if constexpr (V == 1) return {inside ? *from : S{}};
  const uint4 bits = inside ? *reinterpret_cast<const uint4*>(from) : uint4{};
  Pack<S, V> x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
#define READ const Pack<S, V> x = load<V>(at.in(q.planes, b, c), at.inside)
#else
#define READ if (!at.inside) continue; const Pack<S, V>& x = pack<V>(at.in(q.planes, b, c))
#endif

// Channels [c, c + V) of the feature at a place.
template <int V, class S, class A>
SHARED Pack<A, V> gather(const Query<S, A>& q, int64_t b, const Place<A>& place, int c) {
  Pack<A, V> feature = {};
  UNROLL for (int i = 0; i < 12; i++) {
    const Corner<A> at = corner(place, i, q.T);
    READ;
    for (int v = 0; v < V; v++) feature.x[v] += at.weight * widen(x.x[v]);
  }
  return feature;
}

// The adjoint. g is the gradient of channels [c, c + V); it adds to the gradient of the planes at corner i ...
template <int V, class S, class A>
SHARED void scatter(const Query<S, A>& q, int64_t b, const Place<A>& place, int i, int c, const Pack<A, V>& g) {
  const Corner<A> at = corner(place, i, q.T);
  if (!at.inside) return;
  A *to = at.in(q.grad_planes, b, c), w = at.weight;
#ifndef __CUDACC__
  add<V>(to, w, g.x);
#elif defined(__CUDA_ARCH__)   // several threads may add to a place at once
  if constexpr (V % 4 == 0 && __CUDA_ARCH__ >= 900)
    UNROLL for (int v = 0; v < V; v += 4)
      atomicAdd(reinterpret_cast<float4*>(to + v),
                make_float4(w * g.x[v], w * g.x[v + 1], w * g.x[v + 2], w * g.x[v + 3]));
  else
    UNROLL for (int v = 0; v < V; v++) atomicAdd(to + v, w * g.x[v]);
#endif
}

// ... and to the gradient of the point, g_point.
template <int V, class S, class A> SHARED void
point_gradient(const Query<S, A>& q, int64_t b, const Place<A>& place, int c, const Pack<A, V>& g, A* g_point) {
  UNROLL for (int i = 0; i < 12; i++) {
    const Corner<A> at = corner(place, i, q.T);
    READ;
    A dot = 0;
    for (int v = 0; v < V; v++) dot += g.x[v] * widen(x.x[v]);
    g_point[at.axis_u] += at.du * q.pixels * dot;
    g_point[at.axis_v] += at.dv * q.pixels * dot;
  }
}

#ifdef __CUDACC__
// ---------------------------------------------------------------------------------------------------------------------
// GPU. Lookup: neighbouring threads share a point, as its lanes; each has V channels at a time, 16 bytes of the planes.

template <int V, class S> __global__ void lookup_forward(Query<S, float> q) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, b = blockIdx.y, at = b * q.N + n;
  if (n >= q.N) return;
  const Place<float> place = locate(q, q.points + at * 3);
  for (int c = threadIdx.x * V; c < q.C; c += blockDim.x * V)
    pack<V>(q.out + at * q.C + c) = gather<V>(q, b, place, c);
}

// One lane's part of the adjoint.
template <int V, class S>
__device__ void scatter_lane(const Query<S, float>& q, int64_t b, int64_t n, int c, float* g, float* g_point) {
  const Place<float> place = locate(q, q.points + (b * q.N + n) * 3);
  const Pack<float, V> here = pack<V>(g);
  UNROLL for (int i = 0; i < 12; i++) scatter<V>(q, b, place, i, c, here);
  point_gradient<V>(q, b, place, c, here, g_point);
}

// The lanes of a point (a power of two, at most 32) add up their parts of its gradient.
__device__ void write_point(float* g_point, int lanes, bool writes, float* to) {
  UNROLL for (int i = 0; i < 3; i++) {
    for (int d = lanes / 2; d > 0; d /= 2) g_point[i] += __shfl_xor_sync(0xffffffffu, g_point[i], d);
    if (writes) to[i] = g_point[i];
  }
}

template <int V, class S> __global__ void lookup_backward(Query<S, float> q) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, b = blockIdx.y, at = b * q.N + n;
  float g_point[3] = {};
  if (n < q.N)
    for (int c = threadIdx.x * V; c < q.C; c += blockDim.x * V)
      scatter_lane<V>(q, b, n, c, q.grad + at * q.C + c, g_point);
  write_point(g_point, blockDim.x, n < q.N && threadIdx.x == 0, q.grad_points + at * 3);
}

// With the decoder a block looks a tile of points up in the same way, into shared memory. Rows of the tile are a little
// longer than WIDTH (those of hidden units than HIDDEN), so that they start in different banks.
constexpr int THREADS = 128, WIDTH = 32, ROW = WIDTH + 4;
typedef Decoder<float, WIDTH> Weights;

__device__ void copy(const float* from, Weights& to) {   // into shared memory
  for (int i = threadIdx.x; i < int(sizeof to) / 4; i += THREADS) reinterpret_cast<float*>(&to)[i] = from[i];
}

template <int V, int TILE, class S>
__device__ void gather_tile(const Query<S, float>& q, int64_t b, int64_t start, float (*feature)[ROW]) {
  constexpr int LANES = WIDTH / V;
  for (int i = threadIdx.x; i < TILE * LANES; i += THREADS) {
    const int p = i / LANES, c = i % LANES * V;
    Pack<float, V> f = {};
    if (start + p < q.N && c < q.C) f = gather<V>(q, b, locate(q, q.points + (b * q.N + start + p) * 3), c);
    pack<V>(&feature[p][c]) = f;
  }
}

template <int V, class S> __global__ void __launch_bounds__(THREADS) query_forward(Query<S, float> q) {
  __shared__ __align__(16) float feature[THREADS][ROW];
  __shared__ __align__(16) Weights w;
  copy(q.decoder, w);
  const int64_t b = blockIdx.y;
  for (int64_t start = int64_t(blockIdx.x) * THREADS; start < q.N; start += int64_t(gridDim.x) * THREADS) {
    __syncthreads();
    gather_tile<V, THREADS>(q, b, start, feature);
    __syncthreads();
    const int64_t n = start + threadIdx.x;   // from here on a thread has a point
    if (n >= q.N) continue;
    const Pack<float, WIDTH> f = pack<WIDTH>(feature[threadIdx.x]);
    Pack<float, 4> y = pack<4>(w.b2);
#pragma unroll 4
    for (int j = 0; j < HIDDEN; j++) {
      const Pack<float, WIDTH> row = pack<WIDTH>(w.w1[j]);
      float h = w.b1[j];
      UNROLL for (int c = 0; c < WIDTH; c++) h += row.x[c] * f.x[c];
      h *= h > 0 ? 1.0f : float(SLOPE);
      UNROLL for (int k = 0; k < 4; k++) y.x[k] += w.w2[k][j] * h;
    }
    pack<4>(q.out + (b * q.N + n) * 4) = y;
  }
}

template <int V, class S> __global__ void __launch_bounds__(THREADS) query_backward(Query<S, float> q) {
  constexpr int TILE = THREADS / 2, PART = WIDTH / 2, LANES = WIDTH / V;
  __shared__ __align__(16) float feature[TILE][ROW], g_hidden[TILE][HIDDEN + 1], g_out[TILE][4];
  __shared__ __align__(16) Weights w;
  copy(q.decoder, w);
  __syncthreads();
  const int j = threadIdx.x % HIDDEN, half = threadIdx.x / HIDDEN;
  const Pack<float, WIDTH> w1 = pack<WIDTH>(w.w1[j]);
  const float w2[4] = {w.w2[0][j], w.w2[1][j], w.w2[2][j], w.w2[3][j]}, b1 = w.b1[j];
  float g_w1[WIDTH] = {}, g_b1 = 0, g_w2[4] = {};
  const int64_t b = blockIdx.y;
  for (int64_t start = int64_t(blockIdx.x) * TILE; start < q.N; start += int64_t(gridDim.x) * TILE) {
    __syncthreads();
    gather_tile<V, TILE>(q, b, start, feature);
    for (int i = threadIdx.x; i < TILE * 4; i += THREADS)
      g_out[i / 4][i % 4] = start + i / 4 < q.N ? q.grad[(b * q.N + start) * 4 + i] : 0;
    __syncthreads();
    // a thread has hidden unit j and half of the points: the activation again, its gradient, those of the weights
    for (int p = half * TILE / 2; p < (half + 1) * TILE / 2; p++) {
      const Pack<float, WIDTH> f = pack<WIDTH>(feature[p]);
      float h = b1;
      UNROLL for (int c = 0; c < WIDTH; c++) h += w1.x[c] * f.x[c];
      const float slope = h > 0 ? 1.0f : float(SLOPE);
      const Pack<float, 4> g = pack<4>(g_out[p]);
      float d = 0;
      UNROLL for (int k = 0; k < 4; k++) d += slope * w2[k] * g.x[k], g_w2[k] += slope * h * g.x[k];
      g_b1 += d;
      UNROLL for (int c = 0; c < WIDTH; c++) g_w1[c] += d * f.x[c];
      g_hidden[p][j] = d;
    }
    __syncthreads();
    // a thread has a point and half of the channels: the feature's gradient takes the feature's place
    const int point = threadIdx.x % TILE, first = threadIdx.x / TILE * PART;
    Pack<float, PART> g_feature = {};
#pragma unroll 4
    for (int i = 0; i < HIDDEN; i++) {
      const Pack<float, PART> row = pack<PART>(w.w1[i] + first);
      UNROLL for (int c = 0; c < PART; c++) g_feature.x[c] += g_hidden[point][i] * row.x[c];
    }
    pack<PART>(feature[point] + first) = g_feature;
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * LANES; i += THREADS) {   // lanes share a point again
      static_assert(TILE * LANES % THREADS == 0, "write_point needs all threads of a warp");
      const int p = i / LANES, c = i % LANES * V;
      float g_point[3] = {};
      if (start + p < q.N && c < q.C) scatter_lane<V>(q, b, start + p, c, &feature[p][c], g_point);
      write_point(g_point, LANES, start + p < q.N && c == 0, q.grad_points + (b * q.N + start + p) * 3);
    }
  }
  Weights& grad = *reinterpret_cast<Weights*>(q.grad_decoder);
  UNROLL for (int c = 0; c < WIDTH; c++) atomicAdd(&grad.w1[j][c], g_w1[c]);
  UNROLL for (int k = 0; k < 4; k++) atomicAdd(&grad.w2[k][j], g_w2[k]);
  atomicAdd(&grad.b1[j], g_b1);
}

template <class S> const char* run(const Query<S, float>& q, int64_t context) {
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(context);
  const auto launch = [&](auto V) {
    if (q.decoder) {   // a block has several tiles: it copies the decoder, and adds to its gradient, but once
      const int64_t points = q.grad ? 16 * THREADS / 2 : 4 * THREADS;
      const dim3 grid(unsigned((q.N + points - 1) / points), unsigned(q.B));
      if (q.grad) query_backward<V()><<<grid, THREADS, 0, stream>>>(q);
      else query_forward<V()><<<grid, THREADS, 0, stream>>>(q);
    } else {
      unsigned lanes = 1;
      while (lanes < 32 && int(lanes) * V() < q.C) lanes *= 2;
      const dim3 block(lanes, 256 / lanes), grid(unsigned((q.N + block.y - 1) / block.y), unsigned(q.B));
      if (q.grad) lookup_backward<V()><<<grid, block, 0, stream>>>(q);
      else lookup_forward<V()><<<grid, block, 0, stream>>>(q);
    }
  };
  constexpr int WIDE = 16 / sizeof(S);
  const Planes<S>& p = q.planes;
  const bool aligned = (q.C | p.image | p.plane | p.row | p.pixel) % WIDE == 0 &&
                       (uintptr_t(p.data) | uintptr_t(q.grad) | uintptr_t(q.out)) % 16 == 0;
  if (aligned) launch(std::integral_constant<int, WIDE>());
  else launch(std::integral_constant<int, 1>());
  const cudaError_t error = cudaGetLastError();   // of the launch; faults while it runs are found by later calls
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#else
// ---------------------------------------------------------------------------------------------------------------------
// CPU. Threads share the points, but of a plane's gradient each share of the channels belongs to one thread: nothing is
// added to by two threads, and results do not depend on their number.

#define INLINE __attribute__((always_inline)) inline   // strides then are constants, and arrays known not to overlap
constexpr int TILE = 32, CHUNK = 32 * TILE;   // points; those of a chunk have one sum for the decoder's weights

// out (rows, N) += a (rows, depth) b (depth, N). Sums of 64 numbers stay in registers. a(i, k) is a[i * ai + k * ak].
template <int N, class A>
INLINE void multiply_add(int rows, int depth, const A* a, int ai, int ak, const A* b, A* out) {
  typedef A Vector __attribute__((vector_size(32), may_alias, aligned(4)));
  constexpr int L = N * sizeof(A) / 32, R = 64 / N;
  for (int i = 0; i < rows; i += R, out += R * N) {
    Vector sum[R * L];
    memcpy(sum, out, sizeof sum);
    for (int k = 0; k < depth; k++)
#pragma GCC unroll 16
      for (int s = 0; s < R * L; s++)
        sum[s] += a[(i + s / L) * ai + k * ak] * reinterpret_cast<const Vector*>(b + k * N)[s % L];
    memcpy(out, sum, sizeof sum);
  }
}

// f(V, c) for the channels of [first, last), V at a time.
template <class F> void each_block(int first, int last, F f) {
  for (; first + 32 <= last; first += 32) f(std::integral_constant<int, 32>(), first);
  for (; first + 16 <= last; first += 16) f(std::integral_constant<int, 16>(), first);
  for (; first + 4 <= last; first += 4) f(std::integral_constant<int, 4>(), first);
  for (; first < last; first++) f(std::integral_constant<int, 1>(), first);
}

template <class S, class A> void feature_at(const Query<S, A>& q, int64_t b, int64_t n, A* out) {
  const Place<A> place = locate(q, q.points + (b * q.N + n) * 3);
  each_block(0, q.C, [&](auto V, int c) { pack<V()>(out + c) = gather<V()>(q, b, place, c); });
}

template <class S, class A> void point_backward(const Query<S, A>& q, int64_t b, int64_t n, A* g) {
  const int64_t at = (b * q.N + n) * 3;
  const Place<A> place = locate(q, q.points + at);
  each_block(0, q.C, [&](auto V, int c) { point_gradient<V()>(q, b, place, c, pack<V()>(g + c), q.grad_points + at); });
}

// Channels [low, high) of a plane's gradient, by points [first, first + n) of an image, whose features have gradients g.
template <int PLANE, class S, class A>
void plane_backward(const Query<S, A>& q, int64_t b, int64_t first, int64_t n, int low, int high, A* g) {
  for (int64_t i = 0; i < n; i++, g += q.C) {
    const Place<A> place = locate(q, q.points + (b * q.N + first + i) * 3);
    each_block(low, high, [&](auto V, int c) {
      const Pack<A, V()> here = pack<V()>(g + c);
      UNROLL for (int k = 0; k < 4; k++) scatter<V()>(q, b, place, PLANE * 4 + k, c, here);
    });
  }
}

// Points [first, last) of each image; g_features (B, last - first, C) is the gradient of their features.
template <class S, class A>
void planes_backward(const Query<S, A>& q, A* g_features, int64_t first, int64_t last, int threads) {
  constexpr auto xy = plane_backward<0, S, A>, xz = plane_backward<1, S, A>, yz = plane_backward<2, S, A>;
  const int64_t n = last - first;
  const int shares = int((threads + 3 * q.B - 1) / (3 * q.B)), width = ((q.C + shares - 1) / shares + 15) / 16 * 16;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < q.B * 3 * shares; task++) {
    const int64_t b = task / shares / 3, plane = task / shares % 3;
    const int low = int(task % shares) * width, high = low + width < q.C ? low + width : q.C;
    (plane == 0 ? xy : plane == 1 ? xz : yz)(q, b, first, n, low, high, g_features + b * n * q.C);
  }
}

// The decoder for a tile of points, and what its backward needs. One per thread.
template <int WIDTH, class S, class A> struct Tile {
  typedef Decoder<A, WIDTH> Weights;
  const Weights& w;
  alignas(64) A w1_t[WIDTH][HIDDEN];
  alignas(64) A feature[TILE][WIDTH], hidden[TILE][HIDDEN], g_feature[TILE][WIDTH], g_hidden[TILE][HIDDEN];

  Tile(const Query<S, A>& q) : w(*reinterpret_cast<Weights*>(q.decoder)) {
    for (int j = 0; j < HIDDEN; j++)
      for (int c = 0; c < WIDTH; c++) w1_t[c][j] = w.w1[j][c];
  }
  INLINE void fill(const Query<S, A>& q, int64_t b, int64_t start, int count) {   // `hidden` is before the activation
    memset(feature, 0, sizeof feature);
    for (int p = 0; p < count; p++) feature_at(q, b, start + p, feature[p]);
    for (int p = 0; p < TILE; p++) memcpy(hidden[p], w.b1, sizeof w.b1);
    multiply_add<HIDDEN>(TILE, WIDTH, *feature, WIDTH, 1, *w1_t, *hidden);
  }
  void forward(A* out, int count) {
    for (int i = 0; i < count * 4; i++) {
      const A *h = hidden[i / 4], *w2 = w.w2[i % 4];
      A sum = w.b2[i % 4];
      for (int j = 0; j < HIDDEN; j++) sum += w2[j] * (h[j] > 0 ? 1 : A(SLOPE)) * h[j];
      out[i] = sum;
    }
  }
  INLINE void backward(const A* grad, int count, Weights& sums) {   // -> g_feature; adds to sums
    const A one = 1;
    A g[TILE][4] = {};
    memcpy(g, grad, count * sizeof *g);
    memset(g_hidden, 0, sizeof g_hidden);
    memset(g_feature, 0, sizeof g_feature);
    multiply_add<HIDDEN>(TILE, 4, *g, 4, 1, *w.w2, *g_hidden);
    for (int p = 0; p < TILE; p++)
      for (int j = 0; j < HIDDEN; j++) {
        const A slope = hidden[p][j] > 0 ? A(1) : A(SLOPE);
        hidden[p][j] *= slope, g_hidden[p][j] *= slope;
      }
    multiply_add<HIDDEN>(4, TILE, *g, 1, 4, *hidden, *sums.w2);
    multiply_add<HIDDEN>(1, TILE, &one, 0, 0, *g_hidden, sums.b1);
    multiply_add<WIDTH>(HIDDEN, TILE, *g_hidden, 1, HIDDEN, *feature, *sums.w1);
    multiply_add<WIDTH>(TILE, HIDDEN, *g_hidden, HIDDEN, 1, *w.w1, *g_feature);
  }
};

// Points [from, to) of each image: forward; or the gradients of weights, points and features (B, to - from, C).
template <int WIDTH, class S, class A>
void query(const Query<S, A>& q, A* g_features, int64_t from, int64_t to, int threads) {
  const int64_t chunks = (to - from + CHUNK - 1) / CHUNK;
  std::vector<Decoder<A, WIDTH>> sums(q.grad ? q.B * chunks : 0);
#pragma omp parallel num_threads(threads)
  {
    Tile<WIDTH, S, A> tile(q);
#pragma omp for
    for (int64_t i = 0; i < q.B * chunks; i++) {
      const int64_t b = i / chunks, first = from + i % chunks * CHUNK, end = first + CHUNK < to ? first + CHUNK : to;
      for (int64_t start = first; start < end; start += TILE) {
        const int64_t at = b * q.N + start;
        const int count = int(end - start < TILE ? end - start : TILE);
        tile.fill(q, b, start, count);
        if (!q.grad) {
          tile.forward(q.out + at * 4, count);
        } else {
          tile.backward(q.grad + at * 4, count, sums[i]);
          A* g = g_features + (b * (to - from) + start - from) * q.C;
          for (int p = 0; p < count; p++) {   // what `fill` read of the planes is still in the cache
            point_backward(q, b, start + p, tile.g_feature[p]);
            memcpy(g + p * q.C, tile.g_feature[p], sizeof(A) * q.C);
          }
        }
      }
    }
  }
  for (const Decoder<A, WIDTH>& sum : sums)
    for (int i = 0; i < int(sizeof sum / sizeof(A)); i++) q.grad_decoder[i] += reinterpret_cast<const A*>(&sum)[i];
}

template <class S, class A> const char* run(const Query<S, A>& q, int64_t context) try {
  const int threads = int(context);
  if (q.decoder) {   // block by block: what the backward leaves between its two halves stays in the cache
    const int64_t size = (int64_t(1) << 21) / (q.B * q.C) / CHUNK * CHUNK + CHUNK, block = size < q.N ? size : q.N;
    std::vector<A> g_features(q.grad ? q.B * block * q.C : 0);
    for (int64_t from = 0; from < q.N; from += block) {
      const int64_t to = from + block < q.N ? from + block : q.N;
      (q.C <= 16 ? query<16, S, A> : query<32, S, A>)(q, g_features.data(), from, to, threads);
      if (q.grad) planes_backward(q, g_features.data(), from, to, threads);
    }
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < q.B * q.N; i++)
      if (q.grad) point_backward(q, i / q.N, i % q.N, q.grad + i * q.C);
      else feature_at(q, i / q.N, i % q.N, q.out + i * q.C);
    if (q.grad) planes_backward(q, q.grad, 0, q.N, threads);
  }
  return nullptr;
} catch (const std::bad_alloc&) {
  return "not enough memory";
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The interface. dtype of the planes: 0 float32, 1 bfloat16, 2 float64 (CPU); everything else is float32, or float64
// with it. size: B, N, C, T, then the planes' strides over images, planes, channels (1), rows, pixels. tensors:
// planes, points, decoder, out, grad, grad_planes (B, T, T, 3, C) without gaps, grad_points, grad_decoder; null where
// there is none. The gradient of b2, a plain sum, is left to the caller. context: the CUDA stream, or the number of
// threads. Returns null, or what is wrong.

template <class S, class A> const char* call(const int64_t* n, void* const* t, double box, int64_t context) {
  const int64_t C = n[2], T = n[3];
  const auto a = [t](int i) { return static_cast<A*>(t[i]); };
  if (n[0] == 0 || n[1] == 0) return nullptr;
  return run(Query<S, A>{n[0], n[1], int(C), int(T), {static_cast<S*>(t[0]), n[4], n[5], n[7], n[8]}, a(1),
                         A((T - 1) / (2 * box)), a(2), a(3), a(4), {a(5), 3 * T * T * C, C, 3 * T * C, 3 * C}, a(6),
                         a(7)}, context);
}

extern "C" const char* triplane(int dtype, const int64_t* size, void* const* tensors, double box, int64_t context) {
  if (dtype == 0) return call<float, float>(size, tensors, box, context);
  if (dtype == 1) return call<bf16, float>(size, tensors, box, context);
#ifndef __CUDACC__
  if (dtype == 2) return call<double, double>(size, tensors, box, context);
#endif
  return "planes of this dtype are not supported";
}
