// The resampling of augmentation on the CPU: rows of output pixels from the pixels of a source, 16 at a time.
// Vectors whose neighbours all lie inside the image take them in pairs, by gathers, or with AVX-512 from rows
// of the source held in registers; the others look at the border. Part of augment_cpu.cpp, compiled once per
// instruction set.
#pragma once
#include "augment_gather_cpu.h"

namespace fastreg::FASTREG_ISA {
namespace {

// The value of what lies outside of the image.
template <class A>
struct Filler {
  Padding padding;
  const double* fill;  // of each channel
  A value(int64_t c) const { return padding == Padding::kFill ? A(fill[c]) : A(0); }
  template <class O>
  O value_as(int64_t c) const {  // of bytes the nearest
    O result;
    if constexpr (std::is_same_v<O, uint8_t>)
      from_float(quantised(float(value(c)), 255.f), &result);
    else
      result = value(c);
    return result;
  }
};

// The matrix of a sample, or the one that changes nothing.
FixedMatrix matrix_of(const AugmentArgs& a, int64_t sample) {
  FixedMatrix fixed = {{kOne, 0, 0, 0, kOne, 0}};
  if (a.matrices) fixed_matrix(a.matrices + 6 * sample, a.out_height, a.out_width, &fixed);
  return fixed;
}
// The grid of the nearest pixels of a source of (width, height), where there is one.
template <class A>
NearestGrid<A> grid_of(const AugmentArgs& a, int64_t sample, int64_t width, int64_t height,
                       const FixedMatrix& matrix) {
  NearestGrid<A> grid = {};
  if (a.interpolation != Interpolation::kNearest || !a.matrices) return grid;
  int64_t fine[6];
  for (int i = 0; i < 6; ++i) fine[i] = fine_coefficient(a.matrices[6 * sample + i]);
  grid.set(matrix, a.matrices + 6 * sample, fine, width, height, a.out_width, a.out_height);
  return grid;
}

template <class T, class A>
struct Resampler {
  using V = Vec<A>;
  static constexpr int kLanes = V::kLanes;
  Source<T> source;
  Interpolation interpolation;
  Padding padding;
  Filler<A> filler;
  FixedMatrix matrix;
  NearestGrid<A> grid;
  int32_t lookup_rows = 0;  // the rows in which a vector's upper neighbours lie, if they are few
  bool straight;            // output pixels are source pixels, in rows from left to right or back
  alignas(64) int64_t step_u[kLanes], step_v[kLanes];

  Resampler(const AugmentArgs& a, int64_t sample, const Source<T>& source, const FixedMatrix& matrix)
      : source(source),
        interpolation(a.interpolation),
        padding(a.padding),
        filler{a.padding, a.constants + kFillRow * a.channels},
        matrix(matrix),
        grid(grid_of<A>(a, sample, source.width, source.height, matrix)),
        straight(is_straight(matrix)) {
    const int64_t* m = matrix.m;
    for (int j = 0; j < kLanes; ++j) {
      step_u[j] = m[0] * j;
      step_v[j] = m[3] * j;
    }
#ifdef __AVX512F__
    const auto reach = [&](int64_t step) {  // pixels from the first lane to the last, rounded up
      const int64_t size = least(step < 0 ? -step : step, kLookupColumns * kOne);
      return ((kLanes - 1) * size + kOne - 1) >> kFractionBits;
    };
    const bool few = reach(m[0]) < kLookupColumns - 1 && reach(m[3]) < kLookupRows;
    if (few && sizeof(A) == 4 && interpolation == Interpolation::kBilinear &&
        (source.channels == 1 || source.channels == 3))
      lookup_rows = int32_t(reach(m[3])) + 1;
#endif
  }

  // Output row y, n pixels of each channel, to out + c * pitch; whole vectors are written.
  void row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    if (straight) return straight_row<A>(y, n, out, pitch);
#ifdef __AVX512F__
    if constexpr (sizeof(A) == 4)
      if (lookup_rows)
        return source.channels == 3 ? lookup_row<3>(y, n, out, pitch) : lookup_row<1>(y, n, out, pitch);
#endif
    if (interpolation == Interpolation::kBilinear) return bilinear_row(y, n, out, pitch);
    if (interpolation == Interpolation::kNearest) return nearest_row<A>(y, n, out, pitch);
    bicubic_row(y, n, out, pitch);
  }

  // Whether output pixels are source pixels, so that bytes need not become numbers.
  bool gives_bytes() const {
    return std::is_same_v<T, uint8_t> && (straight || interpolation == Interpolation::kNearest);
  }
  // The same row in bytes, of which n are written.
  void row_of_bytes(int64_t y, int64_t n, uint8_t* out, int64_t pitch) const {
    if constexpr (std::is_same_v<T, uint8_t>)
      straight ? straight_row<uint8_t>(y, n, out, pitch) : nearest_row<uint8_t>(y, n, out, pitch);
  }

 private:
  // O: A, or bytes of bytes.
  template <class O>
  void straight_row(int64_t y, int64_t n, O* out, int64_t pitch) const {
    const SourcePoint first = matrix.at(0, y);
    const int64_t u = first.u >> kFractionBits, direction = matrix.m[0] > 0 ? 1 : -1;
    const int32_t v = padded(whole_part(first.v), int32_t(source.height), padding);
    // Output pixels [begin, end) lie inside.
    int64_t begin = direction > 0 ? -u : u - (source.width - 1),
            end = direction > 0 ? source.width - u : u + 1;
    begin = clamped(v < 0 ? n : begin, int64_t(0), n);
    end = clamped(v < 0 ? n : end, begin, n);
    for (int64_t c = 0; c < source.channels; ++c, out += pitch) {
      const T* line = source.plane(c) + (v < 0 ? 0 : v) * source.row_stride;
      const auto outside = [&](int64_t x) {
        const int32_t pixel = v < 0 ? -1 : padded(int32_t(u + direction * x), int32_t(source.width), padding);
        out[x] = pixel < 0 ? filler.template value_as<O>(c) : O(to_float(line[pixel]));
      };
      for (int64_t x = 0; x < begin; ++x) outside(x);
      int64_t x = begin;
      if (direction > 0)
        for (; x + kLanes <= end; x += kLanes) store(out + x, load(line + u + x));
      else
        for (; x + kLanes <= end; x += kLanes) store(out + x, reversed(load(line + u - x - (kLanes - 1))));
      for (; x < end; ++x) out[x] = O(to_float(line[u + direction * x]));
      for (; x < n; ++x) outside(x);
    }
  }

  // ---- bilinear

  // The source point of the last lane of a vector that starts here.
  FR_INLINE SourcePoint last_of(SourcePoint at) const {
    return {at.u + (kLanes - 1) * matrix.m[0], at.v + (kLanes - 1) * matrix.m[3]};
  }
  FR_INLINE void advance(SourcePoint& at) const {
    at.u += kLanes * matrix.m[0];
    at.v += kLanes * matrix.m[3];
  }
  // Whether all neighbours of the vector that starts here lie inside. As unsigned, a negative coordinate is
  // beyond any limit.
  FR_INLINE bool is_inside(SourcePoint at) const {
    const uint64_t limit_u = uint64_t(source.width - 1) << kFractionBits,
                   limit_v = uint64_t(source.height - 1) << kFractionBits;
    const SourcePoint last = last_of(at);
    return (uint64_t(at.u) < limit_u) & (uint64_t(last.u) < limit_u) & (uint64_t(at.v) < limit_v) &
           (uint64_t(last.v) < limit_v);
  }

  FR_INLINE void bilinear_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    const int64_t count = source.count(), row_stride = source.row_stride;
    SourcePoint at = matrix.at(0, y);
    for (int64_t x = 0; x < n; x += kLanes, advance(at)) {
      if (!is_inside(at)) {
        bilinear_edge(at, x, out, pitch);
        continue;
      }
      const LaneCoordinates<A> u(step_u, at.u), v(step_v, at.v);
      const Ints<A> index = v.whole * Ints<A>(int32_t(row_stride)) + u.whole;
      const V t = u.fraction(), s = v.fraction();
      for (int64_t c = 0; c < source.channels; ++c) {
        const T* plane = source.plane(c);
        V upper_left, upper_right, lower_left, lower_right;
        gather_pairs(plane, index, count, upper_left, upper_right);
        gather_pairs(plane + row_stride, index, count - row_stride, lower_left, lower_right);
        store(out + c * pitch + x, blend_four(upper_left, lower_left, upper_right, lower_right, s, t));
      }
    }
  }

#ifdef __AVX512F__
  template <int kChannels>
  void lookup_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    const int64_t height = source.height, width = source.width, rows = lookup_rows;
    const bool zeros = padding == Padding::kZeros, border = padding == Padding::kBorder;
    const int64_t low_u = least(int64_t(0), (kLanes - 1) * matrix.m[0]),
                  low_v = least(int64_t(0), (kLanes - 1) * matrix.m[3]);
    SourcePoint at = matrix.at(0, y);
    for (int64_t x = 0; x < n; x += kLanes, advance(at)) {
      // All left upper neighbours lie in `rows` rows from `line` on, in columns from `column` on.
      const int64_t column = (at.u + low_u) >> kFractionBits, line = (at.v + low_v) >> kFractionBits;
      const bool far = (column <= -kLookupColumns) | (column >= width) | (line < -rows) | (line >= height);
      if (!far && (zeros || is_inside(at)))
        lookup_vector<kChannels, false>(at, column, line, out + x, pitch);
      else if (!far && border)
        lookup_vector<kChannels, true>(at, column, line, out + x, pitch);
      else
        bilinear_edge(at, x, out, pitch);
    }
  }
  // kClamps: neighbours outside are the border's pixels, and else 0.
  template <int kChannels, bool kClamps>
  FR_INLINE void lookup_vector(SourcePoint at, int64_t column, int64_t line, A* out, int64_t pitch) const {
    const int64_t row_stride = source.row_stride, height = source.height, width = source.width;
    const T* plane[kChannels];
    for (int c = 0; c < kChannels; ++c) plane[c] = source.plane(c) + column;
    const int64_t begin = most(-column, int64_t(0)), end = least(width - column, int64_t(kLookupColumns));
    const uint32_t inside = uint32_t((uint64_t(1) << end) - (uint64_t(1) << begin));
    const LaneCoordinates<A> u(step_u, at.u), v(step_v, at.v);
    Ints<A> left = u.whole, right = left + Ints<A>(1);
    if (kClamps) {
      const Ints<A> first(0), last(int32_t(width - 1));
      left = most(first, least(left, last));
      right = most(first, least(right, last));
    }
    left = left - Ints<A>(int32_t(column));
    right = right - Ints<A>(int32_t(column));
    __m512i row = (__m512i)(v.whole - Ints<A>(int32_t(line))).part[0];
    Lookup<T> top[kChannels], bottom[kChannels];
    typename Lookup<T>::Row above[kChannels];
    const auto there = [&](int64_t line) { return kClamps || uint64_t(line) < uint64_t(height); };
    const auto offset = [&](int64_t line) {
      return (kClamps ? clamped(line, int64_t(0), height - 1) : line) * row_stride;
    };
#pragma GCC unroll 3
    for (int c = 0; c < kChannels; ++c) {
      top[c].start((__m512i)left.part[0], (__m512i)right.part[0]);
      bottom[c].start((__m512i)left.part[0], (__m512i)right.part[0]);
      if (there(line)) above[c] = typename Lookup<T>::Row(plane[c] + offset(line), inside);
    }
    // Row after row, the lanes whose upper neighbours lie in it take all four.
    const int64_t last = line + lookup_rows;
    do {
      const __mmask16 lanes = _mm512_testn_epi32_mask(row, row);
      row = _mm512_sub_epi32(row, _mm512_set1_epi32(1));
      ++line;
#pragma GCC unroll 3
      for (int c = 0; c < kChannels; ++c) {
        typename Lookup<T>::Row below;
        if (there(line)) below = typename Lookup<T>::Row(plane[c] + offset(line), inside);
        top[c].take(lanes, above[c]);
        bottom[c].take(lanes, below);
        above[c] = below;
      }
    } while (line < last);
    const V t = u.fraction(), s = v.fraction();
#pragma GCC unroll 3
    for (int c = 0; c < kChannels; ++c) {
      V upper_left, upper_right, lower_left, lower_right;
      top[c].result(upper_left, upper_right);
      bottom[c].result(lower_left, lower_right);
      store(out + c * pitch, blend_four(upper_left, lower_left, upper_right, lower_right, s, t));
    }
  }
#endif

  // What the padding makes of pixel numbers along one axis: the pixels that stand for them, and which of them
  // are there at all.
  struct Found {
    Ints<A> pixel;
    typename V::Mask there;
  };
  FR_INLINE Found find(const Ints<A>& wanted, int32_t n) const {
    const Padding rule = padding;
    const Ints<A> i = rule == Padding::kReflect
                          ? wanted.each([=](int32_t x) { return padded(x, n, Padding::kReflect); })
                          : wanted;
    const Ints<A> pixel = most(Ints<A>(0), least(i, Ints<A>(n - 1)));
    return {pixel, rule == Padding::kZeros || rule == Padding::kFill ? pixel == i : pixel == pixel};
  }

  // Whether no neighbour of the vector that starts here lies inside.
  FR_INLINE bool is_outside(SourcePoint at) const {
    const SourcePoint last = last_of(at);
    return most(at.u, last.u) < -kOne || least(at.u, last.u) >> kFractionBits >= source.width ||
           most(at.v, last.v) < -kOne || least(at.v, last.v) >> kFractionBits >= source.height;
  }

  // A vector at the border, or beyond: neighbours outside are found by the padding's rule. Of two neighbours
  // in a row one pair is gathered, from which each takes its own.
  __attribute__((noinline)) void bilinear_edge(SourcePoint at, int64_t x, A* out, int64_t pitch) const {
    if (is_outside(at) && (padding == Padding::kZeros || padding == Padding::kFill)) {
      for (int64_t c = 0; c < source.channels; ++c) store(out + c * pitch + x, V(filler.value(c)));
      return;
    }
    const int32_t height = int32_t(source.height), width = int32_t(source.width);
    const LaneCoordinates<A> u(step_u, at.u), v(step_v, at.v);
    const Ints<A> one(1), stride(int32_t(source.row_stride));
    const Found left = find(u.whole, width), right = find(u.whole + one, width);
    const Found top = find(v.whole, height), bottom = find(v.whole + one, height);
    const Ints<A> pair = most(Ints<A>(0), least(least(left.pixel, right.pixel), Ints<A>(width - 2)));
    const auto left_is_first = left.pixel == pair, right_is_first = right.pixel == pair;
    const Ints<A> upper = top.pixel * stride + pair, lower = bottom.pixel * stride + pair;
    const auto there_ul = both<V>(top.there, left.there), there_ur = both<V>(top.there, right.there),
               there_ll = both<V>(bottom.there, left.there), there_lr = both<V>(bottom.there, right.there);
    const auto there = both<V>(there_ul, there_lr);  // all four
    const V zero(0), full(1), t = u.fraction(), s = v.fraction();
    const auto blend_there = [&](const V& ul, const V& ll, const V& ur,
                                 const V& lr) __attribute__((always_inline)) {
      return blend_four(select(there_ul, ul, zero), select(there_ll, ll, zero), select(there_ur, ur, zero),
                        select(there_lr, lr, zero), s, t);
    };
    const V inside = padding == Padding::kFill ? blend_there(full, full, full, full) : full;
    const int64_t count = source.count();
    for (int64_t c = 0; c < source.channels; ++c) {
      const T* plane = source.plane(c);
      V first, second, below_first, below_second;
      if (width > 1) {
        gather_pairs(plane, upper, count, first, second);
        gather_pairs(plane, lower, count, below_first, below_second);
      } else {
        first = second = gather(plane, upper, count);
        below_first = below_second = gather(plane, lower, count);
      }
      V value = blend_there(
          select(left_is_first, first, second), select(left_is_first, below_first, below_second),
          select(right_is_first, first, second), select(right_is_first, below_first, below_second));
      if (padding == Padding::kFill) value = select(there, value, filled(value, inside, V(filler.value(c))));
      store(out + c * pitch + x, value);
    }
  }

  // ---- nearest and bicubic

  template <class O>
  void nearest_row(int64_t y, int64_t n, O* out, int64_t pitch) const {
    A lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = A(j);
    const V lanes = load(lane);
    const A v = A(y) - grid.middle[1];
    for (int64_t x = 0; x < n; x += kLanes) {
      const V u = lanes + V(A(x) - grid.middle[0]);
      const Found column = find(rounded(grid.position(0, u, v)), int32_t(source.width));
      const Found line = find(rounded(grid.position(1, u, v)), int32_t(source.height));
      const auto there = both<V>(line.there, column.there);
      const Ints<A> index = line.pixel * Ints<A>(int32_t(source.row_stride)) + column.pixel;
#ifndef __AVX512F__  // whose gathers are quicker than this
      if constexpr (std::is_same_v<O, uint8_t>)
        if (x + kLanes <= n && all<V>(there)) {
          int32_t at[kLanes];
          memcpy(at, index.part, sizeof at);
          for (int64_t c = 0; c < source.channels; ++c)
            for (int j = 0; j < kLanes; ++j) out[c * pitch + x + j] = source.plane(c)[at[j]];
          continue;
        }
#endif
      for (int64_t c = 0; c < source.channels; ++c) {
        O* to = out + c * pitch + x;
        const V fill(A(filler.template value_as<O>(c)));
        const V value = select(there, gather(source.plane(c), index, source.count()), fill);
        if (std::is_same_v<O, A> || x + kLanes <= n) {
          store(to, value);
          continue;
        }
        O rest[kLanes];
        store(rest, value);
        memcpy(to, rest, size_t(n - x) * sizeof(O));
      }
    }
  }

  void bicubic_row(int64_t y, int64_t n, A* out, int64_t pitch) const {
    SourcePoint at = matrix.at(0, y);
    for (int64_t x = 0; x < n; ++x, at.u += matrix.m[0], at.v += matrix.m[3]) {
      const Taps<A> columns(at.u, source.width, interpolation, padding),
          lines(at.v, source.height, interpolation, padding);
      const A inside = padding == Padding::kFill ? inside_share(lines, columns) : A(1);
      int32_t column[4];
      A across[4];
      for (int k = 0; k < 4; ++k) {
        column[k] = columns.pixel(k);
        across[k] = columns.weight(k);
      }
      for (int64_t c = 0; c < source.channels; ++c) {
        A value = 0;
        for (int i = 0; i < 4; ++i) {
          if (lines.pixel(i) < 0) continue;
          const T* line = source.plane(c) + lines.pixel(i) * source.row_stride;
          A sum = 0;
          for (int k = 0; k < 4; ++k)
            if (column[k] >= 0) sum += across[k] * A(to_float(line[column[k]]));
          value += lines.weight(i) * sum;
        }
        out[c * pitch + x] = inside == A(1) ? value : filled(value, inside, filler.value(c));
      }
    }
  }
};

}  // namespace
}  // namespace fastreg::FASTREG_ISA
