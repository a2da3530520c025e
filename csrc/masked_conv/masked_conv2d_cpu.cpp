// A matrix product over the live taps alone. Inside, images lie channels last: a few rows of one image at a time are
// brought into a buffer with zeros around them, which fits the L2 cache. There a pixel's live taps in one row of the
// kernel are one contiguous stretch, so the depth of the product is a handful of such runs, the same for all pixels: a
// register tile takes six pixels by their addresses and 64 outputs from weights packed run after run. A dead tap is in
// no run. Where channels are masked (RGB), the outputs are cut into sections that see the same taps, and their channels
// are put into the order of their groups, so that what a section sees at the centre is one stretch, too.
//
// The gradient of x is the same with the taps turned and the weight transposed. Where x has but a few channels, which
// would leave the lanes empty, its rows are what the gradient of y, times the weights of all taps, adds to the buffer.
// The gradient of the weight is a product over pixels: the runs' elements are its rows, the outputs its columns. It is
// summed in parts of the batch, as many for every number of threads, which are then added in their order.
#include "masked_conv/masked_conv2d.h"

#include <cstring>

#include "common/rows.h"
#include "flow/workspace.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kBufferBytes = int64_t{256} << 10;
constexpr int64_t kStage = 48;        // pixels whose results are turned together: whole tiles and whole vectors
constexpr int64_t kAhead = 128;       // elements that are fetched ahead of a stream
constexpr double kWorthWaking = 1e5;  // multiply-adds: 2 us of one core, less than a fork and join
constexpr int64_t kSumPixels = 128;   // of one chain of additions of the weight's gradient
constexpr int64_t kParts = 8, kLeastParts = 4, kPartBytes = int64_t{16} << 20;

// ---- what is alive
// ---------------------------------------------------------------------------------------------------

enum class Alive { none, all, before, up_to };  // of a tap: channel groups before the output's, or up to and with it

inline Alive alive_of(ConvMask mask, int64_t i, int64_t j, int64_t row, int64_t column) {
  const bool above =
      mask == ConvMask::a || mask == ConvMask::b || mask == ConvMask::vertical_a || mask == ConvMask::vertical_b;
  if (i != row) return i < row && above ? Alive::all : Alive::none;
  if (mask == ConvMask::vertical_a) return Alive::none;
  if (mask == ConvMask::vertical_b) return Alive::all;
  if (j != column) return j < column ? Alive::all : Alive::none;
  return mask == ConvMask::a || mask == ConvMask::horizontal_a ? Alive::before : Alive::up_to;
}

struct Tap {
  int64_t dy, dx, index;  // of the pixel that it reads from the pixel that it is for; of the weight
  Alive alive;
};
// Contiguous elements from a pixel's address on; `last` of a chain of additions.
struct Run {
  int64_t offset, depth;
  bool last;
};
// Columns of the product that see the same taps, by their places in the order of channel groups.
struct Section {
  int64_t column, columns;
  int64_t first, end;                // channels that they see
  int64_t centre_first, centre_end;  // and at a tap that is not alive for all groups
  int64_t depth;
  const Run *segments, *runs;  // the runs as long as they are, and cut into chains
  int64_t segment_count, run_count;
  int64_t packed;  // where its weights begin

  Range channels(Alive alive) const {
    return alive == Alive::all ? Range{first, end} : Range{centre_first, centre_end};
  }
};
struct Panel {
  const Section* section;
  int64_t column, valid;
  int vectors;
  int64_t packed;
};

// One direction of the convolution: `channels` are summed over, `columns` are what comes out. Turned, y's channels are.
template <class T>
struct Plan {
  bool turned;
  int64_t channels, columns, groups, channel_groups;
  bool interleaved;
  int64_t height, width, out_height, out_width;  // of what is read and of what comes out
  int64_t top = 0, left = 0, halo_h = 0, halo_w = 0;
  int64_t row_pitch;  // of the buffer
  int64_t strip;      // rows of what comes out that are computed from one buffer
  int64_t section_count = 0, panel_count = 0, tap_count = 0, packed_size = 0;
  int64_t *channel_order = nullptr, *column_order = nullptr;  // place -> channel
  int64_t* base = nullptr;                                    // of each pixel of a strip
  Tap* taps = nullptr;
  Section* sections = nullptr;
  Panel* panels = nullptr;
  Run* runs = nullptr;

  Plan(const MaskedConv2d<T>& p, bool turned_, int64_t strip_, Workspace& w)
      : turned(turned_),
        channels(turned ? p.outputs : p.inputs),
        columns(turned ? p.inputs : p.outputs),
        groups(p.groups),
        channel_groups(p.channel_groups),
        interleaved(p.interleaved && p.channel_groups > 1),
        height(turned ? p.out_height : p.height),
        width(turned ? p.out_width : p.width),
        out_height(turned ? p.height : p.out_height),
        out_width(turned ? p.width : p.out_width),
        strip(strip_) {
    const int64_t all = p.kernel_h * p.kernel_w;
    const int64_t sections_most = minimum(groups * minimum(channel_groups, columns), columns);
    const int64_t depth_most = all * (channels / groups);
    const int64_t runs_most = 2 * all + ceil_div(depth_most, kChain);
    channel_order = w.take<int64_t>(channels);
    column_order = w.take<int64_t>(columns);
    taps = w.take<Tap>(all);
    sections = w.take<Section>(sections_most);
    panels = w.take<Panel>(sections_most + columns / kPanel<T>);
    runs = w.take<Run>(sections_most * 2 * runs_most);
    packed_size = depth_most * (columns + sections_most * kLanes<T>);
    find_taps(p);
    row_pitch = (out_width + halo_w) * channels;
    if (strip == 0) {
      const int64_t rows = kBufferBytes / maximum(1, row_pitch * static_cast<int64_t>(sizeof(T)));
      strip = ceil_div(out_height, ceil_div(out_height, maximum(1, rows - halo_h)));
    }
    base = w.take<int64_t>(strip * out_width);
    if (w.base == nullptr) return;
    order(channels, channel_order);
    order(columns, column_order);
    cut_sections();
    for (int64_t row = 0, i = 0; row < strip; ++row) {
      for (int64_t s = 0; s < out_width; ++s) base[i++] = row * row_pitch + s * channels;
    }
  }

  int64_t buffer_size(int64_t rows) const { return (rows + halo_h) * row_pitch; }
  int64_t strips() const { return ceil_div(out_height, strip); }
  Range rows_of(int64_t index) const { return split(out_height, strips(), index); }

  int64_t group_of(int64_t channel, int64_t of) const {
    return interleaved ? channel % channel_groups : channel * channel_groups / of;
  }

  // Taps in the order in which they lie in memory, and how far they reach: those from which some pixel sees the image,
  // and no more than padding. With no memory yet they are only counted.
  void find_taps(const MaskedConv2d<T>& p) {
    const int64_t all = p.kernel_h * p.kernel_w;
    int64_t bottom = 0, right = 0;
    for (int64_t n = 0; n < all; ++n) {
      const int64_t index = turned ? all - 1 - n : n, i = index / p.kernel_w, j = index % p.kernel_w;
      const Alive alive = alive_of(p.mask, i, j, p.kernel_h / 2, p.kernel_w / 2);
      if (alive == Alive::none || (alive == Alive::before && channel_groups == 1)) continue;
      int64_t dy = i * p.dilation_h - p.padding_h, dx = j * p.dilation_w - p.padding_w;
      if (turned) {
        dy = -dy;
        dx = -dx;
      }
      if (dy >= height || dy + out_height <= 0 || dx >= width || dx + out_width <= 0) continue;
      top = tap_count == 0 ? dy : minimum(top, dy);
      left = tap_count == 0 ? dx : minimum(left, dx);
      bottom = tap_count == 0 ? dy : maximum(bottom, dy);
      right = tap_count == 0 ? dx : maximum(right, dx);
      if (sections != nullptr) taps[tap_count] = {dy, dx, index, channel_groups == 1 ? Alive::all : alive};
      ++tap_count;
    }
    halo_h = bottom - top;
    halo_w = right - left;
  }

  // The channels of each group of `groups`, by their channel groups.
  void order(int64_t count, int64_t* places) const {
    const int64_t each = count / groups;
    for (int64_t first = 0, at = 0; first < count; first += each) {
      if (!interleaved) {
        for (int64_t c = first; c < first + each; ++c) places[at++] = c;
        continue;
      }
      for (int64_t g = 0; g < channel_groups && at < first + each; ++g) {
        for (int64_t c = first; c < first + each; ++c) {
          if (group_of(c, count) == g) places[at++] = c;
        }
      }
    }
  }

  void cut_sections() {
    const int64_t each_column = columns / groups, each_channel = channels / groups;
    Run* to = runs;
    packed_size = 0;
    for (int64_t begin = 0, end = 0; begin < columns; begin = end) {
      const int64_t group = begin / each_column, own = group_of(column_order[begin], columns);
      while (end < (group + 1) * each_column && group_of(column_order[end], columns) == own) ++end;
      Section& s = sections[section_count++];
      s.column = begin;
      s.columns = end - begin;
      s.first = group * each_channel;
      s.end = s.first + each_channel;
      // Of the channels at the centre an output sees the first; turned, an input is seen by the last.
      bool strict = false;
      for (int64_t t = 0; t < tap_count; ++t) strict = strict || taps[t].alive == Alive::before;
      int64_t seam = s.first;
      const int64_t limit = own + (strict != turned ? 0 : 1);  // group limit and those after it are beyond the seam
      while (seam < s.end && group_of(channel_order[seam], channels) < limit) ++seam;
      s.centre_first = turned ? seam : s.first;
      s.centre_end = turned ? s.end : seam;
      s.depth = 0;
      s.segments = to;
      for (int64_t t = 0; t < tap_count; ++t) {
        const Range seen = s.channels(taps[t].alive);
        const int64_t depth = seen.end - seen.begin;
        if (depth == 0) continue;
        const int64_t offset = (taps[t].dy - top) * row_pitch + (taps[t].dx - left) * channels + seen.begin;
        if (to != s.segments && to[-1].offset + to[-1].depth == offset) {
          to[-1].depth += depth;
        } else {
          *to++ = {offset, depth, false};
        }
        s.depth += depth;
      }
      s.segment_count = to - s.segments;
      s.runs = to;
      int64_t chain = 0;
      for (int64_t i = 0; i < s.segment_count; ++i) {
        for (int64_t k = 0; k < s.segments[i].depth;) {
          const int64_t depth = minimum(s.segments[i].depth - k, kChain - chain);
          *to++ = {s.segments[i].offset + k, depth, false};
          k += depth;
          chain = (chain + depth) % kChain;
          to[-1].last = chain == 0;
        }
      }
      if (to != s.runs) to[-1].last = true;
      s.run_count = to - s.runs;
      s.packed = packed_size;
      for (int64_t column = 0; column < s.columns; column += kPanel<T>) {
        Panel& panel = panels[panel_count++];
        panel.section = &s;
        panel.column = s.column + column;
        panel.valid = minimum(kPanel<T>, s.columns - column);
        panel.vectors = static_cast<int>(ceil_div(panel.valid, kLanes<T>));
        panel.packed = packed_size;
        packed_size += s.depth * panel.vectors * kLanes<T>;
      }
    }
  }
};

// Calls put(k, weight's index) for the whole depth of a column.
template <class T, class F>
inline void for_weights(const Plan<T>& plan, const MaskedConv2d<T>& p, const Section& s, int64_t column, F&& put) {
  const int64_t all = p.kernel_h * p.kernel_w, each = p.inputs / p.groups;
  int64_t k = 0;
  for (int64_t t = 0; t < plan.tap_count; ++t) {
    const Range seen = s.channels(plan.taps[t].alive);
    if (plan.turned) {
      const int64_t from = column % each * all + plan.taps[t].index;
      for (int64_t c = seen.begin; c < seen.end; ++c) put(k++, plan.channel_order[c] * each * all + from);
    } else {
      const int64_t from = column * each * all + plan.taps[t].index;
      for (int64_t c = seen.begin; c < seen.end; ++c) put(k++, plan.channel_order[c] % each * all + from);
    }
  }
}

// [panel][depth][columns], with zeros up to whole vectors.
template <class T>
void pack(const Plan<T>& plan, const MaskedConv2d<T>& p, T* packed, const Executor& executor) {
  constexpr int L = kLanes<T>;
  parallel_ranges(executor, plan.panel_count * kPanelVectors, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Panel& panel = plan.panels[i / kPanelVectors];
      const int64_t vector = i % kPanelVectors, pitch = panel.vectors * L;
      if (vector >= panel.vectors) continue;
      T* to = packed + panel.packed + vector * L;
      const int64_t valid = minimum(L, panel.valid - vector * L);
      for (int64_t n = 0; n < valid; ++n) {
        const int64_t column = plan.column_order[panel.column + vector * L + n];
        for_weights(plan, p, *panel.section, column, [&](int64_t k, int64_t at) { to[k * pitch + n] = p.weight[at]; });
      }
      for (int64_t n = valid; n < L; ++n) {
        for (int64_t k = 0; k < panel.section->depth; ++k) to[k * pitch + n] = T(0);
      }
    }
  });
}

// ---- bringing images into a buffer and back
// --------------------------------------------------------------------------

template <class T>
struct Images {
  const T* data;
  ImageStrides strides;
  int64_t channels, height, width;
  const int64_t* order;  // of the channels; null if they keep theirs

  const T* row(int64_t b, int64_t r) const { return data + b * strides.batch + r * strides.row; }
};

// `n` pixels of each of `rows` rows, channels last: pixels `pitch` apart, rows `row_pitch`.
template <class T>
void copy_pixels(const Images<T>& from, const T* source, int64_t rows, int64_t n, int64_t pitch, int64_t row_pitch,
                 T* to) {
  constexpr int L = kLanes<T>;
  const int64_t channels = from.channels, step = from.strides.row;
  if (rows > 1 && step == n * from.strides.column && row_pitch == n * pitch) {
    return copy_pixels(from, source, 1, rows * n, pitch, 0, to);
  }
  if (from.strides.channel == 1) {
    for (int64_t r = 0; r < rows; ++r, source += step, to += row_pitch) {
      if (from.order == nullptr && from.strides.column == channels && pitch == channels) {
        std::memcpy(to, source, static_cast<size_t>(n * channels) * sizeof(T));
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        const T* pixel = source + i * from.strides.column;
        if (from.order == nullptr) {
          std::memcpy(to + i * pitch, pixel, static_cast<size_t>(channels) * sizeof(T));
        } else {
          for (int64_t c = 0; c < channels; ++c) to[i * pitch + c] = pixel[from.order[c]];
        }
      }
    }
    return;
  }
  // A vector's worth of channels through all rows: more streams than that no processor fetches ahead of itself.
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t inside = minimum(L, channels - c);
    const T* planes[L];
    for (int64_t j = 0; j < L; ++j) {
      const int64_t channel = minimum(c + j, channels - 1);
      planes[j] = source + (from.order == nullptr ? channel : from.order[channel]) * from.strides.channel;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; i += L) {
        Vec<T> block[L];
        const int64_t valid = minimum(L, n - i);
        for (int j = 0; j < L; ++j) {
          block[j] = load_upto(planes[j] + r * step + i, valid);
          __builtin_prefetch(planes[j] + r * step + i + kAhead);
        }
        transpose<T>(block);
        T* at = to + r * row_pitch + i * pitch + c;
        if (inside == L) {
          for (int64_t j = 0; j < valid; ++j) store(at + j * pitch, block[j]);
        } else {
          for (int64_t j = 0; j < valid; ++j) store_partial(at + j * pitch, block[j], static_cast<int>(inside));
        }
      }
    }
  }
}

template <class T>
inline void clear(T* to, int64_t count) {
  if (count > 0) std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
}

// What the output rows `rows` of image b read, with zeros around the image.
template <class T>
void fill(const Plan<T>& plan, const Images<T>& from, int64_t b, Range rows, T* buffer) {
  const int64_t columns = plan.out_width + plan.halo_w;
  const int64_t first = minimum(columns, maximum(0, -plan.left));
  const int64_t end = maximum(first, minimum(columns, from.width - plan.left));
  const int64_t count = rows.end - rows.begin + plan.halo_h, above = rows.begin + plan.top;
  const int64_t from_row = minimum(count, maximum(0, -above));
  const int64_t end_row = first == end ? from_row : maximum(from_row, minimum(count, from.height - above));
  clear(buffer, from_row * plan.row_pitch);
  for (int64_t q = from_row; q < end_row && columns > end - first; ++q) {
    clear(buffer + q * plan.row_pitch, first * plan.channels);
    clear(buffer + q * plan.row_pitch + end * plan.channels, (columns - end) * plan.channels);
  }
  clear(buffer + end_row * plan.row_pitch, (count - end_row) * plan.row_pitch);
  if (from_row == end_row) return;
  copy_pixels(from, from.row(b, above + from_row) + (first + plan.left) * from.strides.column, end_row - from_row,
              end - first, plan.channels, plan.row_pitch, buffer + from_row * plan.row_pitch + first * plan.channels);
}

// ---- the products
// ----------------------------------------------------------------------------------------------------

// out[r][0 .. NV vectors) = sum over the runs of rows[r][...] * panel[k][0 .. NV vectors).
template <class T, int MR, int NV>
__attribute__((noinline)) void multiply_runs(const Run* runs, int64_t count, const T* const* rows, const T* panel,
                                             T* out) {
  using V = Vec<T>;
  const T* a[MR];
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    a[r] = rows[r];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  }
  bool first = true;
  for (int64_t i = 0; i < count || first; ++i) {
    if (i < count) {
      const int64_t end = runs[i].offset + runs[i].depth;
      for (int64_t k = runs[i].offset; k < end; ++k) {
        V b[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) b[v] = load(panel + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
          const V x = broadcast(a[r][k]);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) acc[r][v] += x * b[v];
        }
        panel += NV * kLanes<T>;
      }
      if (!runs[i].last) continue;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        T* to = out + (r * NV + v) * kLanes<T>;
        store(to, first ? acc[r][v] : load(to) + acc[r][v]);
        acc[r][v] = V{};
      }
    }
    first = false;
  }
}

// sums[r][0 .. NV vectors) (+)= sum over n pixels of x[at[k] + r] * columns[k * pitch + 0 .. NV vectors).
template <class T, int MR, int NV>
__attribute__((noinline)) void multiply_pixels(int64_t n, const T* x, const int64_t* at, const T* columns,
                                               int64_t pitch, bool first, T* sums) {
  using V = Vec<T>;
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = V{};
  }
  for (int64_t k = 0; k < n; ++k) {
    const T* a = x + at[k];
    V b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(columns + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const V value = broadcast(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += value * b[v];
    }
    columns += pitch;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* to = sums + (r * NV + v) * kLanes<T>;
      store(to, first ? acc[r][v] : load(to) + acc[r][v]);
    }
  }
}

template <class F>
inline void with_size(int count, F&& f) {
  switch (count) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 6>{});
  }
}
// Calls f(rows of a tile, vectors of a panel) with both as constants.
template <class F>
inline void with_tile(int count, int vectors, F&& f) {
  with_size(count, [&](auto rows) {
    if constexpr (decltype(rows)::value <= kTileRows) {
      with_size(vectors, [&](auto width) {
        if constexpr (decltype(width)::value <= kPanelVectors) f(rows, width);
      });
    }
  });
}

template <class T>
inline void tile_of_runs(int count, const Panel& panel, const T* const* rows, const T* packed, T* out) {
  with_tile(count, panel.vectors, [&](auto rows_of, auto width) {
    multiply_runs<T, decltype(rows_of)::value, decltype(width)::value>(panel.section->runs, panel.section->run_count,
                                                                       rows, packed + panel.packed, out);
  });
}

// ---- convolution
// -----------------------------------------------------------------------------------------------------

template <class T>
struct Result {
  T* data;
  bool channels_last;
  const T* bias;  // by channel, or null
};

// The results of one panel for n pixels, of which the first is `pixel` of image b; [n][vectors] of them lie in `from`.
template <class T>
void put_pixels(const Plan<T>& plan, const Result<T>& to, const Panel& panel, int64_t b, int64_t pixel, int64_t n,
                const T* from) {
  constexpr int L = kLanes<T>;
  const int64_t pixels = plan.out_height * plan.out_width, pitch = panel.vectors * L;
  const int64_t* order = plan.column_order + panel.column;
  if (to.channels_last) {
    T* at = to.data + (b * pixels + pixel) * plan.columns;
    if (plan.interleaved) {
      for (int64_t i = 0; i < n; ++i, at += plan.columns, from += pitch) {
        for (int64_t c = 0; c < panel.valid; ++c) {
          at[order[c]] = from[c] + (to.bias == nullptr ? T(0) : to.bias[order[c]]);
        }
      }
      return;
    }
    at += panel.column;
    if (panel.valid == kPanel<T>) {  // whole lines in the order of memory
      Vec<T> add[kPanelVectors];
      for (int v = 0; v < kPanelVectors; ++v) {
        add[v] = to.bias == nullptr ? Vec<T>{} : load(to.bias + panel.column + v * L);
      }
      for (int64_t i = 0; i < n; ++i, at += plan.columns, from += kPanel<T>) {
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVectors; ++v) store(at + v * L, load(from + v * L) + add[v]);
      }
      return;
    }
    for (int v = 0; v < panel.vectors; ++v) {
      const int64_t valid = panel.valid - v * L;
      const Vec<T> add = to.bias == nullptr ? Vec<T>{} : load_upto(to.bias + panel.column + v * L, valid);
      for (int64_t i = 0; i < n; ++i) {
        store_upto(at + i * plan.columns + v * L, load(from + i * pitch + v * L) + add, valid);
      }
    }
    return;
  }
  T* at = to.data + b * plan.columns * pixels + pixel;
  for (int v = 0; v < panel.vectors; ++v) {
    const int64_t valid = minimum(L, panel.valid - v * L);
    for (int64_t i = 0; i < n; i += L) {
      Vec<T> block[L];
      for (int64_t j = 0; j < L; ++j) block[j] = i + j < n ? load(from + (i + j) * pitch + v * L) : Vec<T>{};
      transpose<T>(block);
      for (int64_t c = 0; c < valid; ++c) {
        const int64_t channel = order[v * L + c];
        const Vec<T> add = to.bias == nullptr ? Vec<T>{} : broadcast(to.bias[channel]);
        store_upto(at + channel * pixels + i, block[c] + add, n - i);
      }
    }
  }
}

// Fetches the lines that put_pixels will write, while they are being computed; where they are many short ones, a few
// from each channel's plane.
template <class T>
void await_pixels(const Plan<T>& plan, const Result<T>& to, const Panel& panel, int64_t b, int64_t pixel, int64_t n) {
  if (to.channels_last) return;
  const int64_t pixels = plan.out_height * plan.out_width;
  const T* at = to.data + (b * plan.columns + panel.column) * pixels + pixel;
  for (int64_t c = 0; c < panel.valid; ++c, at += pixels) {
    for (int64_t i = 0; i < n; i += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(at + i, 1);
  }
}

// Calls unit(thread, index) for all of `count`, each thread for a range of them.
template <class F>
inline void for_units(const Executor& executor, int64_t count, F&& unit) {
  const int64_t threads = maximum(1, minimum(executor.threads, count));
  parallel_ranges(executor, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      const Range range = split(count, threads, thread);
      for (int64_t i = range.begin; i < range.end; ++i) unit(thread, i);
    }
  });
}

template <class T>
void convolve(const Plan<T>& plan, const Images<T>& from, int64_t batch, const T* packed, const Result<T>& to,
              T* buffers, const Executor& executor) {
  const int64_t size = round_up(plan.buffer_size(plan.strip), 64), strips = plan.strips();
  for_units(executor, batch * strips, [&](int64_t thread, int64_t unit) {
    const int64_t b = unit / strips;
    const Range rows = plan.rows_of(unit % strips);
    T* buffer = buffers + thread * size;
    fill(plan, from, b, rows, buffer);
    alignas(64) T stage[kStage * kPanel<T>];
    const int64_t pixels = (rows.end - rows.begin) * plan.out_width, first = rows.begin * plan.out_width;
    for (int64_t i = 0; i < plan.panel_count; ++i) {
      const Panel& panel = plan.panels[i];
      for (int64_t pixel = 0; pixel < pixels; pixel += kStage) {
        const int64_t n = minimum(kStage, pixels - pixel);
        await_pixels(plan, to, panel, b, first + pixel, n);
        for_tiles(0, n, [&](int64_t row, int count) {
          const T* address[kTileRows];
          for (int r = 0; r < count; ++r) address[r] = buffer + plan.base[pixel + row + r];
          tile_of_runs(count, panel, address, packed, stage + row * panel.vectors * kLanes<T>);
        });
        put_pixels(plan, to, panel, b, first + pixel, n, stage);
      }
    }
  });
}

template <class T>
Images<T> images_of_x(const MaskedConv2d<T>& p, const int64_t* order) {
  return {p.x, p.x_strides, p.inputs, p.height, p.width, order};
}

// More strips than the buffer asks for, if the threads have too few to share.
template <class T>
int64_t strip_for(const Plan<T>& plan, int64_t batch, int threads) {
  if (threads == 1 || plan.out_height == 0) return plan.strip;
  const int64_t wanted = minimum(plan.out_height, ceil_div(4 * static_cast<int64_t>(threads), maximum(batch, 1)));
  return ceil_div(plan.out_height, maximum(plan.strips(), wanted));
}

// One thread where waking others would take longer than the work. The workspace is laid out for as many as there are.
template <class T>
Executor worth_waking(const MaskedConv2d<T>& p, const Executor& executor) {
  const double depth = static_cast<double>(p.inputs / p.groups * p.kernel_h * p.kernel_w);
  const double all = static_cast<double>(p.batch * p.outputs) * static_cast<double>(p.out_height * p.out_width) * depth;
  return all < kWorthWaking ? Executor{} : executor;
}

template <class T>
struct Forward {
  Plan<T> plan;
  T *packed, *buffers;

  Forward(const MaskedConv2d<T>& p, bool turned, int threads, Workspace& w)
      : plan(p, turned, strip_of(p, turned, threads), w),
        packed(w.take<T>(plan.packed_size)),
        buffers(w.take<T>(threads * round_up(plan.buffer_size(plan.strip), 64))) {}

  static int64_t strip_of(const MaskedConv2d<T>& p, bool turned, int threads) {
    Workspace none{nullptr};
    const Plan<T> plan(p, turned, 0, none);
    return strip_for(plan, p.batch, threads);
  }
};

template <class T>
void forward(const MaskedConv2d<T>& p, char* workspace, const Executor& all) {
  Workspace w{workspace};
  const Forward<T> f(p, false, all.threads, w);
  const Executor executor = worth_waking(p, all);
  pack(f.plan, p, f.packed, executor);
  const Images<T> x = images_of_x(p, f.plan.interleaved ? f.plan.channel_order : nullptr);
  convolve(f.plan, x, p.batch, f.packed, {p.y, p.y_channels_last, p.bias}, f.buffers, executor);
}

// ---- gradients
// -------------------------------------------------------------------------------------------------------

// The gradient of y, pixel after pixel with all channels in the order of their groups. Vectors are read from it that
// end behind its channels.
template <class T>
struct Flat {
  const Plan<T>& plan;  // forward
  Images<T> from;
  bool in_place;
  int64_t pitch;

  Flat(const Plan<T>& plan_, const MaskedConv2dBackward<T>& b)
      : plan(plan_),
        from{b.grad_y,
             b.grad_y_strides,
             b.forward.outputs,
             b.forward.out_height,
             b.forward.out_width,
             plan_.interleaved ? plan_.column_order : nullptr} {
    const ImageStrides& strides = from.strides;
    in_place = strides.channel == 1 && from.order == nullptr && strides.column == from.channels &&
               strides.row == from.width * from.channels && from.channels % kLanes<T> == 0 && plan.section_count == 1;
    pitch = in_place ? from.channels : round_up(from.channels, kLanes<T>);
  }
  static int64_t size(const MaskedConv2d<T>& p, int64_t rows) {
    return round_up(rows * p.out_width * round_up(p.outputs, kLanes<T>) + kPanel<T>, 64);
  }
  const T* rows(int64_t b, Range rows, T* buffer) const {
    if (in_place) return from.row(b, rows.begin);
    const int64_t count = rows.end - rows.begin;
    copy_pixels(from, from.row(b, rows.begin), count, from.width, pitch, from.width * pitch, buffer);
    clear(buffer + count * from.width * pitch, kPanel<T>);
    return buffer;
  }
};

template <class T>
int64_t rows_of_grad(const MaskedConv2d<T>& p) {
  const int64_t bytes = maximum(1, p.out_width * round_up(p.outputs, kLanes<T>) * static_cast<int64_t>(sizeof(T)));
  return maximum(1, 2 * kBufferBytes / bytes);
}

// Of few channels: for every pixel of y its gradient times the weights of all taps is added to what the taps read.
template <class T>
struct Scattered {
  Plan<T> plan;  // forward, an image at a time
  int64_t strip, width;
  T *packed, *images, *flat, *products;

  Scattered(const MaskedConv2d<T>& p, int threads, Workspace& w)
      : plan(p, false, maximum(1, p.out_height), w), strip(minimum(maximum(1, p.out_height), rows_of_grad(p))) {
    width = round_up(p.kernel_h * p.kernel_w * (p.inputs / p.groups), kLanes<T>);
    packed = w.take<T>(width * p.outputs);
    images = w.take<T>(threads * round_up(plan.buffer_size(plan.strip), 64));
    flat = w.take<T>(threads * Flat<T>::size(p, strip));
    products = w.take<T>(threads * round_up(kTileRows * width, 64));
  }

  static bool serves(const MaskedConv2d<T>& p) { return 2 * (p.inputs / p.groups) <= kLanes<T>; }

  // [section][panel of its depth][output][columns]
  void pack(const MaskedConv2d<T>& p) const {
    clear(packed, width * p.outputs);
    for (int64_t i = 0; i < plan.section_count; ++i) {
      const Section& s = plan.sections[i];
      const int64_t columns = round_up(s.depth, kLanes<T>);
      for (int64_t n = 0; n < s.columns; ++n) {
        for_weights(plan, p, s, plan.column_order[s.column + n], [&](int64_t k, int64_t at) {
          const int64_t panel = k / kPanel<T>, pitch = minimum(kPanel<T>, columns - panel * kPanel<T>);
          packed[s.column * width + panel * kPanel<T> * s.columns + n * pitch + k % kPanel<T>] = p.weight[at];
        });
      }
    }
  }

  void tile(const Section& s, int count, const T* const* rows, T* product) const {
    constexpr int L = kLanes<T>;
    const int64_t columns = round_up(s.depth, L);
    alignas(64) T out[kTileRows * kPanel<T>];
    for (int64_t column = 0; column < columns; column += kPanel<T>) {
      const int vectors = static_cast<int>(minimum(kPanel<T>, columns - column) / L);
      multiply(count, vectors, s.columns, rows, 1, packed + s.column * width + column * s.columns, out);
      for (int r = 0; r < count; ++r) {
        for (int v = 0; v < vectors; ++v)
          store(product + r * width + column + v * L, load(out + (r * vectors + v) * L));
      }
    }
  }

  void add(const Section& s, const T* product, T* pixel) const {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < s.segment_count; ++i) {
      T* to = pixel + s.segments[i].offset;
      const int64_t depth = s.segments[i].depth;
      for (int64_t k = 0; k < depth; k += L) {
        store_upto(to + k, load_upto(to + k, depth - k) + load_upto(product + k, depth - k), depth - k);
      }
      product += depth;
    }
  }

  void put(const T* image, int64_t b, const MaskedConv2dBackward<T>& to) const {
    const int64_t channels = plan.channels, width_of = plan.out_width + plan.halo_w;
    const ImageStrides strides = to.grad_x_channels_last ? ImageStrides{0, 1, plan.width * channels, channels}
                                                         : ImageStrides{0, plan.height * plan.width, plan.width, 1};
    T* data = to.grad_x + b * channels * plan.height * plan.width;
    for (int64_t r = 0; r < plan.height; ++r) {
      const int64_t q = r - plan.top;
      for (int64_t s = 0; s < plan.width; ++s) {
        const int64_t z = s - plan.left;
        const bool inside = q >= 0 && q < plan.out_height + plan.halo_h && z >= 0 && z < width_of;
        const T* from = image + (inside ? q * plan.row_pitch + z * channels : 0);
        for (int64_t c = 0; c < channels; ++c) {
          data[plan.channel_order[c] * strides.channel + r * strides.row + s * strides.column] =
              inside ? from[c] : T(0);
        }
      }
    }
  }

  void run(const MaskedConv2dBackward<T>& b, const Executor& executor) const {
    const MaskedConv2d<T>& p = b.forward;
    pack(p);
    const Flat<T> grad(plan, b);
    for_units(executor, p.batch, [&](int64_t thread, int64_t image) {
      const int64_t size = plan.buffer_size(plan.strip);
      T* sums = images + thread * round_up(size, 64);
      T* buffer = flat + thread * Flat<T>::size(p, strip);
      T* product = products + thread * round_up(kTileRows * width, 64);
      clear(sums, size);
      for (int64_t row = 0; row < p.out_height; row += strip) {
        const Range rows = {row, minimum(p.out_height, row + strip)};
        const T* from = grad.rows(image, rows, buffer);
        const int64_t *base = plan.base + row * p.out_width, pixels = (rows.end - rows.begin) * p.out_width;
        for (int64_t i = 0; i < plan.section_count; ++i) {
          const Section& s = plan.sections[i];
          for_tiles(0, pixels, [&](int64_t pixel, int count) {
            const T* address[kTileRows];
            for (int r = 0; r < count; ++r) address[r] = from + (pixel + r) * grad.pitch + s.column;
            tile(s, count, address, product);
            for (int r = 0; r < count; ++r) add(s, product + r * width, sums + base[pixel + r]);
          });
        }
      }
      put(sums, image, b);
    });
  }
};

// The gradients of weight and bias.
template <class T>
struct WeightGradient {
  Plan<T> plan;  // forward
  int64_t strips, parts, sums_size, bias_size;
  T *sums, *biases, *buffers, *flat;

  WeightGradient(const MaskedConv2d<T>& p, int threads, Workspace& w) : plan(p, false, strip_of(p), w) {
    strips = plan.strips();
    sums_size = round_up(plan.packed_size, 64);
    bias_size = round_up(p.outputs, 64);
    const auto bytes = maximum(1, sums_size * static_cast<int64_t>(sizeof(T)));
    parts = minimum(p.batch * strips, maximum(kLeastParts, minimum(kParts, kPartBytes / bytes)));
    sums = w.take<T>((w.base == nullptr ? kParts : parts) * sums_size);
    biases = w.take<T>(kParts * bias_size);
    buffers = w.take<T>(threads * round_up(plan.buffer_size(plan.strip), 64));
    flat = w.take<T>(threads * Flat<T>::size(p, plan.strip));
  }

  // The same for every number of threads.
  static int64_t strip_of(const MaskedConv2d<T>& p) {
    Workspace none{nullptr};
    const Plan<T> plan(p, false, 0, none);
    return minimum(plan.strip, rows_of_grad(p));
  }

  void run(const MaskedConv2dBackward<T>& b, const Executor& executor) const {
    const MaskedConv2d<T>& p = b.forward;
    const Flat<T> grad(plan, b);
    const Images<T> x = images_of_x(p, plan.interleaved ? plan.channel_order : nullptr);
    const int64_t shares = ceil_div(executor.threads, parts);  // of the tiles of a part
    for_units(executor, parts * shares, [&](int64_t thread, int64_t item) {
      const int64_t part = item / shares, share = item % shares;
      T* buffer = buffers + thread * round_up(plan.buffer_size(plan.strip), 64);
      T* copy = flat + thread * Flat<T>::size(p, plan.strip);
      const Range units = split(p.batch * strips, parts, part);
      for (int64_t unit = units.begin; unit < units.end; ++unit) {
        const Range rows = plan.rows_of(unit % strips);
        const int64_t pixels = (rows.end - rows.begin) * p.out_width;
        const T* from = grad.rows(unit / strips, rows, copy);
        if (b.grad_weight != nullptr) fill(plan, x, unit / strips, rows, buffer);
        for (int64_t pixel = 0; pixel < pixels; pixel += kSumPixels) {
          const int64_t n = minimum(kSumPixels, pixels - pixel);
          const bool first = unit == units.begin && pixel == 0;
          const T* columns = from + pixel * grad.pitch;
          if (b.grad_bias != nullptr && share == 0) add_bias(n, columns, grad.pitch, first, biases + part * bias_size);
          if (b.grad_weight != nullptr) {
            add_weights(n, buffer, plan.base + pixel, columns, grad.pitch, first, {share, shares},
                        sums + part * sums_size);
          }
        }
      }
    });
    if (b.grad_bias != nullptr) put_bias(b.grad_bias);
    if (b.grad_weight != nullptr) put_weight(p, b.grad_weight, executor);
  }

  void add_bias(int64_t n, const T* from, int64_t pitch, bool first, T* to) const {
    constexpr int L = kLanes<T>;
    for (int64_t c = 0; c < plan.columns; c += L) {
      const int64_t valid = plan.columns - c;
      Vec<T> even{}, odd{};
      int64_t k = 0;
      for (; k + 2 <= n; k += 2) {
        even += load_upto(from + k * pitch + c, valid);
        odd += load_upto(from + (k + 1) * pitch + c, valid);
      }
      if (k < n) even += load_upto(from + k * pitch + c, valid);
      store(to + c, first ? even + odd : load(to + c) + (even + odd));
    }
  }

  // Tile i of those of a block belongs to share i % shares (a pair: share, shares).
  void add_weights(int64_t n, const T* x, const int64_t* base, const T* columns, int64_t pitch, bool first, Range share,
                   T* to) const {
    int64_t index = 0;
    for (int64_t i = 0; i < plan.panel_count; ++i) {
      const Panel& panel = plan.panels[i];
      T* at = to + panel.packed;
      for (int64_t j = 0; j < panel.section->segment_count; ++j) {
        const Run& segment = panel.section->segments[j];
        for_tiles(0, segment.depth, [&](int64_t row, int count) {
          if (index++ % share.end == share.begin) {
            with_tile(count, panel.vectors, [&](auto rows, auto width) {
              multiply_pixels<T, decltype(rows)::value, decltype(width)::value>(
                  n, x + segment.offset + row, base, columns + panel.column, pitch, first, at);
            });
          }
          at += count * panel.vectors * kLanes<T>;
        });
      }
    }
  }

  void put_bias(T* to) const {
    for (int64_t c = 0; c < plan.columns; ++c) {
      T sum = biases[c];
      for (int64_t part = 1; part < parts; ++part) sum += biases[part * bias_size + c];
      to[plan.column_order[c]] = sum;
    }
  }

  void put_weight(const MaskedConv2d<T>& p, T* to, const Executor& executor) const {
    constexpr int L = kLanes<T>;
    parallel_ranges(executor, ceil_div(plan.packed_size, L), kBlock, [&](int64_t first, int64_t last) {
      for (int64_t i = first * L; i < last * L; i += L) {
        Vec<T> sum = load(sums + i);
        for (int64_t part = 1; part < parts; ++part) sum += load(sums + part * sums_size + i);
        store(sums + i, sum);
      }
    });
    const int64_t each = p.inputs / p.groups * p.kernel_h * p.kernel_w;
    parallel_ranges(executor, plan.panel_count * kPanelVectors, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Panel& panel = plan.panels[i / kPanelVectors];
        const int64_t vector = i % kPanelVectors, pitch = panel.vectors * L;
        const T* from = sums + panel.packed + vector * L;
        for (int64_t n = 0; n < minimum(L, panel.valid - vector * L); ++n) {
          const int64_t column = plan.column_order[panel.column + vector * L + n];
          clear(to + column * each, each);
          for_weights(plan, p, *panel.section, column, [&](int64_t k, int64_t at) { to[at] = from[k * pitch + n]; });
        }
      }
    });
  }
};

// One after the other, in the same workspace.
template <class T>
void backward(const MaskedConv2dBackward<T>& b, char* workspace, const Executor& all) {
  const MaskedConv2d<T>& p = b.forward;
  const Executor executor = worth_waking(p, all);
  if (b.grad_x != nullptr) {
    Workspace w{workspace};
    if (Scattered<T>::serves(p)) {
      Scattered<T>(p, all.threads, w).run(b, executor);
    } else {
      const Forward<T> f(p, true, all.threads, w);
      pack(f.plan, p, f.packed, executor);
      const Images<T> grad{b.grad_y,     b.grad_y_strides, p.outputs,
                           p.out_height, p.out_width,      f.plan.interleaved ? f.plan.channel_order : nullptr};
      convolve(f.plan, grad, p.batch, f.packed, {b.grad_x, b.grad_x_channels_last, nullptr}, f.buffers, executor);
    }
  }
  if (b.grad_weight != nullptr || b.grad_bias != nullptr) {
    Workspace w{workspace};
    WeightGradient<T>(p, all.threads, w).run(b, executor);
  }
}

template <class T>
size_t backward_workspace(const MaskedConv2dBackward<T>& b, int threads) {
  size_t most = 0;
  const auto measure = [&](auto make) {
    Workspace w{nullptr};
    make(w);
    if (w.used > most) most = w.used;
  };
  if (b.grad_x != nullptr) {
    if (Scattered<T>::serves(b.forward)) {
      measure([&](Workspace& w) { Scattered<T>(b.forward, threads, w); });
    } else {
      measure([&](Workspace& w) { Forward<T>(b.forward, true, threads, w); });
    }
  }
  if (b.grad_weight != nullptr || b.grad_bias != nullptr) {
    measure([&](Workspace& w) { WeightGradient<T>(b.forward, threads, w); });
  }
  return most;
}

}  // namespace

template <class T>
KernelOf<MaskedConv2d<T>> masked_conv2d_kernel() {
  return {[](const MaskedConv2d<T>& p, int threads) {
            Workspace w{nullptr};
            Forward<T>(p, false, threads, w);
            return w.used;
          },
          &forward<T>};
}
template <class T>
KernelOf<MaskedConv2dBackward<T>> masked_conv2d_backward_kernel() {
  return {&backward_workspace<T>, &backward<T>};
}
template KernelOf<MaskedConv2d<float>> masked_conv2d_kernel<float>();
template KernelOf<MaskedConv2d<double>> masked_conv2d_kernel<double>();
template KernelOf<MaskedConv2dBackward<float>> masked_conv2d_backward_kernel<float>();
template KernelOf<MaskedConv2dBackward<double>> masked_conv2d_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse
