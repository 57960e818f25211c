// Sums, products and extremes of what the ranks sent, in the order of the ranks: all get the same.
#include "reduction.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pretend {
namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16() = default;
  BFloat16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    bool is_nan = value != value;
    uint32_t round_to_even = 0x7fff + ((wide >> 16) & 1);
    bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : (wide + round_to_even) >> 16);
  }
};

// Accumulated in Wide, rounded once.
template <class Element, class Wide>
void reduce_as(char* to, const std::vector<const char*>& parts, size_t count, ncclRedOp_t op) {
  for (size_t i = 0; i < count; ++i) {
    auto element = [&](const char* part) {
      Element value;
      memcpy(&value, part + i * sizeof value, sizeof value);
      return static_cast<Wide>(value);
    };
    Wide total = element(parts[0]);
    for (size_t k = 1; k < parts.size(); ++k) {
      Wide value = element(parts[k]);
      switch (op) {
        case ncclProd: total = total * value; break;
        case ncclMax: total = std::max(total, value); break;
        case ncclMin: total = std::min(total, value); break;
        default: total = total + value;
      }
    }
    if (op == ncclAvg) total = total / static_cast<Wide>(parts.size());
    auto rounded = static_cast<Element>(total);
    memcpy(to + i * sizeof rounded, &rounded, sizeof rounded);
  }
}

}  // namespace

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    default: return 1;
  }
}

const char* name_of(ncclDataType_t type) {
  static const char* names[] = {"int8",    "uint8",   "int32",   "uint32",   "int64",  "uint64",
                                "float16", "float32", "float64", "bfloat16", "float8", "float8"};
  return type >= 0 && type < ncclNumTypes ? names[type] : "unknown";
}

bool can_reduce(ncclDataType_t type, ncclRedOp_t op) {
  return type >= 0 && type <= ncclBfloat16 && op >= 0 && op < ncclNumOps;
}

void reduce(char* to, const std::vector<const char*>& parts, size_t count, ncclDataType_t type,
            ncclRedOp_t op) {
  switch (type) {
    case ncclInt8: return reduce_as<int8_t, int64_t>(to, parts, count, op);
    case ncclUint8: return reduce_as<uint8_t, uint64_t>(to, parts, count, op);
    case ncclInt32: return reduce_as<int32_t, int64_t>(to, parts, count, op);
    case ncclUint32: return reduce_as<uint32_t, uint64_t>(to, parts, count, op);
    case ncclInt64: return reduce_as<int64_t, int64_t>(to, parts, count, op);
    case ncclUint64: return reduce_as<uint64_t, uint64_t>(to, parts, count, op);
    case ncclFloat16: return reduce_as<_Float16, float>(to, parts, count, op);
    case ncclFloat32: return reduce_as<float, float>(to, parts, count, op);
    case ncclFloat64: return reduce_as<double, double>(to, parts, count, op);
    case ncclBfloat16: return reduce_as<BFloat16, float>(to, parts, count, op);
    default: return;
  }
}

}  // namespace pretend
