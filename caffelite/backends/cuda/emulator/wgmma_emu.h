// wgmma_emu.h - part of emu_core.cpp: warpgroups' asynchronous products and the async proxy, as late as the PTX manual allows.
//
// A wgmma only starts: each warp's 16 rows are computed when that warp waits for their group, from what shared memory holds then, read through
// the two descriptors. Until then the accumulators are NaN, so that a wait that is missing, and a slot that is overwritten too early, give
// wrong results in every mode. The check mode also names reads of what was written without a proxy fence in between, writes to what is
// being read, and accumulators touched in flight.
// Shared addresses count from BASE, where the hardware lets a block's memory begin; permutations follow from them.
namespace emu {
static constexpr uint32_t BASE = 1024, ATOM = 1024;
struct Operand {  // a matrix descriptor; across: along m or n, not k
  uint32_t start, leading, stride, base, mode;
  bool across;
  Operand(uint64_t d, bool across_)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4), base(d >> 49 & 7), mode(d >> 62), across(across_) {}
  // The offset of an element from the beginning of dynamic shared memory. 128-byte swizzle: address bits 4-6 are changed by bits 7-9.
  uint32_t at(int row, int k) const {
    uint32_t a = across ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2 : start + row / 8 * stride + row % 8 * 128 + k * 2;
    return (a ^ (a >> 7 & 7) << 4) - BASE;
  }
};
struct Started {  // a wgmma of one warp
  Operand a, b;
  int n, group;
  float* d[32];
};
struct WarpProducts {
  std::vector<Started> open;
  int groups = 0;  // closed by a commit
};
static std::vector<WarpProducts> products;

static bool held(uint32_t at) { return g.dynsz >= 2 && at <= g.dynsz - 2; }
uint32_t shared_address(const void* p) { return (uint32_t)((const char*)p - g.dyn) + BASE; }
static void told(const void* pc, const char* what) {
  if (!seen[(uint64_t)pc * 31 + (uint64_t)what]++) fail("%s, pc +0x%lx", what, (long)((char*)pc - img_lo));
}
// ---------------------------------------------------------------- checks
static void touch_accumulators(Fib* f, const char* p, unsigned n, const void* pc) {
  for (auto& a : f->acc)
    if (a.pending && p < (char*)(a.d + a.n) && p + n > (char*)a.d) told(pc, "ACCUMULATORS OF A wgmma TOUCHED BEFORE wgmma.wait_group");
}
static Cell* cell_of(uint32_t at) {
  for (auto& r : regs)
    if (r.lo == g.dyn && r.kind == 1) return &r.sh[at / CELL];
  return nullptr;
}
// An element that a wgmma reads. Written by the generic proxy, it is seen if its writer fenced before a barrier, or the reader after one.
static void check_read(uint32_t at, const void* pc) {
  chk(g.dyn + at, 2, RD, pc);
  const Cell& c = *cell_of(at);
  if (!c.wblk) return;  // told as an uninitialised read
  if (c.box) {  // by the async proxy itself; each warp must have waited
    for (unsigned warp = me()->warp / 4 * 4, end = warp + 4; warp < end; ++warp)
      if (c.wep == bepoch && !seen_box(&fb[warp * 32], c.box)) told(pc, "wgmma READS A BOX THAT A WARP HAS NOT WAITED FOR");
    return;
  }
  Fib &writer = fb[c.wtid], &reader = *me();
  bool by_writer = c.wfences < writer.proxy.size() && (writer.proxy[c.wfences] < bepoch || &writer == &reader);
  bool by_reader = !reader.proxy.empty() && reader.proxy.back() > c.wep;
  if (!by_writer && !by_reader) told(pc, "wgmma READS WHAT WAS WRITTEN WITHOUT fence.proxy.async");
}
static void check_operand(const Operand& o, const void* pc) {
  if (o.mode != 1) told(pc, "wgmma: the emulator knows the 128-byte swizzle alone");
  if (o.base || (o.start & (ATOM - 128)) || o.stride % ATOM || (o.across && (o.leading % ATOM || o.start % ATOM)))
    told(pc, "wgmma: MISALIGNED swizzle atom, 1024 bytes are needed");
  if (!o.across && o.start % 128 > 96) told(pc, "wgmma: 16 columns end beyond their row of 128 bytes");
}
template <class F>
static void each_element(const Operand& o, int first, int rows, F visit) {
  for (int r = first; r < first + rows; ++r)
    for (int k = 0; k < 16; ++k) visit(r - first, k, o.at(r, k));
}
// Counts what a warp's product reads while it is in flight: by = 1, and -1 when it is done.
static void mark(const Started& s, int warp, int by) {
  if (!opt.check) return;
  auto count = [&](int, int, uint32_t at) {
    if (held(at)) cell_of(at)->reading += by;
  };
  each_element(s.a, warp % 4 * 16, 16, count);
  each_element(s.b, 0, s.n, count);
}
// ---------------------------------------------------------------- starting
static Acc& accumulator(Fib& f, float* d, int n) {
  for (auto& a : f.acc)
    if (a.d == d && a.n == n) return a;
  f.acc.push_back(Acc{d, n, 0, std::vector<float>(n)});
  return f.acc.back();
}
static void start_fn(unsigned, void** r) {
  Wgmma& w = *(Wgmma*)r[0];
  Operand a(w.a, w.across_a), b(w.b, w.across_b);
  int first = me()->lin / 128 * 128;
  check_operand(a, w.pc);
  check_operand(b, w.pc);
  for (int i = 0; i < 128; ++i) {
    Wgmma& o = *(Wgmma*)r[i];
    if (o.a != w.a || o.b != w.b || o.n != w.n || o.across_a != w.across_a || o.across_b != w.across_b) told(w.pc, "WARPS OF A WARPGROUP DISAGREE about a wgmma");
    Fib& f = fb[first + i];
    Acc& acc = accumulator(f, o.d, w.n / 2);
    if (!acc.pending++) {
      if (!f.fenced) told(w.pc, "wgmma WITHOUT wgmma.fence after its accumulators may have been touched");
      memcpy(acc.value.data(), o.d, acc.n * sizeof(float));
      std::fill(o.d, o.d + acc.n, NAN);
    }
  }
  auto inside = [&](int, int, uint32_t at) {
    if (!held(at)) told(w.pc, "wgmma READS OUTSIDE DYNAMIC SHARED MEMORY");
    else if (opt.check) check_read(at, w.pc);
  };
  each_element(a, 0, 64, inside);
  each_element(b, 0, w.n, inside);
  for (int warp = first / 32; warp < first / 32 + 4; ++warp) {
    Started s{a, b, w.n, products[warp].groups, {}};
    for (int lane = 0; lane < 32; ++lane) s.d[lane] = ((Wgmma*)r[warp * 32 + lane - first])->d;
    mark(s, warp, 1);
    products[warp].open.push_back(s);
  }
}
void wgmma(Wgmma w) {
  w.pc = __builtin_return_address(0);
  if (nth % 128) return told(w.pc, "wgmma: a block without whole warpgroups");
  group_collective(128, &w, start_fn, "wgmma");
}
// ---------------------------------------------------------------- finishing
static float element(uint32_t at) {
  uint16_t bits = 0;
  if (held(at)) memcpy(&bits, g.dyn + at, 2);
  return emu_bits<float, unsigned>((unsigned)bits << 16);
}
// d += a b for a warp's rows; the manual's layout: register 4j + 2h + e of a lane is row lane/4 + 8h, column 8j + 2 (lane%4) + e.
static void complete(const Started& s, int warp) {
  float A[16][16], B[16][256], D[16][256];
  each_element(s.a, warp % 4 * 16, 16, [&](int r, int k, uint32_t at) { A[r][k] = element(at); });
  each_element(s.b, 0, s.n, [&](int r, int k, uint32_t at) { B[k][r] = element(at); });
  auto registers = [&](auto visit) {
    for (int lane = 0; lane < 32; ++lane) {
      Acc& acc = accumulator(fb[warp * 32 + lane], s.d[lane], s.n / 2);
      for (int i = 0; i < acc.n; ++i) visit(acc.value[i], D[lane / 4 + 8 * (i / 2 % 2)][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    }
  };
  registers([](float& value, float& d) { d = value; });
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < s.n; ++j) D[i][j] += A[i][k] * B[k][j];
  registers([](float& value, float& d) { value = d; });
  for (int lane = 0; lane < 32; ++lane) {
    Fib& f = fb[warp * 32 + lane];
    Acc& acc = accumulator(f, s.d[lane], s.n / 2);
    if (--acc.pending) continue;
    memcpy(acc.d, acc.value.data(), acc.n * sizeof(float));
    f.fenced = false;
  }
  mark(s, warp, -1);
}
static void wait_fn(unsigned, void** r) {
  int warp = me()->warp;
  auto& p = products[warp];
  size_t done = 0;
  while (done < p.open.size() && p.open[done].group < p.groups - *(int*)r[0]) complete(p.open[done++], warp);
  p.open.erase(p.open.begin(), p.open.begin() + done);
}
static void commit_fn(unsigned, void**) { ++products[me()->warp].groups; }
void wgmma_wait(int n) { warp_collective(0xffffffffu, &n, wait_fn, "wgmma.wait_group", false); }
void wgmma_commit() { warp_collective(0xffffffffu, nullptr, commit_fn, "wgmma.commit_group", false); }
void wgmma_fence() {
  warp_collective(0xffffffffu, nullptr, nullptr, "wgmma.fence", false);
  me()->fenced = true;
}
void proxy_fence() { me()->proxy.push_back(bepoch); }
static void products_exit(Fib* f) {
  for (auto& a : f->acc)
    if (a.pending && !seen[(uint64_t)&products]++) fail("A THREAD EXITS while a wgmma of its is in flight");
  f->acc.clear();
}
static void products_begin() {  // of a block
  for (size_t warp = 0; warp < products.size(); ++warp)
    for (auto& s : products[warp].open) mark(s, warp, -1);
  products.assign((nth + 31) / 32, WarpProducts{});
  for (int i = 0; i < nth; ++i) {
    fb[i].acc.clear();
    fb[i].proxy.clear();
    fb[i].fenced = false;
  }
}
}  // namespace emu
