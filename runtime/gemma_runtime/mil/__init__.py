"""Runs Core ML's ML Programs on any machine: a saved `.mlpackage`, op by op, in numpy.

It proves what is in the file: weights, graph, states, shapes, and that nothing leaves float16. It
doesn't prove what Apple's compiler makes of it, nor speed.
"""
