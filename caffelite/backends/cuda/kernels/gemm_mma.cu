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

template <class Kind, int M, int N, int PIECE>
__global__ void __launch_bounds__(MmaTile<M, N>::THREADS, MmaTile<M, N>::BLOCKS)
    mma_forward(const typename Storage<Kind>::type* x, const typename Storage<Kind>::type* w, const float* bias, typename Storage<Kind>::type* y, float* partial,
                Geometry g, bool relu, const double* number, Drop drop) {
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  auto loader = [&](long long first) { return forward_loader<MmaTile<M, N>, PIECE>(x, w, g, block, t, first); };
  Finish<typename Storage<Kind>::type> finish{y, bias, relu, false, nullptr, 0, number, drop};
  forward_product<MmaProduct<Kind, MmaTile<M, N>, true>>(loader, finish, partial, g, block, t, shared);
}

template <class Kind, int M, int N>
__global__ void __launch_bounds__(MmaTile<M, N>::THREADS, MmaTile<M, N>::BLOCKS)
    mma_data(const typename Storage<Kind>::type* dy, const typename Storage<Kind>::type* packed, typename Storage<Kind>::type* dx,
             const typename Storage<Kind>::type* positive, float factor, float* partial, Geometry g) {
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, true);
  __shared__ Taps t;  // read anew for every slice: registers are short
  if (threadIdx.x == 0) t = backward_taps(g, block);
  __syncthreads();
  auto loader = [&](long long first) { return data_loader<MmaTile<M, N>>(dy, packed, g, block, t, first); };
  Finish<typename Storage<Kind>::type> finish{dx, nullptr, false, false, positive, factor};
  data_product<MmaProduct<Kind, MmaTile<M, N>, true>>(loader, finish, partial, g, block, t, shared);
}

template <class Kind, int M, int N, int PIECE>
__global__ void __launch_bounds__(MmaTile<M, N>::THREADS, MmaTile<M, N>::BLOCKS)
    mma_weights(const typename Storage<Kind>::type* x, const typename Storage<Kind>::type* dy, float* dw, float* db, float* partial, double* partial_b,
                Geometry g, bool accumulate_w, bool accumulate_b) {
  CF_DYNAMIC_SHARED(unsigned char, shared);
  Block block = block_of(g, M, N, false);
  Taps t = forward_taps(g, block);
  __shared__ double sum[M];  // registers are short
  WeightGradient to{dw, {db, partial_b, accumulate_b}, partial, accumulate_w};
  auto loader = [&](long long first) { return weights_loader<MmaTile<M, N>, PIECE>(x, dy, g, block, t, first); };
  weights_product<MmaProduct<Kind, MmaTile<M, N>, false>>(loader, to, g, block, t, shared, sum);
}
