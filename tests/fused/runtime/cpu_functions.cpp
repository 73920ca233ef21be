// The functions of cpu_kernel.h over arrays, for the tests.

#include "cpu_kernel.h"

template <class T, class Function> void map(const T* x, T* y, Int count, Function function) {
    for (Int i = 0; i < count; i += LANES<T>) {
        const Int some = count - i < LANES<T> ? count - i : LANES<T>;
        store(y + i, function(load(x + i, some)), some);
    }
}

#define FUNCTION(name, T, expression) \
    extern "C" void name(const T* from, T* to, Int count) { \
        map(from, to, count, [](Vector<T> x) { return Vector<T>(expression); }); \
    }

FUNCTION(exp2_float, float, exp2(x))
FUNCTION(exp2_double, double, exp2(x))
FUNCTION(exp_float, float, exp(x))
FUNCTION(exp_double, double, exp(x))
FUNCTION(log1p_float, float, log1p(x))
FUNCTION(softplus_float, float, softplus(x))
FUNCTION(softplus_double, double, softplus(x))
FUNCTION(sigmoid_float, float, sigmoid<float>(x))
FUNCTION(sigmoid_double, double, sigmoid<double>(x))

extern "C" void sums_float(const float* from, float* to, Int rows) {
    sum_rows<float>(reinterpret_cast<const Vector<float>*>(from), rows, to);
}
extern "C" void sums_double(const double* from, double* to, Int rows) {
    sum_rows<double>(reinterpret_cast<const Vector<double>*>(from), rows, to);
}
