/* An interpreter of the gfx942 and gfx950 instructions that Triton emits: a launch over the memory of this process.
 *
 * assembly.py reads the text and fills in the instructions; this file has the launch, its waves and their order. What is
 * not modelled stands in ../../CONTRIBUTING.md: hazards between instructions, caches, time, rounding inside of a product
 * of matrices.
 */

#include "machine.h"
#include "numbers.h"
#include "memory.h"
#include "scalar.h"
#include "matrix.h"
#include "vector.h"

typedef struct { /* a launch; library.py has the same */
    Instruction *program;
    u32 length, registers, grid[3], threads, lds_bytes;
    u64 arguments;        /* address of the kernel's arguments */
    u32 arguments_at;     /* the SGPR that holds it */
    u32 preloaded;        /* words of arguments that lie in SGPRs right before those of the workgroup's number */
    u32 first_word;       /* of them */
    u32 group_at;         /* SGPRs of the workgroup's number… */
    u32 group_numbers[3]; /* …and which of x, y, z there are */
} Launch;

typedef struct { /* how launches run; library.py has the same */
    u32 gfx950, late;      /* late: results land at their wait */
    u32 resident;          /* all workgroups at a time, not one after the other */
    u32 shuffled, quantum; /* waves in random order, at most so many instructions in a turn; 0: until a barrier */
    u64 seed, most_steps;  /* beyond so many the launches are given up */
} Order;

int instruction_count(void) { return knowns; }
const char *instruction_name(int i) { return known[i].name; }
size_t size_of(int what) {
    size_t sizes[] = {sizeof(Instruction), sizeof(Launch), sizeof(Order), sizeof(Report)};
    return sizes[what];
}

static void begin(Wave *wave, const Launch *of, Group *group, u32 id, int number) {
    u32 at = of->group_at;
    u32 place[3] = {id % of->grid[0], id / of->grid[0] % of->grid[1], id / of->grid[0] / of->grid[1]};
    /* Registers start as garbage, most of it NaN: a kernel that reads what it has not written is found out. */
    wave->v = malloc(of->registers * sizeof *wave->v);
    for (u32 i = 0; i < of->registers; i++) {
        u32 garbage = 0x7fd00000 ^ random_bits();
        EACH_LANE wave->v[i][lane] = garbage + 0x9e37 * (u32)lane;
    }
    for (int i = 0; i < 128; i++) wave->s[i] = 0xdead0000 + (u32)i;
    wave->scc = 0, wave->pc = 0, wave->state = RUNS, wave->saturates = 0, wave->steps = 0;
    wave->group = group, wave->group_id = (int)id, wave->number = number;
    wave->program = of->program, wave->length = (int)of->length;
    wave->memory = wave->local = NULL;
    set_pair(wave, EXEC, ALL);
    wave->s[M0] = ~0u;
    set_pair(wave, (int)of->arguments_at, of->arguments);
    memcpy(&wave->s[at - of->preloaded], (const u32 *)(uintptr_t)of->arguments + of->first_word, 4 * of->preloaded);
    for (int i = 0; i < 3; i++)
        if (of->group_numbers[i]) wave->s[at++] = place[i];
    EACH_LANE wave->v[0][lane] = (u32)(number * WAVE + lane);
}

static void begin_group(Group *group, Wave *waves, const Launch *of, u32 id) {
    group->waves = waves;
    group->count = group->live = (int)of->threads / WAVE;
    group->lds_bytes = of->lds_bytes;
    group->lds = malloc(of->lds_bytes + 4);
    for (u32 byte = 0; byte < of->lds_bytes; byte++) group->lds[byte] = byte & 1 ? 0x7f : 0xf3; /* NaN */
    for (int number = 0; number < group->count; number++) begin(&waves[number], of, group, id, number);
}

/* Runs a wave for a turn; returns how many instructions it took. */
static u64 turn(Wave *wave, u64 most) {
    u64 before = wave->steps;
    while (wave->state == RUNS && wave->steps - before < most) {
        if (wave->pc < 0 || wave->pc >= wave->length) {
            fault(wave, NULL, "no instruction at", (u64)wave->pc);
            wave->state = ENDED;
            break;
        }
        Instruction *in = &wave->program[wave->pc];
        in->ran = 1;
        wave->next = wave->pc + 1;
        known[in->code].handler(wave, in);
        wave->pc = wave->next;
        wave->steps++;
    }
    return wave->steps - before;
}

/* Waves at a barrier go on when all of their workgroup that live are there. */
static void open_barrier(Group *group) {
    int waiting = 0;
    for (int i = 0; i < group->count; i++) waiting += group->waves[i].state == AT_BARRIER;
    if (waiting && waiting == group->live)
        for (int i = 0; i < group->count; i++)
            if (group->waves[i].state == AT_BARRIER) group->waves[i].state = RUNS;
}

/* Runs waves that are resident together to their end. */
static int run_waves(Wave *waves, int total, const Order *order) {
    int live = total;
    while (live) {
        int went = 0, start = order->shuffled ? (int)(random_bits() % (u32)total) : 0;
        for (int i = 0; i < total; i++) {
            Wave *wave = &waves[(start + i) % total];
            if (wave->state != RUNS) continue;
            u64 most = order->quantum ? order->quantum : order->most_steps;
            if (order->shuffled) most = 1 + random_bits() % most;
            launch.report->steps += turn(wave, most);
            went = 1;
            if (launch.report->steps > order->most_steps) {
                fault(wave, NULL, "gave up after steps", launch.report->steps);
                return 1;
            }
            if (wave->state == RUNS) continue;
            if (wave->state == ENDED) live--, wave->group->live--;
            open_barrier(wave->group);
        }
        if (!went) {
            fault(&waves[0], NULL, "all waves wait, live are", (u64)live);
            return 1;
        }
    }
    return 0;
}

static void drop(Pending **queue) { /* of a launch that was given up */
    while (*queue) {
        Pending *p = *queue;
        *queue = p->next;
        discard(p);
    }
}

static void end(Wave *wave) {
    drop(&wave->memory);
    drop(&wave->local);
    free(wave->v);
}

/* Launches that run together: one after the other, group by group, or all of their groups at a time, as on GPUs that
 * are each other's peers. */
int run(const Launch *launches, int count, const Order *order, Region *regions, int region_count, Report *report) {
    int failed = 0, all_groups = 0, all_waves = 0;
    launch.regions = regions, launch.count = region_count, launch.last = 0, launch.report = report;
    launch.gfx950 = (int)order->gfx950, launch.late = (int)order->late;
    launch.random = order->seed * 2654435761u + 88172645463325252ull;
    memset(report, 0, sizeof *report);
    for (int i = 0; i < count; i++) {
        int own = (int)(launches[i].grid[0] * launches[i].grid[1] * launches[i].grid[2]);
        all_groups += own;
        all_waves += own * (int)launches[i].threads / WAVE;
    }
    int most_waves = order->resident ? all_waves : 16; /* a workgroup has 1024 threads at most */
    Wave *waves = malloc(sizeof(Wave) * (size_t)most_waves);
    Group *groups = calloc((size_t)all_groups, sizeof(Group));
    int held = 0, begun = 0; /* waves of the batch, groups so far */
    for (int i = 0; i < count && !failed; i++) {
        u32 own = launches[i].grid[0] * launches[i].grid[1] * launches[i].grid[2];
        for (u32 id = 0; id < own && !failed; id++) {
            begin_group(&groups[begun], &waves[held], &launches[i], id);
            held += groups[begun++].count;
            if (order->resident && begun < all_groups) continue;
            failed = run_waves(waves, held, order);
            for (int w = 0; w < held; w++) end(&waves[w]);
            held = 0;
        }
    }
    for (int i = 0; i < begun; i++) free(groups[i].lds);
    free(groups);
    free(waves);
    return failed;
}
