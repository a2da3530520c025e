// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), addressed by
// (seed, offset, element): element e is word e % 4 of the block whose counter is (e / 4, offset) under the key seed.
// The same address gives the same bits in every backend, whatever the number of threads or the size of a block.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace genfuse {
GENFUSE_NAMESPACE {

struct Philox4 {
  uint32_t word[4];
};

GENFUSE_HD Philox4 philox_block(uint64_t seed, uint64_t offset, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(offset), c3 = static_cast<uint32_t>(offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 24 bits, so that every value is exact in float32 and 1 is never reached.
GENFUSE_HD float philox_to_uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

GENFUSE_HD float philox_uniform(uint64_t seed, uint64_t offset, uint64_t element) {
  return philox_to_uniform(philox_block(seed, offset, element / 4).word[element % 4]);
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse
