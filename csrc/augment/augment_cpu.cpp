// Augmentation on the CPU, formulas in augment_math.h. Each row passes through buffers in the first-level
// cache: warped (vectors whose pixels all lie inside the image take neighbours in pairs, by gathers or from
// rows held in registers, without a look at the border), coloured, blurred from a ring of rows, normalised,
// and written once. Only contrast, which needs the mean of the image as it is by then, keeps a whole sample.
// Neither multiply_add nor a reduction in another order: the bits are the same on every instruction set.
// Bytes per value: the source's, read once but for rows that the cache has lost, and the output's, written
// once.
#include "augment_warp_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

// ---- antialiasing

// The filter of every grid pixel along one axis.
template <class A>
struct Filters {
  int64_t taps;    // at most
  int32_t* range;  // [first, last) of the source's pixels
  A* weight;       // before their sum is brought to 1
  A* total;        // that sum

  static int64_t most_taps(const Filter<A>& filter) {
    return 2 * ((filter.support + kOne - 1) >> kFractionBits) + 1;
  }
  static int64_t bytes(const Filter<A>& filter, int64_t size) {
    return (size * (2 * int64_t(sizeof(int32_t)) + (most_taps(filter) + 1) * int64_t(sizeof(A))) + 63) / 64 *
           64;
  }

  Filters(void* memory, const Filter<A>& filter, int64_t size)
      : taps(most_taps(filter)),
        range(static_cast<int32_t*>(memory)),
        weight(reinterpret_cast<A*>(range + 2 * size)),
        total(weight + size * taps) {
    for (int64_t i = 0; i < size; ++i) {
      const auto span = filter.span(i);
      for (int32_t j = span.first; j < span.last; ++j)
        weight[i * taps + j - span.first] = filter.weight(span, j);
      range[2 * i] = span.first;
      range[2 * i + 1] = span.last;
      total[i] = filter.total(span);
    }
  }
};

int64_t accumulated(const AugmentArgs& a) { return a.in_type == PixelType::kFloat64 ? 8 : 4; }
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
  return accumulated(a) == 8 ? filters_bytes<double>(a, s) : filters_bytes<float>(a, s);
}

template <class T, class A>
struct Resampler {
  const AugmentArgs& a;
  const Shrink& s;
  Source<T> source;
  int64_t pixel_stride;
  Filters<A> columns, rows;

  Resampler(const AugmentArgs& a, const Shrink& s, int64_t sample, void* memory)
      : a(a),
        s(s),
        source(source_of<T>(a, nullptr, sample)),
        pixel_stride(a.in_stride[3]),
        columns(memory, filter_of<A>(a, s, 0, source.width), s.size[0]),
        rows(static_cast<char*>(memory) + Filters<A>::bytes(filter_of<A>(a, s, 0, 1), s.size[0]),
             filter_of<A>(a, s, 1, source.height), s.size[1]) {
    source.data += window_of(a, sample).left * (pixel_stride - 1);
  }

  // Rows [begin, end) of the grid, planes of size[1] * size[0]; `line` has room for a row of the source.
  void run(int64_t begin, int64_t end, A* out, A* line) const {
    const int64_t width = s.size[0];
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t y = begin; y < end; ++y) {
        A* to = out + (c * s.size[1] + y) * width;
        const int32_t first = rows.range[2 * y], last = rows.range[2 * y + 1];
        const A fill = a.padding == Padding::kFill ? A(a.constants[c]) : A(0);
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
  // Adds the grid's gradient to that of the source's window, whose rows are in_width apart.
  void transposed(const A* grad, A* in_grad, A* line) const {
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
};

// ---- a sample's rows, made by the warp that its type asks for

template <class A>
struct RowMaker {
  const void* warp;
  void (*make)(const void* warp, int64_t y, int64_t n, A* out, int64_t pitch);
  void operator()(int64_t y, int64_t n, A* out, int64_t pitch) const { make(warp, y, n, out, pitch); }
};
template <class T, class A>
RowMaker<A> maker_of(const Warp<T, A>& warp) {
  return {&warp, [](const void* w, int64_t y, int64_t n, A* out, int64_t pitch) {
            static_cast<const Warp<T, A>*>(w)->row(y, n, out, pitch);
          }};
}

// f(row maker) with the sample's warp alive.
template <class A, class F>
void with_rows(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, F f) {
  const Shrink shrink = shrink_of(a, sample);
  if (shrink.on) {
    const int64_t width = shrink.size[0], height = shrink.size[1];
    const Source<A> grid = {
        static_cast<const A*>(scratch.source), width * height, width, height, width, a.channels};
    const Warp<A, A> warp(a, grid, shrink.rest);
    return f(maker_of(warp));
  }
  const double* matrix = a.matrices ? a.matrices + 6 * sample : nullptr;
  with_pixels(a.in_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<typename Accumulate<T>::type, A>) {
      const Warp<T, A> warp(a, source_of<T>(a, scratch.source, sample), matrix_of_sample(matrix, a));
      f(maker_of(warp));
    }
  });
}

// ---- colour

template <class A>
A bound_of(const AugmentArgs& a) {
  return a.in_type == PixelType::kUInt8 ? A(255) : A(1);
}
template <class V, class A>
ColourFactors<V> factors_of(const AugmentArgs& a, int64_t sample, A mean) {
  if (!a.colour_steps) return {};
  return {a.colour + kColourColumns * sample, bound_of<A>(a), mean};
}

template <class A>
struct Colour {
  using V = Vec<A>;
  int steps;
  int64_t channels;
  ColourFactors<V> factors;

  Colour(const AugmentArgs& a, int64_t sample, A mean)
      : steps(a.colour_steps), channels(a.channels), factors(factors_of<V>(a, sample, mean)) {}

  // The chosen steps of n pixels, from one row buffer to another.
  template <bool kQuantise>
  FR_INLINE void row(int chosen, const A* in, int64_t in_pitch, A* out, int64_t out_pitch, int64_t n) const {
    for (int64_t c = 0; c < (channels == 3 ? 0 : channels); ++c)
      for (int64_t x = 0; x < n; x += V::kLanes) {
        V p = load(in + c * in_pitch + x);
        colour_pixel<kQuantise>(factors, chosen, p);
        store(out + c * out_pitch + x, p);
      }
    for (int64_t x = 0; x < (channels == 3 ? n : 0); x += V::kLanes) {
      V r = load(in + x), g = load(in + in_pitch + x), b = load(in + 2 * in_pitch + x);
      colour_pixel<kQuantise>(factors, chosen, r, g, b);
      store(out + x, r);
      store(out + out_pitch + x, g);
      store(out + 2 * out_pitch + x, b);
    }
  }
  void row(bool quantise, int chosen, const A* in, int64_t in_pitch, A* out, int64_t out_pitch,
           int64_t n) const {
    quantise ? row<true>(chosen, in, in_pitch, out, out_pitch, n)
             : row<false>(chosen, in, in_pitch, out, out_pitch, n);
  }
};

template <class A>
A mean_of_sum(double sum, int64_t count) {
  const A high = A(sum);
  return mean_of(high, A(sum - double(high)), A(count));
}
template <class A>
double grey_sum(const A* in, int64_t pitch, int64_t channels, int64_t n, bool quantise) {
  using V = Vec<A>;
  V sum(0);
  for (int64_t x = 0; x < n; x += V::kLanes) {
    V grey = load(in + x);
    if (channels == 3) {
      const V g = load(in + pitch + x), b = load(in + 2 * pitch + x);
      grey = quantise ? grey_of<true>(grey, g, b) : grey_of<false>(grey, g, b);
    }
    sum = sum + (n - x < V::kLanes ? select(V::first(int(n - x)), grey, V(0)) : grey);
  }
  return double(sum.sum());
}

// ---- a sample, row by row

bool quantises(const AugmentArgs& a) { return a.out_type == PixelType::kUInt8; }
// A row's channels lie `pitch` apart, with room for the blur's reflected pixels between them, and before the
// first.
int64_t pitch_of(const AugmentArgs& a) { return padded_width(a.out_width + (a.blur ? a.blur_width - 1 : 0)); }
int64_t margin(const AugmentArgs& a) { return a.blur ? padded_width(a.blur_width / 2) : 0; }
// Rows that are made before the first of them is blurred. A load that takes parts of two stores waits for
// both, so that narrow rows must not be blurred sideways right after they were written.
int64_t blur_batch(const AugmentArgs& a) { return most(int64_t(1), 256 / padded_width(a.out_width)); }
int64_t blur_slots(const AugmentArgs& a) { return a.blur_height + blur_batch(a) - 1; }
int64_t blur_lines_offset(
    const AugmentArgs& a) {  // in a thread's memory: margin, rows, the ring, the weights, then pointers
  const int64_t rows = (blur_batch(a) + blur_slots(a)) * a.channels * pitch_of(a);
  return (margin(a) + rows + kPad + a.blur_width + a.blur_height) * accumulated(a) / 8 * 8 + 8;
}

template <class A>
void warped_row(const AugmentArgs& a, const RowMaker<A>& maker, int64_t y, A* out, int64_t pitch) {
  maker(y, a.out_width, out, pitch);
  if (!quantises(a) || !a.matrices) return;
  const Vec<A> bound(A(255));
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t x = 0; x < a.out_width; x += Vec<A>::kLanes)
      store(out + c * pitch + x, quantised(load(out + c * pitch + x), bound));
}

template <class A>
void prepare_rows(const AugmentArgs& a, const AugmentScratch& scratch, const RowMaker<A>& maker,
                  int64_t sample, int64_t begin, int64_t end) {
  const int64_t width = padded_width(a.out_width), pitch = a.out_height * width;
  const Colour<A> colour(a, sample, 0);
  double* sums = static_cast<double*>(scratch.sums);
  for (int64_t y = begin; y < end; ++y) {
    A* row = static_cast<A*>(scratch.image) + y * width;
    warped_row(a, maker, y, row, pitch);
    if (a.colour_steps & kBrightness)
      colour.row(quantises(a), kBrightness, row, pitch, row, pitch, a.out_width);
    sums[y] = grey_sum(row, pitch, a.channels, a.out_width, quantises(a));
  }
}

template <class A, class T>
void emit_row(const AugmentArgs& a, int64_t sample, int64_t y, A* row, int64_t pitch, T* out) {
  using V = Vec<A>;
  const int64_t n = a.out_width;
  int64_t box_begin = 0, box_end = 0;
  if (a.boxes) {
    const int64_t* box = a.boxes + 4 * sample;
    if (y >= box[0] && y - box[0] < box[2]) {
      box_begin = clamped(box[1], int64_t(0), n);
      box_end = clamped(box[1] + least(box[3], n), box_begin, n);
    }
  }
  const bool normalise = a.normalise, plain = a.out_stride[3] == 1 && box_begin == box_end;
  T* line = out + sample * a.out_stride[0] + y * a.out_stride[2];
  for (int64_t c = 0; c < a.channels; ++c, row += pitch, line += a.out_stride[1]) {
    const V scale(A(a.constants[2 * a.channels + c])), shift(A(a.constants[3 * a.channels + c]));
    int64_t x = 0;
    if (plain)
      for (; x + V::kLanes <= n; x += V::kLanes) {
        const V p = load(row + x);
        store(line + x, normalise ? p * scale + shift : p);
      }
    if (x == n) continue;
    if (a.normalise)
      for (int64_t i = x; i < n; i += V::kLanes) store(row + i, load(row + i) * scale + shift);
    for (int64_t i = box_begin; i < box_end; ++i) row[i] = A(a.constants[a.channels + c]);
    for (; x < n; ++x) from_float(row[x], line + x * a.out_stride[3]);
  }
}

// The weighted sum of `count` lines, kCount of them if that is not 0.
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

template <class A, class T>
void finish_rows(const AugmentArgs& a, const AugmentScratch& scratch, const RowMaker<A>& maker,
                 int64_t sample, int64_t begin, int64_t end, T* out) {
  using V = Vec<A>;
  const int64_t n = a.out_width, pitch = pitch_of(a), image_width = padded_width(n),
                image_pitch = a.out_height * image_width;
  const bool has_image = scratch.image != nullptr, quantise = quantises(a);
  double sum = 0;
  if (has_image) {
    for (int64_t y = 0; y < a.out_height; ++y) sum += static_cast<const double*>(scratch.sums)[y];
  }
  const Colour<A> colour(a, sample, mean_of_sum<A>(sum, a.out_height * n));
  const int steps = has_image ? a.colour_steps & ~kBrightness : a.colour_steps;
  const auto coloured_row = [&](int64_t y, A* row) {
    const A* image = static_cast<const A*>(scratch.image) + y * image_width;
    if (!has_image) warped_row(a, maker, y, row, pitch);
    if (steps)
      colour.row(quantise, steps, has_image ? image : row, has_image ? image_pitch : pitch, row, pitch, n);
  };
  A* row = static_cast<A*>(scratch.rows) + margin(a);
  if (!a.blur) {
    if constexpr (std::is_same_v<T, A>)  // nothing but geometry: no detour through a buffer
      if (!steps && !has_image && !a.normalise && !a.boxes && a.out_stride[3] == 1 && n % V::kLanes == 0) {
        for (int64_t y = begin; y < end; ++y)
          maker(y, n, out + sample * a.out_stride[0] + y * a.out_stride[2], a.out_stride[1]);
        return;
      }
    for (int64_t y = begin; y < end; ++y) {
      coloured_row(y, row);
      emit_row(a, sample, y, row, pitch, out);
    }
    return;
  }
  // The ring holds the rows blurred sideways that the next output row may want, row y in slot y mod its size.
  const int64_t width = a.blur_width, height = a.blur_height, radius = height / 2,
                row_values = a.channels * pitch;
  const int64_t batch = blur_batch(a), slots = blur_slots(a),
                span = row_values - pitch + n;  // all channels at once
  A *ring = row + batch * row_values, *weight = ring + slots * row_values + kPad;
  for (int64_t k = 0; k < width + height; ++k) weight[k] = A(a.blur[(width + height) * sample + k]);
  const A** line =
      reinterpret_cast<const A**>(reinterpret_cast<char*>(row - margin(a)) + blur_lines_offset(a));
  int64_t next = most(int64_t(0), begin - radius);
  for (int64_t y = begin; y < end; ++y) {
    while (next <= least(y + radius, a.out_height - 1)) {
      const int64_t first = next, last = least(least(next + batch, a.out_height), end + radius);
      for (; next < last; ++next) coloured_row(next, row + (next - first) * row_values);
      for (int64_t c = 0; c < (last - first) * a.channels; ++c) {
        A* across = row + c * pitch;
        for (int64_t d = 1; d <= width / 2; ++d) {
          across[-d] = across[mirrored(-d, n)];
          across[n - 1 + d] = across[mirrored(n - 1 + d, n)];
        }
      }
      for (int64_t i = first; i < last; ++i) {
        for (int64_t k = 0; k < width; ++k) line[k] = row + (i - first) * row_values + k - width / 2;
        weighted_sum(line, weight, width, span, ring + i % slots * row_values);
      }
    }
    for (int64_t k = 0; k < height; ++k)
      line[k] = ring + mirrored(y + k - radius, a.out_height) % slots * row_values;
    weighted_sum(line, weight + width, height, span, row);
    for (int64_t x = 0; x < (quantise ? span : 0); x += V::kLanes)
      store(row + x, quantised(load(row + x), V(A(255))));
    emit_row(a, sample, y, row, pitch, out);
  }
}

// ---- backward, a sample at a time

template <int kChannels, class A>
void colour_backward(const AugmentArgs& a, int64_t sample, const A* image, A* grad) {
  const int64_t pixels = a.out_height * a.out_width, planes = a.channels / kChannels;
  A mean = 0;
  if (a.colour_steps & kContrast) {
    double sum = 0;
    const ColourFactors<A> factors = factors_of<A>(a, sample, A(0));
    for (int64_t i = 0; i < pixels; ++i) {
      A p[kChannels];
      for (int c = 0; c < kChannels; ++c) {
        p[c] = image[c * pixels + i];
        colour_pixel<false>(factors, a.colour_steps & kBrightness, p[c]);
      }
      sum += double(kChannels == 3 ? grey_of<false>(p[0], p[kChannels / 2], p[kChannels - 1]) : p[0]);
    }
    mean = mean_of_sum<A>(sum, pixels);
  }
  const ColourFactors<A> factors = factors_of<A>(a, sample, mean);
  double through_mean = 0;
  // Planes that are coloured alone, unless they are red, green and blue; with contrast there is but one.
  for (int last = 0; last < 2; ++last) {
    const A mean_share =
        A((1 - a.colour[kColourColumns * sample + kContrastColumn]) * through_mean / double(pixels));
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t i = plane * pixels; i < (plane + 1) * pixels; ++i) {
        A p[kChannels], g[kChannels];
        for (int c = 0; c < kChannels; ++c) {
          p[c] = image[c * pixels + i];
          g[c] = grad[c * pixels + i];
        }
        if (last)
          brightness_backward<kChannels>(factors, a.colour_steps, p, mean_share, g);
        else
          through_mean += double(blends_backward<kChannels>(factors, a.colour_steps, p, g));
        for (int c = 0; c < kChannels; ++c) grad[c * pixels + i] = g[c];
      }
  }
}

template <class A>
void blur_backward(const AugmentArgs& a, int64_t sample, A* plane, A* spare) {
  const int64_t height = a.out_height, width = a.out_width;
  const double *across = a.blur + (a.blur_width + a.blur_height) * sample, *down = across + a.blur_width;
  for (int64_t i = 0; i < height * width; ++i) spare[i] = 0;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t k = 0; k < a.blur_height; ++k) {
      A* to = spare + mirrored(y + k - a.blur_height / 2, height) * width;
      for (int64_t x = 0; x < width; ++x) to[x] += A(down[k]) * plane[y * width + x];
    }
  for (int64_t i = 0; i < height * width; ++i) plane[i] = 0;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t k = 0; k < a.blur_width; ++k)
        plane[y * width + mirrored(x + k - a.blur_width / 2, width)] += A(across[k]) * spare[y * width + x];
}

int64_t backward_bytes(const AugmentArgs& a) {
  const int64_t pixels = a.out_height * a.out_width;
  int64_t grid = a.in_height * a.in_width, filters = 0;
  for (int64_t i = 0; i < (a.antialias ? a.batch : 0); ++i)
    if (const Shrink s = shrink_of(a, i); s.on) {
      grid = most(grid, s.size[0] * s.size[1]);
      filters = most(filters, filters_bytes(a, s));
    }
  const int64_t spare = most(most(pixels, a.channels * padded_width(a.out_width)), a.in_width);
  const int64_t values = 2 * a.channels * pixels + a.channels * (a.in_height * a.in_width + grid) + spare;
  return (values * accumulated(a) + 63) / 64 * 64 + filters;
}

template <class T, class G>
void backward_sample(const AugmentArgs& a, void* scratch, int64_t sample) {
  using A = typename Accumulate<T>::type;
  const int64_t height = a.out_height, width = a.out_width, pixels = height * width, channels = a.channels;
  const int64_t in_pixels = a.in_height * a.in_width;
  const Shrink shrink = shrink_of(a, sample);
  const Window window = window_of(a, sample);
  const int64_t grid_width = shrink.on ? shrink.size[0] : window.width,
                grid_height = shrink.on ? shrink.size[1] : window.height;
  const int64_t grid_pixels = grid_width * grid_height;
  // The image that is warped, the source's window or the grid, and later its gradient.
  A *grad = static_cast<A*>(scratch), *image = grad + channels * pixels, *grid = image + channels * pixels;
  A *in_grad = grid + channels * grid_pixels,
    *row = in_grad + channels * in_pixels;  // row: also a plane for the blur
  const FixedMatrix matrix =
      shrink.on ? shrink.rest : matrix_of_sample(a.matrices ? a.matrices + 6 * sample : nullptr, a);
  char* filters =
      static_cast<char*>(scratch) + backward_bytes(a) - (shrink.on ? filters_bytes<A>(a, shrink) : 0);

  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) {
        const G* from = static_cast<const G*>(a.grad) + sample * a.grad_stride[0] + c * a.grad_stride[1] +
                        y * a.grad_stride[2];
        bool erased = false;
        if (a.boxes) {
          const int64_t* box = a.boxes + 4 * sample;
          erased = y >= box[0] && y - box[0] < box[2] && x >= box[1] && x - box[1] < box[3];
        }
        const A scale = a.normalise ? A(a.constants[2 * channels + c]) : A(1);
        grad[(c * height + y) * width + x] = erased ? A(0) : scale * A(to_float(from[x * a.grad_stride[3]]));
      }
  if (a.blur)
    for (int64_t c = 0; c < channels; ++c) blur_backward(a, sample, grad + c * pixels, row);

  if (a.colour_steps) {
    if (shrink.on) Resampler<T, A>(a, shrink, sample, filters).run(0, grid_height, grid, row);
    const int64_t first = window.top * a.in_stride[2] + window.left * a.in_stride[3];
    const T* images = static_cast<const T*>(a.images) + sample * a.in_stride[0] + first;
    for (int64_t c = 0; c < channels && !shrink.on; ++c)
      for (int64_t y = 0; y < grid_height; ++y)
        for (int64_t x = 0; x < grid_width; ++x)
          grid[(c * grid_height + y) * grid_width + x] =
              A(to_float(images[c * a.in_stride[1] + y * a.in_stride[2] + x * a.in_stride[3]]));
    const Source<A> planes = {grid, grid_pixels, grid_width, grid_height, grid_width, channels};
    const Warp<A, A> warp(a, planes, matrix);
    const int64_t pitch = padded_width(width);
    for (int64_t y = 0; y < height; ++y) {
      warp.row(y, width, row, pitch);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < width; ++x) image[(c * height + y) * width + x] = row[c * pitch + x];
    }
    channels == 3 ? colour_backward<3>(a, sample, image, grad) : colour_backward<1>(a, sample, image, grad);
  }

  for (int64_t i = 0; i < channels * (grid_pixels + in_pixels); ++i)
    grid[i] = 0;  // and in_grad, which follows
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x) {
      const Position at = matrix.at(x, y);
      const Taps<A> columns(at.u, grid_width, a.interpolation, a.padding),
          lines(at.v, grid_height, a.interpolation, a.padding);
      const A inside = a.padding == Padding::kFill ? inside_share(lines, columns) : A(1);
      for_each_tap(lines, columns, [&](int32_t line, int32_t column, A weight) {
        if (weight == A(0)) return;
        for (int64_t c = 0; c < channels; ++c)
          grid[c * grid_pixels + line * grid_width + column] +=
              inside * weight * grad[c * pixels + y * width + x];
      });
    }
  const int64_t first = window.top * a.in_width + window.left;
  for (int64_t c = 0; c < channels; ++c) {
    A* to = in_grad + c * in_pixels + first;
    if (shrink.on) {
      Resampler<T, A>(a, shrink, sample, filters).transposed(grid + c * grid_pixels, to, row);
      continue;
    }
    for (int64_t y = 0; y < grid_height; ++y)
      for (int64_t x = 0; x < grid_width; ++x)
        to[y * a.in_width + x] = grid[c * grid_pixels + y * grid_width + x];
  }
  T* out = static_cast<T*>(a.output) + sample * a.out_stride[0];
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t y = 0; y < a.in_height; ++y)
      for (int64_t x = 0; x < a.in_width; ++x)
        from_float(in_grad[c * in_pixels + y * a.in_width + x],
                   out + c * a.out_stride[1] + y * a.out_stride[2] + x * a.out_stride[3]);
}

// ---- the table

int64_t stored(PixelType type) {
  const int64_t bytes[] = {4, 8, 2, 2, 1};
  return bytes[int(type)];
}
int64_t source_bytes(const AugmentArgs& a) {
  int64_t bytes =
      a.in_stride[3] == 1 || a.in_width == 1 ? 0 : a.channels * a.in_height * a.in_width * stored(a.in_type);
  for (int64_t i = 0; i < (a.antialias ? a.batch : 0); ++i)
    if (const Shrink s = shrink_of(a, i); s.on)
      bytes = most(bytes, a.channels * s.size[0] * s.size[1] * accumulated(a));
  return (bytes + 63) / 64 * 64;
}
int64_t source_rows(const AugmentArgs& a) {
  int64_t rows = a.in_height;
  for (int64_t i = 0; i < (a.antialias ? a.batch : 0); ++i)
    if (const Shrink s = shrink_of(a, i); s.on) rows = most(rows, s.size[1]);
  return rows;
}
int64_t image_bytes(const AugmentArgs& a) {
  return a.colour_steps & kContrast ? a.channels * a.out_height * padded_width(a.out_width) * accumulated(a)
                                    : 0;
}
int64_t rows_bytes(const AugmentArgs& a) {
  int64_t bytes = a.blur ? blur_lines_offset(a) + most(a.blur_width, a.blur_height) * int64_t(sizeof(void*))
                         : a.channels * pitch_of(a) * accumulated(a);
  for (int64_t i = 0; i < (a.antialias ? a.batch : 0); ++i)
    if (const Shrink s = shrink_of(a, i); s.on)
      bytes = most(bytes, filters_bytes(a, s) + a.in_width * accumulated(a));
  return bytes;
}

void source(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin, int64_t end) {
  const Shrink shrink = shrink_of(a, sample);
  with_pixels(a.in_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    if (shrink.on) {
      A* line = reinterpret_cast<A*>(static_cast<char*>(scratch.rows) + filters_bytes<A>(a, shrink));
      Resampler<T, A>(a, shrink, sample, scratch.rows)
          .run(begin, least(end, shrink.size[1]), static_cast<A*>(scratch.source), line);
      return;
    }
    for (int64_t c = 0; c < (a.in_stride[3] == 1 ? 0 : a.channels); ++c)
      for (int64_t y = begin; y < least(end, a.in_height); ++y) {
        const T* from = static_cast<const T*>(a.images) + sample * a.in_stride[0] + c * a.in_stride[1] +
                        y * a.in_stride[2];
        T* to = static_cast<T*>(scratch.source) + (c * a.in_height + y) * a.in_width;
        for (int64_t x = 0; x < a.in_width; ++x) to[x] = from[x * a.in_stride[3]];
      }
  });
}
template <class A>
void prepare_sample(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin,
                    int64_t end) {
  with_rows<A>(a, scratch, sample,
               [&](const RowMaker<A>& maker) { prepare_rows<A>(a, scratch, maker, sample, begin, end); });
}
void prepare(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin,
             int64_t end) {
  accumulated(a) == 8 ? prepare_sample<double>(a, scratch, sample, begin, end)
                      : prepare_sample<float>(a, scratch, sample, begin, end);
}
void finish(const AugmentArgs& a, const AugmentScratch& scratch, int64_t sample, int64_t begin, int64_t end) {
  with_pixels(a.out_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename Accumulate<T>::type;
    with_rows<A>(a, scratch, sample, [&](const RowMaker<A>& maker) {
      finish_rows<A>(a, scratch, maker, sample, begin, end, static_cast<T*>(a.output));
    });
  });
}
void backward(const AugmentArgs& a, void* scratch, int64_t sample) {
  with_dtype(DType(int(a.in_type)), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_dtype(DType(int(a.out_type)), [&](auto* grad_type) {
      using G = std::remove_pointer_t<decltype(grad_type)>;
      if constexpr (std::is_same_v<typename Accumulate<T>::type, typename Accumulate<G>::type>)
        backward_sample<T, G>(a, scratch, sample);
    });
  });
}

}  // namespace

extern const AugmentKernels augment_kernels;
const AugmentKernels augment_kernels = {source_bytes, source_rows, image_bytes, rows_bytes, backward_bytes,
                                        source,       prepare,     finish,      backward};

}  // namespace fastreg::FASTREG_ISA
