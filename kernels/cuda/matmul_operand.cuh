// How a warpgroup of matmul gets wgmma's A operand: codes and scales from a stage in shared
// memory to registers, a piece at a time, and from there to weights.
//
//   load<p>(stage)      piece p of a unit of 128 k; kAhead: while the piece before it is
//                       decoded, else when it has been
//   begin_piece()       what was loaded last is decoded from here on
//   decode_step(p, s)   16 k of it
#pragma once

#include "load.h"
#include "matmul.h"

namespace lowbit::cuda {

#if LOWBIT_HOPPER

// Whether a piece is loaded while the one before it is decoded. With many tokens registers are
// for sums and for what several steps at once decode to, and multiplies take long enough to
// load behind. Loaded ahead and after, 4096x14336, M = 256: 3-bit 53.7 and 50.0 us, 4-bit 50.9
// and 49.1, 8-bit 53.8 and 51.8, mxfp8 57.1 and 54.2, nvfp4 51.5 and 48.8; M = 2048, where
// power is what limits, as long (H200, 2026-11-30).
constexpr bool loads_ahead(int tokens) { return tokens < 128; }

// Codes that meet x as it is stored: all lanes of a quad read the same words of a row, or each
// its own pairs.
template <class F, class T, int kTokens>
struct MatmulOperand {
  using Shape = MatmulShape<F, T, kTokens>;
  using Decode = WeightPairs<F, T>;

  static constexpr bool kAhead = loads_ahead(kTokens);
  // What a lane loads at once: its two rows, 64 k or, where registers are few and words are
  // whole, 32.
  static constexpr bool kFewRegisters = kAhead || kTokens > 256;
  static constexpr int kPieces = kFewRegisters && F::kBits % 2 == 0 ? 4 : 2;  // of a unit
  static constexpr int kChunks = 16 / kPieces;                                // of 8 k
  // Codes of a row: words, or this lane's pairs.
  static constexpr bool kOwn = Decode::kOwnPairs;
  static constexpr int kWords = kOwn ? kChunks : kChunks * F::kBits / 4;
  static constexpr int kCodeLoad = kWords % 4 == 0 ? 16 : 8;  // bytes
  static constexpr int kTurns = Shape::kSwizzle ? Shape::kSwizzle / 16 : 1;
  struct Piece {
    uint32_t words[2][kWords];
  };
  // Scales, and biases: of a piece, or of kShared pieces that lie in one group.
  static constexpr int kShared = kPieces > Shape::kEntries ? kPieces / Shape::kEntries : 1;
  static constexpr int kPieceGroups = F::kGroup * kPieces < 128 ? 128 / kPieces / F::kGroup : 1;
  static constexpr int kEntryBytes = kPieceGroups * Shape::kEntry;
  static constexpr int kEntryLoad = kEntryBytes < 16 ? kEntryBytes : 16;
  static constexpr int kEntryTurns = Shape::kEntryRow / 16;
  struct Groups {
    GroupPair of[2][kPieceGroups];
  };

  static constexpr int kAlphaExponent = Decode::kAlphaExponent;

  const Decode decode;
  // Where chunks i, i + kTurns, ... of this lane's first row begin in a stage; the second row
  // is 8 rows on.
  uint32_t code_at[kTurns], entry_at[kEntryTurns];
  Piece pieces[kAhead ? 2 : 1];
  Groups groups[kAhead ? 2 : 1];

  static constexpr __device__ int place(int p) { return kAhead ? p % 2 : 0; }

  // row: of the block's, the lane's first; c: of the quad.
  __device__ MatmulOperand(int row, int c) : decode(c) {
#pragma unroll
    for (int i = 0; i < kTurns; i++)
      code_at[i] = Shape::kCodesAt + row * Shape::kRowBytes +
                   (i ^ turn_of(row, Shape::kSwizzle)) * 16 + (kOwn ? c * 2 : 0);
#pragma unroll
    for (int i = 0; i < kEntryTurns; i++)
      entry_at[i] = Shape::kEntriesAt + row * Shape::kEntryRow +
                    (i ^ turn_of(row, Shape::kEntryRow)) * 16;
  }

  template <int p>
  __device__ __forceinline__ void load(uint32_t stage) {
    Piece& piece = pieces[place(p)];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t row = stage + r * 8 * Shape::kRowBytes;
      if constexpr (kOwn) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
          const int at = (p * kChunks + i) * 8;
          load_shared<2>(code_at[at / 16 % kTurns] + at % 16 + row, &piece.words[r][i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWords * 4; i += kCodeLoad) {
          const int at = p * kWords * 4 + i;  // in the row
          const uint32_t from =
              Shape::kSwizzle ? code_at[at / 16 % kTurns] + at % 16 : code_at[0] + uint32_t(at);
          load_shared<kCodeLoad>(from + row, &piece.words[r][i / 4]);
        }
      }
      if constexpr (p % kShared == 0) load_groups<p>(stage, r);
    }
  }
  template <int p>
  __device__ __forceinline__ void load_groups(uint32_t stage, int r) {
    constexpr int kFrom = p / kShared * kPieceGroups * Shape::kEntry, kWide = Shape::kEntry / 4;
    uint32_t v[kEntryBytes / 4];
#pragma unroll
    for (int i = 0; i < kEntryBytes; i += kEntryLoad)
      load_shared<kEntryLoad>(
          entry_at[(kFrom + i) / 16] + (kFrom + i) % 16 + stage + r * 8 * Shape::kEntryRow,
          &v[i / 4]);
#pragma unroll
    for (int i = 0; i < kPieceGroups; i++) {
      GroupPair& g = groups[place(p / kShared)].of[r][i];
      g = {v[kWide * i], v[kWide * i + kWide - 1]};
      if constexpr (Decode::kBias && !Shape::kAffine) g.bias = Decode::bias_of(g.scale);
    }
  }
  __device__ __forceinline__ void begin_piece() {}

  __device__ __forceinline__ void decode_step(int p, int s, uint32_t (&operand)[4]) const {
    const auto group = [](int j) { return j * kPieceGroups / kChunks; };
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto& w = pieces[place(p)].words[r];
      const auto& g = groups[place(p / kShared)].of[r];
      const int j = 2 * s;
      if constexpr (kOwn) {
        operand[r] = decode.own_pair(w[j], 0, g[group(j)]);
        operand[2 + r] = decode.own_pair(w[j + 1], 0, g[group(j + 1)]);
      } else if constexpr (Decode::kByTwo) {
        decode.two_pairs(w, j, g[group(j)], g[group(j + 1)], operand[r], operand[2 + r]);
      } else {
        operand[r] = decode.pair(w, j, g[group(j)]);
        operand[2 + r] = decode.pair(w, j + 1, g[group(j + 1)]);
      }
    }
  }
};

// Codes that meet x in lane order: lane c of a quad has k = 32c to 32c + 31 of a unit, which
// lie beside each other, and reads each once. Codes of a pair lie 16 bits apart, and become
// elements together: e2m1 4.1 instructions, e4m3 4.5. Groups of at most 32, a scale each.
// M = 64, nvfp4: a unit takes a warp 186 instructions where with x as it is stored it takes
// 288, and shared memory 228 wavefronts for 324 (matmul_rules.h has the times).
template <class F, class T, int kTokens>
struct MatmulLaneOperand {
  using Shape = MatmulShape<F, T, kTokens>;
  using Pairs = MovedPairs<typename F::Code, T>;
  static_assert(!Shape::kAffine && std::is_same_v<T, bf16>);

  static constexpr int kPieces = F::kBits / 4;  // 16 bytes of each of two rows
  static constexpr int kSteps = 8 / kPieces;
  static constexpr int kGroups = F::kGroup < 32 ? 32 / F::kGroup : 1;  // of the 32
  static_assert(kGroups == 1 || kPieces == 1);
  // What sums are too small by: codes by kLift, scales' entries too large by kUp.
  static constexpr int kAlphaExponent = Pairs::kLift - WeightPairs<F, T>::kUp;
  struct Piece {
    uint32_t words[2][4];
    uint32_t scales[2][kGroups];
  };

  static constexpr bool kAhead = loads_ahead(kTokens);

  uint32_t code_at, entry_at;  // in a stage, of the first row; the second is 8 rows on
  Piece now, next;

  __device__ MatmulLaneOperand(int row, int c) {
    const auto place = [row](int row_bytes, int at) {
      return uint32_t(row * row_bytes + (at ^ turn_of(row, row_bytes) * 16));
    };
    code_at = Shape::kCodesAt + place(Shape::kSwizzle, 16 * kPieces * c);
    entry_at = Shape::kEntriesAt + place(Shape::kEntryRow, kGroups * Shape::kEntry * c);
  }

  template <int p>
  __device__ __forceinline__ void load(uint32_t stage) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      Piece& piece = kAhead ? next : now;
      load_shared<16>((stage + code_at + r * 8 * Shape::kRowBytes) ^ (p * 16), piece.words[r]);
      load_shared<4 * kGroups>(stage + entry_at + r * 8 * Shape::kEntryRow, piece.scales[r]);
    }
  }
  __device__ __forceinline__ void begin_piece() {
    if constexpr (kAhead) now = next;
  }

  __device__ __forceinline__ void decode_step(int, int s, uint32_t (&operand)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t scale = now.scales[r][s * kGroups / kSteps];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int pair = 2 * s + h;
        const uint32_t word = now.words[r][pair / Pairs::kInWord];
        operand[2 * h + r] = Half<T>::multiply(Pairs::pair(word, pair % Pairs::kInWord), scale);
      }
    }
  }
};

#endif  // LOWBIT_HOPPER

}  // namespace lowbit::cuda
