/** The noise of a seed, as `normal` in sample.py draws it: a seed has one picture everywhere. */

const MASK = (1n << 64n) - 1n;

// --- BLAKE2b (RFC 7693) of a text that is shorter than a block ------------------------------------

const INITIAL = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
/** For each round the words of the message, as hexadecimal digits. */
const ORDERS = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8",
  "905724afe1bc683d", "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a",
  "6fe9b308c2d714a5", "a2847615fb9e3cd0", "0123456789abcdef", "ea489fd61c02b753",
];
const COLUMNS = ["048c", "159d", "26ae", "37bf", "05af", "16bc", "278d", "349e"];
const DIGEST_WORDS = 2;

const digits = (text) => [...text].map((digit) => parseInt(digit, 16));
const rotated = (word, by) => (word >> by) | ((word << (64n - by)) & MASK);

/** The 128 bits of a text as two words. */
export function blake2b(text) {
  const bytes = new Uint8Array(128);
  const { written } = new TextEncoder().encodeInto(text, bytes);
  const message = new BigUint64Array(bytes.buffer);
  const state = INITIAL.with(0, INITIAL[0] ^ 0x01010000n ^ BigInt(8 * DIGEST_WORDS));
  const v = [...state, ...INITIAL];
  v[12] ^= BigInt(written);
  v[14] ^= MASK; // this block is the last one
  for (const order of ORDERS.map(digits)) {
    COLUMNS.map(digits).forEach(([a, b, c, d], column) => {
      for (const [word, first, second] of [[order[2 * column], 32n, 24n], [order[2 * column + 1], 16n, 63n]]) {
        v[a] = (v[a] + v[b] + message[word]) & MASK;
        v[d] = rotated(v[d] ^ v[a], first);
        v[c] = (v[c] + v[d]) & MASK;
        v[b] = rotated(v[b] ^ v[c], second);
      }
    });
  }
  return state.slice(0, DIGEST_WORDS).map((word, n) => word ^ v[n] ^ v[n + 8]);
}

// --- Philox 4x64 with ten rounds ------------------------------------------------------------------

const ROUNDS = 10;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const KEY_STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];

/** A block of four random words: a function of a key and a counter. */
function block(key, counter) {
  let [a, b, c, d] = counter;
  let [first, second] = key;
  for (let round = 0; round < ROUNDS; round++) {
    const [x, y] = [MULTIPLIERS[0] * a, MULTIPLIERS[1] * c];
    [a, b, c, d] = [(y >> 64n) ^ b ^ first, y & MASK, (x >> 64n) ^ d ^ second, x & MASK];
    first = (first + KEY_STEPS[0]) & MASK;
    second = (second + KEY_STEPS[1]) & MASK;
  }
  return [a, b, c, d];
}

// --- normal numbers -------------------------------------------------------------------------------

/** `count` normal numbers (Box and Muller, 1958) that a level of a seed's sample starts with. */
export function normal(seed, level, count) {
  const key = blake2b(`${seed}/sample start`);
  const half = Math.ceil(count / 16) * 8; // words, and pairs
  const words = new BigUint64Array(half);
  for (let at = 0; at < half; at += 4) {
    words.set(block(key, [BigInt(at / 4 + 1), 0n, BigInt(level), 0n]), at);
  }
  const integers = new Int32Array(words.buffer);
  const pairs = new Float32Array(2 * half);
  for (let n = 0; n < half; n++) {
    const radius = Math.sqrt(-2 * Math.log(((integers[n] & 0x7fffffff) + 0.5) * 2 ** -31));
    const angle = integers[half + n] * 2 * Math.PI * 2 ** -32;
    pairs[n] = radius * Math.cos(angle);
    pairs[half + n] = radius * Math.sin(angle);
  }
  return pairs.subarray(0, count);
}
