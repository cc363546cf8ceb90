"""Runs Core ML's ML Programs on any machine: interprets a saved `.mlpackage` in numpy alone.

This checks the file: weights, graph, states, shapes, and that no value exceeds float16's range. It
doesn't check what Apple's compiler does with the file, or how fast that runs. Matrices stay
compressed in the mapped file; one block of rows at a time is dequantized to float32 and rounded to
the declared type, as on a device.

    program = Program(path)
    outputs = program.run("main", inputs, program.make_state("main"))
    program.audit.largest(10)  # the operations nearest to overflowing
    program.audit.first_not_finite

Shapes are fixed, and a tensor has at most 2^30 elements. An unsupported operation raises an error
with its name before anything runs. The supported operations (gelu and scatters in every mode,
lookup tables of scalars only):

    const, abs, add, band_part, cast, ceil, clip, concat, constexpr_blockwise_shift_scale,
    constexpr_lut_to_dense, cos, cumsum, elu, equal, erf, exp, exp2, expand_dims, fill, floor,
    floor_div, gather, gather_along_axis, gather_nd, gelu, greater, greater_equal, identity,
    inverse, layer_norm, leaky_relu, less, less_equal, linear, log, logical_and, logical_not,
    logical_or, logical_xor, matmul, maximum, minimum, mod, mul, not_equal, one_hot, pad, pow,
    range_1d, read_state, real_div, reduce_argmax, reduce_argmin, reduce_l1_norm, reduce_l2_norm,
    reduce_log_sum_exp, reduce_max, reduce_mean, reduce_min, reduce_prod, reduce_sum,
    reduce_sum_square, relu, reshape, reverse, round, rsqrt, scaled_dot_product_attention,
    scatter, scatter_along_axis, scatter_nd, select, shape, sigmoid, sign, silu, sin,
    slice_by_index, slice_by_size, slice_update, softmax, softplus, split, sqrt, square, squeeze,
    stack, sub, tan, tanh, tile, transpose, write_state
"""
