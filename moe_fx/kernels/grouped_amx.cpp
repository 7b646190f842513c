// Groups of bfloat16 rows, each times its own matrix, on a CPU with AMX tiles. Built and called by grouped_amx.py, which
// also says what the arguments are and checks them.
//
// Weights [N, K] lie in memory as one wants the left operand of a tile product, so products are computed transposed:
//     C[n, m] = sum over k of W[n, k] * rows[m, k]
// Only the few rows are laid out anew, once per call, and BLOCK weight rows are widened at a time, which stay in cache.
// Groups of very few rows leave most of a tile empty; they are dot products, from registers alone. Groups of many rows
// are left to torch.mm, which cuts its operands to fit the caches; their weights are widened for it here.

#include <c10/util/BFloat16.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <vector>

namespace {

constexpr long BLOCK = 32;  // rows, and outputs, of a product of tiles
constexpr long LANES = 16;
constexpr long STEP = 32;  // bfloat16 values in a register
constexpr long AHEAD = 8192;  // bytes of weights that are asked for early: of four rows of 1024, the next four
constexpr int FEWEST = 4;  // rows that share one read of the weights in dot products
constexpr int OUTPUTS = 4;  // outputs that are summed up side by side

// Of the kernel's asm/prctl.h: a process asks for leave to use tiles.
constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;

struct alignas(64) Line {  // what tiles are read from lies in whole lines of memory
  uint16_t values[STEP];
};

struct Weights {
  const void* data;
  const uint16_t* scale;  // int4: bfloat16 [E, N, K / group]
  const int8_t* zero;  // int4: [E, N, K / group], or none
  long K;
  long group;
};

float widened(uint16_t value) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(value) << 16)));
}

// Weights are read once, from memory, several rows at a time: too much at once for the CPU's own prefetching.
void prefetch(const void* weights) {
  _mm_prefetch(static_cast<const char*>(weights) + AHEAD, _MM_HINT_T0);
}

// How to read one row of weights, STEP values at a time, as bfloat16.

struct Bfloat16 {
  const uint16_t* row;
  Bfloat16(const Weights& w, long n) : row(static_cast<const uint16_t*>(w.data) + n * w.K) {}
  void enter(long) {}
  __m512i at(long k) const {
    prefetch(row + k);
    return _mm512_loadu_si512(row + k);
  }
};

struct Int8 {
  const int8_t* row;
  Int8(const Weights& w, long n) : row(static_cast<const int8_t*>(w.data) + n * w.K) {}
  void enter(long) {}
  __m512 floats(long k) const {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k))));
  }
  __m512i at(long k) const {
    prefetch(row + k);
    return (__m512i)_mm512_cvtne2ps_pbh(floats(k + LANES), floats(k));
  }
};

struct Int4 {
  const uint8_t* row;
  const uint16_t* scale;
  const int8_t* zero;
  __m512i values;  // what the 16 nibbles of a group stand for, twice
  Int4(const Weights& w, long n)
      : row(static_cast<const uint8_t*>(w.data) + n * (w.K / 2)),
        scale(w.scale + n * (w.K / w.group)),
        zero(w.zero ? w.zero + n * (w.K / w.group) : nullptr) {}
  void enter(long group) {
    __m512 steps = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    if (zero) steps = _mm512_sub_ps(steps, _mm512_set1_ps(zero[group]));
    const __m512 scaled = _mm512_mul_ps(steps, _mm512_set1_ps(widened(scale[group])));
    values = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
  }
  __m512i at(long k) const {
    prefetch(row + k / 2);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k / 2)));
    // Low nibbles to even places, high ones to odd. The lookup reads five bits, and the values lie there twice: what
    // the high nibble leaves in the fifth bit of an even place does not matter.
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), values);
  }
};

// Rows of 16 words become columns. Of the rows beyond `count`, the last is read again.
void transpose(const float* from, long ld, long count, float* to, long ld_to) {
  __m512 a[LANES], b[LANES];
  for (long i = 0; i < LANES; ++i) a[i] = _mm512_loadu_ps(from + std::min(i, count - 1) * ld);
  for (long i = 0; i < LANES; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (long i = 0; i < LANES; i += 4)
    for (long j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (long c = 0; c < 4; ++c) {
    const __m512 even[2] = {_mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd), _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd)};
    b[c] = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
    b[12 + c] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
  }
  for (long i = 0; i < LANES; ++i) _mm512_storeu_ps(to + i * ld_to, b[i]);
}

// `count` sums, BLOCK or half of it: a whole line of memory is written at once.
void store(const float* sums, long count, uint16_t* out) {
  const __m512 low = _mm512_loadu_ps(sums);
  if (count == BLOCK)
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + LANES), low));
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(low));
}

// The outputs n .. n + count of ROWS rows.
template <class Row, int ROWS>
void dots(const Weights& w, long n, long count, const uint16_t* x, uint16_t* out, long N) {
  for (long i = 0; i < count; i += OUTPUTS) {
    Row rows[OUTPUTS] = {Row(w, n + i), Row(w, n + i + 1), Row(w, n + i + 2), Row(w, n + i + 3)};
    __m512 sums[OUTPUTS][ROWS] = {};
    for (long start = 0; start < w.K; start += w.group) {
      for (auto& row : rows) row.enter(start / w.group);
      for (long k = start; k < start + w.group; k += STEP)
        for (int o = 0; o < OUTPUTS; ++o) {
          const __m512bh weights = (__m512bh)rows[o].at(k);
          for (int m = 0; m < ROWS; ++m)
            sums[o][m] = _mm512_dpbf16_ps(sums[o][m], (__m512bh)_mm512_loadu_si512(x + m * w.K + k), weights);
        }
    }
    for (int m = 0; m < ROWS; ++m)
      for (int o = 0; o < OUTPUTS; ++o)
        out[m * N + i + o] = c10::BFloat16(_mm512_reduce_add_ps(sums[o][m])).x;
  }
}

template <class Row>
void dots(const Weights& w, long n, long count, const uint16_t* x, long rows, uint16_t* out, long N) {
  for (; rows >= FEWEST; rows -= FEWEST, x += FEWEST * w.K, out += FEWEST * N)
    dots<Row, FEWEST>(w, n, count, x, out, N);
  if (rows == 3) dots<Row, 3>(w, n, count, x, out, N);
  if (rows == 2) dots<Row, 2>(w, n, count, x, out, N);
  if (rows == 1) dots<Row, 1>(w, n, count, x, out, N);
}

// `count` rows of weights; `pitch` values are between a row and the next, `step` between STEP values of a row and its next.
template <class Row>
void widen(const Weights& w, long n, long count, uint16_t* to, long pitch, long step) {
  for (long i = 0; i < count; ++i, to += pitch) {
    Row row(w, n + i);
    for (long start = 0; start < w.K; start += w.group) {
      row.enter(start / w.group);
      for (long k = start; k < start + w.group; k += STEP) _mm512_storeu_si512(to + k / STEP * step, row.at(k));
    }
  }
}

struct Chunk {  // up to BLOCK rows of a group
  long start, count;
  long width;  // the same, filled up to whole tiles
  size_t place;  // of its rows, laid out anew
};

struct Group {
  long expert, start, count;
  std::vector<Chunk> chunks;  // none: dot products
};

// A chunk's rows as [K / 2, width, 2]: pairs of neighbours along K stay together.
void lay_out(const Chunk& chunk, const uint16_t* rows, long K, uint16_t* laid_out) {
  for (long m = 0; m < chunk.width; m += LANES) {
    const auto* from = reinterpret_cast<const float*>(rows + (chunk.start + m) * K);
    auto* to = reinterpret_cast<float*>(laid_out + chunk.place) + m;
    for (long k = 0; k < K / 2; k += LANES)
      transpose(from + k, K / 2, std::min(LANES, chunk.count - m), to + k * chunk.width, chunk.width);
  }
}

// A tile is 16 rows of 64 bytes. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 rows of tokens.
struct Tiles {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  Tiles() { _tile_loadconfig(&config); }
  ~Tiles() { _tile_release(); }
};

// Weights, as `widen` lays them out or as they are stored, and those that are asked for early meanwhile.
struct Operand {
  const uint16_t* weights;
  long pitch, step;
  const uint16_t* next;
  long ahead;  // rows of `next`, as long as these
};

// `sums` [16 * WEIGHTS, 16 * ROWS]: products of 16 * WEIGHTS weight rows and 16 * ROWS rows of tokens, laid out.
template <int WEIGHTS, int ROWS>
void multiply(const Operand& from, long K, const uint16_t* tokens, float* sums) {
  constexpr long WIDTH = ROWS * LANES, PITCH = WIDTH * sizeof(float);
  const long pitch = from.pitch * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long k = 0; k < K; k += STEP, tokens += STEP * WIDTH) {
    for (long i = 0; i < from.ahead; ++i) _mm_prefetch(from.next + i * K + k, _MM_HINT_T1);
    const uint16_t* weights = from.weights + k / STEP * from.step;
    _tile_loadd(4, weights, pitch);
    _tile_loadd(6, tokens, PITCH);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (ROWS == 2) {
      _tile_loadd(7, tokens + 2 * LANES, PITCH);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (WEIGHTS == 2) {
      _tile_loadd(5, weights + LANES * from.pitch, pitch);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (ROWS == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, PITCH);
  if constexpr (ROWS == 2) _tile_stored(1, sums + LANES, PITCH);
  if constexpr (WEIGHTS == 2) {
    _tile_stored(2, sums + LANES * WIDTH, PITCH);
    if constexpr (ROWS == 2) _tile_stored(3, sums + LANES * WIDTH + LANES, PITCH);
  }
}

void multiply(const Operand& from, long count, long K, const uint16_t* tokens, long width, float* sums) {
  if (count == BLOCK && width == BLOCK) return multiply<2, 2>(from, K, tokens, sums);
  if (count == BLOCK) return multiply<2, 1>(from, K, tokens, sums);
  if (width == BLOCK) return multiply<1, 2>(from, K, tokens, sums);
  multiply<1, 1>(from, K, tokens, sums);
}

template <class Row, bool AS_STORED>
void run(
    const uint16_t* rows, const Weights& w, const int32_t* offsets, long E, long N, uint16_t* out, long few, long many,
    int threads) {
  const long K = w.K;
  std::vector<Group> groups;
  std::vector<Chunk> chunks;
  size_t total = 0;
  for (long e = 0, start = 0; e < E; start = std::max<long>(start, offsets[e++])) {
    if (offsets[e] <= start || offsets[e] - start > many) continue;
    Group group{e, start, offsets[e] - start, {}};
    if (group.count > few)
      for (long at = start; at < offsets[e]; at += BLOCK) {
        const long count = std::min(BLOCK, offsets[e] - at);
        const long width = (count + LANES - 1) / LANES * LANES;
        group.chunks.push_back({at, count, width, total});
        chunks.push_back(group.chunks.back());
        total += width * K;
      }
    groups.push_back(std::move(group));
  }
  const auto lines = std::make_unique_for_overwrite<Line[]>(total / STEP);
  uint16_t* laid_out = lines[0].values;
  const long blocks = (N + BLOCK - 1) / BLOCK, tasks = long(groups.size()) * blocks;
#pragma omp parallel num_threads(threads)
  {
    // Without tiles nobody waits here for the others.
    if (!chunks.empty()) {
#pragma omp for schedule(static)
      for (size_t c = 0; c < chunks.size(); ++c) lay_out(chunks[c], rows, K, laid_out);
    }
    const Tiles tiles;
    const auto buffer = std::make_unique_for_overwrite<Line[]>(AS_STORED ? 0 : K);
    alignas(64) float sums[BLOCK * BLOCK], turned[LANES * BLOCK];
#pragma omp for schedule(dynamic)
    for (long task = 0; task < tasks; ++task) {
      const Group& group = groups[task / blocks];
      const long n = task % blocks * BLOCK, count = std::min(BLOCK, N - n), row = group.expert * N + n;
      if (group.chunks.empty()) {
        dots<Row>(w, row, count, rows + group.start * K, group.count, out + group.start * N + n, N);
        continue;
      }
      const auto stored = [&](long task) {
        const long first = groups[task / blocks].expert * N + task % blocks * BLOCK;
        return static_cast<const uint16_t*>(w.data) + first * K;
      };
      Operand from{stored(task), K, STEP, nullptr, 0};
      if constexpr (AS_STORED) {
        // What this thread is likely to take next, a few rows with each chunk.
        from.next = stored(std::min(task + threads, tasks - 1));
        from.ahead = count / std::ssize(group.chunks);
      } else {
        widen<Row>(w, row, count, buffer[0].values, STEP, count * STEP);
        from = {buffer[0].values, STEP, count * STEP, nullptr, 0};
      }
      for (const Chunk& chunk : group.chunks) {
        multiply(from, count, K, laid_out + chunk.place, chunk.width, sums);
        from.next += from.ahead * K;
        for (long m = 0; m < chunk.count; m += LANES) {
          for (long i = 0; i < count; i += LANES)
            transpose(sums + i * chunk.width + m, chunk.width, LANES, turned + i, BLOCK);
          for (long j = 0; j < std::min(LANES, chunk.count - m); ++j)
            store(turned + j * BLOCK, count, out + (chunk.start + m + j) * N + n);
        }
      }
    }
  }
}

}  // namespace

extern "C" int usable() {
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

extern "C" void grouped_mm(
    const void* weights, const uint16_t* scale, const int8_t* zero, long N, long K, long bits, long group, int threads,
    const uint16_t* rows, const int32_t* offsets, uint16_t* out, long E, long few, long many) {
  const Weights w{weights, scale, zero, K, group};
  if (bits == 16) run<Bfloat16, true>(rows, w, offsets, E, N, out, few, many, threads);
  if (bits == 8) run<Int8, false>(rows, w, offsets, E, N, out, few, many, threads);
  if (bits == 4) run<Int4, false>(rows, w, offsets, E, N, out, few, many, threads);
}

extern "C" void widen(
    const void* weights, const uint16_t* scale, const int8_t* zero, long N, long K, long bits, long group, int threads,
    long expert, uint16_t* out) {
  const Weights w{weights, scale, zero, K, group};
#pragma omp parallel for num_threads(threads)
  for (long n = 0; n < N; n += BLOCK) {
    const long row = expert * N + n, count = std::min(BLOCK, N - n);
    if (bits == 8) widen<Int8>(w, row, count, out + n * K, K, STEP);
    if (bits == 4) widen<Int4>(w, row, count, out + n * K, K, STEP);
  }
}
