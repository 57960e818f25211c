// NCCL's element types and operations.
#pragma once

#include <cstddef>
#include <vector>

// NCCL's header wants CUDA's half types for a kernel's sake, and their header wants libcu++.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>

namespace pretend {

size_t size_of(ncclDataType_t type);  // bytes of an element
const char* name_of(ncclDataType_t type);
bool can_reduce(ncclDataType_t type, ncclRedOp_t op);  // not float8, no operation made by a user

// Reduces `parts`, one for each rank, of `count` elements into `to`, which may be one of them.
void reduce(char* to, const std::vector<const char*>& parts, size_t count, ncclDataType_t type,
            ncclRedOp_t op);

}  // namespace pretend
