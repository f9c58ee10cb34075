/* Group normalisation, modulation and SiLU of features with channels innermost in memory: bfloat16,
 * or float32 with -DFLOAT32.
 *
 * Features are (rows, positions, channels). With the mean and the reciprocal deviation r of a group,
 * a channel becomes m = a x + b, where
 *
 *     a = r w s,    b = (v - mean r w) s + t,
 *
 * w and v are the gain and the bias of the norm, and s and t scale and shift each channel of a row.
 * The output is m or its SiLU. Products are float32, and so are sums over BLOCK positions of a channel,
 * which add up as doubles. Values count from the first one of their channel, so that a large mean costs
 * no digits. Loops over channels are innermost, so that compilers vectorise them.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64

typedef struct {
    long rows, positions, channels, groups;
    float eps;
} Shape;

#ifdef FLOAT32
typedef float Element;

static inline float widen(Element x) { return x; }

static inline Element narrow(float value) { return value; }
#else
typedef uint16_t Element;

static inline float widen(Element x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even. */
static inline Element narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (Element)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#endif

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

/* Sums of d and of d^2 over the positions of a row, with d = x minus the first x of the channel. */
static void moments(const Element *restrict x, double *restrict sums, double *restrict squares,
                    float *restrict part, Shape k) {
    const Element *restrict first = x;
    float *restrict part_squares = part + k.channels;
    memset(sums, 0, 8 * k.channels);
    memset(squares, 0, 8 * k.channels);
    for (long start = 0; start < k.positions; start += BLOCK) {
        long end = start + BLOCK < k.positions ? start + BLOCK : k.positions;
        memset(part, 0, 8 * k.channels);
        for (long n = start; n < end; n++, x += k.channels)
            for (long c = 0; c < k.channels; c++) {
                float d = widen(x[c]) - widen(first[c]);
                part[c] += d;
                part_squares[c] += d * d;
            }
        for (long c = 0; c < k.channels; c++) {
            sums[c] += part[c];
            squares[c] += part_squares[c];
        }
    }
}

/* Mean and reciprocal deviation of each group, from the `moments` of its channels. */
static void statistics(const Element *first, const double *sums, const double *squares, float *mean,
                       float *r, Shape k) {
    long width = k.channels / k.groups;
    for (long g = 0; g < k.groups; g++) {
        double sum = 0.0, square = 0.0, count = (double)width * k.positions;
        for (long c = g * width; c < (g + 1) * width; c++) {
            double d = sums[c], x = widen(first[c]);
            sum += d + k.positions * x;
            square += squares[c] + 2.0 * d * x + k.positions * x * x;
        }
        double variance = square / count - sum / count * (sum / count);
        mean[g] = (float)(sum / count);
        r[g] = (float)(1.0 / sqrt((variance > 0.0 ? variance : 0.0) + k.eps));
    }
}

/* `silu` is a constant where these are used, so each has two versions. */
static inline __attribute__((always_inline)) void transform(
    const Element *restrict x, const float *restrict a, const float *restrict b,
    Element *restrict y, Shape k, int silu) {
    for (long n = 0; n < k.positions; n++, x += k.channels, y += k.channels)
        for (long c = 0; c < k.channels; c++) {
            float m = a[c] * widen(x[c]) + b[c];
            y[c] = narrow(silu ? m * sigmoid(m) : m);
        }
}

/* Gradient dm of m at the gradient dy of the output, and its sums over the positions of a row: of
 * dm (x - mean), and of dm. */
static inline __attribute__((always_inline)) void gradient_sums(
    const Element *restrict x, const float *restrict a, const float *restrict b,
    const float *restrict mean, const Element *restrict dy, float *restrict dm, double *restrict da,
    double *restrict db, float *restrict part, Shape k, int silu) {
    float *restrict part_b = part + k.channels;
    memset(da, 0, 8 * k.channels);
    memset(db, 0, 8 * k.channels);
    for (long start = 0; start < k.positions; start += BLOCK) {
        long end = start + BLOCK < k.positions ? start + BLOCK : k.positions;
        memset(part, 0, 8 * k.channels);
        for (long n = start; n < end; n++, x += k.channels, dy += k.channels, dm += k.channels)
            for (long c = 0; c < k.channels; c++) {
                float value = widen(x[c]), m = a[c] * value + b[c], s = silu ? sigmoid(m) : 1.0f;
                float inner = widen(dy[c]) * (silu ? s * (1.0f + m * (1.0f - s)) : 1.0f);
                dm[c] = inner;
                part[c] += inner * (value - mean[c]);
                part_b[c] += inner;
            }
        for (long c = 0; c < k.channels; c++) {
            da[c] += part[c];
            db[c] += part_b[c];
        }
    }
}

/* Gradient of x: a dm + ds + 2 (x - mean) dq, through the transform, the mean and the variance. */
static void gradient(const Element *restrict x, const float *restrict a, const float *restrict mean,
                     const float *restrict dm, const float *restrict ds, const float *restrict dq,
                     Element *restrict dx, Shape k) {
    for (long n = 0; n < k.positions; n++, x += k.channels, dm += k.channels, dx += k.channels)
        for (long c = 0; c < k.channels; c++)
            dx[c] = narrow(dm[c] * a[c] + ds[c] + 2.0f * (widen(x[c]) - mean[c]) * dq[c]);
}

/* y from x. `scale` is s - 1; scale and shift may be null. Fills mean and r (rows, groups), and a
 * and b (rows, channels), which `norm_backward` takes. `work` has room for three rows of doubles. */
void norm_forward(const Element *x, const float *gain, const float *bias, const float *scale,
                  const float *shift, double *work, float *mean, float *r, float *a, float *b,
                  Element *y, long rows, long positions, long channels, long groups, float eps, int silu) {
    Shape k = {rows, positions, channels, groups, eps};
    long size = positions * channels, width = channels / groups;
    double *sums = work, *squares = sums + channels;
    float *part = (float *)(squares + channels);
    for (long row = 0; row < rows; row++, x += size, y += size) {
        moments(x, sums, squares, part, k);
        statistics(x, sums, squares, mean, r, k);
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
 * over rows, and begin as zeros. `work` has room for five rows of doubles, and for the features of a
 * row in float32. */
void norm_backward(const Element *x, const float *gain, const float *bias, const float *scale,
                   const float *mean, const float *r, const float *a, const float *b,
                   const Element *dy, double *work, Element *dx, float *dgain, float *dbias,
                   float *dscale, float *dshift, long rows, long positions, long channels,
                   long groups, float eps, int silu) {
    Shape k = {rows, positions, channels, groups, eps};
    long size = positions * channels, width = channels / groups;
    double *da = work, *db = da + channels;
    float *part = (float *)(db + channels), *ds = part + 2 * channels, *dq = ds + channels;
    float *centre = dq + channels, *dm = centre + 2 * channels;
    for (long row = 0; row < rows; row++, x += size, dy += size, dx += size) {
        for (long c = 0; c < channels; c++) centre[c] = mean[c / width];
        if (silu) gradient_sums(x, a, b, centre, dy, dm, da, db, part, k, 1);
        else gradient_sums(x, a, b, centre, dy, dm, da, db, part, k, 0);
        for (long g = 0; g < groups; g++) {
            double dr = 0.0, dmean = 0.0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                float s = scale ? 1.0f + scale[c] : 1.0f;
                dgain[c] += (float)(da[c] * r[g] * s);
                dbias[c] += (float)(db[c] * s);
                if (scale) {
                    dscale[c] = (float)(da[c] * r[g] * gain[c] + db[c] * bias[c]);
                    dshift[c] = (float)db[c];
                }
                dr += da[c] * gain[c] * s;
                dmean -= db[c] * r[g] * gain[c] * s;
            }
            double count = (double)width * positions, dvariance = -0.5 * dr * r[g] * r[g] * r[g];
            for (long c = g * width; c < (g + 1) * width; c++) {
                ds[c] = (float)(dmean / count);
                dq[c] = (float)(dvariance / count);
            }
        }
        gradient(x, a, centre, dm, ds, dq, dx, k);
        mean += groups, r += groups, a += channels, b += channels;
        if (scale) scale += channels, dscale += channels, dshift += channels;
    }
}
