// Runs one pass of the native kernel, for a processor that this machine only emulates.
//
// The file named on the command line has the numbers `pass` (0 forward, 1 backward), `element` and `count`, the `Call`,
// and `count` tensors: the bytes of a tensor's storage, where the tensor starts in them, and these bytes. A tensor that
// is not there has -1 bytes. The file is written back as it was, with the results in the tensors' bytes.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.cpp"

extern "C" void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
extern "C" int omp_get_thread_num() { return 0; }

// Memory that ends where a page does, before one that must not be touched.
static char *fenced(Index bytes) {
    const Index page = sysconf(_SC_PAGESIZE), whole = round_up(bytes, page);
    void *start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char *>(start) + whole, page, PROT_NONE)) std::abort();
    return static_cast<char *>(start) + whole - bytes;
}

int main(int, char **arguments) {
    std::FILE *file = std::fopen(arguments[1], "rb+");
    const auto read = [&](void *to, std::size_t bytes) {
        if (bytes && std::fread(to, bytes, 1, file) != 1) std::abort();
    };
    Index head[3];
    Call call;
    read(head, sizeof head), read(&call, sizeof call);
    const auto [pass, element, count] = head;
    struct Stored {
        long place;
        char *data;
        Index bytes;
    };
    std::vector<Stored> stored;
    std::vector<void *> t;
    for (Index i = 0; i < count; i++) {
        Index shape[2];
        read(shape, sizeof shape);
        const auto [bytes, start] = shape;
        char *data = bytes < 0 ? nullptr : fenced(bytes);
        stored.push_back({std::ftell(file), data, std::max<Index>(bytes, 0)});
        read(data, stored.back().bytes);
        t.push_back(data ? data + start : nullptr);
    }
    const auto floats = [&](int i) { return static_cast<float *>(t[i]); };
    const auto seed = static_cast<const std::int64_t *>(t[pass ? 5 : 4]);
    char *memory = fenced(round_up((pass ? slicemod_backward_bytes : slicemod_forward_bytes)(kFloat, element, &call), 64));
    const int done = pass ? slicemod_backward(kFloat, element, &call, t[0], t[1], t[2], t[3], t[4], seed, t[6], floats(7),
                                              t[8], t[9], t[10], t[11], floats(12), memory)
                          : slicemod_forward(kFloat, element, &call, t[0], t[1], t[2], t[3], seed, t[5], floats(6), memory);
    for (const Stored &of : stored) {
        std::fseek(file, of.place, SEEK_SET);
        if (of.bytes && std::fwrite(of.data, of.bytes, 1, file) != 1) std::abort();
    }
    return std::fclose(file) == 0 && done ? 0 : 1;
}
