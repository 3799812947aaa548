// gemm_wgmma.cu - gemm_forward, gemm_data and gemm_weights of gemm.cu on Hopper's tensor cores, for bf16; parameters as in gemm_mma.cu.
// Main loop, tiles, bytes and operations: gemm_wgmma.cuh.
#include "gemm_wgmma.cuh"

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_forward(const bf16* x, const bf16* w, const float* bias, bf16* y, float* partial, Geometry g, bool relu, const double* number, Drop drop) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  const Taps& t = kept_taps<GroupTile<M, N>>(shared, g, block, true);
  auto loader = [&](long long first) { return forward_loader<GroupTile<M, N>, 16>(x, w, g, block, t, first); };
  Finish<bf16> finish{y, bias, relu, false, nullptr, 0, number, drop};
  forward_product<GroupProduct<GroupTile<M, N>, true>>(loader, finish, partial, g, block, t, shared);
}

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_data(const bf16* dy, const bf16* packed, bf16* dx, const bf16* positive, float factor, float* partial, Geometry g) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, true);
  const Taps& t = kept_taps<GroupTile<M, N>>(shared, g, block, false);
  auto loader = [&](long long first) { return data_loader<GroupTile<M, N>>(dy, packed, g, block, t, first); };
  Finish<bf16> finish{dx, nullptr, false, false, positive, factor};
  data_product<GroupProduct<GroupTile<M, N>, true>>(loader, finish, partial, g, block, t, shared);
}

template <int M, int N>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    wgmma_weights(const bf16* x, const bf16* dy, float* dw, float* db, float* partial, double* partial_b, Geometry g, bool accumulate_w, bool accumulate_b) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  WeightGradient to{dw, {db, partial_b, accumulate_b}, partial, accumulate_w};
  double* sum = reinterpret_cast<double*>(shared + GroupTile<M, N>::SLOTS);
  auto loader = [&](long long first) { return weights_loader<GroupTile<M, N>, 16>(x, dy, g, block, t, first); };
  weights_product<GroupProduct<GroupTile<M, N>, false>>(loader, to, g, block, t, shared, sum);
}
