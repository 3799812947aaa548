// primitives.cuh - every device primitive that needs inline PTX, wrapped once. On machines without a GPU the emulator's primitives_emu.h
// gives the same names (CF_EMU is defined there).
//
// cf_to_tf32                        rounds to tf32's 10 bits of mantissa, ties away from zero (the tensor cores themselves would truncate)
// cf_mma_m16n8k8_tf32               d += a b with a 16x8 (4 registers), b 8x8 (2), d 16x8 float (4), in the PTX manual's fragment layout
// cf_mma_m16n8k16_bf16              the same with a 16x16 and b 16x8 in bfloat16, two to a register
// cf_cp_async16, 8, 4               copy 16, 8 or 4 bytes global -> shared without a register; beyond `valid_bytes` zeros are written
// cf_cp_commit, cf_cp_wait<N>       close a group of copies; wait until at most N groups of this thread are open
// cf_ldmatrix_x4, x2, *_trans       8x8 matrices of 16-bit values from shared memory; lane i gives the address of row i
// cf_bf16_bits                      float -> bfloat16, to nearest even
// Hopper (sm_90a) alone, by whole warpgroups of four warps, aligned to four:
// cf_fence_proxy_async              this thread's writes to shared memory come before what the async proxy (wgmma) reads after a barrier
// cf_wgmma_descriptor               a matrix in shared memory, rows of 128 bytes whose 16-byte chunks are permuted by the row's number mod 8, in
//                                   atoms of 8 rows, aligned to 1024 bytes. stride: bytes from one atom to the next, along rows m for a matrix
//                                   that lies along k, along k for one that lies along m (transposed), which goes on `leading` bytes
//                                   further after each 64 values of m. 16 bytes further: the descriptor plus 1
// cf_wgmma_m64k16_bf16              d += a b: a 64x16, b 16 x 8J, d 64 x 8J float; warp i of the four holds rows 16i.. in fragments as of
//                                   mma.m16n8. Starts it only: d is in flight until its group has been waited for
// cf_wgmma_fence, commit, wait<N>   registers written before may be read by the next wgmma; close a group; wait until N are open at most
// cf_hold                           keeps a register's value from being read early
// cf_tensor_map                     a matrix in global memory and the boxes that it is read in, as the driver encodes it; a kernel's parameter,
//                                   const and __grid_constant__. Here: 16-bit values, boxes of 64 columns, permuted as for cf_wgmma_descriptor
// cf_load_box                       one thread: a box from a column and a row on, zeros outside the matrix, to 1024-byte aligned shared
//                                   memory; its bytes arrive at an mbarrier
// cf_mbarrier_init, expect, wait    count of arrivals of a phase (then cf_fence_proxy_async, and a barrier); arrive, with so many bytes to come;
//                                   wait until the phase of this parity (0, 1, 0, ...) is complete: bytes that arrived are visible to the waiter
#pragma once
#ifdef CF_EMU
#include "primitives_emu.h"
#define CF_DYNAMIC_SHARED(type, name) type* name = (type*)emu::g.dyn
#define CF_DYNAMIC_SHARED_1024(type, name) type* name = (type*)emu::g.dyn
#else
typedef unsigned int cf_u32;
typedef unsigned long long cf_u64;
#define CF_DEV __device__ __forceinline__
#define CF_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char cf_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(cf_dynamic_shared)
#define CF_DYNAMIC_SHARED_1024(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char cf_dynamic_shared_1024[]; \
  type* name = reinterpret_cast<type*>(cf_dynamic_shared_1024)

CF_DEV unsigned short cf_bf16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
CF_DEV cf_u32 cf_to_tf32(float x) {
  cf_u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
CF_DEV void cf_mma_m16n8k8_tf32(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CF_DEV void cf_mma_m16n8k16_bf16(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CF_DEV cf_u32 cf_shared_address(const void* p) { return (cf_u32)__cvta_generic_to_shared(p); }
CF_DEV void cf_cp_async16(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_async8(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_async4(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
CF_DEV void cf_cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#define CF_LDMATRIX4(name, modifier)                                                                          \
  CF_DEV void name(cf_u32(&r)[4], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];"                  \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(cf_shared_address(row)) : "memory");  \
  }
#define CF_LDMATRIX2(name, modifier)                                                                          \
  CF_DEV void name(cf_u32(&r)[2], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];"                        \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(cf_shared_address(row)) : "memory");                          \
  }
CF_LDMATRIX4(cf_ldmatrix_x4, "")
CF_LDMATRIX4(cf_ldmatrix_x4_trans, ".trans")
CF_LDMATRIX2(cf_ldmatrix_x2, "")
CF_LDMATRIX2(cf_ldmatrix_x2_trans, ".trans")

CF_DEV void cf_fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
CF_DEV void cf_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CF_DEV void cf_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
CF_DEV void cf_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
CF_DEV void cf_hold(float& value) { asm volatile("" : "+f"(value)::"memory"); }
CF_DEV cf_u64 cf_wgmma_descriptor(const void* start, cf_u32 leading, cf_u32 stride) {
  return (cf_u64)((cf_shared_address(start) & 0x3ffff) >> 4) | (cf_u64)(leading >> 4) << 16 | (cf_u64)(stride >> 4) << 32 | (cf_u64)1 << 62;
}
struct alignas(64) cf_tensor_map {
  cf_u64 words[16];
};
CF_DEV void cf_mbarrier_init(cf_u64* p, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cf_shared_address(p)), "r"(count) : "memory"); }
CF_DEV void cf_mbarrier_expect(cf_u64* p, cf_u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(cf_shared_address(p)), "r"(bytes) : "memory");
}
CF_DEV void cf_mbarrier_wait(cf_u64* p, int parity) {
  cf_u32 done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(cf_shared_address(p)), "r"(parity) : "memory");
  } while (!done);
}
CF_DEV void cf_load_box(void* to, const cf_tensor_map& map, int column, int row, cf_u64* p) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(cf_shared_address(to)),
               "l"(&map), "r"(column), "r"(row), "r"(cf_shared_address(p)) : "memory");
}
// The registers of 32 columns, and their names in the instruction.
#define CF_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define CF_COLUMNS(j) CF_FOUR(j), CF_FOUR(j + 1), CF_FOUR(j + 2), CF_FOUR(j + 3)
#define CF_NAMES0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CF_NAMES1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CF_NAMES2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CF_NAMES3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CF_NAMES4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define CF_NAMES5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CF_WGMMA(n, names, left, right, across_a, across_b, ...)                                                                                     \
  template <int ACROSS_A, int ACROSS_B> /* 1: the matrix lies along m, or n, and not along k */                                                  \
  CF_DEV void cf_wgmma_m64k16_bf16(float (&d)[n / 8][4], cf_u64 a, cf_u64 b) {                                                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" names "}, " left ", " right ", 1, 1, 1, " across_a ", " across_b ";" \
                 : __VA_ARGS__                                                                                                                   \
                 : "l"(a), "l"(b), "n"(ACROSS_A), "n"(ACROSS_B));                                                                                \
  }
#define CF_NAMES64 CF_NAMES0 ", " CF_NAMES1
#define CF_NAMES96 CF_NAMES64 ", " CF_NAMES2
#define CF_NAMES128 CF_NAMES96 ", " CF_NAMES3
#define CF_NAMES192 CF_NAMES128 ", " CF_NAMES4 ", " CF_NAMES5
CF_WGMMA(64, CF_NAMES64, "%32", "%33", "%34", "%35", CF_COLUMNS(0), CF_COLUMNS(4))
CF_WGMMA(96, CF_NAMES96, "%48", "%49", "%50", "%51", CF_COLUMNS(0), CF_COLUMNS(4), CF_COLUMNS(8))
CF_WGMMA(128, CF_NAMES128, "%64", "%65", "%66", "%67", CF_COLUMNS(0), CF_COLUMNS(4), CF_COLUMNS(8), CF_COLUMNS(12))
CF_WGMMA(192, CF_NAMES192, "%96", "%97", "%98", "%99", CF_COLUMNS(0), CF_COLUMNS(4), CF_COLUMNS(8), CF_COLUMNS(12), CF_COLUMNS(16), CF_COLUMNS(20))
#endif
