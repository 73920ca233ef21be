// The causal convolution of one direction or two on a CPU, with SiLU, forward and backward.
//
// A vector holds the channels of one cache line, a block. Tokens are numbered as they lie in memory. The token `reach(j)` places
// after another meets it with weight j: a direction that is not reversed reaches back. The forward also multiplies its results
// with a matrix, tile by tile, while they are in the cache.

namespace conv {

constexpr Int TILE = 16, BACKWARD_TILE = 64;  // tokens

template <class T> struct Direction {
    const T *weight, *bias;  // (E, W) contiguous; bias may be null
    const T* project;        // (rows, E) contiguous, or null
    T* rows;                 // (B, L, rows): the products of y and the transpose of `project`
    Int reverse;
};

// All members have 8 bytes: Python packs them as words.
template <class T> struct Conv {
    Int directions, clips, tokens, channels, width, rows, silu, threads;
    const T* x;  // (B, L, E)
    Int x_clip, x_token;
    const T* initial;  // (B, E, W-1) of the only direction, or null
    T* y;              // (K, B, L, E); not read in the backward
    Direction<T> direction[2];
};

template <class T> struct Gradients {
    const T *dy[2], *drows[2];  // (B, L, E), without what comes through the rows; (B, L, rows)
    T* dx;                      // (B, L, E)
    Int dx_clip, dx_token;
    T *dweight[2], *dbias[2], *dproject[2], *dinitial;  // (E, W), (E), (rows, E), (B, E, W-1); dbias and dinitial may be null
    T *by_clip, *rows_by_clip;  // (B, K, E, W + 1), (B, K, rows, E): sums of a clip
};

template <class T> struct Block {
    Int first, count;
    Block(const Conv<T>& c, Int number)
        : first(number * LANES<T>), count(c.channels - first < LANES<T> ? c.channels - first : LANES<T>) {}
};

template <class T> inline Int blocks_of(const Conv<T>& c) { return (c.channels + LANES<T> - 1) / LANES<T>; }

template <class T> inline Int reach(const Conv<T>& c, const Direction<T>& d, Int j) {
    return d.reverse ? c.width - 1 - j : j + 1 - c.width;
}

template <class T> inline void load_weights(const Conv<T>& c, const Direction<T>& d, const Block<T>& block, Vector<T>* w) {
    for (Int j = 0; j < c.width; ++j) {
        w[j] = Vector<T>{};
        for (Int i = 0; i < block.count; ++i) w[j][i] = d.weight[(block.first + i) * c.width + j];
    }
}

// x of `count` tokens from `first` on, which may lie outside of the sequence
template <class T> inline void read(const Conv<T>& c, const Block<T>& block, Int clip, Int first, Int count, Vector<T>* x) {
    for (Int t = 0; t < count; ++t) {
        const Int token = first + t, beyond = c.width - 1;
        if (token >= 0 && token < c.tokens)
            x[t] = load(c.x + clip * c.x_clip + token * c.x_token + block.first, block.count);
        else {
            x[t] = Vector<T>{};
            const Int place = token < 0 ? token + beyond : token - c.tokens;
            if (c.initial && place >= 0 && place < beyond && (token < 0) == !c.direction[0].reverse)
                for (Int i = 0; i < block.count; ++i)
                    x[t][i] = c.initial[(clip * c.channels + block.first + i) * beyond + place];
        }
    }
}

// The convolution before its SiLU of the token at x
template <class T, Int W>
inline Vector<T> before_silu(const Conv<T>& c, const Direction<T>& d, const Vector<T>* w, const Vector<T>& bias, const Vector<T>* x) {
    const Int width = W ? W : c.width;
    Vector<T> y = bias;
    for (Int j = 0; j < width; ++j) y += w[j] * x[d.reverse ? width - 1 - j : j + 1 - width];
    return y;
}

// Write the products of y (count, E) and the transpose of a matrix (rows, E): 4 by 4 sums over E at a time, each in the lanes of
// a vector. A row beyond the last is the last.
template <class T> inline void project(const T* y, Int count, const T* matrix, Int rows, Int E, T* out) {
    constexpr Int M = LANES<T> / 4;
    for (Int first = 0; first < count; first += M)
        for (Int row = 0; row < rows; row += 4) {
            Vector<T> products[M * 4] = {};
            const T *left[M], *right[4];
            for (Int i = 0; i < M; ++i) left[i] = y + (first + i < count ? first + i : count - 1) * E;
            for (Int j = 0; j < 4; ++j) right[j] = matrix + (row + j < rows ? row + j : rows - 1) * E;
            Int e = 0;
            for (; e + LANES<T> <= E; e += LANES<T>)
                for (Int i = 0; i < M; ++i)
                    for (Int j = 0; j < 4; ++j) products[i * 4 + j] += load(left[i] + e) * load(right[j] + e);
            if (e < E)
                for (Int i = 0; i < M; ++i)
                    for (Int j = 0; j < 4; ++j) products[i * 4 + j] += load(left[i] + e, E - e) * load(right[j] + e, E - e);
            const Vector<T> values = sums<T>(products);
            for (Int i = 0; i < M && first + i < count; ++i)
                for (Int j = 0; j < 4 && row + j < rows; ++j) out[(first + i) * rows + row + j] = values[i * 4 + j];
        }
}

template <class T, Int W> void forward(const Conv<T>& c) {
    const Int tiles = (c.tokens + TILE - 1) / TILE, beyond = c.width - 1, blocks = blocks_of(c);
    for_each_item(c.clips * tiles, c.threads, (TILE + 2 * beyond + c.width) * VECTOR_BYTES, [&](Int item, Scratch scratch) {
        const Int clip = item / tiles, first = item % tiles * TILE;
        const Int count = c.tokens - first < TILE ? c.tokens - first : TILE;
        Vector<T>*x = scratch.take<Vector<T>>(TILE + 2 * beyond), *w = scratch.take<Vector<T>>(c.width);
        for (Int number = 0; number < blocks; ++number) {
            const Block<T> block(c, number);
            read(c, block, clip, first - beyond, count + 2 * beyond, x);
            for (Int k = 0; k < c.directions; ++k) {
                const Direction<T>& d = c.direction[k];
                load_weights(c, d, block, w);
                const Vector<T> bias = d.bias ? load(d.bias + block.first, block.count) : Vector<T>{};
                T* y = c.y + ((k * c.clips + clip) * c.tokens + first) * c.channels + block.first;
                for (Int t = 0; t < count; ++t) {
                    Vector<T> value = before_silu<T, W>(c, d, w, bias, x + beyond + t);
                    if (c.silu) value *= sigmoid<T>(value);
                    store(y + t * c.channels, value, block.count);
                }
            }
        }
        for (Int k = 0; c.rows && k < c.directions; ++k) {
            const Int token = clip * c.tokens + first;
            const T* y = c.y + (k * c.clips * c.tokens + token) * c.channels;
            project(y, count, c.direction[k].project, c.rows, c.channels, c.direction[k].rows + token * c.rows);
        }
    });
}

// Write the sums of a channel over its tokens: of the W weights, and of bias.
template <class T> inline void write_sums(const Conv<T>& c, const Gradients<T>& g, Int k, Int channel, const T* sums) {
    std::memcpy(g.dweight[k] + channel * c.width, sums, c.width * sizeof(T));
    if (g.dbias[k]) g.dbias[k][channel] = sums[c.width];
}

// What goes through the tokens of a block in the backward
template <class T> struct Backward {
    Vector<T> *x, *w, *project;  // x of a tile and beyond; weights
    Vector<T> *dpre;             // for all tokens, with zeros beyond
    Vector<T> *sums;             // over a tile: of the W weights, bias, and the rows of `project`
    double* totals;              // over all tiles
    Backward(Scratch& scratch, const Conv<T>& c)
        : x(scratch.take<Vector<T>>(BACKWARD_TILE + 2 * (c.width - 1))), w(scratch.take<Vector<T>>(c.width)),
          project(scratch.take<Vector<T>>(c.rows)), dpre(scratch.take<Vector<T>>(c.tokens + 2 * (c.width - 1)) + c.width - 1),
          sums(scratch.take<Vector<T>>(num_sums(c))), totals(scratch.take<double>(num_sums(c) * LANES<T>)) {}
    static Int num_sums(const Conv<T>& c) { return c.width + 1 + c.rows; }
    static Int bytes(const Conv<T>& c) {
        const Int vectors = BACKWARD_TILE + c.tokens + 6 * c.width + 2 * c.rows - 3;
        return vectors * VECTOR_BYTES + num_sums(c) * LANES<T> * 8;
    }
};

// The gradients before SiLU of n tokens of one direction of a block, from token `t` of a tile on, whose first is `first`
template <class T, Int W, Int n>
inline void backward_tokens(const Conv<T>& c, const Gradients<T>& g, Int k, const Block<T>& block, Int clip, Int first, Int t,
                            const Vector<T>& bias, const Backward<T>& b) {
    const Int width = W ? W : c.width, token = clip * c.tokens + first + t;
    const Direction<T>& d = c.direction[k];
    const T *dy = g.dy[k] + token * c.channels + block.first, *drows = c.rows ? g.drows[k] + token * c.rows : nullptr;
    const Vector<T>* x = b.x + c.width - 1 + t;
    Vector<T>*dw = b.sums, *dproject = b.sums + width + 1, grads[n], y[n];
    for (Int i = 0; i < n; ++i) grads[i] = load(dy + i * c.channels, block.count);
    for (Int j = 0; j < c.rows; ++j)
        for (Int i = 0; i < n; ++i) grads[i] += b.project[j] * drows[i * c.rows + j];
    for (Int i = 0; i < n; ++i) {
        if (c.silu) {
            const Vector<T> pre = before_silu<T, W>(c, d, b.w, bias, x + i), gate = sigmoid<T>(pre);
            y[i] = pre * gate;
            grads[i] *= silu_slope<T>(pre, gate);
        }
        b.dpre[first + t + i] = grads[i];
        dw[width] += grads[i];
        for (Int j = 0; j < width; ++j) dw[j] += grads[i] * x[i + reach(c, d, j)];
    }
    for (Int j = 0; j < c.rows; ++j)
        for (Int i = 0; i < n; ++i) dproject[j] += y[i] * drows[i * c.rows + j];
}

template <class T, Int W> void backward(const Conv<T>& c, const Gradients<T>& g) {
    const Int L = c.tokens, E = c.channels, beyond = c.width - 1, blocks = blocks_of(c), K = c.directions;
    const Int width = W ? W : c.width, num_sums = Backward<T>::num_sums(c);
    for_each_item(c.clips * blocks, c.threads, Backward<T>::bytes(c), [&](Int item, Scratch scratch) {
        const Int clip = item / blocks;
        const Block<T> block(c, item % blocks);
        const Backward<T> b(scratch, c);
        for (Int k = 0; k < K; ++k) {
            const Direction<T>& d = c.direction[k];
            const Vector<T> bias = d.bias ? load(d.bias + block.first, block.count) : Vector<T>{};
            load_weights(c, d, block, b.w);
            for (Int j = 0; j < c.rows; ++j) b.project[j] = load(d.project + j * E + block.first, block.count);
            std::memset(b.totals, 0, num_sums * LANES<T> * 8);
            std::memset(b.dpre - beyond, 0, beyond * VECTOR_BYTES), std::memset(b.dpre + L, 0, beyond * VECTOR_BYTES);
            for (Int first = 0; first < L; first += BACKWARD_TILE) {
                const Int count = L - first < BACKWARD_TILE ? L - first : BACKWARD_TILE;
                read(c, block, clip, first - beyond, count + 2 * beyond, b.x);
                std::memset(b.sums, 0, num_sums * VECTOR_BYTES);
                Int t = 0;
                for (; t + 4 <= count; t += 4) backward_tokens<T, W, 4>(c, g, k, block, clip, first, t, bias, b);
                for (; t < count; ++t) backward_tokens<T, W, 1>(c, g, k, block, clip, first, t, bias, b);
                add_up<T>(b.totals, b.sums, num_sums);
            }
            T* dx = g.dx + clip * g.dx_clip + block.first;
            for (Int t = 0; t < L; ++t) {
                Vector<T> value = k ? load(dx + t * g.dx_token, block.count) : Vector<T>{};
                for (Int j = 0; j < width; ++j) value += b.w[j] * b.dpre[t - reach(c, d, j)];
                store(dx + t * g.dx_token, value, block.count);
            }
            for (Int place = 0; g.dinitial && place < beyond; ++place) {
                const Int token = d.reverse ? L + place : place - beyond;
                Vector<T> value = {};
                for (Int j = 0; j < width; ++j) {
                    const Int to = token - reach(c, d, j);
                    if (to >= 0 && to < L) value += b.w[j] * b.dpre[to];
                }
                for (Int i = 0; i < block.count; ++i) g.dinitial[(clip * E + block.first + i) * beyond + place] = value[i];
            }
            for (Int i = 0; i < block.count; ++i) {
                T* sums = g.by_clip + ((clip * K + k) * E + block.first + i) * (width + 1);
                for (Int j = 0; j <= width; ++j) sums[j] = T(b.totals[j * LANES<T> + i]);
                if (c.clips == 1) write_sums(c, g, k, block.first + i, sums);
            }
            for (Int j = 0; j < c.rows; ++j) {
                T* sums = (c.clips == 1 ? g.dproject[k] : g.rows_by_clip + (clip * K + k) * c.rows * E) + j * E + block.first;
                for (Int i = 0; i < block.count; ++i) sums[i] = T(b.totals[(width + 1 + j) * LANES<T> + i]);
            }
        }
    });
    if (c.clips == 1) return;
    for_each_item(K * E, c.threads, (width + 1) * sizeof(T), [&](Int item, Scratch scratch) {
        T* sums = scratch.take<T>(width + 1);
        for (Int j = 0; j <= width; ++j) {
            double x = 0;
            for (Int clip = 0; clip < c.clips; ++clip) x += g.by_clip[(clip * K * E + item) * (width + 1) + j];
            sums[j] = T(x);
        }
        write_sums(c, g, item / E, item % E, sums);
    });
    for_each_item(K * c.rows, c.threads, 0, [&](Int item, Scratch) {
        T* sums = g.dproject[item / c.rows] + item % c.rows * E;
        std::memset(sums, 0, E * sizeof(T));
        for (Int clip = 0; clip < c.clips; ++clip)
            for (Int e = 0; e < E; ++e) sums[e] += g.rows_by_clip[(clip * K * c.rows + item) * E + e];
    });
}

template <class T> void forward_of(const Conv<T>& c) { c.width == 4 ? forward<T, 4>(c) : forward<T, 0>(c); }
template <class T> void backward_of(const Conv<T>& c, const Gradients<T>& g) {
    c.width == 4 ? backward<T, 4>(c, g) : backward<T, 0>(c, g);
}

}  // namespace conv

extern "C" {
void conv_forward_float(const conv::Conv<float>* c) { conv::forward_of(*c); }
void conv_forward_double(const conv::Conv<double>* c) { conv::forward_of(*c); }
void conv_backward_float(const conv::Conv<float>* c, const conv::Gradients<float>* g) { conv::backward_of(*c, *g); }
void conv_backward_double(const conv::Conv<double>* c, const conv::Gradients<double>* g) { conv::backward_of(*c, *g); }
}
