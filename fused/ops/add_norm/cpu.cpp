// Addition and norm of rows on a CPU, forward and backward. A sum over a row is that of the lanes of one vector.

namespace norm {

constexpr Int TILE = 32;  // rows

// All members have 8 bytes: Python packs them as words. Rows are contiguous.
template <class T> struct Norm {
    Int rows, channels, centre, threads;
    double eps;
    const T *x, *residual, *weight, *bias;  // residual and bias may be null
    T *y, *v, *mean, *scale;                // v = x + residual; mean, null unless centred, and scale of each row
};

template <class T> struct Gradients {
    const T *dy, *dv_in;        // either may be null
    T *dv, *dweight, *dbias;    // the last may be null
    T* by_tile;                 // (tiles, 2, D): shares of the gradients of weight and bias
};

template <class T, class Body> inline void for_each_tile(const Norm<T>& n, Int bytes, const Body& body) {
    for_each_item((n.rows + TILE - 1) / TILE, n.threads, bytes, [&](Int tile, Scratch scratch) {
        body(tile, tile * TILE, (tile + 1) * TILE < n.rows ? (tile + 1) * TILE : n.rows, scratch);
    });
}

// Call body(first channel, number of channels) for every vector of a row.
template <class T, class Body> inline void for_each_vector(Int channels, const Body& body) {
    for (Int first = 0; first < channels; first += LANES<T>)
        body(first, channels - first < LANES<T> ? channels - first : LANES<T>);
}

template <class T> void forward(const Norm<T>& n) {
    const Int D = n.channels;
    for_each_tile(n, 0, [&](Int, Int first_row, Int last_row, Scratch) {
        for (Int row = first_row; row < last_row; ++row) {
            T *v = n.v + row * D, *y = n.y + row * D;
            Vector<T> total = {};
            for_each_vector<T>(D, [&](Int i, Int count) {
                Vector<T> value = load(n.x + row * D + i, count);
                if (n.residual) value += load(n.residual + row * D + i, count);
                store(v + i, value, count);
                total += value;
            });
            const T mean = n.centre ? sum<T>(total) / T(D) : T(0);
            Vector<T> squares = {};
            for_each_vector<T>(D, [&](Int i, Int count) {
                const Vector<T> value = first_lanes<T>(load(v + i, count) - mean, count);
                squares += value * value;
            });
            const T scale = T(1) / std::sqrt(sum<T>(squares) / T(D) + T(n.eps));
            for_each_vector<T>(D, [&](Int i, Int count) {
                Vector<T> value = (load(v + i, count) - mean) * scale * load(n.weight + i, count);
                if (n.bias) value += load(n.bias + i, count);
                store(y + i, value, count);
            });
            if (n.centre) n.mean[row] = mean;
            n.scale[row] = scale;
        }
    });
}

template <class T> void backward(const Norm<T>& n, const Gradients<T>& g) {
    const Int D = n.channels, tiles = (n.rows + TILE - 1) / TILE;
    for_each_tile(n, 0, [&](Int tile, Int first_row, Int last_row, Scratch) {
        T *dweight = g.by_tile + tile * 2 * D, *dbias = dweight + D;
        std::memset(dweight, 0, 2 * D * sizeof(T));
        for (Int row = first_row; row < last_row; ++row) {
            const T *v = n.v + row * D, *dy = g.dy + row * D, mean = n.centre ? n.mean[row] : T(0), scale = n.scale[row];
            Vector<T> along = {}, total = {};
            for_each_vector<T>(D, [&](Int i, Int count) {
                const Vector<T> unit = (load(v + i, count) - mean) * scale, grad = load(dy + i, count);
                const Vector<T> weighted = grad * load(n.weight + i, count);
                along += weighted * unit;
                total += weighted;
                store(dweight + i, load(dweight + i, count) + grad * unit, count);
                if (g.dbias) store(dbias + i, load(dbias + i, count) + grad, count);
            });
            const T share = sum<T>(along) / T(D), shift = n.centre ? sum<T>(total) / T(D) : T(0);
            for_each_vector<T>(D, [&](Int i, Int count) {
                const Vector<T> unit = (load(v + i, count) - mean) * scale;
                Vector<T> dv = (load(dy + i, count) * load(n.weight + i, count) - shift - unit * share) * scale;
                if (g.dv_in) dv += load(g.dv_in + row * D + i, count);
                store(g.dv + row * D + i, dv, count);
            });
        }
    });
    for (Int part = 0; part < 2; ++part)
        for (Int i = 0; i < D; ++i) {
            double x = 0;
            for (Int tile = 0; tile < tiles; ++tile) x += g.by_tile[(tile * 2 + part) * D + i];
            if (!part) g.dweight[i] = T(x);
            else if (g.dbias) g.dbias[i] = T(x);
        }
}

}  // namespace norm

extern "C" {
void norm_forward_float(const norm::Norm<float>* n) { norm::forward(*n); }
void norm_forward_double(const norm::Norm<double>* n) { norm::forward(*n); }
void norm_backward_float(const norm::Norm<float>* n, const norm::Gradients<float>* g) { norm::backward(*n, *g); }
void norm_backward_double(const norm::Norm<double>* n, const norm::Gradients<double>* g) { norm::backward(*n, *g); }
}
