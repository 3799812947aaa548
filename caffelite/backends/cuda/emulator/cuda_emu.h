// cuda_emu.h - compile a .cu kernel source with g++ -std=c++17 -DCF_EMU and run it on the CPU.
// One fiber per CUDA thread (started lazily; a thread that never blocks costs no stack switch). Blocks run one
// after another. emu_core.cpp holds the scheduler and the checker; this header is the device-side API.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <cfloat>
#include <cassert>
#include <tuple>
#include <type_traits>
// ------------------------------------------------------------------ qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // ASan puts redzones around plain statics only
#else
#define __shared__ static thread_local  // module's TLS block == all static shared memory: range known, poisonable
#endif
// ------------------------------------------------------------------ vector types
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define EMU_VEC(T, N)                                                             \
  struct alignas(2 * sizeof(T)) N##2 { T x, y; };                                 \
  struct N##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) N##4 { T x, y, z, w; }; \
  static inline N##2 make_##N##2(T x, T y) { return {x, y}; }                     \
  static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VEC(float, float)
EMU_VEC(int, int) EMU_VEC(unsigned, uint) EMU_VEC(unsigned char, uchar) EMU_VEC(double, double) EMU_VEC(long long, longlong) static inline float3
    make_float3(float x, float y, float z) {
  return {x, y, z};
}
// ------------------------------------------------------------------ runtime interface (emu_core.cpp)
namespace emu {
struct Thread {
  uint3 tid;
  unsigned lin, lane, warp;
  void* rec;
};  // public head of the fiber record
struct Grid {
  uint3 bid;
  dim3 gdim, bdim;
  char* dyn;
  unsigned dynsz;
};
extern Thread* cur;
extern Grid g;
enum { RD = 0, WR = 1, AT = 2 };
typedef void (*CollFn)(unsigned mask, void** recs);
int block_barrier(int id, int count, int pred, int op);  // op 0 none 1 or 2 and 3 count
void warp_collective(unsigned mask, void* rec, CollFn fn, const char* what, bool fence);
void group_collective(int nthreads, void* rec, CollFn fn, const char* what);  // aligned group (warpgroup)
void access(const volatile void* p, unsigned n, int kind);                    // checker hook for emulated copies/atomics
void fence();
void bad_shfl(unsigned lane, unsigned src, unsigned mask);
void cp_async(void* s, const void* gp, unsigned n, unsigned src);
void cp_commit();
void cp_wait(int n);
struct Wgmma {  // one thread's part of a wgmma; n: columns of d; across: the matrix lies along m, or n, and not along k
  float* d;
  uint64_t a, b;
  int n;
  bool across_a, across_b;
  const void* pc;
};
void wgmma(Wgmma w);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n);
void proxy_fence();
uint32_t shared_address(const void* p);
struct alignas(64) TensorMap {  // a matrix of 16-bit values in global memory, pitch in bytes, and its boxes
  uint64_t address, pitch;
  uint32_t columns, rows, box_columns, box_rows;
  uint32_t unused[22];
};
void mbarrier_init(const void* p, int count);
void mbarrier_expect(const void* p, uint32_t bytes);
void mbarrier_wait(const void* p, int parity);
void load_box(void* to, const TensorMap& map, int column, int row, const void* p);
struct Kernel {
  void (*bind)(void**);
  void (*call)();
  const char* sig;
};  // sig: one letter per argument + size
template <class T>
struct ArgSig {
  static constexpr const char* c() {
    return std::is_pointer<T>::value        ? "P"
           : std::is_same<T, float>::value  ? "f"
           : std::is_same<T, double>::value ? "d"
           : std::is_same<T, bool>::value   ? "b"
           : std::is_integral<T>::value     ? (sizeof(T) == 8   ? "l"
                                               : sizeof(T) == 4 ? "i"
                                                                : "s")
                                            : "S";
  }
};
template <class T>
struct Elem {
  static const char* c() {  // pointee: P<letter><size>, * if const
    typedef typename std::remove_cv<T>::type U;
    static char b[8];
    snprintf(b, 8, "%s%c%d", std::is_const<T>::value ? "c" : "",
             std::is_floating_point<U>::value ? 'f'
             : std::is_integral<U>::value     ? 'i'
                                              : 'v',
             (int)sizeof(U));
    return b;
  }
};
template <>
struct Elem<void> {
  static const char* c() { return "v0"; }
};
template <class... A>
struct Bind {
  template <void (*F)(A...)>
  struct K {
    static std::tuple<A...>& t() {
      static std::tuple<A...> v;
      return v;
    }
    template <size_t... I>
    static void bind_(void** a, std::index_sequence<I...>) {
      ((memcpy(&std::get<I>(t()), a[I], sizeof(A))), ...);
    }
    static void bind(void** a) { bind_(a, std::index_sequence_for<A...>()); }
    static void call() { std::apply(F, t()); }
    template <class T>
    static void one(char*& o) {
      if (std::is_pointer<T>::value) o += sprintf(o, "P%s;", Elem<typename std::remove_pointer<T>::type>::c());
      else o += sprintf(o, "%s%d;", ArgSig<T>::c(), (int)sizeof(T));
    }
    static const char* sig() {
      static char b[1024];
      char* o = b;
      *o = 0;
      (one<A>(o), ...);
      return b;
    }
    static Kernel make() { return {bind, call, sig()}; }
  };
};
template <class... A>
Bind<A...> bind_of(void (*)(A...));
}  // namespace emu
#define EMU_EXPORT(sym, ...) \
  extern "C" __attribute__((visibility("default"))) emu::Kernel sym() { return decltype(emu::bind_of(&__VA_ARGS__))::template K<&__VA_ARGS__>::make(); }
// ------------------------------------------------------------------ built-ins
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::g.bid)
#define blockDim (emu::g.bdim)
#define gridDim (emu::g.gdim)
static constexpr int warpSize = 32;
static inline void __syncthreads() { emu::block_barrier(0, 0, 0, 0); }
static inline int __syncthreads_or(int p) { return emu::block_barrier(0, 0, p, 1); }
static inline int __syncthreads_and(int p) { return emu::block_barrier(0, 0, p, 2); }
static inline int __syncthreads_count(int p) { return emu::block_barrier(0, 0, p, 3); }
static inline void __threadfence() { emu::fence(); }
static inline void __threadfence_block() {}
static inline void __syncwarp(unsigned m = 0xffffffffu) { emu::warp_collective(m, nullptr, nullptr, "__syncwarp", true); }
namespace emu {
template <class T>
struct Shfl {
  T v;
  unsigned src;
};
template <class T>
static void shfl_fn(unsigned m, void** r) {  // gather first: records are in-out
  T out[32];
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) {
      unsigned s = ((Shfl<T>*)r[l])->src;
      if (!(m >> s & 1)) bad_shfl(l, s, m), s = l;
      out[l] = ((Shfl<T>*)r[s])->v;
    }
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) ((Shfl<T>*)r[l])->v = out[l];
}
template <class T>
static inline T shfl(unsigned m, T v, unsigned src) {
  Shfl<T> s{v, src};
  warp_collective(m, &s, shfl_fn<T>, "shfl", false);
  return s.v;
}
struct Vote {
  int p;
  unsigned r;
};
static inline void ballot_fn(unsigned m, void** r) {
  unsigned b = 0;
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1 && ((Vote*)r[l])->p) b |= 1u << l;
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) ((Vote*)r[l])->r = b;
}
template <class T>
static void redadd_fn(unsigned m, void** r) {
  T s = 0;
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) s += *(T*)r[l];
  for (int l = 0; l < 32; ++l)
    if (m >> l & 1) *(T*)r[l] = s;
}
}  // namespace emu
template <class T>
static inline T __shfl_sync(unsigned m, T v, int s, int w = 32) {
  unsigned l = emu::cur->lane;
  return emu::shfl(m, v, (l & ~(w - 1)) | (s & (w - 1)));
}
template <class T>
static inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  unsigned l = emu::cur->lane, s = l ^ x;
  return emu::shfl(m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? l : s);
}
template <class T>
static inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  unsigned l = emu::cur->lane;
  return emu::shfl(m, v, (l & (w - 1)) + d < (unsigned)w ? l + d : l);
}
template <class T>
static inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  unsigned l = emu::cur->lane;
  return emu::shfl(m, v, (l & (w - 1)) >= d ? l - d : l);
}
static inline unsigned __ballot_sync(unsigned m, int p) {
  emu::Vote v{p, 0};
  emu::warp_collective(m, &v, emu::ballot_fn, "vote", false);
  return v.r;
}
static inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
static inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
static inline int __reduce_add_sync(unsigned m, int v) {
  emu::warp_collective(m, &v, emu::redadd_fn<int>, "redux", false);
  return v;
}
// fibers never pre-empt each other, so a plain read-modify-write is atomic; access() tells the checker it is one
#define EMU_NI __attribute__((noinline, no_sanitize("thread")))
#define EMU_ATOMIC(NAME, EXPR)                                       \
  template <class T>                                                 \
  static EMU_NI T NAME(T* p, typename std::common_type<T>::type v) { \
    emu::access(p, sizeof(T), emu::AT);                              \
    T o = *p;                                                        \
    *p = (EXPR);                                                     \
    return o;                                                        \
  }
EMU_ATOMIC(atomicAdd, o + v)
EMU_ATOMIC(atomicSub, o - v) EMU_ATOMIC(atomicExch, v) EMU_ATOMIC(atomicMax, o > v ? o : v) EMU_ATOMIC(atomicMin, o < v ? o : v) EMU_ATOMIC(atomicAnd, o& v)
    EMU_ATOMIC(atomicOr, o | v) template <class T>
    static EMU_NI T atomicCAS(T* p, T c, T v) {
  emu::access(p, sizeof(T), emu::AT);
  T o = *p;
  if (o == c) *p = v;
  return o;
}
// ------------------------------------------------------------------ intrinsics
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcs(const T* p) {
  return *p;
}
template <class D, class S>
static inline D emu_bits(S s) {
  static_assert(sizeof(D) == sizeof(S), "");
  D d;
  memcpy(&d, &s, sizeof d);
  return d;
}
#define __float_as_uint emu_bits<unsigned, float>
#define __uint_as_float emu_bits<float, unsigned>
#define __float_as_int emu_bits<int, float>
#define __int_as_float emu_bits<float, int>
static inline float emu_powf(float x, float y) { return exp2f(y * log2f(x)); }  // what the hardware approximation computes
#define __expf expf                                                             // glibc already declares __expf & co. as internal names
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf emu_powf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned __int128)a * b >> 64; }
// g++ runs with -ffp-contract=off, so plain operators round each step
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
template <class A, class B>
static inline typename std::common_type<A, B>::type min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
static inline typename std::common_type<A, B>::type max(A a, B b) {
  return a < b ? b : a;
}
