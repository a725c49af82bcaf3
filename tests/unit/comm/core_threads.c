/* Ranks as threads over one memory: random collectives whose results are known, for
 * ThreadSanitizer. Small slots, so that every collective takes several ticks. */
#include <stdatomic.h>
#ifdef RACY /* what would be wrong with `core.c` */
#define memory_order_acquire memory_order_relaxed
#endif
#include "core.c"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define RANKS 3
#define ROUNDS 400
#define LONGEST 700

static unsigned char *memory;
static const int32_t no_fds[RANKS] = {-1, -1, -1};

static uint32_t next(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

/* What rank q gives at place i of round `round`. */
static float value(int round, int q, uint64_t i) {
    return (float)((i * 7 + (uint64_t)round * 3 + (uint64_t)q * 5) % 11);
}

static void expect(float got, float wanted, int round) {
    if (got != wanted) {
        printf("round %d: %g instead of %g\n", round, got, wanted);
        exit(1);
    }
}

static float total(int round, uint64_t i) {
    float sum = 0;
    for (int q = 0; q < RANKS; q++) sum += value(round, q, i);
    return sum;
}

static void check(group *g, call *c, int round, float *in, float *out) {
    const uint64_t n = c->count;
    void *inputs[RANKS], *outputs[RANKS];
    for (int q = 0; q < RANKS; q++) {
        inputs[q] = in + (c->kind == REDUCE_SCATTER ? (uint64_t)q * n : 0);
        outputs[q] = out + (c->kind == ALL_GATHER ? (uint64_t)q * n : 0);
    }
    c->inputs = inputs;
    c->outputs = outputs;
    for (uint64_t i = 0; i < n * RANKS; i++) in[i] = value(round, g->rank, i);
    if (c->kind == BROADCAST) outputs[0] = in;
    int failed = shoal_run(g, c);
    if (failed != OK) {
        printf("round %d: error %d\n", round, failed);
        exit(1);
    }
    const uint64_t at = (uint64_t)g->rank * n;
    for (uint64_t i = 0; i < n; i++) {
        if (c->kind == ALL_REDUCE) expect(out[i], total(round, i), round);
        if (c->kind == REDUCE_SCATTER) expect(out[i], total(round, at + i), round);
        if (c->kind == BROADCAST) expect(in[i], value(round, (int)c->root, i), round);
        if (c->kind == ALL_GATHER)
            for (int q = 0; q < RANKS; q++)
                expect(out[(uint64_t)q * n + i], value(round, q, i), round);
    }
}

static void *be_rank(void *number) {
    static float in[RANKS][RANKS * LONGEST], out[RANKS][RANKS * LONGEST];
    const int rank = (int)(intptr_t)number;
    group g = {.base = memory, .rank = rank, .size = RANKS, .slot_bytes = 1024 + 384,
               .chunk_bytes = 1024, .single_bytes = 256, .tick = 0xffffff00u,
               .process_fds = no_fds};
    uint32_t random = 1, own = (uint32_t)rank + 77;
    for (int round = 0; round < ROUNDS; round++) {
        call c = {.kind = next(&random) % 5, .type = F32, .label = F32, .operation = SUM,
                  .root = next(&random) % RANKS, .item_bytes = 4, .count = next(&random) % LONGEST,
                  .timeout_ns = 60000000000, .spin_ns = next(&random) % 3 ? 20000 : 0};
        if (next(&own) % 8 == 0) usleep(next(&own) % 300);
        check(&g, &c, round, in[rank], out[rank]);
    }
    return NULL;
}

int main(void) {
    const size_t bytes = RANKS * (sizeof(lane) + 2 * (1024 + 384));
    memory = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    memset(memory, 0, bytes);
    for (int r = 0; r < RANKS; r++) ((lane *)memory)[r].arrived = 0xffffff00u; /* wraps soon */
    pthread_t threads[RANKS];
    for (int r = 0; r < RANKS; r++)
        pthread_create(&threads[r], NULL, be_rank, (void *)(intptr_t)r);
    for (int r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);
    printf("%d collectives, all right\n", ROUNDS);
    return 0;
}
