/* Scalar instructions: arithmetic on SGPRs, SCC, EXEC masks, branches, waits and barriers, loads of kernel arguments. */

/* An expression over the operands a and b; the _SCC forms also say in SCC whether the result is not zero. */
#define SCALAR32(name, expression)                                                     \
    INSTRUCTION(name) {                                                                \
        u32 a = scalar32(wave, &in->from[0]), b = scalar32(wave, &in->from[1]);        \
        (void)a, (void)b;                                                              \
        wave->s[in->to.index] = (u32)(expression);                                     \
    }
#define SCALAR32_SCC(name, expression)                                                 \
    INSTRUCTION(name) {                                                                \
        u32 a = scalar32(wave, &in->from[0]), b = scalar32(wave, &in->from[1]);        \
        (void)a, (void)b;                                                              \
        wave->s[in->to.index] = (u32)(expression);                                     \
        wave->scc = wave->s[in->to.index] != 0;                                        \
    }
#define SCALAR64(name, expression)                                                     \
    INSTRUCTION(name) {                                                                \
        u64 a = scalar64(wave, &in->from[0]), b = scalar64(wave, &in->from[1]);        \
        (void)a, (void)b;                                                              \
        set_pair(wave, in->to.index, expression);                                      \
    }
#define SCALAR64_SCC(name, expression)                                                 \
    INSTRUCTION(name) {                                                                \
        u64 a = scalar64(wave, &in->from[0]), b = scalar64(wave, &in->from[1]);        \
        (void)a, (void)b;                                                              \
        u64 value = (expression);                                                      \
        set_pair(wave, in->to.index, value);                                           \
        wave->scc = value != 0;                                                        \
    }
#define SCALAR_TEST(name, type, fetch, expression)                                     \
    INSTRUCTION(name) {                                                                \
        type a = (type)fetch(wave, &in->from[0]), b = (type)fetch(wave, &in->from[1]); \
        wave->scc = (expression);                                                      \
    }

/* --- moves and bits --- */

SCALAR32(s_mov_b32, a)
SCALAR64(s_mov_b64, a)
SCALAR32(s_movk_i32, (i32)(i16)a)
SCALAR32_SCC(s_not_b32, ~a)
SCALAR64_SCC(s_not_b64, ~a)
SCALAR32_SCC(s_and_b32, a &b)
SCALAR64_SCC(s_and_b64, a &b)
SCALAR32_SCC(s_or_b32, a | b)
SCALAR64_SCC(s_or_b64, a | b)
SCALAR32_SCC(s_xor_b32, a ^ b)
SCALAR64_SCC(s_xor_b64, a ^ b)
SCALAR32_SCC(s_andn2_b32, a & ~b)
SCALAR64_SCC(s_andn2_b64, a & ~b)
SCALAR32_SCC(s_orn2_b32, a | ~b)
SCALAR64_SCC(s_orn2_b64, a | ~b)
SCALAR32_SCC(s_nand_b32, ~(a & b))
SCALAR64_SCC(s_nand_b64, ~(a & b))
SCALAR32_SCC(s_nor_b32, ~(a | b))
SCALAR64_SCC(s_nor_b64, ~(a | b))
SCALAR32_SCC(s_xnor_b32, ~(a ^ b))
SCALAR64_SCC(s_xnor_b64, ~(a ^ b))
SCALAR32_SCC(s_lshl_b32, a << (b & 31))
SCALAR32_SCC(s_lshr_b32, a >> (b & 31))
SCALAR32_SCC(s_ashr_i32, (i32)a >> (b & 31))
SCALAR64_SCC(s_lshl_b64, a << (b & 63))
SCALAR64_SCC(s_lshr_b64, a >> (b & 63))
SCALAR64_SCC(s_ashr_i64, (i64)a >> (b & 63))
SCALAR32(s_bfm_b32, ((1u << (a & 31)) - 1) << (b & 31))
SCALAR64(s_bfm_b64, (((u64)1 << (a & 63)) - 1) << (b & 63))
SCALAR32(s_pack_ll_b32_b16, (a & 0xffff) | b << 16)
SCALAR32(s_pack_lh_b32_b16, (a & 0xffff) | (b & 0xffff0000))
SCALAR32(s_pack_hh_b32_b16, a >> 16 | (b & 0xffff0000))
SCALAR32(s_sext_i32_i8, (i32)(i8)a)
SCALAR32(s_sext_i32_i16, (i32)(i16)a)
SCALAR32_SCC(s_bcnt1_i32_b32, __builtin_popcount(a))
SCALAR32(s_ff1_i32_b32, a ? __builtin_ctz(a) : -1)
SCALAR32(s_flbit_i32_b32, a ? __builtin_clz(a) : -1)

static u64 reversed(u64 x, int width) {
    u64 turned = 0;
    for (int i = 0; i < width; i++) turned |= (x >> i & 1) << (width - 1 - i);
    return turned;
}
SCALAR32(s_brev_b32, reversed(a, 32))
SCALAR64(s_brev_b64, reversed(a, 64))

INSTRUCTION(s_bcnt1_i32_b64) {
    wave->s[in->to.index] = (u32)__builtin_popcountll(scalar64(wave, &in->from[0]));
    wave->scc = wave->s[in->to.index] != 0;
}
INSTRUCTION(s_ff1_i32_b64) {
    u64 a = scalar64(wave, &in->from[0]);
    wave->s[in->to.index] = a ? (u32)__builtin_ctzll(a) : ~0u;
}
INSTRUCTION(s_bitset0_b32) { wave->s[in->to.index] &= ~(1u << (scalar32(wave, &in->from[0]) & 31)); }
INSTRUCTION(s_bitset1_b32) { wave->s[in->to.index] |= 1u << (scalar32(wave, &in->from[0]) & 31); }

/* A field of bits: `where` has its first bit, and its width from bit 16 on. */
static u64 field(u64 x, u32 where, int width, int extend) {
    int first = where & (width - 1), bits = where >> 16 & 127;
    if (!bits) return 0;
    u64 cut = x >> first;
    if (bits >= width) return cut;
    cut &= ((u64)1 << bits) - 1;
    return extend && cut >> (bits - 1) ? cut | ALL << bits : cut;
}
SCALAR32_SCC(s_bfe_u32, field(a, b, 32, 0))
SCALAR32_SCC(s_bfe_i32, field(a, b, 32, 1))
SCALAR64_SCC(s_bfe_u64, field(a, (u32)b, 64, 0))
SCALAR64_SCC(s_bfe_i64, field(a, (u32)b, 64, 1))

/* --- arithmetic; SCC is the carry, or the overflow of signed numbers --- */

INSTRUCTION(s_add_u32) {
    u64 sum = (u64)scalar32(wave, &in->from[0]) + scalar32(wave, &in->from[1]);
    wave->s[in->to.index] = (u32)sum;
    wave->scc = sum >> 32 & 1;
}
INSTRUCTION(s_addc_u32) {
    u64 sum = (u64)scalar32(wave, &in->from[0]) + scalar32(wave, &in->from[1]) + wave->scc;
    wave->s[in->to.index] = (u32)sum;
    wave->scc = sum >> 32 & 1;
}
INSTRUCTION(s_sub_u32) {
    u32 a = scalar32(wave, &in->from[0]), b = scalar32(wave, &in->from[1]);
    wave->s[in->to.index] = a - b;
    wave->scc = b > a;
}
INSTRUCTION(s_subb_u32) {
    u64 a = scalar32(wave, &in->from[0]), b = (u64)scalar32(wave, &in->from[1]) + wave->scc;
    wave->s[in->to.index] = (u32)(a - b);
    wave->scc = b > a;
}
static void signed_sum(Wave *wave, const Instruction *in, i32 a, i64 b) {
    i64 sum = a + b;
    wave->s[in->to.index] = (u32)sum;
    wave->scc = sum != (i32)sum;
}
INSTRUCTION(s_add_i32) {
    signed_sum(wave, in, (i32)scalar32(wave, &in->from[0]), (i32)scalar32(wave, &in->from[1]));
}
INSTRUCTION(s_sub_i32) {
    signed_sum(wave, in, (i32)scalar32(wave, &in->from[0]), -(i64)(i32)scalar32(wave, &in->from[1]));
}
INSTRUCTION(s_addk_i32) {
    signed_sum(wave, in, (i32)wave->s[in->to.index], (i16)scalar32(wave, &in->from[0]));
}
INSTRUCTION(s_mulk_i32) { wave->s[in->to.index] *= (u32)(i32)(i16)scalar32(wave, &in->from[0]); }
SCALAR32(s_mul_i32, a *b)
SCALAR32(s_mul_hi_u32, (u64)a *b >> 32)
SCALAR32(s_mul_hi_i32, (i64)(i32)a * (i32)b >> 32)
SCALAR32_SCC(s_abs_i32, (i32)a < 0 ? 0 - a : a)

#define SHIFTED_SUM(name, by)                                                                       \
    INSTRUCTION(name) {                                                                             \
        u64 sum = ((u64)scalar32(wave, &in->from[0]) << by) + scalar32(wave, &in->from[1]);         \
        wave->s[in->to.index] = (u32)sum;                                                           \
        wave->scc = sum >> 32 != 0;                                                                 \
    }
SHIFTED_SUM(s_lshl1_add_u32, 1)
SHIFTED_SUM(s_lshl2_add_u32, 2)
SHIFTED_SUM(s_lshl3_add_u32, 3)
SHIFTED_SUM(s_lshl4_add_u32, 4)

#define SCALAR_CHOICE(name, type, compared)                                                         \
    INSTRUCTION(name) {                                                                             \
        type a = (type)scalar32(wave, &in->from[0]), b = (type)scalar32(wave, &in->from[1]);        \
        wave->scc = a compared b;                                                                   \
        wave->s[in->to.index] = (u32)(a compared b ? a : b);                                        \
    }
SCALAR_CHOICE(s_min_i32, i32, <)
SCALAR_CHOICE(s_max_i32, i32, >)
SCALAR_CHOICE(s_min_u32, u32, <)
SCALAR_CHOICE(s_max_u32, u32, >)

SCALAR32(s_cselect_b32, wave->scc ? a : b)
SCALAR64(s_cselect_b64, wave->scc ? a : b)

/* --- tests; the constant of s_cmpk has 16 bits --- */

#define SCALAR_TESTS(end, test)                                       \
    SCALAR_TEST(s_cmp_##end##_i32, i32, scalar32, a test b)           \
    SCALAR_TEST(s_cmp_##end##_u32, u32, scalar32, a test b)           \
    SCALAR_TEST(s_cmpk_##end##_i32, i32, scalar32, a test(i16) b)     \
    SCALAR_TEST(s_cmpk_##end##_u32, u32, scalar32, a test(u16) b)
SCALAR_TESTS(eq, ==)
SCALAR_TESTS(lg, !=)
SCALAR_TESTS(lt, <)
SCALAR_TESTS(le, <=)
SCALAR_TESTS(gt, >)
SCALAR_TESTS(ge, >=)
SCALAR_TEST(s_cmp_eq_u64, u64, scalar64, a == b)
SCALAR_TEST(s_cmp_lg_u64, u64, scalar64, a != b)
SCALAR_TEST(s_bitcmp0_b32, u32, scalar32, !(a >> (b & 31) & 1))
SCALAR_TEST(s_bitcmp1_b32, u32, scalar32, a >> (b & 31) & 1)

/* --- EXEC: which lanes work --- */

#define SAVE_EXEC(name, expression)                                            \
    INSTRUCTION(name) {                                                        \
        u64 a = scalar64(wave, &in->from[0]), exec = pair(wave, EXEC);         \
        set_pair(wave, in->to.index, exec);                                    \
        set_pair(wave, EXEC, expression);                                      \
        wave->scc = (expression) != 0;                                         \
    }
SAVE_EXEC(s_and_saveexec_b64, a &exec)
SAVE_EXEC(s_or_saveexec_b64, a | exec)
SAVE_EXEC(s_xor_saveexec_b64, a ^ exec)
SAVE_EXEC(s_andn2_saveexec_b64, a & ~exec)
SAVE_EXEC(s_orn2_saveexec_b64, a | ~exec)

/* --- branches --- */

#define BRANCH(name, condition) \
    INSTRUCTION(name) { if (condition) wave->next = in->target; }
BRANCH(s_branch, 1)
BRANCH(s_cbranch_scc0, !wave->scc)
BRANCH(s_cbranch_scc1, wave->scc)
BRANCH(s_cbranch_vccz, !pair(wave, VCC))
BRANCH(s_cbranch_vccnz, pair(wave, VCC))
BRANCH(s_cbranch_execz, !pair(wave, EXEC))
BRANCH(s_cbranch_execnz, pair(wave, EXEC))

/* --- waits --- */

INSTRUCTION(s_waitcnt) { /* the parser has the two counts in `offset` and `second_offset` */
    land(wave, &wave->memory, in->offset);
    land(wave, &wave->local, in->second_offset);
}
INSTRUCTION(s_barrier) { wave->state = AT_BARRIER; }
INSTRUCTION(s_endpgm) {
    wave->state = ENDED;
    land(wave, &wave->memory, 0);
    land(wave, &wave->local, 0);
}
INSTRUCTION(s_trap) {
    fault(wave, in, "trap", 0);
    wave->state = ENDED;
}

/* MODE: of its bits only FP16_OVFL (23) is modelled. Rounding and subnormal numbers are as IEEE has them. */
INSTRUCTION(s_setreg_imm32_b32) {
    if (in->offset == 23) wave->saturates = in->second_offset & 1;
}

/* Time, priority and caches are not modelled. */
#define NO_EFFECT(name) \
    INSTRUCTION(name) {}
NO_EFFECT(s_nop)
NO_EFFECT(s_setprio)
NO_EFFECT(s_sleep)
NO_EFFECT(s_sched_barrier)
NO_EFFECT(s_icache_inv)
NO_EFFECT(s_dcache_inv)
NO_EFFECT(s_dcache_wb)
NO_EFFECT(buffer_inv)

/* --- loads of scalars --- */

#define SCALAR_LOAD(name, words) \
    INSTRUCTION(name) { load_scalars(wave, in, words); }
SCALAR_LOAD(s_load_dword, 1)
SCALAR_LOAD(s_load_dwordx2, 2)
SCALAR_LOAD(s_load_dwordx4, 4)
SCALAR_LOAD(s_load_dwordx8, 8)
SCALAR_LOAD(s_load_dwordx16, 16)
