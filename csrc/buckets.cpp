#include "buckets.h"

#include <algorithm>

#include "check.h"

namespace lit_fast {
namespace {

constexpr std::int64_t kEndless = std::int64_t{1} << 62;

std::int64_t rounded_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Gives each slot its offset. Returns where the last one ends.
std::int64_t place(std::vector<Slot>& slots, const std::vector<std::int64_t>& numels, std::int64_t segment) {
    std::int64_t end = 0;
    for (Slot& slot : slots) {
        const std::int64_t numel = numels[static_cast<std::size_t>(slot.index)];
        slot.offset = rounded_up(end, kSlotAlignment);
        const bool cut = numel > 0 && slot.offset / segment != (slot.offset + numel - 1) / segment;
        if (cut) slot.offset = rounded_up(slot.offset, kSquareChunk);  // every segment ends at a multiple of it
        end = slot.offset + numel;
    }
    return end;
}

// The shortest segments that hold the slots.
std::int64_t cut_into(std::int64_t segments, std::vector<Slot>& slots, const std::vector<std::int64_t>& numels) {
    std::int64_t elements = 0;
    for (const Slot& slot : slots) elements += numels[static_cast<std::size_t>(slot.index)];
    if (segments == 1) return std::max(rounded_up(place(slots, numels, kEndless), kSlotAlignment), kSlotAlignment);
    // Every end costs less than one chunk, so that this takes few rounds.
    std::int64_t segment = rounded_up((elements + segments - 1) / segments, kSquareChunk);
    segment = std::max(segment, kSquareChunk);
    while (place(slots, numels, segment) > segment * segments) segment += kSquareChunk;
    return segment;
}

void add_pieces(BucketLayout& layout, const std::vector<std::int64_t>& numels) {
    for (std::size_t k = 0; k < layout.slots.size(); ++k) {
        const Slot& slot = layout.slots[k];
        const std::int64_t numel = numels[static_cast<std::size_t>(slot.index)];
        for (std::int64_t begin = 0; begin < numel;) {
            const std::int64_t dense = slot.offset + begin;
            const std::int64_t rank = dense / layout.segment, within = dense % layout.segment;
            const std::int64_t count = std::min(numel - begin, layout.segment - within);
            layout.pieces.push_back({std::int64_t(k), begin, rank * layout.stride + within, count});
            begin += count;
        }
    }
}

}  // namespace

std::vector<BucketLayout> lay_out_buckets(const std::vector<std::int64_t>& numels, const BucketOptions& options) {
    check(options.first_capacity > 0 && options.capacity > 0, "a bucket's capacity is at least one element.");
    check(options.segments > 0, "a bucket has at least one segment.");
    check(options.flags >= 0 && options.last_flags >= 0, "a number of flags is not negative.");
    std::vector<BucketLayout> buckets;
    std::int64_t filled = 0;  // elements of the last bucket, a multiple of the alignment
    for (std::size_t i = 0; i < numels.size(); ++i) {
        check(numels[i] >= 0, "a number of elements is not negative.");
        const std::int64_t capacity = buckets.size() == 1 ? options.first_capacity : options.capacity;
        if (buckets.empty() || (filled > 0 && filled + numels[i] > capacity)) {
            buckets.emplace_back();
            filled = 0;
        }
        buckets.back().slots.push_back({std::int64_t(i), 0});
        filled = rounded_up(filled + numels[i], kSlotAlignment);
    }
    for (BucketLayout& bucket : buckets) {
        bucket.segment = cut_into(options.segments, bucket.slots, numels);
        std::int64_t flags = options.flags * std::int64_t(bucket.slots.size());
        if (&bucket == &buckets.back()) flags += options.last_flags;
        bucket.stride = bucket.segment + rounded_up(flags, kSlotAlignment);
        add_pieces(bucket, numels);
    }
    return buckets;
}

}  // namespace lit_fast
