// The selective scan of one direction or two on a CPU, forward and backward.
//
// A vector holds one cache line of channels, a block. A thread takes a block of a clip through all tokens, a chunk at a time;
// up to NB states of each channel are in registers while it goes through a chunk. Tokens are numbered in the order of the scan.

namespace scan {

constexpr Int CHUNK = 32;  // tokens whose states the backward holds at once
constexpr Int PART = 6;    // blocks whose shares of the gradients of B and C are summed lane by lane before they are stored
constexpr Int NB = 4;      // states of a channel that are in registers together

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
    T *final, *chunks;  // (K, B, E, N), and the states that enter the chunks; either may be null
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
    T *ddt[2], *d_dt_proj[2];  // with dt_rank: (B, L, R), of the strides of dt, and (E, R)
    T* parts;                  // (parts, K, B, L, 2N): shares of the gradients of B and C
    T* by_clip;                // (B, K, E, N + 2 + R): sums of a clip for the gradients of A, D, bias and dt_proj
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
            if (s.final) store_states(s.final + (k * s.clips + clip) * E * N, block, N, h);
        }
    });
}

// What the backward of a block goes through the chunks with
template <class T> struct Carry {
    Vector<T> *A, *dt_proj, *h, *g;  // g: the gradient of the state before the chunk
    double *dA, *dD, *dbias, *d_dt_proj;  // sums over chunks: (N, lanes), (lanes), (lanes), (R, lanes)
};

// What a chunk of a block needs beside its inputs
template <class T> struct ChunkGradients {
    Vector<T> *dy, *ddelta, *ddu;   // for each token; ddu of delta * u
    Vector<T> *decays, *states;     // (CHUNK, NB), (1 + CHUNK, NB)
    Vector<T>* dB_dC;               // (CHUNK, 2N), sums over the blocks of a part
    Vector<T>* d_dt_proj;           // (R), sums over the tokens
    ChunkGradients(Scratch& scratch, Int N, Int R)
        : dy(scratch.take<Vector<T>>(CHUNK)), ddelta(scratch.take<Vector<T>>(CHUNK)), ddu(scratch.take<Vector<T>>(CHUNK)),
          decays(scratch.take<Vector<T>>(CHUNK * NB)), states(scratch.take<Vector<T>>((1 + CHUNK) * NB)),
          dB_dC(scratch.take<Vector<T>>(CHUNK * 2 * N)), d_dt_proj(scratch.take<Vector<T>>(R)) {}
    static Int bytes(Int N, Int R) { return (3 * CHUNK + (1 + 2 * CHUNK) * NB + 2 * CHUNK * N + R) * VECTOR_BYTES; }
};

// Compute the states of a chunk again, and take the gradients of n of them back through its tokens.
template <class T, Int n>
inline void retreat(const Chunk<T>& c, const ChunkGradients<T>& g, const Carry<T>& carry, Int first, Int N) {
    Vector<T> h[n], dA[n] = {}, A[n], *decays = g.decays, *states = g.states, *dB = g.dB_dC + first;
    for (Int i = 0; i < n; ++i) A[i] = carry.A[first + i], states[i] = h[i] = carry.h[first + i];
    const T *B = c.B + first, *C = c.C + first;
    for (Int t = 0; t < c.count; ++t, B += c.step_B, decays += n, states += n)
        for (Int i = 0; i < n; ++i) {
            decays[i] = exp2(c.delta[t] * A[i]);
            states[n + i] = h[i] = decays[i] * h[i] + c.du[t] * B[i];
        }
    for (Int i = 0; i < n; ++i) h[i] = carry.g[first + i];
    C += c.count * c.step_C, dB += c.count * 2 * N;
    for (Int t = c.count - 1; t >= 0; --t) {
        B -= c.step_B, C -= c.step_C, decays -= n, states -= n, dB -= 2 * N;  // states: before the token
        const Vector<T> dy = g.dy[t], delta = c.delta[t], du = c.du[t];
        Vector<T> ddu = {}, ddelta = {};
        for (Int i = 0; i < n; ++i) {
            dB[N + i] += dy * states[n + i];  // of C
            h[i] += dy * C[i];                // the gradient of the state after the token
            dB[i] += h[i] * du;
            ddu += h[i] * B[i];
            h[i] *= decays[i];
            const Vector<T> exponent = h[i] * states[i];  // the gradient of delta * A
            ddelta += exponent * A[i];
            dA[i] += exponent * delta;
        }
        g.ddu[t] += ddu;
        g.ddelta[t] += ddelta;
    }
    for (Int i = 0; i < n; ++i) {
        carry.g[first + i] = h[i];
    }
    add_up<T>(carry.dA + first * LANES<T>, dA, n);
}

template <class T>
inline void retreat_all(const Chunk<T>& c, const ChunkGradients<T>& g, const Carry<T>& carry, Int N) {
    Int n = 0;
    for (; n + NB <= N; n += NB) retreat<T, NB>(c, g, carry, n, N);
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

// Write the gradients of u and delta of a chunk, and add up those of D, bias and dt_proj.
template <class T>
inline void write_tokens(const Scan<T>& s, const Gradients<T>& g, const Chunk<T>& c, const ChunkGradients<T>& cg,
                         const Direction<T>& d, Int k, const Block<T>& block, Int clip, const Carry<T>& carry) {
    const Vector<T> D = d.D ? load(d.D + block.first, block.count) : Vector<T>{};
    const Int R = s.dt_rank;
    Vector<T> dD = {}, dbias = {};
    std::memset(cg.d_dt_proj, 0, R * VECTOR_BYTES);
    for (Int t = 0; t < c.count; ++t) {
        const Int token = d.reverse ? s.tokens - 1 - c.first - t : c.first + t;
        const T* dt = d.delta + clip * d.delta_clip + token * d.delta_token;
        const Int place = (clip * s.tokens + token) * s.channels + block.first;
        Vector<T> ddelta = cg.ddelta[t] * T(0x1.62e42fefa39efp-1) + cg.ddu[t] * c.u[t];
        if (s.softplus) ddelta *= softplus_slope<T>(c.raw[t]);
        dbias += ddelta;
        for (Int r = 0; r < R; ++r) cg.d_dt_proj[r] += ddelta * dt[r];
        Vector<T> du = cg.ddu[t] * c.delta[t];
        if (d.D) {
            du += D * cg.dy[t];
            dD += c.u[t] * cg.dy[t];
        }
        store(g.du[k] + place, du, block.count);
        store(g.ddelta[k] + place, ddelta, block.count);
    }
    add_up<T>(carry.dD, &dD, 1);
    add_up<T>(carry.dbias, &dbias, 1);
    add_up<T>(carry.d_dt_proj, cg.d_dt_proj, R);
}

// Write the sums of a channel over its tokens: of A, D, bias and dt_proj.
template <class T> inline void write_sums(const Scan<T>& s, const Gradients<T>& g, Int k, Int channel, const T* sums) {
    const Int N = s.states, R = s.dt_rank;
    T* dA = g.dA[k] + channel * N;
    const T* A = s.direction[k].A + channel * N;
    for (Int n = 0; n < N; ++n) dA[n] = s.A_is_log ? -sums[n] * std::exp(A[n]) : sums[n];
    if (g.dD[k]) g.dD[k][channel] = sums[N];
    if (g.dbias[k]) g.dbias[k][channel] = sums[N + 1];
    if (R) std::memcpy(g.d_dt_proj[k] + channel * R, sums + N + 2, R * sizeof(T));
}

// The shares of the parts of the channels: gradients of all tokens, and sums over them for every part and clip.
template <class T> void backward_parts(const Scan<T>& s, const Gradients<T>& g) {
    const Int N = s.states, E = s.channels, L = s.tokens, K = s.directions, chunks = (L + CHUNK - 1) / CHUNK;
    const Blocks blocks(E, s.groups, LANES<T>);
    const Int of_clip = blocks.of_group * s.groups, parts = blocks.parts_of_group * s.groups;
    const Int R = s.dt_rank, num_sums = N + 2 + R;
    const Int of_block = (3 * N + R) * VECTOR_BYTES + num_sums * LANES<T> * 8;
    const Int bytes = Chunk<T>::BYTES + ChunkGradients<T>::bytes(N, R) + PART * of_block;
    for_each_item(s.clips * parts * K, s.threads, bytes, [&](Int item, Scratch scratch) {
        const Int k = item % K, part = item / K % parts, clip = item / K / parts;
        const Direction<T>& d = s.direction[k];
        const Int group = part / blocks.parts_of_group, first_block = part % blocks.parts_of_group * PART;
        const Int num_blocks = blocks.of_group - first_block < PART ? blocks.of_group - first_block : PART;
        Chunk<T> c(scratch);
        ChunkGradients<T> cg(scratch, N, R);
        Carry<T> carries[PART];
        for (Int i = 0; i < num_blocks; ++i) {
            Carry<T>& carry = carries[i];
            const Block<T> block(blocks, group, first_block + i);
            carry.A = scratch.take<Vector<T>>(N), carry.h = scratch.take<Vector<T>>(N), carry.g = scratch.take<Vector<T>>(N);
            carry.dt_proj = scratch.take<Vector<T>>(R);
            carry.dA = scratch.take<double>(num_sums * LANES<T>);
            carry.dD = carry.dA + N * LANES<T>, carry.dbias = carry.dD + LANES<T>, carry.d_dt_proj = carry.dbias + LANES<T>;
            std::memset(carry.dA, 0, num_sums * LANES<T> * 8);
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
                    for (Int j = 0; j < 2 * c.count * N; ++j) cg.dB_dC[j] = first_lanes<T>(cg.dB_dC[j], block.count);
            }
            sum_rows<T>(cg.dB_dC, c.count * 2 * N, g.parts + (((part * K + k) * s.clips + clip) * L + c.first) * 2 * N);
        }
        for (Int i = 0; i < num_blocks; ++i) {
            const Block<T> block(blocks, group, first_block + i);
            const Carry<T>& carry = carries[i];
            for (Int lane = 0; lane < block.count; ++lane) {
                T* sums = g.by_clip + ((clip * K + k) * E + block.first + lane) * num_sums;
                for (Int i = 0; i < num_sums; ++i) sums[i] = T(carry.dA[i * LANES<T> + lane]);
                if (s.clips == 1) write_sums(s, g, k, block.first + lane, sums);
            }
            if (g.dinitial) store_states(g.dinitial + clip * E * N, block, N, carry.g);
        }
    });
}

// The gradients of B and C of tokens from `first` to `last`, in memory's order: the sums of all parts
template <class T> inline void sum_parts(const Scan<T>& s, const Gradients<T>& g, Int k, Int clip, Int first, Int last) {
    const Int N = s.states, L = s.tokens, parts = Blocks(s.channels, s.groups, LANES<T>).parts_of_group;
    const Int of_part = s.directions * s.clips * L * 2 * N;
    for (Int token = first; token < last; ++token)
        for (Int group = 0; group < s.groups; ++group) {
            const Int t = s.direction[k].reverse ? L - 1 - token : token;
            const T* shares = g.parts + group * parts * of_part + ((k * s.clips + clip) * L + t) * 2 * N;
            const Int place = clip * g.B_clip + token * g.B_token + group * g.B_group;
            for (Int n = 0; n < 2 * N; ++n) {
                T x = 0;
                for (Int part = 0; part < parts; ++part) x += shares[part * of_part + n];
                (n < N ? g.dB[k] + place : g.dC[k] + place - N)[n] = x;
            }
        }
}

// The gradients of dt of tokens from `first` to `last`: those of delta times dt_proj, for four tokens and one vector of R at a time
template <class T>
inline void project_back(const Scan<T>& s, const Gradients<T>& g, Int k, Int clip, Int first, Int last, const Vector<T>* dt_proj) {
    const Int R = s.dt_rank, E = s.channels, vectors = (R + LANES<T> - 1) / LANES<T>;
    const T* ddelta = g.ddelta[k] + clip * s.tokens * E;
    T* ddt = g.ddt[k] + clip * s.direction[k].delta_clip;
    for (Int token = first; token < last; token += 4)
        for (Int v = 0; v < vectors; ++v) {
            Vector<T> x[4] = {};
            const T* rows[4];
            for (Int i = 0; i < 4; ++i) rows[i] = ddelta + (token + i < last ? token + i : last - 1) * E;
            for (Int e = 0; e < E; ++e)
                for (Int i = 0; i < 4; ++i) x[i] += dt_proj[e * vectors + v] * rows[i][e];
            const Int count = R - v * LANES<T> < LANES<T> ? R - v * LANES<T> : LANES<T>;
            for (Int i = 0; i < 4 && token + i < last; ++i)
                store(ddt + (token + i) * s.direction[k].delta_token + v * LANES<T>, x[i], count);
        }
}

template <class T> void backward(const Scan<T>& s, const Gradients<T>& g) {
    const Int E = s.channels, L = s.tokens, K = s.directions, R = s.dt_rank, num_sums = s.states + 2 + R;
    backward_parts(s, g);
    const Int tiles = (L + CHUNK - 1) / CHUNK, vectors = (R + LANES<T> - 1) / LANES<T>;
    for_each_item(K * s.clips * tiles, s.threads, E * vectors * VECTOR_BYTES, [&](Int item, Scratch scratch) {
        const Int k = item / tiles / s.clips, clip = item / tiles % s.clips, first = item % tiles * CHUNK;
        const Int last = first + CHUNK < L ? first + CHUNK : L;
        sum_parts(s, g, k, clip, first, last);
        Vector<T>* dt_proj = scratch.take<Vector<T>>(E * vectors);
        for (Int e = 0; e < E; ++e)
            for (Int v = 0; v < vectors; ++v) {
                const Int count = R - v * LANES<T> < LANES<T> ? R - v * LANES<T> : LANES<T>;
                dt_proj[e * vectors + v] = load(s.direction[k].dt_proj + e * R + v * LANES<T>, count);
            }
        if (R) project_back(s, g, k, clip, first, last, dt_proj);
    });
    if (s.clips == 1) return;
    for_each_item(K * E, s.threads, num_sums * sizeof(T), [&](Int item, Scratch scratch) {
        T* sums = scratch.take<T>(num_sums);
        for (Int i = 0; i < num_sums; ++i) {
            double x = 0;
            for (Int clip = 0; clip < s.clips; ++clip) x += g.by_clip[(clip * K * E + item) * num_sums + i];
            sums[i] = T(x);
        }
        write_sums(s, g, item / E, item % E, sums);
    });
}

}  // namespace scan

extern "C" {
void scan_forward_float(const scan::Scan<float>* s) { scan::forward(*s); }
void scan_forward_double(const scan::Scan<double>* s) { scan::forward(*s); }
void scan_backward_float(const scan::Scan<float>* s, const scan::Gradients<float>* g) { scan::backward(*s, *g); }
void scan_backward_double(const scan::Scan<double>* s, const scan::Gradients<double>* g) { scan::backward(*s, *g); }
}
