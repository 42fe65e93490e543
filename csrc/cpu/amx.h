// The tiles of AMX: 16 rows of 64 bytes each, products of bf16 and of bytes. FASTBERT_EMULATE_AMX computes the same in
// plain C++, so that every test of the engine runs over it on a CPU without tiles.
#pragma once
#include "cpu/vec.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) || defined(FASTBERT_EMULATE_AMX)
#define FASTBERT_AMX

namespace fastbert::FASTBERT_ISA {
namespace {

constexpr int64_t kTileBytes = 64;  // of a row
constexpr int kTileHeight = 16;

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

// What lies at p is read where the compiler does not see it: `_tile_loadd` does not say that it reads memory.
INLINE void escape(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

#if defined(FASTBERT_EMULATE_AMX)
struct EmulatedTiles {
  TileConfig config;
  std::uint8_t tile[8][kTileHeight][kTileBytes];
};
thread_local EmulatedTiles emulated;

// bf16 at p, denormals as zero, and sums that flush theirs: what the instruction does whatever MXCSR says.
INLINE float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.f, x) : x; }
INLINE float tile_bf16(const std::uint8_t* p) {
  bf16 x;
  memcpy(&x, p, sizeof x);
  return flushed(get(x));
}
inline void tile_move(int t, const void* p, int64_t stride, bool store) {
  for (int r = 0; r < emulated.config.rows[t]; ++r) {
    char* at = const_cast<char*>(static_cast<const char*>(p)) + r * stride;
    store ? memcpy(at, emulated.tile[t][r], emulated.config.row_bytes[t])
          : memcpy(emulated.tile[t][r], at, emulated.config.row_bytes[t]);
  }
}
// Even and odd products have sums of their own, which meet at the end.
inline void tile_dot_bf16(int c, int a, int b) {
  for (int m = 0; m < emulated.config.rows[c]; ++m)
    for (int n = 0; n < emulated.config.row_bytes[c] / 4; ++n) {
      float part[2] = {}, sum;
      for (int k = 0; k < emulated.config.row_bytes[a] / 4; ++k)
        for (int i = 0; i < 2; ++i)
          part[i] = flushed(__builtin_fmaf(tile_bf16(&emulated.tile[a][m][4 * k + 2 * i]),
                                           tile_bf16(&emulated.tile[b][k][4 * n + 2 * i]), part[i]));
      memcpy(&sum, &emulated.tile[c][m][4 * n], sizeof sum);
      sum = flushed(sum + flushed(part[0] + part[1]));
      memcpy(&emulated.tile[c][m][4 * n], &sum, sizeof sum);
    }
}
inline void tile_dot_bytes(int c, int a, int b) {
  for (int m = 0; m < emulated.config.rows[c]; ++m)
    for (int n = 0; n < emulated.config.row_bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &emulated.tile[c][m][4 * n], sizeof sum);
      for (int k = 0; k < emulated.config.row_bytes[a]; ++k)
        sum += emulated.tile[a][m][k] * static_cast<std::int8_t>(emulated.tile[b][k / 4][4 * n + k % 4]);
      memcpy(&emulated.tile[c][m][4 * n], &sum, sizeof sum);
    }
}
#define TILE_CONFIG_LOAD(p) (emulated.config = *(p))
#define TILE_CONFIG_STORE(p) (*(p) = emulated.config)
#define TILE_ZERO(t) memset(emulated.tile[t], 0, sizeof emulated.tile[t])
#define TILE_LOAD(t, p, stride) tile_move(t, p, stride, false)
#define TILE_STORE(t, p, stride) tile_move(t, p, stride, true)
#define TILE_DOT_BF16(c, a, b) tile_dot_bf16(c, a, b)
#define TILE_DOT_BYTES(c, a, b) tile_dot_bytes(c, a, b)
#else
// Not by intrinsics: GCC takes `_tile_loadconfig` to read 8 of the 64 bytes, and drops the stores of the others.
#define TILE_CONFIG_LOAD(p) __asm__ volatile("ldtilecfg %0" : : "m"(*(p)))
#define TILE_CONFIG_STORE(p) __asm__ volatile("sttilecfg %0" : "=m"(*(p)))
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_DOT_BYTES(c, a, b) _tile_dpbusd(c, a, b)
#endif

// This thread's tiles, all whole, while it lives. The shape that another library set comes back: it may count on it.
class Tiles {
 public:
  Tiles() {
    TILE_CONFIG_STORE(&before_);
    TileConfig whole;
    for (int t = 0; t < 8; ++t) {
      whole.rows[t] = kTileHeight;
      whole.row_bytes[t] = kTileBytes;
    }
    TILE_CONFIG_LOAD(&whole);
  }
  ~Tiles() { TILE_CONFIG_LOAD(&before_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// Tiles 0 to 3 are the quarters of 32 rows and 32 columns of sums, or of their left half: f(tile, rows below, bytes right).
#define EACH_SUM(f, NV)                   \
  f(0, 0, 0);                             \
  if (NV > 1) f(1, 0, kTileBytes);        \
  if (high) {                             \
    f(2, kTileHeight, 0);                 \
    if (NV > 1) f(3, kTileHeight, kTileBytes); \
  }
#define ZERO_SUM(t, row, at) TILE_ZERO(t)
#define LOAD_SUM(t, row, at) TILE_LOAD(t, reinterpret_cast<const char*>(add) + (row) * ld_add + (at), ld_add)
#define STORE_SUM(t, row, at) TILE_STORE(t, reinterpret_cast<char*>(c) + (row) * ldc + (at), ldc)

// C = add + A B, of 16 or 32 rows: `steps` times 64 bytes of A's rows, `lda` bytes apart, and 16 rows of the panel, 128
// bytes each. Rows of A, add and C come in blocks of 16, whole ones; add is null, or one row for all where ld_add is 0;
// NV is 1 where only the left half of the columns is wanted. beside(step) is done while tiles multiply.
template <int NV, bool kBytes, class Beside>
INLINE void amx_products(int64_t rows, int64_t steps, const char* a, int64_t lda, const char* b, const void* add,
                         int64_t ld_add, void* c, int64_t ldc, Beside beside) {
  constexpr int64_t kRow = 2 * kTileBytes;
  const bool high = rows > kTileHeight;
#define TILE_DOT(c, x, y)      \
  if constexpr (kBytes)        \
    TILE_DOT_BYTES(c, x, y);   \
  else                         \
    TILE_DOT_BF16(c, x, y)
  escape(a);
  if (add) {
    EACH_SUM(LOAD_SUM, NV)
  } else {
    EACH_SUM(ZERO_SUM, NV)
  }
  for (int64_t i = 0; i < steps; ++i, a += kTileBytes, b += kTileHeight * kRow) {
    TILE_LOAD(4, a, lda);
    TILE_LOAD(6, b, kRow);
    TILE_DOT(0, 4, 6);
    if (NV > 1) {
      TILE_LOAD(7, b + kTileBytes, kRow);
      TILE_DOT(1, 4, 7);
    }
    if (high) {
      TILE_LOAD(5, a + kTileHeight * lda, lda);
      TILE_DOT(2, 5, 6);
      if (NV > 1) {
        TILE_DOT(3, 5, 7);
      }
    }
    beside(i);
  }
#undef TILE_DOT
  EACH_SUM(STORE_SUM, NV)
}

// The same of split operands, without an addend: at each step the highs of 32 inputs, then their lows. What two lows would
// add is no more than what rounding to lows has lost.
INLINE void amx_split_products(int64_t rows, int64_t steps, const char* a, int64_t lda, const char* b, void* c) {
  constexpr int64_t kRow = 2 * kTileBytes, kHalf = kTileHeight * kRow, ldc = kRow;
  const bool high = rows > kTileHeight;
  escape(a);
#define LOAD_A(p)                              \
  TILE_LOAD(4, p, lda);                        \
  if (high) {                                  \
    TILE_LOAD(5, (p) + kTileHeight * lda, lda); \
  }
#define LOAD_B(p)        \
  TILE_LOAD(6, p, kRow); \
  TILE_LOAD(7, (p) + kTileBytes, kRow)
#define MULTIPLY()          \
  TILE_DOT_BF16(0, 4, 6);   \
  TILE_DOT_BF16(1, 4, 7);   \
  if (high) {               \
    TILE_DOT_BF16(2, 5, 6); \
    TILE_DOT_BF16(3, 5, 7); \
  }
  EACH_SUM(ZERO_SUM, 2)
  for (int64_t i = 0; i < steps; ++i, a += 2 * kTileBytes, b += 2 * kHalf) {
    LOAD_B(b);
    LOAD_A(a + kTileBytes);
    MULTIPLY();  // a's lows, b's highs
    LOAD_A(a);
    MULTIPLY();  // highs
    LOAD_B(b + kHalf);
    MULTIPLY();  // a's highs, b's lows
  }
#undef MULTIPLY
#undef LOAD_B
#undef LOAD_A
  EACH_SUM(STORE_SUM, 2)
}
#undef EACH_SUM
#undef ZERO_SUM
#undef LOAD_SUM
#undef STORE_SUM

}  // namespace
}  // namespace fastbert::FASTBERT_ISA
#endif
