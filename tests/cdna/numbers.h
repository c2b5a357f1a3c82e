/* Number formats: float32, float16, bfloat16 and the two flavours of fp8, and the steps of a division. */

static float single(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static u32 bits_of(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static int exponent(float x) { return bits_of(x) >> 23 & 255; }
static int subnormal(float x) { return exponent(x) == 0 && bits_of(x) & 0x7fffff; }

/* --- float16, without relying on a compiler that has it --- */

static float half(u32 bits) {
    u32 sign = (bits & 0x8000) << 16, e = bits >> 10 & 31, m = bits & 0x3ff;
    if (e == 31) return single(sign | 0x7f800000 | m << 13);
    if (e) return single(sign | (e + 112) << 23 | m << 13);
    return single(sign | bits_of((float)m * 0x1p-24f));
}

static u32 half_bits(double x) { /* to the nearest, ties to even */
    u32 sign = signbit(x) ? 0x8000 : 0;
    double size = fabs(x);
    int e;
    if (isnan(x)) return sign | 0x7e00;
    if (size >= 65520.0) return sign | 0x7c00;
    frexp(size, &e);
    e = size == 0 || e - 1 < -14 ? -14 : e - 1;
    u32 units = (u32)nearbyint(ldexp(size, 10 - e)); /* may carry into the exponent, as it should */
    return sign | (units + ((u32)(e + 14) << 10));
}

/* --- bfloat16 --- */

static float brain(u32 bits) { return single(bits << 16); }

static u32 brain_bits(float x) { /* to the nearest, ties to even */
    u32 bits = bits_of(x);
    return isnan(x) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* --- fp8: e4m3, and e5m2 as `wide`. gfx942 has FNUZ (one zero, one NaN at 0x80, no infinity), gfx950 has OCP's --- */

static float fp8(u32 code, int wide) {
    int mantissa = wide ? 2 : 3, top = wide ? 31 : 15, bias = (wide ? 15 : 7) + !launch.gfx950;
    int e = code >> mantissa & top, m = code & ((1 << mantissa) - 1);
    float sign = code & 0x80 ? -1.0f : 1.0f;
    if (!launch.gfx950) {
        if (code == 0x80) return NAN;
    } else if (e == top && wide) {
        return m ? NAN : sign * INFINITY;
    } else if (e == top && m == 7) {
        return NAN;
    }
    if (!e) return sign * ldexpf((float)m, 1 - bias - mantissa);
    return sign * ldexpf((float)((1 << mantissa) + m), e - bias - mantissa);
}

static u32 fp8_bits(float x, int wide, int saturates) { /* to the nearest, ties to even */
    int mantissa = wide ? 2 : 3, bias = (wide ? 15 : 7) + !launch.gfx950, ocp = launch.gfx950;
    u32 sign = signbit(x) ? 0x80 : 0;
    u32 largest = !ocp ? 0x7f : wide ? 0x7b : 0x7e;
    u32 beyond = !ocp ? 0x80 : wide ? sign | 0x7c : sign | 0x7f; /* NaN, or the infinity that e5m2 of OCP has */
    if (isnan(x)) return ocp ? sign | 0x7f : 0x80;
    if (isinf(x)) return saturates ? sign | largest : beyond;
    int e;
    frexpf(x, &e);
    e = x == 0 || e - 1 < 1 - bias ? 1 - bias : e - 1;
    u32 code = (u32)nearbyintf(ldexpf(fabsf(x), mantissa - e)) + ((u32)(e + bias - 1) << mantissa);
    if (code > largest) return saturates ? sign | largest : beyond;
    return code || ocp ? sign | code : 0;
}

/* --- minimum and maximum: a NaN loses, and −0 is below 0 --- */

static float least(float a, float b) {
    if (isnan(a) || isnan(b)) return isnan(a) ? b : a;
    return a == b ? (signbit(a) ? a : b) : a < b ? a : b;
}

static float most(float a, float b) {
    if (isnan(a) || isnan(b)) return isnan(a) ? b : a;
    return a == b ? (signbit(a) ? b : a) : a > b ? a : b;
}

static float middle(float a, float b, float c) {
    if (isnan(a) || isnan(b) || isnan(c)) return least(least(a, b), c);
    return most(least(a, b), least(most(a, b), c));
}

/* --- division: two scales, Newton's steps in plain instructions, v_div_fmas, v_div_fixup --- */

/* v_div_scale_f32 of `x`, which is the denominator or the numerator. Trap: the published text, read with subnormal
 * numbers, gives NaN for 1/x of an x above 2^126. This order of the tests gives quotients that are rounded right. */
static float div_scale(float x, float denominator, float numerator, int *scaled) {
    float inverse = (float)(1.0 / denominator), quotient = numerator / denominator;
    int of_numerator = bits_of(x) == bits_of(numerator), of_denominator = bits_of(x) == bits_of(denominator);
    *scaled = 0;
    if (numerator == 0 || denominator == 0) return NAN;
    if (exponent(numerator) - exponent(denominator) >= 96) { /* n/d near infinity */
        *scaled = 1;
        return of_denominator ? ldexpf(x, 64) : x;
    }
    if (subnormal(denominator)) return ldexpf(x, 64);
    if (subnormal(inverse)) {
        *scaled = subnormal(quotient);
        return !*scaled || of_denominator ? ldexpf(x, -64) : x;
    }
    if (subnormal(quotient)) {
        *scaled = 1;
        return of_numerator ? ldexpf(x, 64) : x;
    }
    return exponent(numerator) <= 23 ? ldexpf(x, 64) : x;
}

static float div_fixup(float quotient, float denominator, float numerator) {
    float sign = signbit(denominator) != signbit(numerator) ? -1.0f : 1.0f;
    if (isnan(numerator)) return numerator;
    if (isnan(denominator)) return denominator;
    if ((denominator == 0 && numerator == 0) || (isinf(denominator) && isinf(numerator))) return NAN;
    if (denominator == 0 || isinf(numerator)) return sign * INFINITY;
    if (isinf(denominator) || numerator == 0) return sign * 0.0f;
    if (exponent(numerator) - exponent(denominator) < -150) return sign * 0.0f;
    return sign * fabsf(quotient);
}
