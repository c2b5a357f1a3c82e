/* Matrix instructions: D = A · Bᵀ + C in float32, over a whole wave whatever EXEC says.
 *
 * A and B have M rows of K elements. Lane l holds row l % M, and of it the elements that follow each other from
 * l / M · (elements of a lane) on. Of D, lane l holds column l % M: of M = 16 rows 4 · (l / 16) to + 3, of M = 32 in
 * fours of rows, eight apart. The sums here are exact but for the rounding of float64 and a last one to float32; how the
 * hardware rounds in between, and what it does with subnormal numbers, is not modelled.
 */

enum { F16, BF16, F32, FP8, BF8 };

static double element(const Wave *wave, const Operand *o, int lane, int i, int format) {
    switch (format) {
    case F32: return single(wave->v[o->index + i][lane]);
    case F16: return half(wave->v[o->index + i / 2][lane] >> 16 * (i % 2));
    case BF16: return brain(wave->v[o->index + i / 2][lane] >> 16 * (i % 2));
    }
    return fp8(wave->v[o->index + i / 4][lane] >> 8 * (i % 4) & 255, format == BF8);
}

static double a_rows[32 * 128], b_columns[128 * 32]; /* a_rows[m][k], b_columns[k][n] */

static void multiply(Wave *wave, const Instruction *in, int size, int depth, int format_a, int format_b) {
    int of_lane = depth * size / WAVE, results = size * size / WAVE;
    u32 out[16][WAVE];
    EACH_LANE for (int i = 0; i < of_lane; i++) {
        int row = lane % size, k = lane / size * of_lane + i;
        a_rows[row * depth + k] = element(wave, &in->from[0], lane, i, format_a);
        b_columns[k * size + row] = element(wave, &in->from[1], lane, i, format_b);
    }
    for (int row = 0; row < size; row++) {
        double sums[32] = {0};
        for (int k = 0; k < depth; k++) {
            double a = a_rows[row * depth + k], *b = b_columns + k * size;
            if (size == 32) /* bounds that the compiler knows */
                for (int column = 0; column < 32; column++) sums[column] += a * b[column];
            else
                for (int column = 0; column < 16; column++) sums[column] += a * b[column];
        }
        int fours = size == 16 ? row / 4 : row / 4 % 2; /* which lanes, and which of their registers, hold this row */
        int held = size == 16 ? row % 4 : row / 8 * 4 + row % 4;
        for (int column = 0; column < size; column++) {
            int lane = fours * size + column;
            const Operand *c = &in->from[2];
            u32 added = c->kind == VECTOR ? wave->v[c->index + held][lane] : scalar32(wave, c);
            out[held][lane] = bits_of((float)(sums[column] + single(added)));
        }
    }
    for (int i = 0; i < results; i++) memcpy(wave->v[in->to.index + i], out[i], sizeof out[i]);
}

#define MATRIX(name, size, depth, format_a, format_b) \
    INSTRUCTION(name) { multiply(wave, in, size, depth, format_a, format_b); }
MATRIX(v_mfma_f32_16x16x4_f32, 16, 4, F32, F32)
MATRIX(v_mfma_f32_32x32x2_f32, 32, 2, F32, F32)
MATRIX(v_mfma_f32_16x16x16_f16, 16, 16, F16, F16)
MATRIX(v_mfma_f32_32x32x8_f16, 32, 8, F16, F16)
MATRIX(v_mfma_f32_16x16x16_bf16, 16, 16, BF16, BF16)
MATRIX(v_mfma_f32_32x32x8_bf16, 32, 8, BF16, BF16)
MATRIX(v_mfma_f32_16x16x32_f16, 16, 32, F16, F16)
MATRIX(v_mfma_f32_32x32x16_f16, 32, 16, F16, F16)
MATRIX(v_mfma_f32_16x16x32_bf16, 16, 32, BF16, BF16)
MATRIX(v_mfma_f32_32x32x16_bf16, 32, 16, BF16, BF16)
MATRIX(v_mfma_f32_16x16x32_fp8_fp8, 16, 32, FP8, FP8)
MATRIX(v_mfma_f32_32x32x16_fp8_fp8, 32, 16, FP8, FP8)
MATRIX(v_mfma_f32_16x16x128_f8f6f4, 16, 128, FP8, FP8) /* the parser refuses formats other than e4m3 here */
MATRIX(v_mfma_f32_32x32x64_f8f6f4, 32, 64, FP8, FP8)
