// emu_core.cpp - scheduler (fibers), block/warp barriers, cp.async queue, wgmma (wgmma_emu.h), TMA (tma_emu.h), and the optional checker.
// The checker is the runtime behind g++ -fsanitize=thread: the compiler inserts __tsan_readN/__tsan_writeN calls in
// the kernel TU; we link our own definitions of them instead of libtsan, so no LD_PRELOAD and no real threads.
#include <sys/mman.h>
#include <link.h>
#include <cstdarg>
#include <cstdlib>
#include <vector>
#include <unordered_map>
#include "cuda_emu.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#define API extern "C" __attribute__((visibility("default")))
namespace emu {
enum { ORDER_UP = 0, ORDER_DOWN = 1, ORDER_RANDOM = 2, ORDER_LIFO = 3 };  // LIFO: one warp runs as far ahead as it can
struct Ctx {
  void* sp;
  char* lo;
  size_t size;
  void* fake;
};
struct Copy {
  char* d;
  const char* s;
  unsigned n, src, grp;
};
struct Acc {  // accumulators of wgmma; value: what they hold while `pending` of them are in flight
  float* d;
  int n, pending;
  std::vector<float> value;
};
struct Fib : Thread {
  Ctx* ctx;
  unsigned char state;
  signed char bar;
  unsigned wmask;
  const char* what;
  int grp_open;
  std::vector<Copy> cp;
  std::vector<Acc> acc;
  std::vector<uint32_t> proxy;  // the barrier epochs of its proxy fences
  bool fenced;                  // wgmma.fence, since its accumulators were free
  std::vector<uint32_t> boxes;  // phases of mbarriers that it has waited for, by their numbers
};
enum { READY, WAIT, DONE };
enum { AC_ISSUE = 3, AC_DONE = 4, VR = 5 };  // checker: cp.async issued/completed, volatile read
struct Bar {
  int n, acc[3], res[3];
  const void* pc;
};  // or, and, count
struct Warp {
  unsigned pending;
  uint32_t epoch;
};
struct Group {
  int n;
  void* rec[1024];
};
static struct Opt {
  int order = 0, async_eager = 0, check = 0;
  uint64_t seed = 1;
  size_t stack = 64 << 10;
} opt;
Thread* cur;
Grid g;
static Fib* fb;
static int nth, cap, alive;
static std::vector<int> ring;
static unsigned rh, rt, rmask;
static Bar bar[16];
static std::vector<Warp> warps;
static Group grp[8];
static std::vector<Ctx*> freectx;
static char* arena;
static size_t arena_sz, arena_used;
static Ctx host;
static Kernel K;
static char *img_lo, *img_hi, *tls_lo;
static size_t tls_n;  // this module: code+data range, static shared memory
static uint64_t rng;
static char errbuf[8192];
static int nerr;
static bool aborted;
static uint64_t nswitch;
static std::unordered_map<uint64_t, int> seen;  // one report per (kind, place) and launch
static inline uint64_t rnd() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return rng;
}
static Fib* me() { return (Fib*)cur; }
static void fail(const char* f, ...) {
  if (nerr++ >= 12) return;
  size_t l = strlen(errbuf);
  va_list a;
  va_start(a, f);
  l += vsnprintf(errbuf + l, sizeof errbuf - l, f, a);
  va_end(a);
  if (l < sizeof errbuf - 128)
    snprintf(errbuf + l, sizeof errbuf - l, " [block (%u,%u,%u) thread (%u,%u,%u)]\n", g.bid.x, g.bid.y, g.bid.z, cur->tid.x, cur->tid.y, cur->tid.z);
}
// ---------------------------------------------------------------- fibers
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
asm(".text\n.p2align 4\n.globl emu_switch\n.hidden emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size emu_switch,.-emu_switch\n");
extern "C" __attribute__((visibility("hidden"))) void emu_switch(void** save, void* to);
static void prepare(Ctx* c, void (*entry)(), size_t colour) {
  void** sp = (void**)(c->lo + c->size - 64 - colour);
  sp = (void**)((uintptr_t)sp & ~15ul);
  *--sp = nullptr;
  *--sp = (void*)entry;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  c->sp = sp;
}
#else
#include <ucontext.h>
static std::unordered_map<Ctx*, ucontext_t> uc;
static void prepare(Ctx* c, void (*entry)(), size_t) {
  auto& u = uc[c];
  getcontext(&u);
  u.uc_stack.ss_sp = c->lo;
  u.uc_stack.ss_size = c->size;
  u.uc_link = nullptr;
  makecontext(&u, entry, 0);
}
#endif
static void jump(Ctx* a, Ctx* b) {
  ++nswitch;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&a->fake, b->lo, b->size);
#endif
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
  emu_switch(&a->sp, b->sp);
#else
  swapcontext(&uc[a], &uc[b]);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(a->fake, nullptr, nullptr);
#endif
}
static Fib* pop() { return rh == rt ? nullptr : &fb[ring[rh++ & rmask]]; }
static void push(int i) {
  fb[i].state = READY;
  ring[rt++ & rmask] = i;
}
static void release(const int* v, int n) {  // make threads runnable, in the order under test (v is ascending)
  if (opt.order == ORDER_UP)
    for (int i = 0; i < n; ++i) push(v[i]);
  else if (opt.order == ORDER_DOWN)
    for (int i = n - 1; i >= 0; --i) push(v[i]);
  else if (opt.order == ORDER_LIFO)
    for (int i = 0; i < n; ++i) {
      fb[v[i]].state = READY;
      ring[--rh & rmask] = v[i];
    }
  else {
    int p[1024];
    memcpy(p, v, n * sizeof *v);
    for (int i = n - 1; i > 0; --i) std::swap(p[i], p[rnd() % (i + 1)]);
    for (int i = 0; i < n; ++i) push(p[i]);
  }
}
static void finish();
static void deadlock();
static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    K.call();
    finish();
    Ctx* c = me()->ctx;
    me()->ctx = nullptr;
    Fib* n = pop();
    if (n && !n->ctx) {
      n->ctx = c;
      cur = n;
      continue;
    }  // reuse this stack for the next thread: no switch at all
    freectx.push_back(c);
    if (n) cur = n;
    else if (alive) deadlock();
    jump(c, n ? n->ctx : &host);
  }
}
static size_t colour_of(size_t k) { return (k * 5 % 61) * 64; }  // stagger stacks so hot lines do not share a cache set
static Ctx* get_ctx() {
  if (!freectx.empty()) {
    Ctx* c = freectx.back();
    freectx.pop_back();
    return c;
  }
  if (!arena) {
    arena_sz = 1100 * (opt.stack + 4096);
    arena = (char*)mmap(nullptr, arena_sz, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  Ctx* c = new Ctx{nullptr, arena + arena_used + 4096, opt.stack, nullptr};
  mprotect(arena + arena_used, 4096, PROT_NONE);
  arena_used += opt.stack + 4096;
  prepare(c, fiber_main, colour_of(arena_used / opt.stack));
  return c;
}
static void deadlock() {
  int nb = 0, nw = 0;
  const char* w = "-";
  unsigned m = 0;
  for (int i = 0; i < nth; ++i)
    if (fb[i].state == WAIT) {
      if (fb[i].wmask) {
        ++nw;
        w = fb[i].what;
        m = fb[i].wmask;
      } else ++nb;
    }
  fail("DEADLOCK: %d threads wait at a block barrier, %d in a warp collective (%s, mask %08x), %d exited", nb, nw, w, m, nth - nb - nw);
  aborted = true;
}
static void block_me() {  // current thread waits; run somebody else
  Fib *n = pop(), *m = me();
  if (!n) {
    deadlock();
    jump(m->ctx, &host);
    __builtin_unreachable();
  }
  if (n == m) return;
  if (!n->ctx) n->ctx = get_ctx();
  cur = n;
  jump(m->ctx, n->ctx);
}
// ---------------------------------------------------------------- barriers and collectives
static uint32_t bepoch;  // block-barrier epoch, for the checker
static void bar_done(int id) {
  Bar& b = bar[id];
  memcpy(b.res, b.acc, sizeof b.res);
  b.n = 0;
  ++bepoch;
  int v[1024], n = 0;
  for (int i = 0; i < nth; ++i)
    if (fb[i].bar == id) {
      fb[i].bar = -1;
      v[n++] = i;
    }
  release(v, n);
}
int block_barrier(int id, int count, int pred, int op) {
  Bar& b = bar[id];
  Fib* f = me();
  const void* pc = (void*)((char*)__builtin_return_address(0) - img_lo);
  if (!count && alive != nth && !seen[(uint64_t)pc]++) fail("BARRIER DIVERGENCE at pc +%p: %d threads of the block have already exited", pc, nth - alive);
  if (b.n && b.pc != pc && !count && !seen[(uint64_t)pc + 1]++)
    fail("BARRIER DIVERGENCE: threads of one block wait at different barriers, pc +%p and pc +%p", b.pc, pc);
  b.pc = pc;
  if (b.n == 0) {
    b.acc[0] = 0;
    b.acc[1] = 1;
    b.acc[2] = 0;
  }
  ++b.n;
  b.acc[0] |= !!pred;
  b.acc[1] &= !!pred;
  b.acc[2] += !!pred;
  f->bar = id;
  f->state = WAIT;
  f->wmask = 0;
  f->what = nullptr;
  if (b.n == (count ? count : alive)) bar_done(id);
  block_me();
  return op ? bar[id].res[op - 1] : 0;
}
void warp_collective(unsigned mask, void* rec, CollFn fn, const char* what, bool fence) {
  Fib* f = me();
  Warp& w = warps[f->warp];
  int base = f->warp * 32;
  if (!(mask >> f->lane & 1)) {
    fail("%s: calling lane %u is not in mask %08x", what, f->lane, mask);
    return;
  }
  unsigned exist = nth - base >= 32 ? 0xffffffffu : (1u << (nth - base)) - 1;
  mask &= exist;
  f->rec = rec;
  f->what = what;
  f->wmask = mask;
  w.pending |= 1u << f->lane;
  if ((w.pending & mask) == mask) {
    void* r[32];
    for (unsigned m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      Fib& o = fb[base + l];
      r[l] = o.rec;
      if (o.wmask != mask || o.what != what)
        fail("WARP DIVERGENCE: lane %d is in %s mask %08x, lane %u in %s mask %08x", l, o.what, o.wmask, f->lane, what, mask);
    }
    if (fn) fn(mask, r);
    w.pending &= ~mask;
    if (fence) ++w.epoch;
    f->wmask = 0;
    int v[32], n = 0;
    for (unsigned m = mask; m; m &= m - 1) {
      int i = base + __builtin_ctz(m);
      fb[i].wmask = 0;
      if (i != (int)f->lin) v[n++] = i;
    }
    release(v, n);
  } else {
    f->state = WAIT;
    block_me();
  }
}
void group_collective(int n, void* rec, CollFn fn, const char* what) {
  Fib* f = me();
  int gi = f->lin / n;
  Group& G = grp[gi];
  G.rec[f->lin % n] = rec;
  f->what = what;
  if (++G.n == n) {
    fn(0, G.rec);
    G.n = 0;
    int v[1024], k = 0;
    for (int i = gi * n; i < gi * n + n; ++i)
      if (i != (int)f->lin) v[k++] = i;
    release(v, k);
  } else {
    f->state = WAIT;
    f->wmask = ~0u;
    block_me();
  }
}
static void products_exit(Fib* f);
static void boxes_end();
static void finish() {
  Fib* f = me();
  products_exit(f);
  f->state = DONE;
  if (!--alive) boxes_end();
  f->cp.clear();
  if (bar[0].n && bar[0].n == alive) {
    fail("BARRIER DIVERGENCE: thread exits while the %d others wait at the barrier at pc +%p", alive, bar[0].pc);
    bar_done(0);
  }
}
// ---------------------------------------------------------------- cp.async: as late (default) or as early as allowed
static void do_copy(const Copy& c) {
  access(c.d, c.n, AC_DONE);
  if (c.src) access(c.s, c.src, RD);
  memcpy(c.d, c.s, c.src);
  memset(c.d + c.src, 0, c.n - c.src);
}
void cp_async(void* s, const void* p, unsigned n, unsigned src) {
  if (((uintptr_t)s | (uintptr_t)p) & (n - 1)) fail("cp.async: address not %u-byte aligned", n);
  Copy c{(char*)s, (const char*)p, n, src, (unsigned)me()->grp_open};
  if (opt.async_eager) do_copy(c);
  else {
    access(s, n, AC_ISSUE);
    me()->cp.push_back(c);
  }
}
void cp_commit() { me()->grp_open++; }
void cp_wait(int n) {
  Fib* f = me();
  size_t i = 0;
  while (i < f->cp.size() && (int)f->cp[i].grp < f->grp_open - n) do_copy(f->cp[i++]);
  f->cp.erase(f->cp.begin(), f->cp.begin() + i);
}
// ---------------------------------------------------------------- checker: bounds, uninitialised shared, races
// Shadow memory has a cell for every 2 bytes, so that neighbouring bfloat16 values are kept apart; a mask tells a cell's bytes apart.
static constexpr uintptr_t CELL = 2;
static constexpr uint8_t ALL = 3;
struct Cell {
  uint32_t wblk, wep, wwep, rblk, rep, rwep;
  uint16_t wtid, rtid;
  uint8_t wmask, rmask, wat, rmulti;
  uint16_t reading;  // by how many warps' wgmma, in flight
  uint32_t wfences;  // proxy fences of the writer before
  uint32_t box;      // written by TMA: the number of its phase, ~0 while in flight
  const void *wpc, *rpc;
};
struct Region {
  char* lo;
  size_t n;
  int kind;
  std::vector<Cell> sh;
  const char* name;
};  // kind 0 global 1 shared
static std::vector<Region> regs;
static uint32_t blk;
// between blocks: __threadfence + atomic publishes what the block did so far; a later atomic by another block acquires it
struct Pub {
  uint32_t t, ep, acq;
};
static std::vector<Pub> pub;
static uint32_t clk;
static bool fenced;
static bool across(uint32_t b, uint32_t ep) { return pub[b].t && pub[b].t < pub[blk].acq && ep <= pub[b].ep; }
void fence() { fenced = true; }
void bad_shfl(unsigned l, unsigned s, unsigned m) {
  if (!seen[1]++) fail("SHUFFLE: lane %u reads lane %u, which is not in mask %08x", l, s, m);
}
static void report(const char* kind, Region& r, const char* p, unsigned n, const void* pc, const void* pc2, unsigned other) {
  if (seen[(uint64_t)pc * 31 + (uint64_t)pc2 * 7 + (unsigned char)kind[0]]++) return;
  fail("%s: %u bytes at %s+%ld, pc +0x%lx%s%s0x%lx other thread %u", kind, n, r.name, (long)(p - r.lo), (long)((char*)pc - img_lo), pc2 ? " vs pc " : "",
       pc2 ? "+" : " ", pc2 ? (long)((char*)pc2 - img_lo) : 0l, other);
}
static bool seen_box(const Fib* f, uint32_t number);
static void touch(Region& r, const char* p, unsigned n, int kind, const void* pc) {
  Fib* f = me();
  uint16_t t = f->lin;
  uint32_t we = warps[f->warp].epoch;
  bool sh = r.kind == 1, rd = kind == RD || kind == VR;
  for (const char* q = (const char*)((uintptr_t)p & ~(CELL - 1)); q < p + n; q += CELL) {
    Cell& c = r.sh[(q - (char*)((uintptr_t)r.lo & ~(CELL - 1))) / CELL];
    uint8_t m = ALL;
    if (q < p) m &= ALL << (p - q);
    if (q + CELL > p + n) m &= ALL >> (q + CELL - (p + n));
    if (sh && c.wblk && c.wblk != blk) c.wblk = 0;
    if (sh && c.rblk && c.rblk != blk) {
      c.rblk = 0;
      c.rmulti = 0;
    }
    if (sh && c.wblk && (c.wmask & m) && c.wat == AC_ISSUE && kind != AC_DONE) report(c.box ? "ACCESS TO A BOX IN FLIGHT" : "ACCESS TO IN-FLIGHT cp.async", r, p, n, pc, c.wpc, c.wtid);
    if (c.reading && !rd) report("WRITE TO WHAT A wgmma IN FLIGHT READS", r, p, n, pc, nullptr, 0);
    if (sh && rd && !c.wblk) report("UNINITIALISED SHARED READ", r, p, n, pc, nullptr, 0);
    if (c.wblk && (c.wmask & m) && !((kind == AT || kind == VR) && c.wat == AT) && !(kind == AC_DONE && c.wtid == t)) {  // against the last write
      bool ordered = c.wblk == blk ? c.wtid == t || c.wep < bepoch || (c.box && seen_box(f, c.box)) || (c.wtid / 32 == t / 32 && c.wwep < we) : across(c.wblk, c.wep);
      if (!ordered) report(rd ? "RACE read-after-write" : "RACE write-after-write", r, p, n, pc, c.wpc, c.wtid);
    }
    if (!rd && c.rblk && (c.rmask & m)) {  // against earlier reads
      bool ordered = c.rmulti < 4 && (c.rblk == blk ? c.rep < bepoch || (c.rmulti == 0 && c.rtid == t) || (c.rmulti < 2 && c.rtid / 32 == t / 32 && c.rwep < we)
                                                    : across(c.rblk, c.rep));
      if (!ordered) report("RACE write-after-read", r, p, n, pc, c.rpc, c.rtid);
    }
    if (kind == VR) continue;
    if (rd) {
      if (c.rblk && c.rblk != blk) c.rmulti = 4;
      else if (c.rblk && c.rep == bepoch && c.rtid != t) c.rmulti |= c.rtid / 32 == t / 32 ? 1 : 2;
      else if (c.rmulti < 4) c.rmulti = 0;
      if (c.rep != bepoch || c.rblk != blk) c.rmask = 0;
      c.rblk = blk;
      c.rep = bepoch;
      c.rwep = we;
      c.rtid = t;
      c.rmask |= m;
      c.rpc = pc;
    } else {
      if (c.wblk != blk || c.wep != bepoch || c.wtid != t) c.wmask = 0;
      c.wblk = blk;
      c.wep = bepoch;
      c.wwep = we;
      c.wtid = t;
      c.wmask |= m;
      c.wat = kind == WR ? 0 : kind;
      c.wfences = f->proxy.size();
      c.box = 0;
      c.wpc = pc;
    }
  }
}
static Region* last;
static void touch_accumulators(Fib* f, const char* p, unsigned n, const void* pc);
static inline void chk(const volatile void* vp, unsigned n, int kind, const void* pc) {
  const char* p = (const char*)vp;
  if (!opt.check || !cur) return;
  if ((size_t)(p - arena) < arena_sz || (size_t)(p - (char*)fb) < nth * sizeof(Fib)) {  // fiber stacks and records: private
    if (!me()->acc.empty()) touch_accumulators(me(), p, n, pc);
    return;
  }
  if (last && (size_t)(p - last->lo) + n <= last->n && p >= last->lo) return touch(*last, p, n, kind, pc);
  for (auto& r : regs)
    if (p >= r.lo && p + n <= r.lo + r.n) {
      last = &r;
      return touch(r, p, n, kind, pc);
    }
  if (p >= img_lo && p < img_hi) return;  // constants, emulator state
  Region z{(char*)p, 0, 0, {}, "?"};
  Region* best = nullptr;
  long bd = 1 << 20;
  for (auto& r : regs) {
    long d = p < r.lo ? r.lo - p : p - (r.lo + (long)r.n) + 1;
    if (d < bd) {
      bd = d;
      best = &r;
    }
  }
  report(kind == RD || kind == VR ? "OUT-OF-BOUNDS read" : "OUT-OF-BOUNDS write", best ? *best : z, p, n, pc, nullptr, 0);
  aborted = true;
  jump(me()->ctx, &host);  // stop before the access happens
}
void access(const volatile void* p, unsigned n, int kind) {
  if (kind == AT && opt.check && cur) {
    if (fenced) pub[blk].t = ++clk, pub[blk].ep = bepoch;
    pub[blk].acq = ++clk;
  }
  chk(p, n, kind, __builtin_return_address(0));
}
#define RA __builtin_return_address(0)
#define TSAN(N)                                                      \
  API void __tsan_read##N(void* p) { chk(p, N, RD, RA); }            \
  API void __tsan_write##N(void* p) { chk(p, N, WR, RA); }           \
  API void __tsan_unaligned_read##N(void* p) { chk(p, N, RD, RA); }  \
  API void __tsan_unaligned_write##N(void* p) { chk(p, N, WR, RA); } \
  API void __tsan_volatile_read##N(void* p) { chk(p, N, VR, RA); }   \
  API void __tsan_volatile_write##N(void* p) { chk(p, N, AT, RA); }
}  // namespace emu
#include "wgmma_emu.h"
#include "tma_emu.h"
using namespace emu;
TSAN(1) TSAN(2) TSAN(4) TSAN(8) TSAN(16) API void __tsan_read_range(void* p, unsigned long n) { chk(p, n, RD, RA); }
API void __tsan_write_range(void* p, unsigned long n) { chk(p, n, WR, RA); }
API void __tsan_func_entry(void*) {}
API void __tsan_func_exit() {}
API void __tsan_init() {}
API void __tsan_vptr_update(void**, void*) {}
// the same trick for g++ -fsanitize=bounds-strict,alignment,...: our own handlers instead of libubsan
struct UbLoc {
  const char* file;
  uint32_t line, col;
};
static void ub(const UbLoc* l, const char* what, unsigned long v) {
  if (cur && opt.check && !seen[l->line * 131ull + (uint64_t)what]++) fail("%s (value %ld) at %s:%u", what, (long)v, l->file, l->line);
}
#define UB(N, W)                                                            \
  API void __ubsan_handle_##N(UbLoc* l, unsigned long a, unsigned long b) { \
    ub(l, W, b);                                                            \
    (void)a;                                                                \
  }
API void __ubsan_handle_out_of_bounds(UbLoc* l, unsigned long i) { ub(l, "ARRAY INDEX OUT OF BOUNDS", i); }
API void __ubsan_handle_type_mismatch_v1(UbLoc* l, unsigned long p) { ub(l, "MISALIGNED ACCESS", p); }
UB(shift_out_of_bounds, "SHIFT out of range")
UB(divrem_overflow, "DIVISION by zero/overflow") UB(add_overflow, "INTEGER OVERFLOW") UB(sub_overflow, "INTEGER OVERFLOW")
    UB(mul_overflow, "INTEGER OVERFLOW") API void __ubsan_handle_negate_overflow(UbLoc* l, unsigned long a) {
  ub(l, "INTEGER OVERFLOW", a);
}
// ---------------------------------------------------------------- C interface for Python
API void emu_config(int order, uint64_t seed, int async_eager, int check) {
  opt.order = order;
  opt.seed = seed;
  opt.async_eager = async_eager;
  opt.check = check;
}
API const char* emu_errors() { return errbuf; }
API uint64_t emu_switches() { return nswitch; }
static int phdr_cb(dl_phdr_info* i, size_t, void*) {
  for (int k = 0; k < i->dlpi_phnum; ++k) {
    auto& p = i->dlpi_phdr[k];
    char* lo = (char*)i->dlpi_addr + p.p_vaddr;
    if (p.p_type == PT_LOAD && (char*)&phdr_cb >= lo && (char*)&phdr_cb < lo + p.p_memsz) {
      img_lo = (char*)i->dlpi_addr;
      img_hi = img_lo;
      tls_n = 0;
      for (int j = 0; j < i->dlpi_phnum; ++j) {
        auto& q = i->dlpi_phdr[j];
        if (q.p_type == PT_LOAD) {
          char* e = (char*)i->dlpi_addr + q.p_vaddr + q.p_memsz;
          if (e > img_hi) img_hi = e;
        }
        if (q.p_type == PT_TLS) {
          tls_lo = (char*)i->dlpi_tls_data;
          tls_n = tls_lo ? q.p_memsz : 0;
        }
      }
      return 1;
    }
  }
  return 0;
}
// bufs: nb pairs (address, bytes) of global arrays the kernel may touch (only used by the checker)
API int emu_launch(Kernel (*getk)(), const unsigned* grid, const unsigned* block, unsigned dyn, void** args, int nb, const uint64_t* bufs) {
  K = getk();
  K.bind(args);
  nth = block[0] * block[1] * block[2];
  errbuf[0] = 0;
  nerr = 0;
  aborted = false;
  seen.clear();
  rng = opt.seed * 0x9E3779B97F4A7C15ull + 1;
  last = nullptr;
  Fib fz{};
  cur = &fz;
  if (nth < 1 || nth > 1024) {
    fail("block of %d threads", nth);
    cur = nullptr;
    return 1;
  }
  if (dyn > 227 * 1024) {
    fail("%u bytes of dynamic shared memory", dyn);
    cur = nullptr;
    return 1;
  }
  static std::vector<Fib> store;
  products.clear();
  if ((int)store.size() < nth) store.resize(nth);
  fb = store.data();
  unsigned need = 1;
  while (need < (unsigned)nth) need *= 2;
  if (ring.size() < need) ring.resize(need);
  rmask = ring.size() - 1;
  g.gdim = dim3(grid[0], grid[1], grid[2]);
  g.bdim = dim3(block[0], block[1], block[2]);
  g.dynsz = dyn;
  g.dyn = dyn ? (char*)aligned_alloc(1024, (dyn + 1023) / 1024 * 1024) : nullptr;
#ifdef __SANITIZE_ADDRESS__
  free(g.dyn);
  g.dyn = nullptr;
  if (dyn && posix_memalign((void**)&g.dyn, 16, dyn)) return 1;  // exact size: heap redzone right behind it
#endif
  static thread_local volatile char anchor;
  anchor = 1;  // makes ld.so allocate this module's TLS block
  dl_iterate_phdr(phdr_cb, nullptr);
  regs.clear();
  if (opt.check) {
    for (int i = 0; i < nb; ++i) {
      static const char* nm[] = {"arg0", "arg1", "arg2",  "arg3",  "arg4",  "arg5",  "arg6",  "arg7",
                                 "arg8", "arg9", "arg10", "arg11", "arg12", "arg13", "arg14", "arg15"};
      if (bufs[2 * i + 1]) regs.push_back(Region{(char*)bufs[2 * i], bufs[2 * i + 1], 0, {}, nm[i & 15]});
    }
    if (dyn) regs.push_back(Region{g.dyn, dyn, 1, {}, "dynamic shared"});
    if (tls_n) regs.push_back(Region{tls_lo, tls_n, 1, {}, "static shared"});
    for (auto& r : regs) r.sh.resize(r.n / CELL + 2);
    pub.assign((size_t)grid[0] * grid[1] * grid[2] + 1, Pub{});
    clk = 0;
  }
  std::vector<int> all(nth);
  std::vector<unsigned> border;
  uint64_t nblk = (uint64_t)grid[0] * grid[1] * grid[2];
  blk = 0;
  for (uint64_t bi = 0; bi < nblk && !aborted; ++bi) {
    uint64_t b = opt.order == ORDER_DOWN ? nblk - 1 - bi : bi;
    if (opt.order == ORDER_RANDOM) {
      if (border.empty()) {
        border.resize(nblk);
        for (uint64_t i = 0; i < nblk; ++i) border[i] = i;
        for (uint64_t i = nblk - 1; i > 0; --i) std::swap(border[i], border[rnd() % (i + 1)]);
      }
      b = border[bi];
    }
    g.bid = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / ((uint64_t)grid[0] * grid[1]))};
    blk = (uint32_t)b + 1;
    fenced = false;
    if (dyn) memset(g.dyn, 0xff, dyn);
    if (tls_n) memset(tls_lo, 0xff, tls_n);  // poison: NaN / -1
    warps.assign((nth + 31) / 32, Warp{0, 1});
    products_begin();
    boxes_begin();
    bepoch = 1;
    rh = rt = 0;
    alive = nth;
    for (auto& x : bar) x.n = 0;
    for (auto& x : grp) x.n = 0;
    for (int i = 0; i < nth; ++i) {
      Fib& f = fb[i];
      f.lin = i;
      f.lane = i & 31;
      f.warp = i >> 5;
      f.ctx = nullptr;
      f.what = nullptr;
      f.bar = -1;
      f.wmask = 0;
      f.grp_open = 0;
      f.cp.clear();
      f.tid = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
      all[i] = i;
    }
    release(all.data(), nth);
    Fib* f = pop();
    f->ctx = get_ctx();
    cur = f;
    jump(&host, f->ctx);
  }
  if (aborted) {
    for (Ctx* c : freectx) delete c;
    freectx.clear();
    if (arena) munmap(arena, arena_sz);
    arena = nullptr;
    arena_used = 0;
  }
  cur = nullptr;
  free(g.dyn);
  g.dyn = nullptr;
  return nerr;
}
