// Vectors of `kWidth` lanes of 32 bits, as wide as the processor has them.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif
