// Where gradients lie in flat buckets. Pure arithmetic: nothing here knows a tensor.
//
// A bucket has two layouts of the same parameters in the same order. Dense, as a flat buffer of parameters has it: one
// parameter after the other. On the wire: cut into equal segments, one for each rank that keeps a part, each with its
// flags behind it, so that one collective carries both:
//
//     dense    | segment 0        | segment 1        |
//     wire     | segment 0 | flags | segment 1 | flags |
//
// A parameter begins at a multiple of kSlotAlignment. Where it lies over a segment's end, the cut is a multiple of
// kSquareChunk away from its first element: no chunk of the gradients' norm (formulas/norm.h), and no block of 8-bit
// states, has a part in two segments.
#pragma once

#include <cstdint>
#include <vector>

#include "formulas/norm.h"

namespace lit_fast {

constexpr std::int64_t kSlotAlignment = 16;  // elements: 64 bytes of float32

struct BucketOptions {
    std::int64_t first_capacity = 0;  // elements of the first bucket, and
    std::int64_t capacity = 0;        // of all others; a larger parameter has a bucket of its own
    std::int64_t segments = 1;
    std::int64_t flags = 0;       // for each parameter of a bucket, in each segment
    std::int64_t last_flags = 0;  // in each segment of the last bucket, behind those
};

struct Slot {
    std::int64_t index;   // of the parameter, in the order of arrival
    std::int64_t offset;  // dense, elements
};

// Elements of one parameter that lie beside each other on the wire.
struct Piece {
    std::int64_t slot;  // place in BucketLayout::slots
    std::int64_t param_begin;
    std::int64_t wire_begin;
    std::int64_t count;
};

struct BucketLayout {
    std::vector<Slot> slots;
    std::vector<Piece> pieces;  // in the order of wire_begin
    std::int64_t segment = 0;   // dense elements of each part
    std::int64_t stride = 0;    // its wire elements: segment, flags, and what is missing to a multiple of the alignment
};

// Buckets take parameters in their order for as long as they have room. numels: elements of each.
std::vector<BucketLayout> lay_out_buckets(const std::vector<std::int64_t>& numels, const BucketOptions& options);

}  // namespace lit_fast
