// Vectors of `kWidth` lanes of 32 bits, as wide as the processor has them.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vectors_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vectors_avx2.h"
#else
#error "the native kernel needs AVX2, FMA and F16C, or AVX-512"
#endif
