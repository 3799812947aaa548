// gemm_mma.cu - gemm_forward, gemm_data and gemm_weights of gemm.cu on tensor cores. Kind: bf16, or tf32 (float32 in memory). PIECE: bytes
// that an operand's channels are a multiple of, 16, or 8 where an image is padded to 4 channels of bfloat16.
//
// Operands whose channels are not whole pieces, or views off their boundary, come as copies padded with zeros (gemm_pad), not through a
// second loader. An AlexNet batch of 256 images of 227x227x3 in bfloat16, padded to 4 channels: 79 MB read, 106 MB written, once forward
// and once backward; a loader of single channels would make 281 million loads of 2 bytes (774,400 pixels, 363 columns), each with its own
// cell, channel and bounds, about 20 instructions: 195 us on 132 SMs if nothing else ran. With 4 channels k grows from 363 to 484, with 8 to
// 968: hence pieces of 8 bytes. Computed, not measured.
// Main loop, tiles, bytes and operations: gemm_mma.cuh.
#include "gemm_mma.cuh"

template <class T, class P, class Place>
__device__ __forceinline__ void store_tile(const P& product, unsigned char* shared, const Block& block, const Exit<T>& exit, Place place) {
  constexpr int RUN = Vec<T>::size;
  product.template drain<RUN>((float*)shared, [&](int i, int j, const Vec<float>* sums) { exit.template run<RUN>(block.m + i, block.n + j, sums, place); });
}

template <class Kind, int M, int N, int PIECE>
__global__ void __launch_bounds__(Tile<M, N>::THREADS, Tile<M, N>::BLOCKS)
    mma_forward(const typename Storage<Kind>::type* x, const typename Storage<Kind>::type* w, const float* bias, typename Storage<Kind>::type* y, float* partial,
                Geometry g, bool relu) {
  using T = typename Storage<Kind>::type;
  using Shape = Tile<M, N>;
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  long long count = t.columns(), rows = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, count);
  WindowLoader<T, Shape, PIECE> loader(x, w + (long long)block.group * g.group_outputs * count, t, block.m, block.n, g.group_outputs, (int)count, first);
  Product<Kind, Shape, true> product;
  multiply_slices<Shape, SLICE_BYTES / (int)sizeof(T)>(loader, product, shared, first, last);
  Finish<T> finish{y, bias, relu, false, nullptr};
  Exit<T> exit(finish, partial, block, rows, g.group_outputs, g.outputs, block.group * g.group_outputs, rows * g.outputs);
  store_tile(product, shared, block, exit, [](long long m) { return m; });
}

template <class Kind, int M, int N>
__global__ void __launch_bounds__(Tile<M, N>::THREADS, Tile<M, N>::BLOCKS)
    mma_data(const typename Storage<Kind>::type* dy, const typename Storage<Kind>::type* packed, typename Storage<Kind>::type* dx,
             const typename Storage<Kind>::type* positive, float* partial, Geometry g) {
  using T = typename Storage<Kind>::type;
  using Shape = Tile<M, N>;
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, true);
  __shared__ Taps t;  // read anew for every slice: registers are short
  if (threadIdx.x == 0) t = backward_taps(g, block);
  __syncthreads();
  long long count = t.columns(), rows = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, count);
  if (block.m >= rows) return;  // another class has more pixels
  int pitch = g.kernel_h * g.kernel_w * g.group_outputs;
  WindowLoader<T, Shape, 16> loader(dy, packed + (long long)block.group * g.group_channels * pitch, t, block.m, block.n, g.group_channels, pitch, first);
  Product<Kind, Shape, true> product;
  multiply_slices<Shape, SLICE_BYTES / (int)sizeof(T)>(loader, product, shared, first, last);
  Finish<T> finish{dx, nullptr, false, false, positive};
  Exit<T> exit(finish, partial, block, rows, g.group_channels, g.channels, block.group * g.group_channels, (long long)g.images * g.height * g.width * g.channels);
  store_tile(product, shared, block, exit, [&](long long m) { return t.pixel(m); });
}

template <class Kind, int M, int N, int PIECE>
__global__ void __launch_bounds__(Tile<M, N>::THREADS, Tile<M, N>::BLOCKS)
    mma_weights(const typename Storage<Kind>::type* x, const typename Storage<Kind>::type* dy, float* dw, float* db, float* partial, double* partial_b,
                Geometry g, bool accumulate_w, bool accumulate_b) {
  using T = typename Storage<Kind>::type;
  using Shape = Tile<M, N>;
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  long long pixels = t.rows(), first = block.split * g.per_split, last = min(first + g.per_split, pixels);
  PixelLoader<T, Shape, PIECE> loader(dy + block.group * g.group_outputs, x, t, block.m, block.n, g.group_outputs, g.outputs, first);
  Product<Kind, Shape, false> product;
  __shared__ double sum[M];  // registers are short
  BiasGradient bias{db, partial_b, accumulate_b};
  bool sums = bias.wanted(block);
  if (sums && threadIdx.x < M) sum[threadIdx.x] = 0;
  multiply_slices<Shape, SLICE_BYTES / (int)sizeof(T)>(loader, product, shared, first, last, [&](const unsigned char* slice) {
    if (sums) ColumnSums<Kind, Shape>::add(slice, sum);
  });
  if (sums && threadIdx.x < M) bias.store(g, block, threadIdx.x, sum[threadIdx.x]);
  int cells = g.kernel_h * g.kernel_w, columns = cells * g.kept_channels;
  long long all = (long long)g.groups * g.kept_outputs * columns, before = (long long)block.group * g.kept_outputs;
  Finish<float> finish{dw, nullptr, false, accumulate_w, nullptr};
  if (g.kept_channels == g.group_channels) {
    Exit<float> exit(finish, partial, block, g.kept_outputs, columns, columns, 0, all);
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
      if (partial) partial[block.split * all + at] = sums[0][e];
      else finish.store(at, 0, sums[0][e]);
    }
  });
}
