// Attention on x86-64 CPUs with AVX2, AVX-512 or AMX, forward and backward, in blocks that stay in a core's cache.
//
// PyTorch's operators cannot do two things that this kernel does: keep float32 scores in the cache, and round half
// precision only where SDPA rounds it. build.py, beside this folder, compiles this file for the machine it runs on.
// binding.py calls the functions at the end of this file. Nothing here allocates memory; the caller passes a workspace.

#include "backward.h"
#include "forward.h"

#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Call {
    Sizes sizes;
    Strides query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    float scale;
    Index threads;
};

// The shifts and logarithms of one head's rows, from a (2, batch, heads, queries); null if they are not wanted.
inline RowSums kept_of(float *row_sums, const Sizes &sizes, Index head) {
    if (!row_sums) return {nullptr, nullptr};
    float *shifts = row_sums + head * sizes.queries;
    return {shifts, shifts + sizes.batch * sizes.heads * sizes.queries};
}

template <class Mode, class Element>
void forward(const Call &call, void *query, void *key, void *value, void *output, float *row_sums, char *memory) {
    const Forward<Mode> kernel(call.sizes, call.threads);
    const Sizes &sizes = call.sizes;
    const Index blocks = ceil_div(sizes.queries, kernel.queries), bytes = kernel.bytes();
    struct Body {
        const Call &call;
        const Forward<Mode> &kernel;
        void *query, *key, *value, *output;
        float *row_sums;
        char *memory;
        Index blocks, bytes;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }
        void operator()(Index unit, Index thread) const {
            // Units are in the order: some blocks of every head, then the next ones of every head, and so on. So
            // threads work on different rows if there are enough.
            const Sizes &sizes = call.sizes;
            const Index some = blocks / std::gcd(blocks, call.threads), heads = sizes.batch * sizes.heads;
            const Index block = unit / (heads * some) * some + unit % some;
            const Index head = unit / some % heads, b = head / sizes.heads, h = head % sizes.heads;
            Arena arena{memory + thread * bytes};
            kernel.attend(kernel.carve(arena), head_of<Element>(query, call.query, b, h, sizes.head_dim),
                          head_of<Element>(key, call.key, b, h, sizes.head_dim),
                          head_of<Element>(value, call.value, b, h, sizes.value_dim),
                          head_of<Element>(output, call.output, b, h, sizes.value_dim),
                          kept_of(row_sums, sizes, head), block * kernel.queries,
                          call.scale * static_cast<float>(M_LOG2E));
        }
    };
    parallel(sizes.batch * sizes.heads * blocks, call.threads,
             Body{call, kernel, query, key, value, output, row_sums, memory, blocks, bytes});
}

template <class Mode, class Element>
void backward(const Call &call, void *grad_output, void *query, void *key, void *value, void *output,
              float *row_sums, void *grad_query, void *grad_key, void *grad_value, float *delta, char *memory) {
    const Backward<Mode> kernel(call.sizes, call.threads);
    struct Body {
        const Call &call;
        const Backward<Mode> &kernel;
        void *grad_output, *query, *key, *value, *output;
        float *row_sums;
        void *grad_query, *grad_key, *grad_value;
        float *delta;
        char *memory;
        enum Stage { Deltas, Gradients, Sums } stage;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }

        float *grad_query_buffer(Index which) const {
            const Index spaces = std::min(kernel.threads, kernel.units()) * kernel.thread_bytes();
            return reinterpret_cast<float *>(memory + spaces + which * round_up(kernel.grad_query_floats() * 4, 64));
        }
        Matrix<Element> matrix(void *data, const Strides &strides, Index head, Index columns) const {
            if (!data) return {nullptr, 0, 0, 0};
            return head_of<Element>(data, strides, head / call.sizes.heads, head % call.sizes.heads, columns);
        }
        void operator()(Index unit, Index thread) const {
            const Sizes &sizes = call.sizes;
            const Index head = stage == Gradients ? unit / kernel.parts : unit;
            const Matrix<Element> grad = matrix(grad_output, call.grad_output, head, sizes.value_dim);
            const Matrix<Element> to = matrix(grad_query, call.grad_query, head, sizes.head_dim);
            float *deltas = delta + head * sizes.queries;
            if (stage == Deltas) {
                const Matrix<Element> out = matrix(output, call.output, head, sizes.value_dim);
                for (Index row = 0; row < sizes.queries; row++) {
                    Vector sum = zeros();
                    for (Index j = 0; j < sizes.value_dim; j += kWidth)
                        sum = fmadd(grad.floats(row, j), out.floats(row, j), sum);
                    deltas[row] = sum_of(sum);
                }
                return;
            }
            if (stage == Sums) {
                kernel.settle(to, grad_query_buffer(head * kernel.parts), kernel.parts,
                              round_up(kernel.grad_query_floats() * 4, 64) / 4, call.scale);
                return;
            }
            Arena arena{memory + thread * kernel.thread_bytes()};
            float *sums = grad_query_buffer(kernel.parts > 1 ? unit : thread);
            kernel.differentiate(kernel.carve(arena), sums, matrix(query, call.query, head, sizes.head_dim),
                                 matrix(key, call.key, head, sizes.head_dim),
                                 matrix(value, call.value, head, sizes.value_dim), grad,
                                 kept_of(row_sums, sizes, head), deltas,
                                 matrix(grad_key, call.grad_key, head, sizes.head_dim),
                                 matrix(grad_value, call.grad_value, head, sizes.value_dim), unit % kernel.parts,
                                 call.scale);
            if (kernel.parts == 1 && to.data) kernel.settle(to, sums, 1, 0, call.scale);
        }
    } body{call,       kernel,     grad_output, query, key, value, output, row_sums, grad_query, grad_key,
           grad_value, delta, memory, Body::Deltas};
    const Index heads = call.sizes.batch * call.sizes.heads;
    parallel(heads, call.threads, body);
    body.stage = Body::Gradients;
    parallel(kernel.units(), call.threads, body);
    body.stage = Body::Sums;
    if (kernel.parts > 1 && grad_query) parallel(heads, call.threads, body);
}

enum Modes { kFloat = 0, kBfloat = 1, kTiled = 2 };
enum Elements { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// Calls run(Mode, Element) and returns true if this library has the mode and the element type.
template <class Run>
bool dispatch(int mode, int element, const Run &run) {
    if (mode == kFloat) {
        if (element == kFloat32) return run(FloatMode{}, Float32{}), true;
        if (element == kFloat16) return run(FloatMode{}, Float16{}), true;
        if (element == kBfloat16) return run(FloatMode{}, Bfloat16{}), true;
    }
#if HAS_BF16
    if (mode == kBfloat && element == kBfloat16) return run(BfloatMode{}, Bfloat16{}), true;
#endif
#if HAS_AMX
    if (mode == kTiled && element == kBfloat16) return run(TiledMode{}, Bfloat16{}), true;
#endif
    return false;
}

}  // namespace

extern "C" {

// The best mode for bfloat16 that the processor has and that the system allows.
int slicemod_best_mode() {
#if HAS_AMX
    constexpr int kRequest = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return kTiled;
#endif
    return HAS_BF16 ? kBfloat : kFloat;
}

// The size of `Call`. binding.py checks that it lays out a call in the same way.
Index slicemod_call_bytes() { return sizeof(Call); }

// The number of lanes of a vector: 16 with AVX-512, 8 with AVX2.
Index slicemod_vector_lanes() { return kWidth; }

// The number of queries of a slice, and below the bytes of the workspace of each pass. -1 if this library does not have
// the mode and type.
Index slicemod_forward_rows(int mode, int element, const Call *call) {
    Index rows = -1;
    dispatch(mode, element, [&](auto m, auto) {
        rows = std::min(Forward<decltype(m)>(call->sizes, call->threads).queries, call->sizes.queries);
    });
    return rows;
}

Index slicemod_forward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) {
        const Forward<decltype(m)> kernel(call->sizes, call->threads);
        const Index units = call->sizes.batch * call->sizes.heads * ceil_div(call->sizes.queries, kernel.queries);
        bytes = std::min(call->threads, units) * kernel.bytes();
    });
    return bytes;
}

Index slicemod_backward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) { bytes = Backward<decltype(m)>(call->sizes, call->threads).bytes(); });
    return bytes;
}

// The passes return 1 when they are done, and 0 if this library does not have the mode and type.
int slicemod_forward(int mode, int element, const Call *call, void *query, void *key, void *value, void *output,
                     float *row_sums, char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        forward<decltype(m), decltype(e)>(*call, query, key, value, output, row_sums, memory);
    });
}

int slicemod_backward(int mode, int element, const Call *call, void *grad_output, void *query, void *key, void *value,
                      void *output, float *row_sums, void *grad_query, void *grad_key, void *grad_value, float *delta,
                      char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        backward<decltype(m), decltype(e)>(*call, grad_output, query, key, value, output, row_sums, grad_query,
                                           grad_key, grad_value, delta, memory);
    });
}
}

