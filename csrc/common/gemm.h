// The matrix product that everything here comes down to: a register tile of a few rows times a panel of four vectors
// of columns. The panel's operand is packed once ([depth][columns], zero-padded); the other is read where it lies, one
// pointer a row. A tile of 6 x 64 floats keeps an AVX-512 core at its multiply-add limit with both operands in L2, so
// no further blocking is needed at the sizes of recurrent networks.
//
// Every output element is summed over the depth in one order, whatever the tile: results do not depend on how rows or
// columns are shared among tiles or threads, nor on how many rows there are.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {

inline constexpr int kPanelVectors = 4;
template <class T>
inline constexpr int kPanel = kPanelVectors * kLanes<T>;
// Accumulators, one row of the panel and a broadcast must fit the registers.
inline constexpr int kTileRows = kVectorRegisters == 32 ? 6 : 3;

GENFUSE_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GENFUSE_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
GENFUSE_HD int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
GENFUSE_HD int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// The longest chain of additions into one accumulator; the chains' sums are then added. It keeps the rounding errors of
// long products (gradients are sums over all gates) near those of a library that sums in lanes, for one percent of
// time.
inline constexpr int64_t kChain = 128;

// out[r][0 .. NV vectors) = sum over k of rows[r][k * step] * panel[k][0 .. NV vectors); P is T, or bf16 as uint16_t.
template <class T, int MR, int NV, class P>
__attribute__((noinline)) void multiply_tile(int64_t depth, const T* const* rows, int64_t step, const P* panel,
                                             T* out) {
  using V = Vec<T>;
  const T* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) a[r] = rows[r];
  int64_t k = 0;
  do {
    const int64_t end = minimum(depth, k + kChain);
    const bool first = k == 0;
    V acc[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = V{};
    }
    for (; k < end; ++k) {
      V b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        if constexpr (sizeof(P) == 2) {
          b[v] = load_bf16(panel + v * kLanes<T>);
        } else {
          b[v] = load(panel + v * kLanes<T>);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const V x = broadcast(a[r][k * step]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
      }
      panel += NV * kLanes<T>;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        T* to = out + (r * NV + v) * kLanes<T>;
        store(to, first ? acc[r][v] : load(to) + acc[r][v]);
      }
    }
  } while (k < depth);
}

template <int NV, class T, class P>
inline void multiply_rows(int count, int64_t depth, const T* const* rows, int64_t step, const P* panel, T* out) {
  switch (count) {
    case 1:
      return multiply_tile<T, 1, NV>(depth, rows, step, panel, out);
    case 2:
      return multiply_tile<T, 2, NV>(depth, rows, step, panel, out);
    case 3:
      return multiply_tile<T, 3, NV>(depth, rows, step, panel, out);
    default:
      break;
  }
  if constexpr (kTileRows > 3) {
    switch (count) {
      case 4:
        return multiply_tile<T, 4, NV>(depth, rows, step, panel, out);
      case 5:
        return multiply_tile<T, 5, NV>(depth, rows, step, panel, out);
      case 6:
        return multiply_tile<T, 6, NV>(depth, rows, step, panel, out);
      default:
        break;
    }
  }
}

// `vectors` is the panel's width; out is [count][vectors][lanes].
template <class T, class P>
inline void multiply(int count, int vectors, int64_t depth, const T* const* rows, int64_t step, const P* panel,
                     T* out) {
  switch (vectors) {
    case 1:
      return multiply_rows<1>(count, depth, rows, step, panel, out);
    case 2:
      return multiply_rows<2>(count, depth, rows, step, panel, out);
    case 3:
      return multiply_rows<3>(count, depth, rows, step, panel, out);
    default:
      return multiply_rows<4>(count, depth, rows, step, panel, out);
  }
}

// The same from weights that are not packed, for a handful of rows used once: weight(column) is that column's
// contiguous vector of `depth` values, or null for padding; `columns` is a multiple of the lanes. Every column is
// summed lane by lane, and the lanes of a vector's worth of columns together, by a transposition: adding up each for
// itself would take as long as reading the weights. The rounding differs from multiply's, but not with the number of
// rows.
template <class T, class Weight>
inline void multiply_unpacked(int count, int columns, int64_t depth, const T* const* rows, Weight weight, T* out) {
  using V = Vec<T>;
  constexpr int lanes = kLanes<T>;
  constexpr int group = lanes < 4 ? lanes : 4;
  const int64_t whole = depth / lanes * lanes;
  const int rest = static_cast<int>(depth - whole);
  for (int column = 0; column < columns; column += lanes) {
    const T* w[lanes];
    for (int j = 0; j < lanes; ++j) w[j] = weight(column + j);
    for (int r = 0; r < count; ++r) {
      V sums[lanes];
      for (int first = 0; first < lanes; first += group) {
        const T* from[group];
#pragma GCC unroll 4
        for (int j = 0; j < group; ++j) from[j] = w[first + j] != nullptr ? w[first + j] : w[0];  // padding comes last
        V even[group]{}, odd[group]{};
        if (w[first] != nullptr) {
          int64_t k = 0;
          for (; k + 2 * lanes <= whole; k += 2 * lanes) {
            const V x0 = load(rows[r] + k), x1 = load(rows[r] + k + lanes);
#pragma GCC unroll 4
            for (int j = 0; j < group; ++j) {
              even[j] += x0 * load(from[j] + k);
              odd[j] += x1 * load(from[j] + k + lanes);
            }
          }
          if (k < whole) {
            const V x0 = load(rows[r] + k);
#pragma GCC unroll 4
            for (int j = 0; j < group; ++j) even[j] += x0 * load(from[j] + k);
          }
          if (rest > 0) {
            const V x1 = load_partial(rows[r] + whole, rest);
#pragma GCC unroll 4
            for (int j = 0; j < group; ++j) odd[j] += x1 * load_partial(from[j] + whole, rest);
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < group; ++j) sums[first + j] = w[first + j] != nullptr ? even[j] + odd[j] : V{};
      }
      transpose<T>(sums);
#pragma GCC unroll 4
      for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      store(out + static_cast<int64_t>(r) * columns + column, sums[0]);
    }
  }
}

// Packs `columns` columns (a multiple of the lanes) of depth values each; source(column) is contiguous over the depth,
// or null for zeros. P is T, or uint16_t for bfloat16.
template <class T, class P, class Source>
inline void pack_columns(int64_t columns, int64_t depth, Source source, P* panel) {
  constexpr int lanes = kLanes<T>;
  for (int64_t column = 0; column < columns; column += lanes) {
    const T* from[lanes];
    for (int i = 0; i < lanes; ++i) from[i] = source(column + i);
    for (int64_t k0 = 0; k0 < depth; k0 += lanes) {
      const int64_t n = minimum(lanes, depth - k0);
      Vec<T> block[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) block[i] = from[i] == nullptr ? Vec<T>{} : load_upto(from[i] + k0, n);
      transpose<T>(block);
      for (int64_t k = 0; k < n; ++k) {
        P* to = panel + (k0 + k) * columns + column;
        if constexpr (sizeof(P) == 2) {
          store_bf16(to, block[k]);
        } else {
          store(to, block[k]);
        }
      }
    }
  }
}

// Packs columns [first, first + valid) of rows that are contiguous over the columns; source(k) is row k or null.
template <class T, class Source>
inline void pack_rows(int columns, int64_t valid, int64_t depth, Source source, int64_t first, T* panel) {
  for (int64_t k = 0; k < depth; ++k, panel += columns) {
    const T* from = source(k);
    for (int v = 0; v < columns; v += kLanes<T>) {
      Vec<T> value{};
      if (from != nullptr && v < valid) value = load_upto(from + first + v, valid - v);
      store(panel + v, value);
    }
  }
}

// Cuts `count` rows into tiles of at most kTileRows whose sizes differ by at most one, and calls tile(first, size).
template <class F>
inline void for_tiles(int64_t begin, int64_t end, F tile) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t tiles = ceil_div(count, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) {
    const Range range = {begin + i * count / tiles, begin + (i + 1) * count / tiles};
    tile(range.begin, static_cast<int>(range.end - range.begin));
  }
}

inline constexpr int64_t kDepthBlock = 512;  // a multiple of kChain

// A panel times many rows, one block of depth after the other over all rows, so that a block of the panel (128 KB of
// float32) and of the rows stays in L2 where the whole depth would not. put(first, count, tile, later) takes each
// tile's part; `later` says that it adds to what earlier blocks left.
template <class T, class Row, class Put>
inline void multiply_blocked(Range rows, int vectors, int64_t depth, Row row, const T* panel, Put put) {
  alignas(64) T tile[kTileRows * kPanel<T>];
  for (int64_t k = 0; k < depth || k == 0; k += kDepthBlock) {
    for_tiles(rows.begin, rows.end, [&](int64_t first, int count) {
      const T* from[kTileRows];
      for (int r = 0; r < count; ++r) from[r] = row(first + r) + k;
      multiply(count, vectors, minimum(kDepthBlock, depth - k), from, 1, panel + k * vectors * kLanes<T>, tile);
      put(first, count, tile, k > 0);
    });
  }
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse
