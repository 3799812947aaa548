// gemm_tensor.cuh - the three products on tensor cores around either main loop (gemm_mma.cuh, gemm_wgmma.cuh). A Product is of a Kind and a
// Tile; it holds the block's sums and adds slices up (accumulate), and leaves shared memory free. Warps hold sums in fragments of 16 rows by
// 8 columns, which are alike for mma.sync and for wgmma: Tile says where a warp's lie.
#pragma once
#include "gemm_load.cuh"

struct tf32 {};  // float32 in memory
template <class Kind>
struct Storage {
  typedef Kind type;
};
template <>
struct Storage<tf32> {
  typedef float type;
};

template <class Tile>
struct Sums {
  float sum[Tile::MI][Tile::NJ][4] = {};

  // write(i, j, sums) gets runs of RUN neighbouring sums of the block's row i from column j on, inside C or not. All warps have left `shared`.
  template <int RUN, class Write>
  __device__ __forceinline__ void drain(float* shared, Write write) const {
    constexpr int PITCH = Tile::WN + 8, ACROSS = Tile::WN / RUN;  // 8 more: 4 rows of pairs lie in different banks
    static_assert(Tile::THREADS / 32 * 16 * PITCH * 4 <= Tile::STAGES * Tile::STAGE_BYTES, "fits into the slots");
    int lane = threadIdx.x & 31, n0 = Tile::column();
    float* strip = shared + (threadIdx.x >> 5) * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < Tile::MI; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::NJ; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(strip + ((lane >> 2) + 8 * half) * PITCH + 8 * j + 2 * (lane & 3)) = make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      __syncwarp();
#pragma unroll 1
      for (int run = lane; run < 16 * ACROSS; run += 32) {
        int row = run / ACROSS, column = run % ACROSS * RUN;
        Vec<float> sums[RUN / 4];
#pragma unroll
        for (int e = 0; e < RUN / 4; ++e) sums[e] = load_vec(strip + row * PITCH + column + 4 * e);
        write(Tile::row(i) + row, n0 + column, sums);
      }
      __syncwarp();
    }
  }
};

// add(slice, sum): each column of a slice [k][m] of A to sum[m]; see gemm_mma.cuh.
template <class Kind, class Tile>
struct ColumnSums;

template <class T, class P, class Place>
__device__ __forceinline__ void store_tile(const P& product, unsigned char* shared, const Block& block, const Exit<T>& exit, Place place) {
  constexpr int RUN = Vec<T>::size;
  product.template drain<RUN>((float*)shared, [&](int i, int j, const Vec<float>* sums) { exit.template run<RUN>(block.m + i, block.n + j, sums, place); });
}

// --- forward, data gradient, weight gradient: `t` are the block's taps, loader(k) is what loads from column k on --------------------------------------------------------

template <class P, class T, class Loader>
__device__ __forceinline__ void forward_product(Loader loader_from, const Finish<T>& finish, float* partial, const Geometry& g, const Block& block, const Taps& t,
                                                unsigned char* shared) {
  long long count = t.columns(), rows = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, count);
  auto loader = loader_from(first);
  P product;
  product.accumulate(loader, shared, first, last);
  Exit<T> exit(finish, partial, block, rows, g.group_outputs, g.outputs, block.group * g.group_outputs, rows * g.outputs);
  store_tile(product, shared, block, exit, [](long long m) { return m; });
}

template <class P, class T, class Loader>
__device__ __forceinline__ void data_product(Loader loader_from, const Finish<T>& finish, float* partial, const Geometry& g, const Block& block, const Taps& t,
                                             unsigned char* shared) {
  long long count = t.columns(), rows = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, count);
  if (block.m >= rows) return;  // another class has more pixels
  auto loader = loader_from(first);
  P product;
  product.accumulate(loader, shared, first, last);
  Exit<T> exit(finish, partial, block, rows, g.group_channels, g.channels, block.group * g.group_channels, (long long)g.images * g.height * g.width * g.channels);
  store_tile(product, shared, block, exit, [&](long long m) { return t.pixel(m); });
}

struct WeightGradient {
  float* dw;
  BiasGradient bias;
  float* partial;
  bool accumulate;
};
// sum: BM doubles of shared memory.
template <class P, class Loader>
__device__ __forceinline__ void weights_product(Loader loader_from, const WeightGradient& to, const Geometry& g, const Block& block, const Taps& t, unsigned char* shared,
                                                double* sum) {
  constexpr int M = P::Tile::M;
  long long pixels = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, pixels);
  auto loader = loader_from(first);
  P product;
  bool sums = to.bias.wanted(block);
  if (sums && threadIdx.x < M) sum[threadIdx.x] = 0;
  product.accumulate(loader, shared, first, last, [&](const unsigned char* slice) {
    if (sums) ColumnSums<typename P::Kind, typename P::Tile>::add(slice, sum);
  });
  if (sums && threadIdx.x < M) to.bias.store(g, block, threadIdx.x, sum[threadIdx.x]);
  int cells = g.kernel_h * g.kernel_w, columns = cells * g.kept_channels;
  long long all = (long long)g.groups * g.kept_outputs * columns, before = (long long)block.group * g.kept_outputs;
  Finish<float> finish{to.dw, nullptr, false, to.accumulate, nullptr};
  if (g.kept_channels == g.group_channels) {
    Exit<float> exit(finish, to.partial, block, g.kept_outputs, columns, columns, 0, all);
    store_tile(product, shared, block, exit, [&](long long m) { return before + m; });
    return;
  }
  product.template drain<4>((float*)shared, [&](int i, int j, const Vec<float>* sums) {  // without the columns of padding
    long long m = block.m + i;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int n = (int)block.n + j + e, cell = n / g.group_channels, channel = n - cell * g.group_channels;
      if (m >= g.kept_outputs || cell >= cells || channel >= g.kept_channels) continue;
      long long at = (before + m) * columns + cell * g.kept_channels + channel;
      if (to.partial) to.partial[block.split * all + at] = sums[0][e];
      else finish.store(at, 0, sums[0][e]);
    }
  });
}
