// Sum over taps with a kernel for each sample: the convolution, and its input gradient, as products
// of a sample's mixed kernel with pixels that are found through offsets (dynamic_conv_gemm.h).
//
// Two schedules:
//   once    large maps: the kernels of some samples are mixed, then each task computes one tile of
//           one sample for all its output channels. Small maps of more pixels than outputs for AMX,
//           1x1: a thread does both for some samples, or has one kernel for all.
//   blocks  small maps, where mixing costs as much as the convolution: the pixels of all samples
//           are laid out once; each task owns a block of output channels of several samples, mixes
//           a piece of their kernels that stays in the cache, and multiplies. A kernel of the bank
//           is read once for all these samples, and a whole mixed kernel never exists.
//
// The input gradient sums over the rows of a kernel; the plans for the residues of a stride read
// their taps from the same mixed kernels. AMX's weights are laid out in tiles ("packed"), for each
// of these plans.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/capability.h"
#include "common/parallel.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

template <class Scalar>
class Correlation {
 public:
  using Acc = accumulate_t<Scalar>;

  // `has_ones` adds a channel of ones after x's; of the kernel's taps the axes keep some. Turns
  // have at most `most_channels`.
  Correlation(Direction direction, TapAxis y, TapAxis x, const DynamicConvShape& shape,
              bool has_ones, int64_t most_channels = int64_t{1} << 40)
      : direction_(direction),
        y_(std::move(y)),
        x_(std::move(x)),
        groups_(shape.groups),
        kernel_taps_(shape.taps()),
        has_ones_(has_ones) {
    const bool forward = direction == Direction::kForward;
    channels_ = (forward ? shape.in_per_group() : shape.out_per_group()) + has_ones;
    outputs_ = forward ? shape.out_per_group() : shape.in_per_group();
    kept_taps_ = kept_taps(shape, y_, x_);
    const int64_t taps = static_cast<int64_t>(kept_taps_.size());
    const int64_t tap_rows = static_cast<int64_t>(y_.taps.size());
    // Copying pixels once for each column of taps costs less than computing many dropped columns;
    // where the stride makes nearly as many copies anyway, less than computing a few.
    const int64_t span = x_.taps.empty() ? 0 : static_cast<int64_t>(x_.taps.size()) - 1;
    const AxisTiles columns(x_, 1);
    const bool few = 2 * (span + 1) <= 3 * columns.runs();
    const int64_t computed = whole_vectors(columns);
    const int64_t dropped = computed - whole_vectors(AxisTiles(x_, 1, true));
    by_pixels_ = packs() && kernel_taps_ > 1 && taps > 0 && entries(channels_) >= kTileSide;
    const bool compact = outputs_ >= kLanes<Acc> && !by_pixels_ &&
                         (span / x_.in_step * 10 > x_.count || (few && dropped * 40 > computed));

    // Channels are taken in turns whose pixels stay in the cache from one block of outputs to the
    // next. With AVX-512 they may exceed the first level: many short products, each with its sums
    // to load and to store, cost more. With AVX2 half of it is left to others.
    tiles_ = choose_tiles(y_, x_, 0, 0, slack(), 0, kMapPixels, 1, compact);
    // A sample's pixels that are larger than its kernels had better stay in the second level of the
    // cache, as had all that are multiplied with a bank's only kernel, unless that is the larger.
    const bool may_stay = kTiled && tiles_.count() == 1 && shape.taps() == 1 && shape.batch > 1 &&
                          shape.has_attention && forward;
    by_samples_ = may_stay && shape.bank > 1 && outputs_ < tiles_.channel_stride();
    const bool stays = by_samples_ || (may_stay && shape.bank == 1 && outputs_ <= channels_);
    in_blocks_ = tiles_.count() == 1 && taps > 0 && !stays;
    const int64_t line =
        std::min(tiles_.channel_stride(), std::max<int64_t>(1, tap_rows) * (block_pixels() + span) *
                                              std::max<int64_t>(1, tiles_.x.runs()));
    const int64_t bytes = stays ? kMapBytes : turn_bytes();
    int64_t most = std::min<int64_t>(bytes / (line * int64_t{sizeof(Acc)}), 512);
    if (in_blocks_ && shape.has_attention && shape.bank > 1) {
      // The smallest block of outputs shall have room for the kernels of several samples, which
      // share what is read of the bank.
      const int64_t together = std::clamp<int64_t>(shape.batch, 1, kMostSamples);
      most = std::min(most, piece_bytes() / (kBlockRows * together * kernel_taps_ * kTogether *
                                             int64_t{sizeof(Acc)}));
    }
    most = std::min(std::max<int64_t>(most, kTiled ? kTileSide : 4) * kTogether, most_channels);
    if (by_pixels_) most = most_channels;  // the product takes turns of its own
    const auto whole_tiles = [](int64_t channels) { return channels / kTileSide * kTileSide; };
    if (kTiled && most < channels_) most = whole_tiles(most / kTogether) * kTogether;
    const int64_t turns = std::max<int64_t>(1, ceil_div(channels_, most));
    turn_channels_ = std::max<int64_t>(1, entries(ceil_div(channels_, turns)));
    if (kTiled && turns > 1) turn_channels_ = whole_tiles(turn_channels_ + kTileSide - 1);
    turn_channels_ *= kTogether;

    if (!in_blocks_) {
      // Tiles are stored where they belong once their sums are complete.
      tiles_ = choose_tiles(
          y_, x_, kTiled ? entries(turn_channels_) : turn_channels_,
          kTiled && turns == 1 ? 0 : outputs_, slack(), kSecondLevelBytes / int64_t{sizeof(Acc)},
          kMaxPixels, ceil_div(kMinTasks, std::max<int64_t>(1, shape.batch * groups_)), compact);
      tiles_ = fill_vectors(tiles_, y_, kLanes<Acc>);
    }
    tap_offsets_ = tiles_.tap_offsets();
  }

  // result[b] = act(sum + bias[b]) for all samples; with `sums`, also the sum over the pixels of
  // each [batch][out channels][parts()]. With `accumulate` it is added to the result.
  void run(const Mixer<Scalar>& mixer, const Image<const Scalar>& image, Activation activation,
           const Image<Scalar>& result, Acc* sums, bool accumulate = false) const {
    run_plans({this}, {mixer, image, activation, result, sums, accumulate});
  }

  // Runs plans that share kernels, image and result, such as those for the residues of a stride:
  // kernels are mixed once for all of them.
  static void run_together(std::vector<Correlation> plans, const Mixer<Scalar>& mixer,
                           const Image<const Scalar>& image, const Image<Scalar>& result) {
    int64_t least = plans[0].turn_channels_;
    for (const Correlation& plan : plans) least = std::min(least, plan.turn_channels_);
    std::vector<const Correlation*> in_blocks, in_tiles;
    for (Correlation& plan : plans) {
      if (plan.turn_channels_ != least) {
        plan = Correlation(plan.direction_, plan.y_, plan.x_, mixer.shape(), plan.has_ones_, least);
      }
      (plan.in_blocks_ ? in_blocks : in_tiles).push_back(&plan);
    }
    const Job job{mixer, image, Activation::kNone, result, nullptr, false};
    for (const auto* alike : {&in_blocks, &in_tiles}) {
      if (!alike->empty()) run_plans(*alike, job);
    }
  }

  int64_t parts() const { return tiles_.count(); }
  std::string name() const {
    if (in_blocks_) return "matrix products, kernels mixed a block at a time";
    if (by_samples_) return "matrix products, kernels mixed for some samples at a time";
    return "matrix products, kernels mixed once, tile by tile";
  }

 private:
  static constexpr bool kTiled = kPairs<Scalar> && kPairTiles;  // products run on tiles of AMX
  static constexpr int64_t kCopyBytes = 32 * 1024;              // of pixels on their way into pairs
  // Pixels of a turn. Intel's cores, which multiply two vectors of 64 bytes at a time, want them in
  // the first level; AMD's take twice as long, and the second level keeps up with them.
  static int64_t turn_bytes() {
    return (!kManyRegisters ? 12 : kTiled || !is_intel() ? 64 : 28) * 1024;
  }
  static constexpr int64_t kSecondLevelBytes = 384 * 1024;
  static constexpr int64_t kMapBytes = 768 * 1024;    // of a sample's pixels that stay there
  static constexpr int64_t kMapPixels = 256;          // of a small map
  static constexpr int64_t kMostStride = 1 << 20;     // so that offsets fit 32 bits
  static constexpr int64_t kPieceBytes = 320 * 1024;  // of mixed kernels in a block
  // The larger kernels of processors with AMX, whose second level is larger.
  static constexpr int64_t kTiledPieceBytes = 1024 * 1024;
  static constexpr int64_t kNearBytes = 512 * 1024;  // of pixels that stay in the cache
  static constexpr int64_t kMostRows = 64, kMostKeptRows = 128, kLeastKeptRows = 32;
  // Of a block: the shorter Intel's turns are, the more outputs are to share their pixels.
  static int64_t most_rows() { return kManyRegisters && !kTiled && is_intel() ? 128 : kMostRows; }
  static constexpr int64_t kMostSamples = 8;
  static constexpr int64_t kMaxPixels = 4096, kMinTasks = 16, kLeastTasks = 4;
  static constexpr int64_t kMinWork = 1 << 16;

  using Job = PlanJob<Scalar>;
  using Plans = std::vector<const Correlation*>;

  // All of the plans go in blocks, or none; their channels have the same turns.
  static void run_plans(const Plans& plans, const Job& job) {
    const Mixer<Scalar>& mixer = job.mixer;
    const Correlation& any = *plans[0];
    const int64_t batch = mixer.shape().batch;
    if (any.in_blocks_) {
      int64_t sample_size = 1;
      for (const Correlation* plan : plans) {
        if (plan->reads_directly(job.image)) continue;
        sample_size += any.groups_ * any.channels_ * plan->tiles_.channel_stride();
      }
      const int64_t step = samples_mixed_for(sample_size * int64_t{sizeof(Acc)}, batch);
      for (int64_t first = 0; first < batch; first += step) {
        run_in_blocks(plans, job, first, std::min(step, batch - first));
      }
      return;
    }
    const bool shared = mixer.is_shared();
    const bool has_taps =
        std::any_of(plans.begin(), plans.end(), [](const auto* plan) { return plan->taps() > 0; });
    const int64_t packed_size = any.turns() * any.packed_rows() * packed_row(plans);
    const int64_t kernel_size = any.packs()
                                    ? any.groups_ * packed_size
                                    : mixer.shape().out_channels * mixer.row_size(any.has_ones_);
    const int64_t step = shared ? batch
                         : any.by_samples_
                             ? std::clamp<int64_t>(batch / kLeastTasks, 1, 4)
                             : samples_together(kernel_size * int64_t{sizeof(Acc)}, batch);
    const auto run_samples = [&](int64_t first, const Scratch<Acc>& kernels) {
      const int64_t count = std::min(step, batch - first);
      if (has_taps) {
        mix_whole(plans, mixer, shared ? mixer.kAnySample : first, shared ? 1 : count,
                  kernels.get(), kernel_size);
      }
      int64_t before = 0;
      for (const Correlation* plan : plans) {
        plan->run_tiles(job, first, count, kernels.get() + before, packed_row(plans));
        if (plan->packs()) before += plan->packed_rows() * plan->packed_row();
      }
    };
    const int64_t kernels_size = (shared ? 1 : step) * kernel_size;
    if (any.by_samples_) {
      parallel_for(ceil_div(batch, step), 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> kernels(kernels_size);
        for (int64_t i = begin; i < end; ++i) run_samples(i * step, kernels);
      });
      return;
    }
    const Scratch<Acc> kernels(kernels_size);
    for (int64_t first = 0; first < batch; first += step) run_samples(first, kernels);
  }

  // Output channels [output, output + rows), of all groups, of a tile of a sample.
  struct Part {
    int64_t sample, output, rows, tile;
    Tiles::Place place;
  };

  int64_t block_pixels() const {
    return (outputs_ > 2 ? kBlockVectors : kNarrowVectors) * kLanes<Acc>;
  }
  // With AVX-512 products read the pixels of a tile and nothing beyond, but for whole tiles of AMX.
  int64_t slack() const {
    return kTiled ? kTileSide : DDRF_VECTOR_BYTES == 64 ? 0 : block_pixels();
  }
  int64_t piece_bytes() const {
    return kTiled && kernel_taps_ > 1 ? kTiledPieceBytes : kPieceBytes;
  }
  // Channels in an entry of the products, and the entries of so many channels.
  static constexpr int64_t kTogether = kPairs<Scalar> ? 2 : 1;
  static int64_t entries(int64_t channels) { return ceil_div(channels, kTogether); }

  // Whether weights are packed into tiles: but for forward 1x1 kernels, which lie so already.
  static constexpr int64_t kRowUnit = kTiled ? kTileSide : kBlockRows;
  bool packs() const {
    return kTiled && (direction_ == Direction::kInputGradient || kernel_taps_ > 1);
  }
  int64_t packed_rows() const { return ceil_div(outputs_, kTileSide) * kTileSide; }
  TileOrder tile_order(int64_t channels) const { return {entries(channels), taps()}; }
  int64_t packed_row() const { return tile_order(turn_channels_).tiles() * kTileSide; }
  static int64_t packed_row(const Plans& plans) {
    int64_t size = 0;
    for (const Correlation* plan : plans) size += plan->packed_row();
    return size;
  }

  int64_t taps() const { return static_cast<int64_t>(tap_offsets_.size()); }
  int64_t turns() const { return std::max<int64_t>(1, ceil_div(channels_, turn_channels_)); }
  int64_t vectors(int64_t pixels) const { return ceil_div(pixels, kLanes<Acc>); }

  // Of the whole map with such columns.
  int64_t whole_vectors(const AxisTiles& columns) const {
    return vectors((y_.count - 1) * columns.length + columns.extent);
  }

  // The product of some channels. Few pixels of a map beyond the last whole vector (one of 7x7,
  // with AVX-512 four of 14x14) are taken one by one, with vectors of k or, where the rows of a lie
  // side by side, of these: a vector of their own would waste most lanes. Not where taps lie
  // between them, nor of a tile: bits would depend on how the map is cut.
  void add_product(const Acc* a, int64_t a_row, int64_t rows, const Acc* b, const Offsets* table,
                   int64_t channels, int64_t pixels, Acc* column, const Sums<Acc>& c,
                   Ahead* ahead) const {
#ifdef DDRF_AMX
    if constexpr (kTiled) {
      const auto of_a = [a](int64_t i) {
        return TileRows{a + i * kTileEntries, kTileSide * int64_t{sizeof(Acc)}};
      };
      const TileOrder order = tile_order(channels);
      if (by_pixels_) {
        return multiply_pixel_rows(a, rows, order, b, table, tap_offsets_.data(), pixels, c);
      }
      if (packs()) return multiply_by_tiles(of_a, rows, order, b, table, pixels, c);
    }
#endif
    const int64_t depth = entries(channels) * taps();
    constexpr int64_t kMostApart = kManyRegisters ? 4 : 2;
    const int64_t beyond = pixels % kLanes<Acc>;
    const bool forward = direction_ == Direction::kForward;
    const bool across = !forward && a_row == 1;
    const bool apart = !kTiled && in_blocks_ && (across || forward) && pixels > kLanes<Acc> &&
                       beyond <= kMostApart && (across ? rows : depth) >= beyond * kLanes<Acc>;
    const int64_t whole = apart ? pixels - beyond : pixels;
    multiply<Scalar>(a, a_row, rows, b, table, depth, whole, c, ahead);
    for (int64_t pixel = whole; pixel < pixels; ++pixel) {
      Acc products[kMostKeptRows];
      if (across) {
        multiply_column_across<Scalar>(a, rows, b + pixel, table, depth, products);
      } else {
        for (int64_t k = 0; k < depth; ++k) column[k] = b[table[k].b + pixel];
        multiply_column<Scalar>(a, a_row, rows, column, depth, products);
      }
      finish_column(c, pixel, rows, products);
    }
  }

  Planes<Scalar> planes(const Image<const Scalar>& image, int64_t sample, int64_t group) const {
    return planes_of_group(image, sample, group, channels_ - has_ones_, y_.in_size, x_.in_size,
                           has_ones_);
  }

  // The offsets of all taps of some channels or pairs, which lie `a_channel` apart among the
  // weights and `b_channel` among the pixels.
  std::vector<Offsets> offsets(int64_t channels, int64_t a_channel, int64_t b_channel) const {
    std::vector<Offsets> result;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t tap = 0; tap < taps(); ++tap) {
        result.push_back({static_cast<int32_t>(c * a_channel + (packs() ? tap : kept_taps_[tap])),
                          static_cast<int32_t>(c * b_channel + tap_offsets_[tap])});
      }
    }
    return result;
  }

  // Copies channels of a tile to `target`, in pairs where products run on pairs.
  void copy_entries(const Planes<Scalar>& source, int64_t channel, int64_t channel_end,
                    const Tiles::Place& place, Acc* scratch, Acc* target) const {
    const auto copy = [&](int64_t begin, int64_t end, Acc* copied) {
      copy_tile(source, begin, end, y_, x_, tiles_, place.tile_y, place.tile_x, copied);
    };
    if constexpr (kPairs<Scalar>) {
      const int64_t plane = tiles_.channel_stride(), size = tiles_.channel_size();
      const int64_t half = entries(channel_end - channel), step = copied_together(source);
      int64_t i = 0;
      for (; by_pixels_ && i + kTileSide <= half; i += kTileSide) {
        copy_pixels(source, channel + i, channel + half + i, channel_end, place, scratch,
                    target + i * plane);
      }
      // The last pair may lack its second channel, or have that of ones.
      const int64_t plain = std::min(source.channels, channel_end) - channel - half;
      if (source.column_step == 1 && x_.in_step <= 2 && plain > i) {
        copy_pairs(source, channel + i, channel + half + i, plain - i, y_, x_, tiles_, place.tile_y,
                   place.tile_x, target + i * plane);
        i = plain;
      }
      for (; i < half; i += step) {
        const int64_t end = channel + std::min(i + step, half);
        Acc* partners = scratch + step * plane;
        copy(channel + i, end, scratch);
        copy(channel + half + i, std::min(half + end, channel_end), partners);
        for (int64_t c = channel + i; c < end; ++c) {
          const int64_t at = (c - channel - i) * plane;
          pair_rows(target + (c - channel) * plane, scratch + at, partners + at, size,
                    half + c < channel_end ? size : 0);
        }
      }
    } else {
      copy(channel, channel_end, target);
    }
  }

  // Copies the pairs of channels from `first` and from `second` on, one tile's, pixel by pixel.
  void copy_pixels(const Planes<Scalar>& source, int64_t first, int64_t second, int64_t channel_end,
                   const Tiles::Place& place, Acc* scratch, Acc* target) const {
    const int64_t end = std::min(second + kTileSide, channel_end);
    if constexpr (kTiled) {
      if (source.column_step == 1 && x_.in_step <= 2) {
        return PixelCopy(source, first, second, channel_end)
            .run(y_, x_, tiles_, place.tile_y, place.tile_x, target);
      }
      if (source.channel_step == 1 && first + kTileSide <= source.channels) {
        return copy_pixels_of_channels(source, first, second, channel_end, y_, x_, tiles_,
                                       place.tile_y, place.tile_x, target);
      }
    }
    const int64_t plane = tiles_.channel_stride(), size = tiles_.channel_size();
    Acc* const partners = scratch + kTileSide * plane;
    copy_tile(source, first, first + kTileSide, y_, x_, tiles_, place.tile_y, place.tile_x,
              scratch);
    copy_tile(source, second, end, y_, x_, tiles_, place.tile_y, place.tile_x, partners);
    for (int64_t c = 0; c < kTileSide; ++c) {
      pair_rows(scratch + c * plane, scratch + c * plane, partners + c * plane, size,
                second + c < end ? size : 0);
    }
    transpose(target, kTileSide, scratch, plane, kTileSide, size);
  }

  // Pairs of channels that are copied at a time: as many as stay in the first-level cache, or as
  // where they lie side by side.
  int64_t copied_together(const Planes<Scalar>& source) const {
    constexpr int64_t kMost = kLanes<Acc>;
    const int64_t pair_bytes = 2 * tiles_.channel_stride() * int64_t{sizeof(Acc)};
    return source.channel_step == 1 ? kMost
                                    : std::clamp<int64_t>(kCopyBytes / pair_bytes, 1, kMost);
  }
  int64_t copy_scratch() const {
    return kPairs<Scalar> ? 2 * kLanes<Acc> * tiles_.channel_stride() : 0;
  }

  // Rows of outputs of a group, of all or of a block; the channels of a turn.
  struct Piece {
    int64_t group, row, rows, turn;
  };

  // The weights of some samples, a sample `stride` after the other. Forward [rows][channels][taps];
  // of pairs there are half as many, in the first places of each row. For input gradients
  // [channels][rows][taps]. Packed: for each plan [block_rows][packed_row()] from row `at_row` on.
  static void mix(const Plans& plans, const Mixer<Scalar>& mixer, int64_t sample, int64_t samples,
                  const Piece& piece, int64_t block_rows, int64_t at_row, Acc* target,
                  int64_t stride) {
    const Correlation& any = *plans[0];
    const int64_t number = entries(any.channels_of(piece.turn));
    if (any.direction_ == Direction::kForward) {
      const int64_t end = piece.turn * any.turn_channels_ + any.channels_of(piece.turn);
      if (any.by_pixels_ && !mixer.has_scales() && end <= any.channels_ - any.has_ones_) {
        return any.mix_columns(mixer, sample, samples, piece, at_row, target, stride);
      }
      if (any.packs()) return any.mix_tiles(mixer, sample, samples, piece, at_row, target, stride);
      return any.mix_rows(mixer, sample, samples, piece, target, stride);
    }
    if (!any.packs()) {
      return any.mix_entries(mixer, sample, samples, piece, 0, number, target, stride);
    }
    const int64_t size = piece.rows * any.kernel_taps_;
    const int64_t fitting = kCopyBytes / (samples * kTogether * size * int64_t{sizeof(Acc)});
    const int64_t most = std::clamp<int64_t>(fitting / kTileSide * kTileSide, kTileSide,
                                             std::max<int64_t>(kTileSide, number));
    const int64_t mixed_size = most * kTogether * size + kLanes<Acc>;
    const Scratch<Acc> mixed(samples * mixed_size);
    for (int64_t first = 0; first < number; first += most) {
      const int64_t taken = std::min(most, number - first);
      any.mix_entries(mixer, sample, samples, piece, first, taken, mixed.get(), mixed_size);
      for (int64_t i = 0; i < samples; ++i) {
        Acc* rows = target + i * stride;
        for (const Correlation* plan : plans) {
          plan->lay_tiles(&mixed[i * mixed_size], any.kernel_taps_, size, first, taken, number,
                          at_row, piece.rows, rows);
          rows += block_rows * plan->packed_row();
        }
      }
    }
    for (const Correlation* plan : plans) {
      plan->turn_tiles(samples, piece, at_row, target, stride);
      target += block_rows * plan->packed_row();
    }
  }

  int64_t channels_of(int64_t turn) const {
    return std::min(turn_channels_, channels_ - turn * turn_channels_);
  }

  // From one output's weights of a turn to the next one's, as mix() lays them out.
  int64_t weights_row(int64_t turn) const {
    if (packs()) return packed_row();
    return direction_ == Direction::kForward ? channels_of(turn) * kernel_taps_ : kernel_taps_;
  }

  void mix_rows(const Mixer<Scalar>& mixer, int64_t sample, int64_t samples, const Piece& piece,
                Acc* target, int64_t stride) const {
    const int64_t first_row = piece.group * outputs_ + piece.row, rows = piece.rows;
    const int64_t channel = piece.turn * turn_channels_, channels = channels_of(piece.turn);
    if constexpr (kPairs<Scalar>) {
      const int64_t size = channels * kernel_taps_, count = entries(channels) * kernel_taps_;
      if (!mixer.has_scales() && channel + channels <= channels_ - has_ones_) {
        const int64_t row_size = mixer.shape().row_size();
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = (first_row + r) * row_size + channel * kernel_taps_;
          mixer.mix_pairs(sample, samples, place, place + count, count, size - count,
                          target + r * size, stride);
        }
        return;
      }
      mixer.mix_piece(sample, samples, first_row, rows, channel, channels, target, stride);
      for (int64_t i = 0; i < samples; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          Acc* const pairs = target + i * stride + r * size;
          pair_rows(pairs, pairs, pairs + count, count, size - count);
        }
      }
    } else {
      mixer.mix_piece(sample, samples, first_row, rows, channel, channels, target, stride);
    }
  }

  // Lays out the weights of `rows` outputs in tiles, from row `at_row` on: `number` of a turn's
  // entries from the first on, of which tap t of entry i is source[row * row_step + i * entry_step
  // + t].
  void lay_tiles(const Acc* source, int64_t row_step, int64_t entry_step, int64_t first,
                 int64_t number, int64_t turn_entries, int64_t at_row, int64_t rows,
                 Acc* target) const {
    if constexpr (kTiled) {
      for (int64_t r = 0; r < rows; ++r) {
        lay_row({turn_entries, taps()}, source + r * row_step, entry_step, kept_taps_.data(), first,
                number, at_row + r, target);
      }
    }
  }

  // mix_rows, row by row into tiles.
  void mix_tiles(const Mixer<Scalar>& mixer, int64_t sample, int64_t samples, const Piece& piece,
                 int64_t at_row, Acc* target, int64_t stride) const {
    const int64_t size = channels_of(piece.turn) * kernel_taps_ + kLanes<Acc>;
    const int64_t number = entries(channels_of(piece.turn));
    const Scratch<Acc> mixed(samples * size);
    for (int64_t r = 0; r < piece.rows; ++r) {
      mix_rows(mixer, sample, samples, {piece.group, piece.row + r, 1, piece.turn}, mixed.get(),
               size);
      for (int64_t i = 0; i < samples; ++i) {
        lay_tiles(&mixed[i * size], 0, kernel_taps_, 0, number, number, at_row + r, 1,
                  target + i * stride);
      }
    }
    turn_tiles(samples, piece, at_row, target, stride);
  }

  // The same of plain mixtures, to be multiplied from the right: 16 rows and a block of pairs at a
  // time, which stay in the first level of the cache until they are transposed.
  void mix_columns(const Mixer<Scalar>& mixer, int64_t sample, int64_t samples, const Piece& piece,
                   int64_t at_row, Acc* target, int64_t stride) const {
    if constexpr (kTiled) {
      const TileOrder order = tile_order(channels_of(piece.turn));
      const int64_t row_size = mixer.shape().row_size(), taps = kernel_taps_;
      const int64_t first_row = piece.group * outputs_ + piece.row;
      const int64_t half = order.pairs * taps, partners = channels_of(piece.turn) * taps - half;
      const int64_t size = kTileSide * taps;
      const Scratch<Acc> mixed(samples * kTileSide * size);
      for (int64_t row = 0; row < piece.rows; row += kTileSide) {
        const int64_t rows = std::min(kTileSide, piece.rows - row);
        Acc* const tiles = target + (at_row + row) / kTileSide * order.tiles() * kTileEntries;
        for (int64_t entry = 0; entry < half; entry += size) {
          const int64_t count = std::min(size, half - entry);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t place =
                (first_row + row + r) * row_size + piece.turn * turn_channels_ * taps + entry;
            mixer.mix_pairs(sample, samples, place, place + half, count,
                            std::clamp<int64_t>(partners - entry, 0, count), &mixed[r * size],
                            kTileSide * size);
          }
          for (int64_t i = 0; i < samples; ++i) {
            lay_columns(order, &mixed[i * kTileSide * size], size, rows, entry / taps, count,
                        tiles + i * stride);
          }
        }
      }
    }
  }

  // Transposes the weights if they are to be multiplied from the right.
  void turn_tiles(int64_t samples, const Piece& piece, int64_t at_row, Acc* target,
                  int64_t stride) const {
    if constexpr (kTiled) {
      if (!by_pixels_) return;
      const TileOrder order = tile_order(channels_of(piece.turn));
      for (int64_t row = 0; row < piece.rows; row += kTileSide) {
        const int64_t place = (at_row + row) / kTileSide * order.tiles() * kTileEntries;
        for (int64_t i = 0; i < samples; ++i) {
          transpose_tiles(order.tiles(), target + i * stride + place);
        }
      }
    }
  }

  // Entries [first, first + number) of a turn of the input gradient: [entry][rows][taps]. Of pairs
  // there must be room for twice as many.
  void mix_entries(const Mixer<Scalar>& mixer, int64_t sample, int64_t samples, const Piece& piece,
                   int64_t first, int64_t number, Acc* target, int64_t stride) const {
    const int64_t rows = piece.rows;
    const int64_t output = piece.group * channels_ + piece.turn * turn_channels_ + first;
    if constexpr (kPairs<Scalar>) {
      const int64_t size = rows * kernel_taps_, channels = channels_of(piece.turn);
      const int64_t half = entries(channels);
      const int64_t pairs = std::min(number, channels - half - first);
      if (!mixer.has_scales() && !mixer.shape().attention_per_channel) {
        const int64_t row_size = mixer.shape().row_size();
        for (int64_t e = 0; e < number; ++e) {
          const int64_t place = (output + e) * row_size + piece.row * kernel_taps_;
          mixer.mix_pairs(sample, samples, place, place + half * row_size, size,
                          e < pairs ? size : 0, target + e * size, stride);
        }
        return;
      }
      mixer.mix_piece(sample, samples, output, number, piece.row, rows, target, stride);
      Acc* const partners = target + number * size;
      if (pairs > 0) {
        mixer.mix_piece(sample, samples, output + half, pairs, piece.row, rows, partners, stride);
      }
      for (int64_t i = 0; i < samples; ++i) {
        for (int64_t e = 0; e < number; ++e) {
          Acc* const entry = target + i * stride + e * size;
          pair_rows(entry, entry, entry + number * size, size, e < pairs ? size : 0);
        }
      }
    } else {
      mixer.mix_piece(sample, samples, output, number, piece.row, rows, target, stride);
    }
  }

  // One tap that reads each position where it is, in rows of pixels. Where vectors are read whole,
  // what is read beyond a row is to lie in the next one.
  bool reads_directly(const Image<const Scalar>& image) const {
    return std::is_same_v<Scalar, Acc> && taps() == 1 && !has_ones_ && y_.count == 1 &&
           (DDRF_VECTOR_BYTES == 64 || x_.count >= kLanes<Acc>) && y_.in_size == 1 &&
           y_.shift[0] == 0 && x_.shift[0] == 0 && x_.in_step == 1 && x_.count == x_.in_size &&
           image.stride[3] == 1 && image.stride[1] >= x_.count && image.stride[1] <= kMostStride &&
           image.stride[0] >= groups_ * channels_ * image.stride[1];
  }

  // ---- once ----

  // The weights of some samples, a sample `stride` after the other: [O][channels][taps] with those
  // of each turn of channels in their places, or packed [group][turn][outputs_][packed_row].
  static void mix_whole(const Plans& plans, const Mixer<Scalar>& mixer, int64_t first,
                        int64_t samples, Acc* kernels, int64_t stride) {
    const Correlation& any = *plans[0];
    if (kTogether == 1 && !any.packs()) {
      return mixer.mix_whole(first, samples, any.has_ones_, kernels);
    }
    const bool forward = any.direction_ == Direction::kForward;
    const int64_t turns = any.turns(), row_size = mixer.row_size(any.has_ones_);
    const int64_t most = any.packs() ? kMostRows : forward ? 1 : any.outputs_;
    const int64_t tasks = ceil_div(any.outputs_, most);
    parallel_for(any.groups_ * tasks * turns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t turn = task % turns, row = task / turns % tasks * most;
        const int64_t group = task / turns / tasks, channel = turn * any.turn_channels_;
        const Piece piece{group, row, std::min(most, any.outputs_ - row), turn};
        const int64_t place =
            any.packs() ? (group * turns + turn) * any.packed_rows() * packed_row(plans)
            : forward   ? (group * any.outputs_ + row) * row_size + channel * any.kernel_taps_
                        : (group * any.channels_ + channel) * row_size;
        mix(plans, mixer, first, samples, piece, any.packed_rows(), row, kernels + place, stride);
      }
    });
  }

  // `packed_row` is that of all plans.
  void run_tiles(const Job& job, int64_t first, int64_t count, const Acc* kernels,
                 int64_t packed_row) const {
    const Mixer<Scalar>& mixer = job.mixer;
    const bool forward = direction_ == Direction::kForward;
    const int64_t row_size = mixer.row_size(has_ones_);
    const int64_t turn_size =
        packs() ? packed_rows() * packed_row : turn_channels_ * (forward ? kernel_taps_ : row_size);
    const int64_t group_size =
        packs() ? turns() * turn_size : row_size * mixer.shape().out_per_group();
    const int64_t a_row = packs() ? this->packed_row() : forward ? row_size : kernel_taps_;
    const int64_t a_channel = packs() ? taps() : forward ? kernel_taps_ : row_size;
    const std::vector<Offsets> table =
        offsets(entries(turn_channels_), a_channel, tiles_.channel_stride());
    const int64_t c_row = vectors(tiles_.pixels()) * kLanes<Acc>;
    const int64_t work = channels_ * taps() * outputs_ * tiles_.pixels();
    parallel_for(
        count * groups_ * tiles_.count(), std::max<int64_t>(1, kMinWork / (work + 1)),
        [&](int64_t begin, int64_t end) {
          const Scratch<Acc> input(entries(turn_channels_) * tiles_.channel_stride());
          const Scratch<Acc> scratch(copy_scratch());
          const Scratch<Acc> column(turn_channels_ * taps());
          const Scratch<Acc> c(outputs_ * c_row);
          clear_slack(tiles_, entries(turn_channels_), input.get());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t tile = task % tiles_.count(), sample_group = task / tiles_.count();
            const int64_t sample = first + sample_group / groups_, group = sample_group % groups_;
            const Planes<Scalar> source = planes(job.image, sample, group);
            const Acc* a = kernels + (mixer.is_shared() ? group : sample_group) * group_size;
            const Part part{sample, group * outputs_, outputs_, tile, tiles_.place(tile)};
            for (int64_t channel = 0; channel == 0 || channel < channels_;
                 channel += turn_channels_) {
              const int64_t channel_end = std::min(channel + turn_channels_, channels_);
              copy_entries(source, channel, channel_end, part.place, scratch.get(), input.get());
              take_turn(job, part, channel, channel_end, a + channel / turn_channels_ * turn_size,
                        a_row, input.get(), table.data(), column.get(), c.get(), c_row);
            }
          }
        });
  }

  // ---- blocks ----

  // The pixels of samples [begin_sample, begin_sample + batch), channel by channel, with the
  // offsets that find them. Where they lie so already they are read from there; but for the very
  // last channels where vectors are loaded whole: theirs may end outside the image.
  class LaidPixels {
   public:
    LaidPixels(const Correlation& plan, const Job& job, int64_t begin_sample, int64_t batch,
               int64_t block_rows)
        : plan_(plan),
          image_(job.image),
          begin_sample_(begin_sample),
          last_(batch * plan.groups_ - 1),
          blocks_(ceil_div(plan.outputs_, block_rows)),
          direct_(plan.reads_directly(job.image)),
          copied_(copied_entries(batch) * plan.tiles_.channel_stride()) {
      const bool forward = plan.direction_ == Direction::kForward;
      const int64_t plane = plan.tiles_.channel_stride();
      for (const bool last : {false, true}) {
        const int64_t rows = last ? plan.outputs_ - (blocks_ - 1) * block_rows : block_rows;
        for (const bool in_image : {false, true}) {
          tables_[last][in_image] = plan.offsets(entries(plan.turn_channels_),
                                                 plan.packs() ? plan.taps()
                                                 : forward    ? plan.kernel_taps_
                                                              : rows * plan.kernel_taps_,
                                                 in_image ? image_.stride[1] : plane);
        }
      }
      const int64_t turns = plan.turns();
      if (direct_ && kCopiesLast) copy(last_, turns - 1, nullptr, copied_.get());
      if (direct_) return;
      parallel_for(batch * plan.groups_ * turns,
                   std::max<int64_t>(1, kMinWork / (plan.turn_channels_ * plane)),
                   [&](int64_t begin, int64_t end) {
                     const Scratch<Acc> scratch(plan.copy_scratch());
                     for (int64_t task = begin; task < end; ++task) {
                       copy(task / turns, task % turns, scratch.get(),
                            at(task / turns, task % turns * plan.turn_channels_));
                     }
                   });
    }

    // Adds the product of a turn's channels of a sample with the kernels of a block, as take_turn.
    void multiply(const Job& job, int64_t sample, int64_t group, int64_t block, int64_t row,
                  int64_t rows, int64_t turn, const Acc* kernels, int64_t a_row, Acc* column,
                  Acc* sums, int64_t c_row, Ahead* ahead) const {
      const int64_t channel = turn * plan_.turn_channels_, taken = plan_.channels_of(turn);
      const Part part{sample, group * plan_.outputs_ + row, rows, 0, plan_.tiles_.place(0)};
      const bool in_image = reads_image(sample, group, turn);
      plan_.take_turn(job, part, channel, channel + taken, kernels, a_row,
                      pixels(sample, group, turn), tables_[block == blocks_ - 1][in_image].data(),
                      column, sums, c_row, ahead);
    }

    // Fetches what `rows` outputs of a turn of a sample will read; nothing beyond the last sample.
    Ahead ahead(int64_t sample, int64_t group, int64_t turn, int64_t rows) const {
      const int64_t steps = block_count<Acc>(rows, plan_.tiles_.place(0).pixels);
      if (index(sample, group) > last_) return Ahead();
      const int64_t plane =
          reads_image(sample, group, turn) ? image_.stride[1] : plan_.tiles_.channel_stride();
      return Ahead(pixels(sample, group, turn), entries(plan_.channels_of(turn)) * plane, steps);
    }

   private:
    static constexpr bool kCopiesLast = DDRF_VECTOR_BYTES != 64;

    int64_t copied_entries(int64_t batch) const {
      if (!direct_) return batch * plan_.groups_ * entries(plan_.channels_);
      return kCopiesLast ? entries(plan_.turn_channels_) : 0;
    }
    // Of a group of a sample among all that are laid out.
    int64_t index(int64_t sample, int64_t group) const {
      return (sample - begin_sample_) * plan_.groups_ + group;
    }
    // Whether the channels of a turn of a sample are read where they lie, and where they are read.
    bool reads_image(int64_t sample, int64_t group, int64_t turn) const {
      const bool last = index(sample, group) == last_ && turn == plan_.turns() - 1;
      return direct_ && !(kCopiesLast && last);
    }
    const Acc* pixels(int64_t sample, int64_t group, int64_t turn) const {
      const int64_t channel = turn * plan_.turn_channels_;
      if constexpr (std::is_same_v<Scalar, Acc>) {
        if (reads_image(sample, group, turn)) {
          return image_.data + sample * image_.stride[0] +
                 (group * plan_.channels_ + channel) * image_.stride[1];
        }
      }
      return direct_ ? copied_.get() : at(index(sample, group), channel);
    }
    Acc* at(int64_t sample_group, int64_t channel) const {
      return copied_.get() + (sample_group * entries(plan_.channels_) + entries(channel)) *
                                 plan_.tiles_.channel_stride();
    }
    void copy(int64_t sample_group, int64_t turn, Acc* scratch, Acc* target) const {
      const int64_t channel = turn * plan_.turn_channels_;
      const int64_t channel_end = std::min(channel + plan_.turn_channels_, plan_.channels_);
      clear_slack(plan_.tiles_, entries(channel_end - channel), target);
      plan_.copy_entries(plan_.planes(image_, begin_sample_ + sample_group / plan_.groups_,
                                      sample_group % plan_.groups_),
                         channel, channel_end, plan_.tiles_.place(0), scratch, target);
    }

    const Correlation& plan_;
    const Image<const Scalar>& image_;
    int64_t begin_sample_, last_, blocks_;
    bool direct_;
    Scratch<Acc> copied_;
    std::vector<Offsets> tables_[2][2];  // of the blocks or the last; of pixels copied or not
  };

  // Samples [begin_sample, begin_sample + batch).
  static void run_in_blocks(const Plans& plans, const Job& job, int64_t begin_sample,
                            int64_t batch) {
    const Correlation& any = *plans[0];
    const Mixer<Scalar>& mixer = job.mixer;
    // Blocks of outputs whose pieces of kernels, and further plans' sums, of as many samples as may
    // be, stay in the cache.
    int64_t c_row = 0;
    for (const Correlation* plan : plans) {
      c_row = std::max(c_row, plan->vectors(plan->tiles_.place(0).pixels) * kLanes<Acc>);
    }
    const auto number = static_cast<int64_t>(plans.size());
    const int64_t piece_row =
        any.packs() ? packed_row(plans) : any.turn_channels_ * any.kernel_taps_;
    const auto fitting = [&](int64_t other) {
      return any.piece_bytes() /
             ((piece_row + (number - 1) * c_row) * other * int64_t{sizeof(Acc)});
    };
    // A kernel that is shared, or a single sample's, stays with its task in all turns, so that each
    // sample's sums are complete before the next one's begin. Rows are whole where they can be: the
    // bank is read faster so, or not at all.
    const int64_t groups = any.groups_, turns = any.turns();
    const bool shared = mixer.is_shared();
    const bool whole_rows = any.direction_ == Direction::kForward && kTogether == 1;
    const bool kept = shared || (batch == 1 && whole_rows && fitting(turns) >= kLeastKeptRows);
    const bool in_rows = kept && whole_rows;
    const bool in_bank = shared && in_rows && std::is_same_v<Scalar, Acc>;
    // A single sample is shared out by outputs.
    const int64_t most =
        batch > 1 ? kMostKeptRows : std::clamp<int64_t>(any.outputs_ / 2, kRowUnit, kMostKeptRows);
    const int64_t block_rows =
        kept ? any.rows_beside(fitting(turns), most)
             : any.best_rows(mixer.shape(), batch, fitting, std::min(most, most_rows()));
    const int64_t blocks = ceil_div(any.outputs_, block_rows);
    const int64_t most_samples =
        kept ? 2 * kMostSamples
             : most_mixed(std::clamp<int64_t>(fitting(block_rows), 1, 2 * kMostSamples));
    // Few blocks of outputs are shared out by samples.
    const int64_t least_sample_blocks = std::min(batch, ceil_div(kLeastTasks, groups * blocks));
    const int64_t block_samples =
        ceil_div(batch, std::max(ceil_div(batch, most_samples), least_sample_blocks));
    const int64_t sample_blocks = ceil_div(batch, block_samples);

    std::vector<LaidPixels> pixels;
    pixels.reserve(plans.size());
    std::vector<int64_t> places;  // of the plans' weights in a piece
    int64_t place = 0;
    for (const Correlation* plan : plans) {
      pixels.emplace_back(*plan, job, begin_sample, batch, block_rows);
      places.push_back(place);
      if (plan->packs()) place += block_rows * plan->packed_row();
    }
    parallel_for(groups * blocks * sample_blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t piece_size = block_rows * piece_row, c_size = block_rows * c_row;
      const Scratch<Acc> pieces((kept ? turns : block_samples) * piece_size);
      const Scratch<Acc> column(any.turn_channels_ * any.kernel_taps_);
      const Scratch<Acc> c((kept ? 1 : block_samples * number) * c_size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks, group_samples = task / blocks;
        const int64_t group = group_samples % groups;
        const int64_t before = group_samples / groups * block_samples;
        const int64_t sample = begin_sample + before;
        const int64_t samples = std::min(block_samples, batch - before);
        const int64_t row = block * block_rows, rows = std::min(block_rows, any.outputs_ - row);
        const int64_t first_row = group * any.outputs_ + row;
        // The blocks after a thread's first one of some samples find their pixels in the cache;
        // pairs were laid out there just now.
        const int64_t read = samples * any.channels_ * any.tiles_.channel_size();
        const bool near = kManyRegisters || read * int64_t{sizeof(Acc)} <= kNearBytes;
        const bool fetches = kTogether == 1 && (task == begin || block == 0 || !near);
        const auto mix_turn = [&](int64_t turn, int64_t first, int64_t count, Acc* target) {
          mix(plans, mixer, first, count, {group, row, rows, turn}, block_rows, 0, target,
              piece_size);
        };
        // A turn of sample i, while what is read next is fetched: turn `next_turn` of sample
        // `next`.
        const auto multiply = [&](int64_t plan, int64_t turn, int64_t i, int64_t next_turn,
                                  int64_t next, int64_t piece, Acc* sums) {
          Ahead ahead =
              fetches ? pixels[plan].ahead(sample + next, group, next_turn, rows) : Ahead();
          const Acc* kernels = &pieces[piece * piece_size + places[plan]];
          int64_t a_row = plans[plan]->weights_row(turn);
          if (in_rows) {
            kernels = pieces.get();
            if constexpr (std::is_same_v<Scalar, Acc>) {
              if (in_bank) kernels = mixer.bank_row(0, first_row);
            }
            kernels += turn * any.turn_channels_ * any.kernel_taps_;
            a_row = mixer.row_size(any.has_ones_);
          }
          pixels[plan].multiply(job, sample + i, group, block, row, rows, turn, kernels, a_row,
                                column.get(), sums, c_row, &ahead);
        };
        if (kept) {
          const int64_t mixed = shared ? mixer.kAnySample : sample;
          if (!in_rows) {
            for (int64_t turn = 0; turn < turns; ++turn) {
              mix_turn(turn, mixed, 1, &pieces[turn * piece_size]);
            }
          } else if (!in_bank) {
            mixer.mix_piece(mixed, 1, first_row, rows, 0, any.channels_, pieces.get(), 0);
          }
          for (int64_t i = 0; i < samples; ++i) {
            for (int64_t plan = 0; plan < number; ++plan) {
              for (int64_t turn = 0; turn < turns; ++turn) {
                const bool last = turn == turns - 1;
                multiply(plan, turn, i, last ? 0 : turn + 1, i + last, turn, c.get());
              }
            }
          }
          continue;
        }
        for (int64_t turn = 0; turn < turns; ++turn) {
          mix_turn(turn, sample, samples, pieces.get());
          for (int64_t i = 0; i < samples; ++i) {
            const bool last = i == samples - 1 && turn < turns - 1;
            for (int64_t plan = 0; plan < number; ++plan) {
              multiply(plan, turn, i, turn + last, last ? 0 : i + 1, i,
                       &c[(i * number + plan) * c_size]);
            }
          }
        }
      }
    });
  }

  // Rows of a block, at most `most`, of which so many have room.
  int64_t rows_beside(int64_t room, int64_t most) const {
    return even_rows(std::clamp<int64_t>(room, kRowUnit, most));
  }

  // Rows of a block, at most `most`, whose kernels are mixed for several samples, for which
  // fitting(samples) have room. More rows read pixels less often, more samples the bank.
  template <class Fitting>
  int64_t best_rows(const DynamicConvShape& shape, int64_t batch, const Fitting& fitting,
                    int64_t most) const {
    constexpr double kMixing = 2.5;  // an entry of the bank costs as much as so many pixels
    const auto pixels = static_cast<double>(tiles_.channel_size());
    int64_t best = 0;
    double least = 0;
    for (int64_t samples = most_mixed(std::min(batch, kMostSamples)); samples > 0; samples /= 2) {
      const int64_t rows = rows_beside(fitting(samples), most);
      const double kernels = shape.has_attention ? static_cast<double>(shape.bank) / samples : 1;
      const double cost = pixels / rows + kMixing * kernel_taps_ * kernels;
      if (best != 0 && cost >= least) continue;
      best = rows;
      least = cost;
    }
    return best;
  }

  // Rows of a block, at most `most`, such that the blocks are about equal and an even number.
  int64_t even_rows(int64_t most) const {
    const int64_t units = ceil_div(outputs_, kRowUnit);
    const int64_t least = ceil_div(units, std::max<int64_t>(1, most / kRowUnit));
    if (least == 1) return units * kRowUnit;
    int64_t best = units, least_waste = units;
    for (int64_t blocks = least + least % 2; blocks <= 2 * least; blocks += 2) {
      const int64_t rows = ceil_div(units, blocks);
      const int64_t waste = rows * blocks - units;
      if (waste < least_waste) {
        best = rows;
        least_waste = waste;
      }
    }
    return best * kRowUnit;
  }

  // ---- both ----

  // Adds the product of channels [begin, end), whose weights and pixels start at a and b: to the
  // sums in c, or, the last ones, if they can, to the result.
  void take_turn(const Job& job, const Part& part, int64_t begin, int64_t end, const Acc* a,
                 int64_t a_row, const Acc* b, const Offsets* table, Acc* column, Acc* c,
                 int64_t c_row, Ahead* ahead = nullptr) const {
    Sums<Acc> target{c, c_row, begin == 0 ? nullptr : c, c_row};
    const int64_t outputs = job.mixer.shape().out_channels;
    const bool forward = direction_ == Direction::kForward;
    const Epilogue<Acc> epilogue{
        job.mixer.result_scale(part.sample),
        forward ? job.mixer.betas() + part.sample * outputs + part.output : nullptr, nullptr,
        job.activation};
    const bool last = end == channels_;
    if (last) target.epilogue = &epilogue;
    if (last && in_place(job, part.place)) {
      Scalar* const result = first_of(job.result, part);
      target.width = part.place.pixels;
      if constexpr (std::is_same_v<Scalar, Acc>) {
        target.data = result;
        target.row = job.result.stride[1];
      } else if constexpr (kPairs<Scalar>) {
        target.rounded = result;
        target.rounded_row = job.result.stride[1];
        target.rounded_column = job.result.stride[3] * x_.out_step;
        if (kTiled && (target.rounded_column != 1 || !rows_follow(job.result, part.place))) {
          target.lines = {tiles_.row_stride(), part.place.columns,
                          job.result.stride[2] * y_.out_step};
        }
      }
    }
    add_product(a, a_row, part.rows, b, table, end - begin, part.place.pixels, column, target,
                ahead);
    if (last) finish(job, part, target);
  }

  Scalar* first_of(const Image<Scalar>& result, const Part& part) const {
    return result.data + part.sample * result.stride[0] + part.output * result.stride[1] +
           (y_.out_offset + part.place.y * y_.out_step) * result.stride[2] +
           (x_.out_offset + part.place.x * x_.out_step) * result.stride[3];
  }

  // Whether the rows of a place follow one another, both as computed and in the result.
  bool rows_follow(const Image<Scalar>& result, const Tiles::Place& place) const {
    const int64_t step = result.stride[3] * x_.out_step, line = result.stride[2] * y_.out_step;
    return place.rows == 1 ||
           (tiles_.row_stride() == place.columns && line == place.columns * step);
  }

  // Whether the sums of a place can go straight to the result: its pixels lie there side by side,
  // or line by line where tiles are multiplied, or have their channels side by side where they are
  // the rows of tiles; and nothing more is made of sums that are rounded.
  bool in_place(const Job& job, const Tiles::Place& place) const {
    const bool side_by_side = job.result.stride[3] * x_.out_step == 1;
    return (std::is_same_v<Scalar, Acc> || (kPairs<Scalar> && job.sums == nullptr)) &&
           !job.accumulate &&
           (side_by_side || (by_pixels_ && turns() == 1 && job.result.stride[1] == 1)) &&
           (kTiled || rows_follow(job.result, place));
  }

  // Stores those of the complete sums that are outputs, row by row, if they are not in the result.
  void finish(const Job& job, const Part& part, const Sums<Acc>& complete) const {
    const Image<Scalar>& result = job.result;
    const Acc* const source = complete.data;
    const int64_t row_stride = tiles_.row_stride();
    const int64_t step = result.stride[3] * x_.out_step, line = result.stride[2] * y_.out_step;
    const bool one = rows_follow(result, part.place);
    const int64_t rows = one ? 1 : part.place.rows;
    const int64_t columns = one ? part.place.pixels : part.place.columns;
    for (int64_t o = 0; job.sums != nullptr && o < part.rows; ++o) {
      Acc sum(0);
      for (int64_t row = 0; row < rows; ++row) {
        sum += sum_row(source + o * complete.row + row * row_stride, columns);
      }
      const int64_t plane = part.sample * groups_ * outputs_ + part.output + o;
      job.sums[plane * parts() + part.tile] = sum;
    }
    if (in_place(job, part.place)) return;
    Scalar* target = first_of(result, part);
    if (result.stride[1] == 1 && step != 1) {
      for (int64_t row = 0; row < rows; ++row) {
        transpose(target + row * line, step, source + row * row_stride, complete.row, part.rows,
                  columns);
      }
      return;
    }
    for (int64_t i = 0; i < part.rows * rows; ++i) {
      const int64_t o = i / rows, row = i % rows;
      const Acc* pixels = source + o * complete.row + row * row_stride;
      Scalar* out = target + o * result.stride[1] + row * line;
      if (job.accumulate) {
        add_row(out, pixels, columns);
      } else if (step == 1) {
        store_row(out, pixels, columns);
      } else {
        for (int64_t x = 0; x < columns; ++x) out[x * step] = static_cast<Scalar>(pixels[x]);
      }
    }
  }

  Direction direction_;
  TapAxis y_, x_;
  int64_t groups_, kernel_taps_;
  bool has_ones_;
  int64_t channels_, outputs_;
  std::vector<int64_t> kept_taps_;  // among the kernel's
  // Whether the pixels are the rows of AMX's tiles, one below the other whatever the tap is.
  bool by_pixels_ = false;
  // Whether a thread mixes the kernels of some samples and multiplies them before it goes on.
  bool by_samples_ = false;
  int64_t turn_channels_ = 1;
  bool in_blocks_ = false;
  Tiles tiles_;
  std::vector<int64_t> tap_offsets_;
};

}  // namespace ddrf_fast::DDRF_CAPABILITY
