// Threads, and the memory that each works in.

#pragma once

#include <atomic>

#include "sizes.h"

// PyTorch has loaded its OpenMP runtime, whichever it is: its threads are taken by name, so that there are no others.
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
extern "C" int omp_get_thread_num();

namespace {

// Calls body(unit, thread) for each unit on that many threads. Each thread has a range of units, and helps with others'
// when it is done: units side by side write to the same cache lines, where heads are not as wide as whole ones.
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

// Hands out parts of a workspace, each at a cache line of its own; without memory it only counts.
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
