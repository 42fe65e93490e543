// Every CUDA kernel: plain pointers on the device, sizes, a stream. Each returns null or what went wrong at the launch.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

enum class Type { float32, float16, bfloat16 };
enum class Mode { cls, lasttoken, max, mean, mean_sqrt_len_tokens, weightedmean };
enum class Output { same, float32, int8, uint8, binary, ubinary };

// Makes a device the calling thread's: launches and streams are its own.
const char* select_device(int device);

// cu_seqlens (S + 1) from lengths (S), or from the rows of a mask (S, L) of bytes.
const char* plan_lengths(const std::int32_t* lengths, std::int32_t* cu_seqlens, std::int64_t S, void* stream);
const char* plan_mask(const std::uint8_t* mask, std::int32_t* cu_seqlens, std::int64_t* indices, std::int64_t S,
                      std::int64_t L, void* stream);
// Of each of `capacity` tokens: its place in its sequence, and where that begins and ends; 0, 0, 0 past the last one.
const char* plan_tokens(const std::int32_t* cu_seqlens, std::int64_t* positions, std::int32_t* low, std::int32_t* high,
                        std::int64_t S, std::int64_t capacity, void* stream);

// out[i] = x[indices[i]], and out[indices[i]] = x[i], rows of `nbytes`. An index outside [0, num_rows) reads zeros and
// writes nothing. `word` is 16, 4 or 1: what addresses and nbytes are multiples of.
const char* gather(const void* x, const std::int64_t* indices, void* out, std::int64_t count, std::int64_t num_rows,
                   std::int64_t nbytes, int word, void* stream);
const char* scatter(const void* x, const std::int64_t* indices, void* out, std::int64_t count, std::int64_t num_rows,
                    std::int64_t nbytes, int word, void* stream);

// low and step (D) are read for 8-bit outputs only.
const char* pool(const void* hidden, Type type, const std::int32_t* cu_seqlens, void* out, const float* low,
                 const float* step, std::int64_t S, int D, Mode mode, bool normalize, Output output, void* stream);

// out (T, H, K) and lse (T, H) of qkv (T, 3, H, K), 16-bit; a sequence longer than max_seqlen (<= 128) becomes NaN.
const char* attention(const void* qkv, Type type, const std::int32_t* cu_seqlens, void* out, float* lse, std::int64_t S,
                      int H, int K, int max_seqlen, float scale, void* stream);

}  // namespace fastbert::cuda
