// tma_emu.h - part of emu_core.cpp: mbarriers, and boxes of a matrix that TMA loads, as late as the PTX manual allows.
//
// A box is copied when a thread first waits for the phase of its mbarrier, if all arrivals are in and as many bytes as were expected; until then
// its place holds NaN. The check mode names accesses to it meanwhile, and reads by threads that neither waited themselves nor passed a
// block's barrier after one that did.
namespace emu {
struct Box {
  char* to;
  TensorMap map;
  int column, row;
};
struct Mbarrier {
  int count, arrived;
  int64_t expected, issued;  // bytes of this phase
  uint32_t phase, last;      // phases completed; the number of the last one among all mbarriers'
  uint32_t epoch, thread, fences;  // of its initialisation
  std::vector<Box> boxes;
  std::vector<int> waiters;
};
static std::unordered_map<const void*, Mbarrier> mbarriers;
static uint32_t completions;

static Mbarrier* mbarrier_at(const void* p, const void* pc) {
  auto found = mbarriers.find(p);
  if (found == mbarriers.end()) {
    told(pc, "mbarrier WITHOUT mbarrier.init");
    return nullptr;
  }
  Mbarrier& b = found->second;
  if (b.thread != me()->lin && b.epoch == bepoch) told(pc, "RACE with mbarrier.init");
  return &b;
}
static bool ready(const Mbarrier& b) { return b.arrived == b.count && b.issued == b.expected; }
static void wake(Mbarrier& b) {
  if (!ready(b) || b.waiters.empty()) return;
  std::vector<int> waiters;
  waiters.swap(b.waiters);
  release(waiters.data(), (int)waiters.size());
}
// Where a box keeps byte `at` of it: rows of 128 bytes, 128-byte swizzle.
static char* place(const Box& b, uint32_t at) {
  uint32_t a = shared_address(b.to) + at;
  return g.dyn + ((a ^ (a >> 7 & 7) << 4) - BASE);
}
static void copy_box(const Box& b, uint32_t number) {
  const TensorMap& m = b.map;
  for (uint32_t r = 0; r < m.box_rows; ++r)
    for (uint32_t c = 0; c < m.box_columns; ++c) {
      int64_t row = (int64_t)b.row + r, column = (int64_t)b.column + c;
      char* to = place(b, r * 128 + c * 2);
      bool inside = row >= 0 && row < m.rows && column >= 0 && column < m.columns;
      const char* from = (const char*)m.address + row * m.pitch + column * 2;
      if (inside) access(from, 2, RD);
      uint16_t value = 0;
      if (inside) memcpy(&value, from, 2);
      memcpy(to, &value, 2);
      if (!opt.check) continue;
      Cell& cell = *cell_of((uint32_t)(to - g.dyn));
      cell.wat = 0;
      cell.wtid = me()->lin;
      cell.wep = bepoch;
      cell.wwep = warps[me()->warp].epoch;
      cell.box = number;
    }
}
void mbarrier_init(const void* p, int count) {
  if ((uintptr_t)p % 8) told(__builtin_return_address(0), "mbarrier: MISALIGNED, 8 bytes are needed");
  mbarriers[p] = Mbarrier{count, 0, 0, 0, 0, 0, bepoch, me()->lin, (uint32_t)me()->proxy.size(), {}, {}};
}
void mbarrier_expect(const void* p, uint32_t bytes) {
  Mbarrier* b = mbarrier_at(p, __builtin_return_address(0));
  if (!b) return;
  ++b->arrived;
  b->expected += bytes;
  wake(*b);
}
void mbarrier_wait(const void* p, int parity) {
  const void* pc = __builtin_return_address(0);
  Mbarrier* b = mbarrier_at(p, pc);
  if (!b) return;
  while ((int)(b->phase & 1) == parity) {
    if (ready(*b)) {
      ++completions;
      for (auto& box : b->boxes) copy_box(box, completions);
      b->boxes.clear();
      b->arrived = 0;
      b->expected = b->issued = 0;
      b->last = completions;
      ++b->phase;
      continue;
    }
    Fib* f = me();
    b->waiters.push_back(f->lin);
    f->state = WAIT;
    f->wmask = ~0u;
    f->what = "mbarrier.try_wait";
    block_me();
    f->wmask = 0;
  }
  me()->boxes.push_back(b->last);
}
void load_box(void* to, const TensorMap& map, int column, int row, const void* p) {
  const void* pc = __builtin_return_address(0);
  Mbarrier* b = mbarrier_at(p, pc);
  if (!b) return;
  uint32_t bytes = map.box_rows * 128, at = shared_address(to) - BASE;
  if (map.box_columns != 64 || map.box_rows > 256) return told(pc, "TMA: the emulator knows boxes of 128 bytes by 256 rows at the most");
  if ((uintptr_t)map.address % 16 || map.pitch % 16) return told(pc, "TMA: MISALIGNED matrix, 16 bytes are needed");
  if (shared_address(to) % ATOM) return told(pc, "TMA: MISALIGNED box, 1024 bytes are needed");
  if (at + bytes > g.dynsz) return told(pc, "TMA: A BOX OUTSIDE DYNAMIC SHARED MEMORY");
  if (fb[b->thread].proxy.size() <= b->fences) told(pc, "mbarrier INITIALISED WITHOUT fence.proxy.async");
  Box box{(char*)to, map, column, row};
  if (opt.check) {
    chk(to, bytes, AC_ISSUE, pc);
    for (uint32_t i = 0; i < bytes; i += CELL) cell_of(at + i)->box = ~0u;
  }
  memset(to, 0xff, bytes);
  b->issued += bytes;
  b->boxes.push_back(box);
  wake(*b);
}
static bool seen_box(const Fib* f, uint32_t number) {
  for (uint32_t box : f->boxes)
    if (box == number) return true;
  return false;
}
static void boxes_end() {  // of a block
  for (auto& b : mbarriers)
    if (!b.second.boxes.empty() && !seen[(uint64_t)&mbarriers]++) fail("A BLOCK EXITS while boxes are in flight");
}
static void boxes_begin() {
  mbarriers.clear();
  for (int i = 0; i < nth; ++i) fb[i].boxes.clear();
}
}  // namespace emu
