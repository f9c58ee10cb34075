/* Group normalisation, modulation and SiLU of bfloat16 features with channels innermost in memory.
 *
 * Features are (rows, positions, channels). With the mean and the reciprocal deviation r of a group,
 * a channel becomes m = a x + b, where
 *
 *     a = r w s,    b = (v - mean r w) s + t,
 *
 * w and v are the gain and the bias of the norm, and s and t scale and shift each channel of a row.
 * The output is m or its SiLU. All sums and products are float32. Loops over channels are innermost,
 * so that compilers vectorise them.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    long rows, positions, channels, groups;
    float eps;
} Shape;

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even. */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* 1 / (1 + exp(-x)), with 2^n from the bits of n and a Taylor polynomial for the rest. */
static inline float sigmoid(float x) {
    float y = x * -1.44269504f;
    y = y > -126.0f ? y : -126.0f;
    y = y < 126.0f ? y : 126.0f;
    int32_t n = (int32_t)(y + (y < 0.0f ? -0.5f : 0.5f));
    float r = (y - (float)n) * 0.693147181f;
    float p = 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return 1.0f / (1.0f + p * power);
}

/* Sums of x and of x^2 over the positions of a row. */
static void moments(const uint16_t *restrict x, float *restrict sums, float *restrict squares, Shape k) {
    memset(sums, 0, 4 * k.channels);
    memset(squares, 0, 4 * k.channels);
    for (long n = 0; n < k.positions; n++, x += k.channels)
        for (long c = 0; c < k.channels; c++) {
            float value = widen(x[c]);
            sums[c] += value;
            squares[c] += value * value;
        }
}

/* Mean and reciprocal deviation of each group, from sums over the positions of its channels. */
static void statistics(const float *sums, const float *squares, float *mean, float *r, Shape k) {
    long width = k.channels / k.groups;
    for (long g = 0; g < k.groups; g++) {
        double sum = 0.0, square = 0.0, count = (double)width * k.positions;
        for (long c = g * width; c < (g + 1) * width; c++) {
            sum += sums[c];
            square += squares[c];
        }
        double variance = square / count - sum / count * (sum / count);
        mean[g] = (float)(sum / count);
        r[g] = (float)(1.0 / sqrt((variance > 0.0 ? variance : 0.0) + k.eps));
    }
}

/* `silu` is a constant where these are used, so each has two versions. */
static inline __attribute__((always_inline)) void transform(
    const uint16_t *restrict x, const float *restrict a, const float *restrict b,
    uint16_t *restrict y, Shape k, int silu) {
    for (long n = 0; n < k.positions; n++, x += k.channels, y += k.channels)
        for (long c = 0; c < k.channels; c++) {
            float m = a[c] * widen(x[c]) + b[c];
            y[c] = narrow(silu ? m * sigmoid(m) : m);
        }
}

/* Gradient of m, at a gradient dy of the output. */
static inline float inner_gradient(float x, float a, float b, float dy, int silu) {
    float m = a * x + b, s = silu ? sigmoid(m) : 1.0f;
    return silu ? dy * s * (1.0f + m * (1.0f - s)) : dy;
}

/* Gradients of a and b: sums over the positions of a row. */
static inline __attribute__((always_inline)) void gradient_sums(
    const uint16_t *restrict x, const float *restrict a, const float *restrict b,
    const uint16_t *restrict dy, float *restrict da, float *restrict db, Shape k, int silu) {
    memset(da, 0, 4 * k.channels);
    memset(db, 0, 4 * k.channels);
    for (long n = 0; n < k.positions; n++, x += k.channels, dy += k.channels)
        for (long c = 0; c < k.channels; c++) {
            float value = widen(x[c]);
            float dm = inner_gradient(value, a[c], b[c], widen(dy[c]), silu);
            da[c] += dm * value;
            db[c] += dm;
        }
}

/* Gradient of x: a dm + ds + 2 x dq, through the transform and through both sums of `moments`. */
static inline __attribute__((always_inline)) void gradient(
    const uint16_t *restrict x, const float *restrict a, const float *restrict b,
    const uint16_t *restrict dy, const float *restrict ds, const float *restrict dq,
    uint16_t *restrict dx, Shape k, int silu) {
    for (long n = 0; n < k.positions; n++, x += k.channels, dy += k.channels, dx += k.channels)
        for (long c = 0; c < k.channels; c++) {
            float value = widen(x[c]);
            float dm = inner_gradient(value, a[c], b[c], widen(dy[c]), silu);
            dx[c] = narrow(dm * a[c] + ds[c] + 2.0f * value * dq[c]);
        }
}

/* y from x. `scale` is s - 1; scale and shift may be null. Fills mean and r (rows, groups), and a
 * and b (rows, channels), which `norm_backward` takes. */
void norm_forward(const uint16_t *x, const float *gain, const float *bias, const float *scale,
                  const float *shift, float *mean, float *r, float *a, float *b, uint16_t *y,
                  long rows, long positions, long channels, long groups, float eps, int silu) {
    Shape k = {rows, positions, channels, groups, eps};
    long size = positions * channels, width = channels / groups;
    for (long row = 0; row < rows; row++, x += size, y += size) {
        moments(x, a, b, k);
        statistics(a, b, mean, r, k);
        for (long c = 0; c < channels; c++) {
            float s = scale ? 1.0f + scale[c] : 1.0f, t = shift ? shift[c] : 0.0f;
            float inner = r[c / width] * gain[c];
            a[c] = inner * s;
            b[c] = (bias[c] - mean[c / width] * inner) * s + t;
        }
        if (silu) transform(x, a, b, y, k, 1);
        else transform(x, a, b, y, k, 0);
        mean += groups, r += groups, a += channels, b += channels;
        scale = scale ? scale + channels : scale, shift = shift ? shift + channels : shift;
    }
}

/* Gradients of x, gain and bias, scale and shift from that of y. Gradients of gain and bias are sums
 * over rows, and begin as zeros. `work` has room for four rows of channels. */
void norm_backward(const uint16_t *x, const float *gain, const float *bias, const float *scale,
                   const float *mean, const float *r, const float *a, const float *b,
                   const uint16_t *dy, float *work, uint16_t *dx, float *dgain, float *dbias,
                   float *dscale, float *dshift, long rows, long positions, long channels,
                   long groups, float eps, int silu) {
    Shape k = {rows, positions, channels, groups, eps};
    long size = positions * channels, width = channels / groups;
    float *da = work, *db = work + channels, *ds = work + 2 * channels, *dq = work + 3 * channels;
    for (long row = 0; row < rows; row++, x += size, dy += size, dx += size) {
        if (silu) gradient_sums(x, a, b, dy, da, db, k, 1);
        else gradient_sums(x, a, b, dy, da, db, k, 0);
        for (long g = 0; g < groups; g++) {
            double dr = 0.0, dmean = 0.0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                float s = scale ? 1.0f + scale[c] : 1.0f;
                float direct = da[c] - db[c] * mean[g];
                dgain[c] += direct * r[g] * s;
                dbias[c] += db[c] * s;
                if (scale) {
                    dscale[c] = direct * r[g] * gain[c] + db[c] * bias[c];
                    dshift[c] = db[c];
                }
                dr += (double)direct * gain[c] * s;
                dmean -= (double)db[c] * r[g] * gain[c] * s;
            }
            double count = (double)width * positions, dvariance = -0.5 * dr * r[g] * r[g] * r[g];
            for (long c = g * width; c < (g + 1) * width; c++) {
                ds[c] = (float)((dmean - 2.0 * mean[g] * dvariance) / count);
                dq[c] = (float)(dvariance / count);
            }
        }
        if (silu) gradient(x, a, b, dy, ds, dq, dx, k, 1);
        else gradient(x, a, b, dy, ds, dq, dx, k, 0);
        mean += groups, r += groups, a += channels, b += channels;
        if (scale) scale += channels, dscale += channels, dshift += channels;
    }
}
