/* Collectives of the ranks of one host over memory that all of them have mapped.
 *
 *     tick t, rank r:   write my slot [t mod 2]   ->  arrive(t)  ->  wait until all have arrived(t)
 *                       read the others' slots [t mod 2]
 *
 * Why two slots are enough, and one wait a tick: a rank arrives at t only when it has finished
 * reading the slots of t-1. So who has passed the wait of t may write its slot of t+1, which is the
 * one that was read at t-1. `arrived` is stored with release and loaded with acquire, which orders
 * the slots' plain reads and writes. tests/unit/comm holds a model of this that is searched whole,
 * and builds this file under ThreadSanitizer.
 *
 * Every collective is a row of ticks. At its first one the ranks compare headers, so that nobody
 * reads a byte before kind, type and size have been found equal. An all-reduce of K chunks takes
 * K + 1 ticks: at tick k a rank gives its operands of chunk k and its sums of chunk k-1.
 *
 * Sums are in rank order, r0 + r1 + r2 + ..., element by element: their bits depend neither on the
 * place of an element in its buffer nor on how buffers are cut. bfloat16 and float16 are summed in
 * float32 and rounded once. No header of Python or torch is needed; ctypes loads the library.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <poll.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SHOAL_ABI 1
#define MAX_RANKS 64
#define LINE 64
#define SLICE_NS 50000000L /* how long a sleep is before the peers are looked at, 50 ms */

/* Loops that the compiler turns into vectors are built for several processors, and the right one is
 * taken when the library is loaded: wheels move between machines. Not under ThreadSanitizer, whose
 * start-up comes after the choice. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

enum { OK, TIMED_OUT, LOST, LEFT, DIFFERS, UNKNOWN_TYPE };
enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, BARRIER };
enum { SUM, AVERAGE, PRODUCT, MINIMUM, MAXIMUM };
enum { F32, F64, BF16, F16, U8, I8, I16, I32, I64 };

/* What a rank says of a collective before it gives anything. One cache line. */
typedef struct {
    uint64_t sequence, count;
    uint32_t kind, label, operation, root, item_bytes, unused[7];
} header;

/* A rank's place in the shared memory: written by that rank, read by the others. */
typedef struct {
    _Alignas(LINE) _Atomic uint32_t arrived; /* the last tick; a futex */
    _Atomic uint32_t sleepers;               /* who sleeps on it */
    _Atomic uint32_t left;                   /* 1: it will arrive nowhere any more */
    _Atomic uint32_t blamed;                 /* 1 + the rank for whose sake it left */
    _Alignas(LINE) header headers[2];
} lane;

typedef struct {
    unsigned char *base; /* lanes, then for each rank two slots */
    int32_t rank, size;
    uint64_t slot_bytes;   /* of one slot: operands, then sums */
    uint64_t chunk_bytes;  /* of an all-reduce: operands of one tick */
    uint64_t single_bytes; /* up to here every rank sums everything itself, in one tick */
    uint64_t sequence;
    uint32_t tick;
    int32_t culprit; /* after an error: the rank that it is about */
    const int32_t *process_fds; /* pidfds of all ranks, -1 where there is none */
} group;

typedef struct {
 /* `type` chooses the arithmetic, `label` tells types apart that share it (bool and uint8) */
    uint32_t kind, type, label, operation, root, item_bytes;
    uint64_t count;       /* elements of one rank's share */
    void *const *inputs;  /* all-reduce, all-gather, broadcast: 1; reduce-scatter: one a rank */
    void *const *outputs; /* all-reduce, reduce-scatter, broadcast: 1; all-gather: one a rank */
    int64_t timeout_ns, spin_ns;
} call;

int shoal_abi(void) { return SHOAL_ABI; }
uint64_t shoal_lane_bytes(void) { return sizeof(lane); }

static lane *lane_of(const group *g, int rank) { return (lane *)g->base + rank; }

static unsigned char *slot_of(const group *g, int rank, uint32_t tick) {
    return g->base + sizeof(lane) * (size_t)g->size +
           ((size_t)rank * 2 + (tick & 1)) * g->slot_bytes;
}

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* ---- waiting */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Ticks count on past 2^32; no two ranks are ever more than one apart. */
static int reached(uint32_t arrived, uint32_t tick) { return (int32_t)(arrived - tick) >= 0; }

static int has_arrived(const group *g, int rank, uint32_t tick) {
    return reached(atomic_load_explicit(&lane_of(g, rank)->arrived, memory_order_acquire), tick);
}

static void arrive(group *g) {
    lane *mine = lane_of(g, g->rank);
    /* Sequentially consistent, as in sleep_for: either I see the sleeper or it sees my arrival. */
    atomic_store(&mine->arrived, g->tick);
    if (atomic_load(&mine->sleepers) != 0)
        syscall(SYS_futex, &mine->arrived, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void sleep_for(group *g, int rank, uint32_t tick) {
    lane *other = lane_of(g, rank);
    const struct timespec slice = {0, SLICE_NS};
    atomic_fetch_add(&other->sleepers, 1);
    uint32_t seen = atomic_load(&other->arrived);
    if (!reached(seen, tick) && atomic_load(&other->left) == 0)
        syscall(SYS_futex, &other->arrived, FUTEX_WAIT, seen, &slice, NULL, 0);
    atomic_fetch_sub(&other->sleepers, 1);
}

/* Is somebody who has not arrived gone? What a rank gave before it went is still there. */
static int somebody_gone(group *g, uint32_t tick) {
    struct pollfd fds[MAX_RANKS];
    for (int q = 0; q < g->size; q++) {
        fds[q].fd = q == g->rank ? -1 : g->process_fds[q];
        fds[q].events = POLLIN;
        fds[q].revents = 0;
    }
    poll(fds, (nfds_t)g->size, 0);
    for (int q = 0; q < g->size; q++)
        if (fds[q].revents != 0 && !has_arrived(g, q, tick)) {
            g->culprit = q;
            return LOST;
        }
    for (int q = 0; q < g->size; q++)
        if (atomic_load(&lane_of(g, q)->left) != 0 && !has_arrived(g, q, tick)) {
            g->culprit = q;
            return LEFT;
        }
    return OK;
}

static int wait_for(group *g, int rank, const call *c) {
    const uint32_t tick = g->tick;
    if (has_arrived(g, rank, tick)) return OK;
    const int64_t begun = now_ns();
    int64_t waited = 0;
    while (waited < c->spin_ns) {
        for (int i = 0; i < 32; i++) {
            if (has_arrived(g, rank, tick)) return OK;
            relax();
        }
        waited = now_ns() - begun;
    }
    while (!has_arrived(g, rank, tick)) {
        sleep_for(g, rank, tick);
        if (has_arrived(g, rank, tick)) break;
        int gone = somebody_gone(g, tick);
        if (gone != OK) return gone;
        if (now_ns() - begun > c->timeout_ns) {
            g->culprit = rank;
            return TIMED_OUT;
        }
    }
    return OK;
}

/* Give what is in my slot, get what is in the others'. */
static int exchange(group *g, const call *c) {
    arrive(g);
    for (int q = 0; q < g->size; q++)
        if (q != g->rank) {
            int failed = wait_for(g, q, c);
            if (failed != OK) return failed;
        }
    return OK;
}

static void announce(group *g, const call *c) {
    header *mine = &lane_of(g, g->rank)->headers[g->sequence & 1];
    const header said = {g->sequence, c->count, c->kind, c->label, c->operation, c->root,
                         c->item_bytes, {0}};
    *mine = said;
}

static int compare(group *g) {
    const header *mine = &lane_of(g, g->rank)->headers[g->sequence & 1];
    for (int q = 0; q < g->size; q++)
        if (memcmp(mine, &lane_of(g, q)->headers[g->sequence & 1], sizeof(header)) != 0) {
            g->culprit = q;
            return DIFFERS;
        }
    return OK;
}

/* The exchange of tick k of a collective; at the first one the headers are compared. */
static int step(group *g, const call *c, uint64_t k) {
    int failed = exchange(g, c);
    if (failed == OK && k == 0) failed = compare(g);
    return failed;
}

/* ---- arithmetic */

static inline float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline uint16_t to_bf16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline float from_f16(uint16_t value) {
    uint32_t magnitude = value & 0x7fff, bits;
    float result;
    if (magnitude >= 0x0400) { /* normal, infinite or no number */
        bits = (magnitude << 13) + ((uint32_t)(magnitude >= 0x7c00 ? 224 : 112) << 23);
        memcpy(&result, &bits, 4);
    } else {
        result = (float)magnitude * 0x1p-24f;
    }
    return value & 0x8000 ? -result : result;
}

static inline uint16_t to_f16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((magnitude >> 13) & 0x1ff));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* the sum has the result, rounded, in its low bits */
        float positive, sum;
        memcpy(&positive, &magnitude, 4);
        sum = positive + 0.5f;
        memcpy(&bits, &sum, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | (rounded >> 13));
}

/* operands of all ranks in rank order -> first, and a copy into second unless it is NULL */
typedef void reducer(void *const *operands, int n, void *first, void *second, uint64_t count,
                     int divisor);

#define BLOCK 1024
#define AS_IT_IS(x) (x)
#define PLUS(a, b) ((a) + (b))
#define TIMES(a, b) ((a) * (b))
#define LEAST(a, b) ((b) < (a) || (b) != (b) ? (b) : (a)) /* no number, once there, stays */
#define MOST(a, b) ((b) > (a) || (b) != (b) ? (b) : (a))

#define REDUCER(name, T, ACCUMULATOR, LOAD, STORE, COMBINE)                                       \
    CLONES static void name(void *const *operands, int n, void *first, void *second,             \
                            uint64_t count, int divisor) {                                        \
        ACCUMULATOR sum[BLOCK];                                                                   \
        for (uint64_t start = 0; start < count; start += BLOCK) {                                 \
            const uint64_t m = smaller(BLOCK, count - start);                                     \
            const T *x = (const T *)operands[0] + start, *y = (const T *)operands[1] + start;     \
            for (uint64_t i = 0; i < m; i++)                                                      \
                sum[i] = (ACCUMULATOR)COMBINE((ACCUMULATOR)LOAD(x[i]), (ACCUMULATOR)LOAD(y[i]));  \
            for (int q = 2; q < n; q++) {                                                         \
                x = (const T *)operands[q] + start;                                               \
                for (uint64_t i = 0; i < m; i++)                                                  \
                    sum[i] = (ACCUMULATOR)COMBINE(sum[i], (ACCUMULATOR)LOAD(x[i]));               \
            }                                                                                     \
            if (divisor > 1)                                                                      \
                for (uint64_t i = 0; i < m; i++) sum[i] = (ACCUMULATOR)(sum[i] / divisor);        \
            T *out = (T *)first + start;                                                          \
            for (uint64_t i = 0; i < m; i++) out[i] = (T)STORE(sum[i]);                           \
            if (second != NULL) memcpy((T *)second + start, out, m * sizeof(T));                  \
        }                                                                                         \
    }

#define REDUCERS(t, T, A, LOAD, STORE)            \
    REDUCER(sum_##t, T, A, LOAD, STORE, PLUS)     \
    REDUCER(product_##t, T, A, LOAD, STORE, TIMES) \
    REDUCER(least_##t, T, A, LOAD, STORE, LEAST)  \
    REDUCER(most_##t, T, A, LOAD, STORE, MOST)

REDUCERS(f32, float, float, AS_IT_IS, AS_IT_IS)
REDUCERS(f64, double, double, AS_IT_IS, AS_IT_IS)
REDUCERS(bf16, uint16_t, float, from_bf16, to_bf16)
REDUCERS(f16, uint16_t, float, from_f16, to_f16)
REDUCERS(u8, uint8_t, uint8_t, AS_IT_IS, AS_IT_IS)
REDUCERS(i8, int8_t, int8_t, AS_IT_IS, AS_IT_IS)
REDUCERS(i16, int16_t, int16_t, AS_IT_IS, AS_IT_IS)
REDUCERS(i32, int32_t, int32_t, AS_IT_IS, AS_IT_IS)
REDUCERS(i64, int64_t, int64_t, AS_IT_IS, AS_IT_IS)

#define ROW(t) {sum_##t, sum_##t, product_##t, least_##t, most_##t}
static reducer *const REDUCE[][5] = {ROW(f32), ROW(f64), ROW(bf16), ROW(f16), ROW(u8),
                                     ROW(i8),  ROW(i16), ROW(i32),  ROW(i64)};
static const unsigned ITEM[] = {4, 8, 2, 2, 1, 1, 2, 4, 8};

static void reduce(const group *g, const call *c, void *const *operands, void *first, void *second,
                   uint64_t count) {
    int divisor = c->operation == AVERAGE ? g->size : 1;
    REDUCE[c->type][c->operation](operands, g->size, first, second, count, divisor);
}

static void copy(void *to, const void *from, uint64_t bytes) {
    if (to != from && bytes != 0) memcpy(to, from, bytes);
}

/* ---- collectives */

static int barrier(group *g, const call *c) { return step(g, c, 0); }

static int broadcast(group *g, const call *c) {
    const uint64_t bytes = c->count * c->item_bytes;
    uint64_t k = 0, at = 0;
    do {
        const uint64_t m = smaller(g->slot_bytes, bytes - at);
        g->tick++;
        if ((uint32_t)g->rank == c->root)
            copy(slot_of(g, g->rank, g->tick), (unsigned char *)c->inputs[0] + at, m);
        int failed = step(g, c, k++);
        if (failed != OK) return failed;
        if ((uint32_t)g->rank != c->root)
            copy((unsigned char *)c->outputs[0] + at, slot_of(g, (int)c->root, g->tick), m);
        at += m;
    } while (at < bytes);
    return OK;
}

static int all_gather(group *g, const call *c) {
    const uint64_t bytes = c->count * c->item_bytes;
    uint64_t k = 0, at = 0;
    do {
        const uint64_t m = smaller(g->slot_bytes, bytes - at);
        const unsigned char *own = (const unsigned char *)c->inputs[0] + at;
        g->tick++;
        copy(slot_of(g, g->rank, g->tick), own, m);
        int failed = step(g, c, k++);
        if (failed != OK) return failed;
        for (int i = 0; i < g->size; i++) {
            int q = (g->rank + i) % g->size; /* not all from the same rank at once */
            const unsigned char *from = q == g->rank ? own : slot_of(g, q, g->tick);
            copy((unsigned char *)c->outputs[q] + at, from, m);
        }
        at += m;
    } while (at < bytes);
    return OK;
}

/* A slot holds one piece for each rank. */
static int reduce_scatter(group *g, const call *c) {
    const uint64_t piece = g->slot_bytes / (uint64_t)g->size / LINE * LINE;
    const uint64_t most = piece / c->item_bytes;
    uint64_t k = 0, at = 0;
    do {
        const uint64_t m = smaller(most, c->count - at), from = at * c->item_bytes;
        void *operands[MAX_RANKS];
        g->tick++;
        for (int q = 0; q < g->size; q++)
            if (q != g->rank)
                copy(slot_of(g, g->rank, g->tick) + (uint64_t)q * piece,
                     (unsigned char *)c->inputs[q] + from, m * c->item_bytes);
        int failed = step(g, c, k++);
        if (failed != OK) return failed;
        for (int q = 0; q < g->size; q++)
            operands[q] = q == g->rank ? (unsigned char *)c->inputs[q] + from
                                       : slot_of(g, q, g->tick) + (uint64_t)g->rank * piece;
        reduce(g, c, operands, (unsigned char *)c->outputs[0] + from, NULL, m);
        at += m;
    } while (at < c->count);
    return OK;
}

/* Small: every rank gets everything and sums it itself. One tick. */
static int all_reduce_at_once(group *g, const call *c) {
    void *operands[MAX_RANKS];
    g->tick++;
    copy(slot_of(g, g->rank, g->tick), c->inputs[0], c->count * c->item_bytes);
    int failed = step(g, c, 0);
    if (failed != OK) return failed;
    for (int q = 0; q < g->size; q++)
        operands[q] = q == g->rank ? c->inputs[0] : slot_of(g, q, g->tick);
    reduce(g, c, operands, c->outputs[0], NULL, c->count);
    return OK;
}

/* Elements of a chunk that come before rank q's part of it; whole cache lines where they can be. */
static uint64_t before(uint64_t length, int q, int n, uint64_t item_bytes) {
    const uint64_t line = LINE / item_bytes;
    const uint64_t part = ((length + (uint64_t)n - 1) / (uint64_t)n + line - 1) / line * line;
    return smaller(part * (uint64_t)q, length);
}

static int all_reduce_in_chunks(group *g, const call *c) {
    const uint64_t item = c->item_bytes, most = g->chunk_bytes / item;
    const uint64_t chunks = (c->count + most - 1) / most;
    const int me = g->rank, n = g->size;
    unsigned char *in = c->inputs[0], *out = c->outputs[0];
    for (uint64_t k = 0; k <= chunks; k++) {
        const uint64_t start = k * most, length = k < chunks ? smaller(most, c->count - start) : 0;
        const uint64_t mine = before(length, me, n, item), end = before(length, me + 1, n, item);
        g->tick++;
        unsigned char *slot = slot_of(g, me, g->tick);
        copy(slot, in + start * item, mine * item);
        copy(slot + end * item, in + (start + end) * item, (length - end) * item);
        int failed = step(g, c, k);
        if (failed != OK) return failed;
        if (k < chunks) { /* my sums go out with the next tick, whose slot nobody reads any more */
            void *operands[MAX_RANKS];
            for (int q = 0; q < n; q++)
                operands[q] = q == me ? in + (start + mine) * item
                                      : slot_of(g, q, g->tick) + mine * item;
            reduce(g, c, operands, slot_of(g, me, g->tick + 1) + g->chunk_bytes,
                   out + (start + mine) * item, end - mine);
        }
        for (int q = 0; k > 0 && q < n; q++) {
            if (q == me) continue;
            const uint64_t was = smaller(most, c->count - (k - 1) * most);
            const uint64_t from = before(was, q, n, item), to = before(was, q + 1, n, item);
            copy(out + ((k - 1) * most + from) * item, slot_of(g, q, g->tick) + g->chunk_bytes,
                 (to - from) * item);
        }
    }
    return OK;
}

static int all_reduce(group *g, const call *c) {
    if (c->count * c->item_bytes <= g->single_bytes) return all_reduce_at_once(g, c);
    return all_reduce_in_chunks(g, c);
}

/* Run one collective. Every rank of the group calls this with the same kind, type and count, in the
 * same order. After an error the group is of no more use; g->culprit says which rank it is about. */
int shoal_run(group *g, const call *c) {
    const int reduces = c->kind == ALL_REDUCE || c->kind == REDUCE_SCATTER;
    if (reduces && (c->type > I64 || c->operation > MAXIMUM || c->item_bytes != ITEM[c->type]))
        return UNKNOWN_TYPE;
    g->sequence++;
    if (g->size == 1) {
        if (c->kind != BARRIER) copy(c->outputs[0], c->inputs[0], c->count * c->item_bytes);
        return OK;
    }
    announce(g, c);
    switch (c->kind) {
    case ALL_REDUCE: return all_reduce(g, c);
    case REDUCE_SCATTER: return reduce_scatter(g, c);
    case ALL_GATHER: return all_gather(g, c);
    case BROADCAST: return broadcast(g, c);
    case BARRIER: g->tick++; return barrier(g, c);
    default: return UNKNOWN_TYPE;
    }
}

/* Say that this rank will arrive nowhere any more, and wake who waits for it. */
void shoal_leave(group *g, int blamed) {
    lane *mine = lane_of(g, g->rank);
    atomic_store(&mine->blamed, (uint32_t)(blamed + 1));
    atomic_store(&mine->left, 1);
    syscall(SYS_futex, &mine->arrived, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
