/* What a CDNA compute unit holds, and what the other files build on: waves of 64 lanes, the LDS of their workgroup,
 * decoded instructions, and the list of instructions that exist. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;

#define WAVE 64                 /* lanes of a wave */
#define EACH_LANE for (int lane = 0; lane < WAVE; lane++)
#define ALL (~(u64)0)

/* --- what an instruction is made of; assembly.py fills these in and has the same fields in the same order --- */

enum { NOTHING, VECTOR, SCALAR, CONSTANT, SCC, VCCZ, EXECZ }; /* kinds of operands */

typedef struct {
    u8 kind, negative, absolute;
    u8 part, extend; /* SDWA: which bytes are read, and whether they are extended by their sign */
    u16 index;       /* of the first register */
    u64 value;       /* of a constant */
} Operand;

typedef struct {
    u32 code; /* place in the list of instructions */
    i32 line, target;
    Operand to, also_to, from[4];
    i32 offset, second_offset;
    u32 flags;
    u8 op_sel, op_sel_hi, neg_lo, neg_hi;                /* packed operands: one bit an operand */
    u8 dpp, dpp_by, row_mask, bank_mask, bound, quad[4]; /* where a lane's first operand comes from */
    u8 to_part, to_rest, scale;                          /* SDWA: bytes written, and what becomes of the others; omod */
    u8 ran;                                              /* set when a wave gets here */
} Instruction;

enum { CLAMP = 1, RETURNS = 2, INTO_LDS = 4, OFFSET_BY_LANE = 8, SDWA = 16, DPP = 32 }; /* flags */
enum { WHOLE = 6 };                                                                    /* part: all 32 bits */

/* --- state --- */

typedef struct Pending Pending; /* memory.h: what lands at a wait */

typedef struct Wave Wave;

typedef struct { /* a workgroup */
    u8 *lds;
    u32 lds_bytes;
    Wave *waves;
    int count, live; /* of its waves, and of those that have not ended */
} Group;

struct Wave {
    u32 (*v)[WAVE]; /* vector registers, the accumulation registers behind the others; as many as its kernel names */
    u32 s[128];
    u32 scc;
    int pc, next;
    int state, group_id, number;
    int saturates; /* FP16_OVFL of the MODE register: fp8 conversions give the largest value, not NaN */
    u64 steps;
    Group *group;
    Instruction *program;
    int length;
    Pending *memory, *local; /* what vmcnt and lgkmcnt count, oldest first */
};

enum { RUNS, AT_BARRIER, ENDED }; /* states of a wave */
enum { M0 = 124, VCC = 106, EXEC = 126 };

typedef struct {
    u64 start, size;
} Region; /* memory that a launch may touch */

typedef struct {
    u64 steps, faults, outside_lds, outside_buffer;
    char text[4000];
} Report;

static struct { /* of the launches that run together: there is one such at a time */
    Region *regions;
    int count, last;
    Report *report;
    int gfx950, late;
    u64 random;
} launch;

static u32 random_bits(void) {
    launch.random ^= launch.random << 13;
    launch.random ^= launch.random >> 7;
    launch.random ^= launch.random << 17;
    return (u32)(launch.random >> 16);
}

static void fault(const Wave *wave, const Instruction *in, const char *what, u64 value) {
    Report *report = launch.report;
    size_t used = strlen(report->text);
    report->faults++;
    if (used < sizeof report->text - 400)
        snprintf(report->text + used, 300, "%s %llx, line %d, workgroup %d, wave %d\n", what, (unsigned long long)value,
                 in ? in->line : -1, wave->group_id, wave->number);
}

static int allowed(u64 address, u32 bytes) {
    for (int tried = -1; tried < launch.count; tried++) {
        int i = tried < 0 ? launch.last : tried;
        const Region *r = &launch.regions[i];
        if (i < launch.count && address >= r->start && address + bytes <= r->start + r->size) {
            launch.last = i;
            return 1;
        }
    }
    return 0;
}

/* --- the list of instructions: each enters itself when the library is loaded --- */

typedef void Handler(Wave *, const Instruction *);
static struct {
    const char *name;
    Handler *handler;
} known[512];
static int knowns;

static void enter(const char *name, Handler *handler) {
    known[knowns].name = name;
    known[knowns++].handler = handler;
}

#define INSTRUCTION(name)                                                                     \
    static void name(Wave *wave, const Instruction *in);                                      \
    __attribute__((constructor)) static void enter_##name(void) { enter(#name, name); }       \
    static void name(__attribute__((unused)) Wave *wave, __attribute__((unused)) const Instruction *in)

/* --- registers --- */

static u64 pair(const Wave *wave, int index) { return wave->s[index] | (u64)wave->s[index + 1] << 32; }

static void set_pair(Wave *wave, int index, u64 value) {
    wave->s[index] = (u32)value;
    wave->s[index + 1] = (u32)(value >> 32);
}

static int bit(u64 mask, int lane) { return mask >> lane & 1; }

static u32 scalar32(const Wave *wave, const Operand *o) {
    switch (o->kind) {
    case SCALAR: return wave->s[o->index];
    case CONSTANT: return (u32)o->value;
    case SCC: return wave->scc;
    case VCCZ: return pair(wave, VCC) == 0;
    case EXECZ: return pair(wave, EXEC) == 0;
    }
    return 0;
}

static u64 scalar64(const Wave *wave, const Operand *o) {
    return o->kind == SCALAR ? pair(wave, o->index) : o->kind == CONSTANT ? o->value : scalar32(wave, o);
}

/* Writes the lanes of a mask. */
static void put(Wave *wave, int index, const u32 *values, u64 lanes) {
    u32 *to = wave->v[index];
    if (lanes == ALL)
        memcpy(to, values, sizeof wave->v[0]);
    else
        EACH_LANE if (bit(lanes, lane)) to[lane] = values[lane];
}

static void put64(Wave *wave, int index, const u64 *values, u64 lanes) {
    EACH_LANE if (bit(lanes, lane)) {
        wave->v[index][lane] = (u32)values[lane];
        wave->v[index + 1][lane] = (u32)(values[lane] >> 32);
    }
}

/* --- operands of vector instructions --- */

typedef enum { BITS, SINGLE, HALF } Kind; /* where the sign is that an operand's modifiers change */

static u32 part_of(u32 x, int part, int extend) {
    if (part == WHOLE) return x;
    int width = part < 4 ? 8 : 16;
    u32 cut = x >> (part < 4 ? 8 * part : 16 * (part - 4)) & ((1u << width) - 1);
    return extend && cut >> (width - 1) ? cut | ~0u << width : cut;
}

/* The 32 bits of operand `from[i]` in every lane, `word` registers on. */
static void plain(const Wave *wave, const Operand *o, int word, u32 *out) {
    if (o->kind == VECTOR) {
        memcpy(out, wave->v[o->index + word], sizeof wave->v[0]);
        return;
    }
    u32 x = o->kind == CONSTANT ? (u32)(o->value >> 32 * word)
            : o->kind == SCALAR ? wave->s[o->index + word]
                                : scalar32(wave, o);
    EACH_LANE out[lane] = x;
}

static void signs(const Operand *o, Kind kind, u32 *out) {
    u32 sign = kind == HALF ? 0x8000 : 0x80000000u;
    if (o->absolute) EACH_LANE out[lane] &= ~sign;
    if (o->negative) EACH_LANE out[lane] ^= sign;
}

/* DPP: a lane reads its first operand from another one. Returns the lanes that are written: where the other lane is
 * outside of the row or masked out, 0 is read with bound_ctrl, and the lane keeps its value without. */
enum { QUAD_PERM = 1, ROW_SHL, ROW_SHR, ROW_ROR, ROW_MIRROR, ROW_HALF_MIRROR, ROW_BCAST15, ROW_BCAST31, ROW_NEWBCAST,
       WAVE_SHL };

static u64 from_other_lanes(const Wave *wave, const Instruction *in, const u32 *source, u32 *out) {
    u64 exec = pair(wave, EXEC), written = 0;
    EACH_LANE {
        int row = lane & ~15, at = lane & 15, by = in->dpp_by, other = -1;
        switch (in->dpp) {
        case QUAD_PERM: other = (lane & ~3) + in->quad[lane & 3]; break;
        case ROW_SHL: other = at + by < 16 ? lane + by : -1; break;
        case ROW_SHR: other = at - by >= 0 ? lane - by : -1; break;
        case ROW_ROR: other = row + ((at - by) & 15); break;
        case ROW_MIRROR: other = row + 15 - at; break;
        case ROW_HALF_MIRROR: other = (lane & ~7) + 7 - (lane & 7); break;
        case ROW_BCAST15: other = lane >= 16 ? row - 1 : -1; break; /* the last lane of the row before */
        case ROW_BCAST31: other = lane >= 32 ? 31 : -1; break;
        case ROW_NEWBCAST: other = row + by; break;
        case WAVE_SHL: other = lane + by < WAVE ? lane + by : -1; break;
        }
        int there = other >= 0 && bit(exec, other);
        int chosen = in->row_mask >> lane / 16 & 1 && in->bank_mask >> lane / 4 % 4 & 1;
        out[lane] = there ? source[other] : 0;
        if (chosen && (there || in->bound)) written |= (u64)1 << lane;
    }
    return written;
}

/* Operand `from[i]` with all modifiers. Returns the lanes that may be written. */
static u64 operand(const Wave *wave, const Instruction *in, int i, Kind kind, u32 *out) {
    const Operand *o = &in->from[i];
    u64 lanes = pair(wave, EXEC);
    plain(wave, o, 0, out);
    if (in->flags & SDWA) EACH_LANE out[lane] = part_of(out[lane], o->part, o->extend);
    if (in->flags & DPP && i == 0) {
        u32 own[WAVE];
        memcpy(own, out, sizeof own);
        lanes &= from_other_lanes(wave, in, own, out);
    }
    if (o->absolute | o->negative) signs(o, kind, out);
    return lanes;
}

static void operand64(const Wave *wave, const Instruction *in, int i, u64 *out) {
    const Operand *o = &in->from[i];
    if (o->kind == VECTOR)
        EACH_LANE out[lane] = wave->v[o->index][lane] | (u64)wave->v[o->index + 1][lane] << 32;
    else
        EACH_LANE out[lane] = scalar64(wave, o);
}

/* Writes a result to `to`; SDWA may write bytes of it, and clear or keep the others. */
static void result(Wave *wave, const Instruction *in, u32 *values, u64 lanes) {
    if (in->flags & SDWA && in->to_part != WHOLE) {
        int part = in->to_part, at = part < 4 ? 8 * part : 16 * (part - 4);
        u32 mask = (part < 4 ? 255u : 65535u) << at;
        EACH_LANE {
            u32 rest = in->to_rest == 2 ? wave->v[in->to.index][lane] & ~mask : 0;
            values[lane] = (values[lane] << at & mask) | rest;
        }
    }
    put(wave, in->to.index, values, lanes);
}
