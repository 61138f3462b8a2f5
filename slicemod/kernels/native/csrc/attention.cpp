// Attention on CPUs with AVX2, AVX-512, AMX or NEON, forward and backward, in blocks that stay in a core's cache.
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

// The tensors of a call, as they are passed to this library. Null for those that a pass does not have or want.
struct Inputs {
    void *query, *key, *value, *mask;
    const std::int64_t *seed;  // of dropout
};
struct Results {
    void *output;
    float *row_sums;
};
struct Gradients {
    void *query, *key, *value, *mask;
    bool only_mask() const { return !query && !key && !value; }
};

// The shifts and logarithms of one head's rows, from a (2, batch, heads, queries); null if they are not wanted.
inline RowSums kept_of(float *row_sums, const Sizes &sizes, Index head) {
    if (!row_sums) return {nullptr, nullptr};
    float *shifts = row_sums + head * sizes.queries;
    return {shifts, shifts + sizes.batch * sizes.heads * sizes.queries};
}

template <class Mode, class Element>
void forward(const Call &call, const Inputs &inputs, const Results &results, char *memory) {
    const Forward<Mode> kernel(call);
    struct Body {
        const Call &call;
        const Forward<Mode> &kernel;
        const Inputs &inputs;
        const Results &results;
        char *memory;
        Index bytes;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }
        void operator()(Index unit, Index thread) const {
            // Units are in the order: some blocks of every head, then the next ones of every head, and so on. So
            // threads work on different rows if there are enough.
            const Sizes &sizes = call.sizes;
            const Index blocks = kernel.blocks(), some = blocks / std::gcd(blocks, call.threads);
            const Index heads = sizes.batch * sizes.heads, block = unit / (heads * some) * some + unit % some;
            const Index head = unit / some % heads, b = head / sizes.heads, h = head % sizes.heads;
            const Index key_head = h / sizes.group();
            Arena arena{memory + thread * bytes};
            const Head<Element> of{head_of<Element>(inputs.query, call.query, b, h, sizes.head_dim),
                                   head_of<Element>(inputs.key, call.key, b, key_head, sizes.head_dim),
                                   head_of<Element>(inputs.value, call.value, b, key_head, sizes.value_dim),
                                   head_of<Element>(results.output, call.output, b, h, sizes.value_dim),
                                   mask_of(call, inputs.mask, call.mask, sizes.keys, b, h),
                                   dropout_of(call, inputs.seed, head),
                                   kept_of(results.row_sums, sizes, head)};
            kernel.attend(kernel.carve(arena), of, block * kernel.queries);
        }
    };
    parallel(kernel.units(), call.threads, Body{call, kernel, inputs, results, memory, kernel.bytes()});
}

template <class Mode, class Element>
void backward(const Call &call, void *grad_output, const Inputs &inputs, const Results &results,
              const Gradients &gradients, float *delta, char *memory) {
    const Backward<Mode> kernel(call);
    struct Body {
        const Call &call;
        const Backward<Mode> &kernel;
        void *grad_output;
        const Inputs &inputs;
        const Results &results;
        const Gradients &gradients;
        float *delta;
        char *memory;
        enum Stage { Deltas, Differentiate, Sums, MaskGradient } stage;
        void begin() const { Mode::begin(); }
        void end() const { Mode::end(); }
        bool mask_at_once() const { return kernel.writes_mask_gradient() && !gradients.only_mask(); }

        float *grad_query_buffer(Index which) const {
            return reinterpret_cast<float *>(memory + kernel.spaces() * kernel.thread_bytes() +
                                             which * kernel.grad_query_bytes());
        }
        static Matrix<Element> matrix(void *data, const Strides &strides, Index b, Index h, Index columns) {
            if (!data) return {nullptr, 0, 0, 0};
            return head_of<Element>(data, strides, b, h, columns);
        }
        Matrix<Element> key(Index b, Index h) const { return matrix(inputs.key, call.key, b, h, call.sizes.head_dim); }
        Matrix<Element> value(Index b, Index h) const {
            return matrix(inputs.value, call.value, b, h, call.sizes.value_dim);
        }
        Matrix<Element> grad(Index b, Index h) const {
            return matrix(grad_output, call.grad_output, b, h, call.sizes.value_dim);
        }
        QueryHead<Element> query_head(Index b, Index h) const {
            const Index head = b * call.sizes.heads + h;
            const Mask mask = mask_of(call, inputs.mask, call.mask, call.sizes.keys, b, h);
            return {matrix(inputs.query, call.query, b, h, call.sizes.head_dim), grad(b, h),
                    mask, keys_before_padding(mask, call.sizes.keys), dropout_of(call, inputs.seed, head),
                    kept_of(results.row_sums, call.sizes, head), delta + head * call.sizes.queries,
                    mask_of(call, mask_at_once() ? gradients.mask : nullptr, call.grad_mask, call.sizes.keys, b, h)};
        }
        void settle(Index b, Index h, const float *sums, Index parts) const {
            const Matrix<Element> to = matrix(gradients.query, call.grad_query, b, h, call.sizes.head_dim);
            if (to.data) kernel.settle(to, sums, parts, kernel.grad_query_bytes() / 4, call.scale);
        }

        void operator()(Index unit, Index thread) const {
            const Sizes &sizes = call.sizes;
            Arena arena{memory + thread * kernel.thread_bytes()};
            if (stage == Deltas) {
                const Index b = unit / sizes.heads, h = unit % sizes.heads;
                const Matrix<Element> out = matrix(results.output, call.output, b, h, sizes.value_dim), of = grad(b, h);
                for (Index row = 0; row < sizes.queries; row++) {
                    Vector sum = zeros();
                    for (Index j = 0; j < sizes.value_dim; j += kWidth)
                        sum = fmadd(of.floats(row, j), out.floats(row, j), sum);
                    delta[unit * sizes.queries + row] = sum_of(sum);
                }
            } else if (stage == Differentiate) {
                const Index key_head = unit / kernel.parts, b = key_head / sizes.key_heads;
                const Index h = key_head % sizes.key_heads, first = h * sizes.group();
                float *sums = grad_query_buffer(kernel.parts > 1 ? unit : thread);
                kernel.differentiate(
                    kernel.carve(arena), sums, key(b, h), value(b, h),
                    [&](Index i) { return query_head(b, first + i); },
                    matrix(gradients.key, call.grad_key, b, h, sizes.head_dim),
                    matrix(gradients.value, call.grad_value, b, h, sizes.value_dim), unit % kernel.parts);
                for (Index i = 0; kernel.parts == 1 && i < sizes.group(); i++)
                    settle(b, first + i, sums + i * kernel.grad_query_floats(), 1);
            } else if (stage == Sums) {
                const Index b = unit / sizes.heads, h = unit % sizes.heads, key_head = unit / sizes.group();
                settle(b, h, grad_query_buffer(key_head * kernel.parts) + h % sizes.group() * kernel.grad_query_floats(),
                       kernel.parts);
            } else {
                const Index group = sizes.group();
                kernel.sum_mask_gradient(
                    kernel.carve(arena), unit, [&](Index b, Index h) { return query_head(b, h); },
                    [&](Index b, Index h) { return key(b, h / group); },
                    [&](Index b, Index h) { return value(b, h / group); }, gradients.mask);
            }
        }
    } body{call, kernel, grad_output, inputs, results, gradients, delta, memory, Body::Deltas};
    const Index heads = call.sizes.batch * call.sizes.heads;
    const auto run = [&](typename Body::Stage stage, Index units) {
        if (!units) return;
        body.stage = stage;
        parallel(units, call.threads, body);
    };
    run(Body::Deltas, heads);
    if (!gradients.only_mask()) run(Body::Differentiate, kernel.units());
    if (kernel.parts > 1 && gradients.query) run(Body::Sums, heads);
    if (gradients.mask && !body.mask_at_once()) run(Body::MaskGradient, kernel.mask_units().count());
}

enum Modes { kFloat = 0, kBfloat = 1, kTiled = 2 };

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

// The number of lanes of a vector: 16 with AVX-512, 8 with AVX2, 4 with NEON.
Index slicemod_vector_lanes() { return kWidth; }

// The number of queries of a slice, and below the bytes of the workspace of each pass. -1 if this library does not have
// the mode and type.
Index slicemod_forward_rows(int mode, int element, const Call *call) {
    Index rows = -1;
    dispatch(mode, element, [&](auto m, auto) {
        rows = std::min(Forward<decltype(m)>(*call).queries, call->sizes.queries);
    });
    return rows;
}

Index slicemod_forward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) {
        const Forward<decltype(m)> kernel(*call);
        bytes = std::min(call->threads, kernel.units()) * kernel.bytes();
    });
    return bytes;
}

Index slicemod_backward_bytes(int mode, int element, const Call *call) {
    Index bytes = -1;
    dispatch(mode, element, [&](auto m, auto) { bytes = Backward<decltype(m)>(*call).bytes(); });
    return bytes;
}

// The passes return 1 when they are done, and 0 if this library does not have the mode and type.
int slicemod_forward(int mode, int element, const Call *call, void *query, void *key, void *value, void *mask,
                     const std::int64_t *seed, void *output, float *row_sums, char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        forward<decltype(m), decltype(e)>(*call, {query, key, value, mask, seed}, {output, row_sums}, memory);
    });
}

int slicemod_backward(int mode, int element, const Call *call, void *grad_output, void *query, void *key, void *value,
                      void *mask, const std::int64_t *seed, void *output, float *row_sums, void *grad_query,
                      void *grad_key, void *grad_value, void *grad_mask, float *delta, char *memory) {
    return dispatch(mode, element, [&](auto m, auto e) {
        backward<decltype(m), decltype(e)>(*call, grad_output, {query, key, value, mask, seed}, {output, row_sums},
                                           {grad_query, grad_key, grad_value, grad_mask}, delta, memory);
    });
}
}
