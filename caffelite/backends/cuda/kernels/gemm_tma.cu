// gemm_tma.cu - the products of gemm_wgmma.cu with operands brought by TMA. BOTH: A and B; else B alone in forward and data gradient, A (dy) alone in
// the weight gradient, while the other one is gathered. left, right: A and B as matrices; not BOTH: any, for the one that is gathered.
// Main loop, bytes and operations: gemm_tma.cuh.
#include "gemm_tma.cuh"

template <int M, int N, bool BOTH>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    tma_forward(const bf16* x, const __grid_constant__ cf_tensor_map left, const __grid_constant__ cf_tensor_map right, const float* bias, bf16* y, float* partial,
                Geometry g, bool relu, const double* number, Drop drop) {
  using Tile = GroupTile<M, N>;
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  cf_u64* arrivals = make_arrivals<Tile>(shared + Tile::SLOTS + BEHIND_TAPS);
  const Taps& t = kept_taps<Tile>(shared, g, block, true);
  int m = (int)block.m, n = block.group * g.group_outputs + (int)block.n;
  auto loader = [&](long long first) {
    if constexpr (BOTH) {
      return BoxLoader<Tile, true, true, true, NoGather>{{}, left, right, m, n, (int)first, arrivals, 0};
    } else {
      using Gather = WindowLoader<bf16, Tile, 16, false>;
      return BoxLoader<Tile, true, false, true, Gather>{forward_loader<Tile, 16, false>(x, x, g, block, t, first), left, right, m, n, (int)first, arrivals, 0};
    }
  };
  Finish<bf16> finish{y, bias, relu, false, nullptr, 0, number, drop};
  forward_product<GroupProduct<Tile, true>>(loader, finish, partial, g, block, t, shared);
}

template <int M, int N, bool BOTH>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    tma_data(const bf16* dy, const __grid_constant__ cf_tensor_map left, const __grid_constant__ cf_tensor_map right, bf16* dx, const bf16* positive, float factor,
             float* partial, Geometry g) {
  using Tile = GroupTile<M, N>;
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, true);
  cf_u64* arrivals = make_arrivals<Tile>(shared + Tile::SLOTS + BEHIND_TAPS);
  const Taps& t = kept_taps<Tile>(shared, g, block, false);
  int m = (int)block.m, n = block.group * g.group_channels + (int)block.n;
  auto loader = [&](long long first) {
    if constexpr (BOTH) {
      return BoxLoader<Tile, true, true, true, NoGather>{{}, left, right, m, n, (int)first, arrivals, 0};
    } else {
      using Gather = WindowLoader<bf16, Tile, 16, false>;
      return BoxLoader<Tile, true, false, true, Gather>{data_loader<Tile, false>(dy, dy, g, block, t, first), left, right, m, n, (int)first, arrivals, 0};
    }
  };
  Finish<bf16> finish{dx, nullptr, false, false, positive, factor};
  data_product<GroupProduct<Tile, true>>(loader, finish, partial, g, block, t, shared);
}

template <int M, int N, bool BOTH>
__global__ void __launch_bounds__(GroupTile<M, N>::THREADS, GroupTile<M, N>::BLOCKS)
    tma_weights(const bf16* x, const __grid_constant__ cf_tensor_map left, const __grid_constant__ cf_tensor_map right, float* dw, float* db, float* partial,
                double* partial_b, Geometry g, bool accumulate_w, bool accumulate_b) {
  using Tile = GroupTile<M, N>;
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  double* sum = reinterpret_cast<double*>(shared + Tile::SLOTS);
  cf_u64* arrivals = make_arrivals<Tile>(shared + Tile::SLOTS + 8 * M);
  __syncthreads();
  Taps t = forward_taps(g, block);
  WeightGradient to{dw, {db, partial_b, accumulate_b}, partial, accumulate_w};
  int m = block.group * g.group_outputs + (int)block.m, n = block.group * g.group_channels + (int)block.n;
  auto loader = [&](long long first) {
    if constexpr (BOTH) {
      return BoxLoader<Tile, false, true, true, NoGather>{{}, left, right, m, n, (int)first, arrivals, 0};
    } else {
      using Gather = PixelLoader<bf16, Tile, 16, false>;
      return BoxLoader<Tile, false, true, false, Gather>{weights_loader<Tile, 16, false>(x, x, g, block, t, first), left, right, m, n, (int)first, arrivals, 0};
    }
  };
  weights_product<GroupProduct<Tile, false>>(loader, to, g, block, t, shared, sum);
}
