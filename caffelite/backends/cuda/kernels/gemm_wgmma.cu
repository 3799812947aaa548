// gemm_wgmma.cu - gemm_forward, gemm_data and gemm_weights of gemm.cu on Hopper's tensor cores, for bf16; parameters as in gemm_mma.cu.
// Main loop, tiles, bytes and operations: gemm_wgmma.cuh.
#include "gemm_wgmma.cuh"

// Behind the slots: the block's taps, which are read anew for every slice since registers are short, or the sums of the bias gradient; 8 BM bytes.
template <class Tile>
__device__ __forceinline__ const Taps& kept_taps(unsigned char* shared, const Geometry& g, const Block& block, bool forward) {
  static_assert(sizeof(Taps) <= 8 * Tile::M, "fits behind the slots");
  Taps* t = reinterpret_cast<Taps*>(shared + Tile::SLOTS);
  if (threadIdx.x == 0) *t = forward ? forward_taps(g, block) : backward_taps(g, block);
  __syncthreads();
  return *t;
}

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_forward(const bf16* x, const bf16* w, const float* bias, bf16* y, float* partial, Geometry g, bool relu) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  const Taps& t = kept_taps<GroupTile<M, N>>(shared, g, block, true);
  forward_product<GroupProduct<GroupTile<M, N>, true>, 16>(x, w, bias, y, partial, g, relu, block, t, shared);
}

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_data(const bf16* dy, const bf16* packed, bf16* dx, const bf16* positive, float* partial, Geometry g) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, true);
  const Taps& t = kept_taps<GroupTile<M, N>>(shared, g, block, false);
  data_product<GroupProduct<GroupTile<M, N>, true>>(dy, packed, dx, positive, partial, g, block, t, shared);
}

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_weights(const bf16* x, const bf16* dy, float* dw, float* db, float* partial, double* partial_b, Geometry g, bool accumulate_w, bool accumulate_b) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  WeightGradient to{dw, {db, partial_b, accumulate_b}, partial, accumulate_w};
  double* sum = reinterpret_cast<double*>(shared + GroupTile<M, N>::SLOTS);
  weights_product<GroupProduct<GroupTile<M, N>, false>, 16>(x, dy, to, g, block, t, shared, sum);
}
