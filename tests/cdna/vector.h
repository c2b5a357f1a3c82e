/* Vector instructions: one result a lane, written where EXEC has a bit. */

/* An expression over the operands a, b, c of one lane. Integers: as bits; floats: SINGLE and HALF, whose results are
 * scaled (omod) and clamped to 0…1 where the instruction says so. */
typedef struct {
    u32 a[WAVE], b[WAVE], c[WAVE], d[WAVE];
    u64 lanes;
} Lanes;

static void fetch(const Wave *wave, const Instruction *in, Kind kind, Lanes *x) {
    x->lanes = operand(wave, in, 0, kind, x->a);
    if (in->from[1].kind) operand(wave, in, 1, kind, x->b);
    if (in->from[2].kind) operand(wave, in, 2, kind, x->c);
}

static float finished(const Instruction *in, float x) {
    static const float scales[] = {1.0f, 2.0f, 4.0f, 0.5f};
    x *= scales[in->scale];
    if (in->flags & CLAMP) x = !(x > 0) ? 0 : x > 1 ? 1 : x;
    return x;
}

static void finish(Wave *wave, const Instruction *in, Lanes *x) {
    if (in->scale || in->flags & CLAMP) EACH_LANE x->d[lane] = bits_of(finished(in, single(x->d[lane])));
    result(wave, in, x->d, x->lanes);
}

#define LANEWISE(name, kind, type, taken, given, end, expression)                             \
    INSTRUCTION(name) {                                                                       \
        Lanes x;                                                                              \
        fetch(wave, in, kind, &x);                                                            \
        EACH_LANE {                                                                           \
            type a = (type)taken(x.a[lane]), b = (type)taken(x.b[lane]), c = (type)taken(x.c[lane]); \
            (void)a, (void)b, (void)c;                                                        \
            x.d[lane] = (u32)given(expression);                                               \
        }                                                                                     \
        end(wave, in, x);                                                                     \
    }
#define SAME(x) (x)
#define WRITTEN(wave, in, x) result(wave, in, x.d, x.lanes)
#define FINISHED(wave, in, x) finish(wave, in, &x)
#define UNSIGNED(name, expression) LANEWISE(name, BITS, u32, SAME, SAME, WRITTEN, expression)
#define SIGNED(name, expression) LANEWISE(name, BITS, i32, SAME, SAME, WRITTEN, expression)
#define FLOATING(name, expression) LANEWISE(name, SINGLE, float, single, bits_of, FINISHED, expression)
#define HALVES(name, expression) LANEWISE(name, HALF, double, half, half_bits, WRITTEN, expression)
#define FROM_FLOAT(name, expression) LANEWISE(name, SINGLE, float, single, SAME, WRITTEN, expression)
#define TO_FLOAT(name, expression) LANEWISE(name, BITS, u32, SAME, bits_of, FINISHED, expression)

/* --- moves and lanes --- */

UNSIGNED(v_mov_b32, a)
UNSIGNED(v_accvgpr_read_b32, a)
UNSIGNED(v_accvgpr_write_b32, a)
UNSIGNED(v_accvgpr_mov_b32, a)
NO_EFFECT(v_nop)

INSTRUCTION(v_mov_b64) {
    u64 a[WAVE];
    operand64(wave, in, 0, a);
    put64(wave, in->to.index, a, pair(wave, EXEC));
}
INSTRUCTION(v_readfirstlane_b32) {
    u32 a[WAVE];
    u64 exec = pair(wave, EXEC);
    plain(wave, &in->from[0], 0, a);
    wave->s[in->to.index] = a[exec ? __builtin_ctzll(exec) : 0];
}
INSTRUCTION(v_readlane_b32) {
    u32 a[WAVE];
    plain(wave, &in->from[0], 0, a);
    wave->s[in->to.index] = a[scalar32(wave, &in->from[1]) & 63];
}
INSTRUCTION(v_writelane_b32) {
    wave->v[in->to.index][scalar32(wave, &in->from[1]) & 63] = scalar32(wave, &in->from[0]);
}
INSTRUCTION(v_cndmask_b32) { /* which of two, by a bit of a mask */
    Lanes x;
    x.lanes = operand(wave, in, 0, SINGLE, x.a);
    operand(wave, in, 1, SINGLE, x.b);
    u64 mask = scalar64(wave, &in->from[2]);
    EACH_LANE x.d[lane] = bit(mask, lane) ? x.b[lane] : x.a[lane];
    WRITTEN(wave, in, x);
}

static void exchange(u32 *one, u32 *other) {
    u32 kept = *one;
    *one = *other, *other = kept;
}
INSTRUCTION(v_permlane32_swap_b32) { /* gfx950: the upper half of one register for the lower half of the other */
    for (int i = 0; i < 32; i++) exchange(&wave->v[in->to.index][i + 32], &wave->v[in->from[0].index][i]);
}
INSTRUCTION(v_permlane16_swap_b32) { /* likewise in rows of 16, in each half */
    for (int i = 0; i < 32; i++) {
        int lane = i / 16 * 32 + i % 16;
        exchange(&wave->v[in->to.index][lane + 16], &wave->v[in->from[0].index][lane]);
    }
}
INSTRUCTION(v_swap_b32) {
    u64 exec = pair(wave, EXEC);
    EACH_LANE if (bit(exec, lane)) exchange(&wave->v[in->to.index][lane], &wave->v[in->from[0].index][lane]);
}

/* --- bits --- */

static u32 permuted(u32 high, u32 low, u32 chosen) { /* four bytes out of eight, their signs, 0 or 255 */
    u64 bytes = (u64)high << 32 | low;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        u32 which = chosen >> 8 * i & 255;
        u32 sign = which < 12 ? bytes >> (16 * (which & 3) + 15) & 1 : 0;
        u32 byte = which >= 13 ? 255 : which == 12 ? 0 : which >= 8 ? 255 * sign : (u32)(bytes >> 8 * which & 255);
        out |= byte << 8 * i;
    }
    return out;
}
static u32 any_bits(u32 a, u32 b, u32 c, int table) { /* a table of eight results, one for each three bits */
    u32 out = 0;
    for (int row = 0; row < 8; row++)
        if (table >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return out;
}
#define FUNNEL(a, b) ((u64)(a) << 32 | (b))
UNSIGNED(v_not_b32, ~a)
UNSIGNED(v_and_b32, a &b)
UNSIGNED(v_or_b32, a | b)
UNSIGNED(v_xor_b32, a ^ b)
UNSIGNED(v_xnor_b32, ~(a ^ b))
UNSIGNED(v_and_or_b32, (a & b) | c)
UNSIGNED(v_or3_b32, a | b | c)
UNSIGNED(v_bfi_b32, (a & b) | (~a & c))
UNSIGNED(v_bfe_u32, field(a, (b & 31) | (c & 31) << 16, 32, 0))
UNSIGNED(v_bfe_i32, field(a, (b & 31) | (c & 31) << 16, 32, 1))
UNSIGNED(v_bfm_b32, ((1u << (a & 31)) - 1) << (b & 31))
UNSIGNED(v_bfrev_b32, reversed(a, 32))
UNSIGNED(v_ffbh_u32, a ? __builtin_clz(a) : -1)
UNSIGNED(v_ffbl_b32, a ? __builtin_ctz(a) : -1)
UNSIGNED(v_bcnt_u32_b32, __builtin_popcount(a) + b)
UNSIGNED(v_mbcnt_lo_u32_b32, __builtin_popcount(a & (lane < 32 ? (1u << lane) - 1 : ~0u)) + b)
UNSIGNED(v_mbcnt_hi_u32_b32, __builtin_popcount(a & (lane < 32 ? 0 : (1u << (lane - 32)) - 1)) + b)
UNSIGNED(v_lshlrev_b32, b << (a & 31))
UNSIGNED(v_lshrrev_b32, b >> (a & 31))
SIGNED(v_ashrrev_i32, b >> (a & 31))
UNSIGNED(v_lshlrev_b16, b << (a & 15) & 0xffff)
UNSIGNED(v_lshrrev_b16, (b & 0xffff) >> (a & 15))
UNSIGNED(v_ashrrev_i16, (i16)b >> (a & 15) & 0xffff)
UNSIGNED(v_lshl_or_b32, a << (b & 31) | c)
UNSIGNED(v_alignbit_b32, FUNNEL(a, b) >> (c & 31))
UNSIGNED(v_alignbyte_b32, FUNNEL(a, b) >> 8 * (c & 3))
UNSIGNED(v_perm_b32, permuted(a, b, c))
UNSIGNED(v_bitop3_b32, any_bits(a, b, c, in->offset))
UNSIGNED(v_bitop3_b16, any_bits(a, b, c, in->offset))
UNSIGNED(v_pack_b32_f16, (a >> (in->op_sel & 1 ? 16 : 0) & 0xffff) | b >> (in->op_sel & 2 ? 16 : 0) << 16)

/* --- integers --- */

#define UP_TO(x, most) ((x) > (most) ? (most) : (x))
#define CLAMPED (in->flags & CLAMP)
UNSIGNED(v_add_u32, CLAMPED ? UP_TO((u64)a + b, ~0u) : a + b)
UNSIGNED(v_sub_u32, CLAMPED &&b > a ? 0 : a - b)
UNSIGNED(v_subrev_u32, CLAMPED &&a > b ? 0 : b - a)
UNSIGNED(v_add3_u32, a + b + c)
UNSIGNED(v_add_lshl_u32, (a + b) << (c & 31))
UNSIGNED(v_lshl_add_u32, (a << (b & 31)) + c)
UNSIGNED(v_xad_u32, (a ^ b) + c)
UNSIGNED(v_mul_lo_u32, a *b)
UNSIGNED(v_mul_hi_u32, (u64)a *b >> 32)
SIGNED(v_mul_hi_i32, (i64)a *b >> 32)
UNSIGNED(v_mul_u32_u24, (a & 0xffffff) * (b & 0xffffff))
UNSIGNED(v_mad_u32_u24, (a & 0xffffff) * (b & 0xffffff) + c)
UNSIGNED(v_mul_i32_i24, ((i32)(a << 8) >> 8) * ((i32)(b << 8) >> 8))
UNSIGNED(v_mad_i32_i24, (u32)(((i32)(a << 8) >> 8) * ((i32)(b << 8) >> 8)) + c)
UNSIGNED(v_add_u16, (a + b) & 0xffff)
UNSIGNED(v_sub_u16, (a - b) & 0xffff)
UNSIGNED(v_subrev_u16, (b - a) & 0xffff)
UNSIGNED(v_mul_lo_u16, a *b & 0xffff)
UNSIGNED(v_mad_u16, (a * b + c) & 0xffff)
#define LESS(a, b) ((a) < (b) ? (a) : (b))
#define MORE(a, b) ((a) > (b) ? (a) : (b))
UNSIGNED(v_min_u32, LESS(a, b))
UNSIGNED(v_max_u32, MORE(a, b))
SIGNED(v_min_i32, LESS(a, b))
SIGNED(v_max_i32, MORE(a, b))
UNSIGNED(v_min_u16, LESS((u16)a, (u16)b))
UNSIGNED(v_max_u16, MORE((u16)a, (u16)b))
UNSIGNED(v_min_i16, (u16)LESS((i16)a, (i16)b))
UNSIGNED(v_max_i16, (u16)MORE((i16)a, (i16)b))
UNSIGNED(v_min3_u32, LESS(LESS(a, b), c))
UNSIGNED(v_max3_u32, MORE(MORE(a, b), c))
SIGNED(v_min3_i32, LESS(LESS(a, b), c))
SIGNED(v_max3_i32, MORE(MORE(a, b), c))
UNSIGNED(v_med3_u32, MORE(LESS(a, b), LESS(MORE(a, b), c)))
SIGNED(v_med3_i32, MORE(LESS(a, b), LESS(MORE(a, b), c)))

/* Sums whose carry goes into a mask, and may come from one. */
#define CARRYING(name, expression)                                                   \
    INSTRUCTION(name) {                                                              \
        Lanes x;                                                                     \
        u64 carries = 0, came = in->from[2].kind ? scalar64(wave, &in->from[2]) : 0; \
        x.lanes = operand(wave, in, 0, BITS, x.a);                                   \
        operand(wave, in, 1, BITS, x.b);                                             \
        EACH_LANE {                                                                  \
            u64 a = x.a[lane], b = x.b[lane], carry = came >> lane & 1;              \
            (void)carry;                                                             \
            u64 sum = (expression);                                                  \
            x.d[lane] = (u32)sum;                                                    \
            if (bit(x.lanes, lane)) carries |= (sum >> 32 & 1) << lane;              \
        }                                                                            \
        WRITTEN(wave, in, x);                                                        \
        set_pair(wave, in->also_to.index, carries);                                  \
    }
CARRYING(v_add_co_u32, a + b)
CARRYING(v_addc_co_u32, a + b + carry)
CARRYING(v_sub_co_u32, a - b)
CARRYING(v_subb_co_u32, a - b - carry)
CARRYING(v_subrev_co_u32, b - a)
CARRYING(v_subbrev_co_u32, b - a - carry)

/* --- integers of 64 bits: `a` and `b` have 32 of them, `wide` 64 --- */

#define WIDE(name, wide_operand, expression)                                                            \
    INSTRUCTION(name) {                                                                                 \
        u32 first[WAVE], second[WAVE];                                                                  \
        u64 wides[WAVE], out[WAVE], carries = 0, exec = pair(wave, EXEC);                               \
        operand(wave, in, 0, BITS, first);                                                              \
        operand(wave, in, 1, BITS, second);                                                             \
        operand64(wave, in, wide_operand, wides);                                                       \
        EACH_LANE {                                                                                     \
            u64 a = first[lane], b = second[lane], wide = wides[lane];                                  \
            (void)a, (void)b;                                                                           \
            out[lane] = (u64)(expression);                                                              \
            if (bit(exec, lane) && out[lane] < wide) carries |= (u64)1 << lane;                         \
        }                                                                                               \
        put64(wave, in->to.index, out, exec);                                                           \
        if (in->also_to.kind) set_pair(wave, in->also_to.index, carries);                               \
    }
WIDE(v_lshlrev_b64, 1, wide << (a & 63))
WIDE(v_lshrrev_b64, 1, wide >> (a & 63))
WIDE(v_ashrrev_i64, 1, (i64)wide >> (a & 63))
WIDE(v_mad_u64_u32, 2, a *b + wide)
WIDE(v_mad_i64_i32, 2, (u64)((i64)(i32)a * (i32)b) + wide)
INSTRUCTION(v_lshl_add_u64) {
    u64 a[WAVE], c[WAVE], out[WAVE];
    u32 by[WAVE];
    operand64(wave, in, 0, a);
    operand(wave, in, 1, BITS, by);
    operand64(wave, in, 2, c);
    EACH_LANE out[lane] = (a[lane] << (by[lane] & 63)) + c[lane];
    put64(wave, in->to.index, out, pair(wave, EXEC));
}

/* --- comparisons: a mask with a bit a lane, 0 where EXEC has none --- */

#define COMPARED(name, kind, type, taken, expression)                                      \
    INSTRUCTION(name) {                                                                    \
        u32 first[WAVE], second[WAVE];                                                     \
        u64 mask = 0, lanes = operand(wave, in, 0, kind, first);                           \
        operand(wave, in, 1, kind, second);                                                \
        EACH_LANE {                                                                        \
            type a = (type)taken(first[lane]), b = (type)taken(second[lane]);              \
            mask |= (u64)(expression) << lane;                                             \
        }                                                                                  \
        set_pair(wave, in->to.index, mask & lanes);                                        \
    }
#define COMPARED_WIDE(name, type, test)                                                    \
    INSTRUCTION(name) {                                                                    \
        u64 first[WAVE], second[WAVE], mask = 0;                                           \
        operand64(wave, in, 0, first);                                                     \
        operand64(wave, in, 1, second);                                                    \
        EACH_LANE mask |= (u64)((type)first[lane] test(type) second[lane]) << lane;        \
        set_pair(wave, in->to.index, mask & pair(wave, EXEC));                             \
    }
#define COMPARED_INTEGERS(end, test)                                \
    COMPARED(v_cmp_##end##_i32, BITS, i32, SAME, a test b)          \
    COMPARED(v_cmp_##end##_u32, BITS, u32, SAME, a test b)          \
    COMPARED(v_cmp_##end##_i16, BITS, i16, SAME, a test b)          \
    COMPARED(v_cmp_##end##_u16, BITS, u16, SAME, a test b)          \
    COMPARED_WIDE(v_cmp_##end##_i64, i64, test)                     \
    COMPARED_WIDE(v_cmp_##end##_u64, u64, test)
COMPARED_INTEGERS(eq, ==)
COMPARED_INTEGERS(ne, !=)
COMPARED_INTEGERS(lt, <)
COMPARED_INTEGERS(le, <=)
COMPARED_INTEGERS(gt, >)
COMPARED_INTEGERS(ge, >=)
#define COMPARED_FLOATS(end, expression)                               \
    COMPARED(v_cmp_##end##_f32, SINGLE, float, single, expression)     \
    COMPARED(v_cmp_##end##_f16, HALF, float, half, expression)
COMPARED_FLOATS(eq, a == b)
COMPARED_FLOATS(lg, a < b || a > b)
COMPARED_FLOATS(lt, a < b)
COMPARED_FLOATS(le, a <= b)
COMPARED_FLOATS(gt, a > b)
COMPARED_FLOATS(ge, a >= b)
COMPARED_FLOATS(neq, !(a == b))
COMPARED_FLOATS(nlg, !(a < b || a > b))
COMPARED_FLOATS(nlt, !(a < b))
COMPARED_FLOATS(nle, !(a <= b))
COMPARED_FLOATS(ngt, !(a > b))
COMPARED_FLOATS(nge, !(a >= b))
COMPARED_FLOATS(o, a == a && b == b)
COMPARED_FLOATS(u, a != a || b != b)

static int class_of(float x) { /* signalling and quiet NaN, −inf, −normal, −subnormal, −0, then the positive ones */
    if (isnan(x)) return bits_of(x) >> 22 & 1;
    int size = isinf(x) ? 0 : x == 0 ? 3 : subnormal(x) ? 2 : 1;
    return signbit(x) ? 2 + size : 9 - size;
}
INSTRUCTION(v_cmp_class_f32) {
    u32 a[WAVE], b[WAVE];
    u64 mask = 0, lanes = operand(wave, in, 0, SINGLE, a);
    operand(wave, in, 1, BITS, b);
    EACH_LANE mask |= (u64)(b[lane] >> class_of(single(a[lane])) & 1) << lane;
    set_pair(wave, in->to.index, mask & lanes);
}

/* --- float32 --- */

#define IS_NAN3 (isnan(a) || isnan(b) || isnan(c))
FLOATING(v_add_f32, a + b)
FLOATING(v_sub_f32, a - b)
FLOATING(v_subrev_f32, b - a)
FLOATING(v_mul_f32, a *b)
FLOATING(v_min_f32, least(a, b))
FLOATING(v_max_f32, most(a, b))
FLOATING(v_min3_f32, least(least(a, b), c))
FLOATING(v_max3_f32, most(most(a, b), c))
FLOATING(v_minimum3_f32, IS_NAN3 ? NAN : least(least(a, b), c))
FLOATING(v_maximum3_f32, IS_NAN3 ? NAN : most(most(a, b), c))
FLOATING(v_med3_f32, middle(a, b, c))
FLOATING(v_fma_f32, fmaf(a, b, c))
FLOATING(v_fmaak_f32, fmaf(a, b, c))
FLOATING(v_fmamk_f32, fmaf(a, b, c))
FLOATING(v_fmac_f32, fmaf(a, b, single(wave->v[in->to.index][lane])))
FLOATING(v_rcp_f32, 1.0f / a)
FLOATING(v_rcp_iflag_f32, 1.0f / a)
FLOATING(v_rsq_f32, 1.0f / sqrtf(a))
FLOATING(v_sqrt_f32, sqrtf(a))
FLOATING(v_exp_f32, exp2f(a))
FLOATING(v_log_f32, log2f(a))
FLOATING(v_rndne_f32, nearbyintf(a))
FLOATING(v_floor_f32, floorf(a))
FLOATING(v_ceil_f32, ceilf(a))
FLOATING(v_trunc_f32, truncf(a))
FLOATING(v_fract_f32, a - floorf(a))
FLOATING(v_div_fixup_f32, div_fixup(a, b, c))
FLOATING(v_ldexp_f32, ldexpf(a, (i32)x.b[lane]))
INSTRUCTION(v_div_scale_f32) {
    Lanes x;
    u64 mask = 0;
    int scaled;
    fetch(wave, in, SINGLE, &x);
    EACH_LANE {
        x.d[lane] = bits_of(div_scale(single(x.a[lane]), single(x.b[lane]), single(x.c[lane]), &scaled));
        mask |= (u64)scaled << lane;
    }
    WRITTEN(wave, in, x);
    set_pair(wave, in->also_to.index, mask & x.lanes);
}
INSTRUCTION(v_div_fmas_f32) { /* takes back what v_div_scale has scaled, as VCC says */
    Lanes x;
    u64 scaled = pair(wave, VCC);
    fetch(wave, in, SINGLE, &x);
    EACH_LANE {
        float y = fmaf(single(x.a[lane]), single(x.b[lane]), single(x.c[lane]));
        if (bit(scaled, lane)) y = ldexpf(y, exponent(single(x.c[lane])) > 127 ? 64 : -64);
        x.d[lane] = bits_of(y);
    }
    WRITTEN(wave, in, x);
}

/* --- two float32 in two registers: op_sel and op_sel_hi say which half of an operand each of them takes --- */

/* Trap: the high half of v_pk_mov_b32 goes by the second bit of op_sel, that of the others by op_sel_hi. */
static void halves_of(const Wave *wave, const Instruction *in, int i, int high_by, u32 *low, u32 *high) {
    u32 words[2][WAVE];
    const Operand *o = &in->from[i];
    plain(wave, o, 0, words[0]);
    if (o->kind == CONSTANT)
        memcpy(words[1], words[0], sizeof words[0]);
    else
        plain(wave, o, 1, words[1]);
    memcpy(low, words[in->op_sel >> i & 1], sizeof words[0]);
    memcpy(high, words[high_by >> i & 1], sizeof words[0]);
    if (in->neg_lo >> i & 1) EACH_LANE low[lane] ^= 0x80000000;
    if (in->neg_hi >> i & 1) EACH_LANE high[lane] ^= 0x80000000;
}

#define TWO_FLOATS(name, operands, expression)                                                              \
    INSTRUCTION(name) {                                                                                     \
        u32 from[3][2][WAVE], out[2][WAVE];                                                                 \
        for (int i = 0; i < operands; i++) halves_of(wave, in, i, in->op_sel_hi, from[i][0], from[i][1]);   \
        for (int at = 0; at < 2; at++) EACH_LANE {                                                          \
            float a = single(from[0][at][lane]), b = single(from[1][at][lane]);                             \
            float c = operands > 2 ? single(from[2][at][lane]) : 0;                                         \
            (void)c;                                                                                        \
            out[at][lane] = bits_of(finished(in, expression));                                              \
        }                                                                                                   \
        for (int at = 0; at < 2; at++) put(wave, in->to.index + at, out[at], pair(wave, EXEC));             \
    }
TWO_FLOATS(v_pk_add_f32, 2, a + b)
TWO_FLOATS(v_pk_mul_f32, 2, a *b)
TWO_FLOATS(v_pk_fma_f32, 3, fmaf(a, b, c))
INSTRUCTION(v_pk_mov_b32) {
    u32 low[WAVE], high[WAVE], unused[WAVE];
    halves_of(wave, in, 0, in->op_sel, low, unused);
    halves_of(wave, in, 1, in->op_sel, unused, high);
    put(wave, in->to.index, low, pair(wave, EXEC));
    put(wave, in->to.index + 1, high, pair(wave, EXEC));
}

/* --- two 16-bit numbers in one register --- */

#define TWO_SHORTS(name, type, taken, given, expression)                                                \
    INSTRUCTION(name) {                                                                                 \
        u32 from[3][WAVE] = {{0}}, out[WAVE] = {0};                                                     \
        for (int i = 0; i < 3 && in->from[i].kind; i++) plain(wave, &in->from[i], 0, from[i]);          \
        EACH_LANE for (int at = 0; at < 2; at++) {                                                      \
            u32 x[3];                                                                                   \
            for (int i = 0; i < 3; i++) {                                                               \
                int high = (at ? in->op_sel_hi : in->op_sel) >> i & 1;                                  \
                x[i] = from[i][lane] >> 16 * high & 0xffff;                                             \
                if ((at ? in->neg_hi : in->neg_lo) >> i & 1) x[i] ^= 0x8000;                            \
            }                                                                                           \
            type a = (type)taken(x[0]), b = (type)taken(x[1]), c = (type)taken(x[2]);                   \
            (void)c;                                                                                    \
            out[lane] |= ((u32)given(expression) & 0xffff) << 16 * at;                                  \
        }                                                                                               \
        put(wave, in->to.index, out, pair(wave, EXEC));                                                 \
    }
#define TWO_HALVES(name, expression) TWO_SHORTS(name, double, half, half_bits, expression)
TWO_HALVES(v_pk_add_f16, a + b)
TWO_HALVES(v_pk_mul_f16, a *b)
TWO_HALVES(v_pk_fma_f16, a *b + c)
TWO_HALVES(v_pk_min_f16, least((float)a, (float)b))
TWO_HALVES(v_pk_max_f16, most((float)a, (float)b))
TWO_HALVES(v_pk_minimum3_f16, IS_NAN3 ? NAN : least(least((float)a, (float)b), (float)c))
TWO_HALVES(v_pk_maximum3_f16, IS_NAN3 ? NAN : most(most((float)a, (float)b), (float)c))
TWO_SHORTS(v_pk_add_u16, u32, SAME, SAME, a + b)
TWO_SHORTS(v_pk_sub_i16, u32, SAME, SAME, a - b)
TWO_SHORTS(v_pk_sub_u16, u32, SAME, SAME, a - b)
TWO_SHORTS(v_pk_mul_lo_u16, u32, SAME, SAME, a *b)
TWO_SHORTS(v_pk_mad_u16, u32, SAME, SAME, a *b + c)
TWO_SHORTS(v_pk_lshlrev_b16, u32, SAME, SAME, b << (a & 15))
TWO_SHORTS(v_pk_lshrrev_b16, u32, SAME, SAME, b >> (a & 15))
TWO_SHORTS(v_pk_ashrrev_i16, i16, SAME, SAME, b >> (a & 15))
TWO_SHORTS(v_pk_min_i16, i16, SAME, SAME, LESS(a, b))
TWO_SHORTS(v_pk_max_i16, i16, SAME, SAME, MORE(a, b))
TWO_SHORTS(v_pk_min_u16, u16, SAME, SAME, LESS(a, b))
TWO_SHORTS(v_pk_max_u16, u16, SAME, SAME, MORE(a, b))

/* --- float16 alone --- */

HALVES(v_add_f16, a + b)
HALVES(v_sub_f16, a - b)
HALVES(v_mul_f16, a *b)
HALVES(v_fma_f16, a *b + c)
HALVES(v_min_f16, least((float)a, (float)b))
HALVES(v_max_f16, most((float)a, (float)b))

/* Products of float32 and float16: op_sel_hi says which operands are float16, op_sel which half of a register.
 * Trap: a constant follows op_sel_hi, too: 1.0 is then the 0x3c00 of float16. The parser writes it so. */
static void mixed(Wave *wave, const Instruction *in, Lanes *x) {
    u32 *of[3] = {x->a, x->b, x->c};
    x->lanes = pair(wave, EXEC);
    for (int i = 0; i < 3; i++) {
        const Operand *o = &in->from[i];
        int narrow = in->op_sel_hi >> i & 1, high = in->op_sel >> i & 1;
        plain(wave, o, 0, of[i]);
        if (narrow) EACH_LANE of[i][lane] = bits_of(half(of[i][lane] >> 16 * high));
        signs(o, SINGLE, of[i]);
    }
    EACH_LANE x->d[lane] = bits_of(finished(in, fmaf(single(x->a[lane]), single(x->b[lane]), single(x->c[lane]))));
}
#define MIXED(name, expression)                                       \
    INSTRUCTION(name) {                                               \
        Lanes x;                                                      \
        mixed(wave, in, &x);                                          \
        EACH_LANE {                                                   \
            u32 was = wave->v[in->to.index][lane], d = x.d[lane];     \
            (void)was;                                                \
            x.d[lane] = (expression);                                 \
        }                                                             \
        put(wave, in->to.index, x.d, x.lanes);                        \
    }
MIXED(v_fma_mix_f32, d)
MIXED(v_fma_mixlo_f16, (was & 0xffff0000) | half_bits(single(d)))
MIXED(v_fma_mixhi_f16, (was & 0xffff) | half_bits(single(d)) << 16)

/* --- conversions --- */

static u32 to_unsigned(float x) { return !(x > 0) ? 0 : x >= 0x1p32f ? ~0u : (u32)x; }
static u32 to_signed(float x) {
    return isnan(x) ? 0 : x >= 0x1p31f ? 0x7fffffff : x < -0x1p31f ? 0x80000000 : (u32)(i32)x;
}
static u32 half_towards_zero(float x) {
    u32 near = half_bits(x);
    return fabsf(half(near)) > fabsf(x) ? near - 1 : near; /* of infinity, the largest number */
}
TO_FLOAT(v_cvt_f32_i32, (float)(i32)a)
TO_FLOAT(v_cvt_f32_u32, (float)a)
TO_FLOAT(v_cvt_f32_ubyte0, (float)(a & 255))
TO_FLOAT(v_cvt_f32_ubyte1, (float)(a >> 8 & 255))
TO_FLOAT(v_cvt_f32_ubyte2, (float)(a >> 16 & 255))
TO_FLOAT(v_cvt_f32_ubyte3, (float)(a >> 24))
TO_FLOAT(v_cvt_f32_bf16, brain(a))
FROM_FLOAT(v_cvt_u32_f32, to_unsigned(a))
FROM_FLOAT(v_cvt_i32_f32, to_signed(a))
FROM_FLOAT(v_cvt_f16_f32, half_bits(a))
LANEWISE(v_cvt_f32_f16, HALF, float, half, bits_of, FINISHED, a)
FROM_FLOAT(v_cvt_pk_f16_f32, half_bits(a) | half_bits(b) << 16)
FROM_FLOAT(v_cvt_pkrtz_f16_f32, half_towards_zero(a) | half_towards_zero(b) << 16)
FROM_FLOAT(v_cvt_pk_bf16_f32, brain_bits(a) | brain_bits(b) << 16)

/* Two fp8 in one half of a register. Trap: it is the last bit of op_sel, that of the result, which says which half; the
 * other half stays. Scales of gfx950 count by their exponent alone. */
static u32 two_fp8(const Wave *wave, const Instruction *in, int lane, float a, float b, int wide) {
    u32 two = fp8_bits(a, wide, wave->saturates) | fp8_bits(b, wide, wave->saturates) << 8;
    u32 was = wave->v[in->to.index][lane];
    return in->op_sel & 8 ? (was & 0xffff) | two << 16 : (was & 0xffff0000) | two;
}
static float by_scale(float x, float scale, int sign) { return ldexpf(x, sign * (exponent(scale) - 127)); }
FROM_FLOAT(v_cvt_pk_fp8_f32, two_fp8(wave, in, lane, a, b, 0))
FROM_FLOAT(v_cvt_pk_bf8_f32, two_fp8(wave, in, lane, a, b, 1))
FROM_FLOAT(v_cvt_scalef32_pk_fp8_f32, two_fp8(wave, in, lane, by_scale(a, c, -1), by_scale(b, c, -1), 0))

/* And back: op_sel, or SDWA, says which byte or half is read. */
#define TO_TWO_FLOATS(name, wide, scaled)                                                                  \
    INSTRUCTION(name) {                                                                                    \
        u32 from[WAVE], scales[WAVE], out[2][WAVE];                                                        \
        operand(wave, in, 0, BITS, from);                                                                  \
        if (scaled) operand(wave, in, 1, SINGLE, scales);                                                  \
        EACH_LANE for (int at = 0; at < 2; at++) {                                                         \
            u32 code = from[lane] >> (16 * (in->op_sel & 1) + 8 * at) & 255;                               \
            out[at][lane] = bits_of(by_scale(fp8(code, wide), scaled ? single(scales[lane]) : 1.0f, 1));   \
        }                                                                                                  \
        for (int at = 0; at < 2; at++) put(wave, in->to.index + at, out[at], pair(wave, EXEC));            \
    }
TO_TWO_FLOATS(v_cvt_pk_f32_fp8, 0, 0)
TO_TWO_FLOATS(v_cvt_pk_f32_bf8, 1, 0)
TO_TWO_FLOATS(v_cvt_scalef32_pk_f32_fp8, 0, 1)
TO_FLOAT(v_cvt_f32_fp8, fp8(a & 255, 0)) /* SDWA alone: the parser refuses op_sel here */
TO_FLOAT(v_cvt_f32_bf8, fp8(a & 255, 1))
#define SCALED(i) by_scale(fp8(x.a[lane] >> (16 * (in->op_sel & 1) + 8 * i) & 255, 0), b, 1)
FROM_FLOAT(v_cvt_scalef32_pk_f16_fp8, half_bits(SCALED(0)) | half_bits(SCALED(1)) << 16)
FROM_FLOAT(v_cvt_scalef32_pk_bf16_fp8, brain_bits(SCALED(0)) | brain_bits(SCALED(1)) << 16)
