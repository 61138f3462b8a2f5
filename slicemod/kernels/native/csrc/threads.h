// Threads, and the memory of each thread.

#pragma once

#include <atomic>

#include "sizes.h"

// PyTorch has already loaded an OpenMP runtime. These two functions of the runtime are called by their names, so that
// PyTorch's threads are used and no others are started.
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern "C" int omp_get_thread_num();

namespace {

// Calls body(unit, thread) for each unit, on `threads` threads. Each thread has a range of units, and helps with other
// ranges when its own is done. The ranges keep threads apart: neighbouring units may write to the same cache lines,
// because heads need not be a whole number of cache lines wide.
template <class Body>
void parallel(Index units, Index threads, const Body &body) {
    constexpr Index kMostRanges = 64;
    struct Shared {
        const Body &body;
        Index units, ranges;
        struct alignas(64) {
            std::atomic<Index> next;
        } range[kMostRanges];
        Index start(Index of) const { return units * of / ranges; }
    } shared{body, units, std::min({threads, units, kMostRanges}), {}};
    for (Index i = 0; i < shared.ranges; i++) shared.range[i].next = shared.start(i);
    GOMP_parallel(
        [](void *data) {
            Shared &of = *static_cast<Shared *>(data);
            const Index thread = omp_get_thread_num();
            of.body.begin();
            for (Index turn = 0; turn < of.ranges; turn++) {
                const Index i = (thread + turn) % of.ranges, end = of.start(i + 1);
                for (Index unit; (unit = of.range[i].next.fetch_add(1)) < end;) of.body(unit, thread);
            }
            of.body.end();
        },
        &shared, static_cast<unsigned>(std::min(threads, units)), 0);
}

// Divides a workspace into parts, each of which starts at a cache line. Without memory it only counts the bytes.
struct Arena {
    char *memory;
    Index used = 0;
    template <class Type>
    Type *take(Index count) {
        Type *part = memory ? reinterpret_cast<Type *>(memory + used) : nullptr;
        used += round_up(count * static_cast<Index>(sizeof(Type)), 64);
        return part;
    }
};

}  // namespace
