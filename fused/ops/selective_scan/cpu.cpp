// The selective scan of one direction or two on a CPU, forward and backward.
//
// A vector holds one cache line of channels, a block. A thread takes a block of a clip through all tokens, a chunk at a time;
// up to NB states of each channel are in registers while it goes through a chunk. Tokens are numbered in the order of the scan.

namespace scan {

constexpr Int CHUNK = 32;  // tokens whose states the backward holds at once
constexpr Int PART = 4;    // blocks whose shares of the gradients of B and C are summed lane by lane before they are stored
constexpr Int NB = 8;      // states of a channel that are in registers together

// All members of these structs have 8 bytes: Python packs them as words. Strides are in elements; those of channels and states
// are 1.
//
// delta is (B, L, E) or, with dt_rank R, the product of dt (B, L, R), which has its place and strides, and dt_proj.
template <class T> struct Direction {
    const T *u, *delta, *A, *B, *C, *D, *bias, *dt_proj;  // A (E, N) and dt_proj (E, R) contiguous; D and bias may be null
    Int u_clip, u_token, delta_clip, delta_token, B_clip, B_token, B_group, C_clip, C_token, C_group, reverse;
};

template <class T> struct Scan {
    Int directions, clips, tokens, channels, states, groups, dt_rank, softplus, A_is_log, threads;
    const T* z;
    Int z_clip, z_token;
    const T* initial;   // (B, E, N) of the only direction, or null
    T *y, *pre_gate;    // (B, L, E); pre_gate is null unless kept, or without z
    T *final, *chunks;  // (K, B, E, N), and the states that enter the chunks, or null
    Direction<T> direction[2];
};

template <class T> struct Gradients {
    Int dy_clip, dy_token;
    const T *dy, *dfinal;  // either may be null
    T *du[2], *ddelta[2];  // (B, L, E)
    T *dB[2], *dC[2];      // (B, L, G, N) with the strides below
    Int B_clip, B_token, B_group;
    T *dA[2], *dD[2], *dbias[2], *dz, *dinitial;  // all but dA may be null
    Int dz_clip, dz_token;
    T* parts;    // (parts, K, B, L, 2N): shares of the gradients of B and C
    T* by_clip;  // (B, K, E, N + 2): shares of the gradients of A, D and bias
};

// The blocks of the channels: none crosses a group.
struct Blocks {
    Int width, of_group, parts_of_group;
    Blocks(Int channels, Int groups, Int lanes)
        : width(channels / groups), of_group((width + lanes - 1) / lanes), parts_of_group((of_group + PART - 1) / PART) {}
};

template <class T> struct Block {
    Int group, first, count;  // channels
    Block(const Blocks& blocks, Int group, Int number)
        : group(group), first(group * blocks.width + number * LANES<T>),
          count(blocks.width - number * LANES<T> < LANES<T> ? blocks.width - number * LANES<T> : LANES<T>) {}
};

// A * log2(e) of a block, a vector for each state
template <class T> inline void load_A(const Scan<T>& s, const Direction<T>& d, const Block<T>& block, Vector<T>* A) {
    const Int N = s.states;
    for (Int n = 0; n < N; ++n) {
        Vector<T> a = {};
        for (Int i = 0; i < block.count; ++i) a[i] = d.A[(block.first + i) * N + n];
        if (s.A_is_log) a = -exp(a);
        for (Int i = 0; i < LANES<T>; ++i) a[i] = T(double(a[i]) * 0x1.71547652b82fep+0);
        A[n] = a;
    }
}

template <class T> inline void load_states(const T* from, const Block<T>& block, Int N, Vector<T>* h) {
    for (Int n = 0; n < N; ++n) {
        Vector<T> x = {};
        if (from)
            for (Int i = 0; i < block.count; ++i) x[i] = from[(block.first + i) * N + n];
        h[n] = x;
    }
}

template <class T> inline void store_states(T* to, const Block<T>& block, Int N, const Vector<T>* h) {
    for (Int n = 0; n < N; ++n)
        for (Int i = 0; i < block.count; ++i) to[(block.first + i) * N + n] = h[n][i];
}

// dt_proj of a block, a vector for each of the R columns
template <class T> inline void load_dt_proj(const Scan<T>& s, const Direction<T>& d, const Block<T>& block, Vector<T>* dt_proj) {
    const Int R = s.dt_rank;
    for (Int r = 0; r < R; ++r) {
        Vector<T> x = {};
        for (Int i = 0; i < block.count; ++i) x[i] = d.dt_proj[(block.first + i) * R + r];
        dt_proj[r] = x;
    }
}

// A chunk of one block: its tokens, and what has a value for each of them
template <class T> struct Chunk {
    Vector<T> *u, *raw, *delta, *du, *y;
    const T *B, *C;
    Int first, count, step_B, step_C;
    explicit Chunk(Scratch& scratch)
        : u(scratch.take<Vector<T>>(CHUNK)), raw(scratch.take<Vector<T>>(CHUNK)), delta(scratch.take<Vector<T>>(CHUNK)),
          du(scratch.take<Vector<T>>(CHUNK)), y(scratch.take<Vector<T>>(CHUNK)) {}
    static constexpr Int BYTES = 5 * CHUNK * VECTOR_BYTES;

    void read(const Scan<T>& s, const Direction<T>& d, const Block<T>& block, const Vector<T>* dt_proj, Int clip, Int number) {
        first = number * CHUNK;
        count = s.tokens - first < CHUNK ? s.tokens - first : CHUNK;
        const Int token = d.reverse ? s.tokens - 1 - first : first, sign = d.reverse ? -1 : 1;
        B = d.B + clip * d.B_clip + token * d.B_token + block.group * d.B_group;
        C = d.C + clip * d.C_clip + token * d.C_token + block.group * d.C_group;
        step_B = sign * d.B_token, step_C = sign * d.C_token;
        const T* u_in = d.u + clip * d.u_clip + token * d.u_token + block.first;
        const T* delta_in = d.delta + clip * d.delta_clip + token * d.delta_token + (s.dt_rank ? 0 : block.first);
        const Vector<T> D = d.D ? load(d.D + block.first, block.count) : Vector<T>{};
        const Vector<T> bias = d.bias ? load(d.bias + block.first, block.count) : Vector<T>{};
        for (Int t = 0; t < count; ++t) {
            u[t] = load(u_in + sign * t * d.u_token, block.count);
            raw[t] = bias;
            const T* delta_or_dt = delta_in + sign * t * d.delta_token;
            if (!s.dt_rank) raw[t] += load(delta_or_dt, block.count);
            for (Int r = 0; r < s.dt_rank; ++r) raw[t] += dt_proj[r] * delta_or_dt[r];
            delta[t] = s.softplus ? softplus(raw[t]) : raw[t];
            du[t] = delta[t] * u[t];
            y[t] = d.D ? D * u[t] : Vector<T>{};
        }
    }
};

// Take n states of a chunk's channels through its tokens, and add what they give to y.
template <class T, Int n> inline void advance(const Chunk<T>& c, const Vector<T>* A, Vector<T>* states, Int first) {
    Vector<T> h[n];
    for (Int i = 0; i < n; ++i) h[i] = states[first + i];
    const T *B = c.B + first, *C = c.C + first;
    for (Int t = 0; t < c.count; ++t, B += c.step_B, C += c.step_C) {
        const Vector<T> delta = c.delta[t], du = c.du[t];
        Vector<T> y = {}, y2 = c.y[t];
        for (Int i = 0; i < n; ++i) {
            h[i] = exp2(delta * A[first + i]) * h[i] + du * B[i];
            if (i % 2) y2 += h[i] * C[i];
            else y += h[i] * C[i];
        }
        c.y[t] = y + y2;
    }
    for (Int i = 0; i < n; ++i) states[first + i] = h[i];
}

// The same for all states
template <class T> inline void advance_all(const Chunk<T>& c, const Vector<T>* A, Vector<T>* states, Int N) {
    Int n = 0;
    for (; n + NB <= N; n += NB) advance<T, NB>(c, A, states, n);
    if (N - n >= 4) advance<T, 4>(c, A, states, n), n += 4;
    if (N - n >= 2) advance<T, 2>(c, A, states, n), n += 2;
    if (N - n) advance<T, 1>(c, A, states, n);
}

template <class T> void forward(const Scan<T>& s) {
    const Int N = s.states, E = s.channels, L = s.tokens, chunks = (L + CHUNK - 1) / CHUNK;
    const Blocks blocks(E, s.groups, LANES<T>);
    const Int of_clip = blocks.of_group * s.groups;
    const Int bytes = Chunk<T>::BYTES + (2 * N + s.dt_rank) * VECTOR_BYTES;
    for_each_item(s.clips * of_clip, s.threads, bytes, [&](Int item, Scratch scratch) {
        const Int clip = item / of_clip, number = item % of_clip;
        const Block<T> block(blocks, number / blocks.of_group, number % blocks.of_group);
        Chunk<T> c(scratch);
        Vector<T>*A = scratch.take<Vector<T>>(N), *h = scratch.take<Vector<T>>(N), *dt_proj = scratch.take<Vector<T>>(s.dt_rank);
        T* y = s.y + clip * L * E + block.first;
        for (Int k = 0; k < s.directions; ++k) {
            const Direction<T>& d = s.direction[k];
            const bool last = k + 1 == s.directions;
            load_A(s, d, block, A);
            load_dt_proj(s, d, block, dt_proj);
            load_states(s.initial ? s.initial + clip * E * N : nullptr, block, N, h);
            for (Int number_of_chunk = 0; number_of_chunk < chunks; ++number_of_chunk) {
                if (s.chunks) {
                    T* kept = s.chunks + (((k * s.clips * of_clip + item) * chunks + number_of_chunk) * N) * LANES<T>;
                    for (Int n = 0; n < N; ++n) store(kept + n * LANES<T>, h[n]);
                }
                c.read(s, d, block, dt_proj, clip, number_of_chunk);
                advance_all(c, A, h, N);
                for (Int t = 0; t < c.count; ++t) {
                    const Int token = d.reverse ? L - 1 - c.first - t : c.first + t;
                    Vector<T> value = c.y[t];
                    if (k) value += load(y + token * E, block.count);
                    if (last && s.z) {
                        if (s.pre_gate) store(s.pre_gate + (clip * L + token) * E + block.first, value, block.count);
                        const Vector<T> z = load(s.z + clip * s.z_clip + token * s.z_token + block.first, block.count);
                        value *= z * sigmoid<T>(z);
                    }
                    store(y + token * E, value, block.count);
                }
            }
            store_states(s.final + (k * s.clips + clip) * E * N, block, N, h);
        }
    });
}

// What the backward of a block goes through the chunks with
template <class T> struct Carry {
    Vector<T> *A, *dt_proj, *h, *g;  // g: the gradient of the state before the chunk
    double *dA, *dD, *dbias;  // sums over chunks, in float64: (N, lanes), (lanes), (lanes)
};

// What a chunk of a block needs beside its inputs
template <class T> struct ChunkGradients {
    Vector<T> *dy, *ddelta, *ddu;   // for each token; ddu of delta * u
    Vector<T> *decays, *states;     // (CHUNK, NB), (1 + CHUNK, NB)
    Vector<T>* dB_dC;               // (CHUNK, 2N), sums over the blocks of a part
    explicit ChunkGradients(Scratch& scratch, Int N)
        : dy(scratch.take<Vector<T>>(CHUNK)), ddelta(scratch.take<Vector<T>>(CHUNK)), ddu(scratch.take<Vector<T>>(CHUNK)),
          decays(scratch.take<Vector<T>>(CHUNK * NB)), states(scratch.take<Vector<T>>((1 + CHUNK) * NB)),
          dB_dC(scratch.take<Vector<T>>(CHUNK * 2 * N)) {}
    static Int bytes(Int N) { return (3 * CHUNK + (1 + 2 * CHUNK) * NB + 2 * CHUNK * N) * VECTOR_BYTES; }
};

// Compute the states of a chunk again, and take the gradients of n of them back through its tokens.
template <class T, Int n>
inline void retreat(const Chunk<T>& c, const ChunkGradients<T>& g, const Carry<T>& carry, Int first, Int N) {
    Vector<T> h[n], dA[n] = {};
    for (Int i = 0; i < n; ++i) g.states[i] = h[i] = carry.h[first + i];
    const T *B = c.B + first, *C = c.C + first;
    for (Int t = 0; t < c.count; ++t, B += c.step_B)
        for (Int i = 0; i < n; ++i) {
            const Vector<T> decay = exp2(c.delta[t] * carry.A[first + i]);
            g.decays[t * n + i] = decay;
            g.states[(1 + t) * n + i] = h[i] = decay * h[i] + c.du[t] * B[i];
        }
    for (Int i = 0; i < n; ++i) h[i] = carry.g[first + i];
    C += c.count * c.step_C;
    for (Int t = c.count - 1; t >= 0; --t) {
        B -= c.step_B, C -= c.step_C;
        const Vector<T> dy = g.dy[t], delta = c.delta[t], du = c.du[t];
        Vector<T> ddu = {}, ddelta = {}, *dB = g.dB_dC + t * 2 * N + first, *dC = dB + N;
        for (Int i = 0; i < n; ++i) {
            dC[i] += dy * g.states[(1 + t) * n + i];
            h[i] += dy * C[i];  // the gradient of the state after the token
            dB[i] += h[i] * du;
            ddu += h[i] * B[i];
            h[i] *= g.decays[t * n + i];
            const Vector<T> exponent = h[i] * g.states[t * n + i];  // the gradient of delta * A
            ddelta += exponent * carry.A[first + i];
            dA[i] += exponent * delta;
        }
        g.ddu[t] += ddu;
        g.ddelta[t] += ddelta;
    }
    for (Int i = 0; i < n; ++i) {
        carry.g[first + i] = h[i];
        for (Int lane = 0; lane < LANES<T>; ++lane) carry.dA[(first + i) * LANES<T> + lane] += dA[i][lane];
    }
}

template <class T>
inline void retreat_all(const Chunk<T>& c, const ChunkGradients<T>& g, const Carry<T>& carry, Int N) {
    Int n = 0;
    for (; n + NB <= N; n += NB) retreat<T, NB>(c, g, carry, n, N);
    if (N - n >= 4) retreat<T, 4>(c, g, carry, n, N), n += 4;
    if (N - n >= 2) retreat<T, 2>(c, g, carry, n, N), n += 2;
    if (N - n) retreat<T, 1>(c, g, carry, n, N);
}

// Read the gradient of a chunk's y before its gate; the direction that `writes_dz` writes that of z.
template <class T>
inline void read_dy(const Scan<T>& s, const Gradients<T>& g, const Chunk<T>& c, const Direction<T>& d, const Block<T>& block,
                    Int clip, bool writes_dz, Vector<T>* dy) {
    for (Int t = 0; t < c.count; ++t) {
        const Int token = d.reverse ? s.tokens - 1 - c.first - t : c.first + t;
        Vector<T> x = g.dy ? load(g.dy + clip * g.dy_clip + token * g.dy_token + block.first, block.count) : Vector<T>{};
        if (s.z) {
            const Vector<T> z = load(s.z + clip * s.z_clip + token * s.z_token + block.first, block.count), gate = sigmoid<T>(z);
            if (writes_dz) {
                const Vector<T> y = load(s.pre_gate + (clip * s.tokens + token) * s.channels + block.first, block.count);
                T* dz = g.dz + clip * g.dz_clip + token * g.dz_token + block.first;
                store(dz, x * y * silu_slope<T>(z, gate), block.count);
            }
            x *= z * gate;
        }
        dy[t] = x;
    }
}

// Write the gradients of u and delta of a chunk, and add up those of D and bias.
template <class T>
inline void write_tokens(const Scan<T>& s, const Gradients<T>& g, const Chunk<T>& c, const ChunkGradients<T>& cg,
                         const Direction<T>& d, Int k, const Block<T>& block, Int clip, const Carry<T>& carry) {
    const Vector<T> D = d.D ? load(d.D + block.first, block.count) : Vector<T>{};
    Vector<T> dD = {}, dbias = {};
    for (Int t = 0; t < c.count; ++t) {
        const Int token = d.reverse ? s.tokens - 1 - c.first - t : c.first + t;
        const Int place = (clip * s.tokens + token) * s.channels + block.first;
        Vector<T> ddelta = cg.ddelta[t] * T(0x1.62e42fefa39efp-1) + cg.ddu[t] * c.u[t];
        if (s.softplus) ddelta *= softplus_slope<T>(c.raw[t]);
        dbias += ddelta;
        Vector<T> du = cg.ddu[t] * c.delta[t];
        if (d.D) {
            du += D * cg.dy[t];
            dD += c.u[t] * cg.dy[t];
        }
        store(g.du[k] + place, du, block.count);
        store(g.ddelta[k] + place, ddelta, block.count);
    }
    for (Int lane = 0; lane < LANES<T>; ++lane) carry.dD[lane] += dD[lane], carry.dbias[lane] += dbias[lane];
}

// The shares of the parts of the channels: gradients of all tokens, and sums over them for every part and clip.
template <class T> void backward_parts(const Scan<T>& s, const Gradients<T>& g) {
    const Int N = s.states, E = s.channels, L = s.tokens, K = s.directions, chunks = (L + CHUNK - 1) / CHUNK;
    const Blocks blocks(E, s.groups, LANES<T>);
    const Int of_clip = blocks.of_group * s.groups, parts = blocks.parts_of_group * s.groups;
    const Int bytes = Chunk<T>::BYTES + ChunkGradients<T>::bytes(N) + PART * ((3 * N + s.dt_rank) * VECTOR_BYTES + (N + 2) * LANES<T> * 8);
    for_each_item(s.clips * parts * K, s.threads, bytes, [&](Int item, Scratch scratch) {
        const Int k = item % K, part = item / K % parts, clip = item / K / parts;
        const Direction<T>& d = s.direction[k];
        const Int group = part / blocks.parts_of_group, first_block = part % blocks.parts_of_group * PART;
        const Int num_blocks = blocks.of_group - first_block < PART ? blocks.of_group - first_block : PART;
        Chunk<T> c(scratch);
        ChunkGradients<T> cg(scratch, N);
        Carry<T> carries[PART];
        for (Int i = 0; i < num_blocks; ++i) {
            Carry<T>& carry = carries[i];
            const Block<T> block(blocks, group, first_block + i);
            carry.A = scratch.take<Vector<T>>(N), carry.h = scratch.take<Vector<T>>(N), carry.g = scratch.take<Vector<T>>(N);
            carry.dt_proj = scratch.take<Vector<T>>(s.dt_rank);
            carry.dA = scratch.take<double>((N + 2) * LANES<T>);
            carry.dD = carry.dA + N * LANES<T>, carry.dbias = carry.dD + LANES<T>;
            std::memset(carry.dA, 0, (N + 2) * LANES<T> * 8);
            load_A(s, d, block, carry.A);
            load_dt_proj(s, d, block, carry.dt_proj);
            load_states(g.dfinal ? g.dfinal + (k * s.clips + clip) * E * N : nullptr, block, N, carry.g);
        }
        for (Int number = chunks - 1; number >= 0; --number) {
            std::memset(cg.dB_dC, 0, CHUNK * 2 * N * VECTOR_BYTES);
            for (Int i = num_blocks - 1; i >= 0; --i) {
                const Block<T> block(blocks, group, first_block + i);
                const Carry<T>& carry = carries[i];
                const Int kept = (k * s.clips + clip) * of_clip + group * blocks.of_group + first_block + i;
                std::memcpy(carry.h, s.chunks + (kept * chunks + number) * N * LANES<T>, N * VECTOR_BYTES);
                c.read(s, d, block, carry.dt_proj, clip, number);
                read_dy(s, g, c, d, block, clip, k == 0, cg.dy);
                std::memset(cg.ddelta, 0, CHUNK * VECTOR_BYTES), std::memset(cg.ddu, 0, CHUNK * VECTOR_BYTES);
                retreat_all(c, cg, carry, N);
                write_tokens(s, g, c, cg, d, k, block, clip, carry);
                if (block.count < LANES<T>)  // the last block comes first: what its lanes without a channel hold is dropped
                    for (Int j = 0; j < 2 * c.count * N; ++j) cg.dB_dC[j] = load<T>(&cg.dB_dC[j][0], block.count);
            }
            sum_rows<T>(cg.dB_dC, c.count * 2 * N, g.parts + (((part * K + k) * s.clips + clip) * L + c.first) * 2 * N);
        }
        for (Int i = 0; i < num_blocks; ++i) {
            const Block<T> block(blocks, group, first_block + i);
            const Carry<T>& carry = carries[i];
            for (Int lane = 0; lane < block.count; ++lane) {
                T* shares = g.by_clip + ((clip * K + k) * E + block.first + lane) * (N + 2);
                for (Int n = 0; n < N + 2; ++n) shares[n] = T(carry.dA[n * LANES<T> + lane]);
            }
            if (g.dinitial) store_states(g.dinitial + clip * E * N, block, N, carry.g);
        }
    });
}

template <class T> void backward(const Scan<T>& s, const Gradients<T>& g) {
    const Int N = s.states, E = s.channels, L = s.tokens, K = s.directions, G = s.groups;
    backward_parts(s, g);
    const Blocks blocks(E, G, LANES<T>);
    const Int stride = K * s.clips * L * 2 * N;  // of parts
    for_each_item(K * s.clips, s.threads, 0, [&](Int item, Scratch) {
        const Int k = item / s.clips, clip = item % s.clips;
        for (Int t = 0; t < L; ++t)
            for (Int group = 0; group < G; ++group) {
                const Int token = s.direction[k].reverse ? L - 1 - t : t;
                const T* shares = g.parts + group * blocks.parts_of_group * stride + (item * L + t) * 2 * N;
                const Int place = clip * g.B_clip + token * g.B_token + group * g.B_group;
                for (Int n = 0; n < 2 * N; ++n) {
                    T x = 0;
                    for (Int part = 0; part < blocks.parts_of_group; ++part) x += shares[part * stride + n];
                    (n < N ? g.dB[k] + place : g.dC[k] + place - N)[n] = x;
                }
            }
    });
    for_each_item(K, s.threads, 0, [&](Int k, Scratch) {
        for (Int e = 0; e < E; ++e)
            for (Int n = 0; n < N + 2; ++n) {
                double x = 0;
                for (Int clip = 0; clip < s.clips; ++clip) x += g.by_clip[((clip * K + k) * E + e) * (N + 2) + n];
                if (n < N) g.dA[k][e * N + n] = T(s.A_is_log ? -x * std::exp(double(s.direction[k].A[e * N + n])) : x);
                else if (n == N && g.dD[k]) g.dD[k][e] = T(x);
                else if (n > N && g.dbias[k]) g.dbias[k][e] = T(x);
            }
    });
}

}  // namespace scan

extern "C" {
void scan_forward_float(const scan::Scan<float>* s) { scan::forward(*s); }
void scan_forward_double(const scan::Scan<double>* s) { scan::forward(*s); }
void scan_backward_float(const scan::Scan<float>* s, const scan::Gradients<float>* g) { scan::backward(*s, *g); }
void scan_backward_double(const scan::Scan<double>* s, const scan::Gradients<double>* g) { scan::backward(*s, *g); }
}
