// quantize, dequantize, pack_int4, unpack_int4 on the CPU. Parallel over rows (packing: over
// chunks). Bound by memory; a row is converted to fp32 once and read twice from cache.
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_quantize.h"
#include "kernels/cpu/vec.h"
#include "kernels/quantize.h"

namespace quarot::cpu::QUAROT_ISA {

namespace {

/// Codes that one task of pack_int4 handles; a multiple of 16.
constexpr int64_t kPackChunk = 4096;

template <DType kDtype>
void quantize_rows(const QuantizeArgs& args, const Executor& executor) {
  const int64_t n = args.x.n;
  parallel_rows(executor, args.x.rows, n, [&](int64_t begin, int64_t end) {
    const Scratch row(n);
    const CodeScratch codes(args.out.packed ? n : 0);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = r * args.x.row_stride;
      for (int64_t i = 0; i < n; i += kLanes) {
        store(row.data() + i, load_upto<kDtype>(args.x.data, first + i, first + n));
      }
      quantize_row(row.data(), n, args.out, r, codes.data());
    }
  });
}

template <DType kDtype>
void dequantize_rows(const DequantizeArgs& args, const Executor& executor) {
  const int64_t n = args.n;
  const int64_t groups = args.group == n ? 1 : n / args.group;
  parallel_rows(executor, args.rows, n, [&](int64_t begin, int64_t end) {
    const CodeScratch unpacked(n);
    for (int64_t r = begin; r < end; ++r) {
      const int8_t* codes = static_cast<const int8_t*>(args.codes) + r * n;
      if (args.packed) {
        unpack_row(static_cast<const uint8_t*>(args.codes) + r * (n / kInt4PerByte), n,
                   unpacked.data());
        codes = unpacked.data();
      }
      for (int64_t g = 0; g < groups; ++g) {
        const F32 scale = f32(args.scale[r * groups + g]);
        const I32 zero = i32(args.zero == nullptr ? 0 : args.zero[r * groups + g]);
        const int64_t first = g * args.group, last = first + args.group;
        for (int64_t i = first; i < last; i += kLanes) {
          const int64_t count = last - i;
          I32 code;
          if (count >= kLanes) {
            code = load_i8(codes + i);
          } else {
            int8_t tail[kLanes] = {};
            __builtin_memcpy(tail, codes + i, static_cast<size_t>(count));
            code = load_i8(tail);
          }
          store_upto<kDtype>(args.out, r * n + i, r * n + last, to_f32(code - zero) * scale);
        }
      }
    }
  });
}

}  // namespace

void quantize(const QuantizeArgs& args, const Executor& executor) {
  switch (args.x.dtype) {
    case DType::f32:
      return quantize_rows<DType::f32>(args, executor);
    case DType::f16:
      return quantize_rows<DType::f16>(args, executor);
    case DType::bf16:
      return quantize_rows<DType::bf16>(args, executor);
  }
  __builtin_unreachable();
}

void dequantize(const DequantizeArgs& args, const Executor& executor) {
  switch (args.dtype) {
    case DType::f32:
      return dequantize_rows<DType::f32>(args, executor);
    case DType::f16:
      return dequantize_rows<DType::f16>(args, executor);
    case DType::bf16:
      return dequantize_rows<DType::bf16>(args, executor);
  }
  __builtin_unreachable();
}

void pack_int4(const PackArgs& args, const Executor& executor) {
  const int64_t chunks = ceil_div(args.count, kPackChunk);
  parallel_rows(executor, chunks, kPackChunk, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPackChunk;
    const int64_t last = end == chunks ? args.count : end * kPackChunk;
    pack_row(args.codes + first, last - first, args.packed + first / kInt4PerByte);
  });
}

void unpack_int4(const PackArgs& args, const Executor& executor) {
  const int64_t chunks = ceil_div(args.count, kPackChunk);
  parallel_rows(executor, chunks, kPackChunk, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPackChunk;
    const int64_t last = end == chunks ? args.count : end * kPackChunk;
    unpack_row(args.packed + first / kInt4PerByte, last - first, args.codes + first);
  });
}

}  // namespace quarot::cpu::QUAROT_ISA
