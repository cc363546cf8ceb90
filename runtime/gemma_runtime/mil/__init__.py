"""Runs Core ML's ML Programs on any machine: a saved `.mlpackage`, op by op, in numpy alone.

It proves what is in the file: weights, graph, states, shapes, and that nothing leaves float16. It
doesn't prove what Apple's compiler makes of it, nor speed. Matrices stay compressed in the mapped
file; a block of rows is widened at a time, rounded to the declared type as on a device.

    program = Program(path)
    outputs = program.run("main", inputs, program.make_state("main"))
    program.audit.largest(10)  # the operations nearest to overflowing
    program.audit.first_not_finite

`gemma_runtime.mil.ops.KNOWN` names the operations. Shapes are fixed, and an operation that is not
known fails by name before anything runs.
"""
