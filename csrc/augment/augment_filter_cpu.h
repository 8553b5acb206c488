// The filters of augmentation on the CPU: the shrinking that antialias asks for, and the blur, which keeps a
// ring of rows. Part of augment_cpu.cpp, compiled once per instruction set.
#pragma once
#include "augment_colour.h"
#include "augment_filter.h"
#include "augment_pixels_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

// ---- antialiasing

// The filter of every pixel of the shrunken image along one axis.
template <class A>
struct Filters {
  int64_t taps;    // room for the weights of a pixel
  int32_t* range;  // [first, last) of the source's pixels, for each pixel
  A* weight;       // `taps` for each pixel, not divided by their sum
  A* total;        // that sum, for each pixel

  static int64_t most_taps(const Filter<A>& filter) {
    return 2 * ((filter.support + kOne - 1) >> kFractionBits) + 1;
  }
  static int64_t bytes(const Filter<A>& filter, int64_t size) {
    const int64_t of_pixel = 2 * int64_t(sizeof(int32_t)) + (most_taps(filter) + 1) * int64_t(sizeof(A));
    return rounded_up(size * of_pixel, kCacheLine);
  }

  Filters(void* memory, const Filter<A>& filter, int64_t size)
      : taps(most_taps(filter)),
        range(static_cast<int32_t*>(memory)),
        weight(reinterpret_cast<A*>(range + 2 * size)),
        total(weight + size * taps) {
    for (int64_t i = 0; i < size; ++i) {
      const auto pixels = filter.range(i);
      for (int32_t j = pixels.first; j < pixels.last; ++j)
        weight[i * taps + j - pixels.first] = filter.weight(pixels, j);
      range[2 * i] = pixels.first;
      range[2 * i + 1] = pixels.last;
      total[i] = filter.total(pixels);
    }
  }
};

template <class A>
Filter<A> filter_of(const AugmentArgs& a, const Shrink& s, int axis, int64_t n) {
  return Filter<A>(s, axis, n, a.interpolation, a.padding);
}
template <class A>
int64_t filters_bytes(const AugmentArgs& a, const Shrink& s) {
  return Filters<A>::bytes(filter_of<A>(a, s, 0, 1), s.size[0]) +
         Filters<A>::bytes(filter_of<A>(a, s, 1, 1), s.size[1]);
}
int64_t filters_bytes(const AugmentArgs& a, const Shrink& s) {
  return accumulated_bytes(a) == 8 ? filters_bytes<double>(a, s) : filters_bytes<float>(a, s);
}
// f(shrink) for each sample that shrinks.
template <class F>
void for_each_shrink(const AugmentArgs& a, F f) {
  if (!a.antialias) return;
  for (int64_t i = 0; i < a.batch; ++i)
    if (const Shrink s = shrink_of(a, i); s.on) f(s);
}

// Makes the shrunken image of a sample, and takes its gradient back. `memory` has filters_bytes.
template <class T, class A>
struct Shrinker {
  const AugmentArgs& a;
  const Shrink& s;
  Source<T> source;
  int64_t pixel_stride;
  Filters<A> columns, rows;

  Shrinker(const AugmentArgs& a, const Shrink& s, int64_t sample, void* memory)
      : a(a),
        s(s),
        source(source_of<T>(a, nullptr, sample)),
        pixel_stride(a.in_stride[3]),
        columns(memory, filter_of<A>(a, s, 0, source.width), s.size[0]),
        rows(static_cast<char*>(memory) + Filters<A>::bytes(filter_of<A>(a, s, 0, 1), s.size[0]),
             filter_of<A>(a, s, 1, source.height), s.size[1]) {
    // source_of counts neighbours in memory; here the pixels of a row are pixel_stride apart.
    source.data += window_of(a, sample).left * (pixel_stride - 1);
  }

  // Writes rows [begin, end) of the shrunken image to planes of size[1] * size[0]. `line` has room for a row
  // of the source.
  void make_rows(int64_t begin, int64_t end, A* out, A* line) const {
    const int64_t width = s.size[0];
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t y = begin; y < end; ++y) {
        A* to = out + (c * s.size[1] + y) * width;
        const int32_t first = rows.range[2 * y], last = rows.range[2 * y + 1];
        const A fill = a.padding == Padding::kFill ? A(a.constant(kFillRow, c)) : A(0);
        if (last > first) column_sums(source.plane(c), first, last, rows.weight + y * rows.taps, line);
        for (int64_t x = 0; x < width; ++x) {
          const int32_t left = columns.range[2 * x], right = columns.range[2 * x + 1];
          const A* weight = columns.weight + x * columns.taps;
          A sum = 0;
          for (int32_t j = left; j < right; ++j) sum += weight[j - left] * line[j];
          to[x] = last > first && right > left ? sum / (rows.total[y] * columns.total[x]) : fill;
        }
      }
  }

  // Adds the gradient of a plane of the shrunken image to that of the window, whose rows are in_width apart.
  void add_gradient(const A* grad, A* in_grad, A* line) const {
    for (int64_t y = 0; y < s.size[1]; ++y) {
      if (rows.range[2 * y] == rows.range[2 * y + 1]) continue;
      for (int64_t x = 0; x < source.width; ++x) line[x] = 0;
      for (int64_t x = 0; x < s.size[0]; ++x) {
        const int32_t left = columns.range[2 * x], right = columns.range[2 * x + 1];
        const A share = grad[y * s.size[0] + x] / (rows.total[y] * columns.total[x]);
        for (int32_t j = left; j < right; ++j) line[j] += columns.weight[x * columns.taps + j - left] * share;
      }
      for (int32_t i = rows.range[2 * y]; i < rows.range[2 * y + 1]; ++i)
        for (int64_t x = 0; x < source.width; ++x)
          in_grad[i * a.in_width + x] += rows.weight[y * rows.taps + i - rows.range[2 * y]] * line[x];
    }
  }

 private:
  // line[x] = the weighted sum of column x of the source over rows [first, last).
  void column_sums(const T* plane, int32_t first, int32_t last, const A* weight, A* line) const {
    for (int32_t i = first; i < last; ++i) {
      const T* from = plane + i * source.row_stride;
      const A w = weight[i - first];
      int64_t x = 0;
      if (pixel_stride == 1)
        for (; x + Vec<A>::kLanes <= source.width; x += Vec<A>::kLanes) {
          const Vec<A> part = load(from + x) * Vec<A>(w);
          store(line + x, i == first ? part : load(line + x) + part);
        }
      for (; x < source.width; ++x) {
        const A part = A(to_float(from[x * pixel_stride])) * w;
        line[x] = i == first ? part : line[x] + part;
      }
    }
  }
};

// ---- blur

// The weighted sum of `count` lines. A kCount that is not 0 is that number, known to the compiler, which then
// keeps pointers and weights in registers.
template <int kCount, class A>
void weighted_sum(const A* const* line, const A* weight, int64_t count, int64_t n, A* out) {
  using V = Vec<A>;
  if (kCount) count = kCount;
  const A* held[kCount ? kCount : 1];
  V held_weight[kCount ? kCount : 1];
  for (int k = 0; k < kCount; ++k) {
    held[k] = line[k];
    held_weight[k] = V(weight[k]);
  }
  for (int64_t x = 0; x < n; x += V::kLanes) {
    V sum(0);
    for (int64_t k = 0; k < count; ++k)
      sum = sum + (kCount ? held_weight[k] * load(held[k] + x) : V(weight[k]) * load(line[k] + x));
    store(out + x, sum);
  }
}
template <class A>
void weighted_sum(const A* const* line, const A* weight, int64_t count, int64_t n, A* out) {
  count == 3   ? weighted_sum<3>(line, weight, count, n, out)
  : count == 5 ? weighted_sum<5>(line, weight, count, n, out)
               : weighted_sum<0>(line, weight, count, n, out);
}

// Where a thread keeps its rows, in values from the beginning of its memory. The channels of a row lie
// `pitch` apart, with room for the blur's reflected pixels between them, and before the first.
struct RowsLayout {
  int64_t pitch, margin, row_values;
  int64_t at_once;  // rows that are made before the first of them is blurred
  int64_t ring_rows;

  explicit RowsLayout(const AugmentArgs& a) {
    pitch = padded_width(a.out_width + (a.blur ? a.blur_width - 1 : 0));
    margin = a.blur ? padded_width(a.blur_width / 2) : 0;
    row_values = a.channels * pitch;
    // A load of what two stores wrote waits until both have reached the cache. Therefore narrow rows must not
    // be blurred sideways right after they were written.
    at_once = most(int64_t(1), 256 / padded_width(a.out_width));
    ring_rows = a.blur_height + at_once - 1;
  }
  int64_t ring() const { return margin + at_once * row_values; }
  int64_t weights() const { return ring() + ring_rows * row_values + kPad; }
  int64_t lines_bytes(const AugmentArgs& a) const {  // before the pointers to lines
    return (weights() + a.blur_width + a.blur_height) * accumulated_bytes(a) / 8 * 8 + 8;
  }
  int64_t bytes(const AugmentArgs& a) const {
    if (!a.blur) return row_values * accumulated_bytes(a);
    return lines_bytes(a) + most(a.blur_width, a.blur_height) * int64_t(sizeof(void*));
  }
};

// Blurs the rows of a sample, which are made when they are first wanted. The ring holds those that the next
// output row may want, blurred sideways: row y is its row y mod ring_rows.
template <class A>
struct BlurredRows {
  using V = Vec<A>;
  const AugmentArgs& a;
  RowsLayout layout;
  int64_t radius, end;
  int64_t next;    // the row that is made next
  int64_t values;  // of a row, all channels and the room between them
  A* row;          // first the rows that are made at once, then the result
  A *ring, *weight;
  const A** line;  // what weighted_sum adds up

  // For rows [begin, end), in `memory` of layout.bytes.
  BlurredRows(const AugmentArgs& a, int64_t sample, int64_t begin, int64_t end, void* memory)
      : a(a), layout(a), radius(a.blur_height / 2), end(end), next(most(int64_t(0), begin - radius)) {
    values = layout.row_values - layout.pitch + a.out_width;
    A* start = static_cast<A*>(memory);
    row = start + layout.margin;
    ring = start + layout.ring();
    weight = start + layout.weights();
    line = reinterpret_cast<const A**>(static_cast<char*>(memory) + layout.lines_bytes(a));
    const int64_t weights = a.blur_width + a.blur_height;
    for (int64_t k = 0; k < weights; ++k) weight[k] = A(a.blur[weights * sample + k]);
  }

  // Row y, blurred; rows are asked for in order. make(y, row) makes one before the blur.
  template <class F>
  A* blurred(int64_t y, F make) {
    while (next <= least(y + radius, a.out_height - 1)) add_rows(make);
    for (int64_t k = 0; k < a.blur_height; ++k) line[k] = in_ring(mirrored(y + k - radius, a.out_height));
    weighted_sum(line, weight + a.blur_width, a.blur_height, values, row);
    if (quantises(a))
      for (int64_t x = 0; x < values; x += V::kLanes) store(row + x, quantised(load(row + x), V(A(255))));
    return row;
  }

 private:
  A* in_ring(int64_t y) const { return ring + y % layout.ring_rows * layout.row_values; }

  // Makes the next rows, reflects their ends, and blurs them sideways into the ring.
  template <class F>
  void add_rows(F make) {
    const int64_t first = next, n = a.out_width, width = a.blur_width;
    const int64_t last = least(least(next + layout.at_once, a.out_height), end + radius);
    for (; next < last; ++next) make(next, row + (next - first) * layout.row_values);
    for (int64_t c = 0; c < (last - first) * a.channels; ++c) {
      A* across = row + c * layout.pitch;
      for (int64_t d = 1; d <= width / 2; ++d) {
        across[-d] = across[mirrored(-d, n)];
        across[n - 1 + d] = across[mirrored(n - 1 + d, n)];
      }
    }
    for (int64_t y = first; y < last; ++y) {
      for (int64_t k = 0; k < width; ++k) line[k] = row + (y - first) * layout.row_values + k - width / 2;
      weighted_sum(line, weight, width, values, in_ring(y));
    }
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
