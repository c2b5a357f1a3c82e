/* Memory: LDS, buffers and global memory, atomics; and what is on its way until a wait.
 *
 * When `launch.late` is set, results of loads, LDS writes, stores and copies into LDS land only at the wait that counts
 * them: registers hold garbage until then, and other waves see the old value. A wave sees its own writes at once, as the
 * hardware keeps its accesses to one address in order. Stores of other waves become visible in the order of their waits;
 * caches that are not coherent are not modelled.
 */

enum { IN_VECTORS = 1, IN_SCALARS, IN_LDS, IN_MEMORY }; /* where it lands; 0: only the count changes */

struct Pending {
    Pending *next, *also; /* the next instruction's; the other half of this one's */
    int where, words, index;
    u32 keep; /* bits of the register that stay */
    u64 lanes, low, high, address[WAVE];
    u8 bytes[WAVE]; /* that a lane writes to memory */
    u32 (*data)[WAVE];
};

static Pending *pending(int where, int words, u64 lanes, u32 (*data)[WAVE]) {
    Pending *p = calloc(1, sizeof *p);
    p->where = where, p->words = words, p->lanes = lanes;
    if (words) {
        p->data = malloc((size_t)words * sizeof *p->data);
        memcpy(p->data, data, (size_t)words * sizeof *p->data);
    }
    return p;
}

static void discard(Pending *p) {
    if (p->also) discard(p->also);
    free(p->data);
    free(p);
}

static void apply(Wave *wave, Pending *p) {
    const u8 *value;
    switch (p->where) {
    case IN_VECTORS:
        for (int i = 0; i < p->words; i++)
            EACH_LANE if (bit(p->lanes, lane)) {
                u32 *to = &wave->v[p->index + i][lane];
                *to = (*to & p->keep) | (p->data[i][lane] & ~p->keep);
            }
        break;
    case IN_SCALARS:
        for (int i = 0; i < p->words; i++) wave->s[p->index + i] = p->data[i][0];
        break;
    case IN_LDS:
    case IN_MEMORY:
        EACH_LANE if (bit(p->lanes, lane)) for (int i = 0; i < p->bytes[lane]; i++) {
            u64 to = p->address[lane] + (u64)i;
            value = (const u8 *)&p->data[i / 4][lane] + i % 4;
            if (p->where == IN_MEMORY)
                *(u8 *)(uintptr_t)to = *value;
            else if (to < wave->group->lds_bytes)
                wave->group->lds[to] = *value;
            else
                launch.report->outside_lds++;
        }
        break;
    }
    p->where = 0;
    if (p->also) apply(wave, p->also);
}

/* Puts `p` in its queue, or lets it land at once. */
static void later(Wave *wave, Pending **queue, Pending *p) {
    if (!launch.late) {
        apply(wave, p);
        discard(p);
        return;
    }
    while (*queue) queue = &(*queue)->next;
    *queue = p;
}

/* A wait: all but `most` land, the oldest first. Scalar loads come in any order, so they are taken last. */
static void land(Wave *wave, Pending **queue, int most) {
    int count = 0;
    for (Pending *p = *queue; p; p = p->next) count++;
    for (; count > most; count--) {
        Pending **first = queue;
        while (*first && (*first)->where == IN_SCALARS) first = &(*first)->next;
        if (!*first) first = queue;
        Pending *p = *first;
        *first = p->next;
        apply(wave, p);
        discard(p);
    }
}

static void into_vectors(Wave *wave, Pending **queue, int index, int words, u64 lanes, u32 (*data)[WAVE], u32 keep) {
    Pending *p = pending(IN_VECTORS, words, lanes, data);
    p->index = index, p->keep = keep;
    if (launch.late) {
        u32 garbage[WAVE];
        for (int i = 0; i < words; i++) {
            EACH_LANE garbage[lane] = (wave->v[index + i][lane] & keep) | (0x7fe5dea7 & ~keep);
            put(wave, index + i, garbage, lanes);
        }
    }
    later(wave, queue, p);
}

static void counted(Wave *wave, Pending **queue) {
    if (launch.late) later(wave, queue, pending(0, 0, 0, NULL));
}

/* The wave's own stores that it reads, or changes atomically, are there already. */
static void see_own(Wave *wave, u64 address, u32 bytes) {
    for (Pending *p = wave->memory; p; p = p->next) {
        if (p->where != IN_MEMORY || address >= p->high || address + bytes <= p->low) continue;
        EACH_LANE {
            u64 at = p->address[lane];
            if (bit(p->lanes, lane) && address < at + p->bytes[lane] && at < address + bytes) {
                apply(wave, p);
                break;
            }
        }
    }
}

static void see_own_lds(Wave *wave) {
    for (Pending *p = wave->local; p; p = p->next)
        if (p->where == IN_LDS) apply(wave, p);
}

/* --- addresses --- */

/* A buffer has a base, and a number of bytes past which loads give 0 and stores do nothing. */
static int in_buffer(const Wave *wave, const Instruction *in, int lane, int more, u32 bytes, u64 *address) {
    const u32 *descriptor = &wave->s[in->from[1].index];
    u64 base = descriptor[0] | (u64)(descriptor[1] & 0xffff) << 32;
    u64 offset = (u64)in->offset + more + scalar32(wave, &in->from[2]);
    if (in->flags & OFFSET_BY_LANE) offset += wave->v[in->from[0].index][lane];
    *address = base + offset;
    return offset + bytes <= descriptor[2];
}

static u64 global_address(const Wave *wave, const Instruction *in, int lane) {
    const Operand *vector = &in->from[0], *scalar = &in->from[1];
    u64 address = vector->kind == VECTOR ? wave->v[vector->index][lane] : 0;
    if (scalar->kind == SCALAR)
        address += pair(wave, scalar->index);
    else
        address |= (u64)wave->v[vector->index + 1][lane] << 32;
    return address + (u64)(i64)in->offset;
}

/* Where a lane reads or writes; 0 where it may not. */
static u8 *place(Wave *wave, const Instruction *in, int buffer, int lane, int more, u32 bytes) {
    u64 address;
    if (!buffer) {
        address = global_address(wave, in, lane) + (u64)more;
    } else if (!in_buffer(wave, in, lane, more, bytes, &address)) {
        launch.report->outside_buffer++;
        return NULL;
    }
    if (!allowed(address, bytes)) {
        fault(wave, in, buffer ? "buffer address" : "global address", address);
        return NULL;
    }
    return (u8 *)(uintptr_t)address;
}

/* --- widths: bytes, whether they are extended by their sign, which half of a register they fill --- */

enum { FULL, SIGN_EXTENDED, LOW, HIGH };

static u32 widened(const u8 *from, int bytes, int how) {
    u32 x = 0;
    memcpy(&x, from, (size_t)bytes);
    if (how == SIGN_EXTENDED && bytes < 4 && x >> (8 * bytes - 1)) x |= ~0u << 8 * bytes;
    return how == HIGH ? x << 16 : x;
}

static u32 kept(int how) { return how == LOW ? 0xffff0000 : how == HIGH ? 0xffff : 0; }

/* --- global memory and buffers --- */

static void load(Wave *wave, const Instruction *in, int buffer, int bytes, int how) {
    u64 exec = pair(wave, EXEC);
    int words = (bytes + 3) / 4, each = bytes < 4 ? bytes : 4;
    u32 data[4][WAVE] = {{0}};
    EACH_LANE if (bit(exec, lane)) for (int i = 0; i < words; i++) { /* bounds are those of each word */
        const u8 *from = place(wave, in, buffer, lane, 4 * i, (u32)each);
        if (!from) continue;
        if (wave->memory) see_own(wave, (u64)(uintptr_t)from, (u32)each);
        data[i][lane] = widened(from, each, how);
    }
    if (!(in->flags & INTO_LDS)) {
        into_vectors(wave, &wave->memory, in->to.index, words, exec, data, kept(how));
        return;
    }
    /* Straight into LDS: M0 and the offset say where, lanes follow each other. The offset counts on both sides. */
    Pending *p = pending(IN_LDS, words, exec, data);
    EACH_LANE {
        p->bytes[lane] = (u8)(4 * words);
        p->address[lane] = (wave->s[M0] & 0x3ffff) + (u64)in->offset + (u64)(lane * 4 * words);
    }
    later(wave, &wave->memory, p);
}

static void store(Wave *wave, const Instruction *in, int buffer, int bytes, int how) {
    u64 exec = pair(wave, EXEC);
    int words = (bytes + 3) / 4, each = bytes < 4 ? bytes : 4;
    u32 data[4][WAVE];
    Pending *p = pending(IN_MEMORY, 0, exec, NULL);
    p->low = ALL;
    EACH_LANE if (bit(exec, lane)) for (int i = 0; i < words; i++) {
        u8 *to = place(wave, in, buffer, lane, 4 * i, (u32)each);
        if (!to) break;
        u64 address = (u64)(uintptr_t)to;
        if (i == 0) p->address[lane] = address;
        p->bytes[lane] += (u8)each;
        if (address < p->low) p->low = address;
        if (address + (u64)each > p->high) p->high = address + (u64)each;
    }
    for (int i = 0; i < words; i++)
        EACH_LANE data[i][lane] = wave->v[in->to.index + i][lane] >> (how == HIGH ? 16 : 0);
    p->data = malloc((size_t)words * sizeof *p->data);
    memcpy(p->data, data, (size_t)words * sizeof *p->data);
    later(wave, &wave->memory, p);
}

/* --- atomics: each lane in turn, at once; what they return lands at the wait --- */

typedef u32 Change(u32 old, u32 given, u32 wanted);

#define CHANGE(name, expression)                                                                             \
    static u32 name(__attribute__((unused)) u32 old, u32 given, __attribute__((unused)) u32 wanted) {        \
        return expression;                                                                                   \
    }
CHANGE(added, old + given)
CHANGE(subtracted, old - given)
CHANGE(swapped, given)
CHANGE(swapped_if_equal, old == wanted ? given : old)
CHANGE(with_bits, old | given)
CHANGE(with_common_bits, old &given)
CHANGE(larger, given > old ? given : old)
CHANGE(larger_signed, (i32)given > (i32)old ? given : old)
CHANGE(smaller, given < old ? given : old)
CHANGE(smaller_signed, (i32)given < (i32)old ? given : old)
CHANGE(float_added, bits_of(single(old) + single(given)))
static u32 half_sum(u32 a, u32 b) { return half_bits((double)half(a) + half(b)); }
static u32 brain_sum(u32 a, u32 b) { return brain_bits(brain(a) + brain(b)); }
CHANGE(halves_added, half_sum(old, given) | half_sum(old >> 16, given >> 16) << 16)
CHANGE(brains_added, brain_sum(old, given) | brain_sum(old >> 16, given >> 16) << 16)

static void atomic(Wave *wave, const Instruction *in, int buffer, Change *change) {
    u64 exec = pair(wave, EXEC);
    u32 data[1][WAVE] = {{0}};
    int given = in->from[3].index;
    EACH_LANE if (bit(exec, lane)) {
        u32 old, new;
        u8 *at = place(wave, in, buffer, lane, 0, 4);
        if (!at) continue;
        if (wave->memory) see_own(wave, (u64)(uintptr_t)at, 4);
        memcpy(&old, at, 4);
        new = change(old, wave->v[given][lane], change == swapped_if_equal ? wave->v[given + 1][lane] : 0);
        memcpy(at, &new, 4);
        data[0][lane] = old;
    }
    if (in->flags & RETURNS)
        into_vectors(wave, &wave->memory, in->to.index, 1, exec, data, 0);
    else
        counted(wave, &wave->memory);
}

typedef u64 Change64(u64 old, u64 given);

static u64 added_64(u64 old, u64 given) { return old + given; }
static u64 swapped_64(__attribute__((unused)) u64 old, u64 given) { return given; }

static void atomic_64(Wave *wave, const Instruction *in, int buffer, Change64 *change) {
    u64 exec = pair(wave, EXEC);
    u32 data[2][WAVE] = {{0}};
    int given = in->from[3].index;
    EACH_LANE if (bit(exec, lane)) {
        u64 old, new;
        u8 *at = place(wave, in, buffer, lane, 0, 8);
        if (!at) continue;
        if (wave->memory) see_own(wave, (u64)(uintptr_t)at, 8);
        memcpy(&old, at, 8);
        new = change(old, wave->v[given][lane] | (u64)wave->v[given + 1][lane] << 32);
        memcpy(at, &new, 8);
        data[0][lane] = (u32)old, data[1][lane] = (u32)(old >> 32);
    }
    if (in->flags & RETURNS)
        into_vectors(wave, &wave->memory, in->to.index, 2, exec, data, 0);
    else
        counted(wave, &wave->memory);
}

#define MEMORY(name, what, ...) \
    INSTRUCTION(name) { what(wave, in, __VA_ARGS__); }
#define BOTH_MEMORIES(end, what, ...)              \
    MEMORY(buffer_##end, what, 1, __VA_ARGS__)     \
    MEMORY(global_##end, what, 0, __VA_ARGS__)
BOTH_MEMORIES(load_ubyte, load, 1, FULL)
BOTH_MEMORIES(load_sbyte, load, 1, SIGN_EXTENDED)
BOTH_MEMORIES(load_ushort, load, 2, FULL)
BOTH_MEMORIES(load_sshort, load, 2, SIGN_EXTENDED)
BOTH_MEMORIES(load_dword, load, 4, FULL)
BOTH_MEMORIES(load_dwordx2, load, 8, FULL)
BOTH_MEMORIES(load_dwordx3, load, 12, FULL)
BOTH_MEMORIES(load_dwordx4, load, 16, FULL)
BOTH_MEMORIES(load_ubyte_d16, load, 1, LOW)
BOTH_MEMORIES(load_ubyte_d16_hi, load, 1, HIGH)
BOTH_MEMORIES(load_short_d16, load, 2, LOW)
BOTH_MEMORIES(load_short_d16_hi, load, 2, HIGH)
BOTH_MEMORIES(store_byte, store, 1, FULL)
BOTH_MEMORIES(store_byte_d16_hi, store, 1, HIGH)
BOTH_MEMORIES(store_short, store, 2, FULL)
BOTH_MEMORIES(store_short_d16_hi, store, 2, HIGH)
BOTH_MEMORIES(store_dword, store, 4, FULL)
BOTH_MEMORIES(store_dwordx2, store, 8, FULL)
BOTH_MEMORIES(store_dwordx3, store, 12, FULL)
BOTH_MEMORIES(store_dwordx4, store, 16, FULL)
BOTH_MEMORIES(atomic_add, atomic, added)
BOTH_MEMORIES(atomic_sub, atomic, subtracted)
BOTH_MEMORIES(atomic_add_x2, atomic_64, added_64)
BOTH_MEMORIES(atomic_swap_x2, atomic_64, swapped_64)
BOTH_MEMORIES(atomic_swap, atomic, swapped)
BOTH_MEMORIES(atomic_cmpswap, atomic, swapped_if_equal)
BOTH_MEMORIES(atomic_and, atomic, with_common_bits)
BOTH_MEMORIES(atomic_or, atomic, with_bits)
BOTH_MEMORIES(atomic_umax, atomic, larger)
BOTH_MEMORIES(atomic_smax, atomic, larger_signed)
BOTH_MEMORIES(atomic_umin, atomic, smaller)
BOTH_MEMORIES(atomic_smin, atomic, smaller_signed)
BOTH_MEMORIES(atomic_add_f32, atomic, float_added)
BOTH_MEMORIES(atomic_pk_add_f16, atomic, halves_added)
BOTH_MEMORIES(atomic_pk_add_bf16, atomic, brains_added)
MEMORY(global_load_lds_dword, load, 0, 4, FULL)
MEMORY(global_load_lds_dwordx3, load, 0, 12, FULL)
MEMORY(global_load_lds_dwordx4, load, 0, 16, FULL)

INSTRUCTION(buffer_wbl2) { counted(wave, &wave->memory); }

/* --- loads of scalars --- */

static void load_scalars(Wave *wave, const Instruction *in, int words) {
    u64 address = scalar64(wave, &in->from[0]) + (u64)(i64)in->offset + scalar32(wave, &in->from[1]);
    u32 data[16][WAVE] = {{0}};
    address &= ~(u64)3;
    if (!allowed(address, 4 * (u32)words))
        fault(wave, in, "address of scalars", address);
    else
        for (int i = 0; i < words; i++) memcpy(&data[i][0], (const u8 *)(uintptr_t)address + 4 * i, 4);
    Pending *p = pending(IN_SCALARS, words, 1, data);
    p->index = in->to.index;
    if (launch.late)
        for (int i = 0; i < words; i++) wave->s[p->index + i] = 0x5eadbee0 + (u32)i;
    later(wave, &wave->local, p);
}

/* --- LDS --- */

static void lds_bytes(Wave *wave, u32 address, u8 *out, int bytes) {
    for (int i = 0; i < bytes; i++) {
        int there = (u64)address + (u64)i < wave->group->lds_bytes;
        out[i] = there ? wave->group->lds[address + (u32)i] : 0;
        launch.report->outside_lds += !there;
    }
}

static void ds_read(Wave *wave, const Instruction *in, int bytes, int how) {
    u64 exec = pair(wave, EXEC);
    int words = (bytes + 3) / 4, each = bytes < 4 ? bytes : 4;
    u32 data[4][WAVE] = {{0}};
    u8 raw[16];
    see_own_lds(wave);
    EACH_LANE if (bit(exec, lane)) {
        lds_bytes(wave, wave->v[in->from[0].index][lane] + (u32)in->offset, raw, bytes);
        for (int i = 0; i < words; i++) data[i][lane] = widened(raw + 4 * i, each, how);
    }
    into_vectors(wave, &wave->local, in->to.index, words, exec, data, kept(how));
}

/* Two places, whose offsets count elements, or 64 elements. */
static void ds_read2(Wave *wave, const Instruction *in, int bytes, int step) {
    u64 exec = pair(wave, EXEC);
    int words = bytes / 4;
    u32 data[4][WAVE] = {{0}};
    see_own_lds(wave);
    EACH_LANE if (bit(exec, lane)) for (int half = 0; half < 2; half++) {
        u8 raw[8];
        u32 offset = (u32)((half ? in->second_offset : in->offset) * bytes * step);
        lds_bytes(wave, wave->v[in->from[0].index][lane] + offset, raw, bytes);
        for (int i = 0; i < words; i++) memcpy(&data[half * words + i][lane], raw + 4 * i, 4);
    }
    into_vectors(wave, &wave->local, in->to.index, 2 * words, exec, data, 0);
}

static Pending *lds_write(Wave *wave, const Instruction *in, const Operand *given, u32 offset, int bytes, int how) {
    int words = (bytes + 3) / 4;
    u32 data[4][WAVE];
    for (int i = 0; i < words; i++) {
        plain(wave, given, i, data[i]);
        if (how == HIGH) EACH_LANE data[i][lane] >>= 16;
    }
    Pending *p = pending(IN_LDS, words, pair(wave, EXEC), data);
    EACH_LANE {
        p->address[lane] = wave->v[in->from[0].index][lane] + offset;
        p->bytes[lane] = (u8)bytes;
    }
    return p;
}

static void ds_write(Wave *wave, const Instruction *in, int bytes, int how) {
    later(wave, &wave->local, lds_write(wave, in, &in->from[1], (u32)in->offset, bytes, how));
}

static void ds_write2(Wave *wave, const Instruction *in, int bytes, int step) {
    Pending *first = lds_write(wave, in, &in->from[1], (u32)(in->offset * bytes * step), bytes, FULL);
    first->also = lds_write(wave, in, &in->from[2], (u32)(in->second_offset * bytes * step), bytes, FULL);
    later(wave, &wave->local, first);
}

static void ds_atomic(Wave *wave, const Instruction *in, Change *change, int returns) {
    u64 exec = pair(wave, EXEC);
    u32 data[1][WAVE] = {{0}};
    see_own_lds(wave);
    EACH_LANE if (bit(exec, lane)) {
        u32 at = wave->v[in->from[0].index][lane] + (u32)in->offset, old, new;
        if ((u64)at + 4 > wave->group->lds_bytes) {
            launch.report->outside_lds++;
            continue;
        }
        memcpy(&old, wave->group->lds + at, 4);
        new = change(old, wave->v[in->from[1].index][lane], 0);
        memcpy(wave->group->lds + at, &new, 4);
        data[0][lane] = old;
    }
    if (returns)
        into_vectors(wave, &wave->local, in->to.index, 1, exec, data, 0);
    else
        counted(wave, &wave->local);
}

/* gfx950: 16 lanes read a matrix of 16 rows and get it transposed; a lane reads 8 bytes. */
static void ds_read_transposed(Wave *wave, const Instruction *in, int bytes) {
    u64 exec = pair(wave, EXEC);
    int each = 8 / bytes; /* elements of a lane */
    u8 raw[WAVE][8] = {{0}};
    u32 data[2][WAVE];
    see_own_lds(wave);
    EACH_LANE if (bit(exec, lane)) lds_bytes(wave, wave->v[in->from[0].index][lane] + (u32)in->offset, raw[lane], 8);
    EACH_LANE {
        int first = lane & ~15, at = lane & 15, lanes = 16 / each; /* lanes that hold one row */
        u8 turned[8];
        for (int i = 0; i < each; i++)
            memcpy(turned + bytes * i, raw[first + lanes * i + at / each] + bytes * (at % each), (size_t)bytes);
        memcpy(&data[0][lane], turned, 4);
        memcpy(&data[1][lane], turned + 4, 4);
    }
    into_vectors(wave, &wave->local, in->to.index, 2, exec, data, 0);
}

MEMORY(ds_read_u8, ds_read, 1, FULL)
MEMORY(ds_read_i8, ds_read, 1, SIGN_EXTENDED)
MEMORY(ds_read_u16, ds_read, 2, FULL)
MEMORY(ds_read_i16, ds_read, 2, SIGN_EXTENDED)
MEMORY(ds_read_b32, ds_read, 4, FULL)
MEMORY(ds_read_b64, ds_read, 8, FULL)
MEMORY(ds_read_b96, ds_read, 12, FULL)
MEMORY(ds_read_b128, ds_read, 16, FULL)
MEMORY(ds_read_u8_d16, ds_read, 1, LOW)
MEMORY(ds_read_u8_d16_hi, ds_read, 1, HIGH)
MEMORY(ds_read_u16_d16, ds_read, 2, LOW)
MEMORY(ds_read_u16_d16_hi, ds_read, 2, HIGH)
MEMORY(ds_read2_b32, ds_read2, 4, 1)
MEMORY(ds_read2_b64, ds_read2, 8, 1)
MEMORY(ds_read2st64_b32, ds_read2, 4, 64)
MEMORY(ds_read2st64_b64, ds_read2, 8, 64)
MEMORY(ds_write_b8, ds_write, 1, FULL)
MEMORY(ds_write_b8_d16_hi, ds_write, 1, HIGH)
MEMORY(ds_write_b16, ds_write, 2, FULL)
MEMORY(ds_write_b16_d16_hi, ds_write, 2, HIGH)
MEMORY(ds_write_b32, ds_write, 4, FULL)
MEMORY(ds_write_b64, ds_write, 8, FULL)
MEMORY(ds_write_b96, ds_write, 12, FULL)
MEMORY(ds_write_b128, ds_write, 16, FULL)
MEMORY(ds_write2_b32, ds_write2, 4, 1)
MEMORY(ds_write2_b64, ds_write2, 8, 1)
MEMORY(ds_write2st64_b32, ds_write2, 4, 64)
MEMORY(ds_write2st64_b64, ds_write2, 8, 64)
MEMORY(ds_add_u32, ds_atomic, added, 0)
MEMORY(ds_add_rtn_u32, ds_atomic, added, 1)
MEMORY(ds_add_f32, ds_atomic, float_added, 0)
MEMORY(ds_or_b32, ds_atomic, with_bits, 0)
MEMORY(ds_max_u32, ds_atomic, larger, 0)
MEMORY(ds_max_i32, ds_atomic, larger_signed, 0)
MEMORY(ds_read_b64_tr_b16, ds_read_transposed, 2)
MEMORY(ds_read_b64_tr_b8, ds_read_transposed, 1)

/* --- permutes, which use the LDS unit and its count, not its memory --- */

INSTRUCTION(ds_bpermute_b32) { /* a lane names the lane that it reads */
    u64 exec = pair(wave, EXEC);
    u32 given[WAVE], data[1][WAVE];
    plain(wave, &in->from[1], 0, given);
    EACH_LANE {
        int other = (wave->v[in->from[0].index][lane] + (u32)in->offset) >> 2 & 63;
        data[0][lane] = bit(exec, other) ? given[other] : 0;
    }
    into_vectors(wave, &wave->local, in->to.index, 1, exec, data, 0);
}

INSTRUCTION(ds_permute_b32) { /* a lane names the lane that it writes */
    u64 exec = pair(wave, EXEC);
    u32 given[WAVE], data[1][WAVE] = {{0}};
    plain(wave, &in->from[1], 0, given);
    EACH_LANE if (bit(exec, lane))
        data[0][(wave->v[in->from[0].index][lane] + (u32)in->offset) >> 2 & 63] = given[lane];
    into_vectors(wave, &wave->local, in->to.index, 1, exec, data, 0);
}

INSTRUCTION(ds_swizzle_b32) { /* the offset says how: four lanes in any order, or and, or, xor on lanes of 32 */
    u64 exec = pair(wave, EXEC);
    u32 given[WAVE], data[1][WAVE];
    int how = in->offset;
    plain(wave, &in->from[0], 0, given);
    EACH_LANE {
        int quad = (lane & ~3) + (how >> 2 * (lane & 3) & 3);
        int masked = (lane & 32) + (((lane & 31 & how) | (how >> 5 & 31)) ^ (how >> 10 & 31));
        int other = how & 0x8000 ? quad : masked;
        data[0][lane] = bit(exec, other) ? given[other] : 0;
    }
    into_vectors(wave, &wave->local, in->to.index, 1, exec, data, 0);
}
