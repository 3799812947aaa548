// dropout.cuh - the random bits of dropout masks: what dropout and the pooling and products it is fused with share. The stream is described in dropout.cu.
#pragma once
#include "common.cuh"

typedef unsigned long long u64;
constexpr int DRAWN = 16;  // elements of a block of random words

__device__ __forceinline__ unsigned draw(u64 block, u64 iteration, u64 seed, u64 layer, unsigned threshold) {  // bit j: value j >= threshold
  u64 c[4] = {block + 1, 0, iteration, 0};
  for (int round = 0; round < 10; ++round) {
    u64 low0 = 0xD2E7470EE14C6C93ull * c[0], high0 = __umul64hi(0xD2E7470EE14C6C93ull, c[0]);
    u64 low1 = 0xCA5A826395121157ull * c[2], high1 = __umul64hi(0xCA5A826395121157ull, c[2]);
    c[0] = high1 ^ c[1] ^ seed, c[1] = low1, c[2] = high0 ^ c[3] ^ layer, c[3] = low0;
    seed += 0x9E3779B97F4A7C15ull, layer += 0xBB67AE8584CAA73Bull;
  }
  unsigned bits = 0;
  for (int j = 0; j < DRAWN; ++j) bits |= (unsigned)((c[j / 4] >> (j % 4 * 16) & 0xFFFF) >= threshold) << j;
  return bits;
}

struct Drop {  // what is the same in every pass of one layer
  float factor;  // 1 / (1 - ratio)
  unsigned threshold;
  u64 seed, layer;
};

// Bit e: element at + e is kept, for `count` elements, at most DRAWN. One draw where they lie in one block, else two.
__device__ __forceinline__ unsigned kept(long long at, int count, u64 iteration, const Drop& d) {
  unsigned bits = 0;
#pragma unroll 1
  for (long long block = at / DRAWN; block * DRAWN < at + count; ++block) {
    unsigned drawn = draw(block, iteration, d.seed, d.layer, d.threshold);
    int shift = (int)(block * DRAWN - at);
    bits |= shift < 0 ? drawn >> -shift : drawn << shift;
  }
  return bits;
}

__device__ __forceinline__ float dropped(float x, float factor, float keep) { return __fmul_rn(__fmul_rn(x, factor), keep); }
