// A call: sizes and strides of its tensors, and the other arguments. binding.py fills in the same structure.

#pragma once

#include <cmath>

#include "sizes.h"

struct Sizes {
    Index batch, heads, queries, keys, head_dim, value_dim;
    Index key_heads;  // of keys and values; each serves `group()` heads of queries
    Index group() const { return heads / key_heads; }
};

struct Strides {
    Index batch, head, row, column;
};

enum Elements { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kBool = 3 };

struct Call {
    Sizes sizes;
    Strides query, key, value, output, grad_output, grad_query, grad_key, grad_value;
    Strides mask, grad_mask;  // 0 along the dimensions in which the mask has size 1
    Index mask_element;       // one of `Elements`, or -1 without a mask
    Index mask_gradient;      // whether it is wanted
    Index causal;             // whether query i sees only the keys 0 to i
    float scale, dropout_p;
    Index threads;

    bool masked() const { return mask_element >= 0; }
    bool drops() const { return dropout_p > 0; }
    // The factor that makes exponents of 2 of scores. A mask is added to scaled scores, so these are scaled before.
    float exponent() const { return (masked() ? 1 : scale) * static_cast<float>(M_LOG2E); }
};
