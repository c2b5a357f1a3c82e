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

typedef struct { /* how a launch is made; assembly.py has the same */
    u32 grid[3], threads, lds_bytes;
    u64 arguments;         /* address of the kernel's arguments */
    u32 arguments_at;      /* the SGPR that holds it */
    u32 preloaded;         /* words of arguments that lie in SGPRs right before those of the workgroup's number */
    u32 first_word;        /* of them */
    u32 group_at;          /* SGPRs of the workgroup's number… */
    u32 group_numbers[3];  /* …and which of x, y, z there are */
    u32 gfx950, late;      /* late: results land at their wait */
    u32 resident;          /* all workgroups at a time, not one after the other */
    u32 shuffled, quantum; /* waves in random order, at most so many instructions in a turn; 0: until a barrier */
    u64 seed, most_steps;  /* beyond so many the launch is given up */
} Launch;

int instruction_count(void) { return knowns; }
const char *instruction_name(int i) { return known[i].name; }
size_t size_of(int what) { return what == 0 ? sizeof(Instruction) : what == 1 ? sizeof(Launch) : sizeof(Report); }

static void begin(Wave *wave, const Launch *how, u32 group, int number) {
    u32 at = how->group_at;
    u32 place[3] = {group % how->grid[0], group / how->grid[0] % how->grid[1], group / how->grid[0] / how->grid[1]};
    /* Registers start as garbage, most of it NaN: a kernel that reads what it has not written is found out. */
    for (int i = 0; i < 512; i++) {
        u32 garbage = 0x7fd00000 ^ random_bits();
        EACH_LANE wave->v[i][lane] = garbage + 0x9e37 * (u32)lane;
    }
    for (int i = 0; i < 128; i++) wave->s[i] = 0xdead0000 + (u32)i;
    wave->scc = 0, wave->pc = 0, wave->state = RUNS, wave->saturates = 0, wave->steps = 0;
    wave->group_id = (int)group, wave->number = number;
    wave->memory = wave->local = NULL;
    set_pair(wave, EXEC, ALL);
    wave->s[M0] = ~0u;
    set_pair(wave, (int)how->arguments_at, how->arguments);
    memcpy(&wave->s[at - how->preloaded], (const u32 *)(uintptr_t)how->arguments + how->first_word, 4 * how->preloaded);
    for (int i = 0; i < 3; i++)
        if (how->group_numbers[i]) wave->s[at++] = place[i];
    EACH_LANE wave->v[0][lane] = (u32)(number * WAVE + lane);
}

/* Runs a wave for a turn; returns how many instructions it took. */
static u64 turn(Wave *wave, Instruction *program, int length, u64 most) {
    u64 before = wave->steps;
    while (wave->state == RUNS && wave->steps - before < most) {
        if (wave->pc < 0 || wave->pc >= length) {
            fault(wave, NULL, "no instruction at", (u64)wave->pc);
            wave->state = ENDED;
            break;
        }
        Instruction *in = &program[wave->pc];
        in->ran = 1;
        wave->next = wave->pc + 1;
        known[in->code].handler(wave, in);
        wave->pc = wave->next;
        wave->steps++;
    }
    return wave->steps - before;
}

/* Waves at a barrier go on when all of their workgroup that live are there. */
static void open_barrier(Wave *waves, int count, const Group *group) {
    int waiting = 0;
    for (int i = 0; i < count; i++) waiting += waves[i].state == AT_BARRIER;
    if (waiting && waiting == group->live)
        for (int i = 0; i < count; i++)
            if (waves[i].state == AT_BARRIER) waves[i].state = RUNS;
}

/* Runs workgroups that are resident together to their end. */
static int run_groups(Wave *waves, int groups, int each, const Launch *how, Instruction *program, int length) {
    int total = groups * each, live = total;
    while (live) {
        int went = 0, start = how->shuffled ? (int)(random_bits() % (u32)total) : 0;
        for (int i = 0; i < total; i++) {
            int at = (start + i) % total;
            Wave *wave = &waves[at];
            if (wave->state != RUNS) continue;
            u64 most = how->quantum ? how->shuffled ? 1 + random_bits() % how->quantum : how->quantum : how->most_steps;
            launch.report->steps += turn(wave, program, length, most);
            went = 1;
            if (launch.report->steps > how->most_steps) {
                fault(wave, &program[wave->pc], "gave up after steps", launch.report->steps);
                return 1;
            }
            if (wave->state == RUNS) continue;
            if (wave->state == ENDED) live--, wave->group->live--;
            open_barrier(&waves[at / each * each], each, wave->group);
        }
        if (!went) {
            fault(&waves[0], NULL, "all waves wait, live are", (u64)live);
            return 1;
        }
    }
    return 0;
}

static void clean_up(Wave *waves, int count) { /* of a launch that was given up */
    for (int i = 0; i < count; i++)
        for (Pending **queue = &waves[i].memory; queue; queue = queue == &waves[i].memory ? &waves[i].local : NULL)
            while (*queue) {
                Pending *p = *queue;
                *queue = p->next;
                discard(p);
            }
}

int run(Instruction *program, int length, const Launch *how, Region *regions, int region_count, Report *report) {
    int each = (int)how->threads / WAVE, total = (int)(how->grid[0] * how->grid[1] * how->grid[2]), failed = 0;
    int batch = how->resident ? total : 1;
    Wave *waves = malloc(sizeof(Wave) * (size_t)(batch * each));
    Group *groups = calloc((size_t)batch, sizeof(Group));
    launch.regions = regions, launch.count = region_count, launch.last = 0, launch.report = report;
    launch.lds_bytes = how->lds_bytes, launch.gfx950 = (int)how->gfx950, launch.late = (int)how->late;
    launch.random = how->seed * 2654435761u + 88172645463325252ull;
    memset(report, 0, sizeof *report);
    for (int i = 0; i < batch; i++) groups[i].lds = malloc(how->lds_bytes + 4);
    for (int first = 0; first < total && !failed; first += batch) {
        for (int i = 0; i < batch; i++) {
            for (u32 byte = 0; byte < how->lds_bytes; byte++) groups[i].lds[byte] = byte & 1 ? 0x7f : 0xf3; /* NaN */
            groups[i].live = each;
            for (int number = 0; number < each; number++) {
                Wave *wave = &waves[i * each + number];
                begin(wave, how, (u32)(first + i), number);
                wave->group = &groups[i];
            }
        }
        failed = run_groups(waves, batch, each, how, program, length);
        clean_up(waves, batch * each);
    }
    for (int i = 0; i < batch; i++) free(groups[i].lds);
    free(groups);
    free(waves);
    return failed;
}
