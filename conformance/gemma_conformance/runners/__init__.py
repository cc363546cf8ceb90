"""One file for each kind of system. They run in the Python that has the system installed."""
