"""Makes one HTML page of figures that the other commands have measured."""
